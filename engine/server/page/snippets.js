// A request written as code that repeats it.

// What the openai client takes by name; everything else goes into `extra_body`.
const NAMED = new Set(("model messages prompt temperature top_p seed max_tokens stop presence_penalty frequency_penalty n logprobs top_logprobs echo "
	+ "response_format logit_bias tools tool_choice parallel_tool_calls user metadata max_completion_tokens").split(" "));

// Write a JSON value as Python.
function python(value, indent = "    ") {
	if (value === null || typeof value === "boolean") return { null: "None", true: "True", false: "False" }[value];
	if (typeof value !== "object") return JSON.stringify(value);
	const inner = `${indent}    `, isList = Array.isArray(value), [open, close] = isList ? "[]" : "{}";
	const parts = Object.entries(value).map(([key, item]) => (isList ? "" : `${JSON.stringify(key)}: `) + python(item, inner)), flat = open + parts.join(", ") + close;
	return flat.length + indent.length < 90 ? flat : `${open}\n${parts.map(part => `${inner}${part},\n`).join("")}${indent}${close}`;
}

// Write `body` for a language: "python" or "curl". `base` is the URL of /v1, `key` whether one is sent.
export function snippet(language, mode, body, base, key) {
	const { stream, stream_options, ...rest } = body, path = mode === "chat" ? "chat/completions" : "completions";
	if (language === "curl") {
		const auth = key ? '\n  -H "Authorization: Bearer $OCTAVO_API_KEY" \\' : "";
		return `curl ${base}/${path} \\\n  -H "Content-Type: application/json" \\${auth}\n  -d '${JSON.stringify(rest, null, 2).replaceAll("'", "'\\''")}'`;
	}
	const [named, extra] = [true, false].map(is => Object.entries(rest).filter(([name]) => NAMED.has(name) === is));
	if (extra.length) named.push(["extra_body", Object.fromEntries(extra)]);
	const given = named.map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
	const answer = mode === "chat" ? "message.content" : "text";
	return `${key ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}", api_key=${key ? 'os.environ["OCTAVO_API_KEY"]' : '"none"'})
answer = client.${mode === "chat" ? "chat.completions" : "completions"}.create(
${given})
for choice in answer.choices:
		print(choice.${answer})`;
}
