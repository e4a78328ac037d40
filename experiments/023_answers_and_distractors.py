"""Differential attention: how much of what heads look at is the answer, and how much are distractors.

Two layers on recall, as the league trains them: plain attention; as many noise heads as signal heads, which
is the Differential Transformer; and one noise head for three signal heads. At every question, of the head of
the last layer that looks at answers most: the share of its weights, in absolute value, that lies on the value
that is asked for, and on the other pairs.

It shows what the papers say if the share of the answer is larger with noise heads than without.
"""

from __future__ import annotations

from _maps import maps_of
from _recall import TASK, accuracy, places, questions, trained
from _shared import main

KINDS = {
    "plain": "mha",
    "4 + 4": "grouped_differential:heads=4,noise_heads=4,head_dim=8",
    "6 + 2": "grouped_differential:heads=6,noise_heads=2,head_dim=8",
}


def run(seed: int) -> dict[str, float]:
    """Accuracy and shares of every kind."""
    found, batch = {}, questions()
    own, answer = places(batch)
    for name, contender in KINDS.items():
        model = trained(contender, seed)
        last = maps_of(model, lambda model=model: model(batch))[-1].abs()
        rows = last.gather(2, own[:, None, :, None].expand(-1, last.shape[1], -1, last.shape[3]))
        rows = rows / rows.sum(-1, keepdim=True)
        right = rows.gather(3, answer[:, None, :, None].expand(-1, rows.shape[1], -1, -1))[..., 0]
        head = int(right.mean((0, 2)).argmax())
        pairs = rows[:, head, :, : 2 * TASK.pairs].sum(-1)
        found |= {
            f"{name}: accuracy": accuracy(model),
            f"{name}: on the answer": float(right[:, head].mean()),
            f"{name}: on other pairs": float((pairs - right[:, head]).mean()),
        }
    return found


if __name__ == "__main__":
    measures = ("accuracy", "on the answer", "on other pairs")
    main(
        __doc__,
        run,
        {f"{k} - plain: {m}": (f"{k}: {m}", f"plain: {m}") for k in list(KINDS)[1:] for m in measures},
    )
