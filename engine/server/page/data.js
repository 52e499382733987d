// The forms in which servers and recordings tell of a run, made into what the views show. No other module knows them.

import { count, duration, some } from "./dom.js";
import { MAX_WINDOW_S } from "./run.js";

const VERSIONS = [1, 2, 3];
// Chunks between two waits that are shown one by one.
const MAX_CHUNK_ROWS = 6;

const named = (fields, row) => Object.fromEntries(fields.map((name, i) => [name, row[i]]));

function readEvents(fields, rows) {
	return rows.map(row => {
		const event = named(fields, row);
		return { kind: event.kind, time: event.time_s, step: event.step, id: event.request_id, choice: event.choice, row: event.row,
			tokens: event.num_tokens, cached: event.num_cached_tokens, most: event.max_tokens, detail: event.detail };
	});
}

// Rows are left out where they are those of the step before, counts where all ran as many, `sampled` where all did.
// A step that was scheduled while another ran begins where that was over; `over` is where the one before the first was.
function readSteps(fields, rows, over = 0) {
	let before = [];
	return rows.map(row => {
		const step = named(fields, row), ran = (before = step.rows ?? before), counts = step.num_scheduled_tokens;
		const [start, execute] = [step.start_s, step.execute_s].map(time => Math.max(time, over));
		over = step.end_s;
		return { step: step.step, start, execute, scheduled: step.execute_s - step.start_s, update: step.update_s, end: over, rows: ran,
			tokens: Array.isArray(counts) ? counts : ran.map(() => counts), sampled: step.sampled ?? ran.map((_, i) => i),
			waiting: step.num_waiting, free: step.num_free_blocks, cached: step.num_cached_blocks, failed: step.failed };
	});
}

// Blocks come as runs [count, state, …].
function readBlocks(runs) {
	const states = new Uint8Array(runs.reduce((sum, value, i) => sum + (i % 2 ? 0 : value), 0));
	for (let i = 0, at = 0; i < runs.length; at += runs[i], i += 2) states.fill(runs[i + 1], at, at + runs[i]);
	return states;
}

// Return a recording as `Run` takes it. Throws where it is none.
export function readRecording(file) {
	if (!VERSIONS.includes(file?.octavo_recording)) throw new Error("it is not a recording of a kind this page knows");
	const { facts } = file, steps = readSteps(file.step_fields, file.steps), maps = file.block_maps.map(([time, runs]) => ({ time, states: readBlocks(runs) }));
	return {
		facts: { model: facts.model ?? "", numBlocks: facts.num_blocks, blockSize: facts.block_size, maxNumSeqs: facts.max_num_seqs },
		events: readEvents(file.event_fields, file.events), steps, maps,
	};
}

// Return what the live view shows after a message of GET /live; `seen` is what this returned for the one before.
export function readLive(message, seen, model) {
	const { kv, rates } = message, states = readBlocks(kv.blocks), now = kv.time_s;
	// Tokens that a row has still to run until it samples its first, since the admission that gave it to somebody.
	const left = seen?.left ?? new Map(), fresh = readSteps(message.step_fields, message.steps, seen?.steps.at(-1)?.end);
	const admitted = [...(seen?.admitted ?? []), ...readEvents(message.event_fields, message.requests).filter(event => event.kind === "admitted")];
	for (const step of fresh) {
		while (admitted[0]?.step <= step.step) {
			const { row, tokens, cached } = admitted.shift();
			left.set(row, tokens - cached);
		}
		step.prefill = step.decode = 0;
		step.rows.forEach((row, i) => {
			const tokens = step.tokens[i], prefill = Math.min(tokens, left.get(row) ?? (tokens > 1 ? tokens : 0));
			left.set(row, Math.max(0, (left.get(row) ?? 0) - prefill));
			step.prefill += prefill;
			step.decode += tokens - prefill;
		});
		step.numSeqs = step.rows.length;
	}
	const steps = [...(seen?.steps ?? []), ...fresh].filter(step => step.end > now - MAX_WINDOW_S);
	const sequence = each => ({ id: each.request_id, choice: each.choice });
	return {
		now, steps, left, admitted, facts: { model: model.id, numBlocks: states.length, blockSize: model.block_size, maxNumSeqs: model.max_num_seqs },
		running: kv.running.map(each => ({ ...sequence(each), row: each.row, tokens: each.num_tokens, computed: each.num_computed_tokens })),
		waiting: kv.waiting.map(each => ({ ...sequence(each), reason: each.reason, waited: each.waited_s })),
		numRunning: kv.running.length, numWaiting: kv.num_waiting, kv: { states, used: kv.counts.private + kv.counts.shared },
		rates: {
			prefill: rates.prefill_tokens_per_s, decode: rates.decode_tokens_per_s, hit: rates.prefix_hit_rate,
			ttft: [rates.ttft_s?.p50, rates.ttft_s?.p99], itl: [rates.itl_s?.p50, rates.itl_s?.p99],
		},
	};
}

export function summaryLine({ state, prompt_tokens, cached_tokens, output_tokens, num_choices, num_preemptions, finish_reasons, seconds }) {
	return [
		state === "finished" ? [...new Set(finish_reasons)].join(", ") : state,
		prompt_tokens != null && `${count(prompt_tokens)} in${cached_tokens ? ` (${count(cached_tokens)} cached)` : ""}`,
		state === "finished" && `${count(output_tokens)} out${num_choices > 1 ? ` in ${num_choices} answers` : ""}`,
		num_preemptions > 0 && `preempted ${num_preemptions}×`,
		seconds != null && duration(seconds),
	].filter(Boolean).join(" · ");
}

// Return what the inspector shows of an explanation: times in seconds since the request arrived.
export const readExplanation = ({ choices }) => ({ ended: choices.every(choice => choice.state === "finished"), choices: choices.map(readChoice) });

// What held a sequence up longest; reasons come in that order.
const mostly = ([longest, ...others]) => (others.length ? "mostly: " : "") + (longest ?? "");

function readChoice(choice) {
	const { waits, chunks, tokens, preemptions } = choice, rows = [], times = tokens.at_s;
	const all = chunks.step.map((step, i) => ({ step, tokens: chunks.num_tokens[i], from: chunks.at_s[i], to: chunks.at_s[i] + chunks.seconds[i] }));
	// Between two waits it had a row: chunks first, then a token a step.
	if (!waits.length) waits.push({ at_s: 0, seconds: 0, reasons: {} });
	waits.forEach((wait, i) => {
		const from = wait.at_s, until = waits[i + 1]?.at_s ?? Infinity, inside = time => time >= from && time < until;
		rows.push({ kind: "wait", label: i ? "Preempted" : "Queued", note: mostly(Object.keys(wait.reasons)), from, to: from + wait.seconds });
		const mine = all.filter(chunk => inside(chunk.from)), label = i ? "Recompute" : "Prefill";
		const total = mine.reduce((sum, chunk) => sum + chunk.tokens, 0);
		if (mine.length > MAX_CHUNK_ROWS) rows.push({ kind: "prefill", label, note: `${some(total, "token")} in ${mine.length} chunks`, from: mine[0].from, to: mine.at(-1).to });
		else for (const chunk of mine) rows.push({ kind: "prefill", label, note: `${some(chunk.tokens, "token")}, step ${count(chunk.step)}`, from: chunk.from, to: chunk.to });
		const begin = mine.at(-1)?.to ?? from + wait.seconds, decoded = times.filter(time => time > begin + 1e-9 && time < until);
		if (decoded.length) rows.push({ kind: "decode", label: "Decode", note: some(decoded.length, "token"), from: begin, to: decoded.at(-1) });
	});
	const gap = choice.inter_token_s, facts = [
		["Prompt", choice.prompt_tokens], ["In the prefix cache", choice.cached_tokens], ["Output", choice.output_tokens],
		["At most", choice.max_tokens], ["Queued", choice.queued_s, duration], ["To the first token", choice.time_to_first_token_s, duration],
		["Between tokens, median", gap?.p50, duration], ["Between tokens, p99", gap?.p99, duration], ["In all", choice.seconds, duration],
		["Preemptions", preemptions.length],
	].filter(([, value]) => value != null).map(([name, value, write = count]) => [name, write(value)]);
	return {
		sentences: choice.sentences, facts, rows: rows.filter(row => row.kind !== "wait" || row.to > row.from), first: choice.time_to_first_token_s,
		to: Math.max(choice.seconds, rows.at(-1).to), gaps: times.slice(1).map((time, i) => time - times[i]),
	};
}
