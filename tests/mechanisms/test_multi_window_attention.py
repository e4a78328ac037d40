"""What must hold of multi-window attention."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.grids import moved_by
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.mechanisms import configure

F64 = {"dtype": torch.float64}
WINDOWS = (2, 5, 10, 0)
X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "multi_window_attention", **options: Any) -> Any:
    torch.manual_seed(0)
    own = {"windows": WINDOWS} if name == "multi_window_attention" else {}
    return ph.build(name, **{"dim": 32, "heads": 4, **own, **options}, **F64).eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = built("mha", **options)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("score")})
    return plain


def weights_of(module: Any) -> Tensor:
    options = {"mask": module.mask(), "score": None if module.score is None else module.score()}
    return module._weights(module._queries(X, 0), module._rows(X, 0), **options)


@pytest.mark.parametrize(
    "options",
    [
        {"windows": (3, 3, 7, 0), "compiled": True},
        {"windows": (1, 4, 4, 2), "kv_heads": 2},
        {"windows": (0, 0, 5, 0), "bias": True},
        {"windows": (0, 0, 0, 0)},
    ],
    ids=str,
)
def test_other_windows_keep_the_contract(options: dict[str, Any]) -> None:
    # the check of gradients builds two heads, for which there are windows too many
    assert not broken_rules("multi_window_attention", without="gradients", **options)


def test_gradients_of_two_windows() -> None:
    module = built(dim=8, heads=2, windows=(2, 0))
    x = torch.randn(1, 4, 8, **F64, requires_grad=True)
    names = [name for name, _ in module.named_parameters()]

    def run(x: Tensor, *given: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, given, strict=True)), (x,))

    tensors = [p.detach().clone().requires_grad_() for p in module.parameters()]
    assert torch.autograd.gradcheck(run, (x, *tensors))


def test_all_global_is_plain_attention() -> None:
    module = built(windows=(0, 0, 0, 0))
    assert module.score is None
    close(module(X), plain_of(module)(X))


def test_a_window_of_everything_without_bias_is_a_global_head() -> None:
    module = built(windows=(40, 64, 0, 40))
    torch.nn.init.zeros_(module.score.tensor0)
    close(module(X), plain_of(module)(X))


@pytest.mark.parametrize("window", [2, 5, 10, 16])
def test_a_head_depends_on_its_window(window: int) -> None:
    moved = moved_by(built(windows=(window,) * 4), X[:1])
    at = torch.arange(40) // window
    assert torch.equal(moved, at[:, None] == at)


def test_rows_sum_to_one_over_their_window_and_spread_no_further() -> None:
    weights = weights_of(built(windows=(2, 5, 16, 0)))
    close(weights.sum(-1), torch.ones(2, 4, 40, **F64))
    entropy = -(weights * weights.clamp(min=1e-300).log()).sum(-1)
    for h, window in enumerate((2, 5, 16, 40)):
        assert entropy[:, h].max() <= math.log(window) + 1e-12
        assert int((weights[:, h] > 0).sum(-1).max()) == window


def test_a_short_last_window_is_that_of_a_padded_sequence() -> None:
    """43 tokens are 4 windows of 10 and one of 3; padded to 50 the last is whole, and 7 of it are none."""
    module = built()
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(1), **F64)
    real = (torch.arange(50) < 43).expand(2, -1)
    close(module(x, padding=real)[:, :43], module(x[:, :43]))


def test_the_bias_is_one_number_for_every_offset_and_head() -> None:
    module = built()
    assert module.score.tensor0.shape == (3 + 9 + 19,)
    with torch.no_grad():
        module.projection.query.weight.zero_()
        table = module.score.tensor0.copy_(torch.randn(31, generator=torch.Generator().manual_seed(2)))
        weights = weights_of(module)[0]
    close(weights[1, 12, 10:15], table[3:12][2:7].softmax(0))  # token 12 is the third of its window of 5
    close(weights[2, 19, 10:20], table[12:31][0:10].softmax(0))
    close(weights[3], torch.full((40, 40), 1 / 40, **F64))


def test_decoding_reads_from_where_the_window_begins() -> None:
    module = built(windows=(2, 5, 10, 10))
    late = X.clone()
    late[:, :30] += 1
    cache = [module.new_cache(2), module.new_cache(2)]
    for x, held in zip((X, late), cache, strict=True):
        module(x[:, :30], mask=ph.causal(), cache=held)
    close(*(module(X[:, 30:31], mask=ph.causal(), cache=held) for held in cache))


def test_windows_by_default() -> None:
    def windows(heads: int) -> Any:
        return configure("multi_window_attention", dim=8 * heads, heads=heads).windows  # type: ignore[attr-defined]

    assert windows(8) == (2, 4, 8, 16, 32, 64, 0, 0)
    assert windows(4) == (2, 4, 8, 0)
    assert windows(1) == (0,)
    assert max(windows(16)) == 128


def test_the_papers_windows_score_a_third_of_the_pairs() -> None:
    """250 patches and windows 2, 5, 10, 25, 50, 125 and two global heads: 717 of 2,000 keys a query."""
    windows = (2, 5, 10, 25, 50, 125, 0, 0)
    config = configure("multi_window_attention", dim=64, heads=8, windows=windows)
    seen = densify(config.pattern(), heads=8, queries=250, keys=250)  # type: ignore[attr-defined]
    assert int(seen.sum()) == 250 * 717


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"windows": (2, 3)}, "windows must have a size for each of the 4 heads"),
        ({"windows": (2, 3, -1, 0)}, "windows must be at least 0; got -1"),
        ({"windows": 5}, "windows must have a size for each of the 4 heads"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    with pytest.raises(UnsupportedPattern, match="multi_window_attention .* does not support a context"):
        built()(X, X)
