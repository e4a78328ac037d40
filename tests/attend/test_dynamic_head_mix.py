"""The mix of heads that depends on both tokens of a pair."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend import strips
from polyhead.attend.across_heads import DynamicHeadMix, TokenMix, dynamic, dynamic_head_mix
from polyhead.errors import ConfigError, ShapeError

F64 = torch.float64
BATCH, HEADS, QUERIES, KEYS = 2, 4, 30, 50


def random(*shape: int, seed: int = 0) -> Tensor:
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)
    return (0.5 * made).requires_grad_()


def side(tokens: int, seed: int, *, rank: int = 2, gate: bool = True, heads: int = HEADS) -> TokenMix:
    return TokenMix(
        random(BATCH, heads, tokens, rank, seed=seed),
        random(BATCH, heads, tokens, rank, seed=seed + 1),
        random(BATCH, heads, tokens, seed=seed + 2) if gate else None,
    )


MIXES = {
    "base": dynamic_head_mix(base=random(HEADS, HEADS, seed=5)),
    "queries": dynamic_head_mix(queries=side(QUERIES, 10)),
    "keys": dynamic_head_mix(keys=side(KEYS, 20, rank=3)),
    "no gates": dynamic_head_mix(queries=side(QUERIES, 10, gate=False), keys=side(KEYS, 20, gate=False)),
    "all": dynamic_head_mix(
        base=random(HEADS, HEADS, seed=5), queries=side(QUERIES, 10), keys=side(KEYS, 20)
    ),
}
MASKS = {
    "none": None,
    "causal": ph.causal(),
    "gaps": ph.causal() & (ph.window(4) | ph.sink(3)),
    "per head": ph.per_head([ph.causal(), ph.window(3), ph.sink(0), ph.causal() & ph.window(8)]),
    "padding": ph.padding(torch.tensor([[False], [True]]).expand(2, KEYS)),
}


def operands() -> list[Tensor]:
    shapes = ((HEADS, QUERIES, 8), (2, KEYS, 8), (2, KEYS, 7))
    return [random(BATCH, *shape, seed=n) for n, shape in enumerate(shapes)]


def answers(backend: str, mix: DynamicHeadMix, **call: object) -> list[Tensor]:
    tensors = [*operands(), *mix.tensors()]
    out = ph.attend(*tensors[:3], score=mix, weight_map=mix, backend=backend, **call)  # type: ignore[call-overload]
    up = torch.arange(out.numel(), dtype=F64).view(out.shape).sin()
    return [out.detach(), *torch.autograd.grad((out * up).sum(), tensors)]


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("small", [False, True], ids=["one strip", "many strips"])
@pytest.mark.parametrize("long", [False, True], ids=["a few long operations", "many"])
def test_tiles_equal_the_dense_form(
    mix: str, mask: str, small: bool, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if small:
        monkeypatch.setattr(strips, "_ELEMENTS", {"cpu": 1 << 10})
        monkeypatch.setattr(strips, "_COLS", 8)  # so that a window and sinks leave a gap between them
    if long:
        monkeypatch.setattr(dynamic, "_SMALL", 0)
    got, want = (answers(name, MIXES[mix], mask=MASKS[mask]) for name in ("tiles", "reference"))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("mix", MIXES)
def test_it_is_the_matrix_written_out(mix: str) -> None:
    """Every pair by its own matrix (H, H), built from the equation."""
    q, k, v = operands()
    part = MIXES[mix]

    def matrix(b: int, i: int, j: int) -> Tensor:
        made = torch.eye(HEADS, dtype=F64)
        if part.base is not None:
            made = made + part.base
        for tokens, n in ((part.queries, i), (part.keys, j)):
            if tokens is not None:
                for r in range(tokens.read.shape[-1]):
                    made = made + torch.outer(tokens.write[b, :, n, r], tokens.read[b, :, n, r])
                if tokens.gate is not None:
                    made = made + torch.diag(tokens.gate[b, :, n])
        return made

    def mapped(numbers: Tensor, b: int, i: int, j: int) -> Tensor:
        return matrix(b, i, j) @ numbers

    few = slice(QUERIES - 3, None)  # the last rows: the call's others would take long
    mask = torch.ones(3, KEYS, dtype=torch.bool).tril(KEYS - 3)
    want = ph.reference("attend_across_heads")(
        q[:, :, few], k, v, mask=mask,
        before=lambda x, b, i, j: mapped(x, b, i + QUERIES - 3, j),
        after=lambda x, b, i, j: mapped(x, b, i + QUERIES - 3, j),
    )  # fmt: skip
    got = ph.attend(q, k, v, mask=ph.causal(), score=part, weight_map=part)[:, :, few]
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)


def test_only_a_base_is_a_head_mix() -> None:
    q, k, v = operands()
    base = random(HEADS, HEADS, seed=5)
    static = ph.head_mix(torch.eye(HEADS, dtype=F64) + base)
    torch.testing.assert_close(
        ph.attend(q, k, v, score=dynamic_head_mix(base=base)), ph.attend(q, k, v, score=static)
    )


def test_compiled_with_gradients() -> None:
    torch._dynamo.reset()
    mix = MIXES["all"]
    own = mix.tensors()

    def call(q: Tensor, k: Tensor, v: Tensor, *own: Tensor) -> Tensor:
        part = dynamic_head_mix(base=own[0], queries=TokenMix(*own[1:4]), keys=TokenMix(*own[4:]))
        return ph.attend(q, k, v, mask=ph.causal(), score=part, weight_map=part)

    tensors = [*operands(), *own]
    got = torch.compile(call, backend="aot_eager", fullgraph=True)(*tensors)
    want = call(*tensors)
    torch.testing.assert_close(got, want)
    for a, b in zip(*(torch.autograd.grad(y.sin().sum(), tensors) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b)
    torch._dynamo.reset()


def test_through_json() -> None:
    part = MIXES["all"]
    assert ph.from_json(json.loads(json.dumps(ph.to_json(part)))) == part


def test_messages() -> None:
    tensors = operands()
    with pytest.raises(ConfigError, match="needs base, queries or keys; all are None"):
        dynamic_head_mix()
    with pytest.raises(ConfigError, match=r"must be of one number of heads, got \[4, 4, 3\]"):
        dynamic_head_mix(base=random(4, 4), keys=side(5, 0, heads=3))
    with pytest.raises(ConfigError, match="queries must be a TokenMix, got 3"):
        dynamic_head_mix(queries=3)
    with pytest.raises(ConfigError, match=r"read and write must have one shape"):
        TokenMix(random(1, 2, 3, 4), random(1, 2, 3, 5))
    with pytest.raises(ConfigError, match=r"gate must have shape \(B, H, n\) \(1, 2, 3\)"):
        TokenMix(random(1, 2, 3, 4), random(1, 2, 3, 4), random(1, 2, 4))
    for backend in ("tiles", "reference"):
        with pytest.raises(ShapeError, match=r"keys of the mix of heads holds \(2, 4, 30\)"):
            ph.attend(*tensors, score=dynamic_head_mix(keys=side(QUERIES, 0)), backend=backend)
        with pytest.raises(ShapeError, match=r"queries of the mix of heads holds \(2, 4, 20\)"):
            ph.attend(*tensors, weight_map=dynamic_head_mix(queries=side(20, 0)), backend=backend)
        with pytest.raises(ShapeError, match="DynamicHeadMix mixes 3 heads, but the call has 4"):
            ph.attend(*tensors, score=dynamic_head_mix(keys=side(KEYS, 0, heads=3)), backend=backend)
