// One message on the page: what it says, its thinking and calls, and what can be done with it.

import { codeBlock, showMarkdown } from "./markdown.js";
import { copyText, h, icon, iconButton, number, seconds, whole } from "./dom.js";
import { contextLength, state } from "./state.js";
import { tokenView } from "./tokens.js";

const ENDS = {
  length: "Cut at the most tokens allowed",
  stopped: "Stopped",
  interrupted: "Interrupted: the page was left or the connection ended",
  content_filter: "Filtered",
};

/** act: {edit, regenerate, goOn, remove, sibling, results} of the chat, each called with the message. */
export class MessageView {
  constructor(node, act) {
    Object.assign(this, { node, act, raw: state.settings.raw, asTokens: false, editing: false, shown: "", drawn: {} });
    this.body = h("div.body");
    this.foot = h("div.foot");
    this.element = h("article.message", { class: node.role, "data-id": node.id, "aria-label": { user: "You", assistant: "Answer", tool: "Tool result" }[node.role] }, this.body, this.foot);
  }

  /** place: {live, last, siblings: [nodes]} */
  update(place) {
    if (this.editing) return;
    const { node } = this;
    this.place = place;
    this.element.classList.toggle("live", place.live);
    this.element.setAttribute("aria-busy", String(place.live));
    if (node.role === "assistant") this.showAnswer(place.live);
    else this.showText();
    this.showFoot(place);
  }

  showText() {
    const { node } = this;
    if (this.shown === node.content) return;
    this.shown = node.content;
    if (node.role === "tool") {
      this.body.replaceChildren(h("details.block", {}, h("summary", {}, icon("tool"), h("span", {}, `Result of ${node.name || "the tool"}`)), h("pre.plain", {}, node.content)));
      return;
    }
    this.body.replaceChildren(h("div.bubble", {}, node.content));
  }

  showAnswer(live) {
    const { node } = this;
    this.parts ??= this.answerParts();
    const { thought, thinking, prose, calls, error, waiting } = this.parts;
    thought.hidden = !node.reasoning;
    if (node.reasoning) {
      const done = node.content || node.calls?.length || !live;
      thought.querySelector(".label").textContent = !done ? "Thinking…" : node.stats?.thought ? `Thought for ${seconds(node.stats.thought)}` : "Thinking";
      if (!this.touched) thought.open = !done;
      if (this.isNew("reasoning", node.reasoning, Boolean(done))) showMarkdown(thinking, node.reasoning, Boolean(done));
    }
    this.showContent(prose, live);
    this.showCalls(calls, live);
    waiting.hidden = !live || Boolean(node.content || node.reasoning || node.calls?.length);
    error.hidden = !node.error;
    if (node.error) error.replaceChildren(h("strong", {}, "No answer. "), node.error);
  }

  /** Whether this part reads otherwise than when it was drawn: every frame of an answer asks each message above it. */
  isNew(part, text, way) {
    const before = this.drawn[part];
    if (before?.text === text && before.way === way) return false;
    this.drawn[part] = { text, way };
    return true;
  }

  answerParts() {
    const thinking = h("div.prose.quiet");
    const thought = h("details.block.thought", { onclick: () => (this.touched = true) }, h("summary", {}, icon("thought"), h("span.label", {}, "Thinking")), thinking);
    const parts = { thought, thinking, prose: h("div.prose"), calls: h("div.calls"), error: h("div.error", { role: "alert" }), waiting: h("div.waiting", { "aria-label": "Waiting for the first token" }, h("i"), h("i"), h("i")) };
    this.body.replaceChildren(parts.thought, parts.waiting, parts.prose, parts.calls, parts.error);
    return parts;
  }

  showContent(prose, live) {
    const { node } = this;
    const kind = this.asTokens && node.tokens?.length ? "tokens" : this.raw ? "raw" : "markdown";
    if (!this.isNew("content", node.content, `${kind} ${live}`)) return;
    if (prose.dataset.kind !== kind) prose.replaceChildren();
    prose.dataset.kind = kind;
    if (kind === "tokens") prose.replaceChildren(tokenView(node.tokens));
    else if (kind === "raw") prose.replaceChildren(h("pre.plain", {}, node.content));
    else showMarkdown(prose, node.content, !live);
  }

  showCalls(box, live) {
    const { node } = this;
    const key = JSON.stringify([node.calls, live, this.place.last]);
    if (!node.calls?.length || key === this.callsShown) return;
    this.callsShown = key;
    box.replaceChildren(...node.calls.map((call) => callCard(call, live)));
    if (!live && this.place.last && node.finish === "tool_calls") box.append(this.resultForm());
  }

  resultForm() {
    const fields = this.node.calls.map((call) => h("textarea", { rows: 2, placeholder: `What ${call.name} returns`, "aria-label": `Result of ${call.name}` }));
    const send = (event) => {
      event.preventDefault();
      this.act.results(this.node, fields.map((field) => field.value));
    };
    return h("form.results", { onsubmit: send }, fields, h("button.primary", { type: "submit" }, fields.length > 1 ? "Send results" : "Send result"));
  }

  showFoot({ live, last, siblings }) {
    const { node, act } = this;
    const key = JSON.stringify([live, last, siblings.length, siblings.indexOf(node), node.finish, node.stats, node.tokens?.length > 0, this.raw, this.asTokens]);
    if (key === this.footShown) return;
    this.footShown = key;
    const copy = iconButton("copy", "Copy", () => copyText(node.content, copy));
    const buttons = [];
    if (!live) {
      buttons.push(copy, node.role !== "tool" && iconButton("edit", "Edit", () => this.edit()));
      if (node.role === "assistant") buttons.push(...this.answerButtons(last));
      buttons.push(iconButton("trash", "Delete this and what follows", () => act.remove(node)));
    }
    this.foot.replaceChildren(
      ...(siblings.length > 1 ? [branches(node, siblings, act)] : []),
      h("div.actions", {}, buttons),
      ...(node.role === "assistant" ? [statsLine(node, live)] : []),
    );
  }

  answerButtons(last) {
    const { node, act } = this;
    const toggle = (name) => () => {
      this[name] = !this[name];
      this.update(this.place);
    };
    return [
      iconButton("redo", "Another answer", () => act.regenerate(node)),
      last && !node.calls?.length && iconButton("play", "Continue this answer", () => act.goOn(node)),
      iconButton("raw", this.raw ? "Show formatted" : "Show raw text", toggle("raw"), { "aria-pressed": String(this.raw) }),
      node.tokens?.length > 0 && iconButton("heat", this.asTokens ? "Show formatted" : "Show token probabilities", toggle("asTokens"), { "aria-pressed": String(this.asTokens) }),
    ];
  }

  edit() {
    const { node, act } = this;
    const field = h("textarea.editor", { value: node.content, "aria-label": "Edit the message", rows: Math.min(16, node.content.split("\n").length + 1) });
    const close = () => {
      this.editing = false;
      this.parts = this.callsShown = null;
      this.drawn = {};
      this.shown = this.footShown = "";
      this.update(this.place);
      this.element.querySelector("[aria-label=Edit]")?.focus();
    };
    const keep = () => {
      this.editing = false;
      act.edit(node, field.value);
    };
    field.addEventListener("keydown", (event) => {
      if (event.key === "Escape") close();
      if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) keep();
      event.stopPropagation();
    });
    this.editing = true;
    const label = node.role === "user" ? "Send" : "Keep as a version";
    this.body.replaceChildren(field);
    this.foot.replaceChildren(h("div.editing", {}, h("button.primary", { type: "button", onclick: keep }, label), h("button.plain-button", { type: "button", onclick: close }, "Cancel")));
    field.focus();
    field.setSelectionRange(field.value.length, field.value.length);
  }
}

function callCard(call, live) {
  let text = call.arguments;
  try {
    text = JSON.stringify(JSON.parse(call.arguments), null, 2);
  } catch {
    /* still being written, or no JSON: as it came */
  }
  return h("details.block.call", { open: true }, h("summary", {}, icon("tool"), h("span", {}, "Calls ", h("code", {}, call.name || "…"))), codeBlock({ text, lang: "json" }, !live));
}

function branches(node, siblings, act) {
  const at = siblings.indexOf(node);
  const go = (step) => () => act.sibling(siblings[at + step]);
  return h("div.branches", { role: "group", "aria-label": "Versions" },
    iconButton("left", "Previous version", go(-1), { disabled: at === 0 }),
    h("span", {}, `${at + 1} / ${siblings.length}`),
    iconButton("right", "Next version", go(1), { disabled: at === siblings.length - 1 }));
}

function statsLine(node, live) {
  const stats = node.stats ?? {};
  const parts = [];
  if (stats.rate) parts.push(h("span", { title: "Tokens a second after the first" }, `${number.format(stats.rate)} tok/s`));
  if (stats.tokens) parts.push(h("span", {}, `${whole.format(stats.tokens)} tokens`));
  if (stats.ttft !== undefined) parts.push(h("span", { title: "Time to the first token" }, `first after ${seconds(stats.ttft)}`));
  if (stats.cached) parts.push(h("span", { title: "Prompt tokens that the prefix cache held already" }, `${whole.format(stats.cached)} of ${whole.format(stats.prompt)} cached`));
  const used = (stats.prompt ?? 0) + (stats.tokens ?? 0);
  if (used && contextLength()) parts.push(contextFill(used, contextLength()));
  if (!live && ENDS[node.finish]) parts.push(h("span.end", {}, ENDS[node.finish]));
  return h("div.stats", {}, parts);
}

function contextFill(used, limit) {
  const share = Math.min(1, used / limit);
  const label = `${whole.format(used)} of ${whole.format(limit)} tokens of context`;
  return h("span.fill", { title: label }, h("span.meter", { role: "meter", "aria-label": label, "aria-valuenow": String(Math.round(100 * share)), "aria-valuemin": "0", "aria-valuemax": "100", style: { "--share": share.toFixed(4) } }), `${share < 0.01 ? "<1" : Math.round(100 * share)} % of context`);
}
