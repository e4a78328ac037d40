"""Regularizers that read weights are shown those that the outputs are made of, in every mechanism."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.nn.regularizers import Regularizer
from polyhead.reference.attend import attend
from polyhead.reference.projection import heads_of

F64 = {"dtype": torch.float64}
X = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0), **F64)
SEEN: list[tuple[Tensor, Tensor | None, Tensor | None]] = []


class Watch(Regularizer):
    """Keeps what it is shown."""

    reads_weights: ClassVar[bool] = True

    def losses(
        self, weights: Tensor, *, queries: Tensor | None = None, keys: Tensor | None = None
    ) -> dict[str, Tensor]:
        SEEN.append((weights, queries, keys))
        return {"watch": weights.square().mean()}


def built(name: str, **options: Any) -> Any:
    torch.manual_seed(0)
    module = ph.build(name, **{"dim": 32, "heads": 4, "regularizers": Watch()} | options, **F64)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(0.3 * torch.randn_like(p))
    SEEN.clear()
    return module.train()


def shown(module: Any, *call: Any, **options: Any) -> Tensor:
    module(*call, **options)
    return SEEN[-1][0]


# refused: sums over pairs of keys have no weights of pairs, heads that see tokens of their own none of all
_WITHOUT = {"tensor_attention", "selective_mha_uoe", "mosa", "select_and_pack"}
NAMES = [
    e.name for e in ph.catalog() if "regularizers" in e.config.__dataclass_fields__ and e.name not in _WITHOUT
]


@pytest.mark.parametrize("name", NAMES)
def test_every_mechanism_with_weights_can_be_trained_by_them(name: str) -> None:
    entry = ph.entry(name)
    module = built(name, heads=max(4, entry.promises.least_heads))
    mask = ph.causal() if {"causal_self", "causal_cross"} & entry.supports else None
    call = (X,) if entry.supports & {"self", "causal_self"} else (X, X)
    module(*call, mask=mask)
    losses = ph.auxiliary_losses(module)
    watched = [loss for path, loss in losses.items() if path.endswith("watch")]
    assert watched
    for weights, _, _ in SEEN:
        assert weights.shape[0] == 2
        assert weights.shape[2] == 7
        assert torch.isfinite(weights).all()
        if mask is not None and weights.shape[3] == 7:
            assert (weights[..., torch.ones(7, 7, dtype=torch.bool).triu(1)] == 0).all()
    torch.stack(watched).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())
    module.eval()(*call, mask=mask)
    assert not any(path.endswith("watch") for path in ph.auxiliary_losses(module))


@pytest.mark.parametrize("name", sorted(_WITHOUT))
def test_mechanisms_without_weights_of_all_pairs_say_so(name: str) -> None:
    with pytest.raises(ConfigError, match="regularizers must not read weights"):
        built(name)


def _grouped(module: Any, keys: Callable[[Tensor], Tensor]) -> Tensor:
    """Weights of plain queries on keys `(B, H, S, D)` made of those that are projected."""
    state = module.state_dict()
    q = heads_of(X, state, "query", 4)
    k = keys(heads_of(X, state, "key", state["projection.key.weight"].shape[0] // q.shape[-1]))
    return attend(q, k, torch.eye(7, **F64).expand(2, 4, 7, 7))


@pytest.mark.parametrize("name", ["context_broadcasting", "mixture_attentive_experts", "key_driven_gqa"])
def test_weights_are_those_of_the_heads(name: str) -> None:
    module = built(name, kv_heads=2)
    weights = shown(module, X)
    if name == "key_driven_gqa":
        module.eval()
        own = _grouped(module, lambda k: k[:, module.pick])
    else:
        own = _grouped(module, lambda k: k.repeat_interleave(2, 1))
    torch.testing.assert_close(weights, own)


def test_weights_of_decoupled_and_mixed_heads() -> None:
    module = built("decoupled_head", key_map=(0, 1, 1, 0), value_map=(0, 0, 1, 2))
    torch.testing.assert_close(shown(module, X), _grouped(module, lambda k: k[:, [0, 1, 1, 0]]))
    module = built("explicit_multihead", stored_heads=3)
    mix = module.projection.key_mix
    torch.testing.assert_close(
        shown(module, X), _grouped(module, lambda k: torch.einsum("bnsd,nh->bhsd", k, mix))
    )
    shown(module, X[:, :1])  # one query reads the stored heads in place
    assert (SEEN[-1][0] == 1).all()


@pytest.mark.parametrize("scheme", ["expanded", "absorbed", "absorbed_reuse", "absorbed_recompute"])
def test_weights_of_latents_do_not_depend_on_the_order_of_the_products(scheme: str) -> None:
    first, other = built("multi_head_latent", scheme="expanded"), built("multi_head_latent", scheme=scheme)
    other.load_state_dict(first.state_dict())
    weights = shown(first, X, mask=ph.causal())
    torch.testing.assert_close(shown(other, X, mask=ph.causal()), weights)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))


def test_the_mean_over_routed_heads_is_that_of_the_chosen_ones() -> None:
    module = built("moh", kv_heads=2, shared_heads=1, top_k=2)
    weights = shown(module, X)
    dense = _grouped(module, lambda k: k.repeat_interleave(2, 1))
    active = module.choice(X).active.transpose(1, 2)  # B H L
    assert (weights[~active] == 0).all()
    chosen = (dense * active[..., None]).sum(1) / active.sum(1)[..., None]
    torch.testing.assert_close(weights.mean(1), chosen)
    assert set(ph.auxiliary_losses(module)) == {"watch", "balance"}  # beside that of the router


def test_flat_sources_are_one_row_of_weights() -> None:
    module = built("multi_source_attention", mode="flat")
    sources = X, torch.randn(2, 5, 32, **F64)
    real = torch.arange(5)[None] < torch.tensor([[5], [3]])
    weights = shown(module, X, sources, padding=(None, real))
    assert weights.shape == (2, 4, 7, 12)
    torch.testing.assert_close(weights.sum(-1), torch.ones_like(weights[..., 0]))
    assert (weights[1, :, :, 10:] == 0).all()
    shares = module.source_shares(X, sources, padding=(None, real))
    torch.testing.assert_close(weights[..., :7].sum(-1), shares[..., 0])
    _, queries, keys = SEEN[-1]
    assert queries is None
    assert keys is not None
    assert torch.equal(keys[:, 7:], real)
    assert keys[:, :7].all()
    assert len(SEEN) == 1
    own = built("multi_source_attention", mode="hierarchical")
    own(X, sources)
    assert [one[0].shape[-1] for one in SEEN] == [7, 5]


def test_losses_of_weights_leave_a_sentinel_out() -> None:
    sources = X, torch.randn(2, 5, 32, **F64)
    module = built("multi_source_attention", mode="flat", sentinel=True)
    weights = shown(module, X, sources)
    assert weights.shape == (2, 4, 7, 12)
    shares = module.source_shares(X, sources)
    torch.testing.assert_close(weights.sum(-1), 1 - shares[..., 2])
    own = built("multi_source_attention", mode="hierarchical", sentinel=True)
    own(X, sources)
    assert [one[0].shape[-1] for one in SEEN] == [7, 5]
    part = ph.nn.attention_diversification(0.5)
    trained = built("multi_source_attention", mode="flat", sentinel=True, regularizers=part)
    trained(X, sources)
    (loss,) = ph.auxiliary_losses(trained).values()
    loss.backward()
    assert trained.sentinel.gate.weight.grad.abs().max() > 0  # who looks at itself pays nothing


def test_weights_of_a_mix_of_experts_keep_the_losses_of_the_router() -> None:
    module = built("soft_mixture_of_attention", z=0.1)
    module(X)
    assert sorted(path.rpartition(".")[2] for path in ph.auxiliary_losses(module)) == ["watch", "z"]
