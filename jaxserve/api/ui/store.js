// Conversations in IndexedDB. Where the browser has none (some private windows), in memory, and the page says so.

const NAME = "jaxserve";
const TABLE = "conversations";
let opened = null;
const memory = new Map();
export let isDurable = true;

function open() {
  opened ??= new Promise((resolve) => {
    let request;
    try {
      request = indexedDB.open(NAME, 1);
    } catch {
      isDurable = false;
      resolve(null);
      return;
    }
    request.onupgradeneeded = () => request.result.createObjectStore(TABLE, { keyPath: "id" });
    request.onsuccess = () => resolve(request.result);
    request.onerror = request.onblocked = () => {
      isDurable = false;
      resolve(null);
    };
  });
  return opened;
}

async function run(mode, act) {
  const database = await open();
  if (database === null) return undefined;
  return new Promise((resolve, reject) => {
    const transaction = database.transaction(TABLE, mode);
    const request = act(transaction.objectStore(TABLE));
    transaction.oncomplete = () => resolve(request.result);
    transaction.onerror = transaction.onabort = () => reject(transaction.error);
  });
}

export async function all() {
  const found = (await run("readonly", (table) => table.getAll())) ?? [...memory.values()];
  return found.sort((a, b) => b.updated - a.updated);
}

export async function put(conversation) {
  const copy = structuredClone(conversation);
  if (isDurable) await run("readwrite", (table) => table.put(copy));
  if (!isDurable) memory.set(copy.id, copy);
}

export async function remove(id) {
  memory.delete(id);
  if (isDurable) await run("readwrite", (table) => table.delete(id));
}

const SETTINGS = "jaxserve.settings";

/** What this browser prefers: theme, defaults of new conversations, the model. */
export function readSettings() {
  try {
    return JSON.parse(localStorage.getItem(SETTINGS)) ?? {};
  } catch {
    return {};
  }
}

export function writeSettings(settings) {
  try {
    localStorage.setItem(SETTINGS, JSON.stringify(settings));
  } catch {
    /* a full or forbidden store costs the preference, not the page */
  }
}
