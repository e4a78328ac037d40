// The map: layers × heads, KV groups as pills. Layers run across where there is room, down where there is not.

let mapLayout = null;

function layoutMap(room) {
  const layers = model.heads.length;
  const most = Math.max(...model.heads), groups = Math.max(...model.kv_heads);
  const grouped = model.heads.some((h, i) => h !== model.kv_heads[i]);
  const gap = grouped ? 6 : 0;
  const margin = grouped ? 62 : 34;
  const acrossPitch = (room - margin) / layers;
  const downCell = (room - 40 - groups * gap) / most - 1;
  const across = acrossPitch >= 13 || acrossPitch >= downCell;
  if (across) {
    const pitch = Math.max(6, Math.min(layers < 16 ? 64 : 46, acrossPitch));
    const cell = Math.max(6, Math.min(24, (470 - groups * gap) / most - 1));
    const wide = pitch - (pitch > 20 ? 6 : pitch > 11 ? 3 : 1.5);
    return { across, pitch, wide, tall: cell, gap, left: margin, top: 22, width: margin + layers * pitch, height: 26 + most * (cell + 1) + groups * gap };
  }
  const cell = Math.max(5, Math.min(30, downCell));
  const tall = layers > 60 ? 9 : 13;
  return { across, pitch: tall + 4, wide: cell, tall, gap, left: 34, top: grouped ? 20 : 18, width: 40 + most * (cell + 1) + groups * gap, height: 22 + layers * (tall + 4) };
}

// the box of a head's cell in CSS pixels
function cellBox(h) {
  const m = mapLayout;
  const along = m.across ? m.tall : m.wide;
  const offset = h.head * (along + 1) + h.kv * m.gap;
  return m.across
    ? { x: m.left + h.layer * m.pitch, y: m.top + offset, w: m.wide, h: m.tall }
    : { x: m.left + offset, y: m.top + h.layer * m.pitch, w: m.wide, h: m.tall };
}

function drawMap() {
  const frame = $("map-frame");
  mapLayout = layoutMap(frame.clientWidth);
  const m = mapLayout;
  const ctx = prepare($("map"), m.width, m.height);
  const measure = measures.get(state.by);
  const range = measure && domain(measure);
  drawAxes(ctx);
  for (const h of heads) {
    const b = cellBox(h);
    const size = model.heads[h.layer] / model.kv_heads[h.layer];
    if (m.gap && h.head % size === 0) drawPill(ctx, h, b, size);
  }
  for (const h of heads) {
    const b = cellBox(h);
    const value = measure && measure.flat[h.index];
    const unknown = measure && (value === null || value === undefined);
    ctx.globalAlpha = state.role && state.role !== h.role ? 0.13 : 1;
    ctx.fillStyle = !measure ? palette.role[h.role] : unknown ? palette.sunk : rampColour((value - range.low) / (range.high - range.low || 1));
    round(ctx, b.x, b.y, b.w, b.h, Math.min(3, b.w / 4));
    ctx.fill();
    if (measure) { ctx.strokeStyle = palette.line; ctx.lineWidth = 0.5; ctx.stroke(); }
    if (unknown) cross(ctx, b);
    if (!measure && b.w >= 15 && b.h >= 12 && ROLE_LETTERS[h.role]) letter(ctx, h, b);
  }
  ctx.globalAlpha = 1;
  placeRing($("map-chosen"), state.head);
}

function drawPill(ctx, h, b, size) {
  const m = mapLayout, long = size * ((m.across ? m.tall : m.wide) + 1) - 1;
  round(ctx, b.x - 2, b.y - 2, (m.across ? b.w : long) + 4, (m.across ? long : b.h) + 4, 5);
  ctx.fillStyle = palette.sunk;
  ctx.fill();
  if (state.showKept && state.kept && state.kept.has(`${h.layer}.${h.kv}`)) {
    ctx.strokeStyle = palette.accent;
    ctx.lineWidth = 2;
    ctx.stroke();
  }
}

function drawAxes(ctx) {
  const m = mapLayout, layers = model.heads.length;
  ctx.fillStyle = palette.soft;
  const step = [1, 2, 5, 10, 20].find((s) => s * m.pitch >= (m.across ? 20 : 13)) || 50;
  for (let layer = 0; layer < layers; layer += step) {
    const at = layer * m.pitch;
    if (m.across) { ctx.textAlign = "center"; ctx.fillText(layer, m.left + at + m.wide / 2, m.top - 9); }
    else { ctx.textAlign = "right"; ctx.fillText(layer, m.left - 8, m.top + at + m.tall / 2 + 4); }
  }
  if (m.across) {
    ctx.textAlign = "left";
    ctx.fillText("layer", 0, m.top - 9);
    const widest = model.heads.indexOf(Math.max(...model.heads));
    const every = Math.ceil(13 / (m.tall + 1));
    const size = model.heads[widest] / model.kv_heads[widest];
    for (let head = 0; head < model.heads[widest]; head += 1) {
      const b = cellBox(headAt(widest, head));
      ctx.textAlign = "right";
      if (head % every === 0) ctx.fillText(head, m.left - 8, b.y + b.h / 2 + 4);
      if (m.gap && head % size === 0 && size * (m.tall + 1) >= 12) {
        ctx.textAlign = "left";
        ctx.fillText("KV " + head / size, 0, b.y + (size * (m.tall + 1)) / 2 + 3);
      }
    }
  } else {
    ctx.textAlign = "left";
    const widest = model.heads.indexOf(Math.max(...model.heads));
    const size = model.heads[widest] / model.kv_heads[widest];
    const long = size * (m.wide + 1);
    if (m.gap && long >= 30) {
      for (let head = 0; head < model.heads[widest]; head += size) ctx.fillText("KV " + head / size, cellBox(headAt(widest, head)).x, m.top - 8);
    } else ctx.fillText("heads", m.left, m.top - 8);
  }
}

function letter(ctx, h, b) {
  ctx.fillStyle = inkOn(palette.role[h.role]);
  ctx.textAlign = "center";
  ctx.fillText(ROLE_LETTERS[h.role], b.x + b.w / 2, b.y + b.h / 2 + 4);
}

function cross(ctx, b) {
  ctx.beginPath();
  ctx.moveTo(b.x + 2, b.y + b.h - 2);
  ctx.lineTo(b.x + b.w - 2, b.y + 2);
  ctx.strokeStyle = palette.chance;
  ctx.stroke();
}

function round(ctx, x, y, w, h, r) {
  ctx.beginPath();
  ctx.roundRect(x, y, w, h, r);
}

function placeRing(ring, h) {
  ring.hidden = !h;
  if (!h) return;
  const b = cellBox(h);
  ring.style.cssText = `left:${b.x}px;top:${b.y}px;width:${b.w}px;height:${b.h}px`;
}

function headUnder(event) {
  const box = $("map").getBoundingClientRect();
  const x = event.clientX - box.left, y = event.clientY - box.top;
  const m = mapLayout;
  const layer = Math.floor((m.across ? x - m.left : y - m.top) / m.pitch);
  if (layer < 0 || layer >= model.heads.length) return null;
  let nearest = null, least = 5; // the gap between groups belongs to whoever is near
  for (let head = 0; head < model.heads[layer]; head += 1) {
    const h = headAt(layer, head), b = cellBox(h);
    const away = m.across ? Math.max(b.y - y, y - b.y - b.h) : Math.max(b.x - x, x - b.x - b.w);
    if (away < least) [least, nearest] = [away, h];
  }
  return nearest;
}

function describe(h) {
  const measure = measures.get(state.by);
  const value = measure ? `\n${measure.title}: ${measured(measure.flat[h.index], measure.unit)}` : "";
  return `Layer ${h.layer}, head ${h.head}: ${h.role}${value}`;
}

function stepHead(key) {
  const { layer, head } = state.head;
  const turn = mapLayout.across ? { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }
    : { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] };
  if (!turn[key]) return false;
  const l = Math.min(model.heads.length - 1, Math.max(0, layer + turn[key][0]));
  set("head", headAt(l, Math.min(model.heads[l] - 1, Math.max(0, head + turn[key][1]))));
  return true;
}

function drawLegend() {
  const legend = $("legend"), measure = measures.get(state.by);
  $("by-meaning").hidden = !measure;
  if (!measure) {
    const counts = new Map(ROLE_NAMES.map((role) => [role, heads.filter((h) => h.role === role).length]));
    const buttons = ROLE_NAMES.filter((role) => counts.get(role)).map((role) => {
      const button = make("button", { type: "button", "aria-pressed": String(state.role === role), onclick: () => set("role", state.role === role ? null : role) }, swatch(role), role + " ", make("em", {}, whole(counts.get(role))));
      button.title = "show only these heads";
      return button;
    });
    legend.replaceChildren(...buttons);
    return;
  }
  const range = domain(measure);
  const bar = make("i");
  bar.style.background = rampGradient();
  legend.replaceChildren(make("span", { class: "ramp" },
    (range.cutLow ? "≤ " : "") + measured(range.low, measure.unit), bar, (range.cutHigh ? "≥ " : "") + measured(range.high, measure.unit)));
  $("by-meaning").textContent = measure.meaning + (measure.direction ? " (" + measure.direction + ")" : "");
}

function drawRanking() {
  const measure = measures.get(state.by), box = $("ranking");
  box.hidden = !measure;
  if (!measure) return;
  const known = heads.filter((h) => measure.flat[h.index] !== null).sort((a, b) => measure.flat[b.index] - measure.flat[a.index]);
  const chip = (h) => make("button", { type: "button", onclick: () => set("head", h) }, `${h.layer}.${h.head} `, make("em", {}, measured(measure.flat[h.index], measure.unit)));
  box.replaceChildren(make("b", {}, "Highest (layer.head)"), ...known.slice(0, 7).map(chip), make("b", {}, "Lowest"), ...known.slice(-3).reverse().map(chip));
}

function startMap() {
  const canvas = $("map"), hover = $("map-hover");
  canvas.addEventListener("pointermove", (event) => {
    const h = headUnder(event);
    placeRing(hover, h);
    if (h) showHint(event, describe(h)); else hideHint();
  });
  canvas.addEventListener("pointerleave", () => { hover.hidden = true; hideHint(); });
  canvas.addEventListener("click", (event) => { const h = headUnder(event); if (h) set("head", h); });
  canvas.addEventListener("keydown", (event) => { if (stepHead(event.key)) event.preventDefault(); });
  $("by").addEventListener("change", (event) => set("by", event.target.value));
  $("show-kept")?.addEventListener("change", (event) => set("showKept", event.target.checked));
  watch("by", (by) => { $("by").value = by; set("role", null); drawRanking(); });
  watch("by role theme", drawLegend);
  watch("by role theme kept showKept", drawMap);
  watch("head", (h) => placeRing($("map-chosen"), h));
  let width = 0;
  new ResizeObserver(([entry]) => {
    if (Math.abs(entry.contentRect.width - width) < 1) return;
    width = entry.contentRect.width;
    drawMap();
  }).observe($("map-frame"));
  drawLegend();
}
