"""What acts in training only: heads that are dropped, tokens that are cut off."""

from __future__ import annotations

import math

import pytest
import torch

import polyhead as ph
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn import DropHead, Regularizer, TokenMasking, drop_head, token_masking, v_schedule
from polyhead.nn.regularizers.token_masking import TokensCut

REGULARIZERS = [drop_head(0.3), token_masking(0.3)]


def build(
    *regularizers: Regularizer, name: str = "mha", heads: int = 4, **options
) -> ph.nn.MultiHeadAttention:
    torch.manual_seed(0)
    return ph.build(
        name, dim=8 * heads, heads=heads, regularizers=regularizers, dtype=torch.float64, **options
    )


def inputs(heads: int = 4, length: int = 12, batch: int = 3) -> torch.Tensor:
    return torch.randn(
        batch, length, 8 * heads, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )


@pytest.mark.parametrize("name", ["mha", "grouped_query", "multi_query", "sparse_query"])
@pytest.mark.parametrize("part", REGULARIZERS, ids=lambda part: part.kind)
def test_acts_in_training_only_and_repeats_for_a_seed(name: str, part: Regularizer) -> None:
    module, plain, x = build(part, name=name), build(name=name), inputs()
    module.eval()
    state = torch.get_rng_state()
    assert torch.equal(module(x, mask=ph.causal()), plain(x, mask=ph.causal()))
    assert torch.equal(torch.get_rng_state(), state)
    module.train()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        found.append(module(x, mask=ph.causal()))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], plain(x, mask=ph.causal()))


@pytest.mark.parametrize("part", [drop_head(0.0), token_masking(0.0)], ids=lambda part: part.kind)
def test_a_rate_of_zero_changes_no_bit_and_draws_nothing(part: Regularizer) -> None:
    x = inputs()
    state = torch.get_rng_state()
    assert torch.equal(part.on_heads(x[:, None]), x[:, None])
    module, plain = build(part, dropout=0.2), build(dropout=0.2)
    torch.set_rng_state(state)
    found = module(x, mask=ph.causal())
    torch.set_rng_state(state)
    assert torch.equal(found, plain(x, mask=ph.causal()))


def test_they_combine_and_go_through_json() -> None:
    module = build(*REGULARIZERS, mask=ph.window(5))
    assert ph.from_json(ph.to_json(module.config)) == module.config
    assert ph.from_json(ph.to_json(module.config)).build().regularizers == tuple(REGULARIZERS)
    assert ph.build("mha", dim=8, heads=2, regularizers=drop_head(0.1)).regularizers == (drop_head(0.1),)
    assert bool(torch.isfinite(module.train()(inputs(), mask=ph.causal())).all())


@pytest.mark.parametrize("part", REGULARIZERS, ids=lambda part: part.kind)
def test_one_graph(part: Regularizer) -> None:
    module, x = build(part).train(), inputs()
    torch._dynamo.reset()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.manual_seed(5)
    found = compiled(x, mask=ph.causal())
    torch.manual_seed(5)
    torch.testing.assert_close(found, module(x, mask=ph.causal()), rtol=0, atol=1e-9)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: drop_head(1.0), "drop_head: rate must be a finite number at least 0 and below 1, got 1.0"),
        (lambda: drop_head(True), "drop_head: rate"),
        (lambda: drop_head(0.1, rescale=1), "drop_head: rescale must be True or False"),
        (lambda: token_masking(1.5), "token_masking: rate must be a finite number at least 0 and at most 1"),
        (lambda: token_masking(mode="none"), "mode must be one of both, siblings, self; got 'none'"),
        (lambda: ph.build("mha", dim=8, heads=2, regularizers=0.1), "regularizers must be parts such as"),
        (lambda: ph.build("mha", dim=8, heads=2, regularizers=(drop_head,)), "regularizers must be parts"),
        (lambda: v_schedule(0, 10, 0.2, warmup=1.0), "warmup must be"),
        (lambda: v_schedule(-1, 10, 0.2), "step must be at least 0"),
    ],
)
def test_values_that_are_not_allowed_are_refused(make, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        make()


# ---- heads that are dropped ----


def test_the_share_of_dropped_heads_is_the_rate() -> None:
    torch.manual_seed(0)
    rate, heads, draws = 0.2, 16, 4000
    dropped = drop_head(rate).draw(draws, heads) == 0
    sd = math.sqrt(rate * (1 - rate) / draws)
    assert (dropped.float().mean(0) - rate).abs().max().item() < 4.5 * sd  # every head alike
    pairs = torch.corrcoef(dropped.float().T).fill_diagonal_(0)
    assert pairs.abs().max().item() < 5 / math.sqrt(draws)  # and independently


def test_what_is_left_is_rescaled_to_all_heads() -> None:
    torch.manual_seed(0)
    factors = drop_head(0.5).draw(500, 6)
    kept = (factors > 0).sum(1, keepdim=True)
    assert kept.min().item() >= 1
    assert torch.equal(factors, torch.where(factors > 0, 6 / kept, 0.0))
    torch.testing.assert_close(factors.sum(1), torch.full((500,), 6.0))
    assert set(drop_head(0.5, rescale=False).draw(500, 6).unique().tolist()) == {0.0, 1.0}
    assert len(drop_head(0.5, whole_batch=True).draw(50, 6).unique(dim=0)) == 1
    assert len(factors.unique(dim=0)) > 20


def test_one_head_is_never_dropped() -> None:
    torch.manual_seed(0)
    assert bool((drop_head(0.9).draw(100, 1) == 1).all())


def test_a_dropped_head_gets_no_gradient() -> None:
    part = drop_head(0.5, whole_batch=True)
    module, x = build(part), inputs()
    torch.manual_seed(7)
    dropped = (part.draw(3, 4) == 0)[0]
    assert 0 < dropped.sum() < 4
    torch.manual_seed(7)
    module(x).square().sum().backward()
    width = module.value_dim
    for linear in (module.projection.query, module.projection.key, module.projection.value):
        gone = linear.weight.grad.unflatten(0, (4, width)).abs().amax((1, 2)) == 0
        assert torch.equal(gone, dropped)
    gone = module.output.weight.grad.unflatten(1, (4, width)).abs().amax((0, 2)) == 0
    assert torch.equal(gone, dropped)


def test_a_dropped_head_is_gone_be_it_infinite() -> None:
    torch.manual_seed(0)
    heads = torch.full((200, 4, 2, 3), math.inf)
    out = DropHead(0.5).on_heads(heads)
    assert not bool(out.isnan().any())
    assert bool((out == 0).any())


def test_the_schedule_is_a_v() -> None:
    rates = [v_schedule(t, 100, 0.2, warmup=0.3) for t in range(101)]
    assert rates[0] == 0.2
    assert rates[30] == 0.0
    assert rates[15] == pytest.approx(0.1)
    assert rates[100] == pytest.approx(0.2)
    assert rates[65] == pytest.approx(0.1)
    assert v_schedule(500, 100, 0.2, end=0.4) == pytest.approx(0.4)
    assert v_schedule(0, 100, 0.2, warmup=0.0) == 0.0


# ---- tokens that are cut off ----


def dense(mask: ph.Mask, batch: int, length: int, heads: int = 1) -> torch.Tensor:
    return densify(mask, batch=batch, heads=heads, queries=length, keys=length)


def narrowed(part: TokenMasking, mask, batch: int = 4, length: int = 300, padding=None, heads: int = 1):
    return part.narrow(
        mask, batch=batch, heads=heads, length=length, padding=padding, device=torch.device("cpu")
    )


def test_the_share_of_selected_tokens_is_the_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    kinds = token_masking(0.05).draw(100, 400, generator=generator).kinds
    n = kinds.numel()
    for kind, rate in ((0, 0.95), (1, 0.025), (2, 0.025)):
        share = (kinds == kind).float().mean().item()
        assert abs(share - rate) < 4.5 * math.sqrt(rate * (1 - rate) / n)
    again = token_masking(0.05).draw(100, 400, generator=torch.Generator().manual_seed(0))
    assert torch.equal(again.kinds, kinds)
    assert set(token_masking(0.5, mode="self").draw(5, 50).kinds.unique().tolist()) == {0, 2}
    assert set(token_masking(0.5, mode="siblings").draw(5, 50).kinds.unique().tolist()) == {0, 1}


@pytest.mark.parametrize("hide", [True, False])
def test_rows_are_what_the_equations_say(hide: bool) -> None:
    kinds = torch.tensor([[0, 1, 2, 0, 2]])
    seen = dense(TokensCut(kinds, hide), 1, 5)[0, 0]
    free = [True, not hide, not hide, True, not hide]
    expected = [
        free,
        [False, True, False, False, False],
        [True, True, False, True, True],
        free,
        [True, True, True, True, False],
    ]
    assert seen.tolist() == expected


@pytest.mark.parametrize("mode", ["both", "siblings", "self"])
@pytest.mark.parametrize(
    "mask",
    [None, ph.causal(), ph.causal() & ph.window(0), ph.window(2, 2)],
    ids=["all", "causal", "own", "band"],
)
def test_every_row_keeps_a_key_and_sees_nothing_new(mode: str, mask: ph.Mask | None) -> None:
    torch.manual_seed(0)
    found = narrowed(token_masking(0.5, mode=mode), mask)
    before = torch.ones(1, 1, 300, 300, dtype=torch.bool) if mask is None else dense(mask, 4, 300)
    seen = dense(found, 4, 300)
    assert not bool((seen & ~before).any())
    assert bool(seen.any(-1).all())
    assert bool((seen != before).any()) or mask == ph.causal() & ph.window(0)


def test_the_first_row_of_a_causal_call_cannot_look_away_from_itself() -> None:
    seen = dense(narrowed(token_masking(1.0, mode="self"), ph.causal(), length=9), 4, 9)
    assert bool(seen[:, :, 0, 0].all())
    assert not bool(seen.diagonal(dim1=2, dim2=3)[..., 1:].any())
    assert not bool(seen.triu(1).any())


def test_padding_is_never_selected_and_never_seen_instead() -> None:
    torch.manual_seed(0)
    padding = torch.ones(4, 300, dtype=torch.bool)
    padding[0, 200:] = False
    padding[1, 1:] = False  # one real token: it sees itself whatever is drawn
    drawn = token_masking(0.9).draw(4, 300, padding=padding)
    assert not bool((drawn.kinds[~padding] != 0).any())
    seen = dense(narrowed(token_masking(0.9, mode="self"), None, padding=padding), 4, 300)
    real = seen & padding[:, None, None, :]
    assert bool(real.any(-1)[padding[:, None]].all())


def test_masks_of_single_heads_are_respected() -> None:
    torch.manual_seed(0)
    mask = ph.per_head([ph.causal(), ph.causal() & ph.window(0)])
    seen = dense(narrowed(token_masking(0.6, mode="self"), mask, heads=2), 4, 300, heads=2)
    assert bool(seen.any(-1).all())
    assert torch.equal(seen[:, 1], torch.eye(300, dtype=torch.bool).expand(4, -1, -1))


def test_cut_off_from_its_siblings_a_token_gives_its_own_value() -> None:
    module, x = build(token_masking(1.0, mode="siblings")), inputs()
    _, v = module.projection.keys_values(x)
    torch.testing.assert_close(module(x, mask=ph.causal()), module.output(v))


def test_layers_and_calls_draw_for_themselves_and_heads_share() -> None:
    part, x = token_masking(0.5), inputs(length=40)
    one, other = build(part), build(part)
    assert not torch.equal(one(x), other(x))
    assert not torch.equal(one(x), one(x))
    drawn = dense(narrowed(part, None, heads=4), 4, 300, heads=4)
    assert torch.equal(drawn, drawn[:, :1].expand_as(drawn))


def test_cross_attention_and_decoding_are_left_alone() -> None:
    module, plain, x = build(token_masking(0.9)), build(), inputs()
    assert torch.equal(module(x, x), plain(x, x))
    cache = module.new_cache(3)
    assert torch.equal(module(x, mask=ph.causal(), cache=cache), plain(x, mask=ph.causal()))


def test_tokens_drawn_for_another_call_are_refused() -> None:
    q = torch.zeros(2, 1, 6, 4)
    with pytest.raises(ShapeError, match=r"tokens were drawn for \(2, 5\); the call has 2 items of 6 tokens"):
        ph.attend(q, q, q, mask=TokensCut(torch.zeros(2, 5, dtype=torch.int64)))
