// This module holds what is drawn on canvases: the timeline of steps, the map of blocks, the gaps between tokens. It does
// not know where the numbers come from.

import { colour, count, duration, surface } from "./dom.js";

const LEFT = 46, RIGHT = 10, AXIS = 20;

/** Return a round number at or above `value`, and half of it, for an axis. */
function ceiling(value) {
  const unit = 10 ** Math.floor(Math.log10(Math.max(value, 1e-9)));
  return [1, 1.5, 2, 3, 4, 6, 8, 10].map(n => n * unit).find(n => n >= value);
}

/** Draw a lane's frame: title, top and zero of its axis. */
function frame(g, { top, height, width, title, high, write = count }) {
  g.strokeStyle = colour("line");
  g.lineWidth = 1;
  for (const part of [0, 0.5, 1]) {
    const y = Math.round(top + height * (1 - part)) + 0.5;
    g.beginPath();
    g.moveTo(LEFT, y);
    g.lineTo(width - RIGHT, y);
    g.stroke();
  }
  g.fillStyle = colour("soft");
  g.textAlign = "right";
  g.textBaseline = "middle";
  g.fillText(write(high), LEFT - 6, top);
  g.fillText("0", LEFT - 6, top + height);
  g.textAlign = "left";
  g.textBaseline = "bottom";
  g.fillText(title, LEFT, top - 4);
}

/** Draw the axis of time: seconds before now, or since the beginning of a recording. */
function timeAxis(g, { now, origin, span, x, y, width }) {
  const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find(n => n / span * (width - LEFT) > 70) ?? 30;
  const zero = origin ?? now, digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
  g.textBaseline = "top";
  g.textAlign = "center";
  g.fillStyle = colour("soft");
  for (let k = Math.ceil((now - span - zero) / step); k * step <= now - zero + 1e-9; k++) {
    const at = x(zero + k * step), text = origin == null && k === 0 ? "now" : `${(k * step).toFixed(digits).replace("-", "−")} s`;
    g.fillText(text, Math.max(LEFT + 12, Math.min(at, width - RIGHT - 10)), y + 5);
    g.fillRect(Math.round(at), y, 1, 3);
  }
}

/** The timeline: tokens of each step, sequences, KV in use, over one axis of time. */
export class Timeline {
  constructor(canvas) {
    this.canvas = canvas;
    this.selected = null;
  }

  /** Draw `view.steps` over the last `span` seconds. */
  draw(view, span) {
    const area = surface(this.canvas);
    if (!area) return;
    const { g, width, height } = area, { now, origin } = view;
    // A recording's axis begins with it and ends with it; the live one ends now.
    const length = origin == null ? span : Math.min(span, Math.max(view.end - origin, 1e-3)), right = origin == null ? now : Math.max(now, origin + length);
    const x = time => LEFT + (1 - (right - time) / length) * (width - LEFT - RIGHT);
    this.shown = view.steps.filter(step => step.end > right - length && step.start <= now);
    this.x = x;
    const steps = this.shown, lanes = height - AXIS - 60, most = name => steps.reduce((high, step) => Math.max(high, step[name]), 0);
    const tokens = { top: 16, height: lanes * 0.52, width, title: "tokens in a step", high: ceiling(Math.max(8, steps.reduce((high, step) => Math.max(high, step.prefill + step.decode), 0))) };
    const seqs = { top: tokens.top + tokens.height + 22, height: lanes * 0.24, width, title: "sequences", high: ceiling(Math.max(4, most("numSeqs"), most("waiting"))) };
    const kv = { top: seqs.top + seqs.height + 22, height: lanes * 0.24, width, title: "KV blocks in use", high: 1, write: part => `${100 * part} %` };
    for (const lane of [tokens, seqs, kv]) frame(g, lane);
    timeAxis(g, { now: right, origin, span: length, x, y: kv.top + kv.height, width });
    g.save();
    g.beginPath();
    g.rect(LEFT, 0, width - LEFT - RIGHT, height);
    g.clip();
    this.#bars(g, tokens, x);
    this.#areas(g, seqs, x, step => step.numSeqs / seqs.high, "decode");
    this.#areas(g, seqs, x, step => step.waiting / seqs.high, "waiting", true);
    this.#areas(g, kv, x, step => 1 - step.free / view.facts.numBlocks, "private");
    const chosen = steps.find(step => step.step === this.selected);
    if (chosen) {
      g.fillStyle = colour("ink");
      g.globalAlpha = 0.75;
      g.fillRect(Math.round(x((chosen.start + chosen.end) / 2)), tokens.top - 4, 1, kv.top + kv.height - tokens.top + 4);
    }
    g.restore();
    if (!steps.length) {
      g.textAlign = "center";
      g.textBaseline = "middle";
      g.fillStyle = colour("soft");
      g.fillText("No step in this window. Every step becomes a bar: what it prefilled and what it decoded.", LEFT + (width - LEFT) / 2, tokens.top + tokens.height / 2, width - LEFT - 20);
    }
    return chosen ?? null;
  }

  /** Stacked bars as wide as their steps took. Where several share a pixel the tallest is shown. */
  #bars(g, { top, height, high }, x) {
    const columns = new Map();
    for (const step of this.shown) {
      const left = Math.floor(x(step.start)), right = Math.max(left + 1, Math.round(x(step.end)) - 1), size = step.prefill + step.decode;
      if (!(columns.get(left)?.size > size)) columns.set(left, { step, left, right, size });
    }
    for (const { step, left, right } of columns.values()) {
      const decode = (step.decode / high) * height, prefill = (step.prefill / high) * height;
      g.fillStyle = colour("decode");
      g.fillRect(left, top + height - decode, right - left, decode);
      g.fillStyle = colour(step.failed ? "waiting" : "prefill");
      g.fillRect(left, top + height - decode - prefill, right - left, prefill);
    }
  }

  /** What holds from one step to the next: filled, or as a line. A gap between steps is drawn as one. */
  #areas(g, { top, height }, x, part, name, line = false) {
    g.fillStyle = g.strokeStyle = colour(name);
    g.lineWidth = 1.5;
    g.beginPath();
    let before = null;
    this.shown.forEach((step, i) => {
      const y = top + height * (1 - part(step)), left = x(step.start), next = this.shown[i + 1];
      const right = next && next.start - step.end < 0.25 ? x(next.start) : x(step.end);
      if (!line) g.rect(left, y, Math.max(1, right - left), top + height - y);
      else {
        if (before === null) g.moveTo(left, y);
        else g.lineTo(left, y);
        g.lineTo(Math.max(left + 1, right), y);
        before = next && next.start - step.end < 0.25 ? y : null;
      }
    });
    g.globalAlpha = line ? 1 : 0.55;
    if (line) g.stroke();
    else g.fill();
    g.globalAlpha = 1;
  }

  /** Select the step nearest to a place. */
  selectAt(clientX) {
    const at = clientX - this.canvas.getBoundingClientRect().left;
    const away = step => Math.abs(this.x((step.start + step.end) / 2) - at);
    this.selected = this.shown?.reduce((best, step) => (best && away(best) <= away(step) ? best : step), null)?.step ?? null;
  }

  /** Select the next step, or the one before; the last if none is. */
  move(by) {
    const here = this.shown?.findIndex(step => step.step === this.selected) ?? -1;
    this.selected = (here < 0 ? this.shown?.at(-1) : this.shown[here + by] ?? this.shown[here])?.step ?? null;
  }
}

const STATES = ["free", "cached", "private", "shared"];

/** The map of blocks: one square each, or one for several where they are many. */
export class BlockMap {
  constructor(canvas) {
    this.canvas = canvas;
  }

  /** Draw the states, 0…3 as `STATES`, or where they are not known `used` of them; return [state, count] of each. */
  draw({ states, used }, numBlocks) {
    const counts = states ? [0, 0, 0, 0] : [numBlocks - used, 0, used, 0];
    for (const state of states ?? []) counts[state]++;
    const named = STATES.map((name, state) => [name, counts[state]]).filter((_, state) => states || state % 2 === 0);
    const area = surface(this.canvas);
    if (!area || !numBlocks) return named;
    const { g, width, height } = area;
    let per = 1, size;
    // The largest square with which all blocks fit; under 4 pixels, several blocks share one.
    const fits = n => { for (size = 34; size >= 4; size--) if (Math.floor(width / size) * Math.floor(height / size) >= n) return true; return false; };
    while (!fits(Math.ceil(numBlocks / per))) per++;
    const columns = Math.floor(width / size), gap = size > 20 ? 3 : size > 6 ? 2 : 1, cells = Math.ceil(numBlocks / per);
    this.layout = { per, size, columns, states, numBlocks };
    const paths = STATES.map(() => new Path2D());
    for (let cell = 0; cell < cells; cell++) {
      let state = 0;
      for (let block = cell * per; block < Math.min(numBlocks, (cell + 1) * per); block++) {
        state = Math.max(state, states ? states[block] : block < used ? 2 : 0);
      }
      paths[state].rect((cell % columns) * size, Math.floor(cell / columns) * size, size - gap, size - gap);
    }
    paths.forEach((path, state) => {
      g.fillStyle = colour(STATES[state]);
      g.fill(path);
    });
    return named;
  }

  /** Say which block is at a place; "" outside. */
  at(clientX, clientY) {
    const box = this.canvas.getBoundingClientRect(), { per, size, columns, states, numBlocks } = this.layout ?? {};
    const column = Math.floor((clientX - box.left) / size), block = (Math.floor((clientY - box.top) / size) * columns + column) * per;
    if (!states || column >= columns || !(block < numBlocks)) return "";
    if (per === 1) return `Block ${count(block)}: ${STATES[states[block]]}`;
    const last = Math.min(numBlocks, block + per) - 1;
    return `Blocks ${count(block)} to ${count(last)}: the busiest is ${STATES[Math.max(...states.slice(block, last + 1))]}`;
  }
}

/** Draw the time from each token to the next, in seconds, over their number. */
export function drawGaps(canvas, gaps) {
  const area = surface(canvas);
  if (!area) return;
  const { g, width, height } = area, high = ceiling(gaps.reduce((a, b) => Math.max(a, b), 1e-6)), inner = height - AXIS - 22;
  frame(g, { top: 18, height: inner, width, title: "time from the token before", high, write: duration });
  const wide = (width - LEFT - RIGHT) / gaps.length;
  g.fillStyle = colour("decode");
  gaps.forEach((gap, i) => {
    const tall = Math.max(1, (gap / high) * inner);
    g.fillRect(LEFT + i * wide, 18 + inner - tall, Math.max(1, wide - (wide > 3 ? 1 : 0)), tall);
  });
  g.fillStyle = colour("soft");
  g.textBaseline = "top";
  g.textAlign = "left";
  g.fillText("token 2", LEFT, 18 + inner + 5);
  g.textAlign = "right";
  g.fillText(count(gaps.length + 1), width - RIGHT, 18 + inner + 5);
}
