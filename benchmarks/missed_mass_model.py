"""What a selector misses of all heads of SmolLM2-135M at 4096 tokens, against the model's dense forward.

The gate: at 256 tokens, the missed mass of every head equals that from the weights which transformers' eager
attention returns. "sparse" is the forward pass that reads only what the selector chooses. None of them makes
logits. Peak memory is that of a process of its own for each, with the model loaded before counting begins.
"""

import subprocess
import sys
from pathlib import Path

import torch
from _harness import arguments, begin, interleave, report, save

import polyhead as ph
from polyhead.attend.selectors import choose
from polyhead.tasks import held_out_text, sample_text

TIME = 3.0
OWN = ph.select(ph.mean_keys(), ph.keep_share(0.1), rows=128, cols=64, always=ph.sink(1) | ph.window(63))


def loaded():
    return ph.hf.load("smollm2")


def ids(tokenizer, length):
    text = sample_text() + held_out_text()
    found = tokenizer(text, verbose=False)["input_ids"][:length]
    if len(found) < length:
        raise SystemExit(f"the texts have {len(found)} tokens; --length must be at most that")
    return torch.tensor([found])


@torch.no_grad()
def dense(model, x):
    model.base_model(x, use_cache=False)


def sparse(model, x):
    with ph.sparse(model, OWN):
        dense(model, x)


def missed(model, x):
    ph.heads.missed_mass(model, text=x, select=OWN)


CALLS = {"dense": dense, "missed mass": missed, "sparse": sparse}


@torch.no_grad()
def gate(model, tokenizer):
    """The missed mass of every head from materialised weights."""
    x = ids(tokenizer, 256)
    own = ph.select(ph.mean_keys(), ph.keep_share(0.25), rows=32, cols=16)
    found = ph.heads.missed_mass(model, text=x, select=own).mass
    choices = []

    def note(call):
        choices.append(choose(own, call.q, call.k, call.mask, call.scale))
        return call.proceed()

    with ph.attach(model, handler=note):
        dense(model, x)
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    weights = model.base_model(x, use_cache=False, output_attentions=True).attentions
    model.set_attn_implementation(before)
    heads, i = torch.arange(weights[0].shape[1]), torch.arange(256)
    for layer, (w, choice) in enumerate(zip(weights, choices, strict=True)):
        read = choice.allowed(torch.zeros(1, 1, 1, 1, dtype=torch.int64), heads[:, None, None], i[:, None], i)
        mass = w.double().masked_fill(read, 0.0).sum(-1).mean(-1)[0]
        torch.testing.assert_close(torch.tensor(found[layer]), mass, rtol=1e-3, atol=1e-4)
    print("gate: the missed mass of all heads equals that of materialised weights")


def peak(name, length, threads):
    """MiB of resident memory at the highest, in a process of its own; what loading took is not counted."""
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import torch, missed_mass_model as m\n"
        "from profile_model import forget_peak, highest\n"
        f"torch.set_num_threads({threads}); model, tokenizer = m.loaded(); x = m.ids(tokenizer, {length})\n"
        f"forget_peak(); m.CALLS[{name!r}](model, x); print(highest())"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=root)
    return float(done.stdout.split()[-1])


def main():
    parser = arguments(__doc__, repeats=3)
    parser.add_argument("--length", type=int, default=4096)
    options = begin(parser)
    model, tokenizer = loaded()
    gate(model, tokenizer)
    x = ids(tokenizer, options.length)
    calls = {name: lambda call=call: call(model, x) for name, call in CALLS.items()}
    title = f"SmolLM2-135M, {options.length} tokens"
    times = report(title, interleave(calls, options.repeats), "dense")
    slower = {name: 1 / ratio for name, ratio in times["ratio"].items()}
    print("  time against dense: " + ", ".join(f"{name} {r:.2f} x" for name, r in slower.items()))
    reached = slower["missed mass"] <= TIME
    print(f"  aim: missed mass at most {TIME:g} x: {'reached' if reached else 'MISSED'}")
    peaks = {name: peak(name, options.length, torch.get_num_threads()) for name in CALLS}
    for name, mib in peaks.items():
        print(f"  {name:20} peak {mib:7.0f} MiB, {mib / peaks['dense']:.2f} x dense")
    save(options, [times, {"title": "peak MiB", "peak": peaks}])


if __name__ == "__main__":
    main()
