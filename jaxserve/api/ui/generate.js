// One answer: the request, the stream, and what is measured on the way.

import { ApiError, call, events } from "./api.js";
import { emit, model, save, write } from "./state.js";
import { messages } from "./tree.js";

const running = new Map(); // conversation id -> {controller, node}
export const runningIn = (conversation) => running.get(conversation.id);
export const stop = (conversation) => running.get(conversation.id)?.controller.abort();

const SENT = ["temperature", "top_p", "top_k", "min_p", "presence_penalty", "frequency_penalty", "repetition_penalty", "max_tokens", "seed", "reasoning_effort"];

/** Throws SyntaxError for tools or further fields that are no JSON. */
function requestBody(conversation, node, goesOn) {
  const body = {
    model: node.model,
    messages: messages(conversation, goesOn ? node.id : node.parent),
    stream: true,
    stream_options: { include_usage: true, continuous_usage_stats: true },
  };
  const { params } = conversation;
  for (const name of SENT) if (params[name] !== undefined && params[name] !== "") body[name] = params[name];
  const stops = (params.stop ?? "").split("\n").filter(Boolean);
  if (stops.length) body.stop = stops;
  if (params.logprobs) Object.assign(body, { logprobs: true, top_logprobs: 5 });
  if (conversation.tools.trim()) body.tools = parse(conversation.tools, "Tools");
  if (goesOn) Object.assign(body, { continue_final_message: true, add_generation_prompt: false });
  return conversation.extra.trim() ? Object.assign(body, parse(conversation.extra, "Further fields")) : body;
}

function parse(text, name) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new SyntaxError(`${name} in the settings: ${error.message}`);
  }
}

/** Fills in node until the answer ends, is stopped or fails; never throws. goesOn: after what node says already. */
export async function generate(conversation, node, goesOn = false) {
  stop(conversation);
  const controller = new AbortController();
  const run = { controller, node };
  running.set(conversation.id, run);
  Object.assign(node, { model: model(), finish: null, error: null });
  if (!goesOn) Object.assign(node, { content: "", reasoning: "", calls: [], tokens: [] });
  const clock = { sent: performance.now(), first: 0, last: 0, thought: 0 };
  emit("changed", { conversation, node });
  emit("list");
  try {
    const response = await call("v1/chat/completions", { body: requestBody(conversation, node, goesOn), signal: controller.signal });
    for await (const chunk of events(response)) {
      if (chunk.error) throw new ApiError(response.status, chunk.error.message, chunk);
      take(node, chunk, clock);
      emit("changed", { conversation, node });
      save(conversation);
    }
    node.finish ??= "interrupted";
  } catch (error) {
    if (error.name === "AbortError") node.finish = "stopped";
    else {
      node.error = error.message;
      emit("failed", error);
    }
  }
  if (running.get(conversation.id) === run) running.delete(conversation.id);
  conversation.updated = Date.now();
  write(conversation);
  emit("changed", { conversation, node });
  emit("ended", { conversation, node });
  emit("list");
}

function take(node, chunk, clock) {
  const choice = chunk.choices?.[0];
  const delta = choice?.delta ?? {};
  const now = performance.now();
  if (delta.content || delta.reasoning_content || delta.tool_calls) {
    clock.first ||= now;
    clock.last = now;
  }
  if (delta.reasoning_content) node.reasoning = (node.reasoning ?? "") + delta.reasoning_content;
  if (delta.content) {
    if (node.reasoning && !clock.thought) clock.thought = now;
    node.content += delta.content;
  }
  for (const part of delta.tool_calls ?? []) takeCall(node, part);
  for (const told of choice?.logprobs?.content ?? []) takeToken(node, told, clock);
  if (choice?.finish_reason) node.finish = choice.finish_reason;
  measure(node, chunk.usage, clock);
}

/** Tokens that hold a part of a character are shown as one: the character, with their probabilities multiplied. */
function takeToken(node, { token, bytes, logprob, top_logprobs: top = [] }, clock) {
  clock.part ??= { bytes: [], logprob: 0, top: null };
  const { part } = clock;
  part.bytes.push(...(bytes ?? new TextEncoder().encode(token)));
  part.logprob += logprob;
  part.top ??= top.map((each) => [each.token, each.logprob]);
  const text = new TextDecoder().decode(new Uint8Array(part.bytes));
  if (text.endsWith("\ufffd") && part.bytes.length < 4) return;
  node.tokens ??= [];
  node.tokens.push([text, part.logprob, part.top]);
  clock.part = null;
}

function takeCall(node, part) {
  node.calls ??= [];
  const at = part.index ?? node.calls.length;
  node.calls[at] ??= { id: "", name: "", arguments: "" };
  const known = node.calls[at];
  if (part.id) known.id = part.id;
  if (part.function?.name) known.name += part.function.name;
  if (part.function?.arguments) known.arguments += part.function.arguments;
}

/** stats: times in seconds, counts of tokens. */
function measure(node, usage, clock) {
  const stats = { ...node.stats };
  if (clock.first) stats.ttft = (clock.first - clock.sent) / 1000;
  if (clock.thought) stats.thought = (clock.thought - clock.first) / 1000;
  if (usage) {
    Object.assign(stats, { prompt: usage.prompt_tokens, tokens: usage.completion_tokens, cached: usage.prompt_tokens_details?.cached_tokens ?? 0 });
    if (clock.last > clock.first && usage.completion_tokens > 1) stats.rate = ((usage.completion_tokens - 1) * 1000) / (clock.last - clock.first);
  }
  node.stats = stats;
}

/** What was still being written when the page was left is told as such. */
export function settle(conversation) {
  for (const node of Object.values(conversation.nodes)) {
    if (node.role === "assistant" && !node.finish && !node.error) node.finish = "interrupted";
  }
}
