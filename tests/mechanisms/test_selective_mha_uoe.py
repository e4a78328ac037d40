"""Selective attention: slices attend among their own tokens, and hold and compute nothing of others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName, UnsupportedPattern
from polyhead.nn import auxiliary_losses
from polyhead.nn.kv_cache import FlagBits
from polyhead.nn.lane_mask import LaneMask

F64 = {"dtype": torch.float64}
X = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "selective_mha_uoe", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 8, **config}, **F64).eval()


def dense(module: nn.Module, x: Tensor, mask: ph.Mask | None = None) -> Tensor:
    """All heads of plain attention with the same weights, a mask for every head, and the gates."""
    names = ("heads", "kv_heads", "qk_norm", "bias", "position", "score", "normalizer")
    plain = built("grouped_query", seed=9, **{name: getattr(module.config, name) for name in names})
    state = plain.state_dict()
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if key in state})
    gates, chosen, _ = module.choice(x)
    m = chosen.transpose(1, 2).repeat_interleave(module.router.heads, dim=1)  # B H L

    def both(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return m[b, h, i] & m[b, h, j]

    own = ph.where(both)
    kept = gates.transpose(1, 2)[..., None] * m[..., None]
    plain.output.register_forward_pre_hook(lambda _, inputs: (inputs[0] * kept,))
    return plain(x, mask=own if mask is None else own & mask)


@pytest.mark.parametrize("gate", ["weigh", "select"])
@pytest.mark.parametrize(("kv_heads", "k"), [(8, 1), (8, 4), (8, 7), (4, 2), (2, 1), (1, 1)])
def test_it_is_attention_under_a_mask_for_every_head(kv_heads: int, k: int, gate: str) -> None:
    module = built(kv_heads=kv_heads, top_k=k, gate=gate, position=ph.nn.rope(), qk_norm=True, bias=True)
    for mask in (None, ph.causal(), ph.window(5, 3), ph.causal() & (ph.window(4) | ph.sink(2))):
        close(module(X, mask=mask), dense(module, X, mask))


@pytest.mark.parametrize(
    "parts",
    [
        {"score": ph.soft_cap(5.0)},
        {"score": ph.alibi(8)},
        {"normalizer": ph.softmax(sink=torch.linspace(-1, 1, 8, **F64))},
        {"normalizer": ph.entmax(1.5)},
    ],
    ids=str,
)
def test_scores_and_normalizers_know_their_heads_and_places(parts: dict[str, Any]) -> None:
    for kv_heads in (8, 4):
        module = built(kv_heads=kv_heads, **parts)
        for mask in (None, ph.causal(), ph.causal() & ph.window(9)):
            close(module(X, mask=mask), dense(module, X, mask))
        cache = module.new_cache(3)
        stepped = [module(x, mask=ph.causal(), cache=cache) for x in X.split([1, 7, 1, 1, 30], dim=1)]
        close(torch.cat(stepped, dim=1), module(X, mask=ph.causal()))


@pytest.mark.parametrize("kv_heads", [8, 2])
def test_with_all_slices_it_is_grouped_query_attention_whatever_the_router(kv_heads: int) -> None:
    options = {"kv_heads": kv_heads, "position": ph.nn.rope()}
    plain = built("grouped_query", **options)
    for seed in (1, 2):
        module = built(seed=seed, top_k=kv_heads, gate="select", **options)
        module.load_state_dict(plain.state_dict(), strict=False)
        close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))
        close(module(X), plain(X))


def test_every_token_has_k_slices_and_only_those_are_projected() -> None:
    module = built(top_k=3)
    chosen = module.choice(X).active
    assert (chosen.sum(-1) == 3).all()
    counts = []
    query, maps = module.projection.query.weight, torch.nn.functional.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight.untyped_storage().data_ptr() == query.untyped_storage().data_ptr():
            counts.append(x.shape[0])
        return maps(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polyhead.nn.selected_heads.F.linear", counted)
        module(X)
    assert sum(counts) == 3 * 40 * 3  # pairs of token and head, B L k


def test_a_slice_that_nobody_chose_is_not_touched() -> None:
    module = built(heads=4, top_k=2)
    with torch.no_grad():
        module.router.gate.bias[2] = -1e9
    expected = module(X, mask=ph.causal())
    with torch.no_grad():
        for linear in (module.projection.query, module.projection.key, module.projection.value):
            linear.weight[16:24] = float("nan")
        module.output.weight[:, 16:24] = float("nan")
    assert torch.equal(module(X, mask=ph.causal()), expected)
    cache = module.new_cache(3)
    stepped = [module(x, mask=ph.causal(), cache=cache) for x in X.split(1, dim=1)]
    close(torch.cat(stepped, dim=1), expected)


def test_a_choice_is_that_of_its_own_token_and_the_batch_does_not_matter() -> None:
    module = built()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for found, expected in zip(module.choice(X[:, order]), module.choice(X), strict=True):
        assert torch.equal(found, expected[:, order])
    for n in range(3):
        close(module(X[n : n + 1]), module(X)[n : n + 1])


@pytest.mark.parametrize("lengths", [(0, 0, 0), (3, 0, 1)])
def test_padding_chooses_nothing(lengths: tuple[int, ...]) -> None:
    module = built(gate="select")
    real = torch.arange(40) < torch.tensor(lengths)[:, None]
    found = module(X.masked_fill(~real[..., None], float("nan")), padding=real)
    assert found[~real].abs().max() == 0
    for n, count in enumerate(lengths):
        close(found[n : n + 1, :count], module(X[n : n + 1, :count]))


def test_a_cache_holds_the_chosen_slices_and_a_bit_for_each() -> None:
    plain, module = built("mha"), built(top_k=2)
    assert module.cost(1).kv_bytes_per_token == plain.cost(1).kv_bytes_per_token // 4 + 1
    cache = module.new_cache(3)
    module(X, cache=cache)
    flags = (X[0, :, :13] > 0).double()
    packed = FlagBits().pack(flags)
    assert (packed.dtype, packed.shape) == (torch.uint8, (40, 2))
    assert torch.equal(FlagBits().unpack(packed, 13, torch.float64), flags)


def test_half_of_the_slices_take_a_quarter_of_the_pairs_and_half_of_the_projections() -> None:
    plain, module = built("mha").cost(512), built().cost(512)
    assert 4 * module.scores == plain.scores
    assert 4 * module.values == plain.values
    assert 2 * (module.projections - 2 * 512 * 32 * 8) == plain.projections


def test_one_step_of_decoding_reads_the_slices_of_its_token_only() -> None:
    module = built(top_k=2)
    cache = module.new_cache(1)
    with torch.no_grad():
        module(X[:1], mask=ph.causal(), cache=cache)
        counter = FlopCounterMode(display=False)
        with counter:
            module(X[:1, :1], mask=ph.causal(), cache=cache)
    products = sum(
        n
        for kind, n in counter.get_flop_counts()["Global"].items()
        if kind in (torch.ops.aten.mm, torch.ops.aten.addmm)
    )
    assert products == 2 * 32 * (4 * 2 * 4 + 8)


def test_the_gate_decides_whether_the_task_trains_the_router() -> None:
    for gate, trains in (("weigh", True), ("select", False)):
        module = built(gate=gate)
        module(X, mask=ph.causal()).square().sum().backward()
        flow = module.router.gate.weight.grad
        assert (flow is not None and bool(flow.abs().max() > 0)) == trains
    gates, chosen, p = built().choice(X)
    close(gates, 8 * p * chosen)


def test_balance_is_one_where_even_and_is_left_in_training_only() -> None:
    module = built(balance=0.5).train()
    module(X)
    (loss,) = auxiliary_losses(module).values()
    assert loss > 0.5
    with torch.no_grad():
        module.router.gate.weight.zero_()
        module.router.gate.bias.zero_()
    module(X)
    close(auxiliary_losses(module)["balance"], torch.tensor(0.5, **F64))
    module.eval()(X)
    assert auxiliary_losses(module) == {}
    module = built().train()
    module(X)
    assert auxiliary_losses(module) == {}


def test_bounds_of_a_lane_mask_hold() -> None:
    rows, keys = torch.tensor([[1, 4, 4], [0, 2, 9]]), torch.tensor([[0, 1, 4, 8, 8], [0, 2, 3, 5, 9]])
    inner = ph.causal() & ph.window(3)
    mask = LaneMask(inner, rows, keys, torch.tensor([1, 0]), torch.tensor([0, 2]))
    b = torch.arange(2).view(2, 1, 1, 1)
    h = torch.zeros(1, 1, 1, dtype=torch.int64)
    i, j = torch.arange(2, 5).view(-1, 1), torch.arange(5)  # five keys, three rows: the first stands at 2
    allowed = mask.allowed(b, h, i, j)
    distance = rows[:, None, :, None] - keys[:, None, None, :]
    assert torch.equal(allowed, (distance >= 0) & (distance <= 3))
    for i0 in range(2, 5):
        for i1 in range(i0, 5):
            for j0 in range(5):
                for j1 in range(j0, 5):
                    ends = (torch.tensor([[n]]) for n in (i0, i1))
                    some, every = mask.bounds(b, h, *ends, torch.tensor([j0]), torch.tensor([j1]))
                    tile = allowed[..., i0 - 2 : i1 - 1, j0 : j1 + 1].flatten(1)
                    assert (some.flatten() >= tile.any(1)).all()
                    assert (every.flatten() <= tile.all(1)).all()


@pytest.mark.parametrize(
    "options",
    [{"gate": "select"}, {"kv_heads": 2, "top_k": 1}, {"top_k": 4}],
    ids=str,
)
def test_the_contract_holds_with_other_options(options: dict[str, Any]) -> None:
    without = "gradients" if options.get("top_k") == 4 else ""  # which it checks with two heads
    assert broken_rules("selective_mha_uoe", without=without, **options) == {}


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'select'"):
        built(gate="selct")
    with pytest.raises(ConfigError, match=r"top_k \(of 8 slices\) must be at most 8; got 9"):
        built(top_k=9)
    with pytest.raises(ConfigError, match=r"top_k \(of 8 slices\) must be at least 1; got 0"):
        built(top_k=0)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=8"):
        built(kv_heads=3)
    with pytest.raises(ConfigError, match="score must treat every head by itself"):
        built(score=ph.head_mix(torch.eye(8)))
    with pytest.raises(ConfigError, match="balance must be"):
        built(balance=-1.0)
    with pytest.raises(UnsupportedPattern, match="take moh for cross-attention"):
        built().new_context_cache(X)
