// The form of sampling parameters: what each is called, its effective value, how it is sent.

import { ApiError } from "./api.js";
import { el } from "./dom.js";

const FORMATS = [["", "Text"], ["json_object", "JSON object"], ["json_schema", "JSON schema"], ["regex", "Regex"],
	["choice", "One of these lines"], ["grammar", "Lark grammar"]];
const ALIASES = { top_logprobs: "logprobs", response_format: "shape", structured_outputs: "shape", max_completion_tokens: "max_tokens" };
const EXAMPLES = {
	json_schema: '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}',
	regex: "(yes|no), because .{1,80}\\.", choice: "positive\nnegative\nneutral", grammar: 'start: "a" | "b"',
};

// Rows of name, label, what is in force where neither the user nor the checkpoint says, hint, and what is special.
const GROUPS = {
	Sampling: [
		["temperature", "Temperature", 1, "0 always takes the likeliest token"],
		["top_p", "Top p", 1, "Keep the likeliest tokens up to this mass"],
		["top_k", "Top k", 0, "Keep this many tokens; 0 keeps all"],
		["min_p", "Min p", 0, "Drop tokens less likely than this part of the likeliest"],
		["seed", "Seed", "random", "The same seed gives the same answer"],
	],
	Length: [
		["max_tokens", "Max tokens", "context left", "Most tokens to generate", { completion: 16 }],
		["min_tokens", "Min tokens", 0, "No end before this many tokens"],
		["stop", "Stop strings", "none", "One a line; \\n is a line break", { kind: "lines" }],
		["ignore_eos", "Ignore the end", null, "Go on after the end token", { kind: "flag" }],
	],
	Penalties: [
		["presence_penalty", "Presence", 0, "Taken from the logit of every token used so far"],
		["frequency_penalty", "Frequency", 0, "The same, once for each use"],
		["repetition_penalty", "Repetition", 1, "Above 1: what is there becomes less likely"],
	],
	Answer: [
		["n", "Answers", 1, "How many to one prompt"],
		["logprobs", "Alternatives", "off", "Likeliest tokens to show at each place, 0 to 20", { value: 5 }],
		["echo", "Begin with the prompt", null, "The prompt's tokens too", { kind: "flag", only: "completion" }],
		["format", "Format", null, "What the answer is held to", { kind: "format" }],
		["extra", "Other fields", "none", 'JSON to add to the request, such as {"logit_bias": {"42": 5}}', { kind: "json" }],
	],
};
const read = ([name, label, fallback, hint, special]) => ({ name, label, fallback, hint, ...special });
const FIELDS = Object.values(GROUPS).flat().map(read);

// The form; `mode()` says chat or completion, `defaults` is what the checkpoint says.
export class Parameters {
	constructor(form, mode) {
		Object.assign(this, { form, mode, defaults: {} });
		form.addEventListener("submit", event => event.preventDefault());
		form.addEventListener("input", event => {
			event.target.removeAttribute("aria-invalid");
			this.show();
		});
		for (const [title, fields] of Object.entries(GROUPS)) {
			form.append(el("fieldset", {}, el("legend", { text: title }), ...fields.map(field => this.#row(read(field)))));
		}
		form.append(el("button", { type: "button", text: "Reset all", onclick: () => this.reset() }));
		this.reset();
	}

	#row(field) {
		const id = `p-${field.name}`, hint = el("small", { id: `${id}-hint`, text: field.hint }), about = { id, name: field.name, "aria-describedby": hint.id };
		const input = field.kind === "flag" ? el("input", { ...about, type: "checkbox" })
			: field.kind === "format" ? el("select", about, ...FORMATS.map(([value, text]) => el("option", { value, text })))
			: field.kind ? el("textarea", { ...about, rows: 1, spellcheck: false })
			: el("input", { ...about, inputMode: "decimal", spellcheck: false });
		const row = el("div", { class: `field ${field.kind ?? "short"}` }, el("label", { htmlFor: id, text: field.label }), input, hint);
		if (field.kind === "format") {
			row.append(el("textarea", { name: "shape", rows: 4, hidden: true, spellcheck: false, "aria-label": "What the answer is held to" }));
		}
		return row;
	}

	reset() {
		this.form.reset();
		for (const { name, value } of FIELDS) if (value !== undefined) this.#input(name).value = value;
		for (const input of this.form.elements) input.removeAttribute("aria-invalid");
		this.show();
	}

	// Show what is in force: in grey where the field is empty.
	show() {
		for (const field of FIELDS) {
			const input = this.#input(field.name), row = input.closest(".field");
			row.hidden = field.only !== undefined && field.only !== this.mode();
			row.classList.toggle("set", field.kind === "flag" ? input.checked : input.value.trim() !== String(field.value ?? ""));
			if (field.fallback === null) continue;
			const own = field[this.mode()] ?? field.fallback, given = this.defaults[field.name];
			input.placeholder = given == null ? own : `${given} · checkpoint`;
		}
		const format = this.#input("format").value, shape = this.#input("shape");
		shape.hidden = !(format in EXAMPLES);
		shape.placeholder = EXAMPLES[format] ?? "";
	}

	// Mark the field a refusal names, if it is here.
	blame(param) {
		const name = ALIASES[param?.split(/[.[]/)[0]] ?? param, input = name ? this.#input(name) : null;
		input?.setAttribute("aria-invalid", "true");
		input?.closest("details").setAttribute("open", "");
	}

	// Return the fields of the request that differ from the default. Throws ApiError for what cannot be written.
	values() {
		const values = {};
		for (const field of FIELDS) {
			const input = this.#input(field.name), text = input.value.trim();
			if (field.only && field.only !== this.mode()) continue;
			if (field.kind === "flag") {
				if (input.checked) values[field.name] = true;
			} else if (text === "") continue;
			else if (field.kind === "lines") values.stop = input.value.split("\n").filter(line => line).map(unescaped);
			else if (field.kind === "json") Object.assign(values, parsed(text, "extra"));
			else if (field.kind === "format") Object.assign(values, this.#format(text));
			else if (field.name === "logprobs" && this.mode() === "chat") Object.assign(values, { logprobs: true, top_logprobs: number(text, "logprobs") });
			else values[field.name] = number(text, field.name);
		}
		return values;
	}

	#format(kind) {
		const shape = this.#input("shape"), text = shape.value || shape.placeholder;
		if (kind === "json_object") return { response_format: { type: kind } };
		if (kind === "json_schema") return { response_format: { type: kind, json_schema: { name: "answer", schema: parsed(text, "shape") } } };
		return { structured_outputs: { [kind]: kind === "choice" ? text.split("\n").filter(line => line) : text } };
	}

	#input(name) {
		return this.form.elements.namedItem(name);
	}
}

// What is no number goes as it is: the server says what it allows.
function number(text, param) {
	const value = Number(text);
	if (Number.isInteger(value) && !Number.isSafeInteger(value)) {
		throw new ApiError(`${param} is ${text}; this page can write integers up to ${Number.MAX_SAFE_INTEGER}`, { param });
	}
	return Number.isFinite(value) ? value : text;
}

function parsed(text, param) {
	try {
		return JSON.parse(text);
	} catch (error) {
		throw new ApiError(`This is not JSON: ${error.message}`, { param });
	}
}

function unescaped(line) {
	try {
		return JSON.parse(`"${line.replaceAll('"', '\\"')}"`);
	} catch {
		return line;
	}
}
