// The way to the server: paths, the key, errors, streams.

import { $, on } from "./dom.js";

const STORED = "octavo.key";
on("no-key", "click", () => $("key-dialog").close());
let asking = null;
// Whether the user would not give a key: then nothing asks again by itself.
let declined = false;

// What the server refused: `param` is the field at fault, `status` 0 where no server answered.
export class ApiError extends Error {
	constructor(message, { status = 0, param = null, requestId = null } = {}) {
		super(message);
		Object.assign(this, { status, param, requestId });
	}
}

// Ask for the key, once however many requests were refused; null where the user gives none.
function askForKey(refused) {
	asking ??= new Promise(resolve => {
		const dialog = $("key-dialog");
		$("key-text").textContent = refused ? "The server refused that key." : "This server asks for an API key.";
		$("key").value = "";
		dialog.returnValue = "";
		dialog.showModal();
		dialog.addEventListener("close", () => {
			const key = dialog.returnValue === "ok" ? $("key").value.trim() : null;
			if (key) sessionStorage.setItem(STORED, key);
			declined = !key;
			asking = null;
			resolve(key || null);
		}, { once: true });
	});
	return asking;
}

export function askAgain() {
	declined = false;
}

// Fetch a path of this server with the key, asking for one where it is wanted. Throws ApiError.
export async function request(path, { body, signal } = {}) {
	for (;;) {
		const key = sessionStorage.getItem(STORED), headers = {};
		if (key) headers.Authorization = `Bearer ${key}`;
		if (body !== undefined) headers["Content-Type"] = "application/json";
		let response;
		try {
			response = await fetch(new URL(path, document.baseURI), {
				method: body === undefined ? "GET" : "POST", headers, signal, cache: "no-store",
				body: JSON.stringify(body),
			});
		} catch (error) {
			if (error.name === "AbortError") throw error;
			throw new ApiError("The server does not answer.");
		}
		if (response.ok) return response;
		if (response.status === 401) {
			// Another request may have asked meanwhile.
			if (sessionStorage.getItem(STORED) !== key || (!declined && (await askForKey(key !== null)))) continue;
			throw new ApiError("The server asks for an API key.", { status: 401 });
		}
		const { error } = await response.json().catch(() => ({}));
		throw new ApiError(error?.message ?? `The server answered ${response.status} ${response.statusText}`, {
			status: response.status, param: error?.param, requestId: response.headers.get("x-request-id"),
		});
	}
}

export async function json(path, options) {
	const response = await request(path, options);
	try {
		return await response.json();
	} catch {
		throw new ApiError("No octavo server answers here.", { status: response.status });
	}
}

// Yield the parsed `data` of each server-sent event; not through EventSource, which can send no key.
export async function* events(path, options) {
	const response = await request(path, options);
	const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
	let rest = "";
	try {
		for (;;) {
			const { done, value } = await reader.read().catch(error => {
				if (error.name === "AbortError") throw error;
				throw new ApiError("The connection broke off.");
			});
			if (done) return;
			const parts = (rest + value).split("\n\n");
			rest = parts.pop();
			for (const part of parts) {
				const data = part.split("\n").filter(line => line.startsWith("data:")).map(line => line.slice(5)).join("\n").trim();
				if (data === "[DONE]") return;
				if (!data) continue;
				const parsed = JSON.parse(data);
				if (parsed.error) throw new ApiError(parsed.error.message, { status: 200, param: parsed.error.param });
				yield parsed;
			}
		}
	} finally {
		reader.cancel().catch(() => {});
	}
}
