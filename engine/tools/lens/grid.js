const record = JSON.parse(document.getElementById("record").textContent);
const { layers, positions, tokens, paths } = record;
const $ = id => document.getElementById(id);
const grid = $("grid"), label = id => tokens[id] ?? "";
const last = record.num_layers;

function make(tag, props = {}, ...children) {
  const node = Object.assign(document.createElement(tag), props);
  node.append(...children);
  return node;
}
const percent = p => p == null ? "–" : p >= 0.9995 ? "100 %" : p >= 0.01 ? `${(100 * p).toFixed(1)} %` : `${(100 * p).toPrecision(2)} %`;
const short = v => v == null ? "–" : v !== 0 && (Math.abs(v) < 0.001 || Math.abs(v) >= 1e6) ? v.toExponential(1)
  : Number.isInteger(v) ? v.toLocaleString("en") : String(+v.toPrecision(3));

/* What colours can tell: the value of a cell, how to write it (none: the cell keeps its token), and how it is scaled. */
const ways = {
  top: { name: "probability of the likeliest token", of: (r, l, p) => r.top_probability[l][p][0], range: [0, 1], show: percent, keeps: true },
  answer: { name: "probability of the answer", of: (r, l, p) => r.answer_probability[l][p], range: [0, 1], show: percent, keeps: true },
  rank: { name: "rank of the answer", of: (r, l, p) => r.answer_rank[l][p] || null, log: true, turned: true, show: short },
  kl: { name: "KL from the last layer, nats", of: (r, l, p) => r.kl[l][p], show: short },
  norm: { name: "norm of the hidden state", of: (r, l, p) => r.norm[l][p], log: true, show: short },
  cosine: { name: "cosine to the layer before", of: (r, l, p) => r.cosine[l][p], show: short },
};
if (record.differences) {
  ways.apart = { name: "difference between the paths", of: (_, l, p) => record.differences[l][p], log: true, show: short };
}

const firstOutput = Math.min(Math.max(positions.indexOf(record.num_prompt_tokens - 1), 0), positions.length - 1);
let path = 0, chosen = [layers.length - 1, firstOutput];
const cells = layers.map((layer, l) => positions.map((position, p) => {
  const cell = make("td", { tabIndex: -1 });
  cell.dataset.at = `${l},${p}`;
  if (begins(position)) cell.classList.add("begins");
  return cell;
}));

function begins(position) {
  return position === record.num_prompt_tokens - 1 && position > positions[0];
}

function build() {
  const column = position => make("th", { scope: "col", className: position < record.num_prompt_tokens ? "" : "output" },
    make("small", { textContent: position }), label(record.token_ids[position]));
  grid.tHead.append(make("tr", {}, make("th", { textContent: "layer" }), ...positions.map(column)));
  grid.tBodies[0].append(...layers.map((layer, l) => make("tr", {}, make("th", { scope: "row", textContent: layer }), ...cells[l])));
  grid.tFoot.append(make("tr", {}, make("th", { textContent: "answer" }), ...positions.map((position, p) =>
    make("th", { className: position < record.num_prompt_tokens - 1 ? "" : "output", textContent: label(record.answer_ids[p]) }))));
  for (const [id, way] of Object.entries(ways)) $("way").append(make("option", { value: id, textContent: way.name }));
  paths.forEach((each, i) => $("path").append(make("option", { value: i, textContent: each.backend })));
  $("path-choice").hidden = paths.length < 2;
}

function draw() {
  const way = ways[$("way").value], readings = paths[path].readings;
  const values = layers.map((_, l) => positions.map((_, p) => way.of(readings, l, p)));
  const known = values.flat().filter(v => v != null && (!way.log || v > 0));
  const low = way.range?.[0] ?? known.reduce((a, b) => Math.min(a, b), Infinity);
  const high = way.range?.[1] ?? known.reduce((a, b) => Math.max(a, b), -Infinity);
  const scaled = way.log ? Math.log : v => v;
  const share = v => v == null || (way.log && v <= 0) ? 0 : high === low ? 1 : (scaled(v) - scaled(low)) / (scaled(high) - scaled(low));
  cells.forEach((row, l) => row.forEach((cell, p) => {
    const first = readings.top_ids[l][p][0], part = share(values[l][p]);
    cell.textContent = way.keeps ? label(first) : way.show(values[l][p]);
    cell.classList.toggle("says", first === record.answer_ids[p]);
    cell.style.background = `color-mix(in srgb, var(--k0) ${Math.round(60 * (way.turned ? 1 - part : part))}%, transparent)`;
  }));
  $("low").textContent = known.length ? way.show(way.turned ? high : low) : "–";
  $("high").textContent = known.length ? way.show(way.turned ? low : high) : "–";
  tell(...chosen);
}

function candidates(each, l, p) {
  const { top_ids, top_probability } = each.readings;
  return make("ol", {}, ...top_ids[l][p].map((id, k) => {
    const probability = top_probability[l][p][k];
    const item = make("li", { className: id === record.answer_ids[p] ? "says" : "" },
      make("span", { textContent: label(id) }), make("span", { textContent: percent(probability) }));
    const width = 100 * (probability ?? 0);
    item.style.background = `linear-gradient(90deg, color-mix(in srgb, var(--k0) 35%, transparent) ${width}%, transparent ${width}%)`;
    return item;
  }));
}

function line(l, p) {
  const values = paths[path].readings.answer_probability.map(row => row[p] ?? 0);
  const x = i => layers.length > 1 ? (4 + 232 * i / (layers.length - 1)).toFixed(1) : 120, y = v => (54 - 48 * v).toFixed(1);
  const holder = make("div");
  holder.innerHTML = `<svg viewBox="0 0 240 58" role="img" aria-label="probability of the answer over the layers">
    <line x1="0" x2="240" y1="54" y2="54"/><line x1="0" x2="240" y1="6" y2="6"/>
    <polyline points="${values.map((v, i) => `${x(i)},${y(v)}`).join(" ")}"/><circle cx="${x(l)}" cy="${y(values[l])}" r="3.5"/></svg>`;
  return holder;
}

/* Say everything of one cell. */
function tell(l, p) {
  const layer = layers[l], position = positions[p], readings = paths[path].readings, next = record.token_ids[position + 1];
  const settled = record.settled[p];
  const known = {
    "KL from the last layer": short(readings.kl[l][p]), "norm": short(readings.norm[l][p]),
    "cosine to layer before": short(readings.cosine[l][p]), "rank of the answer": short(readings.answer_rank[l][p] || null),
  };
  if (next !== undefined && next !== record.answer_ids[p]) {
    known[`${label(next)}, as the text has`] = `${percent(readings.next_probability[l][p])}, rank ${short(readings.next_rank[l][p] || null)}`;
  }
  if (record.differences) known["paths apart by"] = short(record.differences[l][p]);
  const lists = paths.map(each => make("div", {}, ...(paths.length > 1 ? [make("h4", { textContent: each.backend })] : []), candidates(each, l, p)));
  $("cell").replaceChildren(
    make("h3", { textContent: layer === 0 ? "the embedding" : layer === last ? `layer ${layer}, the last` : `layer ${layer}` }),
    make("p", { textContent: `position ${position}, after ${label(record.token_ids[position])}` }),
    make("div", { className: paths.length > 1 ? "both" : "" }, ...lists),
    make("dl", {}, ...Object.entries(known).map(([name, value]) =>
      make("div", {}, make("dt", { textContent: name }), make("dd", { textContent: value })))),
    make("h4", { textContent: `probability of ${label(record.answer_ids[p])} over the layers: ${percent(readings.answer_probability[l][p])} here, `
      + (settled === null ? "never the likeliest" : `the likeliest from layer ${settled} on`) }),
    line(l, p));
}

function choose(l, p, focus) {
  const [before, after] = [cells[chosen[0]][chosen[1]], cells[l][p]];
  before.tabIndex = -1;
  before.classList.remove("chosen");
  after.tabIndex = 0;
  after.classList.add("chosen");
  chosen = [l, p];
  if (focus) after.focus();
  tell(l, p);
}

const place = target => target.closest("td")?.dataset.at?.split(",").map(Number);
grid.addEventListener("mouseover", event => { const at = place(event.target); if (at) tell(...at); });
grid.addEventListener("mouseleave", () => tell(...chosen));
grid.addEventListener("click", event => { const at = place(event.target); if (at) choose(...at, true); });
grid.addEventListener("keydown", event => {
  const [l, p] = chosen, bottom = layers.length - 1, right = positions.length - 1;
  const to = { ArrowUp: [l - 1, p], ArrowDown: [l + 1, p], ArrowLeft: [l, p - 1], ArrowRight: [l, p + 1],
    Home: [l, 0], End: [l, right], PageUp: [0, p], PageDown: [bottom, p] }[event.key];
  if (!to) return;
  event.preventDefault();
  choose(Math.min(Math.max(to[0], 0), bottom), Math.min(Math.max(to[1], 0), right), true);
});
$("way").onchange = draw;
$("path").onchange = () => { path = +$("path").value; draw(); };
document.querySelector(".lens-choice").onsubmit = () => false;
build();
draw();
choose(...chosen, false);
const scroll = grid.parentElement, column = cells[0][firstOutput];
scroll.scrollLeft = column.offsetLeft + column.offsetWidth - scroll.clientWidth / 2;
scroll.scrollTop = scroll.scrollHeight;
