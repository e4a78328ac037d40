"""Combiner: every token is read, by itself or in the block that it is in, and a block as one.

    A(i) = Σ_{j in Ω⁰_i} p(j|i) v_j + Σ_r p(Ω^r|i) u_r,    u_r = Σ_{j in Ω^r} p(j|Ω^r) v_j
    p(·|i) = softmax over {q_i·k_j / √D for j in Ω⁰_i} and {q_i·K_r / √D for the blocks Ω^r_i}
    p(j|Ω^r) = softmax_{j in Ω^r}(Q_r·k_j / √D),    K_r = pool(k_j),  Q_r = pool(q_j),  j in Ω^r

Attention is an expectation over tokens; of a block's part the expectation given the block is taken, as a
query that stands for the block sees it. The weight of j in a block is p(Ω^r|i) p(j|Ω^r), which is never zero.

    combiner             Ω⁰: the own segment of C tokens, up to i.  Ω^r: every earlier segment; without a mask
                         every other one.
    combiner_logsparse   Ω⁰: i alone.  Ω^r: of the tokens before i as many blocks as i has binary ones, the
                         largest first, each of a power of two tokens.
    combiner_axial       Rows of C tokens one below the other. Ω⁰: the own row up to i, and what is above i in
                         its column.  Ω^r: what is above the own row in every other column.

q: (B, H, L, D); k, v: (B, G, L, D), read by H/G heads each; positions are turned before keys and queries are
pooled. One segment, and segments of one token, are `mha`, and so are rows of one token; every mechanism here
takes its weights over. A block weighs as one token; `log_size=True` adds the logarithm of its tokens to its
score, and what is alike within blocks is then read as full attention reads it.

Cost: parameters of grouped-query attention. Pairs that are read: L·(C + L/C) with segments and with rows,
least for C = √L, which is for the caller to choose; L·log₂L with powers of two, and as many to sum up. `cost`
counts all pairs of tokens with segments, as it does with masks, and otherwise what is computed. A cache of
segments holds the rows of the own one, and for each before it, which is summed up once, a key and a value of
every query head. The others hold queries, keys and values of all tokens, and a step sums up what it reads
anew, about the work of a step of attention: what lies above is another block in every row.

Paper 013: Combiner: Full Attention Transformer with Sparse Computation Cost, arXiv 2107.05768. Our readings:
the pool is the largest feature by default, or the mean; "relu" and layers before pooling are left out. The
segments are counted from the first token of a row, padding or not; padding is in no block. Without a mask the
own segment is read token by token alone, where the official code reads its summary too. Of its axial forms
the first of the paper is here, with one block for every column, where the code has several. Masks other than
the causal one are refused, and so is a context; powers of two and rows take the causal mask only.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from polyhead.checks import flag, given, whole
from polyhead.errors import ConfigError
from polyhead.mechanisms.facets import Facets
from polyhead.mechanisms.own_scores import OwnScoresConfig
from polyhead.mechanisms.promises import Promises
from polyhead.mechanisms.registry import register
from polyhead.nn.block_summaries import GuidedByPool
from polyhead.nn.prefix_blocks import ColumnsAttention, DyadicAttention
from polyhead.nn.summarised import SummarisedAttention

__all__ = ["Combiner", "CombinerAxial", "CombinerLogsparse"]

_TITLE = "Combiner: Full Attention Transformer with Sparse Computation Cost"
_SUM = "A_i = Σ_{Ω⁰} p(j|i) v_j + Σ_r p(Ω^r|i) Σ_{j in Ω^r} softmax_j(Q_r·k_j / √D) v_j"


class SegmentsAttention(SummarisedAttention):
    """Attention to the own segment, and to the summaries of others."""

    called = "combiner"


class _CombinerConfig(OwnScoresConfig):
    pool: str = "max"
    log_size: bool = False

    def __post_init__(self) -> None:
        if self.pool not in ("max", "mean"):
            raise ConfigError(f'pool must be "max" or "mean"; got {given(self.pool)}')
        flag("log_size", self.log_size)
        super().__post_init__()


@register(
    "combiner",
    aliases=("combiner_fixed",),
    paper="013",
    title=_TITLE,
    family="hierarchical",
    summary="the own segment is read token by token, every other one by one expectation of its values",
    equation=_SUM + ";  Ω⁰ the own segment, Ω^r the others",
    supports=frozenset({"self", "causal_self"}),
    facets=Facets(levels="multi"),
    promises=Promises(any_mask=False),
)
class Combiner(_CombinerConfig):
    """Combiner with segments; further options are those of `OwnScoresConfig`.

    Attributes:
        segment: C, tokens of a segment.
        pool: what stands for the keys and the queries of a segment, "max" or "mean".
        log_size: add the logarithm of a segment's real tokens to the score of its summary.
    """

    segment: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "segment", whole("segment", self.segment, 1))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> SegmentsAttention:
        """The module."""
        module = partial(
            SegmentsAttention,
            size=self.segment,
            near=1,
            summary=GuidedByPool(self.pool),
            log_size=self.log_size,
        )
        return self.assemble(module, device=device, dtype=dtype)


@register(
    "combiner_logsparse",
    paper="013",
    title=_TITLE,
    family="hierarchical",
    summary="all tokens before a query are read in blocks of powers of two, an expectation of values each",
    equation=_SUM + ";  Ω⁰ = {i}, Ω^r the binary digits of i",
    supports=frozenset({"causal_self"}),
    facets=Facets(levels="multi"),
    promises=Promises(any_mask=False),
)
class CombinerLogsparse(_CombinerConfig):
    """Combiner with blocks of powers of two; further options are those of `OwnScoresConfig`.

    Attributes:
        pool: what stands for the keys and the queries of a block, "max" or "mean".
        log_size: add the logarithm of a block's real tokens to the score of its summary.
    """

    def build(self, *, device: Any = None, dtype: Any = None) -> DyadicAttention:
        """The module."""
        module = partial(DyadicAttention, summary=GuidedByPool(self.pool), log_size=self.log_size)
        return self.assemble(module, device=device, dtype=dtype)


@register(
    "combiner_axial",
    paper="013",
    title=_TITLE,
    family="hierarchical",
    summary="of rows of tokens the own row and column are read, and one expectation of each other column",
    equation=_SUM + ";  Ω⁰ row and column, Ω^r the other columns above",
    supports=frozenset({"causal_self"}),
    facets=Facets(levels="multi"),
    promises=Promises(any_mask=False),
)
class CombinerAxial(_CombinerConfig):
    """Combiner with rows and columns; further options are those of `OwnScoresConfig`.

    Attributes:
        row: C, tokens of a row.
        pool: what stands for the keys and the queries of a column, "max" or "mean".
        log_size: add the logarithm of a column's real tokens to the score of its summary.
    """

    row: int = 64

    def __post_init__(self) -> None:
        object.__setattr__(self, "row", whole("row", self.row, 1))
        super().__post_init__()

    def build(self, *, device: Any = None, dtype: Any = None) -> ColumnsAttention:
        """The module."""
        module = partial(ColumnsAttention, row=self.row, pool=self.pool, log_size=self.log_size)
        return self.assemble(module, device=device, dtype=dtype)
