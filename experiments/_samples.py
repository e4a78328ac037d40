"""Texts whose last tokens tell how much of what came before was read."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from polyhead.cache import duo
from polyhead.tasks import held_out_text


def prose_and_passkeys(
    tokenizer: Any, prose: Tensor, *, length: int, last: int, seed: int
) -> dict[str, duo.Sample]:
    """The first tokens of `prose`, of which the `last` ones count, and passkeys whose answers count."""
    ids = prose[None, :length]
    counted = torch.zeros_like(ids, dtype=torch.bool)
    counted[0, -last - 1 : -1] = True
    found = duo.passkeys(tokenizer, held_out_text(), length=length, count=2, words=4, seed=seed)
    return {"prose": duo.Sample(ids, counted), "passkeys": next(found)}
