// The frame: tabs, theme, model, keys, and whether the server can answer yet.

import { ApiError, getJson, health } from "./api.js";
import { focusComposer, mountChat } from "./chat.js";
import { h, icon, iconButton } from "./dom.js";
import { mountEngine, watchEngine } from "./engine.js";
import { runningIn, settle, stop } from "./generate.js";
import { mountSettings, settingsAreOpen, toggleSettings } from "./settings.js";
import { focusSearch, mountSidebar } from "./sidebar.js";
import { emit, flush, model, on, open, openNew, saveSettings, state } from "./state.js";
import * as store from "./store.js";
import { hideTip } from "./tip.js";
import { path, titleOf } from "./tree.js";

const byId = (id) => document.getElementById(id);
const narrow = matchMedia("(max-width: 760px)");
const THEMES = [["auto", "auto", "Theme: as the system"], ["light", "sun", "Theme: light"], ["dark", "moon", "Theme: dark"]];
const tabs = {};
let themeButton;
let picker;
let connection;

// Frame

function mountTopbar() {
  const tab = (name, label) => (tabs[name] = h("button.tab", { type: "button", role: "tab", id: `tab-${name}`, "aria-controls": name, onclick: () => showTab(name) }, label));
  picker = h("select.model", { "aria-label": "Model", onchange: () => { state.settings.model = picker.value; saveSettings(); emit("opened", state.current); } });
  connection = h("span.connection", { role: "status" });
  const tablist = h("div.tabs", { role: "tablist", "aria-label": "View" }, tab("chat", "Chat"), tab("engine", "Engine"));
  tablist.addEventListener("keydown", (event) => {
    if (event.key !== "ArrowLeft" && event.key !== "ArrowRight") return;
    const other = tabs.chat.getAttribute("aria-selected") === "true" ? "engine" : "chat";
    showTab(other);
    tabs[other].focus();
  });
  byId("topbar").append(
    iconButton("menu", "Conversations (Ctrl B)", toggleSidebar, { class: "to-sidebar" }),
    tablist,
    connection,
    h("span.space"),
    picker,
    iconButton("sliders", "Settings (Ctrl ,)", () => toggleSettings()),
  );
}

function showTab(name) {
  history.replaceState(null, "", name === "engine" ? "#engine" : `#chat/${state.current.id}`);
  for (const [each, button] of Object.entries(tabs)) {
    button.setAttribute("aria-selected", String(each === name));
    button.tabIndex = each === name ? 0 : -1;
    byId(each).hidden = each !== name;
  }
  hideTip();
  watchEngine(name === "engine");
  if (name === "chat" && !narrow.matches) focusComposer();
}

const chatIsShown = () => !byId("chat").hidden;

function toggleSidebar() {
  const wide = !narrow.matches;
  const shut = wide ? document.body.classList.toggle("no-sidebar") : !document.body.classList.toggle("sidebar-over");
  byId("scrim").hidden = wide || shut;
  if (wide) {
    state.settings.noSidebar = shut;
    saveSettings();
  }
}

function closeOverlay() {
  document.body.classList.remove("sidebar-over");
  byId("scrim").hidden = true;
}

function setTheme(name) {
  state.settings.theme = name;
  saveSettings();
  document.documentElement.dataset.theme = name;
  const [, glyph, label] = THEMES.find(([each]) => each === name) ?? THEMES[0];
  themeButton.replaceChildren(icon(glyph));
  themeButton.title = label;
  themeButton.setAttribute("aria-label", label);
  emit("theme");
}

function nextTheme() {
  const at = THEMES.findIndex(([each]) => each === state.settings.theme);
  setTheme(THEMES[(at + 1) % THEMES.length][0]);
}

let quietTimer;

function showNotice({ text, quiet = false, action = null }) {
  const box = byId("notice");
  clearTimeout(quietTimer);
  box.className = quiet ? "notice quiet" : "notice";
  box.replaceChildren(h("span", {}, text), action ? h("button.plain-button", { type: "button", onclick: action.run }, action.label) : "", iconButton("close", "Dismiss", () => (box.hidden = true)));
  box.hidden = false;
  if (quiet) quietTimer = setTimeout(() => (box.hidden = true), 4000);
}

// Keys

const KEYS = [
  ["Enter", "send"],
  ["Shift Enter", "new line"],
  ["Esc", "stop the answer, close what is open"],
  ["↑", "in an empty field: edit your last message"],
  ["Ctrl Shift O", "new conversation"],
  ["Ctrl K", "search conversations"],
  ["Ctrl B", "conversations"],
  ["Ctrl ,", "settings"],
  ["Ctrl E", "chat or engine"],
  ["Ctrl Shift Enter", "another answer"],
  ["/", "to the message field"],
  ["?", "these keys"],
];

function showKeys() {
  const close = h("button.primary", { type: "submit" }, "Close");
  const dialog = h("dialog.keys", { "aria-label": "Keys" }, h("form", { method: "dialog" }, h("h2", {}, "Keys"), h("dl", {}, KEYS.map(([key, does]) => h("div", {}, h("dt", {}, key.split(" ").map((part) => h("kbd", {}, part))), h("dd", {}, does)))), close));
  dialog.addEventListener("close", () => dialog.remove());
  document.body.append(dialog);
  dialog.showModal();
}

function again() {
  const last = path(state.current).at(-1);
  if (last?.role === "assistant" && !runningIn(state.current)) document.querySelector(`[data-id="${CSS.escape(last.id)}"] [aria-label="Another answer"]`)?.click();
}

const SHORTCUTS = { "shift+o": () => { openNew(); showTab("chat"); }, k: () => { if (document.body.classList.contains("no-sidebar") || narrow.matches) toggleSidebar(); focusSearch(); }, b: toggleSidebar, ",": () => toggleSettings(), e: () => showTab(chatIsShown() ? "engine" : "chat"), "shift+enter": again };

function onKey(event) {
  if (document.querySelector("dialog[open]")) return;
  const typing = event.target.closest?.("textarea, input:not([type=range]):not([type=checkbox]), select");
  if (event.ctrlKey || event.metaKey) {
    const run = SHORTCUTS[(event.shiftKey ? "shift+" : "") + event.key.toLowerCase()];
    if (!run || event.altKey) return;
    event.preventDefault();
    run();
  } else if (event.key === "Escape") {
    if (settingsAreOpen()) toggleSettings(false);
    else if (document.body.classList.contains("sidebar-over")) closeOverlay();
    else stop(state.current);
  } else if (!typing && event.key === "/") {
    event.preventDefault();
    showTab("chat");
    focusComposer();
  } else if (!typing && event.key === "?") showKeys();
}

// The server

let asking = 0;

/** Asks until the server can answer, then for its models; again whenever something failed for want of it. */
async function connect() {
  const turn = ++asking;
  state.ready = false;
  for (let wait = 300; turn === asking; wait = Math.min(wait * 1.5, 2000)) {
    try {
      const at = await health();
      if (at.ready) break;
      tellConnection(at);
    } catch {
      tellConnection({ status: "failed", stage: "failed", message: "It cannot be reached; trying again." });
    }
    await new Promise((resolve) => setTimeout(resolve, wait));
  }
  if (turn !== asking) return;
  try {
    [state.models, state.info] = [(await getJson("v1/models")).data, await getJson("get_model_info")];
  } catch (error) {
    onFailure(error);
    return;
  }
  picker.replaceChildren(...state.models.map((each) => h("option", { value: each.id, selected: each.id === model() }, each.id)));
  state.ready = true;
  byId("notice").hidden = true;
  emit("server", null);
  tellConnection(null);
}

function tellConnection(at) {
  connection.className = `connection ${at === null ? "up" : at.status === "failed" ? "down" : "wait"}`;
  connection.textContent = at === null ? "" : at.status === "starting" ? "starting" : at.status === "stopping" ? "stopping" : "no server";
  if (at !== null) emit("server", at);
}

function onFailure(error) {
  if (!(error instanceof ApiError)) return;
  if (error.status === 401) {
    showNotice({ text: "This server wants an API key.", action: { label: "Enter it", run: () => toggleSettings(true, "#set-key") } });
    return;
  }
  if (error.status === 0 || error.body.stage) connect();
}

// Start

async function start() {
  themeButton = iconButton("auto", "Theme", nextTheme);
  mountSidebar(byId("sidebar"), { onPick: () => { closeOverlay(); showTab("chat"); }, footer: [themeButton, iconButton("keyboard", "Keys (?)", showKeys)] });
  mountTopbar();
  mountChat(byId("chat"));
  mountEngine(byId("engine"));
  mountSettings(byId("settings"));
  setTheme(state.settings.theme);
  document.body.classList.toggle("no-sidebar", Boolean(state.settings.noSidebar));
  byId("scrim").addEventListener("click", closeOverlay);
  addEventListener("keydown", onKey);
  addEventListener("hashchange", () => route());
  addEventListener("pagehide", flush);
  document.addEventListener("visibilitychange", () => document.hidden && flush());
  on("notice", showNotice);
  on("failed", onFailure);
  on("key", connect);
  on("opened", hideTip);
  on("list", () => (document.title = state.current?.leaf ? `${titleOf(state.current)} · jaxserve` : "jaxserve"));
  on("opened", (conversation) => {
    if (chatIsShown()) history.replaceState(null, "", `#chat/${conversation.id}`);
  });
  for (const conversation of await store.all()) {
    settle(conversation);
    state.conversations.set(conversation.id, conversation);
  }
  if (!store.isDurable) showNotice({ text: "This browser keeps nothing for this page: conversations end with the tab." });
  route();
  connect();
}

function route() {
  const [, id] = location.hash.match(/^#chat\/(.+)$/) ?? [];
  const latest = [...state.conversations.values()].find((each) => each.leaf);
  const engine = location.hash === "#engine";
  const wanted = state.conversations.get(id) ?? state.current ?? (engine ? latest : null);
  if (wanted) {
    if (wanted !== state.current) open(wanted);
  } else openNew();
  showTab(engine ? "engine" : "chat");
}

start();
