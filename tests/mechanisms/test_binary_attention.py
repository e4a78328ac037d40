"""What must hold of binary attention, and of integer products of signs."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.attend.rounding import rounded_weights
from polyhead.attend.scores import grid_bias
from polyhead.attend.signs import signs_of
from polyhead.errors import BackendRefused, ConfigError, ShapeError, UnsupportedPattern
from polyhead.nn.binary_attention import BinaryAttention
from polyhead.nn.kv_cache import SignBits
from polyhead.nn.straight_through import signs

F64 = {"dtype": torch.float64}
X = torch.randn(2, 11, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(seed: int = 0, **config: object) -> BinaryAttention:
    torch.manual_seed(seed)
    return ph.build("binary_attention", **{"dim": 32, "heads": 4, **config}, **F64).eval()


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def coded(x: torch.Tensor) -> torch.Tensor:
    return x.abs().mean(-1, keepdim=True) * torch.where(x >= 0, 1.0, -1.0).to(x)


@pytest.mark.parametrize(
    "options", [{"kv_heads": 2}, {"kv_heads": 1, "reach": None}, {"reach": 3}, {"head_dim": 12}], ids=str
)
def test_other_options_keep_the_contract(options: dict[str, object]) -> None:
    assert broken_rules("binary_attention", **options) == {}


def test_means_over_the_sequence_keep_the_contract_where_they_apply() -> None:
    for mask in (None, ph.window(3, 2)):
        module, real = built(scope="sequence"), torch.arange(11) < torch.tensor([[11], [6]])
        dense = None
        if mask is not None:
            dense = (torch.arange(11)[:, None] - torch.arange(11)).clamp(-3, 4)
            dense = (dense <= 3) & (dense >= -2)
        want = ph.reference("binary_attention")(
            X, parameters=module.state_dict(), heads=4, kv_heads=4, scope="sequence", mask=dense, padding=real
        )
        torch.testing.assert_close(module(X, mask=mask, padding=real)[real], want[real])
    with pytest.raises(UnsupportedPattern, match=r'hides what follows.*scope="token"'):
        module(X, mask=ph.causal() & ph.window(3))
    with pytest.raises(UnsupportedPattern, match="cache"):
        module(X, cache=module.new_cache(2))
    with pytest.raises(UnsupportedPattern, match="cache"):
        module.new_context_cache(X)


def test_products_of_signs_are_those_of_bits() -> None:
    q, k = drawn(5, 64), drawn(7, 64, seed=1)

    def words(x: torch.Tensor) -> list[int]:
        return [sum(1 << c for c, bit in enumerate(row) if bit) for row in (x >= 0).tolist()]

    bits = [[64 - 2 * (a ^ b).bit_count() for b in words(k)] for a in words(q)]
    assert (signs_of(q).int() @ signs_of(k).int().T).tolist() == bits
    packed = SignBits().pack(coded(k))
    assert packed.shape == (7, 8 + 4)
    assert words(k) == [int.from_bytes(bytes(row[:8].tolist()), "little") for row in packed]
    assert torch.equal(SignBits().unpack(packed, 64, torch.float32), coded(k))


@pytest.mark.parametrize("width", [2, 12, 40, 64])
@pytest.mark.parametrize("mask", [None, ph.causal(), ph.causal() & (ph.window(40) | ph.sink(2))], ids=str)
def test_integer_products_equal_those_of_floats(width: int, mask: object) -> None:
    q, k, v = (
        coded(drawn(2, 6, 130, width)),
        coded(drawn(2, 3, 170, width, seed=1)),
        drawn(2, 3, 170, 9, seed=2),
    )
    options = {"mask": mask, "score": ph.alibi(6), "return_lse": True}
    for found, want in zip(
        ph.attend(q, k, v, backend="signs", **options),
        ph.attend(q.double(), k.double(), v.double(), **options),
        strict=True,
    ):
        torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-5)


def test_the_backend_says_what_it_is_not_for() -> None:
    q = coded(drawn(1, 2, 8, 16))
    assert "backend='signs'" in str(ph.explain(q, q, q))
    for call, why in (
        ((q * drawn(16), q, q), "more than their signs"),
        ((q.double(), q.double(), q.double()), "float64"),
        ((q[..., :1], q[..., :1], q), "width of at least 2"),
        ((q, q, q.clone().requires_grad_()), "no backward"),
    ):
        with pytest.raises(BackendRefused, match=why):
            ph.attend(*call, backend="signs")


@pytest.mark.parametrize("options", [{}, {"kv_heads": 2, "scope": "sequence"}, {"pv_bits": 8}], ids=str)
def test_inference_at_length_equals_training(options: dict[str, object]) -> None:
    """Long calls without gradients multiply integers where the machine can; those with them do not."""
    torch.manual_seed(0)
    module = ph.build("binary_attention", dim=128, heads=4, **options).eval()
    x = drawn(1, 200, 128)
    with torch.no_grad():
        found = module(x)
    torch.testing.assert_close(found, module(x), rtol=1e-3, atol=1e-5 if "pv_bits" not in options else 1e-3)


def test_scores_have_few_values() -> None:
    module = built(scope="sequence", reach=None)
    seen: list[torch.Tensor] = []

    def keep(score: torch.Tensor, b: object, h: object, i: object, j: object) -> torch.Tensor:
        seen.append(score)
        return score

    probe = built(scope="sequence", reach=None, score=ph.score_function(keep))
    probe.load_state_dict(module.state_dict())
    with torch.no_grad():
        probe(X)
    for tile in seen:
        for own in tile.flatten(0, 1):
            assert 1 < len(own.flatten().mul(1e9).round().unique()) <= 8 + 1


def test_a_factor_changes_the_magnitude_alone() -> None:
    module, larger = built(reach=None), built(reach=None)
    with torch.no_grad():
        larger.projection.query.weight.mul_(4.0)
        q, k = module._queries(X, 0), larger._queries(X, 0)
    torch.testing.assert_close(k, 4.0 * q)


def test_thirty_two_bits_without_a_bias_are_plain_attention() -> None:
    module, plain = built(qk_bits=32, reach=None), ph.build("mha", dim=32, heads=4, **F64)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


def test_signs_pass_gradients_on_near_zero_only() -> None:
    x = torch.tensor([-2.0, -0.5, 0.0, 0.7, 1.0, 1.5], **F64, requires_grad=True)
    found = signs(x)
    assert found.tolist() == [-1, -1, 1, 1, 1, 1]
    (flow,) = torch.autograd.grad(found.sum(), x)
    assert flow.tolist() == [0, 1, 1, 1, 1, 0]


def test_weights_and_values_of_eight_bits() -> None:
    weights = torch.rand(2, 3, 5, 7).softmax(-1)
    codes = rounded_weights(8).apply(weights, None)
    assert (codes - weights).abs().max().item() <= 1 / 510 + 1e-7
    torch.testing.assert_close(codes * 255, (codes * 255).round(), rtol=0, atol=1e-4)
    exact, rough = built(), built(pv_bits=8)
    assert 0 < (exact(X) - rough(X)).abs().max().item() < 0.02 * exact(X).abs().max().item()
    assert (
        broken_rules("binary_attention", pv_bits=8, without="equals_twin equals_twin_masked gradients") == {}
    )


def test_a_grid_has_a_bias_for_every_offset() -> None:
    table = torch.arange(2 * (5 * 3 + 3), dtype=torch.float64).view(2, 18)
    q = torch.zeros(1, 2, 7, 4, **F64)
    seen: list[torch.Tensor] = []

    class Keep:
        needs_logits = True

        def visit(self, tile: object, logits: torch.Tensor, weights: torch.Tensor) -> None:
            seen.append(logits.clone())

    ph.observe(q, q, q, [Keep()], score=grid_bias(table, 3, 2))
    logits = torch.cat(seen, dim=2)[0]
    places = [(n // 2, n % 2) for n in range(6)]
    for i in range(7):
        for j in range(7):
            if i and j:
                (y, x), (yk, xk) = places[i - 1], places[j - 1]
                column = (y - yk + 2) * 3 + (x - xk + 1)
            else:
                column = 15 + (1 if i else 0) + (2 if i == j == 0 else 0)
            assert logits[:, i, j].tolist() == table[:, column].tolist(), (i, j)
    with pytest.raises(ShapeError, match="7 tokens of a grid of 3 x 2 and its class token"):
        ph.attend(*[torch.zeros(1, 2, 8, 4, **F64)] * 3, score=grid_bias(table, 3, 2))
    module = built(grid=(3, 2))
    assert module(X[:, :7]).shape == (2, 7, 32)
    assert module.score.tensor0.shape == (4, 18)


def test_the_cache_holds_bits() -> None:
    module = built(kv_heads=2)
    cache = module.new_cache(2, max_length=11, dtype=torch.float64)
    with torch.no_grad():
        module(X, mask=ph.causal(), cache=cache)
    assert cache.nbytes() == 2 * 11 * 2 * ((1 + 8) + 8 * 8)  # items, tokens, heads, signs and size, values
    with torch.no_grad():
        known = module.new_context_cache(X)
    assert known.nbytes() == cache.nbytes()
    assert module.new_context_cache(X).nbytes() > known.nbytes()  # rows that a gradient has to flow through
    half = ph.build("binary_attention", dim=512, heads=8).cost(1, dtype=torch.float16)
    assert half.kv_bytes_per_token == 8 * (64 // 8 + 2 + 64 * 2)


def test_signs_agree_as_the_arcsine_of_the_correlation() -> None:
    for rho in (-0.6, 0.3, 0.9):
        a, b = drawn(2, 200_000, seed=3)
        b = rho * a + math.sqrt(1 - rho**2) * b
        agree = (torch.sign(a) * torch.sign(b)).mean().item()
        assert abs(agree - 2 / math.pi * math.asin(rho)) < 0.01


def test_what_is_not_allowed() -> None:
    for options, message in (
        ({"scope": "layer"}, "scope of magnitudes"),
        ({"qk_bits": 2}, "qk_bits must be 1 or 32; got 2"),
        ({"pv_bits": 4}, "pv_bits must be None or 8; got 4"),
        ({"kv_heads": 3}, "allowed are 1, 2, 4"),
        ({"grid": 3}, r"grid must be \(height, width\)"),
        ({"reach": -1}, "reach"),
    ):
        with pytest.raises((ConfigError, ph.PolyheadError), match=message):
            built(**options)
