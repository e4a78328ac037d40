// The report's data, the list of heads, what is chosen, and words for numbers.

const $ = (id) => document.getElementById(id);
const report = JSON.parse($("data").textContent);
const { model, text, measurements, roles, pictures, lookups, savings, recommendation } = report;

// the page says ROLE_NAMES before this: every role, in the order of the legend
const ROLE_LETTERS = Object.fromEntries(ROLE_NAMES.map((role) => [role, role === "mixed" ? "" : role[0].toUpperCase()]));

const heads = model.heads.flatMap((count, layer) =>
  Array.from({ length: count }, (_, head) => ({
    layer,
    head,
    kv: Math.floor(head / (count / model.kv_heads[layer])),
    role: roles.heads[layer][head],
  })),
);
heads.forEach((h, index) => { h.index = index; });
const starts = model.heads.map((_, layer) => heads.findIndex((h) => h.layer === layer));
const headAt = (layer, head) => heads[starts[layer] + head];

// every measurement with its values head after head, and the known ones in order
const measures = new Map(measurements.map((m) => {
  const flat = m.values.flat();
  const sorted = flat.filter((v) => v !== null).sort((a, b) => a - b);
  return [m.name, { ...m, flat, sorted }];
}));

// State is a handful of named values; whoever draws one watches it.
const state = { head: null, by: "role", role: null, kept: null, showKept: false, theme: 0 };
const watchers = {};
const watch = (names, act) => names.split(" ").forEach((name) => (watchers[name] ??= []).push(act));
function set(name, value) {
  if (state[name] === value) return;
  state[name] = value;
  (watchers[name] || []).forEach((act) => act(value));
}

function make(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name === "class") node.className = value;
    else if (name.startsWith("aria-") || name === "role") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children);
  return node;
}

const roleVariable = (role) => "--role-" + role.replaceAll(" ", "-");
const swatch = (role) => {
  const node = make("span", { class: "swatch" });
  node.style.background = `var(${roleVariable(role)})`;
  return node;
};

const whole = (n) => n.toLocaleString("en-US");
const GAP = "\u00a0"; // keeps a unit with its number
const percent = (share, digits = 0) => (100 * share).toFixed(digits) + GAP + "%";
function compact(v) {
  if (v === null || v === undefined) return "–";
  const size = Math.abs(v);
  if (v === 0 || size >= 1000) return whole(Math.round(v));
  return size < 0.001 ? v.toExponential(1) : String(Number(v.toPrecision(3)));
}
function measured(v, unit) {
  if (v === null || v === undefined) return "–";
  if (unit === "share") return v > 0 && v < 0.0005 ? `< 0.1${GAP}%` : percent(v, v !== 0 && Math.abs(v) < 0.1 ? 1 : 0);
  return unit ? compact(v) + GAP + unit : compact(v);
}
const megabytes = (n) => (n >= 1e9 ? compact(n / 1e9) + GAP + "GB" : compact(n / 1e6) + GAP + "MB");

// The share of heads (among those measured) that lie below a value; ties count half.
function standing(measure, value) {
  const below = lowerBound(measure.sorted, value);
  let through = below;
  while (measure.sorted[through] === value) through += 1;
  return (below + through) / 2 / measure.sorted.length;
}
function lowerBound(sorted, value) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < value) low = middle + 1; else high = middle;
  }
  return low;
}

// A hint beside the pointer.
function showHint(event, words) {
  const hint = $("hint");
  hint.textContent = words;
  hint.hidden = false;
  const box = hint.getBoundingClientRect();
  const left = Math.min(event.clientX + 14, innerWidth - box.width - 8);
  const below = event.clientY + 18;
  hint.style.left = Math.max(4, left) + "px";
  hint.style.top = (below + box.height > innerHeight ? event.clientY - box.height - 10 : below) + "px";
}
const hideHint = () => { $("hint").hidden = true; };

// What is printed for a token: whatever is invisible gets a sign, and nothing can reverse the line.
const SIGNS = /[\u0000-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff]|[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g;
function visible(token) {
  if (token === "") return "∅";
  return token.replace(SIGNS, (c) => {
    const code = c.charCodeAt(0);
    if (c === "\n" || code === 0x2028 || code === 0x2029) return "⏎\n";
    if (c === "\t") return "⇥\t";
    if (c === "\r") return "␍";
    if (code >= 0xd800 && code <= 0xdfff) return "�";
    return `⟨${code.toString(16).toUpperCase().padStart(code < 256 ? 2 : 4, "0")}⟩`;
  });
}
const inline = (token) => visible(token).replaceAll("⏎\n", "⏎").replaceAll("⇥\t", "⇥").replace(/^ | $/g, "·");

// Canvas that is sharp on every screen; drawing coordinates are CSS pixels.
function prepare(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  canvas.width = Math.round(width * ratio);
  canvas.height = Math.round(height * ratio);
  canvas.style.width = width + "px";
  canvas.style.height = height + "px";
  const ctx = canvas.getContext("2d");
  ctx.setTransform(ratio, 0, 0, ratio, 0, 0);
  ctx.font = "11px " + getComputedStyle(document.body).fontFamily;
  return ctx;
}
