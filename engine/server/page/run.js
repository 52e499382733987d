// This module holds a run rebuilt from its events: what each sequence did, and what the engine looked like at any time.
// It does not know files, HTTP or how anything is drawn.

import { count, duration, some } from "./dom.js";

/** Seconds over which speeds are counted. */
const RATE_S = 5;
/** Seconds before a moment of which steps and gaps are shown at most. */
export const MAX_WINDOW_S = 60;

/** Return the value below which the part `q` of ascending numbers lies; null of none. */
export const quantile = (sorted, q) => (sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(q * sorted.length))] : null);

/** Return how many of a list that ascends by `by` are at most `limit`. */
function upTo(list, limit, by) {
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (by(list[middle]) <= limit) low = middle + 1;
    else high = middle;
  }
  return low;
}

/**
 * A recorded run.
 *
 * `facts`: {model, numBlocks, blockSize, maxNumSeqs}. `events`: {kind, time, step, id, choice, row, tokens, cached,
 * most, detail}. `steps`: {step, start, execute, update, end, rows, tokens, sampled, waiting, free, cached, failed}.
 * `maps`: {time, states}. All in order; times are seconds of one clock.
 */
export class Run {
  constructor({ facts, events, steps, maps }) {
    Object.assign(this, { facts, steps, maps, lives: [], queue: [], admissions: [], gaps: [] });
    this.open = new Map();
    this.owners = new Map();
    // An end names the last step it may have run in, everything else the first it bears on.
    const isBefore = (event, step) => (event.kind === "finished" ? event.step < step.step : event.step <= step.step);
    let next = 0;
    for (const step of steps) {
      while (next < events.length && isBefore(events[next], step)) this.#event(events[next++]);
      this.#step(step);
    }
    while (next < events.length) this.#event(events[next++]);
    this.start = Math.min(steps[0]?.start ?? Infinity, events[0]?.time ?? Infinity);
    this.end = Math.max(steps.at(-1)?.end ?? -Infinity, events.at(-1)?.time ?? -Infinity);
  }

  #event(event) {
    const key = `${event.id}#${event.choice}`;
    let life = this.open.get(key);
    if (!life || event.kind === "arrived") {
      this.open.set(key, (life = new Life(event)));
      this.lives.push(life);
    }
    life.event(event);
    if (event.kind === "waits" || event.kind === "admitted") this.queue.push(event);
    if (event.kind === "admitted") {
      this.owners.set(event.row, life);
      this.admissions.push(event);
    } else if (event.row >= 0) this.owners.delete(event.row);
  }

  #step(step) {
    const sampled = new Set(step.sampled);
    step.prefill = step.decode = 0;
    step.rows.forEach((row, position) => {
      const tokens = step.tokens[position], life = this.owners.get(row);
      // Whose row it is may have left the recording's beginning.
      const prefill = life ? life.step(step, tokens, sampled.has(position), this.gaps) : tokens > 1 ? tokens : 0;
      step.prefill += prefill;
      step.decode += tokens - prefill;
    });
    step.numSeqs = step.rows.length;
  }

  /** Return what the live view shows of a moment. */
  viewAt(now) {
    const { facts, maps } = this, shown = upTo(this.steps, now, step => step.end), last = this.steps[shown - 1];
    const steps = this.steps.slice(upTo(this.steps, now - MAX_WINDOW_S, step => step.end), shown);
    const running = [], waiting = [];
    for (const life of this.lives) {
      const part = life.from <= now && now < life.left ? life.parts.findLast(each => each.from <= now) : null;
      if (part?.row >= 0) running.push({ id: life.id, choice: life.choice, row: part.row, tokens: life.prompt + upTo(life.outputs, now, at => at.time), computed: part.computedAt(now) });
      else if (part) waiting.push({ id: life.id, choice: life.choice, reason: part.reasonAt(now), waited: now - life.from });
    }
    waiting.sort((a, b) => b.waited - a.waited);
    const used = last ? facts.numBlocks - last.free : 0, map = maps[upTo(maps, now, each => each.time) - 1];
    return {
      now, origin: this.start, end: this.end, facts, steps, running, waiting, numRunning: running.length, numWaiting: waiting.length,
      kv: { states: map?.states ?? null, used, at: map?.time }, rates: this.#rates(now, steps),
    };
  }

  #rates(now, steps) {
    const over = Math.max(0.2, Math.min(RATE_S, now - this.start)), recent = steps.slice(upTo(steps, now - RATE_S, step => step.end));
    const speed = name => recent.reduce((total, step) => total + step[name], 0) / over;
    const ascending = list => list.sort((a, b) => a - b);
    const firsts = ascending(this.lives.filter(life => life.outputs[0]?.time <= now && life.arrived).map(life => life.outputs[0].time - life.from));
    const gaps = ascending(this.gaps.slice(upTo(this.gaps, now - MAX_WINDOW_S, each => each.time), upTo(this.gaps, now, each => each.time)).map(each => each.gap));
    const asked = this.admissions.slice(0, upTo(this.admissions, now, each => each.time)), total = name => asked.reduce((sum, each) => sum + each[name], 0);
    return {
      prefill: speed("prefill"), decode: speed("decode"), hit: asked.length ? total("cached") / total("tokens") : null,
      ttft: [quantile(firsts, 0.5), quantile(firsts, 0.99)], itl: [quantile(gaps, 0.5), quantile(gaps, 0.99)],
    };
  }

  /** Return a line for each request that had come by a moment, the latest first, in the form of GET /v1/requests. */
  summaries(now) {
    const byId = new Map();
    for (const life of this.lives) if (life.from <= now) byId.set(life.id, [...(byId.get(life.id) ?? []), life]);
    return [...byId].reverse().map(([request_id, lives]) => {
      const ended = lives.filter(life => life.left <= now), isWaiting = life => !(life.parts.findLast(each => each.from <= now)?.row >= 0);
      return {
        request_id, state: ended.length === lives.length ? "finished" : lives.every(isWaiting) ? "waiting" : "running", num_choices: lives.length,
        prompt_tokens: lives[0].prompt, cached_tokens: lives[0].stays[0]?.cached ?? null, output_tokens: ended.reduce((sum, life) => sum + life.numOutputs, 0),
        num_preemptions: lives.reduce((sum, life) => sum + life.lost.filter(each => each.time <= now).length, 0),
        finish_reasons: ended.map(life => life.reason), seconds: ended.length ? Math.max(...ended.map(life => life.left)) - lives[0].from : null,
      };
    });
  }

  /** Explain one request in the form of GET /v1/requests/{id}; null where nothing is known of it. */
  explain(id) {
    const lives = this.lives.filter(life => life.id === id);
    return lives.length ? { request_id: id, choices: lives.map(life => this.#choice(life)) } : null;
  }

  #choice(life) {
    const end = Math.min(life.left, this.end), at = time => time - life.from, waits = [], chunks = { step: [], num_tokens: [], at_s: [], seconds: [] };
    for (const part of life.parts) {
      const to = part.to ?? end;
      if (part.row === undefined) waits.push({ at_s: at(part.from), seconds: to - part.from, reasons: this.#reasons(part.from, to) });
      else for (const { step, prefill } of part.steps.filter(each => each.prefill)) {
        chunks.step.push(step.step);
        chunks.num_tokens.push(prefill);
        chunks.at_s.push(at(step.start));
        chunks.seconds.push(step.end - step.start);
      }
    }
    const times = life.outputs.map(({ time }) => time), gaps = times.slice(1).map((time, i) => time - times[i]).sort((a, b) => a - b);
    const choice = {
      choice: life.choice, state: life.left <= this.end ? "finished" : life.parts.at(-1)?.row >= 0 ? "running" : "waiting", is_complete: life.arrived,
      prompt_tokens: life.prompt, max_tokens: life.most, output_tokens: life.numOutputs ?? times.length, finish_reason: life.reason, seconds: at(end), waits,
      queued_s: waits[0]?.seconds ?? 0, cached_tokens: life.stays[0]?.cached ?? null, rows: life.stays.map(stay => stay.row), chunks,
      preemptions: life.lost.map((lost, i) => ({ step: lost.step, at_s: at(lost.time), lost_tokens: lost.tokens, recomputed_tokens: life.stays[i + 1] ? Math.max(0, lost.tokens - life.stays[i + 1].cached) : null })),
      time_to_first_token_s: life.arrived && times.length ? at(times[0]) : null, tokens: { step: life.outputs.map(({ step }) => step), at_s: times.map(at) },
      inter_token_s: gaps.length ? { p50: quantile(gaps, 0.5), p99: quantile(gaps, 0.99), max: gaps.at(-1) } : null,
    };
    return { ...choice, sentences: sentences(choice) };
  }

  /** What the queue stood still for between two moments: only its head is held up, all others because it is. */
  #reasons(from, to) {
    const found = {}, first = Math.max(0, upTo(this.queue, from, event => event.time) - 1);
    let rest = to - from;
    for (let i = first; i < this.queue.length && this.queue[i].time < to; i++) {
      const seconds = Math.min(to, this.queue[i + 1]?.time ?? to) - Math.max(from, this.queue[i].time);
      if (this.queue[i].kind !== "waits" || seconds <= 0) continue;
      found[this.queue[i].detail] = (found[this.queue[i].detail] ?? 0) + seconds;
      rest -= seconds;
    }
    if (rest > 1e-9 || !Object.keys(found).length) found["on its way into a step"] = rest;
    return Object.fromEntries(Object.entries(found).sort((a, b) => b[1] - a[1]));
  }
}

function sentences({ is_complete, prompt_tokens, max_tokens, waits, cached_tokens, chunks, preemptions, time_to_first_token_s, inter_token_s, state, seconds, output_tokens, finish_reason }) {
  const tokens = n => some(n, "token"), num = chunks.step.length;
  return [
    !is_complete && "Its beginning is not in the recording.",
    is_complete && `Arrived with ${tokens(prompt_tokens)}${max_tokens ? `, for at most ${count(max_tokens)} more` : ""}.`,
    waits[0] && `Was queued ${duration(waits[0].seconds)}: ${Object.entries(waits[0].reasons).map(([why, s], _, all) => (all.length > 1 ? `${duration(s)} ` : "") + why).join(", ")}.`,
    is_complete && cached_tokens != null && `Prefix hit: ${count(cached_tokens)} of ${tokens(prompt_tokens)}.`,
    num && `Ran ${tokens(chunks.num_tokens.reduce((a, b) => a + b, 0))} in ${some(num, "chunk")}.`,
    ...preemptions.map(each => `Preempted in step ${count(each.step)}, giving up ${tokens(each.lost_tokens)}${each.recomputed_tokens == null ? "" : `, ${count(each.recomputed_tokens)} of them computed again`}.`),
    time_to_first_token_s != null && `First token ${duration(time_to_first_token_s)} after arrival.`,
    inter_token_s && `Then a token every ${duration(inter_token_s.p50)} (median; the slowest took ${duration(inter_token_s.max)}).`,
    state === "finished" && `Ended after ${duration(seconds)} with ${tokens(output_tokens)}: ${finish_reason}.`,
  ].filter(Boolean);
}

/** A time in the queue. */
class Wait {
  constructor(from, reason) {
    Object.assign(this, { from, to: null, reasons: [{ time: from, reason }] });
  }

  reasonAt(now) {
    return this.reasons.findLast(({ time }) => time <= now).reason;
  }
}

/** A time with a row: what was found in the cache, what ran when. */
class Stay {
  constructor({ time, row, tokens, cached }) {
    Object.assign(this, { from: time, to: null, row, cached, target: tokens, computed: cached, steps: [] });
  }

  computedAt(now) {
    return this.steps[upTo(this.steps, now, each => each.step.end) - 1]?.after ?? this.cached;
  }
}

/** What happened to one sequence. */
class Life {
  constructor({ id, choice, time }) {
    Object.assign(this, { id, choice, from: time, arrived: false, prompt: 0, most: null, left: Infinity, reason: null, numOutputs: null, parts: [], outputs: [], lost: [] });
  }

  get stays() {
    return this.parts.filter(part => part.row >= 0);
  }

  event({ kind, time, step, tokens, detail, most, ...event }) {
    const open = this.parts.at(-1), isWaiting = open && open.row === undefined;
    if (kind === "waits") {
      if (isWaiting) open.reasons.push({ time, reason: detail });
      else this.parts.push(new Wait(time, detail));
      return;
    }
    if (open) open.to = time;
    if (kind === "arrived") {
      Object.assign(this, { arrived: true, prompt: tokens, most });
      this.parts.push(new Wait(time, "behind others in the queue"));
    } else if (kind === "admitted") {
      this.prompt ||= tokens;
      this.parts.push(new Stay({ time, tokens, ...event }));
    } else if (kind === "preempted") {
      this.lost.push({ time, step, tokens });
      this.parts.push(new Wait(time, "preempted"));
    } else Object.assign(this, { left: time, reason: detail, numOutputs: tokens });
  }

  /** Take a step it ran in; return how many of its tokens were known at its admission: prefill, or computed again. */
  step(step, tokens, sampled, gaps) {
    const stay = this.parts.at(-1);
    if (!(stay?.row >= 0)) return tokens > 1 ? tokens : 0;
    const prefill = Math.max(0, Math.min(tokens, stay.target - stay.computed));
    stay.computed += tokens;
    stay.steps.push({ step, prefill, after: stay.computed });
    if (sampled) {
      if (this.outputs.length) gaps.push({ time: step.end, gap: step.end - this.outputs.at(-1).time });
      this.outputs.push({ time: step.end, step: step.step });
    }
    return prefill;
  }
}
