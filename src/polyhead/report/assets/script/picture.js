// The picture of a head's attention: looking tokens downwards, looked-at tokens to the right.

let picture = null; // { head, cells }
const frameOf = { left: 46, top: 8, right: 8, bottom: 62 };

async function loadPicture(head) {
  if (!pictures) return;
  try {
    const cells = await unpackPicture(head);
    if (state.head !== head) return; // another was chosen meanwhile
    picture = { head, cells };
    drawPicture();
    caption();
  } catch (error) {
    $("picture-caption").textContent = "The picture could not be shown: " + error.message;
  }
}

function drawPicture() {
  if (!picture) return;
  const canvas = $("picture"), side = pictures.side, n = text.tokens.length;
  const width = Math.min(canvas.parentElement.clientWidth, 420), size = width - frameOf.left - frameOf.right;
  const ctx = prepare(canvas, width, size + frameOf.top + frameOf.bottom);
  const small = new OffscreenCanvas(side, side);
  const image = new ImageData(side, side);
  for (let i = 0; i < side * side; i += 1) {
    const shade = picture.cells[i];
    const [r, g, b] = palette.ramp[Math.round((255 * shade) / SHADES)] || [0, 0, 0];
    image.data.set([r, g, b, shade === 255 ? 0 : 255], 4 * i);
  }
  small.getContext("2d").putImageData(image, 0, 0);
  ctx.imageSmoothingEnabled = false;
  ctx.drawImage(small, frameOf.left, frameOf.top, size, size);
  ctx.strokeStyle = palette.line;
  ctx.lineWidth = 1;
  ctx.strokeRect(frameOf.left, frameOf.top, size, size);
  drawTicks(ctx, size, n);
  drawScale(ctx, size);
}

function drawTicks(ctx, size, n) {
  ctx.fillStyle = palette.soft;
  const raw = n / 4, base = 10 ** Math.floor(Math.log10(raw));
  const powers = [16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384];
  const step = n >= 64 ? powers.find((p) => p >= raw * 0.99) || powers.at(-1) : Math.ceil(raw / base) * base;
  for (let t = 0; t <= n; t += step) {
    const at = (t / n) * size;
    ctx.textAlign = "right";
    ctx.fillText(whole(t), frameOf.left - 6, frameOf.top + at + 4);
    ctx.textAlign = t === 0 ? "left" : t + step > n && at > size - 14 ? "right" : "center";
    ctx.fillText(whole(t), frameOf.left + at, frameOf.top + size + 15);
  }
  ctx.textAlign = "center";
  ctx.fillText("looks at token →", frameOf.left + size / 2, frameOf.top + size + 31);
  ctx.save();
  ctx.translate(9, frameOf.top + size / 2);
  ctx.rotate(-Math.PI / 2);
  ctx.fillText("← from token", 0, 0);
  ctx.restore();
}

function drawScale(ctx, size) {
  const y = frameOf.top + size + 40, wide = Math.min(210, size * 0.6), x0 = frameOf.left + (size - wide) / 2;
  for (let i = 0; i < wide; i += 1) {
    ctx.fillStyle = rampColour(i / wide);
    ctx.fillRect(x0 + i, y, 1.2, 7);
  }
  ctx.fillStyle = palette.soft;
  ctx.textAlign = "center";
  for (const [mass, label] of [[0.001, "0.1 %"], [0.01, "1 %"], [0.1, "10 %"], [1, "100 %"]]) {
    ctx.fillText(label, x0 + (shadeOf(mass) / SHADES) * wide, y + 19);
  }
}

function caption() {
  const n = text.tokens.length, each = n / pictures.side;
  $("picture-caption").textContent = `The text in ${pictures.side} stretches of about ${Math.max(1, Math.round(each))} tokens. ` +
    "A cell is the share of attention that a row's tokens give to a column's; a row sums to 100\u00a0%. Log scale.";
}

function startPicture() {
  if (!pictures) return;
  const canvas = $("picture");
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect(), size = box.width - frameOf.left - frameOf.right;
    const c = Math.floor(((event.clientX - box.left - frameOf.left) / size) * pictures.side);
    const r = Math.floor(((event.clientY - box.top - frameOf.top) / size) * pictures.side);
    const inside = picture && r >= 0 && c >= 0 && r < pictures.side && c < pictures.side;
    const shade = inside ? picture.cells[r * pictures.side + c] : 255;
    if (shade === 255) return hideHint();
    const each = text.tokens.length / pictures.side;
    const span = (i) => `${whole(Math.ceil(i * each))}–${whole(Math.max(Math.ceil(i * each), Math.ceil((i + 1) * each) - 1))}`;
    showHint(event, `From tokens ${span(r)}\nto tokens ${span(c)}: ${percent(massOf(shade), massOf(shade) < 0.1 ? 1 : 0)}`);
  });
  canvas.addEventListener("pointerleave", hideHint);
  watch("head", loadPicture);
  watch("theme", drawPicture);
  new ResizeObserver(drawPicture).observe(canvas.parentElement);
}
