// What the parts of the page share, and how they tell each other that it changed.

import * as store from "./store.js";
import { newConversation } from "./tree.js";

export const state = {
  conversations: new Map(), // id -> conversation
  current: null, // the conversation that is shown
  settings: { theme: "auto", defaults: {}, raw: false, ...store.readSettings() },
  models: [],
  info: null, // /get_model_info, once the server is ready
  ready: false,
};

const bus = new EventTarget();
export const on = (name, run) => bus.addEventListener(name, (event) => run(event.detail));
export const emit = (name, detail) => bus.dispatchEvent(new CustomEvent(name, { detail }));

export const model = () => {
  const names = state.models.map((each) => each.id);
  return names.includes(state.settings.model) ? state.settings.model : (names[0] ?? "");
};
export const contextLength = () => state.models.find((each) => each.id === model())?.max_model_len ?? 0;

export function saveSettings() {
  store.writeSettings(state.settings);
}

const waiting = new Map(); // conversation id -> the timer of its next write
const PAUSE = 300; // milliseconds between two writes of one that is being answered

/** Keeps a conversation, soon; an empty one is not worth it. */
export function save(conversation) {
  if (!Object.keys(conversation.nodes).length || waiting.has(conversation.id)) return;
  waiting.set(conversation.id, setTimeout(() => write(conversation), PAUSE));
}

/** Writes whatever waits for it: the page may be left. */
export function flush() {
  for (const id of [...waiting.keys()]) write(state.conversations.get(id));
}

/** Keeps it now. */
export async function write(conversation) {
  clearTimeout(waiting.get(conversation?.id));
  waiting.delete(conversation?.id);
  if (!conversation || !state.conversations.has(conversation.id)) return;
  try {
    await store.put(conversation);
  } catch (error) {
    emit("notice", { text: `This conversation could not be saved: ${error.message}` });
  }
}

export function open(conversation) {
  state.current = conversation;
  emit("opened", conversation);
  emit("list");
}

export function openNew() {
  const made = newConversation(state.settings.defaults);
  state.conversations.set(made.id, made);
  for (const old of state.conversations.values()) {
    if (old !== made && !Object.keys(old.nodes).length) state.conversations.delete(old.id);
  }
  open(made);
  return made;
}

export async function remove(conversation) {
  state.conversations.delete(conversation.id);
  await store.remove(conversation.id);
  if (state.current === conversation) openNew();
  emit("list");
}
