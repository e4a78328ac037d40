"""Prefill, decoding and peak memory of one method: `python -m polyhead.sparsify.timing`, told what by JSON.

Every measurement is a process of its own, so that memory means something and no one's leavings are in
another's way.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

from polyhead.errors import PolyheadError
from polyhead.sparsify.methods import find

__all__ = ["Round", "Taken", "measure"]


@dataclass(frozen=True)
class Taken:
    """What reading a text took.

    Attributes:
        prefill: seconds.
        step: seconds of a decoding step after it, the mean.
        peak: bytes at the most, beyond those with the model alone; None where the system does not say.
    """

    prefill: float
    step: float
    peak: int | None


@dataclass(frozen=True)
class Round:
    """What a method took, and what the dense model took just before."""

    own: Taken
    dense: Taken

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Round:
        """From what `to_json` gave."""
        return cls(Taken(**data["own"]), Taken(**data["dense"]))


def measure(model: str, method: str | None, level: float | None, *, length: int, steps: int) -> Taken:
    """Read `length` tokens and decode `steps` more, in a process of its own.

    Raises:
        PolyheadError: the process ended without an answer.
    """
    order = {"model": model, "method": method, "level": level, "length": length, "steps": steps}
    done = subprocess.run(
        [sys.executable, "-P", "-m", "polyhead.sparsify.timing"],
        input=json.dumps(order),
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(os.path.abspath(p or ".") for p in sys.path)},
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PolyheadError(f"timing of {method or 'the model as it is'} failed: {last}")
    return Taken(**json.loads(done.stdout.strip().splitlines()[-1]))


def _taken(model: str, method: str | None, level: float | None, length: int, steps: int) -> Taken:
    import torch
    from transformers import DynamicCache

    from polyhead import hf
    from polyhead.memory import Peak
    from polyhead.sparsify.reading import Case, reading
    from polyhead.tasks import sample_text
    from polyhead.tasks.reading import encode, evaluating

    loaded, tokenizer = hf.load(model, announce=lambda _: None)
    ids = encode(tokenizer, sample_text())
    ids = ids.repeat(-(-length // len(ids)))[None, :length]

    def run(text: torch.Tensor, count: int) -> tuple[float, float]:
        own = None
        if method is not None and level is not None:
            own = find(method).reader(level, Case.of(loaded, text.shape[1]))
        with evaluating(loaded), nullcontext() if own is None else reading(loaded, own):
            cache = DynamicCache(config=loaded.config)
            start = time.perf_counter()
            loaded.base_model(text, past_key_values=cache, use_cache=True)
            read = time.perf_counter()
            token = text[:, -1:]
            for _ in range(count):
                token = loaded(token, past_key_values=cache, use_cache=True).logits[:, -1:].argmax(-1)
            return read - start, (time.perf_counter() - read) / count

    run(ids[:, : min(512, length)], 2)
    peak = Peak()
    prefill, step = run(ids, steps)
    return Taken(prefill, step, peak.most())


def main() -> None:
    """Read an order, carry it out, answer."""
    order: dict[str, Any] = json.loads(sys.stdin.read())
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not stand in the answer
    answers.write(json.dumps(asdict(_taken(**order))) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
