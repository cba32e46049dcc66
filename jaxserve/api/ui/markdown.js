// Markdown -> elements. Everything passes DOMPurify with a short list of tags; the page's Content-Security-Policy lets
// no other HTML in (trusted types). Images are links: a picture is a request, and a GET on this server may do something.

import { h, copyText, icon } from "./dom.js";
import { Marked } from "./vendor/marked.js";
import DOMPurify from "./vendor/purify.js";

const HARMLESS = /^<\/?(br|sub|sup|kbd|b|i|u|mark|details|summary)\s*\/?>$/i;
const TAGS = "a b blockquote br code dd del details div dl dt em h1 h2 h3 h4 h5 h6 hr i input kbd li mark ol p pre s span strong sub summary sup table tbody td th thead tr u ul".split(" ");
const ATTRIBUTES = ["href", "title", "class", "align", "start", "type", "checked", "disabled"];
const LINK = /^(https?:|mailto:)/i;

const escape = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

// Formulas: $$…$$ and \\[…\\] stand alone, \\(…\\) and $…$ in a line. A dollar before a space or a digit is money.
const DISPLAY = /^(?:\$\$([\s\S]+?)\$\$|\\\[([\s\S]+?)\\\])[ \t]*(?:\n|$)/;
const INLINE = /^(?:\$\$([^\n]+?)\$\$|\\\[([^\n]+?)\\\]|\\\(([\s\S]+?)\\\)|\$(?![\s$])((?:\\.|[^$\\\n])*?[^\s\\$])\$(?!\d))/;
const formula = (name, level, rule, start) => ({
  name,
  level,
  start: (text) => text.match(start)?.index,
  tokenizer(text) {
    const found = rule.exec(text);
    if (!found) return undefined;
    return { type: name, raw: found[0], text: found.slice(1).find(Boolean).trim(), display: name === "display" || /^(\$\$|\\\[)/.test(found[0]) };
  },
  renderer: ({ text, display }) => `<code class="language-tex${display ? "-display" : ""}">${escape(text)}</code>`,
});

const marked = new Marked({
  gfm: true,
  breaks: false,
  extensions: [formula("display", "block", DISPLAY, /(?<=\n)(?:\$\$|\\\[)/), formula("inline", "inline", INLINE, /\$|\\[([]/)],
  renderer: {
    html: ({ text }) => (HARMLESS.test(text.trim()) ? text : escape(text)), // what a model writes is shown, not obeyed
    image: ({ href, text, title }) => `<a href="${escape(href)}" title="${escape(title ?? href)}">${escape(text || href)}</a>`,
    checkbox: ({ checked }) => `<input type="checkbox" disabled${checked ? " checked" : ""}>`,
  },
});

DOMPurify.addHook("afterSanitizeAttributes", (node) => {
  if (node.tagName === "A") {
    if (!LINK.test(node.getAttribute("href") ?? "")) node.removeAttribute("href");
    else {
      node.setAttribute("target", "_blank");
      node.setAttribute("rel", "noopener noreferrer nofollow");
    }
  }
  if (node.tagName === "INPUT") {
    node.setAttribute("type", "checkbox");
    node.setAttribute("disabled", "");
  }
  const kept = [...(node.classList ?? [])].filter((name) => /^(hljs|language-)/.test(name) || name.endsWith("_"));
  if (node.classList?.length && kept.length !== node.classList.length) node.className = kept.join(" ");
});

const clean = (html) => DOMPurify.sanitize(html, { ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false, RETURN_TRUSTED_TYPE: true });

/** Shows text as markdown inside box. Blocks that did not change since the last call stay as they are, so that a
 * streamed answer costs what its last block costs. complete: nothing follows. */
export function showMarkdown(box, text, complete = true) {
  let tokens;
  try {
    tokens = marked.lexer(text);
  } catch {
    tokens = [{ type: "paragraph", raw: text, text, tokens: [{ type: "text", raw: text, text: text, escaped: false }] }];
  }
  const blocks = tokens.filter((token) => token.type !== "space" && token.type !== "def");
  blocks.forEach((token, index) => {
    const last = index === blocks.length - 1;
    const key = token.type + token.raw + (last && !complete ? "…" : "");
    let block = box.children[index];
    if (block?.dataset.block && block.source === key) return;
    const made = showBlock(token, !last || complete);
    made.source = key;
    if (block) block.replaceWith(made);
    else box.append(made);
  });
  while (box.children.length > blocks.length) box.lastChild.remove();
}

function showBlock(token, complete) {
  const made = token.type === "code" ? codeBlock(token, complete) : h("div");
  made.dataset.block = token.type;
  if (token.type !== "code") {
    made.innerHTML = clean(marked.parser([token]));
    for (const code of made.querySelectorAll("pre > code")) nestedCode(code, complete);
    for (const code of made.querySelectorAll("code.language-tex, code.language-tex-display")) if (complete) typeset(code);
    for (const table of made.querySelectorAll("table")) {
      const frame = h("div.table", { tabIndex: 0, role: "region", "aria-label": "Table" });
      table.replaceWith(frame);
      frame.append(table);
    }
  }
  return made;
}

function nestedCode(code, complete) {
  const language = /language-(\S+)/.exec(code.className)?.[1] ?? "";
  code.parentElement.replaceWith(codeBlock({ text: code.textContent.replace(/\n$/, ""), lang: language }, complete));
}

export function codeBlock({ text, lang }, complete = true) {
  const language = (lang ?? "").trim().split(/\s+/)[0];
  const code = h("code", { textContent: text });
  const button = h("button.copy", { type: "button", "aria-label": "Copy code", title: "Copy code", onclick: () => copyText(text, button) }, icon("copy"));
  if (complete && language && text.length < 100_000) highlight(code, text, language.toLowerCase());
  return h("div.code", {}, h("div.code-head", {}, h("span", {}, language || "text"), button), h("pre", { tabIndex: 0, role: "region", "aria-label": `Code, ${language || "text"}` }, code));
}

let highlighter;

async function highlight(code, text, language) {
  highlighter ??= import("./vendor/highlight.js").then((module) => module.default, () => null);
  const hljs = await highlighter;
  if (hljs?.getLanguage(language)) code.innerHTML = clean(hljs.highlight(text, { language, ignoreIllegals: true }).value);
}

let typesetter;

/** TeX -> MathML, element by element and with nothing that Temml does not trust; what it cannot read stays as it was. */
async function typeset(code) {
  typesetter ??= import("./vendor/temml.js").then((module) => module.default, () => null);
  const temml = await typesetter;
  const box = h("span.math");
  try {
    temml.render(code.textContent, box, { displayMode: code.className.endsWith("display"), throwOnError: true, trust: false, maxExpand: 200, maxSize: [20, 200] });
  } catch {
    return;
  }
  code.replaceWith(box);
}
