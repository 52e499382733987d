// The live view: a picture of the engine at one moment, of a server or of a recording.

import { BlockMap, Timeline } from "./charts.js";
import { $, count, duration, el, legend, nothing, on, percent, rate, some } from "./dom.js";

const timeline = new Timeline($("timeline")), map = new BlockMap($("blocks"));
let view = null;
let frozen = false;

$("steps-legend").append(...legend([["prefill", "prefill"], ["decode", "decode, running"], ["waiting", "waiting"]]));

export function show(next) {
	if (frozen) return;
	view = next;
	draw();
}

// Say what will appear here, and why it does not yet.
export function empty(text) {
	view = null;
	$("tiles").replaceChildren(el("p", { class: "tile nothing", text }));
}

function draw() {
	if (!view || $("live").hidden) return;
	const { rates, kv, facts } = view, used = facts.numBlocks ? kv.used / facts.numBlocks : null;
	tiles([
		["running", count(view.numRunning), facts.maxNumSeqs && `of ${count(facts.maxNumSeqs)}`],
		["waiting", count(view.numWaiting)],
		["prefill tokens/s", rate(rates.prefill)],
		["decode tokens/s", rate(rates.decode)],
		["KV in use", percent(used)],
		["prefix hits", percent(rates.hit)],
		...[["first token", rates.ttft], ["between tokens", rates.itl]].map(([name, [p50, p99]]) =>
			[`${name}, p50 / p99`, duration(p50), p50 != null && `/ ${duration(p99)}`]),
	]);
	readStep();
	const known = map.draw(kv, facts.numBlocks), named = name => (kv.states || name === "free" ? name : "in use");
	$("blocks-legend").replaceChildren(...legend(known.map(([name, number]) => [name, `${named(name)} ${count(number)}`])));
	$("blocks").setAttribute("aria-label", `KV block map: ${known.map(([name, number]) => `${count(number)} ${named(name)}`).join(", ")}`);
	if (!$("blocks").matches(":hover")) readBlocks("");
	$("queue-count").textContent = view.numWaiting ? count(view.numWaiting) : "";
	$("running-count").textContent = view.numRunning ? count(view.numRunning) : "";
	table($("queue"), ["Request", "Why it waits", "Waited"], view.waiting.map(each =>
		[link(each), each.reason, duration(each.waited)]),
	"Nobody waits. Whoever does is listed here with the reason.");
	table($("running"), ["Request", "Computed", "Tokens"], view.running.map(each => [link(each),
		computed(each), count(each.tokens)]),
	"Nothing runs. Send something from the playground.");
}

function tiles(entries) {
	const box = $("tiles");
	if (box.children.length !== entries.length) {
		box.replaceChildren(...entries.map(([name]) => el("div", { class: "tile" }, el("b"), el("span", { text: name }))));
	}
	entries.forEach(([, value, note], i) => box.children[i].firstChild.replaceChildren(value, note ? el("small", { text: ` ${note}` }) : ""));
}

const link = ({ id, choice }) => el("a", { class: "id", title: id, href: `#requests/${encodeURIComponent(id)}`, text: choice ? `${choice + 1} of ${id}` : id });

const computed = ({ tokens, computed }) => el("span", { class: "part", role: "img", ariaLabel: `${count(computed)} of ${some(tokens, "token")}` },
	el("i", { style: `width: ${(100 * computed) / tokens}%` }));

const MAX_ROWS = 200;

function table(box, head, rows, none) {
	if (!rows.length) {
		if (box.firstChild?.className !== "nothing") box.replaceChildren(nothing(none));
		return;
	}
	const focused = box.contains(document.activeElement) ? document.activeElement.getAttribute("href") : null;
	const line = (tag, cells) => el("tr", {}, ...cells.map(content => el(tag, {}, content)));
	box.replaceChildren(el("table", {}, el("thead", {}, line("th", head)), el("tbody", {}, ...rows.slice(0, MAX_ROWS).map(row => line("td", row)))),
	rows.length > MAX_ROWS ? nothing(`and ${count(rows.length - MAX_ROWS)} more`) : "");
	if (focused) [...box.querySelectorAll("a")].find(each => each.getAttribute("href") === focused)?.focus();
}

function readStep() {
	const step = timeline.draw(view, Number($("window").value));
	const parts = step && [`Step ${count(step.step)}`, duration(step.end - step.start), some(step.numSeqs, "sequence"),
		`${count(step.prefill)} prefill and ${count(step.decode)} decode tokens`, `${count(step.waiting)} waiting`,
		`scheduled in ${duration(step.scheduled)}, ran ${duration(step.update - step.execute)}, told in ${duration(step.end - step.update)}`,
		step.failed && `failed: ${step.failed}`];
	const text = parts ? parts.filter(Boolean).join(" · ") : "Point at a step, or use the arrow keys, to see what it did.";
	if ($("step-readout").textContent !== text) $("step-readout").textContent = text;
}

function readBlocks(at) {
	const { facts, kv, origin } = view, recorded = kv.states ? `As of ${(kv.at - origin).toFixed(2)} s.` : "Which is where was not recorded here.";
	$("blocks-readout").textContent = at || `${some(facts.numBlocks, "block")} of ${some(facts.blockSize, "token")}. ${origin == null ? "" : recorded}`;
}

on("timeline", "pointermove", event => {
	if (!view) return;
	timeline.selectAt(event.clientX);
	readStep();
});
on("timeline", "pointerleave", () => {
	timeline.selected = null;
	if (view) readStep();
});
on("timeline", "keydown", event => {
	const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
	if (!view || (!by && event.key !== "Escape")) return;
	event.preventDefault();
	if (by) timeline.move(by);
	else timeline.selected = null;
	readStep();
});
on("blocks", "pointermove", event => view && readBlocks(map.at(event)));
on("blocks", "pointerleave", () => view && readBlocks(""));
on("freeze", "click", () => {
	frozen = !frozen;
	$("freeze").setAttribute("aria-pressed", frozen);
});
on("window", "change", draw);
new ResizeObserver(draw).observe($("live"));
document.addEventListener("scheme", draw);
