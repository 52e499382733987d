// An answer shown token by token, each with what else the model considered.

import { el, roving } from "./dom.js";

const entriesOf = new WeakMap();
const peek = document.body.appendChild(el("div", { id: "peek", role: "tooltip", hidden: true }));

// Read the logprobs of a chunk, of chat or completions, as [{token, logprob, top: [{token, logprob}]}].
export function readLogprobs(logprobs) {
	if (logprobs?.content) {
		return logprobs.content.map(entry => ({ ...entry, top: entry.top_logprobs ?? [] }));
	}
	return (logprobs?.tokens ?? []).map((token, index) => ({
		token,
		logprob: logprobs.token_logprobs[index],
		top: Object.entries(logprobs.top_logprobs?.[index] ?? {}).map(([token, logprob]) => ({ token, logprob })),
	}));
}

const written = token => JSON.stringify(token).slice(1, -1).replaceAll(" ", "␣");
const probability = logprob => (logprob == null ? null : Math.exp(logprob));
const asPercent = p => (p == null ? "first" : p > 0 && p < 0.001 ? "<0.1 %" : `${(100 * p).toFixed(1)} %`);

// How unlikely a token was, as one of the shades 0…4 of style.css.
const shade = p => (p == null || p >= 0.9 ? 0 : p >= 0.6 ? 1 : p >= 0.3 ? 2 : p >= 0.1 ? 3 : 4);

export class TokenText {
	text = "";
	numTokens = 0;
	waiting = [];

	constructor() {
		const reveal = event => show(event.target), leave = () => (this.element.contains(document.activeElement) ? show(document.activeElement) : hide());
		this.element = el("div", { class: "text", onmouseover: reveal, onfocusin: reveal, onclick: reveal, onmouseleave: leave, onfocusout: hide });
		roving(this.element, ".token");
	}

	// Append a piece of text and the tokens that came with it. They need not match: a character may take several tokens,
	// and text that could begin a stop string is held back. What does not match is one element that tells of all its tokens.
	append(text, entries) {
		this.text += text;
		this.numTokens += entries.length;
		this.waiting.push(...entries);
		if (!text) return;
		if (!this.waiting.length) return this.element.append(text);
		let rest = text;
		while (this.waiting.length > 1 && this.waiting[0].token && rest.startsWith(this.waiting[0].token)) {
			const entry = this.waiting.shift();
			this.#span(entry.token, [entry]);
			rest = rest.slice(entry.token.length);
		}
		if (rest) this.#span(rest, this.waiting.splice(0));
	}

	#span(text, entries) {
		const least = Math.min(...entries.map(entry => probability(entry.logprob) ?? 1));
		const span = el("span", { class: `token t${shade(least)}`, text, tabIndex: this.element.querySelector(".token") ? -1 : 0 });
		entriesOf.set(span, entries);
		this.element.append(span);
	}
}

function show(span) {
	const entries = entriesOf.get(span);
	if (!entries) return;
	peek.replaceChildren(...entries.slice(0, 4).map(describe));
	peek.hidden = false;
	span.setAttribute("aria-describedby", "peek");
	const box = span.getClientRects()[0], { offsetWidth: width, offsetHeight: height } = peek;
	const above = box.top > height + 12;
	peek.style.left = `${Math.max(8, Math.min(box.left, document.documentElement.clientWidth - width - 8)) + scrollX}px`;
	peek.style.top = `${(above ? box.top - height - 6 : box.bottom + 6) + scrollY}px`;
}

function hide() {
	peek.hidden = true;
}
document.addEventListener("keydown", event => event.key === "Escape" && hide());

function describe({ token, logprob, top }) {
	const p = probability(logprob);
	const others = p == null || top.some(other => other.token === token) ? top : [{ token, logprob }, ...top];
	return el("table", {}, el("caption", {}, el("b", { text: written(token) }),
		p == null ? " nothing predicts the first token" : ` ${asPercent(p)} · logprob ${logprob.toFixed(3)}`),
	...others.map(other => {
		const bar = el("i");
		bar.style.width = `${100 * probability(other.logprob)}%`;
		return el("tr", { class: other.token === token ? "taken" : "" }, el("th", { scope: "row", text: written(other.token) }),
			el("td", {}, bar), el("td", { text: asPercent(probability(other.logprob)) }));
	}));
}
