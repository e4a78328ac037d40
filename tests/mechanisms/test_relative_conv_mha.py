"""What must hold of relative convolutional attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnsupportedPattern

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "relative_conv_mha", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 4, **config}, **F64).eval()


def stirred(**config: object) -> nn.Module:
    module = built(**config)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if "conv" in name or "bias" in name:
                p.normal_()
    return module


def plain_of(module: nn.Module) -> nn.Module:
    plain = built("mha")
    plain.load_state_dict({k: v for k, v in module.state_dict().items() if k in plain.state_dict()})
    return plain


def close(found: torch.Tensor, expected: torch.Tensor, atol: float = 1e-11) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def logits(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The logarithms of the weights `(B, H, L, L)`, up to a constant of each row."""
    found: list[torch.Tensor] = []
    mix = module._mix

    def watched(q: torch.Tensor, rows: tuple[torch.Tensor, ...], **options: object) -> torch.Tensor:
        found.append(module._weights(q, rows, **options))
        return mix(q, rows, **options)

    module._mix = watched
    module(x)
    del module._mix
    return found[0].log()


@pytest.mark.parametrize(
    "options",
    [{"kv_heads": 2, "bias": True, "qk_norm": True, "kernel": 2}, {"share_heads": True, "relative_dim": 4}],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert not broken_rules("relative_conv_mha", **options)


def test_without_relative_scores_it_starts_as_multi_head_attention() -> None:
    module = built()
    nn.init.zeros_(module.relative)
    close(module(X, mask=ph.causal()), plain_of(module)(X, mask=ph.causal()))


def test_identity_kernels_leave_the_relative_scores_of_transformer_xl() -> None:
    """Its relative shift of (q + w) · r over all distances, gathered."""
    module = built()
    nn.init.normal_(module.content_bias)
    nn.init.normal_(module.position_bias)
    q, k = plain_of(module).projection.queries(X), plain_of(module).projection.keys_values(X)[0]
    distances = torch.arange(-10, 11, **F64)
    angles = distances[:, None] * 10000.0 ** (-torch.arange(4, **F64) / 4)
    r = torch.einsum("ne,hde->hnd", torch.cat([angles.sin(), angles.cos()], -1), module.relative)
    every = (q + module.position_bias[:, None]) @ r.transpose(-1, -2)  # of all distances
    at = (torch.arange(11)[:, None] - torch.arange(11) + 10).expand(2, 4, -1, -1)
    content = (q + module.content_bias[:, None]) @ k.transpose(-1, -2)
    want = ((content + every.gather(-1, at)) / 8**0.5).log_softmax(-1)
    close(logits(module, X), want)


def test_without_relative_scores_it_is_attention_over_convolutions() -> None:
    module = stirred()
    for p in (module.relative, module.content_bias):
        nn.init.zeros_(p)
    made = []
    for name in ("query", "key", "value"):
        kernel = getattr(module, f"{name}_conv").weight.permute(0, 2, 1).reshape(32, 1, 3)
        z = getattr(module.projection, name)(X).transpose(1, 2)
        y = nn.functional.conv1d(nn.functional.pad(z, (2, 0)), kernel, groups=32)
        made.append(y.transpose(1, 2).unflatten(-1, (4, 8)).transpose(1, 2))
    close(module(X), module.output(ph.attend(*made)))


def test_scores_of_equal_tokens_depend_on_the_distance_alone() -> None:
    module = stirred()
    found = logits(module, X[:, :1].expand(-1, 40, -1))[:, :, 2:, 2:]  # but for the first, whose past lacks
    apart = found - found.diagonal(dim1=-2, dim2=-1)[..., None]
    for n in (1, 5, 20):
        for side in (-n, n):
            band = apart.diagonal(side, -2, -1)
            close(band, band[..., :1].expand_as(band), 1e-9)
    assert (apart.diagonal(1, -2, -1) - apart.diagonal(5, -2, -1)[..., :1]).abs().min() > 1e-6


def test_a_token_sees_two_before_it_whatever_the_mask() -> None:
    module, alone = stirred(), ph.window(0)
    changed = X.clone()
    changed[:, 4] += 1
    moved = (module(changed, mask=alone) - module(X, mask=alone)).abs().amax((0, 2)) > 1e-9
    assert moved.nonzero().flatten().tolist() == [4, 5, 6]


def test_far_positions_stay_exact_in_float32() -> None:
    module = stirred()
    x = X[:1, :1].expand(-1, 4, -1)
    exact = module(x)
    far = torch.tensor(100_000)
    sin, cos = module._waves(torch.arange(4) + far, torch.float32)
    assert sin.dtype == torch.float32
    want = module._waves(torch.arange(4) + far, torch.float64)
    close(sin.double(), want[0], 1e-7)
    close(cos.double(), want[1], 1e-7)
    assert exact.shape == (1, 4, 32)


def test_cost_and_cache() -> None:
    mine, plain = built().cost(64, batch=2), built("mha").cost(64, batch=2)
    assert mine.parameters == plain.parameters + 3 * 8 * 12 + 4 * 8 * 8 + 2 * 32
    assert mine.scores == 2 * plain.scores
    assert mine.kv_bytes_per_token == plain.kv_bytes_per_token
    assert mine.state_bytes == 18 * (32 * 8 + 1)
    assert built(kernel=1).cost(64).state_bytes == 0


def test_a_kernel_of_one_needs_no_earlier_inputs() -> None:
    module = stirred(kernel=1)
    cache = module.new_cache(2)
    assert type(cache) is ph.nn.GrowingCache
    steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split(3, dim=1)]
    close(torch.cat(steps, dim=1), module(X, mask=ph.causal()))


def test_refusals() -> None:
    module = built()
    with pytest.raises(UnsupportedPattern, match="relative_conv_mha .* does not support a context"):
        module.new_context_cache(X)
    with pytest.raises(ConfigError, match="cache must hold the latest inputs .* got a GrowingCache"):
        module(X, cache=built("mha").new_cache(2))
    with pytest.raises(ConfigError, match="position must add nothing to inputs that are convolved"):
        built(position=ph.nn.sinusoidal())
    with pytest.raises(ConfigError, match="relative_dim must be even"):
        built(relative_dim=5)
    with pytest.raises(ConfigError, match="kernel must be"):
        built(kernel=0)
