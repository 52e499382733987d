// What every view builds its elements, numbers and colours with.

export const $ = id => document.getElementById(id);
export const on = (id, type, listener) => $(id).addEventListener(type, listener);

// Build an element: `class`, `text`, `on…` listeners, properties where there are any, else attributes.
export function el(tag, props = {}, ...children) {
	const node = document.createElement(tag);
	for (const [name, value] of Object.entries(props)) {
		if (value == null) continue;
		if (name === "class") node.className = value;
		else if (name === "text") node.textContent = value;
		else if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
		else if (name in node) node[name] = value;
		else node.setAttribute(name, value);
	}
	node.append(...children.filter(child => child != null));
	return node;
}

// Say in place of something that it is not there.
export const nothing = text => el("p", { class: "nothing", text });

// Let the arrow keys, Home and End move among elements of which one is in the tab order.
export function roving(container, selector, choose) {
	const moves = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
	container.addEventListener("keydown", event => {
		const all = [...container.querySelectorAll(selector)], here = all.indexOf(event.target);
		const to = event.key === "Home" ? 0 : event.key === "End" ? all.length - 1 : here + (moves[event.key] ?? NaN);
		if (here < 0 || !all[to]) return;
		event.preventDefault();
		all[here].tabIndex = -1;
		all[to].tabIndex = 0;
		all[to].focus();
		choose?.(all[to]);
	});
}

export const count = n => (n == null ? "–" : Math.round(n).toLocaleString("en"));

export const some = (n, noun) => `${count(n)} ${noun}${n === 1 ? "" : "s"}`;

// Write a duration of `s` seconds with three digits or so.
export function duration(s) {
	if (s == null || Number.isNaN(s)) return "–";
	if (s < 0.001) return `${Math.round(s * 1e6)}\u00a0µs`;
	if (s < 1) return `${(s * 1e3).toFixed(s < 0.01 ? 2 : s < 0.1 ? 1 : 0)}\u00a0ms`;
	return s < 100 ? `${s.toFixed(s < 10 ? 2 : 1)}\u00a0s` : `${Math.floor(s / 60)}\u00a0min ${Math.round(s % 60)}\u00a0s`;
}

export const rate = n => (n == null ? "–" : n > 0 && n < 10 ? n.toFixed(1) : count(n));

export const percent = part => (part == null ? "–" : `${(100 * part).toFixed(part > 0 && part < 0.1 ? 1 : 0)} %`);

let colours = null;
const probe = document.body.appendChild(el("i", { hidden: true }));

// Return a colour of style.css by its name, as the scheme in force has it: a canvas cannot read variables.
export function colour(name) {
	colours ??= new Map();
	if (!colours.has(name)) {
		probe.style.color = `var(--${name})`;
		colours.set(name, getComputedStyle(probe).color);
	}
	return colours.get(name);
}

// Read the colours again, and have everything drawn again that listens to "scheme": it has changed.
export function schemeChanged() {
	colours = null;
	document.dispatchEvent(new Event("scheme"));
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", schemeChanged);

// Size a canvas to its box in device pixels and return its context in CSS pixels, cleared; null while it is hidden.
export function surface(canvas) {
	const { clientWidth: width, clientHeight: height } = canvas, scale = devicePixelRatio || 1;
	if (!width || !height) return null;
	const [wide, tall] = [width, height].map(size => Math.round(size * scale));
	if (canvas.width !== wide || canvas.height !== tall) Object.assign(canvas, { width: wide, height: tall });
	const g = canvas.getContext("2d");
	g.setTransform(scale, 0, 0, scale, 0, 0);
	g.clearRect(0, 0, width, height);
	g.font = `11px ${getComputedStyle(document.body).fontFamily}`;
	return { g, width, height };
}

export function save(name, text) {
	const link = el("a", { href: URL.createObjectURL(new Blob([text], { type: "application/json" })), download: name });
	document.body.append(link);
	link.click();
	link.remove();
	URL.revokeObjectURL(link.href);
}

export const legend = entries => entries.map(([name, text]) => el("span", {}, el("i", { style: `background: var(--${name})` }), text));
