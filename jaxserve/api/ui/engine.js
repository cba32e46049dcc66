// The engine tab: one stream of GET /v1/engine while it is shown, and nothing when it is not.

import { ApiError, call, events } from "./api.js";
import { colours, pageMap, sparkline, timeline } from "./charts.js";
import { h, number, seconds, whole } from "./dom.js";
import { emit, on } from "./state.js";
import { hideTip, showTip } from "./tip.js";

const INTERVAL_MS = 500;
const WINDOW = 20; // seconds of the timeline
const TREND = 90; // seconds of the small charts
const MAX_LINES = 24;
const MAX_ROWS = 32;

let watching = null; // AbortController of the stream
let latest = null; // the last snapshot
let receivedAt = 0; // when it came, performance.now()
let palette = null;
let grid = null;
let chosen = null; // slot under the pointer
let states = new Uint16Array();
const trend = []; // [{now, …stats}]
const lines = new Map(); // id -> line of the timeline
const steps = new Map(); // number -> step
const parts = {};

export function mountEngine(section) {
  for (const name of ["rate", "running", "cache", "prefix", "padding", "step", "compiled"]) parts[name] = tile(name);
  parts.map = h("canvas", { role: "img" });
  parts.time = h("canvas", { role: "img" });
  parts.legend = h("div.legend");
  parts.requests = h("div.table-frame", { tabIndex: 0, role: "region", "aria-label": "Requests" });
  parts.buckets = h("div.table-frame", { tabIndex: 0, role: "region", "aria-label": "Buckets" });
  parts.facts = h("p.facts");
  parts.waiting = h("p.engine-waiting", { role: "status" }, "Waiting for the engine …");
  parts.body = h("div.engine-body", { hidden: true },
    h("div.tiles", {}, parts.rate.box, parts.running.box, parts.cache.box, parts.prefix.box, parts.padding.box, parts.step.box, parts.compiled.box),
    parts.mapCard = card("KV cache, page by page", "Each square is one page. Pages of one request have one colour; cached ones wait to be reused.", parts.legend, h("div.canvas", {}, parts.map)),
    card("Requests and steps over time", `The last ${WINDOW} seconds. Above, each request: waiting, prefill, decode. Below, each step on the device, as tall as its tokens (by the root); pale is padding.`, legend([["waiting", "waiting"], ["prefill", "prefill"], ["decode", "decode"], ["pad", "padding"]]), h("div.canvas", {}, parts.time)),
    h("div.columns", {}, card("Requests", "Counts only: nobody's text is shown here.", parts.requests), card("Compiled shapes in use", "Every step runs in one of the shapes that were compiled before the server was ready.", parts.buckets)),
    parts.facts);
  section.append(parts.waiting, parts.body);
  parts.map.addEventListener("mousemove", hover);
  parts.map.addEventListener("mouseleave", () => { chosen = null; hideTip(); draw(); });
  on("theme", () => { palette = null; draw(); });
  on("server", (at) => {
    if (at === null && watching === null && !section.hidden) watchEngine(true);
    else if (at !== null && latest === null) parts.waiting.textContent = at.status === "starting" ? `The engine starts: ${at.stage} ${at.total ? `${at.done} of ${at.total}` : ""}` : "There is no engine to look at.";
  });
  new ResizeObserver(() => draw()).observe(section);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { palette = null; draw(); });
  setInterval(() => !section.hidden && !document.hidden && latest && !matchMedia("(prefers-reduced-motion: reduce)").matches && drawTime(), 100);
  document.addEventListener("visibilitychange", () => watchEngine(!section.hidden && !document.hidden));
}

/** Nothing is asked for while nobody looks. */
export function watchEngine(shown) {
  watching?.abort();
  watching = null;
  if (shown && !document.hidden) watch();
}

async function watch() {
  const controller = (watching = new AbortController());
  try {
    const response = await call(`v1/engine?stream=true&interval_ms=${INTERVAL_MS}`, { signal: controller.signal });
    for await (const snapshot of events(response)) {
      if (snapshot.error) throw new ApiError(response.status, snapshot.error.message, snapshot);
      take(snapshot);
    }
    throw new ApiError(0, "The stream ended.");
  } catch (error) {
    if (watching !== controller) return; // it is not shown any more
    watching = null;
    if (latest === null) parts.waiting.textContent = error.message;
    emit("failed", error);
  }
}

function take(snapshot) {
  if (latest && snapshot.now < latest.now - 1) forget(); // another engine
  latest = snapshot;
  receivedAt = performance.now();
  states = new Uint16Array(Uint8Array.from(atob(snapshot.pages.map), (c) => c.charCodeAt(0)).buffer);
  trend.push({ now: snapshot.now, ...snapshot.stats });
  while (trend.length > 2 && trend[0].now < snapshot.now - TREND) trend.shift();
  for (const line of snapshot.timeline) lines.set(line.id, line);
  const known = new Set(snapshot.timeline.map((line) => line.id));
  for (const [id, line] of lines) {
    if (line.ended === null ? !known.has(id) : line.ended < snapshot.now - WINDOW - 5) lines.delete(id);
  }
  snapshot.steps.number.forEach((step, index) => {
    if (!steps.has(step)) steps.set(step, Object.fromEntries(Object.entries(snapshot.steps).map(([name, column]) => [name, column[index]])));
  });
  for (const [step, { read }] of steps) if (read < snapshot.now - WINDOW - 5) steps.delete(step);
  parts.waiting.hidden = true;
  parts.body.hidden = false;
  draw();
}

function forget() {
  trend.length = 0;
  lines.clear();
  steps.clear();
}

// What changed in the last `span` seconds

function change(name, span = 5) {
  const last = trend.at(-1);
  const first = trend.find((each) => each.now >= last.now - span) ?? trend[0];
  return { by: last[name] - first[name], in: last.now - first.now };
}

const perSecond = (name, span) => {
  const { by, in: time } = change(name, span);
  return time > 0 ? by / time : 0;
};

const rates = (name) => trend.slice(1).map((each, index) => [each.now, (each[name] - trend[index][name]) / Math.max(1e-3, each.now - trend[index].now)]);

// Drawing

function draw() {
  if (!latest || parts.body.hidden || !parts.body.offsetParent) return;
  palette ??= colours();
  drawTiles();
  drawMap();
  drawTime();
  drawRequests();
  drawBuckets();
  const { engine } = latest;
  parts.facts.textContent = `${latest.model} · ${engine.num_devices} × ${engine.platform} (${engine.device_kind}) · ${engine.dtype} · context ${whole.format(engine.max_model_len)} · up to ${engine.max_running} at once · ${engine.num_programs} programs, ${engine.cache_misses} of them compiled at the start · ready after ${seconds(engine.seconds)}`;
}

function tile(name) {
  const value = h("span.value");
  const detail = h("span.detail");
  const chart = h("canvas.spark", { "aria-hidden": "true" });
  const bar = h("div.stack", { "aria-hidden": "true" });
  const title = { rate: "Tokens a second", running: "Requests", cache: "KV cache", prefix: "Prefix hits", padding: "Padding", step: "Steps", compiled: "Compiled late" }[name];
  const box = h("div.tile", { class: `tile-${name}` }, h("span.title", {}, title), value, detail, ["rate", "running", "step"].includes(name) ? h("div.spark-frame", {}, chart) : "", ["cache", "prefix", "padding"].includes(name) ? bar : "");
  return { box, chart, set(text, small, shares) {
    value.textContent = text;
    detail.textContent = small;
    if (shares) bar.replaceChildren(...shares.map(([kind, share]) => h("i", { class: kind, style: { width: `${(100 * share).toFixed(2)}%` } })));
  } };
}

const share = (part, all) => (all > 0 ? part / all : 0);
const percent = (value) => `${value > 0 && value < 0.01 ? "< 1" : Math.round(100 * value)} %`;

function drawTiles() {
  const { stats, pages, engine } = latest;
  const from = Math.min(latest.now - 10, Math.max(latest.now - TREND, trend[0].now));
  parts.rate.set(number.format(perSecond("generation_tokens_total", 3)), `${whole.format(stats.generation_tokens_total)} since the start`);
  sparkline(parts.rate.chart, rates("generation_tokens_total"), from, latest.now, palette.decode);
  parts.running.set(`${stats.num_running} + ${stats.num_waiting}`, `running + queued, of ${engine.max_running} rows`);
  sparkline(parts.running.chart, trend.map((each) => [each.now, each.num_running + each.num_waiting]), from, latest.now, palette.accent);
  parts.cache.set(percent(share(pages.held, pages.num_pages)), `${whole.format(pages.held)} used · ${whole.format(pages.cached)} cached · ${whole.format(pages.free)} free${stats.preemptions_total ? ` · ${whole.format(stats.preemptions_total)} preempted so far` : ""}`, [["used", share(pages.held, pages.num_pages)], ["cached", share(pages.cached, pages.num_pages)]]);
  parts.cache.box.hidden = !pages.num_pages;
  const prompt = change("prompt_tokens_total", 30);
  const hits = share(stats.cached_tokens_total, stats.prompt_tokens_total);
  const lately = prompt.by ? ` · ${percent(share(change("cached_tokens_total", 30).by, prompt.by))} lately` : "";
  parts.prefix.set(percent(hits), `${whole.format(stats.cached_tokens_total)} of ${whole.format(stats.prompt_tokens_total)} prompt tokens${lately}`, [["hit", hits]]);
  const computed = stats.step_tokens_total + stats.padding_tokens_total;
  parts.padding.set(percent(share(stats.padding_tokens_total, computed)), `of ${whole.format(computed)} computed positions`, [["pad", share(stats.padding_tokens_total, computed)]]);
  const rate = perSecond("steps_total", 3);
  const recent = [...steps.values()].slice(-20);
  const lasted = recent.length > 1 && rate > 0 ? (recent.at(-1).read - recent[0].read) / (recent.length - 1) : 0;
  parts.step.set(`${number.format(rate)} / s`, lasted ? `${seconds(lasted)} each` : `${whole.format(stats.steps_total)} since the start`);
  sparkline(parts.step.chart, rates("steps_total"), from, latest.now, palette.prefill);
  const compiled = stats.compilations_total;
  parts.compiled.set(whole.format(compiled), compiled ? "programs since ready: a bug" : "programs since ready");
  parts.compiled.box.classList.toggle("bad", compiled > 0);
}

function legend(entries) {
  return h("div.legend", {}, entries.map(([kind, text]) => h("span", {}, h("i", { class: `key-${kind}` }), text)));
}

function drawMap() {
  const { pages } = latest;
  parts.mapCard.hidden = !pages.num_pages;
  if (!pages.num_pages) return;
  grid = pageMap(parts.map, states, palette, chosen);
  const shared = states.reduce((sum, each) => sum + (each === 2), 0);
  parts.map.setAttribute("aria-label", `${pages.num_pages} pages of ${pages.page_size} tokens: ${pages.held} used, ${shared} of them by several requests, ${pages.cached} cached, ${pages.free} free`);
  const text = [["one", `${whole.format(pages.held - shared)} of one request`], ["shared", `${whole.format(shared)} shared`], ["cached", `${whole.format(pages.cached)} cached`], ["free", `${whole.format(pages.free)} free`]];
  parts.legend.replaceChildren(...legend(text).childNodes, h("span.right", {}, `${pages.page_size} tokens a page`));
}

function hover(event) {
  const box = parts.map.getBoundingClientRect();
  const page = Math.floor((event.clientY - box.top) / grid.cell) * grid.columns + Math.floor((event.clientX - box.left) / grid.cell);
  const held = states[page];
  if (held === undefined) return hideTip();
  chosen = held >= 3 ? held - 3 : null;
  const owner = latest.requests.find((each) => each.slot === chosen && chosen !== null);
  const said = ["free", "cached: in the prefix tree, held by nobody", "shared by several requests"][held] ?? (owner ? `held by #${owner.id} (${owner.num_pages} pages)` : "held");
  showTip({ x: event.clientX + 10, y: event.clientY }, h("span", {}, `Page ${page + 1}: ${said}`));
  drawMap();
}

function drawTime() {
  if (!parts.body.offsetParent) return;
  palette ??= colours();
  const now = latest.now + Math.min(2, (performance.now() - receivedAt) / 1000) - 0.6; // behind, so that it glides
  const from = now - WINDOW;
  const shown = [...lines.values()].filter((line) => line.marks[0][1] < now && (line.ended ?? now) >= from).sort((a, b) => a.marks[0][1] - b.marks[0][1] || a.id - b.id).slice(-MAX_LINES);
  const recent = [...steps.values()].filter((step) => step.read >= from - 2 && step.launched <= now).map((step) => ({ ...step, read: Math.min(step.read, now) }));
  const most = Math.max(16, ...recent.map((step) => step.decode_rows + step.prefill_tokens));
  const clipped = shown.map((line) => ({ ...line, ended: line.ended !== null && line.ended > now ? null : line.ended, marks: line.marks.filter(([, at]) => at <= now) }));
  timeline(parts.time, { lines: clipped, steps: recent, from, now, most }, palette);
  parts.time.setAttribute("aria-label", `${shown.length} requests and ${recent.length} steps in the last ${WINDOW} seconds`);
}

const table = (heads, rows) => h("table", {}, h("thead", {}, h("tr", {}, heads.map((head) => h("th", { scope: "col" }, head)))), h("tbody", {}, rows));
const meter = (kind, value) => h("span.meter", { class: kind, "aria-hidden": "true", style: { "--share": value.toFixed(3) } });

function drawRequests() {
  const { requests, stats } = latest;
  const order = { decode: 0, prefill: 1, waiting: 2 };
  const sorted = [...requests].sort((a, b) => order[a.state] - order[b.state] || a.id - b.id);
  const rows = sorted.slice(0, MAX_ROWS).map((each) => {
    const line = lines.get(each.id);
    const age = line ? latest.now - line.marks[0][1] : 0;
    const doing = each.state === "prefill" ? share(each.computed_tokens, each.prompt_tokens) : share(each.output_tokens, each.max_output_tokens);
    return h("tr", {},
      h("td", {}, h("i.chip", { style: { background: each.slot >= 0 ? palette.slot(each.slot) : "transparent" } }), `#${each.id}`, each.priority > 0 ? h("span.tag", {}, "batch") : ""),
      h("td", {}, h("span.state", { class: each.state }, each.state)),
      h("td.figure", {}, whole.format(each.prompt_tokens), each.cached_tokens ? h("small", {}, ` ${whole.format(each.cached_tokens)} cached`) : ""),
      h("td.figure", {}, whole.format(each.output_tokens), h("small", {}, ` / ${whole.format(each.max_output_tokens)}`)),
      h("td", {}, meter(each.state, doing)),
      h("td.figure", {}, whole.format(each.num_pages)),
      h("td.figure", {}, seconds(age)));
  });
  const more = stats.num_running + stats.num_waiting - rows.length;
  parts.requests.replaceChildren(rows.length ? table(["Request", "State", "Prompt", "Answer", "", "Pages", "Age"], rows) : h("p.none", {}, "Nothing runs. Send a message, and it shows here."), more > 0 ? h("p.none", {}, `and ${whole.format(more)} more`) : "");
}

function drawBuckets() {
  const rows = [...latest.buckets].sort((a, b) => b.steps - a.steps).map((bucket) => {
    const all = bucket.tokens + bucket.padding_tokens;
    const used = share(bucket.tokens, all);
    return h("tr", {}, h("td", {}, bucketName(bucket)), h("td.figure", {}, whole.format(bucket.steps)), h("td.figure", {}, whole.format(bucket.tokens)), h("td", {}, meter(bucket.prefill_tokens ? "prefill" : "decode", used)), h("td.figure", {}, percent(1 - used)));
  });
  parts.buckets.replaceChildren(rows.length ? table(["Shape", "Steps", "Tokens", "Filled", "Padding"], rows) : h("p.none", {}, "No step has run yet."));
}

function bucketName({ decode_rows: rows, prefill_tokens: tokens, prefill_rows: prompts }) {
  const decode = rows ? `decode ${rows}` : "";
  const prefill = tokens ? `prefill ${tokens} in ${prompts}` : "";
  return [decode, prefill].filter(Boolean).join(" + ");
}

function card(title, help, ...content) {
  return h("section.card", {}, h("h2", {}, title), h("p.help", {}, help), content);
}
