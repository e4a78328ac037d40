"""What must hold of attention through entmax."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError

F64 = {"dtype": torch.float64}
X = 3 * torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "entmax_attention", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64)


def weights(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The weights `(B, H, L, S)`, by values that are the unit vectors."""
    q, k = module.projection.queries(x), module.projection.keys_values(x)[0]
    eye = torch.eye(x.shape[1], **F64).expand(*k.shape[:2], -1, -1)
    return ph.attend(q, k, eye, mask=ph.causal(), normalizer=module.normalizer())


def density(module: nn.Module) -> torch.Tensor:
    """How many weights of each head are not zero."""
    return (weights(module, X) > 0).sum((0, 2, 3))


def test_given_alphas_of_grouped_heads_keep_the_contract() -> None:
    options = {"alpha": (1.25, 1.5, 2.0, 1.1), "kv_heads": 2, "bias": True}
    assert not broken_rules("entmax_attention", without="gradients", **options)  # that takes two heads


def test_alpha_two_is_sparsemax_and_one_and_a_bit_is_softmax() -> None:
    for alpha, normalizer, atol in ((2.0, ph.sparsemax(), 1e-12), (1.001, ph.softmax(), 1e-2)):
        module, plain = built(alpha=alpha), built("mha", normalizer=normalizer)
        plain.load_state_dict(module.state_dict())
        close(module(X / 3, mask=ph.causal()), plain(X / 3, mask=ph.causal()), atol)


def test_learned_alpha_equals_the_same_alpha_given() -> None:
    learned = built()
    given = built(alpha=tuple(learned.normalizer.alpha.tolist()))
    given.load_state_dict(
        {k: v for k, v in learned.state_dict().items() if "normalizer" not in k}, strict=False
    )
    close(learned(X), given(X), 1e-6)  # alpha that is given is held in float32


def test_every_head_has_its_own_sparsity() -> None:
    module = built()
    with torch.no_grad():
        module.projection.query.weight.copy_(module.projection.query.weight[:8].repeat(4, 1))
        module.projection.key.weight.copy_(module.projection.key.weight[:8].repeat(4, 1))
        module.normalizer.logits.copy_(torch.tensor([-9.0, -1.0, 1.0, 9.0]))
    close(module.normalizer.alpha, torch.tensor([1.01, 1.2689414, 1.7310586, 1.9998766], **F64), 1e-6)
    counts = density(module).tolist()
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > counts[1] > counts[3]
    total = weights(module, X).sum(-1)
    close(total, torch.ones_like(total))


def test_alpha_learns_to_be_sparse() -> None:
    """A target that only the best key matters for draws alpha up, one of all keys alike draws it down."""
    for sparse in (True, False):
        module = built()
        with torch.no_grad():
            module.normalizer.logits.zero_()
        w = weights(module, X)
        wanted = torch.ones_like(w).tril() / torch.arange(1, 12).view(-1, 1)
        if sparse:
            wanted = torch.zeros_like(w).scatter(-1, w.argmax(-1, keepdim=True), 1.0)
        (w - wanted).square().sum().backward()
        grad = module.normalizer.logits.grad
        assert bool(((grad < 0) if sparse else (grad > 0)).all()), grad


def test_a_module_of_softmax_is_taken_over() -> None:
    plain, module = built("mha"), built()
    lacking = module.load_state_dict(plain.state_dict(), strict=False)
    assert lacking.missing_keys == ["normalizer.logits"]
    assert not lacking.unexpected_keys


def test_what_the_catalogue_says() -> None:
    assert ph.entry("entmax_attention").facets.distribution == "entmax"
    assert built().cost(8).parameters == built("mha").cost(8).parameters + 4
    assert built(alpha=1.5).cost(8) == built("mha").cost(8)
    assert "entmax_attention" in [e.name for e in ph.catalog(distribution="entmax")]


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"alpha must lie in \(1, 2\], got 1"):
        built(alpha=1.0)
    with pytest.raises(ConfigError, match=r"alpha must lie in \(1, 2\], got 3"):
        built(alpha=(1.5, 1.5, 3.0, 1.5))
    with pytest.raises(ConfigError, match="alpha must be a number, 4 of them, or None; got"):
        built(alpha=(1.5, 1.5))
    with pytest.raises(ConfigError, match="the normaliser is entmax, which alpha= sets"):
        built(normalizer=ph.sigmoid())
    with pytest.raises(ConfigError, match="kv_heads must divide heads=4; got kv_heads=3"):
        built(kv_heads=3)
