"""What must hold of multi-token attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.attend.across_pairs import PairConvolution
from polyhead.errors import ConfigError

F64 = {"dtype": torch.float64}
X = torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(0), **F64)
PLAIN = {"norm": False, "gate": False}


def built(name: str = "multi_token_attention", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def stirred(**config: object) -> nn.Module:
    module = built(**config)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if not name.startswith(("projection", "output")):
                p.add_(0.5 * torch.randn_like(p))
    return module


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_it_starts_as_grouped_query_attention_but_for_norm_and_gate(kv_heads: int) -> None:
    module, plain = built(kv_heads=kv_heads, **PLAIN), built("grouped_query", kv_heads=kv_heads)
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k in plain.state_dict()})
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))
    close(module(X), plain(X))


@pytest.mark.parametrize("side", ["both", "left", "right"])
def test_the_convolution_is_the_sum_over_pairs_and_forbidden_ones_are_zero(side: str) -> None:
    """Four loops, zeros before and -inf behind."""
    module = stirred(logit_kernel=(3, 4), weight_kernel=None, side=side, logit_mixing=False, group=1, **PLAIN)
    kernel, width = module.logit_kernel.weight, 8
    q, k, v = (
        getattr(module.projection, name)(X).unflatten(-1, (4, width)).transpose(1, 2)
        for name in ("query", "key", "value")
    )
    back = {"both": 1, "left": 3, "right": 0}[side]
    logits = torch.full((2, 4, 17, 17), -torch.inf, **F64)
    raw = (q @ k.mT / width**0.5).tril()
    for i in range(17):
        for j in range(i + 1):
            logits[:, :, i, j] = 0
            for a in range(min(3, i + 1)):
                for b in range(4):
                    if 0 <= j + b - back < 17:
                        logits[:, :, i, j] += kernel[:, a, b] * raw[:, :, i - a, j + b - back]
    want = (logits.softmax(-1) @ v).transpose(1, 2).flatten(2) @ module.output.weight.T
    close(module(X, mask=ph.causal()), want)


def test_rows_sum_to_one_without_maps_of_weights_and_not_with_them() -> None:
    for options, sums in (({"weight_kernel": None, "group": 1}, True), ({}, False)):
        module = stirred(**options, **PLAIN)
        with torch.no_grad():
            module.projection.value.weight.zero_()
            module.projection.value.bias = nn.Parameter(torch.ones(32, **F64))
        heads = []
        module.output.register_forward_pre_hook(lambda m, inputs, heads=heads: heads.append(inputs[0]))
        module(X, mask=ph.causal())
        assert torch.allclose(heads[0], torch.ones_like(heads[0])) is sums


def test_a_kernel_of_one_pair_is_a_temperature_of_every_head() -> None:
    options = {"weight_kernel": None, "logit_mixing": False, "group": 1, **PLAIN}
    module = stirred(logit_kernel=(1, 1), **options)
    warm = built("mha", score=ph.temperature(1 / module.logit_kernel.weight.detach().flatten()))
    warm.load_state_dict({k: v for k, v in module.state_dict().items() if "kernel" not in k}, strict=False)
    close(module(X, mask=ph.causal()), warm(X, mask=ph.causal()))


VARIANTS = [
    {"weight_kernel": None, "norm": False},
    {"logit_kernel": None, "group": 2, "gate": False, "depth": 2},
    {"logit_kernel": (2, 3), "weight_kernel": (3, 2), "side": "left", "kv_heads": 2, "bias": True},
    {"logit_kernel": (1, 4), "weight_kernel": None, "side": "right", "position": ph.nn.rope()},
    {"logit_kernel": None, "weight_kernel": None, "logit_mixing": False},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_variants_keep_the_contract(options: dict[str, object]) -> None:
    without = "equals_twin equals_twin_masked gradients" if "position" in options else "gradients"
    assert broken_rules("multi_token_attention", without=without, **options) == {}


def test_a_window_of_cached_tokens_with_positions_and_biases() -> None:
    module = stirred(position=ph.nn.rope(), score=ph.alibi(4), logit_kernel=(3, 5), weight_kernel=(2, 3))
    x = torch.randn(2, 70, 32, **F64)
    mask = ph.causal() & (ph.window(4) | ph.sink(2))
    with torch.no_grad():
        full = module(x, mask=mask)
        for chunks in ([1] * 70, [7, 1, 30, 1, 31]):
            cache = module.new_cache(2, window=5, sinks=2)
            parts = [module(part, mask=ph.causal(), cache=cache) for part in x.split(chunks, dim=1)]
            close(torch.cat(parts, dim=1), full)


def test_the_cache_holds_a_few_queries_only() -> None:
    module, plain = built(), built("mha")
    more = module.cost(4096).cache_bytes - plain.cost(4096).cache_bytes
    assert more == (10 + 16) * (32 * 8 + 1)
    cache = plain.new_cache(2)
    with pytest.raises(ConfigError, match="cache must hold the latest queries besides keys and values"):
        module(X, cache=cache)


def test_a_convolution_stands_by_itself_and_in_modules_that_remember_queries() -> None:
    kernel = torch.ones(4, 2, 3, **F64)
    with pytest.raises(ConfigError, match="score must not read the pairs of earlier queries"):
        built("mha", score=ph.pair_convolution(kernel))
    with pytest.raises(ConfigError, match="weight_map must not read the pairs of earlier queries"):
        built("mha", weight_map=ph.pair_convolution(kernel))
    with pytest.raises(ConfigError, match="cannot stand inside another map"):
        built("interleaved_heads", score=ph.pair_convolution(kernel[:, :1]))(X)
    with pytest.raises(ConfigError, match=r"kernel must be a floating-point tensor \(H, c_q, c_k\)"):
        ph.pair_convolution(torch.ones(3, 4))
    with pytest.raises(ConfigError, match="ahead must be"):
        PairConvolution(kernel, 3)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match=r"logit_kernel must be \(c_q, c_k\)"):
        built(logit_kernel=6)
    with pytest.raises(ConfigError, match="weight_kernel must be"):
        built(weight_kernel=(0, 3))
    with pytest.raises(ConfigError, match="side must be 'both', 'left' or 'right'; got 'up'"):
        built(side="up")
    with pytest.raises(ConfigError, match="group must divide heads=4; got group=3; allowed are 1, 2, 4"):
        built(group=3)
