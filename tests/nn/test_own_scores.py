"""Bodies with scores of their own refuse the parts that they would not use."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

import polyhead as ph
from polyhead.errors import ConfigError
from polyhead.nn import Projection, alibi_position, drop_head, rope
from polyhead.nn.block_summaries import GuidedByPool
from polyhead.nn.hierarchical import HierarchicalAttention
from polyhead.nn.landmarks import LandmarkedAttention
from polyhead.nn.prefix_blocks import ColumnsAttention, DyadicAttention
from polyhead.nn.search_projection import SearchProjection
from polyhead.nn.span_search import SpanRule, SpanSearchAttention
from polyhead.nn.summarised import SummarisedAttention

SUMMARY: dict[str, Any] = {"summary": GuidedByPool("max"), "log_size": False}
BODIES: dict[str, tuple[Any, Any]] = {
    "landmarks": (partial(LandmarkedAttention, block_size=4, top_k=None, reach=None), Projection),
    "hierarchical": (partial(HierarchicalAttention, branch=2, levels=None), Projection),
    "summarised": (partial(SummarisedAttention, size=4, near=1, **SUMMARY), Projection),
    "dyadic": (partial(DyadicAttention, **SUMMARY), Projection),
    "columns": (partial(ColumnsAttention, row=4, pool="max", log_size=False), Projection),
    "span_search": (
        partial(SpanSearchAttention, rule=SpanRule(1, 3.0, 1.0, 0.5, 0.5), top_k=2),
        SearchProjection,
    ),
}
UNUSED: dict[str, Any] = {
    "dropout": 0.5,
    "score": ph.soft_cap(1.0),
    "normalizer": ph.sigmoid(),
    "weight_map": ph.head_mix(torch.eye(2)),
    "mask": ph.window(2),
    "select": ph.select(ph.mean_keys(), ph.keep_blocks(1), rows=1, cols=4),
    "regularizers": drop_head(0.5),
}


def built(body: str, **options: Any) -> Any:
    module, projection = BODIES[body]
    return module(projection(8, 2), **options)


@pytest.mark.parametrize("argument", UNUSED)
@pytest.mark.parametrize("body", BODIES)
def test_what_would_not_be_used_is_refused(body: str, argument: str) -> None:
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{argument}'"):
        built(body, **{argument: UNUSED[argument]})


@pytest.mark.parametrize("body", BODIES)
def test_a_bias_of_scores_is_refused(body: str) -> None:
    with pytest.raises(ConfigError, match=r"position must not be a bias of scores.*Alibi.*rope\(\)"):
        built(body, position=alibi_position())


@pytest.mark.parametrize("body", [name for name in BODIES if name != "summarised"])
def test_positions_and_the_scale_act(body: str) -> None:
    torch.manual_seed(0)
    plain = built(body)
    x = torch.randn(1, 9, 8)
    for options in ({"position": rope()}, {"scale": 1.0}):
        other = built(body, **options)
        other.load_state_dict(plain.state_dict())
        apart = (other(x, mask=ph.causal()) - plain(x, mask=ph.causal())).abs().max()
        assert apart > 1e-4, options
