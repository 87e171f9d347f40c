"use strict";
// Shows the answers of "state". All foreign text goes through textContent: nothing here is markup.
const EVERY_MS = 2000;
const SVG = "http://www.w3.org/2000/svg";
const byId = id => document.getElementById(id);
const shown = new Map();
let heard = null;

function made(tag, text, attributes = {}) {
  const node = document.createElement(tag);
  if (text !== undefined) node.textContent = text;
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

function drawn(tag, attributes, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Builds a part again only if it has changed, so that scrolling and selections stay.
function update(key, value, build) {
  const text = JSON.stringify(value);
  if (shown.get(key) === text) return;
  shown.set(key, text);
  build(value);
}

function table(part) {
  const box = made("div", undefined, {class: "scroll", role: "region", tabindex: "0", "aria-label": part.title});
  const node = made("table", undefined, {class: "live"});
  const head = node.createTHead().insertRow();
  for (const cell of part.header) head.append(made("th", cell, {scope: "col"}));
  const body = node.createTBody();
  part.rows.forEach((cells, i) => {
    const row = body.insertRow();
    if (part.marks[i]) row.className = part.marks[i];
    row.append(made("th", cells[0], {scope: "row"}));
    for (const cell of cells.slice(1)) row.append(made("td", cell));
  });
  box.append(node);
  return box;
}

const W = 360, H = 210, LEFT = 42, RIGHT = 8, TOP = 8, BOTTOM = 30;

function ticks(low, high, most) {
  const raw = (high - low) / most || 1;
  const size = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(k => k * size).find(s => s >= raw);
  const found = [];
  for (let at = Math.ceil(low / step) * step; at <= high + step / 1e6; at += step) found.push(at);
  return [found, step];
}

function chart(part) {
  const points = part.lines.flatMap(line => line.points);
  const xs = points.map(p => p[0]), ys = points.map(p => p[1]);
  const x0 = Math.min(...xs), x1 = Math.max(part.last || 0, ...xs, x0 + 1);
  let y0 = Math.min(...ys), y1 = Math.max(...ys);
  const pad = (y1 - y0) * 0.05 || Math.abs(y1) * 0.05 || 1;
  y0 -= pad; y1 += pad;
  const x = v => LEFT + (v - x0) / (x1 - x0) * (W - LEFT - RIGHT);
  const y = v => TOP + (y1 - v) / (y1 - y0) * (H - TOP - BOTTOM);
  const svg = drawn("svg", {class: "chart", role: "img", viewBox: `0 0 ${W} ${H}`, "aria-label": part.title});
  const [marks, step] = ticks(y0, y1, 5);
  const digits = Math.max(0, Math.min(6, -Math.floor(Math.log10(step))));
  for (const v of marks) {
    svg.append(drawn("line", {class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(v), y2: y(v)}));
    svg.append(drawn("text", {x: LEFT - 5, y: y(v) + 3, "text-anchor": "end"}, v.toFixed(digits)));
  }
  for (const v of ticks(x0, x1, 6)[0].filter(Number.isInteger)) {
    svg.append(drawn("text", {x: x(v), y: H - BOTTOM + 13, "text-anchor": "middle"}, v));
  }
  svg.append(drawn("line", {class: "axis", x1: LEFT, x2: W - RIGHT, y1: H - BOTTOM, y2: H - BOTTOM}));
  svg.append(drawn("text", {x: (LEFT + W - RIGHT) / 2, y: H - 3, "text-anchor": "middle"}, part.x));
  const legend = made("ul", undefined, {class: "legend"});
  part.lines.forEach((line, i) => {
    const kind = line.all ? "all" : `k${i % 8}`;
    const path = line.points.map((p, j) => `${j ? "L" : "M"}${x(p[0])} ${y(p[1])}`).join("");
    svg.append(drawn("path", {class: kind, d: path}));
    const [lx, ly] = line.points[line.points.length - 1];
    svg.append(drawn("circle", {class: kind, cx: x(lx), cy: y(ly), r: 2, fill: "none"}));
    const item = made("li"), swatch = drawn("svg", {viewBox: "0 0 30 10", "aria-hidden": "true"});
    swatch.append(drawn("line", {class: kind, x1: 0, x2: 30, y1: 5, y2: 5}));
    item.append(swatch, line.name);
    legend.append(item);
  });
  const figure = made("figure"), caption = made("figcaption");
  caption.append(made("b", part.title), ` ${part.note}`);
  figure.append(caption, svg, legend);
  return figure;
}

function list(part) {
  const node = made("ul", undefined, {class: "soft"});
  for (const line of part.lines) node.append(made("li", line));
  return node;
}

function section(part) {
  const node = made("section");
  node.append(made("h2", part.title));
  if (part.kind === "charts") {
    const box = made("div", undefined, {class: "charts"});
    box.append(...part.charts.map(chart));
    node.append(box);
  } else {
    node.append(part.kind === "table" ? table(part) : list(part));
  }
  return node;
}

function log(lines) {
  byId("log").hidden = lines.length === 0;
  const box = byId("log").querySelector(".log");
  const atEnd = box.scrollHeight - box.scrollTop - box.clientHeight < 40;
  box.replaceChildren(...lines.map(([at, text]) => {
    const node = made("p"), when = made("time", new Date(at * 1000).toLocaleTimeString());
    node.append(when, text);
    return node;
  }));
  if (atEnd) box.scrollTop = box.scrollHeight;
}

function show(now) {
  document.title = `${now.state}: ${now.title}`;
  for (const key of ["kind", "title", "subtitle", "state", "headline"]) {
    update(key, now[key], text => { byId(key).textContent = text; });
  }
  update("bar", now.bar, bar => {
    byId("bar").hidden = !bar;
    if (bar) { byId("bar").max = bar[1]; byId("bar").value = bar[0]; }
  });
  update("facts", now.facts, facts => byId("facts").replaceChildren(...facts.map(([name, value]) => {
    const box = made("div");
    box.append(made("dt", name), made("dd", value));
    return box;
  })));
  const parts = byId("parts");
  while (parts.children.length > now.parts.length) parts.lastChild.remove();
  now.parts.forEach((part, i) => update(`part ${i}`, part, () => {
    const node = section(part);
    if (parts.children[i]) parts.children[i].replaceWith(node); else parts.append(node);
  }));
  for (const key of [...shown.keys()].filter(k => k.startsWith("part "))) {
    if (Number(key.slice(5)) >= now.parts.length) shown.delete(key);
  }
  if (now.log.length || now.state !== "done") update("log", now.log, log); // the end keeps the last
}

function lose(text) {
  byId("lost").hidden = !text;
  byId("lost").replaceChildren(...(text ? [made("p", text)] : []));
}

async function ask() {
  if (document.visibilityState === "visible") {
    try {
      const answer = await fetch("state", {cache: "no-store", signal: AbortSignal.timeout(15000)});
      if (!answer.ok) throw new Error();
      const now = await answer.json();
      heard = new Date();
      if (now.error) lose(now.error); else { lose(""); show(now); }
    } catch {
      const since = heard ? ` since ${heard.toLocaleTimeString()}; this is what it said then` : "";
      lose(`There has been no answer from silotune${since}. Start it again for a new address.`);
    }
  }
  setTimeout(ask, EVERY_MS);
}

ask();
