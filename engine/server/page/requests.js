// The inspector: the latest requests, and where the time of one went.

import { drawGaps } from "./charts.js";
import { readExplanation, summaryLine } from "./data.js";
import { $, duration, el, legend, nothing, on, roving, some } from "./dom.js";

const MAX_LISTED = 300;

let source = null;
let listed = [];
let chosen = null;
let shown = null;

// Look at a source: `list()` -> summaries, the latest first, `explain(id)` -> explanation or null; both may be promises.
export function use(next) {
	source = next;
	listed = [];
	chosen = shown = null;
	$("recent").replaceChildren();
	$("detail").replaceChildren();
	refresh();
}

// Read the list again, and the request that is open while it runs.
export async function refresh() {
	if (!source || $("requests").hidden) return;
	const from = source;
	try {
		const next = (await from.list()).map(each => ({ id: each.request_id, line: summaryLine(each) }));
		if (from !== source) return;
		if (JSON.stringify(next) !== JSON.stringify(listed)) {
			listed = next;
			list();
		}
		if (chosen && !shown?.ended) await load();
		else if (!chosen) $("detail").replaceChildren(nothing("Choose a request to see where its time went."));
	} catch (error) {
		if (from === source) $("detail").replaceChildren(nothing(error.message));
	}
}

export function open(id) {
	chosen = id;
	shown = null;
	for (const option of $("recent").children) option.setAttribute("aria-selected", option.dataset.id === id);
	refresh();
}

function list() {
	const wanted = $("find").value.trim(), found = listed.filter(({ id }) => id.includes(wanted));
	const focused = $("recent").contains(document.activeElement) ? document.activeElement.dataset.id : null;
	const current = found.some(({ id }) => id === chosen) ? chosen : found[0]?.id;
	$("recent").replaceChildren(...found.slice(0, MAX_LISTED).map(({ id, line }) =>
		el("div", { role: "option", "data-id": id, tabIndex: id === current ? 0 : -1, "aria-selected": id === chosen, onclick: () => go(id) },
			el("span", { class: "id", text: id }), el("small", { text: line }))));
	if (focused) [...$("recent").children].find(option => option.dataset.id === focused)?.focus();
	if (found.length > MAX_LISTED) $("recent").append(nothing(`and ${some(found.length - MAX_LISTED, "older one")}: find them by id`));
	if (!found.length) $("recent").append(nothing(wanted ? "No request has this in its id." : "No requests yet. The latest are listed here."));
}

const go = id => (location.hash = `#requests/${encodeURIComponent(id)}`);

async function load() {
	const id = chosen, found = await source.explain(id);
	if (id !== chosen) return;
	const text = JSON.stringify(found), read = found && readExplanation(found);
	if (shown?.text === text) return;
	shown = { text, ended: !read || read.ended };
	$("detail").replaceChildren(...(read ? detail(id, read) : [el("h1", { text: id }), nothing("Nothing is known of it any more: only the latest are kept.")]));
	gaps();
}

function detail(id, { choices }) {
	const title = (text, index) => el("h2", { text: choices.length > 1 ? `${text} · answer ${index + 1} of ${choices.length}` : text });
	return [el("h1", { class: "id", text: id }), ...choices.flatMap((choice, index) => [
		el("div", { class: "card" }, title("What happened", index), el("ul", { class: "story" }, ...choice.sentences.map(text => el("li", { text })))),
		el("div", { class: "card" }, el("div", { class: "bar" }, title("Where the time went", index), el("span", { class: "legend" },
			...legend([["waiting", "queued"], ["prefill", "prefill"], ["decode", "decode"], ["ink", "first token"]]))), waterfall(choice), ...gapChart(choice)),
		el("div", { class: "card" }, title("In numbers", index), el("dl", {}, ...choice.facts.map(([name, value]) => el("div", {}, el("dt", { text: name }), el("dd", { text: value }))))),
	])];
}

function waterfall({ to, rows, first }) {
	const span = Math.max(to, 1e-9), part = time => `${Math.min(100, (time / span) * 100)}%`;
	const body = rows.map(row => {
		const bar = el("i", { class: row.kind, style: `left: ${part(row.from)}; width: ${part(row.to - row.from)}` });
		const mark = first == null ? null : el("i", { class: "first", style: `left: ${part(first)}` });
		return el("div", { class: "fall", role: "listitem" }, el("span", { class: "what" }, el("b", { text: row.label }), ` ${row.note}`), el("div", { class: "track" }, bar, mark),
			el("span", { class: "took", text: duration(row.to - row.from) }));
	});
	const scale = [0, 0.25, 0.5, 0.75, 1].map(at => el("span", { text: at ? duration(at * span) : "0" }));
	return el("div", { class: "waterfall", role: "list" }, ...body, el("div", { class: "fall axis", "aria-hidden": "true" }, el("span", { class: "what", text: "since it arrived" }), el("div", { class: "track" }, ...scale), el("span", { class: "took" })));
}

function gapChart({ gaps: list }) {
	if (list.length < 2) return [];
	const sorted = [...list].sort((a, b) => a - b), middle = sorted[sorted.length >> 1];
	const canvas = el("canvas", { class: "gaps", role: "img", "aria-label": `Time between tokens: ${some(list.length, "gap")}, median ${duration(middle)}, longest ${duration(sorted.at(-1))}` });
	canvas.gaps = list;
	return [canvas];
}

function gaps() {
	for (const canvas of document.querySelectorAll(".gaps")) drawGaps(canvas, canvas.gaps);
}

roving($("recent"), "[role=option]");
on("recent", "keydown", event => {
	if (event.key === "Enter" || event.key === " ") {
		event.preventDefault();
		if (event.target.dataset.id) go(event.target.dataset.id);
	}
});
on("find", "input", list);
new ResizeObserver(gaps).observe($("detail"));
document.addEventListener("scheme", gaps);
