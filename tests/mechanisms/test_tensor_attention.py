"""What must hold of attention to tuples of tokens."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.attend import kronecker
from polyhead.attend.kronecker import kronecker_attend
from polyhead.attend.kronecker_taylor import kronecker_taylor
from polyhead.attend.masks import densify
from polyhead.attend.masks.tuples import TupleRows
from polyhead.errors import ConfigError, ShapeError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "tensor_attention", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 16, "heads": 2, **config}, **F64).eval()


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def drawn(count: int, length: int = 7, width: int = 4, heads: int = 2, seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, heads, length, width, generator=generator, **F64) for _ in range(count)]


def explicit(q: torch.Tensor, k1: torch.Tensor, k2: torch.Tensor, v1: torch.Tensor, v2: torch.Tensor,
             seen: torch.Tensor | None = None) -> torch.Tensor:  # fmt: skip
    scores = torch.einsum("bhil,bhml,bhnl->bhimn", q, k1, k2) / q.shape[-1]
    if seen is not None:
        scores = scores.masked_fill(~(seen[..., :, None] & seen[..., None, :]), -torch.inf)
    weights = scores.flatten(-2).softmax(-1).nan_to_num().view_as(scores)
    return torch.einsum("bhimn,bhmd,bhnd->bhid", weights, v1, v2)


@pytest.mark.parametrize(
    ("options", "without"),
    [
        ({"order": 2, "kv_heads": 2, "bias": True}, ""),
        ({"order": 4, "scale": 0.3}, "equals_twin"),  # its longest calls have 127^4 tuples in the twin
        ({"kv_heads": 1, "qk_norm": True, "value_dim": 3}, ""),
    ],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, object], without: str) -> None:
    assert not broken_rules("tensor_attention", without=without, **options)


def test_rotary_encodings_turn_queries_and_every_key() -> None:
    module = built(position=ph.nn.rope())
    q = module.position.turn(module.projection.queries(X), 0)
    (k1, v1), (k2, v2) = module.projection.tuples(X)
    heads = explicit(q, module.position.turn(k1, 0), module.position.turn(k2, 0), v1, v2)
    close(module(X), module.output(heads))
    cache = module.new_cache(2)
    steps = [module(one, mask=ph.causal(), cache=cache) for one in X.split(1, dim=1)]
    close(torch.cat(steps, dim=1), module(X, mask=ph.causal()))


@pytest.mark.parametrize(
    "mask", [None, ph.causal(), ph.causal() & ph.window(2), ph.window(1, 1) | ph.sink(1)]
)
def test_it_is_the_sum_over_all_pairs(mask: ph.Mask | None) -> None:
    q, k1, k2, v1, v2 = drawn(5)
    seen = None if mask is None else densify(mask, queries=7, keys=7)
    close(kronecker_attend(q, (k1, k2), (v1, v2), mask=mask), explicit(q, k1, k2, v1, v2, seen))


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    q, k1, k2, v1, v2 = (t.requires_grad_() for t in drawn(5))
    mask = ph.documents(torch.tensor([-1, 0, 0, 0, -1, 0, 0]))
    out = kronecker_attend(q, (k1, k2), (v1, v2), mask=mask)
    assert out[:, :, [0, 4]].abs().max() == 0
    out.sum().backward()
    assert all(bool(torch.isfinite(t.grad).all()) for t in (q, k1, k2, v1, v2))


def test_ones_in_the_second_place_leave_softmax_attention() -> None:
    q, k1, _, v1, _ = drawn(5)
    ones = torch.ones_like(k1)
    close(kronecker_attend(q, (k1, ones), (v1, ones)), ph.attend(q, k1, v1, scale=1 / 4))
    close(kronecker_attend(q, (ones, k1), (ones, v1)), ph.attend(q, k1, v1, scale=1 / 4))


def test_places_can_be_exchanged() -> None:
    q, k1, k2, v1, v2 = drawn(5)
    mask = ph.causal()
    close(
        kronecker_attend(q, (k1, k2), (v1, v2), mask=mask), kronecker_attend(q, (k2, k1), (v2, v1), mask=mask)
    )


def test_weights_of_all_pairs_sum_to_one() -> None:
    q, k1, k2, v1, v2 = drawn(5)
    a, b = v1[:, :, :1].expand_as(v1), v2[:, :, :1].expand_as(v2)
    close(kronecker_attend(q, (k1, k2), (a, b)), (a * b))


@pytest.mark.parametrize("order", [3, 4])
def test_one_query_at_a_time_is_all_at_once(order: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, *both = (t.requires_grad_() for t in drawn(2 * order - 1))
    keys, values, mask = both[: order - 1], both[order - 1 :], ph.causal() & (ph.window(3) | ph.sink(1))
    found = []
    for most in (1 << 24, 1, 2 * 2 * 3 * 7 ** (order - 2) * 4):
        monkeypatch.setattr(kronecker, "_MOST", most)
        out = kronecker_attend(q, keys, values, mask=mask)
        found.append((out.detach(), *torch.autograd.grad(out.sin().sum(), (q, *both))))
        with torch.no_grad():
            close(kronecker_attend(q, keys, values, mask=mask), found[0][0])
    for other in found[1:]:
        for one, expected in zip(other, found[0], strict=True):
            close(one, expected)


def test_order_two_is_attention_with_a_scale_of_one_by_width() -> None:
    module, plain = built(order=2), built("mha")
    plain.load_state_dict(module.state_dict())
    plain.scale = 1 / 8
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_tiles_of_pair_rows_are_bounded_soundly() -> None:
    keys, rows = 6, 24
    for mask in (ph.causal(), ph.window(2, 1), ~ph.window(1, 0), ph.strided(2)):
        tuples = TupleRows(mask, torch.tensor(keys), torch.tensor(keys - rows), torch.tensor(2))
        pairs = densify(mask, queries=4, keys=keys)[0, 0]  # queries at 2..5
        want = (pairs[:, :, None] & pairs[:, None, :]).flatten(0, 1)
        dense = densify(tuples, queries=rows, keys=keys)[0, 0]
        assert torch.equal(dense, want)
        zero = torch.zeros((), dtype=torch.int64)
        for i0, j0 in itertools.product(range(0, rows, 5), range(keys)):
            i1, j1 = min(i0 + 4, rows - 1), min(j0 + 2, keys - 1)
            ends = [torch.tensor(n) for n in (i0 + keys - rows, i1 + keys - rows, j0, j1)]
            some, every = tuples.bounds(zero, zero, *ends)
            part = dense[i0 : i1 + 1, j0 : j1 + 1]
            assert bool(some) or not part.any()
            assert not bool(every) or part.all()


def test_the_polynomial_nears_the_softmax_with_its_degree_and_departs_with_the_logits() -> None:
    q, k1, k2, v1, v2 = drawn(5, length=12, width=3)

    def error(degree: int, size: float) -> float:
        exact = kronecker_attend(size * q, (k1, k2), (v1, v2))
        return (kronecker_taylor(size * q, (k1, k2), (v1, v2), degree=degree) - exact).abs().max().item()

    by_degree = [error(degree, 0.3) for degree in (0, 2, 4, 6)]
    assert by_degree == sorted(by_degree, reverse=True)
    assert by_degree[-1] < 1e-3 * by_degree[0]
    by_size = [error(4, size) for size in (0.05, 0.2, 0.8)]
    assert by_size == sorted(by_size)
    assert by_size[0] < 1e-6


def test_what_is_refused() -> None:
    q, k1, k2, v1, _ = drawn(5)
    with pytest.raises(ConfigError, match="as many tensors, at least one"):
        kronecker_attend(q, (k1, k2), (v1,))
    with pytest.raises(ShapeError, match="keys must be tensors"):
        kronecker_attend(q, (k1, k2[..., :2]), (v1, v1))
    with pytest.raises(ConfigError, match="mask must be a mask"):
        kronecker_attend(q, (k1,), (v1,), mask=torch.ones(7, 7))
    wide = torch.zeros(1, 1, 2, 64)
    with pytest.raises(ConfigError, match="make 814385 monomials, and at most 65536"):
        kronecker_taylor(wide, [wide], [wide], degree=4)
    for options, message in (
        ({"order": 1}, "order must be at least 2"),
        ({"score": ph.soft_cap(3.0)}, "score must be None over tuples"),
        ({"position": ph.nn.alibi_position()}, "position must not be a bias"),
        ({"normalizer": ph.sigmoid()}, r"normalizer must be softmax\(\)"),
        ({"kv_heads": 3}, "kv_heads must divide heads=2"),
    ):
        with pytest.raises(ConfigError, match=message):
            built(**options)


def test_one_head_tells_whether_two_others_complete_a_sum_of_zero() -> None:
    """Whether x_i + x_m + x_n = 0 (mod 5) for some m and n, of their cosines and sines."""
    angle = 2 * torch.pi * torch.arange(5, **F64) / 5
    c, s = angle.cos(), angle.sin()
    # the cosine of a sum of three angles is a sum of four products of three
    q, k1, k2 = torch.stack([c, -c, -s, -s], -1), torch.stack([c, s, c, s], -1), torch.stack([c, s, s, c], -1)
    x = torch.randint(5, (64, 4), generator=torch.Generator().manual_seed(0))
    q, k1, k2 = (table[x][:, None] for table in (q, k1, k2))
    cosine = (q * kronecker_attend(q, (k1, k2), (k1, k2), scale=200.0)).sum(-1)[:, 0]
    sums = x[:, :, None, None] + x[:, None, :, None] + x[:, None, None, :]
    expected = (sums % 5 == 0).flatten(2).any(-1)
    assert torch.equal(cosine > 0.99, expected)
    assert 0.1 < expected.double().mean() < 0.99
