"""What must hold of select and pack."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.grids import moved_by
from mechanisms.variants import broken_rules
from polyhead.errors import PolyheadError, UnsupportedPattern
from polyhead.mechanisms import configure
from polyhead.nn import auxiliary_losses, pack, rope, unpack

F64 = {"dtype": torch.float64}
X = torch.randn(3, 48, 32, generator=torch.Generator().manual_seed(0), **F64)
REAL = torch.arange(48) < torch.tensor([[48], [30], [1]])


def built(wide: float = 0.5, **options: Any) -> Any:
    """A module whose scores are spread around `threshold`, so that some tokens are selected."""
    torch.manual_seed(0)
    module = ph.build("select_and_pack", **{"dim": 32, "heads": 4, "threshold": 4.0, **options}, **F64)
    torch.nn.init.normal_(module.gate.weight, std=wide)
    return module.eval()


def plain_of(module: Any, **options: Any) -> Any:
    plain = ph.build("mha", dim=32, heads=4, **options, **F64)
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("gate")})
    return plain


def selected(module: Any, x: Tensor) -> Tensor:
    return module.scores(x) > module.threshold


@pytest.mark.parametrize(
    ("options", "without"),
    [
        # how many tokens are computed depends on them, and `cost` counts all
        ({"threshold": 4.0, "kv_heads": 2, "compiled": True}, "cost"),
        ({"threshold": 4.2, "bias": True}, "cost"),
        ({"threshold": 99.0}, "cost round_trips"),  # nothing is selected
        # where a sequence is parted depends on the others of the batch
        ({"container": 4, "shift": 2}, "cost padding"),
    ],
    ids=str,
)
def test_some_tokens_keep_the_contract(options: dict[str, Any], without: str) -> None:
    assert not broken_rules("select_and_pack", without=without, **options)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"kv_heads": 2, "bias": True, "qk_norm": True},
        {"container": 7},
        {"container": 1},
        {"container": 10, "grid": (6, 8), "shift": 2},
        {"container": 16, "shift": 3},
    ],
    ids=str,
)
def test_it_equals_the_twin(options: dict[str, Any]) -> None:
    module = built(**options)
    assert 0.2 < selected(module, X).double().mean() < 0.8
    config = configure("select_and_pack", **{"dim": 32, "heads": 4, "threshold": 4.0, **options})
    names = ("heads", "kv_heads", "threshold", "container", "grid", "shift")
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config) if f.name in names}
    for padding in (None, REAL):
        wanted = ph.reference("select_and_pack")(X, parameters=module.state_dict(), padding=padding, **fields)
        close(module(X, padding=padding), wanted)


def test_everything_selected_and_not_gated_is_full_attention() -> None:
    module = built(threshold=0.0, position=rope(100.0))
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.fill_(800.0)  # σ is 1
    close(module(X), plain_of(module, position=rope(100.0))(X))
    parted = built(threshold=0.0, container=48)
    parted.load_state_dict(module.state_dict())
    close(parted(X), plain_of(module)(X))


def test_at_the_start_everything_is_selected() -> None:
    torch.manual_seed(0)
    module = ph.build("select_and_pack", dim=32, heads=4, **F64).eval()
    assert bool(selected(module, X).all())


def test_tokens_that_are_not_selected_stay_as_they_are() -> None:
    module = built(bias=True)
    out, own = module(X), selected(module, X)
    assert out[~own].abs().max() == 0.0
    assert out[own].abs().amax(-1).min() > 0.0


def test_an_output_depends_on_the_selected_tokens_of_its_sequence() -> None:
    for container in (None, 9):
        module = built(container=container)
        own = selected(module, X[:1])[0]
        rows = torch.arange(len(own)) if container is None else own.cumsum(0) - 1
        size = 48 if container is None else container
        wanted = own[:, None] & own & (rows[:, None] // size == rows // size)
        assert torch.equal(moved_by(module, X[:1]), wanted)


def test_nothing_leaks_between_sequences() -> None:
    for container in (None, 9):
        module = built(container=container)
        x = X.clone().requires_grad_()
        (flow,) = torch.autograd.grad(module(x)[1].sin().sum(), x)
        assert flow[[0, 2]].abs().max() == 0.0
        assert flow[1].abs().max() > 0.0


def test_positions_are_those_before_packing() -> None:
    module = built(position=rope(100.0), threshold=4.3)
    for positions in (None, torch.arange(48) + 7, 3 * torch.arange(48).expand(3, -1)):
        out = module(X, positions=positions)
        plain = plain_of(module, position=rope(100.0))
        for n in range(3):
            own = selected(module, X[n : n + 1])[0]
            tokens = (X[n] * module.scores(X[n : n + 1]).sigmoid()[0, :, None])[own]
            at = torch.arange(48) if positions is None else positions.expand(3, -1)[n]
            close(out[n, own], plain(tokens[None], positions=at[own])[0])


def test_packing_and_back() -> None:
    chosen = REAL & (torch.rand(3, 48, generator=torch.Generator().manual_seed(1)) < 0.6)
    total = int(chosen.sum())
    for length in (1, 7, total, 100, None):
        packed = pack(X, chosen, length)
        rows, size = packed.segments.shape
        assert (rows, size) == ((1, total) if length is None else (math.ceil(total / length), length))
        assert torch.equal(packed.segments.view(-1) >= 0, torch.arange(rows * size) < total)
        close(packed.tokens.flatten(0, 1)[:total], X[chosen])
        close(unpack(packed.tokens, packed, (3, 48)), X * chosen[..., None])
    order = torch.arange(48).roll(-5)
    packed = pack(X, chosen, 7, order)
    wanted = torch.cat([order[chosen[n, order]] for n in range(3)])
    assert torch.equal(packed.places.view(-1)[:total], wanted)
    close(unpack(packed.tokens, packed, (3, 48)), X * chosen[..., None])
    assert pack(X, torch.zeros_like(chosen), 7).tokens.shape == (0, 7, 32)
    with pytest.raises(PolyheadError, match=r"pack: chosen must be a bool tensor \(3, 48\)"):
        pack(X, chosen[:2])
    with pytest.raises(PolyheadError, match=r"pack: order must be an int64 tensor \(48,\)"):
        pack(X, chosen, 7, order[:5])


def test_rolling_moves_where_sequences_are_parted() -> None:
    plain, rolled = built(container=9, grid=(6, 8)), built(container=9, grid=(6, 8), shift=2)
    assert (plain(X) - rolled(X)).abs().max() > 1e-3
    assert torch.equal(plain(X).abs().sum(-1) > 0, rolled(X).abs().sum(-1) > 0)


def test_earlier_scores_keep_tokens() -> None:
    module = built()
    own = selected(module, X)
    earlier = torch.where(torch.arange(48) % 2 == 0, 5.0, -50.0).expand(3, -1).double()
    out = module(X, earlier=earlier)
    assert torch.equal(out.abs().sum(-1) > 0, own | (earlier > 4.0))
    assert torch.equal(module(X, earlier=torch.full_like(earlier, -50.0)), module(X))
    with pytest.raises(PolyheadError, match=r"earlier must be scores \(3, 48\)"):
        module(X, earlier=earlier[:1])


def test_the_gate_learns_by_its_factor_by_the_choice_and_by_labels() -> None:
    module = built(weight=0.5)
    with torch.no_grad():
        labels = selected(module, X.flip(1))
    wanted = 0.5 * F.binary_cross_entropy_with_logits(module.scores(X)[REAL], labels[REAL].double())

    def flow(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, module.gate.weight)[0]

    evaluated = flow(module(X, labels=labels).sin().sum())
    assert evaluated.abs().max() > 0
    assert not auxiliary_losses(module)
    module.train()
    torch.manual_seed(3)
    module(X, padding=REAL, labels=labels)
    found = auxiliary_losses(module)["selection"]
    close(found, wanted)
    close(flow(found), flow(wanted))
    module(X)
    assert not auxiliary_losses(module)


def test_what_earlier_scores_say_of_padding_does_not_count() -> None:
    for options, labels in (({}, torch.arange(48) % 3 > torch.zeros(3, 1)), ({"keep": 0.3}, None)):
        module, losses, slopes = built(**options).train(), [], []
        earlier = torch.randn(3, 48, generator=torch.Generator().manual_seed(2), **F64)
        for said in (0.0, torch.nan):
            torch.manual_seed(3)
            out = module(X, padding=REAL, earlier=earlier.masked_fill(~REAL, said), labels=labels)
            assert out.isfinite().all()
            losses.append(auxiliary_losses(module)["selection"])
            total = out.square().sum() + losses[-1]
            slopes.append(torch.autograd.grad(total, module.gate.weight)[0])
        assert losses[0].isfinite()
        close(losses[1], losses[0])
        close(slopes[1], slopes[0])


def test_in_training_the_choice_is_drawn() -> None:
    """A token is selected with probability σ(s - θ), and the gradient of that is passed on."""
    module = built(wide=0.1, heads=1).train()
    x = X[:1].expand(400, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        share = (module(x).abs().sum(-1) > 0).double().mean(0)
        wanted = (module.scores(X[0]) - 4.0).sigmoid()
    assert (share - wanted).abs().max() < 0.12  # nearly 5 deviations of the mean of 400 draws
    with torch.no_grad():
        module.gate.weight.zero_()
        module.gate.bias.fill_(20.0)  # σ is flat, and so is the choice with θ far below
    module.threshold = 20.0
    (steep,) = torch.autograd.grad(module(X).square().sum(), module.gate.bias)
    module.threshold = -20.0
    (flat,) = torch.autograd.grad(module(X).square().sum(), module.gate.bias)
    assert steep.abs() > 100 * flat.abs()


def test_a_share_can_be_aimed_at() -> None:
    torch.manual_seed(0)
    module = ph.build("select_and_pack", dim=32, heads=4, keep=0.3, weight=1.0, **F64)
    steps = torch.optim.Adam(module.gate.parameters(), lr=0.1)
    for _ in range(100):
        steps.zero_grad()
        module(X)
        auxiliary_losses(module)["selection"].backward()
        steps.step()
    assert abs(selected(module, X).double().mean() - 0.3) < 0.1


def test_what_is_packed_is_read_document_by_document() -> None:
    ids = torch.arange(4).repeat_interleave(700)
    q = torch.randn(1, 2, 2800, 16)
    assert ph.explain(q, q, q, mask=ph.documents(ids[None])).backend == "tiles"


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"container": 0}, "container must be at least 1; got 0"),
        ({"shift": 1}, "shift must be 0 without a container"),
        ({"keep": 1.5}, "keep must be"),
        ({"weight": -1.0}, "weight must be"),
        ({"threshold": "high"}, "threshold must be"),
        ({"grid": 4}, r"grid must be \(height, width\)"),
        ({"mask": ph.window(3)}, "mask must be None in SelectAndPackAttention"),
        ({"score": ph.alibi(4)}, "score must be None in SelectAndPackAttention"),
        ({"position": ph.nn.alibi_position()}, "position must not be a bias of the scores"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(PolyheadError, match=words):
            built(**options)
    module = built()
    with pytest.raises(UnsupportedPattern, match="does not support a context"):
        module(X, X)
    with pytest.raises(UnsupportedPattern, match="does not support decoding with a cache"):
        module.new_cache(3)
    with pytest.raises(PolyheadError, match=r"labels must be a bool tensor \(3, 48\)"):
        module(X, labels=torch.ones(3, 48))
    with pytest.raises(PolyheadError, match="x must have the tokens of grid"):
        built(container=9, grid=(6, 8), shift=1)(X[:, :40])
