"""What the paper of the enhanced interactive transformer says must hold of the module, paper 057."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.across_heads import head_pairs
from polyhead.attend.scores import alibi
from polyhead.errors import ConfigError, ShapeError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()


def built(name: str = "enhanced_interactive", **config: object) -> nn.Module:
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def logits(module: nn.Module, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """The logits of all pairs, by the module's own part, `(B, H, L, S)`."""
    seen: list[torch.Tensor] = []

    class Keep:
        needs_logits = True

        def visit(self, tile: object, found: torch.Tensor, weights: torch.Tensor) -> None:
            seen.append(found.clone())

    options: dict = {}
    a, b = module._interacting(q, k, options)
    ph.observe(a, b, k, [Keep()], **options)
    (found,) = seen
    return found


@pytest.mark.parametrize(
    "options",
    [
        {"efficient": True},
        {"residual": True, "kv_heads": 2},
        {"efficient": True, "residual": True, "kv_heads": 2, "inner": 3},
        {"inner": 1, "across": 1},
    ],
)
def test_other_options_keep_the_contract(options: dict) -> None:
    assert not broken_rules("enhanced_interactive", **options)


@pytest.mark.parametrize("efficient", [False, True])
def test_with_a_residual_it_starts_as_multi_head_attention(efficient: bool) -> None:
    module, plain = built(residual=True, efficient=efficient), built("mha")
    state = {name: t for name, t in module.state_dict().items() if "interactions" not in name}
    plain.load_state_dict(state)
    close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


def test_logits_are_a_network_of_the_products_of_a_pair() -> None:
    module = built()
    q, (k, _) = module.projection.queries(X), module.projection.keys_values(X)
    net, found = module.interactions, logits(module, q, k)
    for b, i, j in ((0, 0, 0), (1, 10, 3), (0, 4, 9)):
        s = q[b, :, i] @ k[b, :, j].T / 8**0.5  # query head, key head
        inner = [net.joint[a] @ (net.inner[a] @ s[a] + net.inner_bias[a]).relu() for a in range(4)]
        u = torch.stack(inner) + net.joint_bias
        close(found[b, :, i, j], net.last @ (net.across @ u + net.across_bias).relu())


def test_weights_sum_to_one() -> None:
    module = built()
    weights = module._weights(module.projection.queries(X), module.projection.keys_values(X), mask=CAUSAL)
    close(weights.sum(-1), torch.ones(2, 4, 11, **F64))


def test_heads_interact_behind_their_own_products_only() -> None:
    module = built()
    q, (k, _) = module.projection.queries(X), module.projection.keys_values(X)
    changed = q.clone()
    changed[:, 1] += 1.0
    # by itself, head 0 does not know of query head 1: let the last layers hand on what each head made
    with torch.no_grad():
        before, after = logits(module, q, k), logits(module, changed, k)
        assert ((before - after).abs().amax((0, 2, 3)) > 1e-3).all()
        module.interactions.across.zero_()[:4] = torch.eye(4, **F64)
        module.interactions.across_bias.fill_(100.0)  # beyond the bend of relu
        module.interactions.last.zero_()[:, :4] = torch.eye(4, **F64)
        before, after = logits(module, q, k), logits(module, changed, k)
    moved = (before - after).abs().amax((0, 2, 3)) > 1e-9
    assert moved.tolist() == [False, True, False, False]


def test_every_key_head_reaches_every_query_head() -> None:
    module = built(efficient=True, inner=8)
    q, (k, _) = module.projection.queries(X), module.projection.keys_values(X)
    for g in range(4):
        changed = k.clone()
        changed[:, g] += 1.0
        assert ((logits(module, q, k) - logits(module, q, changed)).abs().amax((0, 2, 3)) > 1e-4).all()


def test_biases_act_behind_the_interactions() -> None:
    module = built(residual=True, score=alibi(4))
    plain = built("mha", score=alibi(4))
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if "interactions" not in n})
    close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


def network(heads: int = 3, groups: int = 3, inner: int = 4, across: int = 5) -> dict[str, torch.Tensor]:
    torch.manual_seed(3)
    sizes = {
        "inner": (heads, inner, groups),
        "inner_bias": (heads, inner),
        "last": (heads, across),
        "joint": (heads, inner),
        "joint_bias": (heads,),
        "across": (across, heads),
        "across_bias": (across,),
    }
    return {name: torch.randn(size, **F64, requires_grad=True) for name, size in sizes.items()}


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("efficient", [False, True])
def test_tiles_are_the_dense_form_with_gradients(residual: bool, efficient: bool) -> None:
    # long enough for several strips, and for several steps of columns in each
    q, k, v = (torch.randn(2, 3, 300, 5, **F64, requires_grad=True) for _ in range(3))
    net = network()
    if efficient:
        net = {name: net[name] for name in ("inner", "inner_bias")}
        net["last"] = torch.randn(3, 12, **F64, requires_grad=True)
    mask = CAUSAL & ph.window(250)
    found = []
    for backend in ("tiles", "reference"):
        y = ph.attend(q, k, v, mask=mask, score=head_pairs(q, k, residual=residual, **net), backend=backend)
        found.append((y, *torch.autograd.grad(y.sin().sum(), [q, k, v, *net.values()])))
    for tiled, dense in zip(*found, strict=True):
        torch.testing.assert_close(tiled, dense, rtol=1e-9, atol=1e-9)


def test_it_never_holds_all_pairs() -> None:
    module = built()
    with ph.strict(), torch.no_grad():
        module(X, mask=CAUSAL)


def test_what_does_not_fit_is_refused_in_words() -> None:
    with pytest.raises(ConfigError, match="across must be at least 1; got 0"):
        built(across=0)
    with pytest.raises(ConfigError, match="across must be at most 0; got 4"):
        built(efficient=True, across=4)
    with pytest.raises(ConfigError, match="inner must be an integer, at least 1"):
        built(inner=0)
    q = torch.randn(1, 3, 4, 5, **F64)
    net = network()
    with pytest.raises(ConfigError, match=r"last must have the shape \(3, 5\) .* got a tensor \(3, 4\)"):
        head_pairs(q, q, **net | {"last": torch.randn(3, 4, **F64)})
    with pytest.raises(ConfigError, match=r"go together; got \['joint', 'joint_bias', 'across'\] alone"):
        head_pairs(q, q, **{name: t for name, t in net.items() if name != "across_bias"})
    with pytest.raises(ShapeError, match="must agree in batch and width"):
        ph.attend(q, q, q, score=head_pairs(q, q[..., :4], **net))
