// The text, token by token, and where the chosen head looks from the token that is pointed at.

let spans = [];
let seen = null; // { head, positions, weights }: the lookups of the chosen head
let pinned = null; // the query row that was clicked, or that the page proposes
let pinnedByHand = false;
let shown = null;
let tinted = [];
let viewed = null; // first and last token in view, until the text moves
let rowOf = null; // token -> row among lookups.queries, or -1

function buildText() {
  const box = $("tokens"), sinks = new Set(text.sinks);
  rowOf = new Int32Array(text.tokens.length).fill(-1);
  lookups.queries.forEach((q, row) => { rowOf[q] = row; });
  const blocks = [];
  let block = null, filled = 0;
  spans = text.tokens.map((token, i) => {
    // a new block where a line ends anyway; blocks out of view are not laid out
    const lineEnd = i > 0 && /[\n\u2028\u2029]$/.test(text.tokens[i - 1]);
    if (!block || (filled > 120 && lineEnd) || filled > 600) {
      block = make("div", { dir: "auto" });
      blocks.push(block);
      filled = 0;
    }
    filled += 1;
    const span = document.createElement("span");
    span.dataset.i = i;
    fillToken(span, token);
    if (rowOf[i] < 0) span.className = "pale";
    if (sinks.has(i)) { span.classList.add("sink"); span.title = "a sink: draws attention whatever the text says"; }
    block.append(span);
    return span;
  });
  // a line end that closes a block would leave an empty line: the block ends the line already
  for (const b of blocks) {
    const end = b.lastChild.lastChild;
    if (end?.textContent.endsWith("⏎\n")) end.textContent = end.textContent.slice(0, -1);
  }
  box.replaceChildren(...blocks);
}

// signs that stand for what is invisible are set back, so that words stay what is read
function fillToken(span, token) {
  const shown = visible(token);
  if (shown === token) { span.textContent = token; return; }
  for (const part of shown.split(/(⏎\n?|⇥|∅|␍|⟨[0-9A-F]{2,4}⟩)/)) {
    if (!part) continue;
    span.append(/^[⏎⇥∅␍⟨]/.test(part) && !token.includes(part) ? make("i", {}, part) : part);
  }
}

async function loadLookups(head) {
  if (!lookups) return;
  $("reading-head").textContent = `layer ${head.layer}, head ${head.head}`;
  try {
    const got = await unpackLookups(head);
    if (state.head !== head) return;
    seen = { head, ...got };
    if (!pinnedByHand) pinned = tellingRow();
    point(pinned, !pinnedByHand);
    $("tokens").dataset.head = `${head.layer}.${head.head}`;
  } catch (error) {
    $("look").textContent = "The text view cannot be shown: " + error.message;
  }
}

// The row that shows best what the head does: much weight, far away, not on the first token or a sink.
function tellingRow() {
  const { k, queries } = lookups, sinks = new Set([0, ...text.sinks]);
  let best = queries.length - 1, most = 0;
  for (let i = 0; i < queries.length * k; i += 1) {
    const row = Math.floor(i / k), key = seen.positions[i];
    if (sinks.has(key)) continue;
    const value = seen.weights[i] * Math.log2(2 + Math.abs(queries[row] - key));
    if (value > most) [most, best] = [value, row];
  }
  return best;
}

function looksFrom(row) {
  const { k } = lookups, found = [];
  for (let i = row * k; i < (row + 1) * k; i += 1) if (seen.weights[i] > 0) found.push({ key: seen.positions[i], weight: seen.weights[i] });
  return found.sort((a, b) => b.weight - a.weight);
}

function point(row, bringIntoView = false) {
  if (!seen || row === null || row < 0) return;
  for (const span of tinted) { span.classList.remove("looked", "query"); span.style.removeProperty("--weight"); }
  shown = row;
  const query = lookups.queries[row], looks = looksFrom(row);
  tinted = looks.map(({ key, weight }) => {
    const span = spans[key];
    span.classList.add("looked");
    span.style.setProperty("--weight", (8 + 66 * Math.sqrt(weight)).toFixed(1));
    return span;
  });
  spans[query].classList.add("query");
  tinted.push(spans[query]);
  showLooks(query, looks);
  if (bringIntoView) scrollToToken(query);
  drawStrip();
}

function showLooks(query, looks) {
  const rest = Math.max(0, 1 - looks.reduce((sum, l) => sum + l.weight, 0));
  const chips = looks.map(({ key, weight }) => {
    const chip = make("button", { type: "button", onclick: () => { if (rowOf[key] >= 0) pin(rowOf[key]); scrollToToken(key); } },
      make("span", { class: "piece" }, inline(text.tokens[key])), make("b", {}, measured(weight, "share")), make("em", {}, key === query ? "itself" : `token ${whole(key)}`));
    chip.style.borderColor = `color-mix(in srgb, var(--look) ${Math.round(20 + 80 * Math.sqrt(weight))}%, var(--line))`;
    return chip;
  });
  $("look").replaceChildren("From ", make("span", { class: "piece" }, inline(text.tokens[query])), make("em", {}, `token ${whole(query)}`), " it looks at ", ...chips,
    make("em", {}, `${percent(rest)} elsewhere`));
  $("look").dataset.query = query;
}

function pin(row) {
  pinned = row;
  pinnedByHand = true;
  point(row);
}

// A block out of view has no layout, so its tokens have no place: bring the block, then the token.
function scrollToToken(i) {
  const box = $("tokens"), span = spans[i];
  for (let round = 0; round < 3; round += 1) {
    const place = span.getBoundingClientRect(), frame = box.getBoundingClientRect();
    if (place.top >= frame.top + 20 && place.bottom <= frame.bottom - 20 && place.height) return;
    const target = place.height ? place : span.parentElement.getBoundingClientRect();
    box.scrollTop += target.top - frame.top - box.clientHeight / 2.5;
  }
}

// First and last token in view. Asks only blocks in view for the places of tokens: others have no layout.
function visibleTokens() {
  const frame = $("tokens").getBoundingClientRect();
  const inView = [...$("tokens").children].filter((block) => {
    const box = block.getBoundingClientRect();
    return box.bottom > frame.top && box.top < frame.bottom;
  });
  if (!inView.length) return [0, 0];
  const first = (block, test) => {
    const list = block.children;
    let low = 0, high = list.length - 1;
    while (low < high) { const middle = (low + high) >> 1; if (test(list[middle].getBoundingClientRect())) high = middle; else low = middle + 1; }
    return Number(list[low].dataset.i);
  };
  return [first(inView[0], (box) => box.bottom > frame.top), first(inView.at(-1), (box) => box.top > frame.bottom)];
}

function drawStrip() {
  const canvas = $("strip"), width = canvas.parentElement.clientWidth, height = 64, n = text.tokens.length;
  const ctx = prepare(canvas, width, height);
  canvas.style.width = "";
  const x = (token) => ((token + 0.5) / n) * width;
  drawProfile(ctx, width, height);
  const [a, b] = (viewed ??= visibleTokens());
  ctx.fillStyle = palette.panel;
  ctx.globalAlpha = 0.55;
  ctx.fillRect(x(a), 0, Math.max(2, x(b) - x(a)), height);
  ctx.globalAlpha = 1;
  ctx.strokeStyle = palette.soft;
  ctx.lineWidth = 1;
  ctx.strokeRect(x(a) + 0.5, 0.5, Math.max(2, x(b) - x(a)) - 1, height - 1);
  if (lookups.queries.length < n) {
    ctx.fillStyle = palette.chance;
    const w = Math.max(1, width / n);
    for (const q of lookups.queries) ctx.fillRect(x(q) - w / 2, height - 3, w, 3);
  }
  if (shown === null || !seen) return;
  for (const { key, weight } of looksFrom(shown)) {
    const tall = 6 + (height - 12) * Math.sqrt(weight);
    ctx.fillStyle = palette.look;
    ctx.fillRect(x(key) - 1.5, height - tall, 3, tall);
  }
  ctx.fillStyle = palette.ink;
  ctx.beginPath();
  const q = x(lookups.queries[shown]);
  ctx.moveTo(q - 5, 0); ctx.lineTo(q + 5, 0); ctx.lineTo(q, 8);
  ctx.fill();
  ctx.fillRect(q - 0.75, 0, 1.5, height);
}

function drawProfile(ctx, width, height) {
  const n = text.tokens.length, columns = Math.min(n, Math.floor(width / 2));
  if (!text.received.length) return;
  const tops = new Array(columns).fill(0);
  text.received.forEach((v, i) => { const c = Math.floor((i / n) * columns); tops[c] = Math.max(tops[c], v); });
  const most = Math.max(...tops), step = width / columns;
  const floor = most / 1e4; // four decades
  ctx.fillStyle = palette.chance;
  ctx.globalAlpha = 0.35;
  tops.forEach((v, c) => {
    const tall = v > floor ? (Math.log(v / floor) / Math.log(1e4)) * height * 0.8 : 0;
    ctx.fillRect(c * step, height - tall, step + 0.3, tall);
  });
  ctx.globalAlpha = 1;
}

function startText() {
  if (!lookups) return;
  buildText();
  const box = $("tokens"), strip = $("strip");
  const rowUnder = (event) => { const span = event.target.closest?.("[data-i]"); return span ? rowOf[span.dataset.i] : -1; };
  box.addEventListener("pointerover", (event) => { const row = rowUnder(event); if (row >= 0) point(row); });
  box.addEventListener("pointerleave", () => point(pinned));
  box.addEventListener("click", (event) => { const row = rowUnder(event); if (row >= 0) pin(row); });
  box.addEventListener("keydown", (event) => {
    const last = lookups.queries.length - 1;
    const to = { ArrowLeft: pinned - 1, ArrowRight: pinned + 1, Home: 0, End: last }[event.key];
    if (to === undefined) return;
    event.preventDefault();
    pin(Math.min(last, Math.max(0, to)));
    scrollToToken(lookups.queries[pinned]);
  });
  let waiting = false;
  const redraw = () => { viewed = null; if (waiting) return; waiting = true; requestAnimationFrame(() => { waiting = false; drawStrip(); }); };
  box.addEventListener("scroll", redraw, { passive: true });
  new ResizeObserver(redraw).observe(box);
  watch("theme", redraw);
  const go = (event) => scrollToToken(Math.min(spans.length - 1, Math.max(0, Math.floor((event.offsetX / strip.clientWidth) * spans.length))));
  strip.addEventListener("pointerdown", (event) => { strip.setPointerCapture(event.pointerId); go(event); });
  strip.addEventListener("pointermove", (event) => { if (event.buttons) go(event); });
  watch("head", loadLookups);
}
