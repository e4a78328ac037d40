"""What was not read is measured exactly, and the bound of the error holds for every query."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import attend
from polyhead.attend.function import weights_of
from polyhead.attend.masks import densify
from polyhead.attend.selectors import choose
from polyhead.errors import ConfigError, ShapeError

OWN = ph.select(ph.mean_keys(), ph.keep_share(0.3), rows=8, cols=8, always=ph.window(3))


def tensors(
    batch: int, heads: int, kv_heads: int, queries: int, keys: int, sharp: float = 3.0
) -> list[Tensor]:
    draw = torch.Generator().manual_seed(queries)
    shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
    return [sharp * torch.randn(batch, n, m, 16, generator=draw, dtype=torch.float64) for n, m in shapes]


@pytest.mark.parametrize(
    "read", [{"select": OWN}, {"read": ph.sink(2) | ph.window(10)}], ids=["selector", "mask"]
)
@pytest.mark.parametrize("shape", [(2, 4, 2, 100, 100), (1, 4, 1, 37, 90), (1, 2, 2, 1, 70)])
def test_mass_is_exact_and_the_bound_holds(read: dict[str, Any], shape: tuple[int, ...]) -> None:
    q, k, v = tensors(*shape)
    batch, heads, kv_heads, queries, keys = shape
    padded = ph.padding(torch.arange(keys).expand(batch, -1) >= 3)
    for mask in (ph.causal(), None, ph.causal() & padded):
        found = ph.missed_mass(q, k, v, mask=mask, **read)
        error = (attend(q, k, v, mask=mask) - found.output).norm(dim=-1)
        assert (error <= found.bound + 1e-12).all()
        largest = v.norm(dim=-1).amax(-1).repeat_interleave(heads // kv_heads, 1)[..., None]
        assert (found.bound <= 2 * found.mass * largest + 1e-12).all()
        size = {"batch": batch, "heads": heads, "queries": queries, "keys": keys}
        seen = choose(OWN, q, k, mask, 0.25) if "select" in read else read["read"]
        scores = 0.25 * q @ k.repeat_interleave(heads // kv_heads, 1).mT
        if mask is not None:
            scores = scores.masked_fill(~densify(mask, **size), -torch.inf)
        weights = scores.softmax(-1).nan_to_num(0.0)
        torch.testing.assert_close(found.mass, (weights * ~densify(seen, **size)).sum(-1))


def test_the_bound_is_reached() -> None:
    """One key read, one missed, with opposite values: nothing smaller would hold."""
    q, k = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 2, 1, dtype=torch.float64)
    v = torch.tensor([[[[-1.0], [1.0]]]], dtype=torch.float64)
    found = ph.missed_mass(q, k, v, read=ph.window(0))
    assert found.mass.item() == pytest.approx(0.5)
    assert (attend(q, k, v) - found.output).abs().item() == pytest.approx(found.bound.item())


def test_nothing_missed_and_nothing_seen() -> None:
    q, k, v = tensors(2, 4, 2, 40, 40)
    assert ph.missed_mass(q, k, v, mask=ph.causal(), read=ph.causal()).mass.abs().max() < 1e-12
    padded = ph.causal() & ph.padding(torch.arange(40).expand(2, -1) >= 8)
    assert (ph.missed_mass(q, k, v, mask=padded, read=ph.window(0)).mass[:, :, :8] == 0).all()
    nothing = ph.missed_mass(q, k, v, mask=ph.causal(), read=~ph.causal())
    assert (nothing.mass == 1).all()
    assert (nothing.output == 0).all()


def test_float32_agrees() -> None:
    x = tensors(1, 4, 2, 200, 200, sharp=1.0)
    wide = ph.missed_mass(*x, mask=ph.causal(), select=OWN)
    small = ph.missed_mass(*(t.float() for t in x), mask=ph.causal(), select=OWN)
    torch.testing.assert_close(small.mass.double(), wide.mass, rtol=1e-4, atol=1e-5)


def test_a_guard_reads_everything_where_too_much_is_missed() -> None:
    q, k, v = tensors(1, 4, 4, 100, 100, sharp=1.0)
    q[:, 1] *= 0  # a head that looks everywhere alike: whatever it leaves out, it misses
    with ph.selections() as seen:
        out = attend(q, k, v, mask=ph.causal(), select=ph.guarded(OWN, 0.9 * 0.5, probes=100))
    true = ph.missed_mass(q, k, v, mask=ph.causal(), select=OWN).mass.mean(-1)
    torch.testing.assert_close(seen.missed[0], true)
    assert (seen.calls, seen.heads) == (1, 4)
    assert seen.fell_back == int((true > 0.45).sum()) > 0
    dense, sparse = attend(q, k, v, mask=ph.causal()), attend(q, k, v, mask=ph.causal(), select=OWN)
    for head in range(4):
        expected = dense if true[0, head] > 0.45 else sparse
        torch.testing.assert_close(out[:, head], expected[:, head])
    assert (
        ph.missed_mass(q, k, v, mask=ph.causal(), select=ph.guarded(OWN, 0.0, probes=100)).mass.max() < 1e-12
    )
    torch.testing.assert_close(attend(q, k, v, mask=ph.causal(), select=ph.guarded(OWN, 1.0)), sparse)


SCORES = {
    "soft cap": ph.soft_cap(1.0),
    "alibi": ph.alibi(4),
    "both": (ph.alibi(4), ph.soft_cap(2.0)),
    "function": ph.score_function(lambda s, b, h, i, j: s * (1 + b) - 0.1 * h * (i - j) ** 0.5),
}


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("name", SCORES)
def test_a_guard_measures_the_scores_of_the_call(name: str, padded: bool) -> None:
    q, k, v = tensors(2, 4, 2, 90, 100, sharp=1.0)
    real = torch.arange(100) >= torch.tensor([[0], [37 if padded else 0]])
    call: dict[str, Any] = {"mask": ph.causal() & ph.padding(real), "score": SCORES[name]}
    true = ph.missed_mass(q, k, v, select=OWN, **call).mass
    true = torch.stack([own[:, seen].mean(-1) for own, seen in zip(true, real[:, 10:], strict=True)])
    level = float(true.flatten().sort().values[3:5].mean())  # of eight heads
    for probes in (100, 7):
        with ph.selections() as seen:
            out = attend(q, k, v, select=ph.guarded(OWN, level, probes=probes), **call)
        if probes == 100:
            torch.testing.assert_close(seen.missed[0], true)
            dense, sparse = attend(q, k, v, **call), attend(q, k, v, select=OWN, **call)
            expected = torch.where((true > level)[..., None, None], dense, sparse)
            torch.testing.assert_close(out, expected)
        else:
            assert (seen.missed[0] - true).abs().max() < 0.2
    plain = ph.missed_mass(q, k, v, select=OWN, mask=call["mask"]).mass.mean(-1)
    assert (plain - true).abs().max() > 0.01


def test_a_guard_counts_a_sink_as_read() -> None:
    q, k, v = tensors(1, 4, 2, 64, 64, sharp=1.0)
    for sink in (2.0, torch.tensor([-2.0, 0.0, 2.0, 20.0])):
        own = ph.softmax(sink=sink)
        with ph.selections() as seen:
            attend(q, k, v, mask=ph.causal(), normalizer=own, select=ph.guarded(OWN, 1.0, probes=64))
        weights = weights_of(q, k, mask=ph.causal(), normalizer=own)
        read = densify(choose(OWN, q, k, ph.causal(), 0.25), heads=4, queries=64, keys=64)
        torch.testing.assert_close(seen.missed[0], (weights * ~read).sum(-1).mean(-1))


def test_a_compiled_guard_measures_the_same() -> None:
    q, k, v = (x.float() for x in tensors(1, 4, 2, 64, 64, sharp=1.0))
    call: dict[str, Any] = {"score": ph.soft_cap(1.0), "normalizer": ph.softmax(sink=1.0)}
    own = ph.guarded(OWN, 0.2)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q, k, v, mask=ph.causal(), select=own, **call)

    found = torch.compile(step, backend="eager")(q, k, v)
    torch.testing.assert_close(found, step(q, k, v))
    dense = attend(q, k, v, mask=ph.causal(), **call)
    assert not torch.equal(dense, attend(q, k, v, mask=ph.causal(), select=OWN, **call))
    with ph.selections() as seen:
        step(q, k, v)
    assert seen.fell_back
    torch.testing.assert_close(found[seen.missed[0] > 0.2], dense[seen.missed[0] > 0.2])


def test_padding_does_not_dilute_what_a_guard_measures() -> None:
    q, k, v = tensors(1, 2, 2, 100, 100, sharp=1.0)
    real = torch.arange(100)[None] >= 40
    mask = ph.causal() & ph.padding(real)
    with ph.selections() as seen:
        attend(q, k, v, mask=mask, select=ph.guarded(OWN, 1.0, probes=100))
    true = ph.missed_mass(q, k, v, mask=mask, select=OWN).mass[:, :, 40:].mean(-1)
    assert true.min() > 0.01
    torch.testing.assert_close(seen.missed[0], true)


def test_counting_ends_with_its_context() -> None:
    q, k, v = tensors(1, 2, 2, 40, 40)
    with ph.selections() as seen:
        pass
    attend(q, k, v, select=ph.guarded(OWN, 0.1))
    assert seen.calls == 0


def test_wrong_input_is_said() -> None:
    q, k, v = tensors(1, 2, 2, 40, 40)
    for both in ({}, {"read": ph.causal(), "select": OWN}):
        with pytest.raises(ConfigError, match="give read, .* or select, .*; one of them"):
            ph.missed_mass(q, k, v, **both)
    with pytest.raises(ConfigError, match="read must be a mask"):
        ph.missed_mass(q, k, v, read=OWN)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="most must be a finite number at least 0 and at most 1"):
        ph.guarded(OWN, 2)
    with pytest.raises(ConfigError, match="selector must be one such as"):
        ph.guarded(ph.mean_keys(), 0.1)  # type: ignore[arg-type]
    mixed = ph.pair_convolution(torch.ones(2, 2, 3, dtype=torch.float64))
    for score in (mixed, (ph.soft_cap(2.0), mixed)):
        with pytest.raises(ConfigError, match="missed_mass: score must map each pair by itself"):
            ph.missed_mass(q, k, v, read=ph.window(9), score=score)
        with pytest.raises(ConfigError, match="guarded: score must map each pair by itself"):
            attend(q, k, v, score=score, select=ph.guarded(OWN))


@pytest.mark.parametrize("read", [{"select": OWN}, {"read": ph.window(9)}], ids=["selector", "mask"])
def test_calls_that_attend_refuses_are_refused_before_anything_is_chosen(read: dict[str, Any]) -> None:
    q, k, v = tensors(1, 2, 2, 40, 40)
    short = ph.padding(torch.ones(1, 7, dtype=torch.bool))
    for wrong, error, said in (
        ({"k": k[..., :8]}, ShapeError, "q and k must agree in head dim D"),
        ({"k": k[:, :, :20]}, ShapeError, "k and v must agree in batch, heads and length"),
        ({"q": [1.0]}, ShapeError, "q must be a tensor"),
        ({"q": q[0]}, ShapeError, "q must have four dimensions"),
        ({"k": k.float()}, ShapeError, "q, k and v must have one dtype"),
        ({"mask": short}, ShapeError, "padding: mask has 7 positions but there are 40 keys"),
        ({"mask": "causal"}, ConfigError, "mask must be a polyhead mask"),
        ({"scale": "a"}, ConfigError, "scale must be a finite number"),
        ({"score": "a"}, ConfigError, "score must be a Score"),
    ):
        with pytest.raises(error, match=said):
            ph.missed_mass(**{"q": q, "k": k, "v": v, **read, **wrong})


@pytest.mark.parametrize("read", [{"select": OWN}, {"read": ph.window(9)}], ids=["selector", "mask"])
def test_where_there_are_no_keys_nothing_is_missed(read: dict[str, Any]) -> None:
    for queries, keys in ((5, 0), (0, 5), (0, 0)):
        for mask in (None, ph.causal()):
            found = ph.missed_mass(*tensors(1, 4, 2, queries, keys), mask=mask, **read)
            assert torch.equal(found.mass, torch.zeros(1, 4, queries, dtype=torch.float64))
            assert torch.equal(found.bound, torch.zeros(1, 4, queries, dtype=torch.float64))
            assert found.output.shape == (1, 4, queries, 16)


def test_autocast_measures_what_it_computes() -> None:
    x = [t.float() for t in tensors(1, 2, 2, 40, 40, sharp=1.0)]
    with torch.autocast("cpu", torch.bfloat16):
        found = ph.missed_mass(*x, mask=ph.causal(), select=OWN)
    expected = ph.missed_mass(*(t.bfloat16() for t in x), mask=ph.causal(), select=OWN)
    assert torch.equal(found.mass, expected.mass)
    assert torch.equal(found.bound, expected.bound)
