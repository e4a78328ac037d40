"""What must hold of landmark attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, ShapeError, UnsupportedPattern
from polyhead.nn import insert_landmarks, is_landmark, landmarks, rope, without_landmarks
from polyhead.reference.landmark_attention import landmark_weights

F64 = {"dtype": torch.float64}
NAME = "landmark_attention"
X = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()


def built(name: str = NAME, **options: Any) -> Any:
    small = {"block_size": 4} if name == NAME else {}
    torch.manual_seed(0)
    return ph.build(name, **{"dim": 32, "heads": 4, **small, **options}, **F64).eval()


def decoded(module: Any, chunks: list[int], x: Tensor = X) -> Tensor:
    cache = module.new_cache(len(x))
    return torch.cat([module(one, mask=CAUSAL, cache=cache) for one in x.split(chunks, dim=1)], dim=1)


@pytest.mark.parametrize(
    "options",
    [
        {"block_size": 4, "kv_heads": 2, "compiled": True},
        {"block_size": 3, "top_k": 1, "kv_heads": 2, "value_dim": 5, "compiled": True},
        {"block_size": 4, "top_k": 2, "bias": True, "qk_norm": True},
    ],
    ids=str,
)
def test_small_blocks_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules(NAME, **options)


@pytest.mark.parametrize("top_k", [None, 2])
def test_rows_sum_to_one_and_landmarks_weigh_nothing(top_k: int | None) -> None:
    """Read off the module: with the identity for values its outputs are its weights."""
    module = built(heads=1, dim=32, value_dim=37, top_k=top_k)
    with torch.no_grad():
        q, (k, _) = module._queries(X, 0), module._rows(X, 0)
    eye = torch.eye(37, **F64).expand(2, 1, -1, -1)
    real = torch.ones(1, 37, dtype=torch.bool)
    weights = module._strip(q, None, k, None, eye, real, 0)[:, 0, 0]
    close(weights.sum(-1), torch.ones(2, 37, **F64))
    assert (weights[..., is_landmark(37, 4)] == 0).all()
    assert (weights.triu(1) == 0).all()
    for n in range(2):
        close(weights[n], landmark_weights(q[n, 0], k[n, 0], 4, top_k, [True] * 37))
    if top_k:
        assert ((weights[0, 36] > 0).sum() == 3 * top_k + 1).item()


def test_before_the_first_landmark_it_is_causal_attention() -> None:
    module, plain = built(kv_heads=2, position=rope()), built("grouped_query", kv_heads=2, position=rope())
    plain.load_state_dict(module.state_dict())
    close(module(X[:, :3], mask=CAUSAL), plain(X[:, :3], mask=CAUSAL))
    assert (module(X[:, :6], mask=CAUSAL) - plain(X[:, :6], mask=CAUSAL)).abs().max() > 1e-3
    module = built(block_size=38)
    plain = built("mha")
    plain.load_state_dict(module.state_dict())
    close(module(X, mask=CAUSAL), plain(X, mask=CAUSAL))


def test_enough_blocks_are_all_blocks() -> None:
    full = built(kv_heads=2, position=rope())
    for top_k in (9, 99):
        close(built(kv_heads=2, position=rope(), top_k=top_k)(X, mask=CAUSAL), full(X, mask=CAUSAL))
        close(
            decoded(built(kv_heads=2, position=rope(), top_k=top_k), [1] * 37), full(X, mask=CAUSAL).detach()
        )
    fewer = built(kv_heads=2, position=rope(), top_k=2)
    assert (fewer(X, mask=CAUSAL) - full(X, mask=CAUSAL)).abs().max() > 1e-3


@pytest.mark.parametrize("reach", [None, 0, 2])
def test_steps_that_gather_blocks_are_what_the_whole_call_is(reach: int | None) -> None:
    module = built(kv_heads=2, top_k=2, reach=reach, position=rope(100.0))
    assert module._reads_few(1, 20)
    assert not module._reads_few(37, 37)
    with torch.no_grad():
        full = module(X, mask=CAUSAL)
        for chunks in ([1] * 37, [20, 1, 1, 15], [30, 2, 5]):
            close(decoded(module, chunks), full)
        real = torch.ones(2, 37, dtype=torch.bool)
        real[1, :9] = False
        real[0, 15] = real[0, 20:23] = False  # a landmark, and all tokens of another
        full, cache = module(X, mask=CAUSAL, padding=real), module.new_cache(2)
        parts = [
            module(X[:, n : n + 1], mask=CAUSAL, padding=real[:, n : n + 1], cache=cache) for n in range(37)
        ]
        close(torch.cat(parts, 1)[real], full[real])


def test_gathered_blocks_have_the_same_gradients() -> None:
    module = built(kv_heads=2, top_k=2, reach=1, position=rope(100.0))
    flows = []
    for chunks in ([37], [30, 1, 1, 5]):
        x = X.clone().requires_grad_()
        flows.append(torch.autograd.grad(decoded(module, chunks, x).sin().sum(), x)[0])
    close(flows[1], flows[0])


def test_strips_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    module = built(kv_heads=2, top_k=3, reach=2, position=rope(100.0))
    found = []
    for held in (1 << 22, 1):
        monkeypatch.setattr(landmarks, "_HELD", held)
        x = X.clone().requires_grad_()
        y = module(x, mask=CAUSAL)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), [x, *module.parameters()])))
    for one, other in zip(*found, strict=True):
        close(one, other)


def test_a_padded_landmark_closes_its_block() -> None:
    module = built()
    real = torch.ones(2, 37, dtype=torch.bool)
    real[:, 7] = False
    full = module(X, mask=CAUSAL, padding=real)
    moved = X.clone()
    moved[:, 4:7] += 1
    same = module(moved, mask=CAUSAL, padding=real)
    close(same[:, 8:], full[:, 8:])


def test_far_blocks_are_read_as_if_they_were_near() -> None:
    """In a text of one block over and over, that which is out of reach stands where the next one stands."""
    block = torch.randn(1, 4, 32, generator=torch.Generator().manual_seed(3), **F64)
    x = block.repeat(1, 9, 1)
    module, plain = (built(position=rope(100.0), reach=reach) for reach in (1, None))
    q = module._queries(x, 0)
    k = module._rows(x, 0)[0]
    scores = []
    for one in (module, plain):
        seen: dict[str, Tensor] = {}
        products = one._products
        one._products = lambda q, k, of=products, seen=seen: seen.setdefault(str(len(seen)), of(q, k))
        one(x, mask=CAUSAL)
        scores.append(seen)
    assert list(scores[1]) == ["0"]
    near, far = scores[0]["0"][0, :, 0], scores[0]["1"][0, :, 0]
    close(near, (q @ k.transpose(-1, -2))[0] / 8**0.5)
    for i in range(12, 36):
        for p in range(i // 4 - 1):  # two back and more: those two back are where they are
            close(far[:, i, 4 * p : 4 * p + 4], near[:, i, 4 * (i // 4 - 2) :][:, :4])
    assert (module(x, mask=CAUSAL) - plain(x, mask=CAUSAL)).abs().max() > 1e-4
    close(built(position=rope(100.0), reach=8)(X, mask=CAUSAL), built(position=rope(100.0))(X, mask=CAUSAL))
    close(built(reach=0)(X, mask=CAUSAL), built()(X, mask=CAUSAL))  # without positions nothing moves


def test_tokens_with_landmarks_and_without() -> None:
    ids = torch.arange(1, 9).view(1, -1)
    marked = insert_landmarks(ids, 4, 0)
    assert marked.tolist() == [[1, 2, 3, 0, 4, 5, 6, 0, 7, 8]]
    assert torch.equal(marked == 0, is_landmark(10, 4)[None])
    assert torch.equal(without_landmarks(marked, 4), ids)
    assert insert_landmarks(ids[:, :6], 4, -100).tolist() == [[1, 2, 3, -100, 4, 5, 6, -100]]
    assert insert_landmarks(ids[:, :0], 4, 0).shape == (1, 0)
    with pytest.raises(ShapeError, match="tokens must be a tensor"):
        insert_landmarks(3, 4, 0)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="block_size must be at least 2; got 1"):
        is_landmark(4, 1)


def test_a_step_that_reads_few_blocks_costs_little() -> None:
    few, full = (ph.build(NAME, dim=64, heads=4, top_k=k, device="meta").step_cost(8191) for k in (4, None))
    assert few.values * 25 < full.values
    assert few.scores * 15 < full.scores
    assert few.cache_bytes == full.cache_bytes


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"block_size": 1}, "block_size must be at least 2; got 1"),
        ({"top_k": 0}, "top_k must be at least 1; got 0"),
        ({"reach": -1}, "reach must be at least 0; got -1"),
        ({"reach": 2, "position": ph.nn.sinusoidal()}, r"takes rope\(\) without scaling, or no positions"),
        ({"position": ph.nn.alibi_position()}, "position must not be a bias of scores"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    module = built()
    with pytest.raises(UnsupportedPattern, match="does not support a mask other than causal"):
        module(X, mask=CAUSAL & ph.documents(torch.arange(37) // 20))
    with pytest.raises(UnsupportedPattern, match=r"what comes later; pass mask=causal\(\)"):
        module(X)
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module.new_context_cache(X)
