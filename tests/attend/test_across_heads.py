"""Maps across heads and maps of the weights: the same from every backend and the twin, in O(L) memory."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import Tile, strips
from polyhead.attend.across_heads import AcrossHeads, HeadMix
from polyhead.attend.masks import densify
from polyhead.attend.normalizers import Normalizer
from polyhead.attend.strips import Frame
from polyhead.attend.weight_maps import WeightChain, WeightMap, weight_chain
from polyhead.errors import BackendRefused, ConfigError, ShapeError

F64 = torch.float64


def random(*shape: int, seed: int = 0, grad: bool = True) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return made.requires_grad_(grad)


def operands(batch: int, heads: int, kv_heads: int, queries: int, keys: int, width: int = 8) -> list[Tensor]:
    shapes = ((heads, queries, width), (kv_heads, keys, width), (kv_heads, keys, width - 1))
    return [random(batch, *shape, seed=n) for n, shape in enumerate(shapes)]


def answers(backend: str, tensors: list[Tensor], **call: object) -> list[Tensor]:
    """Output and all gradients of a call."""
    out = ph.attend(*tensors[:3], backend=backend, **call)  # type: ignore[call-overload]
    up = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    grads = torch.autograd.grad((out * up).sum(), tensors, allow_unused=True)
    return [out.detach(), *(torch.zeros((), dtype=F64) if g is None else g for g in grads)]


def close(got: list[Tensor], want: list[Tensor]) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


class Shifted(WeightMap):
    """A map of one's own, under autograd: it gives weight where there was none, and looks at positions."""

    by: Tensor

    def apply(self, weights: Tensor, tile: Tile) -> Tensor:
        return weights * torch.sigmoid(self.by) + 0.01 * (tile.i - tile.j).to(weights).cos() * self.by


MASKS = {
    "none": None,
    "causal": ph.causal(),
    "window and sinks": ph.causal() & (ph.window(9) | ph.sink(3)),
    "per head": ph.per_head(
        [ph.causal(), ph.window(3), ph.causal() & ph.sink(0), ph.causal() & (ph.window(8) | ph.sink(1))]
    ),
    "padding": ph.causal() & ph.padding(torch.rand(2, 90, generator=torch.Generator().manual_seed(3)) > 0.4),
    "an item without keys": ph.padding(torch.tensor([[False], [True]]).expand(2, 90)),
    "holes": ph.causal() & ~ph.window(70) | ph.window(2),
}
FIRST, SECOND, THIRD = (random(4, 4, seed=n) for n in (10, 11, 12))
CAP = torch.tensor(0.7, dtype=F64, requires_grad=True)
CALLS: dict[str, tuple[dict[str, object], list[Tensor]]] = {
    "logits": ({"score": ph.head_mix(FIRST)}, [FIRST]),
    "weights": ({"weight_map": ph.head_mix(SECOND)}, [SECOND]),
    "both": ({"score": ph.head_mix(FIRST), "weight_map": ph.head_mix(SECOND)}, [FIRST, SECOND]),
    "one matrix twice": ({"score": ph.head_mix(FIRST), "weight_map": ph.head_mix(FIRST)}, [FIRST]),
    "among other scores": (
        {"score": (ph.alibi(4), ph.head_mix(FIRST), ph.soft_cap(2.0), ph.head_mix(SECOND), ph.alibi(4))},
        [FIRST, SECOND],
    ),
    "two in a row": ({"score": (ph.head_mix(FIRST), ph.head_mix(SECOND))}, [FIRST, SECOND]),
    "own": ({"weight_map": Shifted(CAP)}, [CAP]),
    "chain": (
        {"weight_map": (ph.head_mix(FIRST), Shifted(CAP), ph.head_mix(THIRD))},
        [FIRST, CAP, THIRD],
    ),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("small", [False, True], ids=["one strip", "many strips"])
def test_tiles_equal_the_dense_form(
    call: str, mask: str, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 11})
    options, own = CALLS[call]
    tensors = [*operands(2, 4, 2, 50, 90), *own]
    options = options | {"mask": MASKS[mask]}
    close(answers("tiles", tensors, **options), answers("reference", tensors, **options))


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("mask", ["none", "causal", "per head"])
def test_both_forms_equal_the_twin(kv_heads: int, mask: str) -> None:
    q, k, v = operands(2, 4, kv_heads, 6, 9)
    head_mix = ph.reference("head_mix")
    dense = None
    if MASKS[mask] is not None:
        dense = densify(MASKS[mask], batch=2, heads=4, queries=6, keys=9)
    want = ph.reference("attend_across_heads")(
        q, k, v, mask=dense,
        before=lambda x, b, i, j: head_mix(x, FIRST), after=lambda x, b, i, j: head_mix(x, SECOND),
    )  # fmt: skip
    for backend in ("tiles", "reference"):
        got = ph.attend(
            q, k, v, mask=MASKS[mask], backend=backend,
            score=ph.head_mix(FIRST), weight_map=ph.head_mix(SECOND),
        )  # fmt: skip
        torch.testing.assert_close(got, want, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["softmax", "sink", "sigmoid", "entmax", "sparsemax"])
def test_every_normalizer(name: str) -> None:
    sink = random(4, seed=5)
    alpha = random(4, seed=6, grad=False).sigmoid().mul(0.8).add(1.1).requires_grad_()
    normalizers: dict[str, tuple[Normalizer, list[Tensor]]] = {
        "softmax": (ph.softmax(), []),
        "sink": (ph.softmax(sink=sink), [sink]),
        "sigmoid": (ph.sigmoid(bias=sink), [sink]),
        "entmax": (ph.entmax(alpha), [alpha]),
        "sparsemax": (ph.sparsemax(), []),
    }
    normalizer, own = normalizers[name]
    tensors = [*operands(2, 4, 2, 40, 60), FIRST, SECOND, *own]
    call = CALLS["both"][0] | {"normalizer": normalizer, "mask": MASKS["per head"]}
    close(answers("tiles", tensors, **call), answers("reference", tensors, **call))


def test_gradcheck() -> None:
    a, b = random(2, 2, seed=3), random(2, 2, seed=4)

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        torch.manual_seed(7)
        return ph.attend(
            q, k, v, mask=ph.causal(), dropout=0.3, backend="tiles",
            score=ph.head_mix(a), weight_map=ph.head_mix(b),
        )  # fmt: skip

    assert torch.autograd.gradcheck(call, (*operands(1, 2, 1, 5, 7, width=3), a, b))


def test_the_identity_changes_nothing() -> None:
    q, k, v = operands(2, 4, 2, 50, 90)
    eye = ph.head_mix(torch.eye(4))
    plain = ph.attend(q, k, v, mask=ph.causal(), backend="tiles")
    torch.testing.assert_close(ph.attend(q, k, v, mask=ph.causal(), score=eye, weight_map=eye), plain)


def test_weights_of_a_permutation_are_those_of_other_heads() -> None:
    q, k, v = operands(1, 4, 4, 20, 20)
    order = torch.tensor([2, 0, 3, 1])
    moved = ph.attend(q, k, v, weight_map=ph.head_mix(torch.eye(4)[order]))
    torch.testing.assert_close(moved, ph.attend(q[:, order], k[:, order], v))


def test_what_a_mask_hides_from_one_head_stays_hidden() -> None:
    """Head 2 may see nothing: whatever others see, its output is zero, and no gradient comes of it."""
    q, k, v = operands(2, 4, 4, 50, 90)
    for backend in ("tiles", "reference"):
        out = ph.attend(q, k, v, mask=MASKS["per head"], weight_map=ph.head_mix(SECOND), backend=backend)
        assert bool((out[:, 2] == 0).all())
        (flow,) = torch.autograd.grad(out[:, 1].sum(), v)
        assert bool((flow[:, 2] == 0).all())
        hidden = ph.attend(q, k, v, mask=ph.sink(0), weight_map=Shifted(CAP), backend=backend)
        assert bool((hidden == 0).all())


def test_lse_is_that_of_the_mixed_logits() -> None:
    tensors = operands(2, 4, 2, 20, 30)
    call = {"score": ph.head_mix(FIRST), "weight_map": ph.head_mix(SECOND), "mask": ph.causal()}
    got, want = (
        ph.attend(*tensors, return_lse=True, backend=name, **call)[1] for name in ("tiles", "reference")
    )
    torch.testing.assert_close(got, want, check_dtype=False)


def test_dropout_comes_after_the_map() -> None:
    q, k, v = operands(1, 4, 2, 100, 100)
    ones = torch.ones_like(v)

    def drawn(seed: int, **options: object) -> Tensor:
        torch.manual_seed(seed)
        return ph.attend(q, k, ones, dropout=0.5, backend="tiles", **options)

    twice = ph.head_mix(2 * torch.eye(4))
    assert torch.equal(drawn(1, weight_map=twice), drawn(1, weight_map=twice))
    assert not torch.equal(drawn(1, weight_map=twice), drawn(2, weight_map=twice))
    torch.testing.assert_close(drawn(1, weight_map=twice), 2 * drawn(1))
    # a mix of dropped weights would have few zeros
    spread = ph.head_mix(torch.full((4, 4), 0.25))
    one_key = (q, k, ones, ph.causal() & ph.documents(torch.arange(100)))
    torch.manual_seed(1)
    out = ph.attend(*one_key[:3], mask=one_key[3], dropout=0.5, weight_map=spread, backend="tiles")
    assert 0.3 < (out[..., 0] == 0).double().mean().item() < 0.7


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype: torch.dtype) -> None:
    tolerance = {torch.bfloat16: 1.6e-2, torch.float16: 2e-3, torch.float32: 1e-5}[dtype]
    q, k, v = (x.detach().to(dtype) for x in operands(1, 4, 2, 200, 200))
    a, b = (x.detach().to(dtype) for x in (FIRST, SECOND))
    out = ph.attend(q, k, v, mask=ph.causal(), score=ph.head_mix(a), weight_map=ph.head_mix(b))
    assert out.dtype == dtype
    exact = ph.attend(
        q.double(), k.double(), v.double(), mask=ph.causal(), backend="reference",
        score=ph.head_mix(a.double()), weight_map=ph.head_mix(b.double()),
    )  # fmt: skip
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=2 * tolerance)


def test_gradients_of_low_precision_matrices_are_summed_in_float32() -> None:
    a = FIRST.detach().bfloat16().requires_grad_()
    q, k, v = (x.detach().bfloat16() for x in operands(1, 4, 2, 300, 300))
    up = random(1, 4, 300, 7, seed=9, grad=False)
    out = ph.attend(q, k, v, score=ph.head_mix(a), backend="tiles")
    (got,) = torch.autograd.grad((out.double() * up).sum(), a)
    exact = a.detach().double().requires_grad_()
    out = ph.attend(q.double(), k.double(), v.double(), score=ph.head_mix(exact), backend="reference")
    (want,) = torch.autograd.grad((out * up).sum(), exact)
    assert got.dtype == torch.bfloat16
    assert (got.double() - want).abs().max() < 2e-2 * want.abs().max()


def test_compiled_in_one_graph_with_gradients() -> None:
    torch._dynamo.reset()

    def call(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return ph.attend(q, k, v, mask=ph.causal(), score=ph.head_mix(a), weight_map=ph.head_mix(b))

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    tensors = [*operands(2, 4, 2, 40, 40), FIRST, SECOND]
    got, want = compiled(*tensors), call(*tensors)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), tensors), torch.autograd.grad(want.sin().sum(), tensors),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_consumers_see_the_weights_after_the_map(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 11})
    q, k, v = (x.detach() for x in operands(2, 4, 2, 50, 90))

    class Rows:
        needs_logits = True
        weights = torch.zeros(2, 4, 50, 90, dtype=F64)
        logits = torch.full((2, 4, 50, 90), float("-inf"), dtype=F64)

        def visit(self, tile: Tile, logits: Tensor | None, weights: Tensor) -> None:
            assert tile.heads == 4
            place = (tile.batch_slice, tile.head_slice, tile.row_slice)
            self.weights[place][..., tile.cols] = weights
            self.logits[place][..., tile.cols] = logits

    rows = Rows()
    out = ph.observe(
        q, k, v, [rows], mask=ph.causal(), score=ph.head_mix(FIRST), weight_map=ph.head_mix(SECOND)
    )
    torch.testing.assert_close(rows.weights @ v.repeat_interleave(2, 1), out)
    mixed = torch.einsum("hg,bgij->bhij", SECOND.detach(), rows.logits.softmax(-1))
    torch.testing.assert_close(rows.weights, mixed)


def test_strips_hold_all_heads_and_little_memory() -> None:
    frame = Frame(3, 16, 4, 300, 9000, torch.device("cpu"))
    made = list(strips.strips(frame, ph.causal(), whole_heads=True))
    assert all((s.g0, s.g1) == (0, 4) for s in made)
    assert all((s.b1 - s.b0) * 16 * (s.r1 - s.r0) * s.columns <= 1 << 21 for s in made)
    held = torch.zeros(3, 300, 9000, dtype=torch.int8)
    for s in made:
        for run in s.runs:
            held[s.b0 : s.b1, s.r0 : s.r1, run.start : run.stop] += 1
    assert int(held.max()) == 1
    assert bool((held == 1)[:, torch.ones(300, 9000, dtype=torch.bool).tril(8700)].all())


def test_who_can_run_it() -> None:
    q, k, v = (x.detach().float() for x in operands(1, 4, 2, 300, 300))
    v = q[:, :2]
    for option in ({"score": ph.head_mix(FIRST.detach())}, {"weight_map": ph.head_mix(FIRST.detach())}):
        plan = ph.explain(q, k, v, mask=ph.window(9), **option)
        assert plan.backend == "tiles"
        for name in ("sdpa", "banded", "flex"):
            assert "HeadMix" in plan.refused[name]
            with pytest.raises(BackendRefused, match="HeadMix"):
                ph.attend(q, k, v, mask=ph.window(9), backend=name, **option)
    with ph.strict():
        ph.attend(q, k, v, weight_map=ph.head_mix(FIRST.detach()))


def test_descriptions() -> None:
    one = ph.head_mix(FIRST.detach())
    for part in (one, WeightChain((one, Shifted(CAP.detach())))):
        assert ph.from_json(json.loads(json.dumps(ph.to_json(part)))) == part
        assert pickle.loads(pickle.dumps(part)) == part
    assert weight_chain(None) is None
    assert weight_chain(()) is None
    assert weight_chain([one]) is one
    assert weight_chain((WeightChain((one, one)), one)) == WeightChain((one, one, one))
    assert WeightChain((one, Shifted(CAP))).whole_heads
    assert not WeightChain((one, Shifted(CAP))).keeps_zeros
    assert not Shifted(CAP).whole_heads


def test_messages() -> None:
    tensors = operands(1, 4, 2, 5, 5)
    for value in (3, "mix", ph.alibi(4), torch.eye(4)):
        with pytest.raises(ConfigError, match="weight_map must be a WeightMap or a sequence of them, got"):
            ph.attend(*tensors, weight_map=value)
    with pytest.raises(ConfigError, match=r"weight_map must be .* got 3 \(int\) inside"):
        ph.attend(*tensors, weight_map=[ph.head_mix(FIRST), 3])
    for bad in (torch.eye(4)[:3], torch.zeros(4), torch.eye(4, dtype=torch.int64), 3):
        with pytest.raises(ConfigError, match=r"matrix must be a floating-point tensor \(H, H\), one row"):
            ph.head_mix(bad)
    for backend in ("tiles", "reference"):
        for name in ("score", "weight_map"):
            with pytest.raises(ShapeError, match="HeadMix mixes 3 heads, but the call has 4 query heads"):
                ph.attend(*tensors, backend=backend, **{name: ph.head_mix(torch.eye(3))})
    some = Tile(1, 2, torch.arange(3), torch.arange(3), total_heads=4)
    with pytest.raises(ShapeError, match="HeadMix needs a tile of all 4 heads, got 2"):
        HeadMix(torch.eye(4)).apply(torch.zeros(1, 2, 3, 3), some)

    class Narrow(WeightMap):
        def apply(self, weights: Tensor, tile: Tile) -> Tensor:
            return weights.sum(-1)

    for backend in ("tiles", "reference"):
        with pytest.raises(ShapeError, match=r"Narrow.apply\(\) must keep the shape"):
            ph.attend(*tensors, weight_map=Narrow(), backend=backend)
    with pytest.raises(NotImplementedError, match="does not define apply"):
        AcrossHeads().apply(torch.zeros(1, 2, 3, 3), some)
