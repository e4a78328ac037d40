"""Near keys only or all: by the mass that far keys are taken to hold."""

from __future__ import annotations

import math
from importlib import import_module

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.operands import tensors
from polyhead.attend.masks import densify
from polyhead.attend.selectors import Grid, NearOrAll, Selector, choose
from polyhead.errors import ConfigError, ShapeError

# batch, heads, key/value heads, queries, keys, cols
SHAPES = [(2, 4, 2, 50, 50, 1), (1, 2, 1, 37, 61, 8), (1, 2, 2, 70, 70, 16), (2, 2, 2, 1, 70, 8)]


def moments(k: Tensor) -> ph.KeyGaussian:
    """Of all keys."""
    flat = k.transpose(0, 1).flatten(1, 2)
    away = flat - flat.mean(1, keepdim=True)
    return ph.KeyGaussian(flat.mean(1), away.mT @ away / flat.shape[1])


def pairs(selector: Selector, q: Tensor, k: Tensor, mask: ph.Mask | None = None) -> Tensor:
    """Which pairs of the past are read: bool (B, H, L, S)."""
    mask = ph.causal() if mask is None else mask
    found = choose(selector, q, k, mask, q.shape[-1] ** -0.5)
    batch, heads, queries, keys = *q.shape[:3], k.shape[2]
    return densify(found & mask, batch=batch, heads=heads, queries=queries, keys=keys).expand(
        batch, heads, queries, keys
    )


def shares(selector: Selector, q: Tensor, k: Tensor, mask: ph.Mask | None = None) -> Tensor:
    assert isinstance(selector, NearOrAll)
    grid = Grid(
        q.shape[0], q.shape[1], k.shape[1], q.shape[2], k.shape[2], 1, selector.cols, q.shape[-1] ** -0.5
    )
    return selector.shares(q, k, ph.causal() if mask is None else mask, grid)(0, q.shape[2])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", ["near", "given", "exact"])
def test_equals_its_twin(shape: tuple[int, ...], kind: str) -> None:
    *sizes, cols = shape
    q, k, _ = tensors(*sizes)
    own = moments(k)
    far = {"near": ph.NearGaussian(), "given": own, "exact": ph.ExactFar()}[kind]
    more = {"mean": own.mean, "covariance": own.covariance} if kind == "given" else {"exact": kind == "exact"}
    for first, nearest in ((3, 9), (0, 1), (20, 30)):
        selector = ph.qada(0.55, far, first=first, nearest=nearest, cols=cols)
        expected, read = ph.reference("qada")(q, k, tau=0.55, first=first, nearest=nearest, cols=cols, **more)
        torch.testing.assert_close(shares(selector, q, k), expected)
        assert torch.equal(pairs(selector, q, k), read)
        # far keys are read by some queries, and with nine near ones left out by others
        assert bool((expected < 0.55).any()) == (nearest < 30)
        left_out = (expected >= 0.55) & (expected < 1)
        assert nearest != 9 or sizes[3] == 1 or left_out.any()


def test_bands_and_strips_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, _ = tensors(2, 4, 2, 90, 90)
    selector = ph.qada(0.5, first=2, nearest=20, cols=8)
    whole = pairs(selector, q, k)
    monkeypatch.setattr(import_module("polyhead.attend.selectors.choice"), "_HELD", 100)
    monkeypatch.setattr(import_module("polyhead.attend.selectors.qada"), "_STRIP", 7)
    assert torch.equal(pairs(selector, q, k), whole)
    assert 0.1 < whole.float().mean() < 0.5


def test_the_ends_of_tau() -> None:
    for *sizes, cols in SHAPES:
        x = tensors(*sizes)
        near = ph.attend(*x, mask=ph.causal(), select=ph.a_shape(3, 9, rows=1, cols=cols))
        dense = ph.attend(*x, mask=ph.causal())
        for tau, expected in ((0.0, near), (1.5, dense)):
            own = ph.qada(tau, first=3, nearest=9, cols=cols)
            torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), expected)
        # nothing lies far: near is all
        own = ph.qada(0.9, first=3, nearest=100, cols=cols)
        torch.testing.assert_close(ph.attend(*x, mask=ph.causal(), select=own), dense)
    x = tensors(1, 2, 2, 50, 50)
    heads = ph.attend(
        *x, mask=ph.causal(), select=ph.qada(torch.tensor([0.0, 2.0]), first=3, nearest=9, cols=8)
    )
    near, dense = (
        ph.attend(*x, mask=ph.causal(), select=ph.qada(tau, first=3, nearest=9, cols=8)) for tau in (0.0, 2.0)
    )
    torch.testing.assert_close(heads, torch.stack([near[:, 0], dense[:, 1]], 1))


def test_normal_keys_have_the_mass_that_is_told() -> None:
    draw = torch.Generator().manual_seed(0)
    width, keys = 16, 20_000
    root = torch.randn(width, width, generator=draw, dtype=torch.float64) / 4
    mean = torch.randn(width, generator=draw, dtype=torch.float64) / 2
    k = (mean + torch.randn(keys, width, generator=draw, dtype=torch.float64) @ root.T)[None, None]
    q = torch.randn(1, 1, 40, width, generator=draw, dtype=torch.float64)
    far = ph.KeyGaussian(mean[None], (root @ root.T)[None])
    told, true = (
        shares(ph.qada(0.5, one, first=0, nearest=50, cols=1), q, k).logit() for one in (far, ph.ExactFar())
    )
    assert (told - true).abs().max() < 10 / math.sqrt(keys)


def test_equal_keys_are_told_exactly() -> None:
    q, k, _ = tensors(1, 2, 1, 60, 60)
    k[:, :, 2:50] = k[:, :, 5:6]
    far = ph.KeyGaussian(k[0, :, 5], torch.zeros(1, 8, 8, dtype=torch.float64))
    selectors = [ph.qada(0.5, one, first=2, nearest=10, cols=1) for one in (far, ph.ExactFar())]
    told, true = (shares(one, q, k) for one in selectors)
    torch.testing.assert_close(told, true)


def test_the_true_mass_bounds_what_is_missed() -> None:
    x = tensors(2, 4, 2, 90, 90)
    for tau, cols in ((0.5, 1), (0.8, 8), (0.95, 1)):
        own = ph.qada(tau, ph.ExactFar(), first=4, nearest=16, cols=cols)
        missed = ph.missed_mass(*x, mask=ph.causal(), select=own).mass
        assert missed.max() <= 1 - tau + 1e-6
        assert missed.max() > 0
        # dropped and added up again: at most twice as much in the sum of all weights
        read = pairs(own, *x[:2])
        keys = x[1].repeat_interleave(2, 1)
        causal = densify(ph.causal(), queries=90, keys=90)
        weights = (x[0] @ keys.mT / math.sqrt(8)).masked_fill(~causal, -math.inf)
        change = weights.softmax(-1) - weights.masked_fill(~read, -math.inf).softmax(-1)
        assert change.abs().sum(-1).max() <= 2 * (1 - tau) + 1e-6


@pytest.mark.parametrize("far", ["near", "given"])
def test_steps_decide_as_the_whole_call_and_later_tokens_have_no_part(far: str) -> None:
    q, k, v = tensors(1, 4, 2, 70, 70)
    how = moments(k) if far == "given" else ph.NearGaussian()
    own = ph.qada(0.5, how, first=4, nearest=10, cols=8)
    whole = ph.attend(q, k, v, mask=ph.causal(), select=own)
    steps = [
        ph.attend(q[:, :, n - 1 : n], k[:, :, :n], v[:, :, :n], mask=ph.causal(), select=own)
        for n in range(1, 71)
    ]
    torch.testing.assert_close(torch.cat(steps, 2), whole)
    later = k.clone()
    later[:, :, 40:] = 9.0
    torch.testing.assert_close(shares(own, q, later)[..., :40], shares(own, q, k)[..., :40])


def test_a_block_reads_all_if_one_of_its_queries_would() -> None:
    q, k, _ = tensors(1, 2, 2, 90, 90)
    alone, together = (ph.qada(0.6, first=2, nearest=12, rows=rows, cols=4) for rows in (1, 8))
    every = shares(alone, q, k) < 0.6
    read = pairs(together, q, k)
    causal = densify(ph.causal(), queries=90, keys=90)[0, 0]
    for head in range(2):
        for start in range(0, 90, 8):
            rows = slice(start, start + 8)
            if every[0, head, rows].any():
                assert torch.equal(read[0, head, rows], causal[rows])
            elif start > 16:
                assert not read[0, head, rows].equal(causal[rows])
    assert bool((read | ~pairs(alone, q, k)).all())


def test_padding_counts_in_no_mass() -> None:
    q, k, _ = tensors(2, 2, 2, 60, 60)
    real = torch.arange(60) >= torch.tensor([[0], [16]])
    other = k.clone()
    other[1, :, :16] = 50.0
    mask = ph.causal() & ph.padding(real)
    for far in (ph.NearGaussian(), ph.ExactFar(), moments(k)):
        own = ph.qada(0.5, far, first=0, nearest=8, cols=8)
        assert torch.equal(pairs(own, q, k, mask), pairs(own, q, other, mask))
        late = pairs(own, q[1:, :, 16:], k[1:, :, 16:])
        assert torch.equal(pairs(own, q, k, mask)[1:, :, 16:, 16:], late)


def test_it_is_a_value_and_wrong_input_is_said() -> None:
    x = tensors(1, 4, 2, 20, 20)
    own = ph.qada(torch.tensor([0.5, 0.6, 0.7, 2.0]), moments(x[1]))
    assert ph.from_json(ph.to_json(own)) == own
    with pytest.raises(ShapeError, match="qada: tau holds 4 numbers, but the call has 2 heads"):
        ph.attend(x[0][:, :2], *x[1:], select=own)
    with pytest.raises(ShapeError, match=r"mean is \(2, 8\), but the call has 1 key/value heads 8 wide"):
        ph.attend(x[0], x[1][:, :1], x[2][:, :1], select=own)
    with pytest.raises(ConfigError, match="qada: tau must be a finite number at least 0"):
        ph.qada(-0.1)
    with pytest.raises(ConfigError, match=r"qada: far must be such as NearGaussian\(\)"):
        ph.qada(0.5, "near")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="qada: nearest must be at least 1; got 0"):
        ph.qada(0.5, nearest=0)
    with pytest.raises(ShapeError, match="covariance must be"):
        ph.KeyGaussian(torch.zeros(2, 8), torch.zeros(2, 4, 4))
