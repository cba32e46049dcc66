// A conversation is a tree of messages: an edit or another answer is a sibling, and `leaf` says which branch is shown.

export const newId = () => crypto.randomUUID?.() ?? Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("");

export function newConversation(defaults = {}) {
  const now = Date.now();
  return { id: newId(), title: "", created: now, updated: now, system: "", params: {}, tools: "", extra: "", ...structuredClone(defaults), nodes: {}, leaf: null };
}

/** Adds a message below parent and shows it. */
export function add(conversation, parent, fields) {
  const node = { id: newId(), parent, created: Date.now(), order: Object.keys(conversation.nodes).length, content: "", ...fields };
  conversation.nodes[node.id] = node;
  conversation.leaf = node.id;
  conversation.updated = Date.now();
  return node;
}

/** Messages from the first to the leaf, or to `last`. */
export function path(conversation, last = conversation.leaf) {
  const found = [];
  for (let node = conversation.nodes[last]; node; node = conversation.nodes[node.parent]) found.push(node);
  return found.reverse();
}

export function children(conversation, parent) {
  return Object.values(conversation.nodes)
    .filter((node) => node.parent === parent)
    .sort((a, b) => a.order - b.order);
}

/** Shows the branch that node begins: down along what was written last. */
export function select(conversation, node) {
  let at = node;
  for (let next = children(conversation, at.id); next.length; next = children(conversation, at.id)) at = next.at(-1);
  conversation.leaf = at.id;
}

/** Removes a message and all that follows it; shows a neighbour. */
export function prune(conversation, node) {
  const beside = children(conversation, node.parent).filter((each) => each !== node);
  const doomed = [node.id];
  while (doomed.length) {
    const id = doomed.pop();
    doomed.push(...children(conversation, id).map((each) => each.id));
    delete conversation.nodes[id];
  }
  if (beside.length) select(conversation, beside.at(-1));
  else conversation.leaf = node.parent && conversation.nodes[node.parent] ? node.parent : null;
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = path(conversation).find((node) => node.role === "user");
  const line = first?.content.trim().split("\n")[0] ?? "";
  return line ? line.slice(0, 80) : "New conversation";
}

/** The request's messages: the system prompt, then the branch up to `last`. */
export function messages(conversation, last) {
  const told = path(conversation, last).map((node) => {
    if (node.role === "tool") return { role: "tool", tool_call_id: node.callId, content: node.content };
    if (node.role === "assistant" && node.calls?.length) {
      const calls = node.calls.map((call) => ({ id: call.id, type: "function", function: { name: call.name, arguments: call.arguments } }));
      return { role: "assistant", content: node.content || null, tool_calls: calls };
    }
    return { role: node.role, content: node.content };
  });
  return conversation.system.trim() ? [{ role: "system", content: conversation.system }, ...told] : told;
}

const isText = (value) => typeof value === "string";

/** What a file holds -> conversations, each with only the fields and types that the page knows. Throws Error. */
export function readExport(text) {
  const given = JSON.parse(text);
  const list = Array.isArray(given) ? given : (given.conversations ?? [given]);
  if (!Array.isArray(list) || !list.length) throw new Error("it holds no conversation");
  return list.map(readOne);
}

function readOne(given) {
  if (!given || typeof given !== "object" || typeof given.nodes !== "object" || !given.nodes) throw new Error("it is no export of this page");
  const made = newConversation();
  for (const name of ["title", "system", "tools", "extra", "model"]) if (isText(given[name])) made[name] = given[name];
  for (const name of ["created", "updated"]) if (Number.isFinite(given[name])) made[name] = given[name];
  const isPlain = ([, value]) => ["string", "number", "boolean"].includes(typeof value);
  if (given.params && typeof given.params === "object") made.params = Object.fromEntries(Object.entries(given.params).filter(isPlain));
  if (!isText(made.params.stop)) delete made.params.stop;
  for (const [id, node] of Object.entries(given.nodes)) {
    if (!node || !["user", "assistant", "tool"].includes(node.role) || !isText(node.content)) throw new Error("a message in it is broken");
    if (id !== "__proto__") made.nodes[id] = { ...readNode(node), id };
  }
  for (const node of Object.values(made.nodes)) if (!made.nodes[node.parent]) node.parent = null;
  for (const node of Object.values(made.nodes)) checkAncestry(made, node);
  made.leaf = made.nodes[given.leaf] ? given.leaf : (Object.keys(made.nodes).at(-1) ?? null);
  return made;
}

function readNode(node) {
  const kept = { role: node.role, content: node.content, parent: isText(node.parent) ? node.parent : null, created: Number(node.created) || Date.now(), order: Number(node.order) || 0 };
  for (const name of ["reasoning", "model", "finish", "error", "callId", "name"]) if (isText(node[name])) kept[name] = node[name];
  if (Array.isArray(node.calls)) kept.calls = node.calls.map((call) => ({ id: String(call?.id ?? ""), name: String(call?.name ?? ""), arguments: String(call?.arguments ?? "") }));
  if (node.stats && typeof node.stats === "object") kept.stats = Object.fromEntries(Object.entries(node.stats).filter(([, value]) => Number.isFinite(value)));
  if (Array.isArray(node.tokens)) kept.tokens = node.tokens.filter((token) => Array.isArray(token) && isText(token[0]) && Number.isFinite(token[1])).map(([word, logprob, top]) => [word, logprob, Array.isArray(top) ? top.filter((each) => Array.isArray(each) && isText(each[0]) && Number.isFinite(each[1])) : []]);
  return kept;
}

function checkAncestry(conversation, node) {
  const seen = new Set();
  for (let at = node; at; at = conversation.nodes[at.parent]) {
    if (seen.has(at.id)) throw new Error("its messages follow each other in a circle");
    seen.add(at.id);
  }
}
