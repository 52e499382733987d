// This module holds a request written as code that repeats it. It does not know the page.

/** What the openai client takes by name; everything else goes into `extra_body`. */
const NAMED = new Set(["model", "messages", "prompt", "temperature", "top_p", "seed", "max_tokens", "stop", "presence_penalty",
  "frequency_penalty", "n", "logprobs", "top_logprobs", "echo", "response_format", "logit_bias", "tools", "tool_choice",
  "parallel_tool_calls", "user", "metadata", "max_completion_tokens"]);

/** Write a JSON value as Python. */
function python(value, indent = "    ") {
  const inner = `${indent}    `;
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return JSON.stringify(value);
  const flat = Array.isArray(value) ? `[${value.map(item => python(item, inner)).join(", ")}]`
    : `{${Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, inner)}`).join(", ")}}`;
  if (flat.length + indent.length < 90 && !flat.includes("\n")) return flat;
  const lines = Array.isArray(value) ? value.map(item => python(item, inner))
    : Object.entries(value).map(([key, item]) => `${JSON.stringify(key)}: ${python(item, inner)}`);
  const [open, close] = Array.isArray(value) ? "[]" : "{}";
  return `${open}\n${lines.map(line => `${inner}${line},\n`).join("")}${indent}${close}`;
}

/** Write `body` for a language: "python" or "curl". `base` is the URL of /v1, `key` whether one is sent. */
export function snippet(language, mode, body, base, key) {
  const { stream, stream_options, ...rest } = body, path = mode === "chat" ? "chat/completions" : "completions";
  if (language === "curl") {
    const auth = key ? '\n  -H "Authorization: Bearer $OCTAVO_API_KEY" \\' : "";
    return `curl ${base}/${path} \\\n  -H "Content-Type: application/json" \\${auth}\n  -d '${JSON.stringify(rest, null, 2).replaceAll("'", "'\\''")}'`;
  }
  const extra = Object.fromEntries(Object.entries(rest).filter(([name]) => !NAMED.has(name)));
  const named = Object.entries(rest).filter(([name]) => NAMED.has(name));
  if (Object.keys(extra).length) named.push(["extra_body", extra]);
  const given = named.map(([name, value]) => `    ${name}=${python(value)},\n`).join("");
  const answer = mode === "chat" ? "message.content" : "text";
  return `${key ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url="${base}", api_key=${key ? 'os.environ["OCTAVO_API_KEY"]' : '"none"'})
answer = client.${mode === "chat" ? "chat.completions" : "completions"}.create(
${given})
for choice in answer.choices:
    print(choice.${answer})`;
}
