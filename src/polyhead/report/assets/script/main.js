// Start: build the parts, choose the first head, keep the address and the parts in step.

function headFromAddress() {
  const match = /head=(\d+)\.(\d+)/.exec(location.hash);
  const [layer, head] = match ? [Number(match[1]), Number(match[2])] : [];
  return match && layer < model.heads.length && head < model.heads[layer] ? headAt(layer, head) : null;
}

// The head worth opening with: the best retriever, else the clearest of the rarest role.
function firstHead() {
  const best = (list, name) => {
    const m = measures.get(name);
    return m ? list.reduce((a, b) => ((m.flat[b.index] ?? -1) > (m.flat[a.index] ?? -1) ? b : a)) : list[0];
  };
  for (const [role, name] of [["retrieval", "retrieval"], ["induction", "induction"], ["previous token", "previous_token"]]) {
    const list = heads.filter((h) => h.role === role);
    if (list.length) return best(list, name);
  }
  return heads[0];
}

function startPicker() {
  const pick = () => {
    const layer = Math.min(model.heads.length - 1, Math.max(0, Math.trunc($("pick-layer").value) || 0));
    const head = Math.min(model.heads[layer] - 1, Math.max(0, Math.trunc($("pick-head").value) || 0));
    set("head", headAt(layer, head));
    $("pick-layer").value = layer;
    $("pick-head").value = head;
  };
  $("picker").addEventListener("change", pick);
  $("picker").addEventListener("submit", (event) => { event.preventDefault(); pick(); });
}

async function copyPython() {
  const words = $("python").textContent;
  try {
    await navigator.clipboard.writeText(words);
  } catch {
    // pages from a disk may not be allowed to write: select it, so that one key copies it
    getSelection().selectAllChildren($("python"));
    document.execCommand("copy");
  }
  $("copy").textContent = "Copied";
  setTimeout(() => { $("copy").textContent = "Copy"; }, 1600);
}

function saveData() {
  const address = URL.createObjectURL(new Blob([$("data").textContent], { type: "application/json" }));
  make("a", { href: address, download: "report.json" }).click();
  setTimeout(() => URL.revokeObjectURL(address), 1000);
}

readPalette();
startMap();
startPicture();
startCard();
startText();
startSavings();
startPicker();
watch("head", (h) => {
  try { history.replaceState(null, "", `#head=${h.layer}.${h.head}`); } catch { /* a sandboxed frame: the address stays */ }
});
$("copy")?.addEventListener("click", copyPython);
$("save").addEventListener("click", saveData);
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readPalette(); set("theme", state.theme + 1); });
addEventListener("hashchange", () => { const h = headFromAddress(); if (h) set("head", h); });
drawMap();
set("head", headFromAddress() || firstHead());
document.body.dataset.ready = "yes";
