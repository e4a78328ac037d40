"""What must hold of mixture of sparse attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from close import close
from mechanisms.variants import broken_rules
from polyhead.errors import ConfigError, UnknownName, UnsupportedPattern
from polyhead.nn import rope

F64 = {"dtype": torch.float64}
X = torch.randn(2, 37, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()


def built(**options: Any) -> Any:
    torch.manual_seed(0)
    return ph.build("mosa", **{"dim": 32, "heads": 4, "sparsity": 4.0, **options}, **F64).eval()


def chosen(module: Any, x: Tensor = X) -> Tensor:
    """Which tokens the heads choose, bool `(B, E, L)`."""
    return module.choice.choose(module.choice(x), 0, None)


def frozen(module: Any, active: Tensor) -> Any:
    """The module with its choice of tokens as given."""
    module.choice.choose = lambda scores, first, real: active
    return module


@pytest.mark.parametrize(
    "options",
    [
        {"sparsity": 3.0, "bias": True, "qk_norm": True, "compiled": True},
        {"sparsity": 2.5, "dense_heads": 0, "include_first": True},
        {"sparsity": 1.0, "dense_heads": 1},
        {
            "sparsity": 3.0,
            "choice": "sequence",
            "include_first": True,
            "without": "decode decode_padded cache_edits",
        },
    ],
    ids=str,
)
def test_other_options_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules("mosa", **options)


@pytest.mark.parametrize("choice", ["prefix", "sequence"])
def test_with_every_token_chosen_heads_are_dense_ones_times_their_scores(choice: str) -> None:
    module = built(sparsity=1.0, choice=choice, position=rope(100.0, fraction=0.5))
    plain = ph.build("mha", dim=32, heads=4, position=rope(100.0, fraction=0.5), **F64)
    plain.load_state_dict({n: t for n, t in module.state_dict().items() if not n.startswith("choice")})
    q, rows = plain._queries(X, 0), plain._rows(X, 0)
    heads = ph.attend(q, *rows, mask=CAUSAL)
    assert bool(chosen(module).all())
    gates = torch.cat([torch.ones(2, 1, 37, **F64), module.choice(X)], dim=1)
    close(module(X, mask=CAUSAL), plain.output(heads * gates[..., None]))


def test_whoever_is_not_chosen_gets_nothing_and_is_not_seen() -> None:
    module = built(dense_heads=0, heads=1)
    active = chosen(module)
    assert 2 < int(active.sum()) < 60
    y = module(X, mask=CAUSAL)
    assert not y[~active[:, 0]].any()
    assert y[active[:, 0]].abs().amax(-1).min() > 0
    loud = X.clone()
    loud[~active[:, 0]] *= 100.0
    close(frozen(module, active)(loud, mask=CAUSAL)[active[:, 0]], y[active[:, 0]])


def test_each_head_chooses_the_best_of_the_sequence_or_of_what_has_come() -> None:
    whole, prefix = built(choice="sequence"), built()
    scores = whole.choice(X)
    best = scores.topk(9).indices
    assert torch.equal(chosen(whole), torch.zeros(2, 3, 37, dtype=torch.bool).scatter(-1, best, True))
    active = chosen(prefix)
    for t in range(37):
        above = (scores[..., :t] >= scores[..., t : t + 1]).sum(-1)
        assert torch.equal(active[..., t], above < max(2, (t + 1) // 4))
    assert chosen(built(include_first=True, choice="sequence"))[..., 0].all()


def test_equal_scores_do_not_fill_a_head() -> None:
    """Of tokens that are all alike the earlier are taken; one by one, none is better than two before it."""
    alike = X[:, :1].expand(-1, 37, -1)
    assert chosen(built(choice="sequence"), alike).sum(-1).eq(9).all()
    assert chosen(built(choice="prefix"), alike).sum(-1).eq(2).all()


def test_the_paper_s_choice_lets_later_tokens_have_a_say_and_the_prefix_s_does_not() -> None:
    loud = X.clone()
    loud[:, 20:] = 100 * torch.randn(2, 17, 32, generator=torch.Generator().manual_seed(1), **F64)
    with torch.no_grad():
        for choice, leaks in (("prefix", False), ("sequence", True)):
            module = built(choice=choice)
            moved = (module(loud, mask=CAUSAL) - module(X, mask=CAUSAL))[:, :20].abs().max()
            assert bool(moved > 1e-3) == leaks
            still = frozen(module, chosen(module))
            moved = (still(loud, mask=CAUSAL) - still(X, mask=CAUSAL))[:, :20].abs().max()
            assert moved <= 1e-12  # by the choice alone


def test_the_router_learns_by_the_scores_of_the_chosen() -> None:
    module = built()
    module(X, mask=CAUSAL).square().sum().backward()
    assert module.choice.score.weight.grad.abs().amax(1).min() > 0


def test_regularizers_act_on_heads_that_choose_and_on_what_they_see() -> None:
    for part in (ph.nn.drop_head(0.5), ph.nn.token_masking(0.5)):
        module = built(dense_heads=0, regularizers=(part,))
        still = module(X, mask=CAUSAL)
        module.train()
        torch.manual_seed(1)
        assert (module(X, mask=CAUSAL) - still).abs().max() > 1e-3


def test_heads_that_choose_cost_less() -> None:
    plain = ph.build("mha", dim=32, heads=4).cost(64)
    own = built(dense_heads=0, choice="sequence").cost(64)
    assert own.scores * 16 == plain.scores
    assert own.projections < plain.projections / 3
    module = built(dense_heads=0, heads=16, head_dim=4)
    mean = chosen(module, torch.randn(64, 64, 32, **F64)).sum(-1).double().mean()
    assert abs(module.choice.expected(64) - mean) < 1  # of a prefix: two at first, and then a quarter


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"select": ph.select(ph.mean_keys(), ph.keep_blocks(1))}, "select must be None in mosa"),
        ({"mask": ph.window(3)}, "mask must be None: calls are causal"),
        ({"sparsity": 0.5}, "sparsity must be"),
        ({"dense_heads": 4}, "dense_heads .of 4 heads, one of which has to choose"),
        ({"include_first": 1}, "include_first must be True or False"),
        ({"score": ph.alibi(4)}, "score must be left out where heads see tokens of their own choice"),
        ({"normalizer": ph.entmax(1.5)}, "normalizer must be left out"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(ConfigError, match=words):
            built(**options)
    with pytest.raises(UnknownName, match="prefix"):
        built(choice="prefixes")
    with pytest.raises(UnsupportedPattern, match="tokens to come have a say; build it with choice='prefix'"):
        built(choice="sequence").new_cache(2)
