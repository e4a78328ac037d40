from __future__ import annotations

import copy
import json
import math
import pickle

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError, ShapeError, UnknownName
from polyhead.nn import (
    DynamicNtk,
    LinearScaling,
    LongRope,
    Position,
    PositionModule,
    ProportionalScaling,
    Yarn,
    alibi_position,
    no_position,
    rope,
    rope_from_parameters,
    sinusoidal,
)

LONG = {"short_factor": [1.0, 1.1, 1.3, 1.5, 2.0, 2.5, 3.0, 4.0], "long_factor": [1.0 + n for n in range(8)]}
PARAMETERS = {
    "default": {"rope_theta": 10000.0},
    "wide": {"rope_theta": 500000.0, "partial_rotary_factor": 0.5},
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 32},
    "yarn-own": {
        "rope_type": "yarn",
        "factor": 8.0,
        "original_max_position_embeddings": 32,
        "beta_fast": 16,
        "beta_slow": 2,
        "attention_factor": 1.3,
        "truncate": False,
        "partial_rotary_factor": 0.5,
    },
    "yarn-deepseek": {
        "rope_type": "yarn",
        "factor": 40.0,
        "original_max_position_embeddings": 16,
        "mscale": 1.0,
        "mscale_all_dim": 0.7,
    },
    "longrope": {"rope_type": "longrope", "original_max_position_embeddings": 32, "factor": 4.0, **LONG},
    "longrope-ratio": {"rope_type": "longrope", "original_max_position_embeddings": 32, **LONG},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "proportional": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "factor": 2.0},
}


@pytest.mark.parametrize("name", PARAMETERS)
@pytest.mark.parametrize("length", [20, 200])
def test_frequencies_are_those_of_transformers(name: str, length: int) -> None:
    llama = pytest.importorskip("transformers.models.llama")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    parameters = {"rope_theta": 10000.0, "rope_type": "default"} | PARAMETERS[name]
    config = llama.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=dict(parameters)
    )
    ours = rope_from_parameters(parameters, max_position_embeddings=128)
    found, factor = ours.scaling.frequencies(ours.base, 16, ours.fraction, length)
    if parameters["rope_type"] == "default":
        width = int(16 * ours.fraction)
        expected = torch.tensor([ours.base ** (-2 * m / width) for m in range(width // 2)])
        expected_factor = 1.0
    else:
        expected, expected_factor = ROPE_INIT_FUNCTIONS[parameters["rope_type"]](config, None, seq_len=length)
    torch.testing.assert_close(found.float(), expected, rtol=2e-6, atol=1e-12)
    assert factor == pytest.approx(float(expected_factor), rel=1e-6)
    ours.check(dim=64, heads=4, head_dim=16)
    assert ph.from_json(json.loads(json.dumps(ph.to_json(ours)))) == ours


def test_every_rope_type_that_transformers_knows_is_known() -> None:
    pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    assert set(ROPE_INIT_FUNCTIONS) <= {p.get("rope_type") for p in PARAMETERS.values()}


@pytest.mark.parametrize("name", ["default", "llama3", "yarn", "longrope"])
def test_turning_is_that_of_llama(name: str) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    parameters = {"rope_theta": 10000.0, "rope_type": "default"} | PARAMETERS[name]
    config = llama.LlamaConfig(
        hidden_size=64, num_attention_heads=4, max_position_embeddings=128, rope_parameters=dict(parameters)
    )
    q, k = torch.randn(2, 4, 50, 16), torch.randn(2, 4, 50, 16)
    positions = torch.arange(3, 53)[None]
    cos, sin = llama.LlamaRotaryEmbedding(config)(q, positions)
    expected = llama.apply_rotary_pos_emb(q, k, cos, sin)
    ours = rope_from_parameters(parameters, max_position_embeddings=128)
    module = PositionModule(ours, dim=64, head_dim=16, heads=4)
    for found, want in zip((module.turn(q, 3), module.turn(k, positions)), expected, strict=True):
        torch.testing.assert_close(found, want, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize("fraction", [1.0, 0.5])
def test_rope_is_its_twin(interleaved: bool, fraction: float) -> None:
    module = PositionModule(
        rope(100.0, fraction=fraction, interleaved=interleaved), dim=40, head_dim=20, heads=2
    )
    x = torch.randn(2, 2, 7, 20, dtype=torch.float64)
    for where in (0, 5, torch.tensor([4, 4, 9, 1, 0, 3, 100]), torch.arange(-3, 4)):
        positions = torch.arange(where, where + 7) if isinstance(where, int) else where
        expected = ph.reference("rope")(
            x, positions, base=100.0, width=int(20 * fraction), interleaved=interleaved
        )
        torch.testing.assert_close(module.turn(x, where), expected, rtol=0, atol=1e-12)
        torch.testing.assert_close(module.turn(x, positions.expand(2, -1)), expected, rtol=0, atol=1e-12)
    each = torch.stack([torch.arange(7), torch.arange(50, 57)])
    both = module.turn(x, each)
    torch.testing.assert_close(both[0], module.turn(x, 0)[0])
    torch.testing.assert_close(both[1], module.turn(x, 50)[1])


def test_rope_scores_depend_on_the_distance_alone() -> None:
    module = PositionModule(rope(), dim=32, head_dim=32, heads=1)
    q, k = torch.randn(2, 1, 1, 6, 32, dtype=torch.float64)
    near = module.turn(q, 0) @ module.turn(k, 0).mT
    far = module.turn(q, 100_000) @ module.turn(k, 100_000).mT
    torch.testing.assert_close(near, far, rtol=0, atol=1e-9)
    assert module.turn(q, 7).norm(dim=-1).allclose(q.norm(dim=-1))


def test_angles_stay_right_in_half_precision_at_long_range() -> None:
    module = PositionModule(rope(), dim=64, head_dim=64, heads=1)
    x = torch.randn(1, 1, 8, 64).bfloat16()
    exact = module.turn(x.double(), 100_000)
    found = module.turn(x, 100_000)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=2**-9)


def test_sinusoidal_is_its_twin() -> None:
    module = PositionModule(sinusoidal(50.0), dim=12, head_dim=6, heads=2)
    x = torch.randn(2, 9, 12, dtype=torch.float64)
    expected = ph.reference("sinusoidal")(torch.arange(4, 13), 12, 50.0)
    torch.testing.assert_close(module.add(x, 4) - x, expected.expand(2, -1, -1), rtol=0, atol=1e-12)
    assert module.turn(x[:, None], 0) is not None


def test_tables_are_made_once_and_grow() -> None:
    module = PositionModule(rope(), dim=16, head_dim=8, heads=2)
    x = torch.randn(1, 2, 10, 8)
    module.turn(x, 0)
    ((stretch, table),) = module._tables.values()
    module.turn(x, 0)
    assert next(iter(module._tables.values()))[1] is table
    module.turn(x, 1)
    assert len(next(iter(module._tables.values()))[1]) == 20
    assert stretch is None
    assert not copy.deepcopy(module)._tables
    assert not pickle.loads(pickle.dumps(module))._tables
    assert not module.state_dict()


def test_a_table_made_in_inference_serves_training() -> None:
    module = PositionModule(rope(), dim=16, head_dim=8, heads=2)
    x = torch.randn(1, 2, 10, 8)
    with torch.inference_mode():
        module.turn(x, 0)
    given = x.clone().requires_grad_()
    module.turn(given, 0).sum().backward()
    assert given.grad is not None


def test_stretching_scalings_follow_the_length_of_the_sequence() -> None:
    module = PositionModule(rope(scaling=DynamicNtk(2.0, 16)), dim=16, head_dim=8, heads=2)
    x = torch.randn(1, 2, 4, 8, dtype=torch.float64)
    short, long = module.turn(x, 2), module.turn(x, 2, length=64)
    assert not torch.allclose(short, long)
    torch.testing.assert_close(module.turn(x, 2), short)  # the table of the longer one does not stay
    plain = PositionModule(rope(), dim=16, head_dim=8, heads=2)
    torch.testing.assert_close(plain.turn(x, 2), short)
    at = torch.tensor([2, 3, 4, 63])
    torch.testing.assert_close(module.turn(x, at)[:, :, :3], long[:, :, :3])


def test_a_position_that_is_none_does_nothing() -> None:
    module = PositionModule(no_position(), dim=16, head_dim=8, heads=2)
    x = torch.randn(1, 4, 16)
    assert module.add(x, 3) is x
    assert module.turn(x[None], 3).data_ptr() == x.data_ptr()
    assert module.score is None


def test_alibi_is_a_score() -> None:
    module = PositionModule(alibi_position(), dim=16, head_dim=8, heads=2)
    assert module.score == ph.alibi(2)


def test_refusals() -> None:
    with pytest.raises(ConfigError, match="fraction must be a finite number above 0 and at most 1"):
        rope(fraction=0.0)
    with pytest.raises(ConfigError, match="base must be a finite number above 1"):
        rope(0.5)
    with pytest.raises(ConfigError, match="rotated width must be even"):
        PositionModule(rope(), dim=14, head_dim=7, heads=2)
    with pytest.raises(ConfigError, match="dim must be even"):
        PositionModule(sinusoidal(), dim=15, head_dim=5, heads=3)
    with pytest.raises(ConfigError, match="one number for each of the 4 pairs; got 2"):
        PositionModule(rope(scaling=LongRope((1.0, 1.0), (1.0, 1.0), 8)), dim=16, head_dim=8, heads=2)
    with pytest.raises(ConfigError, match="factor must be a finite number above 0"):
        LinearScaling(0.0)
    with pytest.raises(ConfigError, match="factor must be a finite number above 0"):
        Yarn(-1.0, 8)
    with pytest.raises(UnknownName, match="did you mean 'yarn'"):
        rope_from_parameters({"rope_type": "yarrn"})
    with pytest.raises(ConfigError, match="needs original_max_position_embeddings"):
        rope_from_parameters({"rope_type": "yarn", "factor": 2.0})
    module = PositionModule(rope(), dim=16, head_dim=8, heads=2)
    with pytest.raises(ShapeError, match=r"positions must have shape \(4,\) or \(3, 4\)"):
        module.turn(torch.randn(3, 2, 4, 8), torch.arange(5))


def test_proportional_leaves_slow_pairs_unturned() -> None:
    turned = rope(fraction=0.5, scaling=ProportionalScaling()).turned(torch.tensor([3]), 16, 4)
    assert turned is not None
    cos, sin = turned[0]
    assert torch.equal(cos[4:8], torch.ones(4, dtype=torch.float64))
    assert (sin[0].item(), sin[8].item()) == pytest.approx((-math.sin(3), math.sin(3)))


def test_a_position_of_ones_own() -> None:
    class TestShift(Position):
        """Adds the position itself."""

        def added(self, positions: torch.Tensor, dim: int) -> torch.Tensor:
            return positions[..., None].expand(*positions.shape, dim).double()

    attn = ph.build("mha", dim=8, heads=2, position=TestShift(), dtype=torch.float64)
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    plain = ph.build("mha", dim=8, heads=2, dtype=torch.float64)
    plain.load_state_dict(attn.state_dict())
    torch.testing.assert_close(attn(x), plain(x + torch.arange(5.0, dtype=torch.float64)[:, None]))
