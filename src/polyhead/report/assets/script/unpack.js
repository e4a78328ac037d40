// The packed parts, unpacked one head at a time: see polyhead/report/packing.py for the layout.

async function inflate(base64) {
  if (typeof DecompressionStream === "undefined") throw new Error("this browser cannot unpack the data; use one from 2023 or later");
  const bytes = Uint8Array.from(atob(base64), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

// One byte a cell, row by row; shade 0..127 on a log scale.
const SHADES = 127, FLOOR = 999;
const massOf = (shade) => Math.expm1((shade / SHADES) * Math.log1p(FLOOR)) / FLOOR;
const shadeOf = (mass) => (SHADES * Math.log1p(FLOOR * mass)) / Math.log1p(FLOOR);

async function unpackPicture(head) {
  const { side, causal, packed } = pictures;
  const cells = await inflate(packed[head.layer][head.head]);
  if (!causal) return cells;
  const picture = new Uint8Array(side * side).fill(255); // 255: no such pair
  let at = 0;
  for (let r = 0; r < side; r += 1) for (let c = 0; c <= r; c += 1) picture[r * side + c] = cells[at++];
  return picture;
}

async function unpackLookups(head) {
  const { k, queries, packed } = lookups;
  const n = queries.length;
  const bytes = await inflate(packed[head.layer][head.head]);
  const positions = new Uint16Array(n * k), weights = new Float32Array(n * k);
  for (let slot = 0; slot < k; slot += 1) {
    const low = 3 * slot * n, high = low + n, shade = high + n;
    for (let i = 0; i < n; i += 1) {
      const stored = bytes[low + i] | (bytes[high + i] << 8);
      positions[i * k + slot] = slot === 0 ? stored : queries[i] - stored; // modulo 65536
      weights[i * k + slot] = (bytes[shade + i] / 255) ** 2;
    }
  }
  return { positions, weights };
}
