from __future__ import annotations

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn import ContextCache, FixedCache, GrowingCache, KeyValueCache, WindowCache
from polyhead.nn.kv_cache.forgetting import ForgettingCache
from polyhead.nn.kv_cache.levels import LevelCache
from polyhead.nn.kv_cache.recent import RecentInputs
from polyhead.nn.kv_cache.summed import SummedCache
from polyhead.nn.stack import StackCache

STREAMS = ((2, 4), (2, 6))


def rows(count: int, batch: int = 1, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows that tell their position."""
    places = torch.arange(start, start + count, dtype=torch.float32).view(1, 1, -1, 1)
    return places.expand(batch, 2, -1, 4).clone(), -places.expand(batch, 2, -1, 6).clone()


def test_growing_copies_only_the_new_rows_and_gives_views() -> None:
    cache = GrowingCache(1, STREAMS)
    first = cache.append(*rows(5))
    assert first.rows[0].shape == (1, 2, 5, 4)
    assert first.rows[1].shape == (1, 2, 5, 6)
    second = cache.append(*rows(1, start=5))  # five do not hold six: ten now
    third = cache.append(*rows(1, start=6))
    assert second.rows[0].data_ptr() == third.rows[0].data_ptr()
    assert third.rows[0][0, 0, :, 0].tolist() == list(range(7))
    assert third.rows[1][0, 1, :, 5].tolist() == [-float(n) for n in range(7)]
    assert (third.padding, third.positions, third.mask) == (None, None, None)
    assert cache.nbytes() == 10 * 2 * (4 + 6) * 4
    assert cache.length == third.length == 7


def test_fixed_takes_its_memory_once_and_refuses_more() -> None:
    cache = FixedCache(1, STREAMS, 6)
    held = cache.nbytes()
    start = cache.append(*rows(4)).rows[0].data_ptr()
    assert cache.append(*rows(2, start=4)).rows[0].data_ptr() == start
    assert cache.nbytes() == held == 6 * 2 * 10 * 4
    with pytest.raises(ShapeError, match=r"1 more tokens do not fit, it holds 6 of max_length=6"):
        cache.append(*rows(1))
    assert cache.length == 6
    cache.crop(3)
    assert cache.append(*rows(3, start=3)).rows[0][0, 0, :, 0].tolist() == list(range(6))


@pytest.mark.parametrize(("size", "sinks"), [(4, 2), (1, 0), (1, 3), (5, 0), (40, 4)])
@pytest.mark.parametrize("chunks", [[1] * 200, [50, *[1] * 150], [3, 7, 1, 1, 90, 1, 2, 95]])
def test_window_keeps_what_it_says_in_constant_memory(size: int, sinks: int, chunks: list[int]) -> None:
    cache = WindowCache(1, STREAMS, size, sinks)
    held, seen = cache.nbytes(), 0
    for count in chunks:
        kept = cache.append(*rows(count, start=seen))
        before = seen
        seen += count
        places = torch.arange(seen) if kept.positions is None else kept.positions
        # the rows are those of the positions, in order, and the sinks and the window are among them
        assert kept.rows[0][0, 0, :, 0].tolist() == places.tolist()
        assert kept.rows[1][0, 1, :, 0].tolist() == [-float(n) for n in places]
        needed = set(range(min(sinks, seen))) | set(range(max(0, before - size + 1), seen))
        assert needed <= set(places.tolist())
        assert (kept.mask is None) == (count == 1)
        if count == 1:
            assert len(places) <= size + sinks
        assert cache.length == kept.length == seen
        assert cache.nbytes() == held
    assert held == (size + sinks + max(16, size // 4)) * 2 * 10 * 4


def test_window_says_its_mask() -> None:
    cache = WindowCache(1, STREAMS, 4, 2)
    assert cache.append(*rows(3)).mask == ph.causal() & (ph.window(3) | ph.sink(2))
    assert WindowCache(1, STREAMS, 4).append(*rows(3)).mask == ph.window(3)


def test_padding_and_positions_are_remembered() -> None:
    for cache in (GrowingCache(2, STREAMS), FixedCache(2, STREAMS, 9), WindowCache(2, STREAMS, 9)):
        cache.append(*rows(2, 2))
        assert cache.next_positions(1) is None
        padding = torch.tensor([[True, False, True], [True, True, True]])
        positions = torch.tensor([[7, 8, 9], [4, 5, 6]])
        kept = cache.append(*rows(3, 2, 2), padding=padding, positions=positions)
        assert kept.padding is not None
        assert kept.padding.tolist() == [[True, True, True, False, True], [True] * 5]
        following = cache.next_positions(2)
        assert following is not None
        assert following.tolist() == [[10, 11], [7, 8]]
        kept = cache.append(*rows(1, 2, 5), positions=following[:, :1])
        assert kept.padding is not None
        assert kept.padding[:, -1].all()
        cache.reorder(torch.tensor([1, 1]))
        following = cache.next_positions(1)
        assert following is not None
        assert following.tolist() == [[8], [8]]
        cache.crop(5)
        following = cache.next_positions(1)
        assert following is not None
        assert following.tolist() == [[7], [7]]
        cache.reset()
        assert cache.length == 0
        assert cache.append(*rows(1, 2)).padding is None


@pytest.mark.parametrize("window", [None, 5])
def test_a_cache_serves_in_inference_mode_and_out_of_it(window: int | None) -> None:
    attn = ph.build("mha", dim=16, heads=2)
    x = torch.randn(1, 9, 16)
    expected = attn(x, mask=ph.causal() if window is None else ph.window(window - 1))
    cache = attn.new_cache(1, window=window)
    parts = []
    with torch.inference_mode():
        parts.append(attn(x[:, :3], mask=ph.causal(), cache=cache).clone())
    with torch.no_grad():
        parts.append(attn(x[:, 3:5], mask=ph.causal(), cache=cache))
    parts.append(attn(x[:, 5:6], mask=ph.causal(), cache=cache))  # gradients on
    with torch.inference_mode():
        parts.append(attn(x[:, 6:8], mask=ph.causal(), cache=cache))
        parts.append(attn(x[:, 8:], mask=ph.causal(), cache=cache))
        torch.testing.assert_close(torch.cat(parts, dim=1), expected)


def test_reorder_may_change_the_batch() -> None:
    cache = GrowingCache(2, STREAMS)
    keys, values = rows(3, 2)
    keys[1] += 10
    cache.append(keys, values)
    cache.reorder(torch.tensor([1, 0, 1]))
    kept = cache.append(*rows(1, 3, 3))
    assert kept.rows[0][:, 0, :, 0].tolist() == [[10, 11, 12, 3], [0, 1, 2, 3], [10, 11, 12, 3]]


CACHES = {
    "growing": lambda: GrowingCache(2, STREAMS),
    "fixed": lambda: FixedCache(2, STREAMS, 9),
    "window": lambda: WindowCache(2, STREAMS, 4, 1),
    "forgetting": lambda: ForgettingCache(2, STREAMS),
    "recent": lambda: RecentInputs(GrowingCache(2, STREAMS), 2, 3, 4),
    "levels": lambda: LevelCache([GrowingCache(2, STREAMS), GrowingCache(2, STREAMS)]),
    "stack": lambda: StackCache([GrowingCache(2, STREAMS), WindowCache(2, STREAMS, 4)]),
    "summed": lambda: SummedCache(
        2,
        heads=2,
        kv_heads=2,
        head_dim=4,
        value_dim=6,
        size=4,
        near=2,
        summarise=lambda q, k, v, real: (q, k, v),
    ),
    "context": lambda: ContextCache(rows(3, 2), torch.tensor([[True] * 3, [False, True, True]])),
}


def tensors_in(cache: object) -> list[torch.Tensor]:
    """Copies of all tensors in a cache and in what it is made of."""
    if isinstance(cache, torch.Tensor):
        return [cache.clone()]
    parts = cache if isinstance(cache, list | tuple) else getattr(cache, "__dict__", {}).values()
    return [tensor for part in parts for tensor in tensors_in(part)]


@pytest.mark.parametrize("name", CACHES)
def test_a_wrong_order_is_refused_and_leaves_the_cache_as_it_was(name: str) -> None:
    cache = CACHES[name]()
    if name in ("growing", "fixed", "window", "forgetting", "recent"):
        cache.append(*rows(3, 2))
    before = tensors_in(cache)
    for wrong in ([0, 2], [-1, 0], [5]):
        text = rf"numbers of the 2 sequences in the cache, from 0 to 1; got \[{str(wrong)[1:-1]}\]; for other"
        with pytest.raises(ConfigError, match=f"beam_index must hold {text}"):
            cache.reorder(torch.tensor(wrong))
    for wrong in ([0, 1], torch.tensor([[0, 1]]), torch.tensor([0.0, 1.0]), torch.tensor([True, False])):
        with pytest.raises(ShapeError, match=r"beam_index must be an integer tensor \(B,\), .* got"):
            cache.reorder(wrong)
    assert before
    # room that was never written to may hold NaN
    torch.testing.assert_close(tensors_in(cache), before, rtol=0, atol=0, equal_nan=True)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        cache.reorder(torch.tensor([1, 1, 0], dtype=dtype))
        cache.reorder(torch.tensor([2, 0], dtype=dtype))


def test_an_empty_append_changes_nothing() -> None:
    for cache in (GrowingCache(1, STREAMS), WindowCache(1, STREAMS, 3, 1)):
        cache.append(*rows(6))
        kept = cache.append(*rows(0))
        assert cache.length == 6
        assert kept.rows[0].shape[2] >= 3


def test_refusals() -> None:
    cache = GrowingCache(2, STREAMS)
    with pytest.raises(ShapeError, match=r"rows of shape \(2, 2, L, 4\); got \(1, 2, 3, 4\)"):
        cache.append(*rows(3, 1))
    with pytest.raises(ShapeError, match="holds 2 streams, but append got 1"):
        cache.append(rows(3, 2)[0])
    with pytest.raises(ShapeError, match=r"holds torch.float32 on cpu, but the rows are torch.float64"):
        cache.append(*(r.double() for r in rows(3, 2)))
    with pytest.raises(ShapeError, match=r"padding must be a bool tensor \(2, 3\)"):
        cache.append(*rows(3, 2), padding=torch.ones(2, 4, dtype=torch.bool))
    assert cache.length == 0
    with pytest.raises(ConfigError, match=r"length must lie in 0..0"):
        cache.crop(1)
    with pytest.raises(ConfigError, match="size must be at least 1"):
        WindowCache(1, STREAMS, 0)
    with pytest.raises(ConfigError, match="max_length must be at least 1"):
        FixedCache(1, STREAMS, 0)
    moved = WindowCache(1, STREAMS, 3)
    moved.append(*rows(1))
    for n in range(5):
        moved.append(*rows(1, start=n))
    with pytest.raises(ConfigError, match="the window has moved on"):
        moved.crop(4)
    attn = ph.build("mha", dim=16, heads=2)
    with pytest.raises(ConfigError, match="window=4 and max_length=8 were both given"):
        attn.new_cache(1, window=4, max_length=8)
    with pytest.raises(ConfigError, match="sinks=2 needs window="):
        attn.new_cache(1, sinks=2)
    context = torch.randn(1, 4, 16)
    held = attn.new_context_cache(context)
    with pytest.raises(ConfigError, match="already holds a context and its padding; leave context= out"):
        attn(context, context, cache=held)
    with pytest.raises(ConfigError, match="takes no further keys and values"):
        held.append(*rows(1))


def test_a_window_is_taken_back_while_nothing_has_fallen_out() -> None:
    cache = WindowCache(1, STREAMS, 5, 1)
    cache.append(*rows(4))
    cache.crop(2)
    kept = cache.append(*rows(1, start=2))
    assert kept.rows[0][0, 0, :, 0].tolist() == [0, 1, 2]


def test_a_context_is_projected_once() -> None:
    attn = ph.build("gqa", dim=16, heads=4, kv_heads=2)
    context = torch.randn(2, 7, 16)
    cache: KeyValueCache = attn.new_context_cache(context)
    assert cache.nbytes() == attn.cost(1, batch=2, context_length=7).cache_bytes
    calls = []
    attn.projection.key.register_forward_hook(lambda *_: calls.append(1))
    x = torch.randn(2, 3, 16)
    found = torch.cat([attn(part, cache=cache) for part in x.split(1, dim=1)], dim=1)
    assert not calls
    torch.testing.assert_close(found, attn(x, context))
    cache.reorder(torch.tensor([1, 0]))
    torch.testing.assert_close(attn(x, cache=cache), attn(x, context.flip(0)))


def test_a_context_may_grow_with_the_queries() -> None:
    attn = ph.build("mha", dim=16, heads=2, position=ph.nn.rope(), dtype=torch.float64)
    x, context = torch.randn(2, 1, 8, 16, dtype=torch.float64)
    full = attn(x, context, mask=ph.causal())
    cache = attn.new_cache(1)
    with torch.no_grad():
        parts = [
            attn(a, b, mask=ph.causal(), cache=cache)
            for a, b in zip(x.split([3, 1, 4], 1), context.split([3, 1, 4], 1), strict=True)
        ]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)


@pytest.mark.parametrize("options", [{}, {"max_length": 40}, {"window": 6, "sinks": 2}], ids=str)
def test_decoding_compiles_to_a_few_graphs_that_serve_every_step(options: dict[str, int]) -> None:
    from torch._dynamo.utils import counters

    attn = ph.build("gqa", dim=32, heads=4, kv_heads=2, position=ph.nn.rope())
    x = torch.randn(2, 40, 32)
    torch._dynamo.reset()
    counters.clear()
    compiled = torch.compile(attn, backend="eager")
    with torch.no_grad():
        caches = attn.new_cache(2, **options), attn.new_cache(2, **options)
        for part in x.split([8, *[1] * 32], dim=1):
            found, expected = (
                module(part, mask=ph.causal(), cache=cache)
                for module, cache in zip((compiled, attn), caches, strict=True)
            )
            torch.testing.assert_close(found, expected)
    assert not counters["graph_break"]
    assert counters["stats"]["unique_graphs"] <= 4
    torch._dynamo.reset()


def test_a_cache_made_under_autocast_holds_what_autocast_computes() -> None:
    attn = ph.build("gqa", dim=32, heads=4, qk_norm=True, position=ph.nn.rope())
    x = torch.randn(2, 9, 32)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        full, cache = attn(x, mask=ph.causal()), attn.new_cache(2)
        parts = [attn(part, mask=ph.causal(), cache=cache) for part in x.split([5, 4], dim=1)]
    assert full.dtype == torch.bfloat16
    torch.testing.assert_close(torch.cat(parts, dim=1), full, rtol=0.02, atol=0.02)
    assert cache.nbytes() == 10 * 2 * 2 * 8 * 2 * attn.kv_heads
