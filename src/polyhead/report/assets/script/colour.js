// Colours, read from the style sheet so that light and dark need no second list.

let palette = null;

function readPalette() {
  const style = getComputedStyle(document.documentElement);
  const get = (name) => style.getPropertyValue(name).trim();
  const rgb = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
  const stops = [];
  for (let i = 0; get(`--ramp-${i}`); i += 1) stops.push(rgb(get(`--ramp-${i}`)));
  const ramp = Array.from({ length: 256 }, (_, i) => {
    const at = (i / 255) * (stops.length - 1);
    const k = Math.min(stops.length - 2, Math.floor(at));
    return stops[k].map((c, j) => Math.round(c + (stops[k + 1][j] - c) * (at - k)));
  });
  palette = {
    ramp,
    role: Object.fromEntries(ROLE_NAMES.map((r) => [r, get(roleVariable(r))])),
    paper: get("--paper"), panel: get("--panel"), sunk: get("--sunk"), ink: get("--ink"),
    soft: get("--soft"), line: get("--line"), accent: get("--accent"), look: get("--look"), chance: get("--chance"),
  };
}

// colour of a share 0..1 of the ramp
const rampColour = (share) => `rgb(${palette.ramp[Math.round(255 * Math.min(1, Math.max(0, share)))].join(" ")})`;
const rampGradient = () => `linear-gradient(90deg, ${palette.ramp.filter((_, i) => i % 15 === 0).map((c) => `rgb(${c.join(" ")})`).join(",")})`;

// ink that reads on a colour
function inkOn(hex) {
  const [r, g, b] = [1, 3, 5].map((i) => (parseInt(hex.slice(i, i + 2), 16) / 255) ** 2.2);
  return 0.2126 * r + 0.7152 * g + 0.0722 * b > 0.24 ? "rgb(0 0 0 / .72)" : "rgb(255 255 255 / .92)";
}

// The range that the colours of a measurement span. A few far outliers do not flatten all the rest.
function domain(measure) {
  const s = measure.sorted;
  if (!s.length) return { low: 0, high: 1, cutLow: false, cutHigh: false };
  const at = (q) => s[Math.round(q * (s.length - 1))];
  let [low, high] = [s[0], s[s.length - 1]];
  const [a, b] = [at(0.02), at(0.98)];
  const room = 1.5 * (b - a);
  const cutHigh = b > a && high - b > room;
  const cutLow = b > a && a - low > room;
  if (cutHigh) high = b;
  if (cutLow) low = a;
  if (measure.unit === "share" && low < 0.35 * high) low = 0;
  return { low, high, cutLow, cutHigh };
}
