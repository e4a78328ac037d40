"""A selector in a module: what it hands to the operator, who takes it, and what decoding makes of it."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

import polyhead as ph
from close import close
from polyhead.attend.masks import densify
from polyhead.attend.selectors import Selector, choose
from polyhead.errors import ConfigError
from polyhead.mechanisms import flow_of
from polyhead.mechanisms.el_attention import el_attention
from polyhead.nn import rope

F64 = {"dtype": torch.float64}
OWN = ph.window(0)  # a query's own block
NEAR = ph.select(ph.mean_keys(), ph.keep_blocks(2), rows=1, cols=4, always=OWN)
ALL = ph.select(ph.key_bounds(), ph.keep_share(1.0), rows=3, cols=4)
X = torch.randn(2, 23, 32, generator=torch.Generator().manual_seed(0), **F64)


def built(name: str = "grouped_query", **options: Any) -> Any:
    torch.manual_seed(0)
    options = {"kv_heads": 2} | options if name == "grouped_query" else options
    return ph.build(name, **{"dim": 32, "heads": 4, **options}, **F64).eval()


def test_what_is_read_is_what_the_selector_chooses() -> None:
    module, x = built(select=NEAR, position=rope(100.0)), X
    q, (k, _) = module._queries(x, 0), module._rows(x, 0)
    found = choose(NEAR, q, k, ph.causal(), 8**-0.5)
    close(module(x, mask=ph.causal()), built(position=rope(100.0), mask=found)(x, mask=ph.causal()))
    read = densify(ph.causal() & found, batch=2, heads=4, queries=23, keys=23).sum(-1)
    assert int(read.max()) <= 8


def test_every_mechanism_that_has_the_option_takes_it_or_says_that_it_does_not() -> None:
    took, refused = set(), set()
    for entry in ph.catalog():
        if "select" not in {f.name for f in dataclasses.fields(entry.config)}:
            continue
        try:
            every = built(entry.name, select=ALL)
        except ConfigError as error:
            assert "select must be None in" in str(error)  # noqa: PT017
            refused.add(entry.name)
            continue
        took.add(entry.name)
        pattern = "causal_self" if "causal_self" in entry.supports else sorted(entry.supports)[0]
        context = X if pattern.endswith("cross") else None
        mask = ph.causal() if pattern.startswith("causal") else None
        few = ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=1, cols=2, always=OWN)
        with torch.no_grad():
            plain = built(entry.name)(X, context, mask=mask)
            torch.testing.assert_close(every(X, context, mask=mask), plain)
            assert (built(entry.name, select=few)(X, context, mask=mask) - plain).abs().max() > 1e-3
    assert {"mha", "grouped_query", "entmax_attention", "talking_heads", "decoupled_head"} <= took
    assert {"interleaved_heads", "moh", "el_attention", "affine_scaled"} <= refused


@pytest.mark.parametrize("chunks", [[1] * 23, [9, 1, 1, 12], [22, 1]], ids=str)
@pytest.mark.parametrize("kind", [{}, {"max_length": 23}], ids=str)
def test_decoding_chooses_as_the_whole_call_does(chunks: list[int], kind: dict[str, int]) -> None:
    module = built(select=NEAR, position=rope(100.0), score=ph.alibi(4))
    with torch.no_grad():
        cache = module.new_cache(2, **kind)
        steps = [module(x, mask=ph.causal(), cache=cache) for x in X.split(chunks, dim=1)]
        close(torch.cat(steps, dim=1), module(X, mask=ph.causal()))


def test_a_context_is_chosen_from() -> None:
    module = built(select=NEAR)
    context = torch.randn(2, 40, 32, **F64)
    with torch.no_grad():
        whole = module(X, context)
        assert (whole - built()(X, context)).abs().max() > 1e-3
        close(module(X, cache=module.new_context_cache(context, queries=23)), whole)
        cache = module.new_context_cache(context, queries=23)
        with pytest.raises(ConfigError, match="cannot serve queries that stand 22 before their end"):
            module(X[:, :1], cache=cache)


def test_caches_that_forget_are_refused() -> None:
    with pytest.raises(ConfigError, match="cannot serve a cache of the 4 most recent; got Ranked"):
        built(select=NEAR).new_cache(2, window=4)
    module, cache = built(select=NEAR), built().new_cache(2, window=4)
    with torch.no_grad():
        module(X[:, :4], mask=ph.causal(), cache=cache)
        with pytest.raises(ConfigError, match="cannot serve a cache that drops some"):
            module(X[:, 4:9], mask=ph.causal(), cache=cache)


def test_gradients_and_the_compiled_graph() -> None:
    module = built(select=NEAR).float()
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    for length in (9, 17, 23):
        x = X[:, :length].float().requires_grad_()
        ours, theirs = (run(x, mask=ph.causal()) for run in (module, compiled))
        torch.testing.assert_close(theirs, ours)
        grads = [torch.autograd.grad(y.sin().sum(), [x, *module.parameters()]) for y in (ours, theirs)]
        torch.testing.assert_close(grads[1], grads[0])
        assert all(bool(g.abs().max() > 0) for g in grads[0])
    torch._dynamo.reset()


def test_numbers_of_heads_move_with_the_module() -> None:
    own = ph.select(ph.mean_keys(), ph.keep_blocks(torch.tensor([1, 2, 3, 9])), rows=1, cols=4, always=OWN)
    module = built(select=own)
    assert dict(module.named_buffers())["select.tensor0"].tolist() == [1, 2, 3, 9]
    assert "select.tensor0" in module.state_dict()
    config = ph.from_json(ph.to_json(module.config))
    assert config == module.config
    again = config.build(**F64)
    again.load_state_dict(module.state_dict())
    assert torch.equal(again(X, mask=ph.causal()), module(X, mask=ph.causal()))


def test_losses_of_weights_see_what_is_read() -> None:
    module = built(select=NEAR)
    q, rows = module._queries(X, 0), module._rows(X, 0)
    options = {"mask": ph.causal(), "score": None, "scale": None, "select": NEAR}
    weights = module._weights(q, rows, **options)
    assert int((weights > 0).sum(-1).max()) <= 8
    close(weights @ rows[1].repeat_interleave(2, 1), module._mix(q, rows, **options))
    losing = built(select=NEAR, regularizers=(ph.nn.attention_diversification(),)).train()
    losing(X, mask=ph.causal())
    assert ph.nn.auxiliary_losses(losing)


def test_what_is_said_of_it() -> None:
    module = built(select=NEAR)
    assert "selector" in [step.name for step in flow_of(module).joined]
    plain, means = built().cost(64), 2 * 4 * 64 * 16 * 8  # of blocks of four keys, 8 wide
    assert module.cost(64) == dataclasses.replace(plain, scores=plain.scores + means)
    wrong: Selector = ph.mean_keys()  # type: ignore[assignment]
    with pytest.raises(ConfigError, match="select must be a Selector; got MeanKeys"):
        built(select=wrong)
    with pytest.raises(ConfigError, match="select must be None in LatentAttention"):
        el_attention(built("mha", select=NEAR))
