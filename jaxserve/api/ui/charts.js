// Drawing on canvases in the page's own colours.

/** Sizes canvas to its place on the screen, in CSS pixels; -> its context, cleared. */
function prepare(canvas, height) {
  const ratio = devicePixelRatio || 1;
  const width = canvas.parentElement.clientWidth;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.height = `${height}px`;
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  return { context, width };
}

const names = ["text", "muted", "faint", "line", "surface", "cached", "shared", "prefill", "decode", "waiting", "pad", "accent"];

/** The colours in force, by name; asked for anew when the theme changes. */
export function colours() {
  const probe = document.createElement("span"); // only a property of a real colour is computed
  document.querySelector(".engine").append(probe);
  const read = (name) => {
    probe.style.color = `var(--c-${name})`;
    return getComputedStyle(probe).color;
  };
  const found = Object.fromEntries(names.map((name) => [name, read(name)]));
  probe.remove();
  const [red] = found.text.match(/\d+/g).map(Number);
  const [light, chroma] = red > 128 ? [0.72, 0.12] : [0.66, 0.13]; // light text: a dark page
  return { ...found, slot: (slot) => `oklch(${light} ${chroma} ${(slot * 137.508 + 200) % 360})` };
}

const FONT = "11px system-ui, sans-serif";

/** values over time as a line with a soft floor; points: [[t, value]], from..to in t. */
export function sparkline(canvas, points, from, to, colour) {
  const height = 34;
  const { context, width } = prepare(canvas, height);
  if (points.length < 2) return;
  const most = Math.max(1e-9, ...points.map(([, value]) => value)) * 1.1;
  const x = (t) => ((t - from) / (to - from)) * width;
  const y = (value) => height - 1.5 - (value / most) * (height - 4);
  context.beginPath();
  points.forEach(([t, value], index) => context[index ? "lineTo" : "moveTo"](x(t), y(value)));
  context.strokeStyle = colour;
  context.lineWidth = 1.5;
  context.lineJoin = "round";
  context.stroke();
  context.lineTo(x(points.at(-1)[0]), height);
  context.lineTo(x(points[0][0]), height);
  context.globalAlpha = 0.12;
  context.fillStyle = colour;
  context.fill();
  context.globalAlpha = 1;
}

const GAP = 1;

/** Cells of one page each. -> {cell, columns}, to find a page under the pointer. */
export function pageMap(canvas, states, palette, chosen) {
  const width = canvas.parentElement.clientWidth;
  let cell = 14;
  while (cell > 3 && Math.ceil(states.length / Math.floor(width / cell)) * cell > 250) cell -= 1;
  const columns = Math.max(1, Math.floor(width / cell));
  const { context } = prepare(canvas, Math.ceil(states.length / columns) * cell);
  const size = cell - (cell > 4 ? GAP + 1 : GAP);
  const byState = new Map();
  states.forEach((state, page) => byState.get(state)?.push(page) ?? byState.set(state, [page]));
  for (const [state, pages] of byState) {
    context.fillStyle = state >= 3 ? palette.slot(state - 3) : [palette.faint, palette.cached, palette.shared][state];
    context.globalAlpha = chosen !== null && state >= 3 && state - 3 !== chosen ? 0.25 : 1;
    for (const page of pages) context.fillRect((page % columns) * cell, Math.floor(page / columns) * cell, size, size);
  }
  context.globalAlpha = 1;
  return { cell, columns };
}

const ROW = 16;
const STRIP = 74;
const AXIS = 18;

/** Requests over time, and below them the steps that computed them. from..now in the engine's seconds. */
export function timeline(canvas, { lines, steps, from, now, most }, palette) {
  const gutter = 46;
  const height = Math.max(3, lines.length) * ROW + STRIP + AXIS + 10;
  const { context, width } = prepare(canvas, height);
  const x = (t) => gutter + ((Math.max(t, from) - from) / (now - from)) * (width - gutter);
  const floor = height - AXIS;
  axis(context, { from, now, x, floor, palette });
  lines.forEach((line, index) => lifeline(context, line, index * ROW + 3, { x, from, now, palette }));
  context.font = FONT;
  context.textAlign = "right";
  context.textBaseline = "middle";
  context.fillStyle = palette.muted;
  lines.forEach((line, index) => context.fillText(`#${line.id}`, gutter - 6, index * ROW + 3 + 5.5));
  context.fillText("steps", gutter - 6, floor - STRIP / 2);
  stepStrip(context, { steps, x, from, floor, most, palette });
}

function axis(context, { from, now, x, floor, palette }) {
  const every = [1, 2, 5, 10, 15, 30].find((each) => (now - from) / each <= 8) ?? 60;
  context.font = FONT;
  context.textBaseline = "top";
  for (let ago = 0; ago <= now - from; ago += every) {
    const at = Math.round(x(now - ago)) - 0.5;
    context.fillStyle = palette.line;
    context.fillRect(at, 0, 1, floor);
    context.fillStyle = palette.muted;
    context.textAlign = ago ? "center" : "right";
    context.fillText(ago ? `−${ago} s` : "now", ago ? at : at + 1, floor + 5);
  }
}

function lifeline(context, line, top, { x, from, now, palette }) {
  const end = line.ended ?? now;
  line.marks.forEach(([state, at], index) => {
    const until = line.marks[index + 1]?.[1] ?? end;
    if (until < from) return;
    const thin = state === "waiting";
    context.fillStyle = palette[state];
    const left = x(at);
    const size = Math.max(thin ? 0.5 : 1.5, x(until) - left - (index < line.marks.length - 1 ? 0 : 0.5));
    context.fillRect(left, top + (thin ? 4 : 0), size, thin ? 3 : 11);
  });
  if (line.ended !== null && line.ended >= from) {
    context.fillStyle = line.finish_reason === "abort" ? palette.muted : palette.text;
    context.fillRect(x(line.ended) - 0.5, top, 1.5, 11);
  }
}

function stepStrip(context, { steps, x, from, floor, most, palette }) {
  const scale = (STRIP - 6) / Math.sqrt(Math.max(1, most)); // by the root: 2 decode rows beside 256 prompt tokens
  let before = -Infinity;
  for (const step of steps) {
    const begin = Math.max(step.launched, before);
    before = step.read;
    if (step.read < from) continue;
    const left = x(begin);
    const size = Math.max(0.75, x(step.read) - left - 0.5);
    const total = step.decode_rows + step.prefill_tokens;
    const used = step.used_decode + step.used_prefill;
    const tall = Math.sqrt(total) * scale;
    context.fillStyle = palette.pad;
    context.fillRect(left, floor - tall, size, tall);
    context.fillStyle = step.prefill_tokens ? palette.prefill : palette.decode;
    const filled = tall * (used / Math.max(1, total));
    context.fillRect(left, floor - filled, size, filled);
  }
}
