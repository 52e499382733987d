// A run rebuilt from its events: what each sequence did, what the engine looked like at any time.

import { duration, some } from "./dom.js";

// Seconds over which speeds are counted.
const RATE_S = 5;
// Seconds before a moment of which steps and gaps are shown at most.
export const MAX_WINDOW_S = 60;

const quantile = (sorted, q) => sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] ?? null;
const sum = (list, name) => list.reduce((total, each) => total + each[name], 0);
const ascending = list => list.sort((a, b) => a - b);

// Return how many of a list that ascends by `name` are at most `limit`.
function upTo(list, limit, name) {
	let low = 0, high = list.length;
	while (low < high) {
		const middle = (low + high) >> 1;
		if (list[middle][name] <= limit) low = middle + 1;
		else high = middle;
	}
	return low;
}

// A time in the queue, with the reasons that became known, or in a row: what was found in the cache, what ran when.
const makePart = (from, what) => ({ from, to: null, row: -1, reasons: [], steps: [], ...what });

class Life {
	constructor({ id, choice, time }) {
		Object.assign(this, { id, choice, from: time, arrived: false, prompt: 0, left: Infinity, parts: [], outputs: [], lost: [] });
	}

	at(now) {
		return this.from <= now && now < this.left ? this.parts.findLast(part => part.from <= now) : null;
	}

	event({ kind, time, step, row, tokens, cached, detail }) {
		const open = this.parts.at(-1), reasons = [{ time, reason: detail }];
		if (kind === "waits" && open?.row < 0) return open.reasons.push(...reasons);
		if (open) open.to = time;
		if (kind === "finished") Object.assign(this, { left: time, reason: detail, numOutputs: tokens });
		else if (kind === "admitted") {
			this.prompt ||= tokens;
			this.parts.push(makePart(time, { row, cached, target: tokens, computed: cached }));
		} else {
			if (kind === "arrived") Object.assign(this, { arrived: true, prompt: tokens });
			if (kind === "preempted") this.lost.push({ time, step, tokens });
			this.parts.push(makePart(time, { reasons: kind === "waits" ? reasons : [{ time, reason: kind === "arrived" ? "behind others in the queue" : kind }] }));
		}
	}

	// Take a step it ran in; return how many of its tokens were known at its admission: prefill, or computed again.
	step(step, tokens, sampled, gaps) {
		const stay = this.parts.at(-1), prefill = Math.max(0, Math.min(tokens, stay.target - stay.computed)), last = this.outputs.at(-1);
		stay.computed += tokens;
		stay.steps.push({ end: step.end, step, prefill, sampled, after: stay.computed });
		if (sampled) {
			if (last) gaps.push({ time: step.end, gap: step.end - last.time });
			this.outputs.push({ time: step.end });
		}
		return prefill;
	}
}

// A recorded run.
//
// `facts`: {model, numBlocks, blockSize, maxNumSeqs}. `events`: {kind, time, step, id, choice, row, tokens, cached,
// detail}. `steps`: {step, start, execute, update, end, rows, tokens, sampled, waiting, free, failed}. `maps`: {time,
// states}. All in order; times are seconds of one clock.
export class Run {
	constructor({ facts, events, steps, maps }) {
		Object.assign(this, { facts, steps, maps, lives: [], queue: [], admissions: [], gaps: [] });
		const open = new Map(), owners = new Map(), take = event => this.#event(event, open, owners);
		let next = 0;
		for (const step of steps) {
			// An end names the last step it may have run in, everything else the first it bears on.
			while (next < events.length && events[next].step < step.step + (events[next].kind !== "finished")) take(events[next++]);
			this.#step(step, owners);
		}
		events.slice(next).forEach(take);
		this.start = Math.min(steps[0]?.start ?? Infinity, events[0]?.time ?? Infinity);
		this.end = Math.max(steps.at(-1)?.end ?? -Infinity, events.at(-1)?.time ?? -Infinity);
	}

	#event(event, open, owners) {
		const { id, choice, kind, row } = event, key = `${id}#${choice}`;
		if (!open.has(key) || kind === "arrived") {
			open.set(key, new Life(event));
			this.lives.push(open.get(key));
		}
		open.get(key).event(event);
		if (kind === "waits" || kind === "admitted") this.queue.push(event);
		if (kind === "admitted") {
			owners.set(row, open.get(key));
			this.admissions.push(event);
		} else owners.delete(row);
	}

	#step(step, owners) {
		const sampled = new Set(step.sampled);
		Object.assign(step, { prefill: 0, decode: 0, numSeqs: step.rows.length });
		step.rows.forEach((row, position) => {
			// Whose row it is may have left the recording's beginning.
			const tokens = step.tokens[position], prefill = owners.get(row)?.step(step, tokens, sampled.has(position), this.gaps) ?? (tokens > 1 ? tokens : 0);
			step.prefill += prefill;
			step.decode += tokens - prefill;
		});
	}

	// Return what the live view shows of a moment.
	viewAt(now) {
		const { facts, maps } = this, shown = upTo(this.steps, now, "end"), last = this.steps[shown - 1], map = maps[upTo(maps, now, "time") - 1];
		const steps = this.steps.slice(upTo(this.steps, now - MAX_WINDOW_S, "end"), shown), running = [], waiting = [];
		for (const life of this.lives) {
			const part = life.at(now), about = { id: life.id, choice: life.choice };
			if (part?.row >= 0) {
				const computed = part.steps[upTo(part.steps, now, "end") - 1]?.after ?? part.cached;
				running.push({ ...about, tokens: life.prompt + upTo(life.outputs, now, "time"), computed });
			} else if (part) waiting.push({ ...about, reason: part.reasons.findLast(({ time }) => time <= now).reason, waited: now - life.from });
		}
		const used = last ? facts.numBlocks - last.free : 0;
		return {
			now, origin: this.start, end: this.end, facts, steps, running, waiting, numRunning: running.length, numWaiting: waiting.length,
			kv: { states: map?.states, used, at: map?.time }, rates: this.#rates(now, steps),
		};
	}

	#rates(now, steps) {
		const over = Math.max(0.2, Math.min(RATE_S, now - this.start)), recent = steps.slice(upTo(steps, now - RATE_S, "end"));
		const firsts = ascending(this.lives.filter(life => life.outputs[0]?.time <= now && life.arrived).map(life => life.outputs[0].time - life.from));
		const gaps = ascending(this.gaps.slice(upTo(this.gaps, now - MAX_WINDOW_S, "time"), upTo(this.gaps, now, "time")).map(each => each.gap));
		const admitted = this.admissions.slice(0, upTo(this.admissions, now, "time"));
		return {
			prefill: sum(recent, "prefill") / over, decode: sum(recent, "decode") / over, hit: admitted.length ? sum(admitted, "cached") / sum(admitted, "tokens") : null,
			ttft: [quantile(firsts, 0.5), quantile(firsts, 0.99)], itl: [quantile(gaps, 0.5), quantile(gaps, 0.99)],
		};
	}

	// Return a line for each request that had come by a moment, the latest first, in the form of GET /v1/requests.
	summaries(now) {
		const byId = new Map();
		for (const life of this.lives) if (life.from <= now) byId.set(life.id, [...(byId.get(life.id) ?? []), life]);
		return [...byId].reverse().map(([request_id, lives]) => {
			const ended = lives.filter(life => life.left <= now), runs = lives.some(life => life.at(now)?.row >= 0);
			return {
				request_id, state: ended.length === lives.length ? "finished" : runs ? "running" : "waiting", num_choices: lives.length, prompt_tokens: lives[0].prompt,
				cached_tokens: lives[0].parts.find(part => part.row >= 0)?.cached, output_tokens: sum(ended, "numOutputs"), finish_reasons: ended.map(life => life.reason),
				num_preemptions: lives.reduce((total, life) => total + upTo(life.lost, now, "time"), 0), seconds: ended.length ? Math.max(...ended.map(life => life.left)) - lives[0].from : null,
			};
		});
	}

	// Explain one request in the form of GET /v1/requests/{id}; null where nothing is known of it.
	explain(id) {
		const lives = this.lives.filter(life => life.id === id);
		return lives.length ? { choices: lives.map(life => this.#choice(life)) } : null;
	}

	#choice(life) {
		const end = Math.min(life.left, this.end), at = time => time - life.from, parts = life.parts.map(part => ({ ...part, to: part.to ?? end }));
		const stays = parts.filter(part => part.row >= 0), ran = stays.flatMap(({ to, steps }) => steps.filter(each => each.prefill)
			.map(each => ({ ...each, from: Math.min(each.step.execute, to), to: each.sampled ? each.end : Math.min(each.end, to) })));
		const waits = parts.filter(part => part.row < 0).map(({ from, to }) => ({ at_s: at(from), seconds: to - from, reasons: this.#reasons(from, to) }));
		const times = life.outputs.map(({ time }) => at(time)), gaps = ascending(times.slice(1).map((time, i) => time - times[i]));
		const choice = {
			state: life.left <= this.end ? "finished" : "running", prompt_tokens: life.prompt, output_tokens: life.numOutputs ?? times.length, finish_reason: life.reason, seconds: at(end),
			waits, queued_s: waits[0]?.seconds, cached_tokens: stays[0]?.cached, preemptions: life.lost, tokens: { at_s: times },
			chunks: { step: ran.map(each => each.step.step), num_tokens: ran.map(each => each.prefill), at_s: ran.map(({ from }) => at(from)), seconds: ran.map(({ from, to }) => to - from) },
			time_to_first_token_s: life.arrived ? times[0] : null, inter_token_s: gaps.length ? { p50: quantile(gaps, 0.5), p99: quantile(gaps, 0.99) } : null,
		};
		const tokens = n => some(n, "token"), listed = (reasons, all = Object.entries(reasons)) => all.map(([why, s]) => (all.length > 1 ? `${duration(s)} ` : "") + why).join(", ");
		choice.sentences = [
			life.arrived ? `Arrived with ${tokens(life.prompt)}.` : "Its beginning is not in the recording.",
			waits.length && `Was queued ${duration(waits[0].seconds)}: ${listed(waits[0].reasons)}.`,
			stays.length && `Prefix hit: ${stays[0].cached} of ${tokens(life.prompt)}.`,
			ran.length && `Ran ${tokens(sum(ran, "prefill"))} in ${some(ran.length, "chunk")}.`,
			...life.lost.map((lost, i) => `Preempted in step ${lost.step}, giving up ${tokens(lost.tokens)}${stays[i + 1] ? `, ${Math.max(0, lost.tokens - stays[i + 1].cached)} of them computed again` : ""}.`),
			gaps.length && `First token ${duration(times[0])} after arrival, then one every ${duration(quantile(gaps, 0.5))} (median; the slowest took ${duration(gaps.at(-1))}).`,
			life.reason && `Ended after ${duration(at(end))} with ${tokens(life.numOutputs)}: ${life.reason}.`,
		].filter(Boolean);
		return choice;
	}

	// What the queue stood still for between two moments, longest first: only its head is held up, all others by it.
	#reasons(from, to) {
		const found = new Map(), add = (reason, seconds) => seconds > 1e-9 && found.set(reason, (found.get(reason) ?? 0) + seconds);
		let rest = to - from;
		for (let i = Math.max(0, upTo(this.queue, from, "time") - 1); this.queue[i]?.time < to; i++) {
			const { kind, time, detail } = this.queue[i], seconds = Math.min(to, this.queue[i + 1]?.time ?? to) - Math.max(from, time);
			if (kind === "waits" && seconds > 0) {
				add(detail, seconds);
				rest -= seconds;
			}
		}
		add("on its way into a step", rest);
		return Object.fromEntries([...found].sort((a, b) => b[1] - a[1]));
	}
}
