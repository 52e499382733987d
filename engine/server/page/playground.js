// The playground: a conversation or a prompt, the answer as it streams, what it took.

import { ApiError, events, json } from "./api.js";
import { $, count, duration, el, on, rate } from "./dom.js";
import { Parameters } from "./parameters.js";
import { snippet } from "./snippets.js";
import { readLogprobs, TokenText } from "./tokens.js";

const EXAMPLES = {
	chat: ["Why is the sky blue?", "Write a haiku about paged memory.", "List three primes above 100."],
	completion: ["The capital of France is", "Once upon a time, there was a small robot who", "1, 1, 2, 3, 5, 8,"],
};
const ENDS = { stop: "ended by itself", length: "ended at max tokens", abort: "stopped", tool_calls: "calls a tool", error: "failed" };

const mode = () => document.querySelector("[name=mode]:checked").value;
const parameters = new Parameters($("fields"), mode);
let model = null;
// Each: {role, content} as it is sent, and `element`; answers also `turn`.
let history = [];
let running = null;

// Ask who answers. Throws where nobody does.
export async function connect() {
	const { data } = await json("v1/models");
	model = data[0];
	parameters.defaults = model.default_sampling_params ?? {};
	parameters.show();
	$("model").textContent = model.id;
	document.title = `${model.id} · octavo`;
	showEmpty();
}

export const served = () => model;

// Let nothing be sent where no engine answers; `giveKey` asks for a key where one is wanted.
export function disconnect(giveKey) {
	$("model").textContent = "No engine";
	model = null;
	showEmpty(giveKey);
}

function showEmpty(giveKey) {
	$("clear").disabled = $("retry").disabled = !history.length || running !== null;
	if (history.length) return;
	const examples = EXAMPLES[mode()].map(text => el("button", { type: "button", text, onclick: () => {
		$("prompt").value = text;
		$("prompt").focus();
		grow();
	} }));
	$("log").replaceChildren(el("div", { class: "empty" }, ...(model ? [
		el("p", { text: mode() === "chat" ? `Write to ${model.id}: the answer streams in here.` : `Give ${model.id} a beginning: it goes on here.` }),
		el("p", { class: "small", text: "Hover or tap a token, or use the arrow keys, to see what else was likely." }),
		el("p", { class: "examples" }, ...examples),
	] : giveKey ? [el("p", { text: "This server asks for an API key." }), el("p", {}, el("button", { type: "button", text: "Give the key", onclick: giveKey }))]
		: [el("p", { text: "No engine answers here." }), el("p", { class: "small", text: "Start one with “octavo serve”, or open a recording to look at a run that is over." })])));
}

// Return the body for what has been said; in completion mode, for `prompt`.
function request(prompt) {
	const body = { model: model?.id ?? "model" };
	if (mode() === "chat") {
		const system = $("system").value.trim() ? [{ role: "system", content: $("system").value }] : [];
		body.messages = [...system, ...history.map(({ element, turn, ...message }) => message)];
	} else body.prompt = prompt;
	return { ...body, ...parameters.values(), stream: true, stream_options: { include_usage: true } };
}

function say(content) {
	const edit = el("button", { type: "button", text: "Edit", onclick: () => {
		if (running) return;
		cut(history.findIndex(message => message.element === element));
		$("prompt").value = content;
		grow();
		$("prompt").focus();
	} });
	const element = el("article", { class: "turn user" }, el("h3", {}, mode() === "chat" ? "You" : "Prompt", edit), el("div", { class: "text", text: content }));
	if (mode() === "completion") cut(0);
	if (!history.length) $("log").replaceChildren();
	history.push({ role: "user", content, element });
	$("log").append(element);
}

// Take back the conversation from a message on.
function cut(from) {
	for (const { element } of history.splice(from)) element.remove();
	showEmpty();
}

// One answer while it streams: its elements, its choices, its times.
class Turn {
	start = performance.now();
	choices = new Map();
	chunks = 0;
	facts = el("p", { class: "facts" });
	body = el("div");

	constructor() {
		this.element = el("article", { class: "turn answer" }, el("h3", { text: model.id }), this.body, this.facts);
	}

	choice(index) {
		if (!this.choices.has(index)) {
			const choice = { text: new TokenText(), reasoning: null, calls: [], end: null };
			choice.element = el("div", { class: "choice" }, choice.text.element);
			this.choices.set(index, choice);
			const after = [...this.choices.keys()].filter(other => other < index).length;
			this.body.insertBefore(choice.element, this.body.children[after] ?? null);
			this.body.classList.toggle("several", this.choices.size > 1);
		}
		return this.choices.get(index);
	}

	take(chunk) {
		this.id ??= chunk.id;
		this.usage = chunk.usage ?? this.usage;
		for (const part of chunk.choices ?? []) {
			const choice = this.choice(part.index), delta = part.delta ?? { content: part.text };
			const entries = readLogprobs(part.logprobs);
			if (delta.reasoning_content) {
				choice.reasoning ??= choice.element.insertBefore(el("details", { class: "reasoning", open: true }, el("summary", { text: "Reasoning" }), el("div", { class: "text" })), choice.text.element);
				choice.reasoning.lastChild.append(delta.reasoning_content);
			}
			for (const call of delta.tool_calls ?? []) this.#call(choice, call);
			choice.text.append(delta.content ?? "", entries);
			choice.end = part.finish_reason ?? choice.end;
			if (!delta.content && !delta.reasoning_content && !delta.tool_calls && !entries.length) continue;
			this.last = performance.now();
			this.first ??= this.last;
			this.chunks++;
		}
	}

	#call(choice, { index, id, function: called }) {
		const call = (choice.calls[index] ??= { id, type: "function", function: { name: "", arguments: "" } });
		call.function.name += called?.name ?? "";
		call.function.arguments += called?.arguments ?? "";
		call.element ??= choice.element.appendChild(el("pre", {}));
		call.element.textContent = `${call.function.name}(${call.function.arguments})`;
	}

	show() {
		const seen = [...this.choices.values()], tokens = this.usage?.completion_tokens ?? Math.max(this.chunks, seen.reduce((sum, { text }) => sum + text.numTokens, 0));
		const took = (this.last - this.first) / 1e3, ends = [...new Set(seen.map(choice => choice.end).filter(Boolean))];
		const cached = this.usage?.prompt_tokens_details?.cached_tokens;
		const facts = [
			this.first && [duration((this.first - this.start) / 1e3), "to first token"],
			tokens > seen.length && took > 0 && [rate((tokens - seen.length) / took), "tokens/s"],
			[count(tokens), "tokens out"],
			this.usage && [count(this.usage.prompt_tokens), `in${cached ? `, ${count(cached)} cached` : ""}`],
			ends.length && ["", ends.map(end => ENDS[end] ?? end).join(", ")],
		];
		this.facts.replaceChildren(...facts.filter(Boolean).map(([value, text]) => el("span", {}, el("b", { text: value }), ` ${text}`)));
		if (this.id && this.usage) this.facts.append(el("a", { href: `#requests/${encodeURIComponent(this.id)}`, text: "Look into it" }));
	}

	// Return what the conversation goes on with.
	message() {
		const { text, calls } = this.choices.get(0) ?? { text: { text: "" }, calls: [] };
		const message = { role: "assistant", content: text.text };
		return calls.length ? { ...message, tool_calls: calls.map(({ element, ...call }) => call) } : message;
	}
}

async function answer() {
	$("problem").replaceChildren();
	let body;
	try {
		body = request(history[0].content);
	} catch (error) {
		takeBack();
		return fail(error);
	}
	const turn = new Turn(), stop = new AbortController();
	running = stop;
	$("send").textContent = "Stop";
	$("mode").disabled = true;
	$("log").setAttribute("aria-busy", "true");
	$("log").append(turn.element);
	showEmpty();
	const drawing = setInterval(() => turn.show(), 200);
	try {
		follow(true);
		for await (const chunk of events(mode() === "chat" ? "v1/chat/completions" : "v1/completions", { body, signal: stop.signal })) {
			turn.take(chunk);
			follow();
		}
	} catch (error) {
		if (error.name === "AbortError") for (const choice of turn.choices.values()) choice.end ??= "abort";
		else fail(error);
	} finally {
		clearInterval(drawing);
		running = null;
		$("send").textContent = "Send";
		$("mode").disabled = false;
		$("log").removeAttribute("aria-busy");
	}
	turn.show();
	if ([...turn.choices.values()].some(choice => choice.end || choice.text.text)) history.push({ ...turn.message(), element: turn.element, turn });
	else {
		turn.element.remove();
		takeBack();
	}
	showEmpty();
	follow();
}

// Put a message that got no answer back to where it was written.
function takeBack() {
	const { content } = history.at(-1);
	cut(history.length - 1);
	$("prompt").value ||= content;
	grow();
}

// Keep the end of the page in sight, unless the user has scrolled away from it.
function follow(always = false) {
	const page = document.documentElement;
	if (always || page.scrollHeight - page.clientHeight - page.scrollTop < 120) page.scrollTop = page.scrollHeight;
}

function fail(error) {
	if (!(error instanceof ApiError)) console.error(error);
	parameters.blame(error.param);
	const { message, param } = error, rest = param && message.startsWith(param) ? message.slice(param.length) : param ? `: ${message}` : message;
	$("problem").replaceChildren(el("p", {}, el("b", { text: param ?? "" }), rest),
		el("p", { class: "small", text: error.requestId ? `Request ${error.requestId}` : "" }));
}

function grow() {
	const prompt = $("prompt");
	prompt.style.height = "auto";
	prompt.style.height = `${Math.min(prompt.scrollHeight, innerHeight * 0.4)}px`;
}

on("prompt", "input", grow);
on("prompt", "keydown", event => {
	if (event.key === "Escape") running?.abort();
	if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
	event.preventDefault();
	if (!running) $("composer").requestSubmit();
});
on("composer", "submit", event => {
	event.preventDefault();
	if (running) return running.abort();
	if (!model || !$("prompt").value) return $("prompt").focus();
	say($("prompt").value);
	if (mode() === "chat") $("prompt").value = "";
	grow();
	answer();
});
on("retry", "click", () => {
	if (history.at(-1)?.turn) history.pop().element.remove();
	if (history.length) answer();
});
on("clear", "click", () => {
	cut(0);
	$("problem").replaceChildren();
	$("prompt").focus();
});
on("mode", "change", () => {
	cut(0);
	$("system-box").hidden = mode() !== "chat";
	$("prompt").placeholder = mode() === "chat" ? "Write a message" : "Write the beginning of a text";
	parameters.show();
});

function showCode() {
	const language = document.querySelector("[name=language]:checked").value;
	$("copied").textContent = "";
	try {
		const unsent = $("prompt").value, body = request(unsent || (history[0]?.content ?? ""));
		if (body.messages && unsent) body.messages.push({ role: "user", content: unsent });
		const base = new URL("v1", document.baseURI).href;
		$("code-text").textContent = snippet(language, mode(), body, base, sessionStorage.getItem("octavo.key") !== null);
	} catch (error) {
		$("code-text").textContent = error.message;
	}
}
on("language", "change", showCode);
on("code", "click", () => {
	showCode();
	$("code-dialog").showModal();
});
on("copy", "click", async () => {
	try {
		await navigator.clipboard.writeText($("code-text").textContent);
		$("copied").textContent = "Copied";
	} catch {
		getSelection().selectAllChildren($("code-text"));
		$("copied").textContent = "Selected: copy it with the keyboard";
	}
});
if (matchMedia("(min-width: 60rem)").matches) $("params").open = true;
showEmpty();
