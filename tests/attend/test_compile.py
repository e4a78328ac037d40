"""`attend` under `torch.compile`: one graph, the same answers, and no compilation for a new length."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.attend.masks import Mask, Not

CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v: ph.attend(q, k, v),
    "causal": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal()),
    "window": lambda q, k, v: ph.attend(q, k, v, mask=ph.window(9)),
    "sinks": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal() & (ph.window(9) | ph.sink(2))),
    "alibi": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal(), score=ph.alibi(4)),
    "cap": lambda q, k, v: ph.attend(
        q, k, v, mask=ph.causal(), score=(ph.soft_cap(3.0), ph.temperature(0.5))
    ),
    "sigmoid": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal(), normalizer=ph.sigmoid(bias=-1.0)),
    "entmax": lambda q, k, v: ph.attend(q, k, v, normalizer=ph.entmax(1.5)),
    "forced": lambda q, k, v: ph.attend(q, k, v, backend="tiles"),
    "lse": lambda q, k, v: ph.attend(q, k, v, mask=ph.causal(), return_lse=True)[1],
}


def operands(length: int = 200, grad: bool = True) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 4, length, 8), (2, 2, length, 8), (2, 2, length, 8))
    return tuple(torch.randn(s, generator=generator).requires_grad_(grad) for s in shapes)


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_one_graph_with_the_same_answers_and_gradients(name: str, backend: str) -> None:
    call = CALLS[name]
    compiled = torch.compile(call, backend=backend, fullgraph=True)
    q, k, v = operands()
    want, got = call(q, k, v), compiled(q, k, v)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), (q, k, v), allow_unused=True),
        torch.autograd.grad(want.sin().sum(), (q, k, v), allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_tensors_of_the_description_get_their_gradients() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, table: Tensor, sink: Tensor) -> Tensor:
        return ph.attend(
            q, k, v, mask=ph.causal(), score=ph.relative_bias(table), normalizer=ph.softmax(sink=sink)
        )

    own = (torch.randn(4, 9, requires_grad=True), torch.randn(4, requires_grad=True))
    tensors = (*operands(), *own)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    want, got = call(*tensors), compiled(*tensors)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), tensors),
        torch.autograd.grad(want.sin().sum(), tensors),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def test_masks_made_outside_with_tensors() -> None:
    real = torch.rand(2, 200) > 0.3
    masks = (ph.padding(real) & ph.window(9), ph.causal() & ph.documents(torch.arange(200) // 70))
    for mask in masks:
        compiled = torch.compile(
            lambda q, k, v, mask=mask: ph.attend(q, k, v, mask=mask), backend="eager", fullgraph=True
        )
        q, k, v = operands(grad=False)
        torch.testing.assert_close(compiled(q, k, v), ph.attend(q, k, v, mask=mask))


@pytest.mark.parametrize("name", ["causal", "window", "alibi"])
def test_a_new_length_compiles_at_most_once_more(name: str) -> None:
    """torch makes sizes dynamic at the second one it sees; after that every length shares a graph."""
    graphs = 0

    def count(module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., object]:
        nonlocal graphs
        graphs += 1
        return module.forward

    compiled = torch.compile(CALLS[name], backend=count, fullgraph=True)
    for length in (200, 300, 45, 130, 1000, 77):
        q, k, v = operands(length, grad=False)
        torch.testing.assert_close(compiled(q, k, v), CALLS[name](q, k, v))
    assert graphs <= 2


def test_everything_dynamic() -> None:
    compiled = torch.compile(CALLS["window"], backend="eager", fullgraph=True, dynamic=True)
    for length in (200, 300):
        q, k, v = operands(length, grad=False)
        torch.testing.assert_close(compiled(q, k, v), CALLS["window"](q, k, v))
    scaled = torch.compile(
        lambda q, k, v, s: ph.attend(q, k, v, mask=ph.window(9), scale=s), backend="eager", fullgraph=True
    )
    for scale in (0.1, 0.2, 0.3):
        torch.testing.assert_close(scaled(q, k, v, scale), ph.attend(q, k, v, mask=ph.window(9), scale=scale))


def compilations(call: Callable[..., Tensor], values: tuple[float, ...]) -> int:
    """How often a call is compiled for these values of its last argument; its answers are checked."""
    graphs = []

    def backend(graph, examples):  # type: ignore[no-untyped-def]
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(call, backend=backend, fullgraph=True)
    q, k, v = operands(grad=False)
    for value in values:
        torch.testing.assert_close(compiled(q, k, v, value), call(q, k, v, value))
    return len(graphs)


def test_integers_inside_a_description_may_change() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, n: int) -> Tensor:
        return ph.attend(q, k, v, mask=ph.window(n) | ph.sink(n // 3))

    assert compilations(call, (3, 9, 30, 31, 60)) <= 2


def test_floats_inside_a_description_may_change() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, cap: float) -> Tensor:
        return ph.attend(q, k, v, score=ph.soft_cap(cap), normalizer=ph.sigmoid(bias=-cap))

    # torch fixes the floats of an operator: each is compiled, none fails
    assert compilations(call, (2.0, 5.0, 3.5)) <= 3


@pytest.mark.parametrize(
    "make",
    [
        lambda ids, n: ph.documents(ids) & Not(ph.window(n)),
        lambda ids, n: Not(ph.padding(ids > 0) & ph.causal()),
        lambda ids, n: ph.where(lambda b, h, i, j: (i + j) % 3 == 0) & ph.causal(),
        lambda ids, n: ph.per_head([ph.causal(), ph.window(n), Not(ph.causal()), ph.prefix(n)]),
    ],
    ids=["not window", "not padding", "function", "per head"],
)
def test_masks_made_inside(make: Callable[[Tensor, int], Mask]) -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, n: int) -> Tensor:
        return ph.attend(q, k, v, mask=make(ids, n))

    q, k, v = operands()
    ids = torch.arange(200).expand(2, -1) // 70
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for n in (3, 4):
        want, got = call(q, k, v, ids, n), compiled(q, k, v, ids, n)
        torch.testing.assert_close(got, want)
        for a, b in zip(
            torch.autograd.grad(got.sin().sum(), (q, k, v)),
            torch.autograd.grad(want.sin().sum(), (q, k, v)),
            strict=True,
        ):
            torch.testing.assert_close(a, b)


def test_an_exported_program_keeps_its_description(tmp_path: Path) -> None:
    class Windowed(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.nn.Parameter(torch.randn(4, 9))

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return ph.attend(q, k, v, mask=ph.window(9), score=ph.relative_bias(self.table))

    model, x = Windowed(), operands(300, grad=False)
    torch.export.save(torch.export.export(model, x), tmp_path / "windowed.pt2")
    code = (
        "import sys, torch, polyhead, polyhead.attend.opaque\n"
        "program = torch.export.load(sys.argv[1])\n"
        "x = torch.load(sys.argv[2])\n"
        "torch.save(program.module()(*x), sys.argv[3])"
    )
    torch.save(x, tmp_path / "x.pt")
    files = [str(tmp_path / name) for name in ("windowed.pt2", "x.pt", "y.pt")]
    subprocess.run([sys.executable, "-c", code, *files], check=True)
    torch.testing.assert_close(torch.load(files[2]), model(*x))


def test_dropout_is_repeatable() -> None:
    compiled = torch.compile(
        lambda q, k, v: ph.attend(q, k, v, dropout=0.5), backend="aot_eager", fullgraph=True
    )
    q, k, v = operands()
    outs = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        outs.append(compiled(q, k, v))
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])
    torch.autograd.grad(outs[0].sum(), (q, k, v))


def test_the_operator_is_a_good_citizen() -> None:
    from polyhead.attend.opaque import _attend
    from polyhead.attend.spelling import Spelling, spell

    table = torch.randn(4, 9, requires_grad=True)
    found = Spelling()
    text = spell((ph.causal(), ph.relative_bias(table), ph.softmax(), None), found)
    q, k, v = operands(20)
    seed = torch.zeros((), dtype=torch.int64)
    torch.library.opcheck(
        _attend, (q, k, v, found.tensors, found.ints, found.floats, text, 0.3, 0.0, seed, True, "auto")
    )


@pytest.mark.slow
@pytest.mark.parametrize("name", ["causal", "window", "alibi"])
def test_inductor(name: str) -> None:
    compiled = torch.compile(CALLS[name], fullgraph=True)
    q, k, v = operands()
    want, got = CALLS[name](q, k, v), compiled(q, k, v)
    torch.testing.assert_close(got, want)
    for a, b in zip(
        torch.autograd.grad(got.sin().sum(), (q, k, v)),
        torch.autograd.grad(want.sin().sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
def test_flex_equals_the_dense_form() -> None:
    q, k, v = operands(256, grad=False)
    for call in (
        {"mask": ph.causal() & ph.window(40)},
        {"mask": ph.causal(), "score": ph.alibi(4)},
        {"score": ph.soft_cap(3.0)},
    ):
        got = ph.attend(q, k, v, backend="flex", **call)
        torch.testing.assert_close(got, ph.attend(q, k, v, backend="reference", **call), rtol=1e-4, atol=1e-4)
