"use strict";
// what a row stands for, when it is pointed at or chosen, stands out in every drawing
const rows = [...document.querySelectorAll("tr[data-place]")];
let kept = null;
function light(place) {
  document.body.classList.toggle("lit", place !== null);
  for (const shape of document.querySelectorAll(".of")) {
    shape.classList.toggle("on", place !== null && shape.classList.contains("of-" + place));
  }
  for (const row of rows) row.classList.toggle("on", row.dataset.place === place);
}
for (const row of rows) {
  row.addEventListener("pointerenter", () => light(row.dataset.place));
  row.addEventListener("pointerleave", () => light(kept));
}
for (const button of document.querySelectorAll("button[data-place]")) {
  button.addEventListener("click", () => {
    kept = kept === button.dataset.place ? null : button.dataset.place;
    for (const other of document.querySelectorAll("button[data-place]")) {
      other.setAttribute("aria-pressed", String(other.dataset.place === kept));
    }
    light(kept);
  });
}
