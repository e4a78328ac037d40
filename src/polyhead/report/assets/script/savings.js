// The slider beside the savings curves: what each number is at one size, and which KV heads stay.

const keyOf = ([layer, kv]) => `${layer}.${kv}`;

function startSavings() {
  if (recommendation?.after.heads.length) set("kept", new Set(recommendation.after.heads.map(keyOf)));
  if (!savings) return;
  const main = savings.points.find((p) => p.policy !== "random")?.policy;
  const points = savings.points.filter((p) => p.policy === main).sort((a, b) => a.kv_fraction - b.kv_fraction);
  if (points.length < 2) return;
  const slider = $("fraction"), advised = recommendation?.after.kv_fraction;
  $("probe").hidden = false;
  slider.max = points.length - 1;
  const nearest = points.reduce((best, p, i) => (Math.abs(p.kv_fraction - advised) < Math.abs(points[best].kv_fraction - advised) ? i : best), 0);
  slider.value = advised === undefined ? points.length - 1 : nearest;
  const cursors = [...document.querySelectorAll(".chart svg")].map((svg) => {
    const cursor = svgNode("line", { class: "cursor", y1: svg.dataset.top, y2: svg.dataset.base });
    svg.append(cursor);
    return { svg, cursor };
  });
  const show = () => showPoint(points[slider.value], main, cursors);
  slider.addEventListener("input", () => {
    show();
    const p = points[slider.value];
    if (!p.heads.length && p.kv_fraction > 0) return;
    if ($("kept-what")) $("kept-what").textContent = `${percent(p.kv_fraction)}, by the slider below`;
    set("kept", new Set(p.heads.map(keyOf)));
  });
  show();
}

function showPoint(p, main, cursors) {
  for (const { svg, cursor } of cursors) {
    const x = Number(svg.dataset.x0) + p.kv_fraction * (svg.dataset.x1 - svg.dataset.x0);
    cursor.setAttribute("x1", x);
    cursor.setAttribute("x2", x);
  }
  const slider = $("fraction"), words = `${percent(p.kv_fraction)}: ${p.heads_kept} of ${model.kv_heads.reduce((a, b) => a + b)} KV heads`;
  slider.setAttribute("aria-valuetext", words);
  $("probe-size").textContent = words;
  const chance = savings.points.filter((o) => o.policy === "random" && Math.abs(o.kv_fraction - p.kv_fraction) < 1e-6);
  const mean = (get) => { const v = chance.map(get).filter((x) => x !== null && x !== undefined); return v.length ? v.reduce((a, b) => a + b) / v.length : null; };
  const bytes = (o, n) => o.cache_bytes.find(([length]) => length === n)?.[1] ?? null;
  const rows = [["Facts found", (o) => o.needle_accuracy, (v) => percent(v)], ["Perplexity", (o) => o.perplexity, compact]];
  for (const [n] of savings.baseline.cache_bytes) rows.push([`Cache at ${whole(n)}`, (o) => bytes(o, n), megabytes]);
  rows.push(["Tokens/s", (o) => o.decode_tokens_per_second, compact]);
  const tell = (v, words) => (v === null || v === undefined ? "–" : words(v));
  const cell = (words) => make("td", { class: "number" }, words);
  const header = make("tr", {}, make("th"), make("th", { class: "number" }, main), make("th", { class: "number" }, "random"), make("th", { class: "number" }, "whole"));
  $("probe-table").replaceChildren(header, ...rows.map(([name, get, words]) =>
    make("tr", {}, make("th", {}, name), cell(tell(get(p), words)), cell(tell(mean(get), words)), cell(tell(get(savings.baseline), words)))));
}
