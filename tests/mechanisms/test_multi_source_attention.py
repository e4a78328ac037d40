"""What the paper of multi-source attention says must hold, paper 140."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
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
NOTHING = tuple(torch.zeros(s.shape[:2], dtype=torch.bool) for s in SOURCES)


def built(name: str = "multi_source_attention", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


@pytest.mark.parametrize("mode", [*MODES, "hierarchical sentinel", "flat sentinel"])
@pytest.mark.parametrize("heads", [{}, {"kv_heads": 2, "bias": True, "qk_norm": True}])
def test_sources_of_different_lengths_equal_the_twin(mode: str, heads: dict) -> None:
    mode, _, sentinel = mode.partition(" ")
    module = built(sources=3, mode=mode, sentinel=bool(sentinel), **heads)
    real = tuple(torch.arange(s.shape[1]) < torch.tensor([[s.shape[1]], [2]]) for s in SOURCES)
    config = module.config
    twin = ph.reference("multi_source_attention")
    options = {"parameters": module.state_dict(), "heads": 4, "kv_heads": config.kv_heads}
    expected = twin(X, SOURCES, **options, sources=3, mode=mode, sentinel=config.sentinel, padding=real)
    close(module(X, SOURCES, padding=real), expected)
    cache = module.new_context_cache(SOURCES, padding=real, queries=6)
    close(torch.cat([module(x, cache=cache) for x in X.split([1, 5], 1)], 1), expected)
    assert cache.nbytes() >= module.cost(6, 2, 3).cache_bytes
    without = built(sources=3, mode=mode, **heads)
    assert cache.nbytes() == without.new_context_cache(SOURCES, padding=real).nbytes()


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
    with pytest.raises(ConfigError, match="concat weighs no source against another"):
        built(mode="concat", sentinel=True)
    with pytest.raises(ConfigError, match="sentinel must be True or False; got 'flat'"):
        built(sentinel="flat")
    key, concat = built(mode="flat", sentinel=True).sentinel, built(mode="concat")
    with pytest.raises(ConfigError, match="sentinel must be a SentinelContext, or None, for Hierarchical"):
        type(module)(module.sources, module.combine, key)
    with pytest.raises(ConfigError, match="sentinel must be None for Concatenated"):
        type(module)(concat.sources, concat.combine, key)


@pytest.mark.parametrize("mode", [*MODES, "hierarchical sentinel", "flat sentinel"])
def test_a_padding_for_every_view_of_one_sequence(mode: str) -> None:
    mode, _, sentinel = mode.partition(" ")
    module = built(mode=mode, sentinel=bool(sentinel))
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


# ---- the sentinel ----


@pytest.mark.parametrize("options", [{}, {"mode": "flat", "kv_heads": 2, "value_dim": 5}])
def test_a_sentinel_keeps_the_whole_contract(options: dict) -> None:
    assert broken_rules("multi_source_attention", whole=True, sentinel=True, **options) == {}


@pytest.mark.parametrize("mode", MODES[:2])
@pytest.mark.parametrize("position", [ph.nn.rope(), ph.nn.sinusoidal(), ph.nn.alibi_position()])
def test_decoding_with_positions_equals_the_full_call(mode: str, position: object) -> None:
    module = built(mode=mode, sentinel=True, position=position).eval()
    with torch.no_grad():
        for mask in (ph.causal(), ph.causal() & (ph.window(2) | ph.sink(1))):
            cache = module.new_cache(2)
            parts = [module(x, mask=mask, cache=cache) for x in X.split([1, 3, 2], 1)]
            close(torch.cat(parts, 1), module(X, mask=mask))


def test_a_flat_sentinel_is_a_token_that_its_own_query_alone_sees() -> None:
    module, plain = (built(sources=1, mode="flat", sentinel=own) for own in (True, False))
    state = module.state_dict()
    for name in ("key.weight", "value.weight"):
        state[f"sentinel.projection.{name}"] = state[f"sources.0.projection.{name}"]
    module.load_state_dict(state)
    plain.load_state_dict({n: t for n, t in state.items() if not n.startswith("sentinel")})
    gated = module.sentinel.gated(X)
    close(gated, (X @ state["sentinel.gate.weight"].T).sigmoid() * X)
    together = module(X, SOURCES[0])
    for n in range(X.shape[1]):
        one = slice(n, n + 1)
        close(together[:, one], plain(X[:, one], torch.cat([SOURCES[0], gated[:, one]], 1)))


def test_a_hierarchical_sentinel_is_one_more_context() -> None:
    module = built(sources=2, sentinel=True)
    contexts = [source(X, own)[0] for source, own in zip(module.sources, SOURCES, strict=False)]
    contexts.append(module.sentinel.gated(X) @ module.sentinel.output.weight.T)
    outer = module.combine.projection
    k, v = zip(*(outer.keys_values(c) for c in contexts), strict=True)
    logits = (outer.queries(X)[..., None, :] * torch.stack(k, -2)).sum(-1) / 8**0.5
    close(module.source_shares(X, SOURCES[:2]), logits.softmax(-1))
    heads = (logits.softmax(-1)[..., None] * torch.stack(v, -2)).sum(-2)
    close(module(X, SOURCES[:2]), module.combine.output(heads))


@pytest.mark.parametrize("mode", MODES[:2])
def test_the_last_share_is_the_sentinels(mode: str) -> None:
    module = built(sources=3, mode=mode, sentinel=True)
    shares = module.source_shares(X, SOURCES, mask=ph.window(2, 2))
    assert shares.shape == (2, 4, 6, 4)
    close(shares.sum(-1), torch.ones(2, 4, 6, **F64))
    assert (shares[..., 3] > 0).all()
    plain = built(sources=3, mode=mode)
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if not n.startswith("sentinel")})
    rest = shares[..., :3] / shares[..., :3].sum(-1, keepdim=True)
    close(rest, plain.source_shares(X, SOURCES, mask=ph.window(2, 2)))


def alone(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What a token gets that sees its sentinel and nothing else."""
    shown = module.sentinel(x)[0]
    if module.config.mode == "hierarchical":
        shown = module.combine.projection.keys_values(shown)[1]
    return module.combine.output(shown)


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_token_that_sees_nothing_gets_the_sentinel_alone(mode: str) -> None:
    module = built(sources=3, mode=mode, sentinel=True)
    expected = alone(module, X)
    assert expected.abs().min() > 0
    poisoned = tuple(torch.full_like(s, torch.nan) for s in SOURCES)
    close(module(X, poisoned, padding=NOTHING), expected)
    cache = module.new_context_cache(poisoned, padding=NOTHING, queries=6)
    close(torch.cat([module(x, cache=cache) for x in X.split([1, 5], 1)], 1), expected)
    shares = module.source_shares(X, SOURCES, padding=NOTHING)
    assert (shares == torch.tensor([0.0, 0.0, 0.0, 1.0], **F64)).all()
    mask = ph.documents(torch.tensor([0, 0, -1, 1, 1, 1]))
    close(module(X, mask=mask)[:, 2], expected[:, 2])
    empty = tuple(s[:, :0] for s in SOURCES)
    close(module(X, empty), expected)
    module(X, poisoned, padding=NOTHING).square().sum().backward()
    for name, p in module.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name
    assert module.sentinel.gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", MODES[:2])
def test_packed_rows_equal_rows_of_their_own(mode: str) -> None:
    module = built(mode=mode, sentinel=True)
    together = module(X, mask=ph.causal() & ph.documents(torch.tensor([0, 0, 1, 1, 1, 1])))
    parts = [module(part, mask=ph.causal()) for part in X.split([2, 4], 1)]
    close(together, torch.cat(parts, 1))


@pytest.mark.parametrize("mode", MODES[:2])
def test_no_other_token_sees_a_sentinel(mode: str) -> None:
    module = built(mode=mode, sentinel=True)
    moved = X.clone()
    moved[:, 3] += 1
    others = [n for n in range(6) if n != 3]
    close(module(moved, SOURCES[:2])[:, others], module(X, SOURCES[:2])[:, others])


@pytest.mark.parametrize(
    "part", [{"position": ph.nn.rope()}, {"position": ph.nn.sinusoidal()}, {"score": ph.soft_cap(0.01)}]
)
def test_a_flat_sentinel_stands_nowhere(part: dict) -> None:
    module, plain = built(mode="flat", sentinel=True, **part), built(mode="flat", sentinel=True)
    close(module(X, SOURCES[:2], padding=NOTHING[:2]), plain(X, SOURCES[:2], padding=NOTHING[:2]))
    close(module.sentinel(X)[1], plain.sentinel(X)[1])


def test_dropout_and_dropped_heads_act_on_a_flat_sentinel() -> None:
    call = {"padding": NOTHING[:2]}
    module = built(mode="flat", sentinel=True, dropout=0.5).train()
    shown = module.sentinel.eval()(X)[0]
    drawn = module.sentinel.train()(X)[0]
    dropped = (drawn == 0).all(-1)
    assert 0.2 < dropped.double().mean() < 0.8
    close(drawn, 2 * shown * ~dropped[..., None])
    module.eval()
    close(module(X, SOURCES[:2], **call), alone(module, X))
    module = built(mode="flat", sentinel=True, regularizers=ph.nn.drop_head(0.5, rescale=False)).train()
    gone = (module.sentinel(X)[0] == 0).all(-1)
    assert torch.equal(gone, gone[..., :1].expand_as(gone))
    assert gone.any()


@pytest.mark.parametrize(("mode", "more"), [("hierarchical", 2), ("flat", 3)])
def test_what_a_sentinel_costs(mode: str, more: int) -> None:
    with_it, without = (built(sources=3, mode=mode, sentinel=own).cost(16, 2) for own in (True, False))
    assert with_it.parameters - without.parameters == more * 32**2
    assert with_it.kv_bytes_per_token == without.kv_bytes_per_token
    assert with_it.cache_bytes == without.cache_bytes
    assert with_it.scores - without.scores == 2 * 2 * 16 * 32
    step = built(sources=3, mode=mode, sentinel=True).step_cost(15, 1, 2)
    assert step.scores == with_it.scores / 16


class Largest(TorchDispatchMode):
    """The most numbers that a tensor had."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor):
                self.numbers = max(self.numbers, one.numel())
        return out


@pytest.mark.parametrize("mode", MODES[:2])
def test_a_sentinel_makes_nothing_of_all_pairs_of_tokens(mode: str) -> None:
    module = built(mode=mode, sentinel=True)
    x = torch.randn(1, 512, 32, **F64, requires_grad=True)
    with Largest() as seen:
        module(x, tuple(s[:1] for s in SOURCES[:2])).sum().backward()
    assert seen.numbers < 512 * 512
