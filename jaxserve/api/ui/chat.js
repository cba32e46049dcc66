// The conversation that is open: its messages, the composer, and what its buttons do.

import { h, icon, iconButton, eachFrame } from "./dom.js";
import { generate, runningIn, stop } from "./generate.js";
import { MessageView } from "./message.js";
import { emit, model, on, state, write } from "./state.js";
import { add, children, path, prune, select } from "./tree.js";

const MAX_FILE = 512 * 1024; // bytes of a text file that is put into a message
const IDEAS = ["Explain paged attention in three sentences", "Write a Python function that merges two sorted lists", "Three questions to ask before buying a used bicycle", "Make a table of the planets with their moons"];

const views = new Map(); // message id -> MessageView
let files = []; // [{name, text}] that go with the next message
let pinned = true;
const scroller = h("div.scroll", { tabIndex: -1 });
const list = h("div.messages", { role: "log", "aria-live": "off" });
const latest = h("button.latest", { type: "button", hidden: true, onclick: () => toEnd(true) }, icon("down"), "Latest");
const spoken = h("div.offscreen", { role: "status", "aria-live": "polite" });
const field = h("textarea", { rows: 1, placeholder: "Message", "aria-label": "Message", enterKeyHint: "send" });
const attached = h("div.attached");
const sendButton = h("button.send", { type: "button" }, icon("send"));
const progress = h("div.starting", { role: "status", hidden: true });

export function mountChat(section) {
  const picker = h("input", { type: "file", multiple: true, hidden: true, tabIndex: -1, onchange: () => attach(picker.files) });
  const clip = iconButton("clip", "Attach text files", () => picker.click());
  const box = h("div.composer", {}, attached, h("div.composer-row", {}, clip, field, sendButton), picker);
  const hint = h("p.hint", {}, h("kbd", {}, "Enter"), " sends · ", h("kbd", {}, "Shift Enter"), " new line · ", h("kbd", {}, "?"), " all keys");
  scroller.append(list);
  section.append(scroller, h("div.dock", {}, latest, progress, box, hint), spoken);
  sendButton.addEventListener("click", () => (runningIn(state.current) ? stop(state.current) : send()));
  field.addEventListener("input", resize);
  field.addEventListener("keydown", onKey);
  field.addEventListener("paste", (event) => event.clipboardData.files.length && attach(event.clipboardData.files));
  section.addEventListener("dragover", (event) => event.preventDefault());
  section.addEventListener("drop", (event) => {
    event.preventDefault();
    attach(event.dataTransfer.files);
  });
  scroller.addEventListener("scroll", () => {
    pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 60;
    latest.hidden = pinned;
  });
  on("opened", show);
  const redraw = eachFrame((shown) => shown === state.current && show(shown, false));
  on("changed", ({ conversation }) => redraw(conversation));
  on("ended", ({ conversation, node }) => conversation === state.current && speak(node));
  on("server", showProgress);
}

export const focusComposer = () => field.focus({ preventScroll: true });

function show(conversation, fresh = true) {
  const nodes = path(conversation);
  const live = runningIn(conversation)?.node;
  if (fresh) {
    views.clear();
    list.replaceChildren();
    pinned = true;
  }
  if (!nodes.length) list.replaceChildren(welcome());
  else {
    const wanted = nodes.map((node) => view(node));
    wanted.forEach((each, index) => {
      if (list.children[index] !== each.element) list.insertBefore(each.element, list.children[index] ?? null);
      each.update({ live: each.node === live, last: index === nodes.length - 1, siblings: children(conversation, each.node.parent) });
    });
    while (list.children.length > wanted.length) list.lastChild.remove();
  }
  sendButton.replaceChildren(icon(live ? "stop" : "send"));
  sendButton.setAttribute("aria-label", live ? "Stop" : "Send");
  sendButton.title = live ? "Stop (Esc)" : "Send (Enter)";
  sendButton.classList.toggle("stops", Boolean(live));
  setEnabled();
  if (pinned) toEnd();
  if (fresh) {
    files = [];
    showFiles();
  }
}

function view(node) {
  if (!views.has(node.id)) views.set(node.id, new MessageView(node, actions));
  return views.get(node.id);
}

function toEnd(smooth = false) {
  scroller.scrollTo({ top: scroller.scrollHeight, behavior: smooth && !matchMedia("(prefers-reduced-motion: reduce)").matches ? "smooth" : "instant" });
}

const generates = () => state.info?.is_generation !== false;

function welcome() {
  if (!generates()) return h("div.welcome", {}, h("h1", {}, "This server makes vectors"), h("p", {}, `${model()} answers /v1/embeddings, and has nothing to say in a chat. The engine tab shows it at work.`));
  const facts = state.info ? `${model()} · context of ${state.info.max_model_len.toLocaleString("en")} tokens` : "";
  return h("div.welcome", {}, h("h1", {}, "What shall we look at?"), h("p", {}, facts), h("div.ideas", {}, IDEAS.map((idea) =>
    h("button", { type: "button", onclick: () => { field.value = idea; resize(); send(); } }, idea))));
}

function speak(node) {
  spoken.textContent = node.error ? `No answer: ${node.error}` : `Answer: ${node.content.slice(0, 400)}`;
}

// What can be done with a message

const answer = (conversation, parent) => {
  const node = add(conversation, parent, { role: "assistant", calls: [], reasoning: "", tokens: [] });
  pinned = true;
  generate(conversation, node);
};

const actions = {
  edit(node, content) {
    const conversation = state.current;
    const made = add(conversation, node.parent, { role: node.role, content, ...(node.role === "assistant" ? { model: node.model, finish: "stop", calls: node.calls } : {}) });
    views.delete(node.id);
    write(conversation);
    if (node.role === "user") answer(conversation, made.id);
    show(conversation, false);
    emit("list");
    focusComposer();
  },
  regenerate(node) {
    answer(state.current, node.parent);
    show(state.current, false);
  },
  goOn(node) {
    generate(state.current, node, true);
  },
  remove(node) {
    stop(state.current);
    prune(state.current, node);
    write(state.current);
    show(state.current, false);
    emit("list");
  },
  sibling(node) {
    select(state.current, node);
    write(state.current);
    show(state.current, false);
    list.querySelector(`[data-id="${CSS.escape(node.id)}"]`)?.scrollIntoView({ block: "nearest" });
  },
  results(node, texts) {
    const conversation = state.current;
    let parent = node.id;
    node.calls.forEach((call, index) => {
      parent = add(conversation, parent, { role: "tool", name: call.name, callId: call.id, content: texts[index] }).id;
    });
    answer(conversation, parent);
    show(conversation, false);
  },
};

// The composer

function send() {
  const conversation = state.current;
  const text = [field.value.trim(), ...files.map(({ name, text: held }) => `${fence(held)}${name}\n${held}\n${fence(held)}`)].filter(Boolean).join("\n\n");
  if (!text || !state.ready || !generates() || runningIn(conversation)) return;
  const asked = add(conversation, conversation.leaf, { role: "user", content: text });
  field.value = "";
  files = [];
  showFiles();
  resize();
  answer(conversation, asked.id);
  show(conversation, false);
  emit("list");
}

/** More backticks than the text has in a row. */
const fence = (text) => "`".repeat(Math.max(3, ...(text.match(/`+/g) ?? []).map((run) => run.length + 1)));

async function attach(chosen) {
  for (const file of chosen) {
    const text = file.size <= MAX_FILE ? await file.text() : null;
    if (text === null || text.includes("\0")) emit("notice", { text: `${file.name} is no text of up to ${MAX_FILE / 1024} KiB; this model reads text only.` });
    else files.push({ name: file.name, text });
  }
  showFiles();
  focusComposer();
}

function showFiles() {
  attached.replaceChildren(...files.map((file) => h("span.file", {}, file.name, iconButton("close", `Leave ${file.name} out`, () => {
    files = files.filter((each) => each !== file);
    showFiles();
  }))));
  setEnabled();
}

function onKey(event) {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    send();
  } else if (event.key === "ArrowUp" && !field.value) {
    const last = path(state.current).findLast((node) => node.role === "user");
    if (last && !runningIn(state.current)) {
      event.preventDefault();
      view(last).edit();
    }
  }
}

function resize() {
  field.style.height = "auto";
  field.style.height = `${Math.min(field.scrollHeight, innerHeight * 0.4)}px`;
  setEnabled();
}

function setEnabled() {
  sendButton.disabled = !runningIn(state.current) && (!state.ready || !generates() || (!field.value.trim() && !files.length));
}

/** at: null when requests can be served, else what /health says. */
function showProgress(at) {
  progress.hidden = at === null;
  if (at !== null) {
    const { stage = "starting", done = 0, total = 0, message = "", status = "starting" } = at;
    const words = { load: "Loading weights", compile: "Compiling programs", warmup: "Running each program once", download: "Fetching the model", convert: "Converting the model" }[stage] ?? stage;
    const failed = status === "failed" || status === "stopping";
    const amount = total > 1e5 ? `${Math.round(done / 1e6)} of ${Math.round(total / 1e6)} MB` : `${done} of ${total}`;
    progress.classList.toggle("failed", failed);
    progress.replaceChildren(
      h("div.starting-line", {}, h("strong", {}, failed ? (status === "failed" ? "The server failed" : "The server is stopping") : words), h("span", {}, failed ? message : total ? amount : message)),
      ...(failed ? [] : [h("progress", { max: total || 1, ...(total ? { value: done } : {}), "aria-label": words })]),
    );
  }
  if (state.current && !path(state.current).length) show(state.current, false);
  setEnabled();
}
