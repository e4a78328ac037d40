"""Masks that differ from head to head: every head reads its own, with the dense answer and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import polyhead as ph
from attend.operands import results
from polyhead.attend.backends import BACKENDS, by_head
from polyhead.attend.backends.chosen import ChosenBlocks
from polyhead.attend.backends.seen_blocks import SeenBlocks
from polyhead.attend.plan import Request
from polyhead.attend.problem import Problem

LENGTH = 301
CAUSAL = ph.causal()
FOUR = {
    "windows": ph.per_head([ph.window(3), ph.window(3), ph.window(40), ph.window(None, None)]),
    "shards": ph.per_head([ph.halo(None, 16, 16) | ph.shard(16, 4, h) for h in range(4)]),
    "across groups": ph.per_head([ph.window(5), *[ph.blocks(30) | ph.sink(2)] * 2, ph.strided(7)]),
    "nothing": ph.per_head([ph.sink(0), ph.sink(0), ph.window(9), ph.documents(torch.full((LENGTH,), -1))]),
}
REAL = torch.arange(LENGTH) < torch.tensor([[LENGTH], [200]])


def tensors(kv_heads: int = 2, dtype: torch.dtype = torch.float64, queries: int = LENGTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, queries), (kv_heads, LENGTH), (kv_heads, LENGTH))
    return [
        torch.randn(2, *shape, 8, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
        for shape in shapes
    ]


def close(found: list[Tensor], wanted: list[Tensor]) -> None:
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)


@pytest.mark.parametrize("kv_heads", [1, 2, 4], ids=lambda n: f"G{n}")
@pytest.mark.parametrize("name", FOUR)
def test_equals_the_dense_form(name: str, kv_heads: int) -> None:
    given = tensors(kv_heads)
    mask = CAUSAL & FOUR[name] & ph.padding(REAL)
    close(results("by_head", given, mask=mask), results("reference", given, mask=mask))


@pytest.mark.parametrize("queries", [250, 301], ids=lambda n: f"L{n}")
def test_biases_and_sinks_of_heads_go_with_them(queries: int) -> None:
    given = tensors(queries=queries)
    table = torch.randn(4, 9, dtype=torch.float64).requires_grad_()
    sink = torch.randn(4, dtype=torch.float64).requires_grad_()
    call = {
        "mask": FOUR["across groups"],
        "score": ph.relative_bias(table),
        "normalizer": ph.softmax(sink=sink),
    }
    close(
        results("by_head", [*given, table, sink], **call), results("reference", [*given, table, sink], **call)
    )


def test_what_differs_in_heads_besides_goes_with_them() -> None:
    given = tensors()
    choice = ph.chosen(torch.tensor([[[[0]], [[1]], [[2]], [[0]]]]), rows=LENGTH, cols=120)
    rule = ph.where(lambda b, h, i, j: (h + i + j) % 3 > 0)
    mask = FOUR["windows"] & (choice | ~rule)
    close(results("by_head", given, mask=mask), results("reference", given, mask=mask))


def test_log_sum_exps() -> None:
    with torch.no_grad():
        q, k, v = tensors()
        found, wanted = (
            ph.attend(q, k, v, mask=CAUSAL & FOUR["nothing"], return_lse=True, backend=backend)
            for backend in ("by_head", "reference")
        )
    close(list(found), list(wanted))


def test_when_it_runs() -> None:
    q, k, v = tensors()
    for mask, words in (
        (CAUSAL, "not one mask for every head"),
        (FOUR["windows"] & FOUR["shards"], "not one mask for every head"),
        (ph.per_head([ph.window(2)] * 4), "all heads have the same mask"),
    ):
        assert words in ph.explain(q, k, v, mask=mask).refused["by_head"]
    mask = FOUR["windows"]
    for options, words in (
        ({"score": ph.soft_cap(3.0)}, "it gives heads a share of biases alone"),
        ({"weight_map": ph.head_mix(torch.eye(4, dtype=torch.float64))}, "needs all heads at once"),
    ):
        assert words in ph.explain(q, k, v, mask=mask, **options).refused["by_head"]  # type: ignore[arg-type]
    few = ph.explain(q[:, :, -9:], k, v, mask=mask)
    assert "done with sooner in one call" in few.refused["by_head"]
    assert ph.explain(q, k, v, mask=mask).backend == "by_head"


def test_each_run_of_heads_goes_where_its_mask_goes() -> None:
    q, k, v = tensors(dtype=torch.float32)
    mask = CAUSAL & ph.per_head([ph.window(3), ph.window(3), ph.shard(64, 4), ph.window(None, None)])
    whole = ph.attend(q, k, v, mask=mask, backend="reference")
    problem = Problem(mask, None, ph.softmax(), 8**-0.5)
    own = next(b for b in BACKENDS if isinstance(b, by_head.ByHead))
    parts = list(by_head._parts(Request(q, k, v, problem, False, True)))
    chosen = [next(b.name for b in own.others if not b.refuse(part)) for part in parts]
    assert chosen == ["banded", "seen_blocks", "sdpa"]
    assert [part.q.shape[1] for part in parts] == [2, 1, 1]
    torch.testing.assert_close(ph.attend(q, k, v, mask=mask), whole, rtol=0, atol=1e-5)


@pytest.mark.parametrize("queries", [130, 301], ids=lambda n: f"L{n}")
def test_blocks_that_are_seen(queries: int) -> None:
    """The dense answer, for a mask that differs between items and whose first rows see nothing."""
    given = tensors(queries=queries)
    ids = torch.arange(LENGTH) // 50 - 1
    mask = CAUSAL & ph.documents(torch.stack([ids, ids.flip(0)])) & ~ph.shard(7, 3)
    q, k, v = given
    backend = SeenBlocks(ChosenBlocks(()))
    request = Request(q, k, v, Problem(mask, None, ph.softmax(), 8**-0.5), False, True)
    assert backend.refuse(request) == ""
    out = backend.run(request)[0]
    weights = torch.arange(out.numel(), dtype=out.dtype).view(out.shape).sin()
    found = [out, *torch.autograd.grad((out * weights).sum(), given)]
    close(found, results("reference", given, mask=mask))


def test_blocks_that_are_seen_must_be_few() -> None:
    q, k, v = tensors()
    backend = SeenBlocks(ChosenBlocks(()))

    def reason(mask: ph.Mask | None, **more: object) -> str:
        problem = Problem(mask, more.get("score"), ph.softmax(), 1.0)  # type: ignore[arg-type]
        return backend.refuse(Request(q, k, v, problem, False, True))

    assert "most lie in blocks of which something is seen" in reason(CAUSAL)
    assert "no mask" in reason(None)
    assert "it has no score maps" in reason(ph.window(3), score=ph.soft_cap(3.0))
