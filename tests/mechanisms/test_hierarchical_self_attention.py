"""What must hold of hierarchical self-attention."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn.hierarchical import HierarchicalAttention, tree_widths
from polyhead.reference.hierarchical_self_attention import leaves, row, windows

F64 = {"dtype": torch.float64}
NAME = "hierarchical_self_attention"
X = torch.randn(2, 13, 32, generator=torch.Generator().manual_seed(0), **F64)
TREE = (((0, 1), 2), (3, (4, 5, 6)), 7)


def built(**config: Any) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(NAME, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def drawn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), **F64)


def weights(q: Tensor, k: Tensor, tree: Any, *, before: bool = False) -> Tensor:
    """All weights `(n, n)` of one head on a tree."""
    known: dict[Any, Tensor] = {}
    return torch.cat([row(q[None], k[None], tree, i, before, known) for i in range(len(q))])


def blocks(tree: Any) -> list[tuple[list[int], list[int]]]:
    """All pairs of sibling subtrees, as leaves."""
    if isinstance(tree, int):
        return [([tree], [tree])]
    pairs = [(leaves(b), leaves(c)) for b, c in itertools.permutations(tree, 2)]
    return pairs + [pair for child in tree for pair in blocks(child)]


def divergence(p: Tensor, flat: Tensor) -> Tensor:
    return (p * (p / flat).log()).sum()


@pytest.mark.parametrize(
    "options",
    [{"kv_heads": 2, "branch": 2}, {"levels": 1, "branch": 3}, {"levels": 0, "value_dim": 5}],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, Any]) -> None:
    assert broken_rules(NAME, **options) == {}


@pytest.mark.parametrize("mask", [None, ph.causal()], ids=str)
def test_siblings_alone_are_softmax_attention(mask: Any) -> None:
    plain = ph.build("mha", dim=32, heads=4, position=ph.nn.rope(), **F64)
    for options in ({"levels": 0}, {"branch": 13}):
        module = built(position=ph.nn.rope(), **options)
        plain.load_state_dict(module.state_dict())
        torch.testing.assert_close(module(X, mask=mask), plain(X, mask=mask))


def test_weights_are_those_of_blocks() -> None:
    found = weights(drawn(8, 4), drawn(8, 4).flip(0), TREE)
    torch.testing.assert_close(found.sum(1), torch.ones(8, **F64))
    assert (found > 0).all()
    for b, c in blocks(TREE):
        block = found[b][:, c]
        torch.testing.assert_close(block, block[:1, :1].expand_as(block))


def test_no_other_weights_of_blocks_are_nearer_to_softmax() -> None:
    """The problem is convex: its least point is where the gradient is a sum of those of the constraints."""
    q, k = drawn(8, 4), 2 * drawn(8, 4).flip(0)
    flat = (q @ k.T / 2).softmax(-1)
    pairs = blocks(TREE)
    patterns = torch.zeros(len(pairs), 8, 8, **F64)
    for pattern, (b, c) in zip(patterns, pairs, strict=True):
        pattern[torch.tensor(b)[:, None], torch.tensor(c)] = 1
    found = weights(q, k, TREE)
    own = torch.stack([found[b[0], c[0]] for b, c in pairs]).requires_grad_()
    of_blocks = torch.einsum("n,nij->ij", own, patterns)
    torch.testing.assert_close(of_blocks.detach(), found)
    (slope,) = torch.autograd.grad(divergence(of_blocks, flat), own)
    limits = patterns.sum(2)  # blocks × rows: what a block adds to the sum of a row
    solved = torch.linalg.lstsq(limits, slope[:, None], driver="gelsd").solution
    torch.testing.assert_close(limits @ solved, slope[:, None])

    averaged = torch.zeros(8, 8, **F64)
    for pattern in patterns:
        averaged += pattern * (flat * pattern).sum() / pattern.sum()
    averaged /= averaged.sum(1, keepdim=True)
    assert divergence(found, flat) < divergence(averaged, flat)


def test_what_is_alike_within_subtrees_is_softmax() -> None:
    tree = ((0, 1), (2, 3, 4), (5, 6, 7))
    of = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2])
    q, k = drawn(3, 4)[of], drawn(3, 4).flip(0)[of]
    torch.testing.assert_close(weights(q, k, tree), (q @ k.T / 2).softmax(-1))


def test_siblings_may_change_places() -> None:
    module = built(branch=3)
    order = torch.tensor([3, 4, 5, 2, 0, 1, 6, 8, 7])  # windows of nine: nodes, and leaves within them
    torch.testing.assert_close(module(X[:, :9][:, order]), module(X[:, :9])[:, order])
    moved = torch.tensor([3, 1, 2, 0, 4, 5, 6, 7, 8])
    assert (module(X[:, :9][:, moved]) - module(X[:, :9])[:, moved]).abs().max() > 1e-3


def test_a_causal_row_is_the_last_of_a_tree_that_ends_with_it() -> None:
    module = built(branch=2)
    found = module(X, mask=ph.causal())
    for n in (1, 4, 7, 13):
        torch.testing.assert_close(found[:, n - 1], module(X[:, :n], mask=ph.causal())[:, -1])
    q, k = drawn(7, 4), drawn(7, 4).flip(0)
    tree = windows(list(range(7)), 2, None)
    rows = weights(q, k, tree, before=True)
    torch.testing.assert_close(rows.sum(1), torch.ones(7, **F64))
    assert rows.triu(1).abs().max() == 0


def test_the_work_grows_as_the_length() -> None:
    module = ph.build(NAME, dim=64, heads=2, device="meta")
    long, double = (module.cost(n).scores for n in (1 << 16, 1 << 17))
    assert double == pytest.approx(2 * long, rel=1e-3)
    assert long / ph.build("mha", dim=64, heads=2, device="meta").cost(1 << 16).scores < 6 / (1 << 16)
    assert tree_widths(100, 4, None) == [(25, 4), (7, 4), (2, 4), (1, 2)]
    assert tree_widths(100, 4, 1) == [(25, 4), (1, 25)]


@pytest.mark.parametrize("mask", [None, ph.causal()], ids=str)
def test_long_sequences_in_single_precision(mask: Any) -> None:
    module = built()
    x = drawn(1, 3000, 32)
    with torch.no_grad():
        want = module(x, mask=mask)
        found = module.float()(x.float(), mask=mask)
    torch.testing.assert_close(found.double(), want, rtol=0, atol=1e-5)


def test_an_item_of_padding_alone_harms_nothing() -> None:
    module = built()
    real = torch.ones(2, 13, dtype=torch.bool)
    real[1] = False
    x = X.clone().requires_grad_()
    found = module(x, padding=real, mask=ph.causal())
    found.sum().backward()
    assert torch.isfinite(found).all()
    assert torch.isfinite(x.grad).all()
    torch.testing.assert_close(found[:1], module(X[:1], mask=ph.causal()))


def test_what_is_not_allowed() -> None:
    assert isinstance(built(), HierarchicalAttention)
    for options, message in (
        ({"branch": 1}, "branch must be .* 2"),
        ({"levels": -1}, "levels"),
        ({"kv_heads": 3}, "allowed are 1, 2, 4"),
        ({"position": ph.nn.alibi_position()}, r"position must not be a bias of scores.*rope\(\)"),
    ):
        with pytest.raises((ConfigError, ph.PolyheadError), match=message):
            built(**options)
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        built().new_context_cache(X)
    module = built()
    cache = module.new_cache(len(X))
    with pytest.raises(UnsupportedPattern, match=r"a mask other than causal\(\), .* got window\(2\)"):
        module(X, mask=ph.window(2), cache=cache)
    assert cache.length == 0
    assert math.isfinite(built()(X[:, :1]).sum().item())
