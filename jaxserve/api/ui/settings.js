// The panel beside the chat: the conversation's system prompt, sampling and tools; the key and the looks of the page.

import { apiKey } from "./api.js";
import { h, iconButton } from "./dom.js";
import { emit, on, save, saveSettings, state } from "./state.js";

// name, label, least, most, step, what it does
const NUMBERS = [
  ["temperature", "Temperature", 0, 2, 0.05, "0: always the likeliest token"],
  ["top_p", "Top p", 0.01, 1, 0.01, "The likeliest tokens that make up this share"],
  ["top_k", "Top k", 0, 200, 1, "So many of the likeliest tokens; 0: all"],
  ["min_p", "Min p", 0, 1, 0.01, "Tokens at least this likely, relative to the likeliest"],
  ["repetition_penalty", "Repetition penalty", 0.5, 2, 0.05, "Above 1: what prompt and answer hold becomes less likely"],
  ["presence_penalty", "Presence penalty", -2, 2, 0.1, "Above 0: what the answer holds becomes less likely, once"],
  ["frequency_penalty", "Frequency penalty", -2, 2, 0.1, "The same, for each time that it holds it"],
  ["max_tokens", "Most tokens", 1, null, 1, "Empty: what the context leaves"],
  ["seed", "Seed", 0, null, 1, "The same seed gives the same answer"],
];
const EFFORTS = [["", "As the model does"], ["none", "None"], ["low", "Low"], ["medium", "Medium"], ["high", "High"]];
let panel;

export function mountSettings(aside) {
  panel = aside;
  on("opened", () => !panel.hidden && draw());
  on("server", (at) => at === null && !panel.hidden && draw());
}

export const settingsAreOpen = () => !panel.hidden;

export function toggleSettings(open = panel.hidden, focus = null) {
  panel.hidden = !open;
  document.body.classList.toggle("with-settings", open);
  if (open) {
    draw();
    (focus ? panel.querySelector(focus) : panel.querySelector("textarea, input"))?.focus();
  }
}

function draw() {
  const { scrollTop } = panel;
  panel.replaceChildren(
    h("div.panel-head", {}, h("h2", {}, "Settings"), iconButton("close", "Close settings", () => toggleSettings(false))),
    group("This conversation", systemPrompt(), h("div.numbers", {}, NUMBERS.map(numberRow)), ...rest(), defaultsButtons()),
    group("This browser", keyField(), rawSwitch()),
  );
  panel.scrollTop = scrollTop;
}

const group = (title, ...content) => h("section.group", {}, h("h3", {}, title), content);
const changed = () => save(state.current);
const param = (name) => state.current.params[name];

function setParam(name, value) {
  if (value === "" || value === undefined || Number.isNaN(value)) delete state.current.params[name];
  else state.current.params[name] = value;
  changed();
}

function textRow(label, name, rows, placeholder, help) {
  const id = `set-${name}`;
  const field = h("textarea", { id, rows, placeholder, value: state.current[name], spellcheck: name === "system", class: name === "system" ? "" : "code-field" });
  const wrong = h("p.wrong", { hidden: true, role: "alert" });
  field.addEventListener("input", () => {
    state.current[name] = field.value;
    changed();
    if (name !== "system") checkJson(field, wrong);
  });
  return h("div.row", {}, h("label", { htmlFor: id }, label), field, wrong, help && h("p.help", {}, help));
}

function checkJson(field, wrong) {
  try {
    if (field.value.trim()) JSON.parse(field.value);
    wrong.hidden = true;
  } catch (error) {
    wrong.hidden = false;
    wrong.textContent = `No JSON: ${error.message}`;
  }
}

const systemPrompt = () => textRow("System prompt", "system", 3, "You are …", null);

function numberRow([name, label, least, most, step, help]) {
  const id = `set-${name}`;
  const usual = state.info?.default_sampling_params?.[name];
  const shown = usual === undefined ? "" : String(Math.round(usual * 1e4) / 1e4);
  const field = h("input", { id, type: "number", min: least, max: most, step: "any", inputMode: "decimal", placeholder: shown || "auto", value: param(name) ?? "", title: help });
  const slider = most === null ? null : h("input", { type: "range", min: least, max: most, step, value: param(name) ?? usual ?? 0, tabIndex: -1, "aria-hidden": "true" });
  const mark = () => row.classList.toggle("set", param(name) !== undefined);
  field.addEventListener("input", () => {
    setParam(name, field.value === "" ? "" : Number(field.value));
    if (slider) slider.value = field.value === "" ? (usual ?? 0) : field.value;
    mark();
  });
  slider?.addEventListener("input", () => {
    field.value = slider.value;
    setParam(name, Number(slider.value));
    mark();
  });
  const row = h("div.number", { title: help }, h("label", { htmlFor: id }, label), slider ?? h("span"), field);
  mark();
  return row;
}

function rest() {
  const stops = h("textarea", { id: "set-stop", rows: 1, value: param("stop") ?? "", placeholder: "one on each line", oninput: () => setParam("stop", stops.value) });
  const effort = h("select", { id: "set-effort", onchange: () => setParam("reasoning_effort", effort.value) }, EFFORTS.map(([value, label]) => h("option", { value, selected: (param("reasoning_effort") ?? "") === value }, label)));
  return [
    h("div.row.inline", {}, h("label", { htmlFor: "set-effort" }, "Thinking"), effort),
    check("Token probabilities", Boolean(param("logprobs")), (on) => setParam("logprobs", on || ""), "Each answer can then be shown token by token, with what else was likely"),
    h("div.row", {}, h("label", { htmlFor: "set-stop" }, "Stop at"), stops),
    h("details.more", { open: Boolean(state.current.tools || state.current.extra) }, h("summary", {}, "Tools and further fields"),
      textRow("Tools", "tools", 4, '[{"type": "function", "function": {"name": …}}]', "OpenAI's list of function tools, as JSON. You type what they return."),
      textRow("Further fields", "extra", 3, '{"regex": "yes|no"}', "Added to each request: response_format, regex, logit_bias and whatever else the API takes.")),
  ];
}

function check(label, checked, set, help) {
  const box = h("input", { type: "checkbox", checked, onchange: () => set(box.checked) });
  return h("div.row", {}, h("label.check", {}, box, h("span", {}, label)), help && h("p.help", {}, help));
}

function defaultsButtons() {
  const keep = () => {
    const { system, params, tools, extra } = state.current;
    state.settings.defaults = structuredClone({ system, params, tools, extra });
    saveSettings();
    emit("notice", { text: "New conversations will begin with these settings.", quiet: true });
  };
  const reset = () => {
    Object.assign(state.current, { system: "", params: {}, tools: "", extra: "" });
    changed();
    draw();
  };
  return h("div.buttons", {}, h("button.plain-button", { type: "button", onclick: keep }, "Use for new conversations"), h("button.plain-button", { type: "button", onclick: reset }, "Reset to the server's"));
}

function keyField() {
  const field = h("input", { id: "set-key", type: "password", autocomplete: "off", value: apiKey.value, placeholder: "none", spellcheck: false });
  const remember = h("input", { type: "checkbox", checked: apiKey.remembered });
  const set = () => {
    apiKey.set(field.value.trim(), remember.checked);
    emit("key");
  };
  field.addEventListener("change", set);
  remember.addEventListener("change", set);
  return h("form.row", { onsubmit: (event) => { event.preventDefault(); field.blur(); } }, h("label", { htmlFor: "set-key" }, "API key"), field, h("label.check", {}, remember, h("span", {}, "Keep it after this tab is closed")), h("p.help", {}, "Sent to this server alone. Needed where it was started with --api-key."));
}

function rawSwitch() {
  return check("Show answers as raw text", state.settings.raw, (on) => {
    state.settings.raw = on;
    saveSettings();
    emit("opened", state.current);
  });
}
