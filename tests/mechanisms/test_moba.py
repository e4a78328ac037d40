"""What must hold of mixture of block attention."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.masks import Chosen
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn import rope

F64 = {"dtype": torch.float64}
X = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()


def built(name: str = "moba", **options: Any) -> Any:
    small = {"block_size": 4, "top_k": 3} if name == "moba" else {}
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **small, **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = built("grouped_query", kv_heads=module.kv_heads, **options)
    plain.load_state_dict(module.state_dict())
    return plain


def index_of(module: Any, x: Tensor = X) -> Tensor:
    """The blocks that are read, `(B, H, L, K)`, -1 for none."""
    q, (k, _) = module._queries(x, 0), module._rows(x, 0)
    found = choose(module.select(), q, k, CAUSAL, 1.0)
    assert isinstance(found, Chosen)
    return found.index


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4, "top_k": 2, "kv_heads": 2, "compiled": True},
        {"block_size": 1, "top_k": 2},
        {"block_size": 3, "top_k": 1, "bias": True},
    ],
    ids=str,
)
def test_small_blocks_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules("moba", **options)


def test_enough_blocks_are_plain_attention_and_the_weights_are_the_same() -> None:
    for options in ({"top_k": 10}, {"top_k": 99}, {"block_size": 37, "top_k": 1}, {"block_size": 512}):
        module = built(kv_heads=2, position=rope(100.0), **options)
        close(module(X, mask=CAUSAL), plain_of(module, position=rope(100.0))(X, mask=CAUSAL))
    module, plain = built(top_k=9), built("mha")
    module.load_state_dict(plain.state_dict())
    plain.load_state_dict(module.state_dict())
    assert (module(X, mask=CAUSAL) - plain(X, mask=CAUSAL)).abs().max() > 1e-3


def test_one_block_is_attention_within_blocks() -> None:
    module = built(top_k=1)
    close(module(X, mask=CAUSAL), plain_of(module, mask=ph.blocks(4))(X, mask=CAUSAL))


def test_a_query_reads_its_own_block_and_as_many_earlier_ones_as_there_are() -> None:
    index = index_of(built(kv_heads=2))
    own = torch.arange(37) // 4
    assert torch.equal((index >= 0).sum(-1), (own + 1).clamp(max=3).expand(2, 4, -1))
    assert torch.equal(index.amax(-1), own.expand(2, 4, -1))
    heads = index.sort(-1).values
    assert (heads[:, 0] != heads[:, 1]).any()  # heads of one group choose for themselves


def test_it_is_the_best_blocks_that_are_read() -> None:
    module = built()
    q, (k, _) = module._queries(X, 0), module._rows(X, 0)
    scores = q @ torch.stack([part.mean(2) for part in k.split(4, dim=2)], dim=2).mT
    scores = scores.masked_fill(torch.arange(10) >= (torch.arange(37) // 4)[:, None], -torch.inf)
    scores[..., torch.arange(37), torch.arange(37) // 4] = torch.inf
    best = scores.topk(3).indices[:, :, 8:].sort(-1).values
    assert torch.equal(index_of(module)[:, :, 8:].sort(-1).values, best)


def test_later_tokens_have_no_part_in_a_choice() -> None:
    """Whatever comes after t, and however much of t's own block is there: output t stays what it was."""
    module = built(kv_heads=2, position=rope(100.0))
    loud = X.clone()
    with torch.no_grad():
        whole, index = module(X, mask=CAUSAL), index_of(module)
        for t in range(37):
            close(module(X[:, : t + 1], mask=CAUSAL), whole[:, : t + 1])
            loud.copy_(X)
            loud[:, t + 1 :] = 100 * torch.randn_like(loud[:, t + 1 :])
            close(module(loud, mask=CAUSAL)[:, : t + 1], whole[:, : t + 1])
            assert torch.equal(index_of(module, loud)[:, :, : t + 1], index[:, :, : t + 1])


def test_the_own_block_has_to_be_forced_for_that() -> None:
    free = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=1, cols=4)
    module = built("mha", select=free)
    loud = X.clone()
    loud[:, 14:] = 100 * torch.randn_like(loud[:, 14:])
    with torch.no_grad():
        moved = (module(loud, mask=CAUSAL) - module(X, mask=CAUSAL))[:, :14].abs().amax((0, 2))
    assert moved[:12].max() <= 1e-12
    assert moved[12:].max() > 1e-3  # the mean of tokens 12 to 15 holds 14 and 15


def test_own_and_earlier_blocks_apart_joined_by_their_masses_are_the_same() -> None:
    """The efficient form: causal attention within blocks, dense attention to each chosen one, one softmax."""
    module = built(kv_heads=2)
    q, (k, v) = module._queries(X, 0), module._rows(X, 0)
    index = index_of(module)
    outs, masses = zip(
        *(
            ph.attend(q, k, v, mask=mask, return_lse=True)
            for mask in (
                CAUSAL & ph.blocks(4),
                *(ph.chosen(_past(index[..., n : n + 1]), rows=1, cols=4) for n in range(index.shape[-1])),
            )
        ),
        strict=True,
    )
    shares = torch.stack(masses).softmax(0)[..., None]
    close(module.output((torch.stack(outs) * shares).sum(0)), module(X, mask=CAUSAL))


def _past(index: Tensor) -> Tensor:
    own = (torch.arange(index.shape[2]) // 4)[:, None]
    return index.masked_fill(index == own, -1)


def test_padding_has_no_part_in_a_mean() -> None:
    """Two of four keys of block 0 are padding; the mean of the other two decides."""
    module = built(heads=1, head_dim=2, dim=2, block_size=4, top_k=2)
    with torch.no_grad():
        for part in (module.projection.query, module.projection.key):
            part.weight.copy_(torch.eye(2))
            part.bias = torch.nn.Parameter(torch.zeros(2, **F64))
        module.projection.key.bias.copy_(torch.tensor([-3.0, 0.0]))  # which a padded key has too
    x = torch.tensor([[5.0, 0.0]] * 4 + [[4.5, 0.0]] * 4 + [[1.0, 0.0]], **F64)[None]
    real = torch.ones(1, 9, dtype=torch.bool)
    real[0, :2] = False
    mask = CAUSAL & ph.padding(real)
    padded = x.masked_fill(~real[..., None], 0.0)
    q, (k, _) = module._queries(padded, 0), module._rows(padded, 0)
    chosen = choose(module.select(), q, k, mask, 1.0)
    assert isinstance(chosen, Chosen)
    assert chosen.index[0, 0, 8].tolist() == [0, 2]  # with padding in its mean block 0 would have lost
    assert choose(module.select(), q, k, CAUSAL, 1.0).index[0, 0, 8].tolist() == [1, 2]  # type: ignore[attr-defined]


def test_attention_learns_through_what_is_read_alone() -> None:
    module = built(heads=1, top_k=2)
    x = X[:1].clone().requires_grad_()
    (flow,) = torch.autograd.grad(module(x, mask=CAUSAL)[0, 36].sum(), x)
    read = set(index_of(module, x.detach())[0, 0, 36].tolist())
    moved = flow[0].abs().sum(-1) > 0
    assert {t // 4 for t in moved.nonzero().view(-1).tolist()} == read


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        (
            {"select": ph.select(ph.mean_keys(), ph.keep_blocks(1))},
            "select must be None in moba: what is read is what block_size= and top_k= say",
        ),
        ({"mask": ph.window(3)}, "mask must be None: calls are causal"),
        ({"block_size": 0}, "block_size must be at least 1; got 0"),
        ({"top_k": 1.5}, "top_k must be an integer"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    module = built()
    packed = CAUSAL & ph.documents(torch.arange(37) // 20)
    with pytest.raises(UnsupportedPattern, match="moba does not support a mask other than causal"):
        module(X, mask=packed)
    with pytest.raises(UnsupportedPattern, match=r"what comes later; pass mask=causal\(\)"):
        module(X)
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module.new_context_cache(X)


def test_it_costs_the_parameters_and_the_cache_of_plain_attention() -> None:
    own, plain = built(kv_heads=2).cost(64), built("grouped_query", kv_heads=2).cost(64)
    assert own.scores > plain.scores  # the means are scored besides
    assert dataclasses.replace(own, scores=plain.scores) == plain
