// An answer as its tokens, coloured by how likely the model held each; hover or arrow keys show what else it considered.

import { h } from "./dom.js";
import { hideTip, showTip } from "./tip.js";

const percent = (logprob) => {
  const value = 100 * Math.exp(logprob);
  return value >= 99.95 ? "100 %" : value < 0.1 ? "< 0.1 %" : `${value.toFixed(1)} %`;
};
const visible = (text) => (text === "" ? "∅" : text.replaceAll("\n", "⏎").replaceAll("\t", "⇥").replaceAll(" ", "·"));

export function tokenView(tokens) {
  const box = h("div.tokens", { role: "group", "aria-label": "The answer as tokens; arrow keys move between them" });
  tokens.forEach((token, index) => {
    const [text, logprob] = token;
    const doubt = Math.min(1, -logprob / 4.6); // 1 % and below is the full colour
    const span = h("span.token", { tabIndex: index ? -1 : 0, "aria-label": `${text}, ${percent(logprob)}`, style: { "--doubt": doubt.toFixed(3) } }, text);
    span.addEventListener("mouseenter", () => showTip(span, alternatives(token)));
    span.addEventListener("mouseleave", hideTip);
    span.addEventListener("focus", () => showTip(span, alternatives(token)));
    span.addEventListener("blur", hideTip);
    box.append(span);
  });
  box.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const at = [...box.children].indexOf(document.activeElement);
    const next = step && box.children[at + step];
    if (!next) return;
    event.preventDefault();
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  return box;
}

function alternatives([text, logprob, top]) {
  const rows = top.some(([each]) => each === text) ? top : [[text, logprob], ...top];
  return h("table.alternatives", {}, h("caption", {}, "What could have come here"), rows.map(([each, value]) =>
    h(each === text ? "tr.chosen" : "tr", {}, h("td", {}, visible(each)), h("td", {}, h("span.bar", { style: { "--share": Math.exp(value).toFixed(4) } })), h("td.figure", {}, percent(value))),
  ));
}
