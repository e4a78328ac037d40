"""What must hold of superlinear attention."""

from __future__ import annotations

import dataclasses
import inspect
import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.nn import rope, span_search
from polyhead.nn.span_search import SpanRule

F64 = {"dtype": torch.float64}
NAME = "superlinear_attention"
X = torch.randn(2, 61, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()
SHORT = {"backward": 1.0, "forward": 0.5, "top_k": 2}  # spans that leave much unread


def built(name: str = NAME, **options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = built("grouped_query", kv_heads=module.kv_heads, **options)
    state = {name: p for name, p in module.state_dict().items() if ".search" not in name}
    plain.load_state_dict(state)
    return plain


def decoded(module: Any, chunks: list[int], x: Tensor = X) -> Tensor:
    cache = module.new_cache(len(x))
    return torch.cat([module(one, mask=CAUSAL, cache=cache) for one in x.split(chunks, dim=1)], dim=1)


def weights_of(module: Any, x: Tensor) -> Tensor:
    """Read off the module, `(B, H, L, L)`: with the identity for values its outputs are its weights."""
    q, (k, _) = module._queries(x, 0), module._rows(x, 0)
    heads, groups = module.heads, module.kv_heads
    search, q = q.unflatten(1, (2, groups, heads // groups)).unbind(1)
    eye = torch.eye(x.shape[1], **F64).expand(len(x), groups, -1, -1)
    return module._strips(search, q, k, eye, None, 0).flatten(1, 2)


@pytest.mark.parametrize(
    "options",
    [
        {"kv_heads": 2, "top_k": 2, "compiled": True},
        {"window_index": 0, "top_k": 1, "backward": 1.0, "forward": 0.0, "kv_heads": 1, "value_dim": 5},
        {"search_power": 0.7, "span_power": 0.3, "backward": 0.5, "forward": 0.5, "bias": True},
    ],
    ids=str,
)
@pytest.mark.parametrize("gathered", [False, True])
def test_other_numbers_keep_the_contract(
    options: dict[str, Any], gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gathered:
        monkeypatch.setattr(span_search, "_GATHERED", 0)
    assert not broken_rules(NAME, **options)


@pytest.mark.parametrize("gathered", [False, True])
def test_long_spans_and_many_anchors_are_those_of_the_definition(
    gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The contract has few tokens; here spans do not reach the first one, and anchors are left out."""
    if gathered:
        monkeypatch.setattr(span_search, "_GATHERED", 0)
    twin = ph.reference(NAME)
    real = torch.ones(2, 61, dtype=torch.bool)
    real[0, :7] = real[1, 20:23] = real[1, 57:] = False
    for options in ({}, SHORT, {"search_power": 0.55, "window_index": 2, **SHORT}):
        module = built(kv_heads=2, **options)
        config = ph.entry(NAME).config(dim=32, heads=4, kv_heads=2, **options)
        wanted = inspect.signature(twin).parameters.keys() - {"mask", "padding"}
        fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in wanted}
        for padding in (None, real):
            found = module(X, mask=CAUSAL, padding=padding).detach()
            want = twin(X, parameters=module.state_dict(), padding=padding, **fields)
            rows = torch.ones_like(real) if padding is None else padding
            close(found[rows], want[rows].detach())


def test_up_to_the_window_it_is_causal_attention() -> None:
    for index, window in ((0, 0), (1, 3), (2, 8), (3, 15)):
        module = built(kv_heads=2, window_index=index, position=rope(), **SHORT)
        assert module.rule.window == window
        plain = plain_of(module, position=rope())
        close(module(X[:, :window], mask=CAUSAL), plain(X[:, :window], mask=CAUSAL))
    assert (module(X, mask=CAUSAL) - plain(X, mask=CAUSAL)).abs().max() > 1e-3


@pytest.mark.parametrize("gathered", [False, True])
def test_spans_that_hold_everything_are_causal_attention(
    gathered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if gathered:
        monkeypatch.setattr(span_search, "_GATHERED", 0)
    for top_k in (1, 3):
        module = built(kv_heads=2, top_k=top_k, backward=61.0, forward=61.0, position=rope())
        close(module(X, mask=CAUSAL), plain_of(module, position=rope())(X, mask=CAUSAL))


def test_every_past_token_lies_in_some_span_or_in_the_window() -> None:
    for backward, holes in ((2.0, False), (0.5, True)):
        found = False
        for index in (0, 1, 3):
            rule = SpanRule(index, backward, 0.0, 0.5, 0.5)
            for t in (0, 7, 8, 63, 64, 500, 4095, 4096):
                reach = int(rule.reach(backward, torch.tensor(t + 1.0, **F64)))
                covered = set(range(max(0, t - rule.window + 1), t + 1))
                for back in rule.anchors(t):
                    covered |= set(range(max(0, t - back - reach), t - back + 1))
                found |= covered != set(range(t + 1))
        assert found == holes


def test_anchors_stand_at_square_numbers() -> None:
    assert SpanRule(1, 2.0, 0.0, 0.5, 0.5).anchors(40) == [3, 8, 15, 24, 35]
    assert SpanRule(0, 2.0, 0.0, 1 / 3, 0.5).anchors(200) == [0, 7, 26, 63, 124]
    assert SpanRule(3, 2.0, 0.0, 0.5, 0.5).anchors(2) == [3]  # one in any case, though it is not there
    reach = SpanRule(1, 2.0, 0.0, 0.5, 0.5).reach
    assert reach(2.0, torch.tensor([1.0, 49.0, 50.0], **F64)).tolist() == [2, 14, 15]


def test_a_window_beyond_any_sequence_is_causal_attention() -> None:
    for options in ({"window_index": 10**6}, {"search_power": 0.001}, {"backward": 1e308, "forward": 1e308}):
        module = built(kv_heads=2, **options)
        close(module(X, mask=CAUSAL), plain_of(module)(X, mask=CAUSAL))


def test_rows_sum_to_one_and_read_the_spans_of_the_best_anchors() -> None:
    module = built(kv_heads=2, **SHORT)
    with torch.no_grad():
        weights = weights_of(module, X)
        search, k = module._queries(X, 0)[:, :4], module._rows(X, 0)[0].repeat_interleave(2, 1)
    close(weights.sum(-1), torch.ones(2, 4, 61, **F64))
    assert (weights.triu(1) == 0).all()
    t = 60
    anchors = torch.tensor([t + 1 - i * i for i in range(2, 8)])
    best = (k[:, :, anchors] @ search[:, :, t, :, None])[..., 0].topk(2).indices
    for b in range(2):
        for h in range(4):
            expected = {58, 59, 60}
            for a in anchors[best[b, h]].tolist():
                expected |= set(range(max(0, a - 8), min(a + 4, 57) + 1))
            assert set(weights[b, h, t].nonzero().view(-1).tolist()) == expected


def test_the_search_learns_by_the_shares_of_several_spans_alone() -> None:
    for top_k, learns in ((1, False), (2, True)):
        module = built(**SHORT | {"top_k": top_k})
        module(X, mask=CAUSAL).sin().sum().backward()
        assert bool(module.projection.search.weight.grad.abs().max() > 1e-6) == learns
        assert module.projection.query.weight.grad.abs().max() > 1e-3


def test_keys_that_are_gathered_give_the_same_and_the_same_gradients(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = built(kv_heads=2, position=rope(100.0), **SHORT)
    found = []
    for factor, held in ((8, 1 << 22), (0, 1 << 22), (8, 1), (0, 1)):
        monkeypatch.setattr(span_search, "_GATHERED", factor)
        monkeypatch.setattr(span_search, "_HELD", held)  # strips of 16 queries, or one
        assert module._reads_few(60) == (factor == 0)
        x = X.clone().requires_grad_()
        y = module(x, mask=CAUSAL)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])))
        with torch.no_grad():
            close(decoded(module, [1] * 61), y.detach())
            close(decoded(module, [40, 1, 20]), y.detach())
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            close(one, two)


def test_tokens_after_padding_are_read_as_if_they_were_alone() -> None:
    """Anchors go by distance and spans by the tokens so far: padding on the left changes nothing."""
    module = built(kv_heads=2, position=rope(100.0), **SHORT)
    real = torch.arange(61)[None] >= torch.tensor([[0], [13]])
    found = module(X, mask=CAUSAL, padding=real)
    close(found[1:, 13:], module(X[1:, 13:], mask=CAUSAL))


def test_what_is_read_grows_with_the_root_of_the_length() -> None:
    module = ph.build(NAME, dim=64, heads=4, window_index=3, device="meta")
    lengths = [1 << n for n in (12, 14, 16, 18, 20)]
    read = [module._read(n - 1) for n in lengths]
    slopes = [math.log2(b / a) / 2 for a, b in pairwise(read)]
    assert all(0.47 < slope < 0.51 for slope in slopes), slopes
    steps = [module.step_cost(n - 1) for n in lengths]
    full = [ph.build("mha", dim=64, heads=4, device="meta").step_cost(n - 1) for n in lengths]
    assert steps[-1].scores * 60 < full[-1].scores
    assert steps[-1].cache_bytes == full[-1].cache_bytes
    assert steps[0].scores == 2 * full[0].scores  # where few are not fewer, all pairs are scored


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"window_index": -1}, "window_index must be at least 0; got -1"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"backward": -1.0}, "backward must be a finite number at least 0, got -1.0"),
        ({"search_power": 1.0}, "search_power must be a finite number above 0 and below 1, got 1.0"),
        ({"span_power": 1.5}, "span_power must be a finite number at least 0 and at most 1, got 1.5"),
        ({"position": ph.nn.alibi_position()}, "position must not be a bias of scores"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    module = built()
    with pytest.raises(UnsupportedPattern, match="does not support a mask other than causal"):
        module(X, mask=CAUSAL & ph.documents(torch.arange(61) // 20))
    with pytest.raises(UnsupportedPattern, match=r"what comes later; pass mask=causal\(\)"):
        module(X)
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module.new_context_cache(X)
