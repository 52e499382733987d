// What is drawn on canvases: the timeline of steps, the map of blocks, the gaps between tokens.

import { colour, count, duration, surface } from "./dom.js";

const LEFT = 46, RIGHT = 10, AXIS = 20;

function ceiling(value) {
	const unit = 10 ** Math.floor(Math.log10(value));
	return [1, 1.5, 2, 3, 4, 6, 8, 10].map(n => n * unit).find(n => n >= value);
}

function write(g, text, x, y, align, baseline) {
	Object.assign(g, { fillStyle: colour("soft"), textAlign: align, textBaseline: baseline });
	g.fillText(text, x, y);
}

// Draw a lane's frame: title, lines, top and zero of its axis.
function frame(g, width, { top, height, title, high, label = count }) {
	g.fillStyle = colour("line");
	for (const part of [0, 0.5, 1]) g.fillRect(LEFT, Math.round(top + height * part), width - LEFT - RIGHT, 1);
	write(g, label(high), LEFT - 6, top, "right", "middle");
	write(g, "0", LEFT - 6, top + height, "right", "middle");
	write(g, title, LEFT, top - 4, "left", "bottom");
}

// Draw the axis of time: seconds before now, or since the beginning of a recording.
function timeAxis(g, { right, origin, span, x, y, width }) {
	const step = [0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20].find(n => (n / span) * (width - LEFT) > 70) ?? 30;
	const zero = origin ?? right, digits = step < 0.1 ? 2 : step < 1 ? 1 : 0;
	for (let k = Math.ceil((right - span - zero) / step); k * step <= right - zero + 1e-9; k++) {
		const at = x(zero + k * step), text = origin == null && k === 0 ? "now" : `${(k * step).toFixed(digits).replace("-", "−")} s`;
		write(g, text, Math.max(LEFT + 12, Math.min(at, width - RIGHT - 10)), y + 5, "center", "top");
		g.fillRect(Math.round(at), y, 1, 3);
	}
}

// The timeline: tokens of each step, sequences, KV in use, over one axis of time.
export class Timeline {
	selected = null;
	shown = [];

	constructor(canvas) {
		this.canvas = canvas;
	}

	// Draw `view.steps` over the last `seconds`; return the selected step.
	draw(view, seconds) {
		const area = surface(this.canvas);
		if (!area) return;
		const { g, width, height } = area, { now, origin } = view;
		// A recording's axis begins with it and ends with it; the live one ends now.
		const span = origin == null ? seconds : Math.min(seconds, Math.max(view.end - origin, 1e-3)), right = origin == null ? now : Math.max(now, origin + span);
		const x = (this.x = time => LEFT + (1 - (right - time) / span) * (width - LEFT - RIGHT));
		const steps = (this.shown = view.steps.filter(step => step.end > right - span && step.start <= now));
		const most = (least, size) => ceiling(steps.reduce((high, step) => Math.max(high, size(step)), least)), all = height - AXIS - 60;
		const tokens = { top: 16, height: all * 0.52, title: "tokens in a step", high: most(8, step => step.prefill + step.decode) };
		const seqs = { top: tokens.height + 38, height: all * 0.24, title: "sequences", high: most(4, step => Math.max(step.numSeqs, step.waiting)) };
		const kv = { top: seqs.top + seqs.height + 22, height: all * 0.24, title: "KV blocks in use", high: 1, label: () => "100 %" };
		for (const lane of [tokens, seqs, kv]) frame(g, width, lane);
		timeAxis(g, { right, origin, span, x, y: kv.top + kv.height, width });
		if (!steps.length) write(g, "No step in this window. Each becomes a bar: what it prefilled, what it decoded.", (LEFT + width) / 2, tokens.top + tokens.height / 2, "center", "middle");
		g.save();
		g.beginPath();
		g.rect(LEFT, 0, width - LEFT - RIGHT, height);
		g.clip();
		this.#bars(g, tokens);
		this.#area(g, seqs, step => step.numSeqs / seqs.high, "decode");
		this.#area(g, seqs, step => step.waiting / seqs.high, "waiting", true);
		this.#area(g, kv, step => 1 - step.free / view.facts.numBlocks, "private");
		const chosen = steps.find(step => step.step === this.selected);
		g.fillStyle = colour("ink");
		if (chosen) g.fillRect(Math.round(x((chosen.start + chosen.end) / 2)), 12, 1, kv.top + kv.height - 12);
		g.restore();
		return chosen;
	}

	// Stacked bars as wide as their steps took. Where several share a pixel the tallest is shown.
	#bars(g, { top, height, high }) {
		const columns = new Map();
		for (const step of this.shown) {
			const left = Math.floor(this.x(step.start)), size = step.prefill + step.decode;
			if (!(columns.get(left)?.size > size)) columns.set(left, { step, size, wide: Math.max(1, Math.round(this.x(step.end)) - 1 - left) });
		}
		for (const [left, { step, wide, size }] of columns) {
			const [decode, both] = [step.decode, size].map(n => (n / high) * height);
			g.fillStyle = colour(step.failed ? "waiting" : "prefill");
			g.fillRect(left, top + height - both, wide, both - decode);
			g.fillStyle = colour("decode");
			g.fillRect(left, top + height - decode, wide, decode);
		}
	}

	// What holds from one step to the next, filled or as a line; a longer pause between two is left out.
	#area(g, { top, height }, part, name, isLine) {
		Object.assign(g, { fillStyle: colour(name), strokeStyle: colour(name), lineWidth: 1.5, globalAlpha: isLine ? 1 : 0.55 });
		g.beginPath();
		let joined = false;
		this.shown.forEach((step, i) => {
			const y = top + height * (1 - part(step)), left = this.x(step.start), next = this.shown[i + 1], goesOn = next && next.start - step.end < 0.25;
			const right = Math.max(left + 1, this.x(goesOn ? next.start : step.end));
			if (isLine) {
				g[joined ? "lineTo" : "moveTo"](left, y);
				g.lineTo(right, y);
			} else g.rect(left, y, right - left, top + height - y);
			joined = goesOn;
		});
		g[isLine ? "stroke" : "fill"]();
		g.globalAlpha = 1;
	}

	selectAt(clientX) {
		const at = clientX - this.canvas.getBoundingClientRect().left, away = step => Math.abs(this.x((step.start + step.end) / 2) - at);
		this.selected = this.shown.reduce((best, step) => (best && away(best) <= away(step) ? best : step), null)?.step;
	}

	// Select the next step, or the one before; the last if none is.
	move(by) {
		const here = this.shown.findIndex(step => step.step === this.selected);
		this.selected = (here < 0 ? this.shown.at(-1) : this.shown[here + by] ?? this.shown[here])?.step;
	}
}

const STATES = ["free", "cached", "private", "shared"];

// The map of blocks: one square each, or one for several where they are many.
export class BlockMap {
	constructor(canvas) {
		this.canvas = canvas;
	}

	// Draw the states, 0…3 as `STATES`, or where they are not known `used` of them; return [state, count] of each.
	draw({ states, used }, numBlocks) {
		const counts = states ? [0, 0, 0, 0] : [numBlocks - used, 0, used, 0], area = surface(this.canvas);
		for (const state of states ?? []) counts[state]++;
		if (area && numBlocks) this.#squares(area, states ?? new Uint8Array(numBlocks).fill(2, 0, used));
		return STATES.map((name, state) => [name, counts[state]]).filter((_, state) => states || state % 2 === 0);
	}

	#squares({ g, width, height }, states) {
		let per = 1, size = 34;
		const fits = () => Math.floor(width / size) * Math.floor(height / size) >= Math.ceil(states.length / per);
		// The largest square with which all blocks fit; under 4 pixels, several blocks share one.
		while (!fits()) size > 4 ? size-- : per++;
		const columns = Math.floor(width / size), inner = size - (size > 20 ? 3 : size > 6 ? 2 : 1), paths = STATES.map(() => new Path2D());
		for (let cell = 0; cell * per < states.length; cell++) {
			paths[Math.max(...states.subarray(cell * per, (cell + 1) * per))].rect((cell % columns) * size, Math.floor(cell / columns) * size, inner, inner);
		}
		paths.forEach((path, state) => {
			g.fillStyle = colour(STATES[state]);
			g.fill(path);
		});
		this.layout = { per, size, columns, states };
	}

	// Say which block is at a place; "" outside.
	at({ offsetX, offsetY }) {
		const { per, size, columns, states } = this.layout, column = Math.floor(offsetX / size), block = (Math.floor(offsetY / size) * columns + column) * per;
		if (column >= columns || !(block < states.length)) return "";
		const mine = states.subarray(block, block + per), state = STATES[Math.max(...mine)];
		return per === 1 ? `Block ${count(block + 1)}: ${state}` : `Blocks ${count(block + 1)} to ${count(block + mine.length)}: the busiest is ${state}`;
	}
}

// Draw the time from each token to the next, in seconds, over their number.
export function drawGaps(canvas, gaps) {
	const area = surface(canvas);
	if (!area) return;
	const { g, width, height } = area, high = ceiling(gaps.reduce((a, b) => Math.max(a, b), 1e-6)), lane = height - AXIS - 22, wide = (width - LEFT - RIGHT) / gaps.length;
	frame(g, width, { top: 18, height: lane, title: "time from the token before", high, label: duration });
	g.fillStyle = colour("decode");
	gaps.forEach((gap, i) => {
		const tall = Math.max(1, (gap / high) * lane);
		g.fillRect(LEFT + i * wide, 18 + lane - tall, Math.max(1, wide - (wide > 3 ? 1 : 0)), tall);
	});
	write(g, "token 2", LEFT, 23 + lane, "left", "top");
	write(g, count(gaps.length + 1), width - RIGHT, 23 + lane, "right", "top");
}
