// The card of the chosen head: its role and why, and where each measurement stands among all heads.

const marks = new Map(); // measurement -> the nodes that change with the head

const SVG = "http://www.w3.org/2000/svg";
function svgNode(tag, attributes, ...children) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

const BINS = 40;
const placeOf = (m, v) => (m.sorted.at(-1) > m.sorted[0] ? (v - m.sorted[0]) / (m.sorted.at(-1) - m.sorted[0]) : 0.5);

function spread(m) {
  const counts = new Array(BINS).fill(0);
  for (const v of m.sorted) counts[Math.min(BINS - 1, Math.floor(placeOf(m, v) * BINS))] += 1;
  const top = Math.max(1, ...counts);
  const bars = counts.flatMap((n, i) => (n ? [svgNode("rect", { x: i + 0.08, width: 0.84, y: 1 - Math.sqrt(n / top), height: Math.sqrt(n / top) })] : []));
  const base = svgNode("line", { x1: 0, x2: BINS, y1: 1, y2: 1, "vector-effect": "non-scaling-stroke" });
  return svgNode("svg", { viewBox: `0 0 ${BINS} 1`, preserveAspectRatio: "none", "aria-hidden": "true" }, base, ...bars);
}

function buildStats() {
  const rows = [...measures.values()].flatMap((m) => {
    const name = make("button", { type: "button", title: m.meaning, onclick: () => set("by", state.by === m.name ? "role" : m.name) }, m.title);
    const mark = make("i"), value = make("b"), rank = make("em");
    marks.set(m.name, { name, mark, value, rank });
    return [name, make("div", { class: "spread" }, spread(m), mark), value, rank];
  });
  $("stats").replaceChildren(...rows);
}

function showStats(h) {
  for (const [name, node] of marks) {
    const m = measures.get(name), v = m.flat[h.index];
    node.mark.hidden = v === null;
    node.value.textContent = measured(v, m.unit);
    node.rank.textContent = v === null ? "not measured" : rankWords(m, v);
    if (v !== null) node.mark.style.left = 100 * placeOf(m, v) + "%";
  }
}

function rankWords(m, v) {
  if (m.sorted.length > 1 && v === m.sorted.at(-1)) return "highest";
  if (m.sorted.length > 1 && v === m.sorted[0]) return "lowest";
  const share = Math.round(100 * standing(m, v));
  return share >= 50 ? `above ${share} %` : `below ${100 - share} %`;
}

function showRole(h) {
  const rule = roles.rules.find((r) => r.role === h.role);
  const badge = make("span", { class: "role" }, swatch(h.role), h.role);
  $("card-title").replaceChildren(`Layer ${h.layer}, head ${h.head}`, badge);
  $("card-why").textContent = rule ? rule.text : "";
  const lines = (rule ? rule.conditions : []).map((c) => {
    const m = measures.get(c.measurement);
    const sign = c.relation === ">=" ? "≥" : "≤";
    return make("li", {}, `${m.title} ${sign} ${measured(c.threshold, m.unit)}`, make("b", {}, measured(m.flat[h.index], m.unit)));
  });
  $("card-conditions").replaceChildren(...lines);
}

function showGroup(h) {
  const size = model.heads[h.layer] / model.kv_heads[h.layer];
  const mates = Array.from({ length: size }, (_, i) => h.kv * size + i).filter((i) => i !== h.head);
  const shared = mates.length ? `Reads KV head ${h.kv}, shared with ${mates.length > 1 ? "heads" : "head"} ${mates.join(", ")}.` : "Has a KV head of its own.";
  const kept = state.kept && state.kept.has(`${h.layer}.${h.kv}`);
  const where = $("kept-what")?.textContent || "as recommended";
  const fate = !state.kept ? "" : kept ? ` It keeps the full context (${where}).` : ` It keeps only sinks and recent tokens (${where}).`;
  $("card-kv").textContent = model.is_encoder ? "" : shared + fate;
}

// steps through the heads of the same role
function showSteps(h) {
  const same = heads.filter((o) => o.role === h.role), at = same.indexOf(h);
  for (const [id, target] of [["same-before", same[at - 1]], ["same-after", same[at + 1]]]) {
    const button = $(id);
    button.disabled = !target;
    button.querySelector("span").textContent = target ? `${h.role} ${target.layer}.${target.head}` : h.role;
    button.setAttribute("aria-label", target ? `${id === "same-before" ? "Previous" : "Next"} ${h.role} head: layer ${target.layer}, head ${target.head}` : "No more");
    button.onclick = () => set("head", target);
  }
}

function showCard(h) {
  showRole(h);
  showGroup(h);
  showSteps(h);
  showStats(h);
  $("card").dataset.head = `${h.layer}.${h.head}`;
  $("status").textContent = describe(h);
  $("pick-layer").value = h.layer;
  $("pick-head").value = h.head;
  $("pick-head").max = model.heads[h.layer] - 1;
}

function startCard() {
  buildStats();
  watch("head", showCard);
  watch("kept", () => state.head && showGroup(state.head));
  watch("by", (by) => marks.forEach((node, name) => node.name.setAttribute("aria-pressed", String(name === by))));
}
