// This module holds the form of sampling parameters: what each is called, its effective value, how it is sent. It does
// not know how a request is made.

import { ApiError } from "./api.js";
import { el } from "./dom.js";

const FORMATS = [["", "Text"], ["json_object", "JSON object"], ["json_schema", "JSON schema"], ["regex", "Regex"],
  ["choice", "One of these lines"], ["grammar", "Lark grammar"]];
const EXAMPLES = {
  json_schema: '{"type": "object", "properties": {"name": {"type": "string"}}, "required": ["name"]}',
  regex: "(yes|no), because .{1,80}\\.", choice: "positive\nnegative\nneutral", grammar: 'start: "a" | "b"',
};

/** `only`: the mode that has it; `fallback`: what is in force where neither the user nor the checkpoint says. */
const GROUPS = [
  ["Sampling", [
    { name: "temperature", label: "Temperature", fallback: 1, hint: "0 always takes the likeliest token" },
    { name: "top_p", label: "Top p", fallback: 1, hint: "Keep the likeliest tokens up to this mass" },
    { name: "top_k", label: "Top k", fallback: 0, hint: "Keep this many tokens; 0 keeps all" },
    { name: "min_p", label: "Min p", fallback: 0, hint: "Drop tokens less likely than this part of the likeliest" },
    { name: "seed", label: "Seed", fallback: "random", hint: "The same seed gives the same answer" },
  ]],
  ["Length", [
    { name: "max_tokens", label: "Max tokens", fallback: { chat: "context left", completion: 16 }, hint: "Most tokens to generate" },
    { name: "min_tokens", label: "Min tokens", fallback: 0, hint: "No end before this many tokens" },
    { name: "stop", label: "Stop strings", kind: "lines", fallback: "none", hint: "One a line; \\n is a line break" },
    { name: "ignore_eos", label: "Go on after the end token", kind: "flag", hint: "Up to max tokens" },
  ]],
  ["Penalties", [
    { name: "presence_penalty", label: "Presence", fallback: 0, hint: "Taken from the logit of every token used so far" },
    { name: "frequency_penalty", label: "Frequency", fallback: 0, hint: "The same, once for each use" },
    { name: "repetition_penalty", label: "Repetition", fallback: 1, hint: "Above 1: what is there becomes less likely" },
  ]],
  ["Answer", [
    { name: "n", label: "Answers", fallback: 1, hint: "How many to one prompt" },
    { name: "logprobs", label: "Alternatives", value: 5, fallback: "off", hint: "Likeliest tokens to show at each place, 0 to 20" },
    { name: "echo", label: "Begin with the prompt", kind: "flag", only: "completion", hint: "The prompt's tokens too" },
    { name: "format", label: "Format", kind: "format", hint: "What the answer is held to" },
    { name: "extra", label: "Other fields", kind: "json", fallback: "none", hint: 'A JSON object added to the request, such as {"logit_bias": {"42": 5}}' },
  ]],
];
const FIELDS = GROUPS.flatMap(([, fields]) => fields);

/** The form; `mode()` says chat or completion, `defaults` is what the checkpoint says. */
export class Parameters {
  constructor(form, mode) {
    Object.assign(this, { form, mode, defaults: {} });
    form.addEventListener("submit", event => event.preventDefault());
    form.addEventListener("input", event => {
      event.target.removeAttribute("aria-invalid");
      this.show();
    });
    for (const [title, fields] of GROUPS) {
      form.append(el("fieldset", {}, el("legend", { text: title }), ...fields.map(field => this.#row(field))));
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

  /** Put every field back to the default. */
  reset() {
    this.form.reset();
    for (const { name, value } of FIELDS) if (value !== undefined) this.#input(name).value = value;
    for (const input of this.form.elements) input.removeAttribute("aria-invalid");
    this.show();
  }

  /** Show what is in force: in grey where the field is empty. */
  show() {
    for (const field of FIELDS) {
      const input = this.#input(field.name), row = input.closest(".field");
      row.hidden = field.only !== undefined && field.only !== this.mode();
      row.classList.toggle("set", field.kind === "flag" ? input.checked : input.value.trim() !== String(field.value ?? ""));
      if (field.fallback === undefined) continue;
      const own = field.fallback[this.mode()] ?? field.fallback, given = this.defaults[field.name];
      input.placeholder = given == null ? own : `${given} · checkpoint`;
    }
    const format = this.#input("format").value, shape = this.#input("shape");
    shape.hidden = !(format in EXAMPLES);
    shape.placeholder = EXAMPLES[format] ?? "";
  }

  /** Mark the field a refusal names, and return whether there is one. */
  blame(param) {
    const name = { top_logprobs: "logprobs", response_format: "shape", structured_outputs: "shape", max_completion_tokens: "max_tokens" }[param?.split(/[.[]/)[0]] ?? param;
    const input = FIELDS.some(field => field.name === name) || name === "shape" ? this.#input(name) : null;
    input?.setAttribute("aria-invalid", "true");
    input?.closest("details")?.setAttribute("open", "");
    return input !== null;
  }

  /** Return the fields of the request that differ from the default. Throws ApiError for what cannot be written. */
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

/** What is no number goes as it is: the server says what it allows. */
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
