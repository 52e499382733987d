// The page: its tabs, its theme, and whether it looks at a server or at a recording.

import * as api from "./api.js";
import { readLive, readRecording } from "./data.js";
import { $, on, roving, save, schemeChanged } from "./dom.js";
import * as live from "./live.js";
import * as playground from "./playground.js";
import * as requests from "./requests.js";
import { Run } from "./run.js";

const TABS = ["playground", "live", "requests"];
const LONGEST_RETRY_MS = 10_000;
let run = null;
let stream = null;

function status(state, text) {
	$("status").dataset.state = state;
	$("status").textContent = text;
}

// Tabs: the fragment is the tab, and in "#requests/ID" the request.

function route() {
	const [name, id] = location.hash.slice(1).split("/"), tab = TABS.includes(name) ? name : run ? "live" : "playground";
	for (const each of TABS) {
		$(each).hidden = each !== tab;
		$(`tab-${each}`).setAttribute("aria-selected", each === tab);
		$(`tab-${each}`).tabIndex = each === tab ? 0 : -1;
	}
	if (tab === "requests" && id) requests.open(decodeURIComponent(id));
	requests.refresh();
	if (run) showMoment();
	else follow();
}
for (const tab of TABS) on(`tab-${tab}`, "click", () => (location.hash = tab));
roving(document.querySelector("[role=tablist]"), "[role=tab]", tab => tab.click());
addEventListener("hashchange", route);
document.querySelector(".skip").addEventListener("click", event => {
	event.preventDefault();
	$("main").focus();
});

// Theme: as the system has it, or one of the two; style.css has no rule for "auto".

const THEMES = { auto: "◐", light: "☀", dark: "☾" };

function setTheme(wanted) {
	const names = Object.keys(THEMES), theme = wanted in THEMES ? wanted : "auto", next = names[(names.indexOf(theme) + 1) % 3];
	document.documentElement.dataset.theme = theme;
	$("theme").textContent = THEMES[theme];
	$("theme").ariaLabel = $("theme").title = `Colours: ${theme}. Switch to ${next}`;
	$("theme").onclick = () => {
		localStorage.setItem("octavo.theme", next);
		setTheme(next);
	};
	schemeChanged();
}
setTheme(localStorage.getItem("octavo.theme"));

// A server: who it is, its live view while that is looked at, its requests.

const server = {
	list: async () => (await api.json("v1/requests")).requests,
	explain: async id => {
		try {
			return await api.json(`v1/requests/${encodeURIComponent(id)}`);
		} catch (error) {
			if (error.status === 404) return null;
			throw error;
		}
	},
};

async function connect(wait = 1000) {
	try {
		await playground.connect();
		status("good", "connected");
		requests.use(server);
		follow();
	} catch (error) {
		if (run) return;
		const wantsKey = error.status === 401;
		playground.disconnect(wantsKey && (() => {
			api.askAgain();
			connect();
		}));
		live.empty(`${wantsKey ? "This server asks for a key." : "No engine answers here."} Open a recording to look at a run that is over.`);
		status("bad", wantsKey ? "no key" : error.status ? "no engine here" : "server gone, trying again");
		if (!error.status) setTimeout(() => !run && connect(Math.min(2 * wait, LONGEST_RETRY_MS)), wait);
	}
}

function hangUp() {
	stream?.abort();
	stream = null;
}

// Have the live stream open exactly while somebody looks at it.
async function follow(wait = 1000) {
	const wanted = !run && !document.hidden && !$("live").hidden && playground.served();
	if (!wanted) return hangUp();
	if (stream) return;
	const mine = (stream = new AbortController());
	let seen = null;
	try {
		for await (const message of api.events("live", { signal: mine.signal })) {
			seen = readLive(message, seen, playground.served());
			status("good", "live");
			live.show(seen);
		}
		throw new api.ApiError("The stream has ended.");
	} catch (error) {
		if (error.name === "AbortError") {
			if (!run && !stream) status("good", document.hidden ? "paused" : "connected");
		} else {
			const gone = !error.status || error.status >= 500;
			status("bad", gone ? `server gone, trying again in ${Math.round(wait / 1e3)} s` : error.message);
			if (gone) setTimeout(() => follow(seen ? 1000 : Math.min(2 * wait, LONGEST_RETRY_MS)), wait);
		}
	} finally {
		if (stream === mine) stream = null;
	}
}
document.addEventListener("visibilitychange", () => follow());
setInterval(() => !document.hidden && !run && requests.refresh(), 2000);

for (const path of ["trace", "recording"]) {
	on(`get-${path}`, "click", async () => {
		try {
			save(`octavo-${path}.json`, await (await api.request(path)).text());
		} catch (error) {
			status("bad", error.message);
		}
	});
}

// A recording: opened from a file or an address, played over time.

let position = 0;
let playing = null;

function openRecording(name, text) {
	let opened;
	try {
		opened = new Run(readRecording(JSON.parse(text)));
	} catch (error) {
		return status("bad", `${name} cannot be opened: ${error.message}`);
	}
	if (!Number.isFinite(opened.end)) return status("bad", `${name} holds no steps: nothing ran`);
	run = opened;
	hangUp();
	status("tape", "recording");
	$("player").hidden = false;
	$("recording-name").textContent = `${name} · ${run.facts.model}`;
	document.querySelector(".downloads").hidden = true;
	requests.use({ list: () => run.summaries(position), explain: id => run.explain(id) });
	seek(run.end);
	if (!location.hash || location.hash === "#playground") location.hash = "live";
	else route();
}

function showMoment() {
	const length = run.end - run.start;
	$("seek").value = length ? (1000 * (position - run.start)) / length : 1000;
	$("position").textContent = `${(position - run.start).toFixed(2)} of ${length.toFixed(2)} s`;
	$("seek").setAttribute("aria-valuetext", $("position").textContent);
	live.show(run.viewAt(position));
}

function seek(to) {
	position = Math.min(run.end, Math.max(run.start, to));
	showMoment();
}

function play(on) {
	cancelAnimationFrame(playing);
	playing = null;
	$("play").textContent = on ? "Pause" : "Play";
	if (!on) return;
	if (position >= run.end) position = run.start;
	let before = performance.now();
	const frame = now => {
		if (!run) return;
		seek(position + ((now - before) / 1e3) * Number($("speed").value));
		before = now;
		if (position < run.end) playing = requestAnimationFrame(frame);
		else play(false);
	};
	playing = requestAnimationFrame(frame);
}
on("play", "click", () => play(playing === null));
on("seek", "input", () => {
	play(false);
	seek(run.start + (Number($("seek").value) / 1000) * (run.end - run.start));
	requests.refresh();
});
on("close-recording", "click", () => {
	play(false);
	run = null;
	$("player").hidden = true;
	document.querySelector(".downloads").hidden = false;
	live.empty("Connecting…");
	status("wait", "connecting");
	if (location.search) history.replaceState(null, "", location.pathname + location.hash);
	connect();
});

const openFile = async file => file && openRecording(file.name, await file.text());
$("open-recording").querySelector("input").addEventListener("change", event => {
	openFile(event.target.files[0]);
	event.target.value = "";
});
addEventListener("dragover", event => {
	event.preventDefault();
	$("drop").hidden = !event.dataTransfer.types.includes("Files");
});
addEventListener("dragleave", event => event.relatedTarget === null && ($("drop").hidden = true));
addEventListener("drop", event => {
	event.preventDefault();
	$("drop").hidden = true;
	openFile(event.dataTransfer.files[0]);
});

const address = new URLSearchParams(location.search).get("recording");
if (address) {
	const url = new URL(address, document.baseURI);
	try {
		if (url.origin !== location.origin) throw new api.ApiError("a recording is opened from this server only");
		openRecording(url.pathname.split("/").at(-1), await (await api.request(url.href)).text());
	} catch (error) {
		status("bad", error.message);
	}
}
route();
if (!run) connect();
