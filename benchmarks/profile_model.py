"""All measurements of all heads of SmolLM2-135M at 2048 tokens, against its plain SDPA forward.

The gate: at 256 tokens, the scores equal those from the weights that transformers' eager attention returns.
Peak memory is that of a process of its own for each, with the model loaded before counting begins. The plain
forward makes the logits of all positions, as a call of the model does; "without logits" is shown beside it.
"""

import subprocess
import sys
from pathlib import Path

import torch
from _harness import arguments, begin, interleave, report, save

import polyhead as ph
from polyhead.heads import MEASUREMENTS
from polyhead.tasks import sample_text

TIME, MEMORY = 2.5, 1.2


def loaded():
    return ph.hf.load("smollm2")


def ids(tokenizer, length):
    return torch.tensor([tokenizer(sample_text(), verbose=False)["input_ids"][:length]])


@torch.no_grad()
def plain(model, tokenizer, x):
    model(x, use_cache=False)


@torch.no_grad()
def headless(model, tokenizer, x):
    model.base_model(x, use_cache=False)


def profiled(model, tokenizer, x):
    ph.profile(model, tokenizer, x[0])


def from_text(model, tokenizer, x):
    names = [n for n, m in MEASUREMENTS.items() if m().source is None and "decoder" in m.kinds]
    ph.profile(model, tokenizer, x[0], measurements=names)


CALLS = {"plain": plain, "without logits": headless, "profile": profiled, "profile, text only": from_text}


def gate(model, tokenizer):
    """Entropy and first-token mass of every head from materialised weights."""
    x = ids(tokenizer, 256)
    found = ph.profile(model, tokenizer, x[0], measurements=["entropy", "sink"])
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model.base_model(x, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    for layer, w in enumerate(weights):
        w = w[0, :, 1:].double()
        entropy, sink = torch.special.entr(w).sum(-1).mean(-1), w[..., 0].mean(-1)
        torch.testing.assert_close(torch.tensor(found["entropy"][layer]), entropy, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(torch.tensor(found["sink"][layer]), sink, rtol=1e-3, atol=1e-4)
    print("gate: entropy and sink of all heads equal those of materialised weights")


def peak(name, length, threads):
    """MiB of resident memory at the highest, in a process of its own; what loading took is not counted."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import torch, profile_model as p\n"
        f"torch.set_num_threads({threads}); model, tokenizer = p.loaded(); x = p.ids(tokenizer, {length})\n"
        "p.forget_peak()\n"
        f"p.CALLS[{name!r}](model, tokenizer, x); print(p.highest())"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return float(done.stdout.split()[-1])


def forget_peak():
    """Begin counting at what is held now (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")


def highest():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM"))


def main():
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--length", type=int, default=2048)
    options = begin(parser)
    model, tokenizer = loaded()
    gate(model, tokenizer)
    x = ids(tokenizer, options.length)
    calls = {name: lambda call=call: call(model, tokenizer, x) for name, call in CALLS.items()}
    title = f"SmolLM2-135M, {options.length} tokens"
    times = report(title, interleave(calls, options.repeats), "plain")
    slower = {name: 1 / ratio for name, ratio in times["ratio"].items()}
    print("  time against plain: " + ", ".join(f"{name} {r:.2f} x" for name, r in slower.items()))
    print(f"  aim: profile at most {TIME} x: {'reached' if slower['profile'] <= TIME else 'MISSED'}")
    peaks = {name: peak(name, options.length, torch.get_num_threads()) for name in CALLS}
    for name, mib in peaks.items():
        print(f"  {name:20} peak {mib:7.0f} MiB, {mib / peaks['plain']:.2f} x plain")
    reached = peaks["profile"] <= MEMORY * peaks["plain"]
    print(f"  aim: profile at most {MEMORY} x its peak memory: {'reached' if reached else 'MISSED'}")
    save(options, [times, {"title": "peak MiB", "peak": peaks}])


if __name__ == "__main__":
    main()
