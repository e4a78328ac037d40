"""What the paper of multi-source attention says must hold, paper 140."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError, UnknownName

F64 = {"dtype": torch.float64}
G = torch.Generator().manual_seed(0)
X = torch.randn(2, 6, 32, generator=G, **F64)
SOURCES = tuple(torch.randn(2, n, 32, generator=G, **F64) for n in (5, 9, 3))
MODES = ("hierarchical", "flat", "concat")


def built(name: str = "multi_source_attention", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("heads", [{}, {"kv_heads": 2, "bias": True, "qk_norm": True}])
def test_sources_of_different_lengths_equal_the_twin(mode: str, heads: dict) -> None:
    module = built(sources=3, mode=mode, **heads)
    real = tuple(torch.arange(s.shape[1]) < torch.tensor([[s.shape[1]], [2]]) for s in SOURCES)
    config = module.config
    twin = ph.reference("multi_source_attention")
    options = {"parameters": module.state_dict(), "heads": 4, "kv_heads": config.kv_heads}
    expected = twin(X, SOURCES, **options, sources=3, mode=mode, padding=real)
    close(module(X, SOURCES, padding=real), expected)
    cache = module.new_context_cache(SOURCES, padding=real, queries=6)
    close(torch.cat([module(x, cache=cache) for x in X.split([1, 5], 1)], 1), expected)
    assert cache.nbytes() >= module.cost(6, 2, 3).cache_bytes


def test_one_flat_source_is_multi_head_attention() -> None:
    module, plain = built(sources=1, mode="flat"), built("mha")
    state = module.state_dict().items()
    plain.load_state_dict({n.removeprefix("sources.0.").removeprefix("combine."): t for n, t in state})
    for call in ({}, {"mask": ph.causal()}):
        close(module(X, SOURCES[:1], **call), plain(X, SOURCES[0], **call))
    close(module.source_shares(X, SOURCES[:1]), torch.ones(2, 4, 6, 1, **F64))


def test_one_hierarchical_source_is_mapped_and_nothing_else() -> None:
    module = built(sources=1)
    close(module.source_shares(X, SOURCES[:1]), torch.ones(2, 4, 6, 1, **F64))
    context = module.sources[0](X, SOURCES[0])[0]
    mapped = context @ module.combine.projection.value.weight.T @ module.combine.output.weight.T
    close(module(X, SOURCES[:1]), mapped)


@pytest.mark.parametrize("mode", MODES[:2])
def test_shares_sum_to_one_over_the_sources(mode: str) -> None:
    module = built(sources=3, mode=mode)
    shares = module.source_shares(X, SOURCES)
    assert shares.shape == (2, 4, 6, 3)
    assert (shares > 0).all()
    close(shares.sum(-1), torch.ones(2, 4, 6, **F64))


def swapped(module: nn.Module, order: list[int]) -> nn.Module:
    other = built(sources=len(order), mode=module.config.mode)
    state = module.state_dict()
    for name, tensor in module.state_dict().items():
        head, _, rest = name.removeprefix("sources.").partition(".")
        if name.startswith("sources."):
            state[f"sources.{order.index(int(head))}.{rest}"] = tensor
    other.load_state_dict(state)
    return other


@pytest.mark.parametrize("mode", MODES[:2])
def test_the_order_of_the_sources_does_not_matter(mode: str) -> None:
    module = built(sources=3, mode=mode)
    order = [2, 0, 1]
    close(swapped(module, order)(X, [SOURCES[n] for n in order]), module(X, SOURCES))


def split(mode: str) -> tuple[torch.Tensor, torch.Tensor]:
    """What a source gives, and what its two halves give with the same projections."""
    module = built(sources=2, mode=mode)
    same = {n: t for n, t in module.state_dict().items() if n.startswith("sources.0.")}
    module.load_state_dict(module.state_dict() | {n.replace("0", "1", 1): t for n, t in same.items()})
    one = built(sources=1, mode=mode)
    one.load_state_dict({n: t for n, t in module.state_dict().items() if not n.startswith("sources.1.")})
    return one(X, SOURCES[1:2]), module(X, (SOURCES[1][:, :4], SOURCES[1][:, 4:]))


def test_flat_does_not_see_where_a_source_is_split_and_hierarchical_does() -> None:
    close(*split("flat"))
    whole, halves = split("hierarchical")
    assert (whole - halves).abs().max() > 1e-3


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_source_without_real_tokens_has_no_part(mode: str) -> None:
    module = built(sources=3, mode=mode)
    real = [torch.ones(s.shape[:2], dtype=torch.bool) for s in SOURCES]
    real[1][0] = False
    shares = module.source_shares(X, SOURCES, padding=real)
    assert (shares[0, ..., 1] == 0).all()
    assert (shares[1, ..., 1] > 0).all()
    close(shares.sum(-1), torch.ones(2, 4, 6, **F64))
    poisoned = [s.clone() for s in SOURCES]
    poisoned[1][0] = torch.nan
    out = module(X, poisoned, padding=real)
    close(out, module(X, SOURCES, padding=real))
    fewer = built(sources=2, mode=mode)
    state = {n: t for n, t in module.state_dict().items() if "sources.1" not in n}
    fewer.load_state_dict({n.replace("sources.2", "sources.1"): t for n, t in state.items()})
    close(out[:1], fewer(X, SOURCES[::2])[:1])
    assert (module(X, SOURCES, padding=[r & False for r in real]) == 0).all()


def test_flat_weights_factor_into_a_source_and_a_token_of_it() -> None:
    module = built(sources=2, mode="flat")
    heads = [source(X, own)[0] for source, own in zip(module.sources, SOURCES, strict=False)]
    shares = module.source_shares(X, SOURCES[:2])
    mixed = sum(shares[..., n : n + 1] * heads[n] for n in range(2))
    close(module(X, SOURCES[:2]), module.combine.output(mixed))


def test_widths_of_their_own() -> None:
    module = built(sources=2, context_dims=(8, 20))
    assert module(X, (torch.randn(2, 4, 8, **F64), torch.randn(2, 7, 20, **F64))).shape == X.shape


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'flat'"):
        built(mode="flatt")
    with pytest.raises(ConfigError, match="flat takes one softmax over all sources"):
        built(mode="flat", normalizer=ph.sigmoid())
    with pytest.raises(ConfigError, match="context_dims must be 2 widths"):
        built(context_dims=(8,))
    module = built()
    with pytest.raises(ShapeError, match="context must be a tensor, or a sequence of 2"):
        module(X, SOURCES)
    with pytest.raises(ConfigError, match="cache must be what new_cache or new_context_cache of this module"):
        module(X, cache=built("mha").new_cache(2))
    with pytest.raises(ConfigError, match="no shares"):
        built(mode="concat").source_shares(X)


@pytest.mark.parametrize("mode", MODES)
def test_a_padding_for_every_view_of_one_sequence(mode: str) -> None:
    module = built(mode=mode)
    real = torch.arange(6) < torch.tensor([[6], [4]])
    x = X.masked_fill(~real[..., None], torch.nan)
    out = module(x, padding=(real, real))
    close(out, module(X, padding=real))
    out[real].sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())


@pytest.mark.parametrize("mode", ["flat", "concat"])
def test_every_mode_keeps_the_contract(mode: str) -> None:
    assert broken_rules("multi_source_attention", mode=mode, sources=3, kv_heads=2) == {}


def test_a_mask_costs_a_hierarchical_call_no_more_products() -> None:
    module = built(sources=2)
    x = torch.zeros(2, 16, 32, **F64)
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        module(x, (x, x), mask=ph.window(20, 20))
    assert counter.get_total_flops() <= module.cost(16, batch=2).flops
