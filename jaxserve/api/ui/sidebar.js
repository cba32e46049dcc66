// The list of conversations: search, rename, export, import, delete.

import { h, icon, iconButton } from "./dom.js";
import { runningIn } from "./generate.js";
import { emit, on, open, openNew, remove, save, state, write } from "./state.js";
import { newId, readExport, titleOf } from "./tree.js";

let list;
let search;

export function mountSidebar(nav, { onPick, footer }) {
  search = h("input", { type: "search", placeholder: "Search", "aria-label": "Search conversations", oninput: draw });
  list = h("ul.list");
  const file = h("input", { type: "file", accept: "application/json,.json", hidden: true, tabIndex: -1, onchange: () => importFile(file) });
  nav.append(
    h("div.brand", {}, h("img", { src: "ui/icon.svg", alt: "", width: 24, height: 24 }), h("span", {}, "jaxserve")),
    h("button.new", { type: "button", title: "New conversation (Ctrl Shift O)", onclick: () => { openNew(); onPick(); } }, icon("plus"), "New conversation"),
    h("label.search", {}, icon("search"), search),
    list,
    h("div.sidebar-foot", {},
      iconButton("upload", "Import conversations", () => file.click()), file,
      iconButton("download", "Export all conversations", () => download([...state.conversations.values()].filter((each) => each.leaf), "jaxserve-conversations")),
      footer),
  );
  list.addEventListener("click", (event) => {
    const row = event.target.closest("[data-id]");
    if (row && event.target.closest(".pick")) {
      open(state.conversations.get(row.dataset.id));
      onPick();
    }
  });
  on("list", draw);
}

export function focusSearch() {
  search.focus();
  search.select();
}

const matches = (conversation, words) => {
  if (!words.length) return true;
  const text = `${titleOf(conversation)} ${conversation.system} ${Object.values(conversation.nodes).map((node) => node.content).join(" ")}`.toLowerCase();
  return words.every((word) => text.includes(word));
};

function draw() {
  const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
  const shown = [...state.conversations.values()].filter((each) => (each.leaf || each === state.current) && matches(each, words)).sort((a, b) => b.updated - a.updated);
  const rows = [];
  let heading = null;
  for (const each of shown) {
    const age = ageOf(each.updated);
    if (age !== heading) rows.push(h("li.age", { "aria-hidden": "true" }, (heading = age)));
    rows.push(row(each));
  }
  if (!shown.length) rows.push(h("li.none", {}, words.length ? "Nothing holds these words" : "Nothing here yet"));
  list.replaceChildren(...rows);
}

function ageOf(time) {
  const days = (new Date().setHours(0, 0, 0, 0) - time) / 86_400_000;
  if (days <= 0) return "Today";
  if (days <= 1) return "Yesterday";
  return days <= 7 ? "This week" : "Earlier";
}

function row(conversation) {
  const isOpen = conversation === state.current;
  const title = titleOf(conversation);
  return h("li", { class: isOpen ? "open" : "", "data-id": conversation.id },
    h("button.pick", { type: "button", title, "aria-current": isOpen ? "true" : null }, runningIn(conversation) && h("i.busy", { "aria-label": "being answered" }), title),
    h("span.row-actions", {},
      iconButton("edit", "Rename", () => rename(conversation)),
      iconButton("download", "Export", () => download([conversation], title)),
      iconButton("trash", "Delete", () => erase(conversation))));
}

function rename(conversation) {
  const at = list.querySelector(`[data-id="${CSS.escape(conversation.id)}"] .pick`);
  const field = h("input.rename", { value: titleOf(conversation), "aria-label": "Title" });
  const keep = () => {
    conversation.title = field.value.trim().slice(0, 200);
    save(conversation);
    draw();
  };
  field.addEventListener("keydown", (event) => {
    if (event.key === "Enter") keep();
    if (event.key === "Escape") draw();
    event.stopPropagation();
  });
  field.addEventListener("blur", keep);
  at.replaceWith(field);
  field.focus();
  field.select();
}

async function erase(conversation) {
  if (conversation.leaf && !confirm(`Delete “${titleOf(conversation)}”? It cannot be brought back.`)) return;
  await remove(conversation);
}

function download(conversations, name) {
  const text = JSON.stringify({ kind: "jaxserve conversations", version: 1, conversations }, null, 1);
  const link = h("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: `${name.replace(/[^\p{L}\p{N} _-]+/gu, "").slice(0, 60) || "conversation"}.json` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

async function importFile(file) {
  const [chosen] = file.files;
  file.value = "";
  if (!chosen) return;
  try {
    const found = readExport(await chosen.text());
    for (const conversation of found) {
      conversation.id = newId(); // an import never overwrites
      state.conversations.set(conversation.id, conversation);
      await write(conversation);
    }
    open(found[0]);
    emit("notice", { text: `Imported ${found.length} ${found.length === 1 ? "conversation" : "conversations"}.`, quiet: true });
  } catch (error) {
    emit("notice", { text: `${chosen.name} could not be imported: ${error.message}` });
  }
}
