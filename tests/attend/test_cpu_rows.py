"""Attention of rows by oneDNN's products: the same as by torch's fused kernel, and where it is asked for."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import polyhead as ph
from polyhead.attend import cpu_products, cpu_rows
from polyhead.attend.fused_cpu import HIDDEN, fused, fused_backward
from polyhead.attend.pieces import Sizes, pieces

pytestmark = pytest.mark.skipif(
    not hasattr(torch.ops.mkldnn, "_linear_pointwise"), reason="this torch was built without oneDNN"
)


@pytest.fixture
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """By products, whatever the processor and the size; in several parts."""
    monkeypatch.setattr(cpu_rows, "onednn_is_quicker", lambda: True)
    for name, value in (
        ("_PAIRS", 1),
        ("_ROWS", 1),
        ("_KEYS", 1),
        ("_PART", 16),
        ("_MULTIPLE", 8),
        ("_SCORES", 2500),
    ):
        monkeypatch.setattr(cpu_rows, name, value)


def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, dtype=dtype)


@pytest.mark.parametrize("large", [1, 1 << 20])  # pairs, from which groups are taken one at a time
@pytest.mark.parametrize("skips", [False, True])
@pytest.mark.parametrize("last", [37, 11])
@pytest.mark.parametrize("tables", [None, (1, 1), (3, 1), (1, 2), (3, 2)])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("by_products", [True, False])
def test_forward_and_backward_are_those_of_attention(
    wanted: None,
    by_products: bool,
    shared: bool,
    tables: tuple[int, int] | None,
    last: int,
    skips: bool,
    large: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    q, g = drawn(3, 2, 29, 16), drawn(3, 2, 29, 16)
    k, v = (drawn(3, 1 if shared else 2, 37, 16) for _ in range(2))
    added = None
    if tables:
        added = torch.zeros(*tables, 29, last)
        added.masked_fill_(torch.rand(added.shape) < 0.5, HIDDEN)
        added[:, :, 5] = HIDDEN  # with all keys, a row that sees nothing
    skipped = torch.tensor([0, 3, 20]) if skips else None
    monkeypatch.setattr(cpu_rows, "onednn_is_quicker", lambda: by_products)
    monkeypatch.setattr(cpu_rows, "_LARGE", large)
    assert cpu_rows.pays(q.shape[2], k.shape[2], q.dtype) == by_products
    keys, values = (x.expand(3, 2, 37, 16) for x in (k, v))
    out, lse = fused(q, keys, values, added, 0.3, skipped)
    leaves = [x.double().requires_grad_() for x in (q, k, v)]
    scores = leaves[0] @ leaves[1].mT * 0.3
    scores = scores if added is None else scores + F.pad(added.double(), (37 - last, 0))
    if skipped is not None:
        scores = scores.masked_fill((torch.arange(37) < skipped[:, None])[:, None, None], -torch.inf)
    expected = scores.softmax(-1) @ leaves[2]
    seen = torch.ones(29, dtype=torch.bool)
    if tables and last == 37:
        seen[5] = False
        assert bool((lse[:, :, 5] < HIDDEN / 2).all())
    torch.testing.assert_close(out[:, :, seen], expected[:, :, seen].float().detach())
    torch.testing.assert_close(lse[:, :, seen], scores.logsumexp(-1)[:, :, seen].float().detach())
    g[:, :, ~seen], lse[:, :, ~seen] = 0.0, 0.0
    found = fused_backward(g, q, keys, values, out, lse, added, 0.3, skipped)
    expected.backward(g.double())
    for own, leaf in zip(found, leaves, strict=True):
        assert leaf.grad is not None
        torch.testing.assert_close(own, leaf.grad.float(), atol=1e-5, rtol=1e-5)


def drawn_blocks(heads: int, queries: int, keys: int, cols: int = 8) -> ph.masks.Mask:
    """For every 16 queries of every head some blocks of keys, none twice, at places in no order."""
    m, n = -(-queries // 16), -(-keys // cols)
    index = torch.rand(2, heads, m, n).argsort(-1)
    return ph.chosen(
        index.masked_fill(torch.rand(2, heads, m, n) < 0.4, -1), rows=16, cols=cols, first=keys - queries
    )


DOCUMENTS = torch.arange(61).expand(2, -1) // torch.tensor([[13], [25]])
RESTS = {
    "nothing": None,
    "causal": ph.causal(),
    "window": ph.window(9),
    "documents": ph.causal() & ph.documents(DOCUMENTS),
}


@pytest.mark.parametrize("queries", [61, 40])
@pytest.mark.parametrize("rest", RESTS)
@pytest.mark.parametrize("cols", [8, 5])  # blocks that fill up rows of keys evenly, and that do not
@pytest.mark.parametrize(("heads", "alike"), [(1, False), (2, False), (2, True)])
def test_chosen_blocks_are_those_of_the_reference(
    wanted: None, queries: int, rest: str, cols: int, heads: int, alike: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    mask = drawn_blocks(1 if alike else heads, queries, 61, cols)
    mask = mask if RESTS[rest] is None else RESTS[rest] & mask
    compare("chosen", mask, heads, queries, 61, monkeypatch)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_neighborhoods_are_those_of_the_reference(
    wanted: None, kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    compare("neighborhood", ph.neighborhood((8, 8), (3, 5)), 2, 64, 64, monkeypatch, kv_heads=kv_heads)


def test_neighborhoods_of_heads_with_masks_of_their_own_are_those_of_the_reference(
    wanted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(1)
    apart = ph.per_head([ph.window(9), ph.causal()])
    for kv_heads in (1, 2):
        mask = ph.neighborhood((8, 8), (3, 5)) & apart
        compare("neighborhood", mask, 2, 64, 64, monkeypatch, kv_heads=kv_heads)


def compare(
    backend: str,
    mask: ph.masks.Mask,
    heads: int,
    queries: int,
    keys: int,
    monkeypatch: pytest.MonkeyPatch,
    kv_heads: int = 1,
) -> None:
    """Output and gradients of a backend, which must have asked for products, against the dense form."""
    calls, by_products = 0, cpu_rows._products

    def counted(*given: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return by_products(*given)

    monkeypatch.setattr(cpu_rows, "_products", counted)
    q, g = drawn(2, heads, queries, 16), drawn(2, heads, queries, 16)
    k, v = drawn(2, kv_heads, keys, 16), drawn(2, kv_heads, keys, 16)
    found: list[Tensor | None] = []
    expected: list[Tensor | None] = []
    for made, dtype, name in ((found, torch.float32, backend), (expected, torch.float64, "reference")):
        leaves = [x.to(dtype, copy=True).requires_grad_() for x in (q, k, v)]
        out = ph.attend(*leaves, mask=mask, backend=name)
        out.backward(g.to(dtype))
        made += [out.detach(), *(leaf.grad for leaf in leaves)]
    assert calls
    for own, other in zip(found, expected, strict=True):
        assert own is not None
        assert other is not None
        torch.testing.assert_close(own, other.float(), atol=1e-5, rtol=1e-5)


def test_blocks_that_are_seen_in_part_are_read_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = ph.chosen(torch.tensor([[[[0, -1, -1], [1, 0, -1], [0, 2, 1]]]]), rows=64, cols=64)
    sizes = Sizes(1, 1, 1, 192, 192, 64)
    monkeypatch.setattr(cpu_rows, "onednn_is_quicker", lambda: True)
    (first, second, third) = pieces(choice, ph.causal(), sizes, torch.float32)
    assert first.first
    assert third.first
    assert [p.blocks.tolist() for p in (first, second, third)] == [[[0]], [[0, 1]], [[0, 1, 2]]]
    for piece in (first, second, third):
        assert piece.added is not None
        assert piece.added.shape == (1, 1, 64, 64)  # of the block on the diagonal alone
    apart = list(pieces(choice, ph.causal(), sizes, torch.bfloat16))
    assert [p.added is None for p in apart] == [True, True, False]


def test_short_rows_few_pairs_and_other_dtypes_go_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_rows, "onednn_is_quicker", lambda: True)
    assert cpu_rows.pays(1024, 1024, torch.float32)
    assert cpu_rows.pays(64, 128, torch.float32)
    assert not cpu_rows.pays(1024, 64, torch.float32)
    assert not cpu_rows.pays(32, 1024, torch.float32)
    assert not cpu_rows.pays(8, 1 << 16, torch.float32)
    for dtype in (torch.float64, torch.bfloat16):
        assert not cpu_rows.pays(1024, 1024, dtype)
    monkeypatch.setattr(cpu_rows, "onednn_is_quicker", lambda: False)
    assert not cpu_rows.pays(1024, 1024, torch.float32)


@pytest.mark.parametrize(
    ("vendor", "vectors", "expected"),
    [
        ("AuthenticAMD", "AVX512", True),
        ("AuthenticAMD", "AVX2", False),
        ("GenuineIntel", "AVX512", False),
        ("", "AVX512", False),
    ],
)
def test_onednn_is_asked_where_mkl_keeps_to_less_than_there_is(
    vendor: str, vectors: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu_products, "vendor", lambda: vendor)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: True)
    assert cpu_products.onednn_is_quicker.__wrapped__() is expected


def test_programs_of_onednn_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = set()

    def noted(a: Tensor, b: Tensor) -> Tensor:
        shapes.add((*a.shape, len(b)))
        return a @ b.T

    monkeypatch.setattr(cpu_rows, "product", noted)
    for rows, keys in zip(range(200, 1000, 7), range(1000, 5000, 35), strict=False):
        cpu_rows.forward(drawn(1, 1, rows, 8), *(drawn(1, 1, keys, 8) for _ in range(2)), None, 1.0)
    assert shapes
    assert len(shapes) < 2 * 4 * 8 * 3  # two products, parts of 64 to 256 rows, eight widths an octave


def test_large_logits_do_not_overflow() -> None:
    torch.manual_seed(2)
    q, k, v = (drawn(1, 1, 64, 16) * 100 for _ in range(3))
    out, lse = cpu_rows.forward(q, k, v, None, 1.0)
    scores = q.double() @ k.double().mT
    torch.testing.assert_close(lse, scores.logsumexp(-1).float())
    # logits of 10^5 are rounded by some hundredths, and weights that are nearly even with them
    torch.testing.assert_close(out, (scores.softmax(-1) @ v.double()).float(), rtol=1e-3, atol=1e-2)
