"""What must hold of SF-Attn, in training and after it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError
from polyhead.mechanisms import configure
from polyhead.nn import rope, shifted_groups

F64 = {"dtype": torch.float64}
X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()
G = 8


def built(name: str = "sf_attn", **options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **options}, **F64).train()


def rolled(q: Tensor, k: Tensor, v: Tensor, size: int) -> Tensor:
    """S2-Attn as LongLoRA writes it: the second half of the heads rolled by half a group, and back."""
    half = q.shape[1] // 2

    def shift(x: Tensor, by: int) -> Tensor:
        return torch.cat([x[:, :half], x[:, half:].roll(by, dims=2)], 1)

    def cut(x: Tensor) -> Tensor:
        batch, heads, length, width = shift(x, -(size // 2)).shape
        return shift(x, -(size // 2)).view(batch, heads, length // size, size, width)

    scores = cut(q) @ cut(k).mT / q.shape[-1] ** 0.5
    ahead = torch.ones(size, size, dtype=torch.bool).triu(1)
    out = scores.masked_fill(ahead, -torch.inf).softmax(-1) @ cut(v)
    return shift(out.flatten(2, 3), size // 2)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"group": 7, "returned": 0.0, "sinks": 0},
        {"group": 6, "heads": 8, "kv_heads": 2, "returned": 0.3, "sinks": 3},
        {"group": 5, "heads": 1},
        {"group": 40, "returned": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=repr)
def test_training_equals_the_twin(options: dict[str, Any], mask: ph.Mask | None) -> None:
    module = built(**options)
    config = configure("sf_attn", **{"dim": 32, "heads": 4, **options})
    real = torch.arange(40) < torch.tensor([[40], [23]])
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    names = ("heads", "kv_heads", "group", "returned", "sinks")
    dense = None if mask is None else densify(mask, queries=40, keys=40)
    for padding in (None, real):
        wanted = ph.reference("sf_attn")(
            X,
            parameters=module.state_dict(),
            **{name: fields[name] for name in names},
            training=True,
            mask=dense,
            padding=padding,
        )
        found = module(X, mask=mask, padding=padding)
        rows = slice(None) if padding is None else padding
        close(found[rows], wanted[rows])


@pytest.mark.parametrize("sinks", [0, 4])
def test_one_group_is_plain_attention_and_so_is_evaluation(sinks: int) -> None:
    options: dict[str, Any] = {"kv_heads": 2, "position": rope(100.0)}
    plain, whole = built("grouped_query", **options), built(group=40, returned=1.0, sinks=sinks, **options)
    close(whole(X, mask=CAUSAL), plain(X, mask=CAUSAL))
    cut = built(group=G, sinks=sinks, **options)
    assert (cut(X, mask=CAUSAL) - plain(X, mask=CAUSAL)).abs().max() > 1e-3
    close(cut.eval()(X, mask=CAUSAL), plain(X, mask=CAUSAL))
    plain.load_state_dict(cut.state_dict())


def test_all_returned_and_no_sinks_is_attention_within_blocks() -> None:
    module, plain = built(group=G, returned=1.0, sinks=0), built("mha", mask=ph.blocks(G))
    close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


def test_none_returned_and_no_sinks_is_s2_attn_but_for_its_leak() -> None:
    """LongLoRA's shifted groups wrap round: tokens of the first half group see the end of the sequence."""
    module = built(group=G, returned=0.0, sinks=0)
    q, (k, v) = module._queries(X, 0), module._rows(X, 0)
    wrapped = module.output(rolled(q, k, v, G))
    found = module(X, mask=CAUSAL)
    close(found[:, G // 2 :], wrapped[:, G // 2 :])
    assert (found - wrapped)[:, : G // 2].abs().amax((0, 2)).min() > 1e-3
    late = X.clone()
    late[:, -1] += 1
    q2, (k2, v2) = module._queries(late, 0), module._rows(late, 0)
    leak = (rolled(q2, k2, v2, G) - rolled(q, k, v, G))[:, :, :-1].abs().amax((0, 1, 3))
    assert leak[: G // 2].min() > 1e-6
    assert leak[G // 2 :].max() == 0


@pytest.mark.parametrize("group", [None, G, 7], ids=str)
def test_no_later_token_has_a_part(group: int | None) -> None:
    module = built(group=group)
    late = X.clone()
    late[:, 21:] += 1
    close(module(late, mask=CAUSAL)[:, :21], module(X, mask=CAUSAL)[:, :21])


def test_every_head_sees_the_first_tokens_and_shares_are_as_said() -> None:
    dense = densify(CAUSAL & shifted_groups(G).pattern(8, 40), heads=8, queries=40, keys=40)[0]
    early = torch.ones(40, 4, dtype=torch.bool).tril()
    assert torch.equal(dense[:, :, :4], early.expand(8, -1, -1))
    assert dense[:, 19, 13].tolist() == [False] * 6 + [True] * 2  # half of the second half is shifted
    for heads, returned, shifted in ((8, 0.0, 4), (8, 1.0, 0), (20, 0.7, 3), (2, 0.5, 1), (1, 0.0, 0)):
        pattern = shifted_groups(G, returned=returned).pattern(heads, 40)
        own = densify(pattern, heads=heads, queries=40, keys=40)
        assert int(own.expand(-1, heads, -1, -1)[0, :, 19, 13].sum()) == shifted


def test_it_is_a_part_for_any_mechanism() -> None:
    part = shifted_groups(G, returned=0.0, sinks=2)
    module, own = built("talking_heads", regularizers=part), built(group=G, returned=0.0, sinks=2)
    late = X.clone()
    late[:, 4:8] += 1  # neither sinks nor in the group of what follows, but in shifted ones
    moved = (module(late, mask=CAUSAL) - module(X, mask=CAUSAL)).abs().amax((0, 2))
    assert moved[12:].max() <= 1e-12 < moved[8:12].min()
    with_part = built("mha", regularizers=part)
    close(with_part(X, mask=CAUSAL), own(X, mask=CAUSAL))


def test_what_is_wrong_is_said() -> None:
    for options, words in (
        ({"group": 0}, "shifted_groups: group must be at least 1; got 0"),
        ({"returned": 1.5}, "shifted_groups: returned must be .*1.5"),
        ({"sinks": -1}, "shifted_groups: sinks must be at least 0; got -1"),
        ({"kv_heads": 3}, "kv_heads must divide heads=4"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
