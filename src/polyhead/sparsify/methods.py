"""Selectors that need no training, by name, each with one level of 0 to 1 that says how much it reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from polyhead.attend import selectors as s
from polyhead.attend.masks import sink, window
from polyhead.checks import given
from polyhead.errors import ConfigError, unknown_name
from polyhead.hf.long_heads import LongHeads
from polyhead.hf.selecting import LayerSelectors
from polyhead.own_file import digest, run
from polyhead.sparsify.reading import Case, Chunks, Reader, Selected

__all__ = ["METHODS", "Make", "Method", "find", "key"]

Make = Callable[[float, Case], LayerSelectors | Reader]

_ROWS, _COLS = 128, 64
_SAMPLED = 16  # queries of which one is sampled
_CHUNKS = 16  # of 256 tokens each in the paper of long_heads
_LEAST_TAU = 1e-12
_ALWAYS = sink(1) | window(_COLS - 1)


@dataclass(frozen=True)
class Method:
    """A way to choose what is read.

    Attributes:
        name: what it is called by, and in tables.
        summary: what it reads, in a line.
        paper: where it comes from.
        make: of a level, above 0 and at most 1, and a `Case`: the selectors, for all layers or by layer as
            `ph.sparse` takes them, or a `Reader` of its own. The higher the level, the more is read. Of the
            case a method takes what it needs: the number of tokens, for counts; layers; the model.
        oracle: whether it takes dense attention to know what to read, so that it saves nothing.
    """

    name: str
    summary: str
    paper: str
    make: Make
    oracle: bool = False

    def reader(self, level: float, case: Case) -> Reader:
        """How a model reads at a level; for one text after another."""
        made = self.make(level, case)
        return made if isinstance(made, Reader) else Selected(made, case.layers)


def _ranked(scorer: s.Scorer, budget: Callable[[float], s.Budget]) -> Make:
    def make(level: float, case: Case) -> LayerSelectors:
        return s.select(scorer, budget(level), rows=_ROWS, cols=_COLS, always=_ALWAYS)

    return make


def _sampled_mass(level: float, case: Case) -> LayerSelectors:
    # longer blocks of queries, of which few are sampled, for many keys in shorter blocks
    scorer, cols = s.sampled_mass(_SAMPLED, keys=2, power=2), _COLS // 2
    nearest = sink(1) | window(cols - 1)
    return s.select(scorer, s.keep_mass(level), rows=16 * _SAMPLED, cols=cols, always=nearest)


def _mean_mass(level: float, case: Case) -> LayerSelectors:
    # a score takes little, so that blocks may be smaller than those of the others
    return s.select(s.mean_mass(16, 16), s.keep_mass(level), rows=_ROWS // 2, cols=_COLS // 2, always=_ALWAYS)


def _prism(level: float, case: Case) -> LayerSelectors:
    return s.prism(level, rows=_ROWS, cols=_COLS)


def _proxy(level: float, case: Case) -> LayerSelectors:
    return s.proxy_attn(level, least=_COLS, rows=_ROWS, cols=_COLS)


def _vertical_slash(level: float, case: Case) -> LayerSelectors:
    # one column for six diagonals, as the defaults of the paper have it
    columns, diagonals = (max(1, round(level * case.tokens * part)) for part in (1 / 6, 1))
    return s.vertical_slash(columns, diagonals, first=4, nearest=_COLS, rows=_ROWS, cols=16)


def _a_shape(level: float, case: Case) -> LayerSelectors:
    return s.a_shape(1, max(1, round(level * case.tokens)), rows=_ROWS, cols=_COLS)


def _hisa(level: float, case: Case) -> LayerSelectors:
    keep = max(1, round(level * case.tokens))
    return s.hisa(keep, max(2, -(-2 * keep // _COLS)), _COLS)  # searched are twice as many keys as are read


def _dhsa(level: float, case: Case) -> LayerSelectors:
    return s.dhsa(max(_COLS, round(level * case.tokens)), local=_COLS, rows=_COLS)


def _qada(level: float, case: Case) -> LayerSelectors:
    # every query decides for itself, as in the paper: of a block, one query that wants all would decide
    tau = _LEAST_TAU ** (1 - level)  # far mass is taken much too large, so that useful shares span decades
    return s.qada(tau, first=16, nearest=max(_COLS, case.tokens // 32), cols=_COLS)


def _less_is_more(level: float, case: Case) -> LayerSelectors:
    layers, keep = len(case.layers), max(1, round(level * case.tokens))
    at = (2, 9) if layers > 10 else (min(2, max(0, layers - 2)),)
    return s.less_is_more(layers, keep, at=at)


def _triangle_spans(level: float, case: Case) -> LayerSelectors:
    part = max(1, round(level * case.tokens / 2))  # as many tokens of spans as of the nearest
    return s.triangle_spans(part, window=max(2 * _COLS, part), chunk=_COLS)


def _long_heads(level: float, case: Case) -> Reader:
    window = max(1, round(level * case.tokens / _CHUNKS))
    return Chunks(LongHeads.of(case.model, window=window, length=_CHUNKS * window))


def _rectified(level: float, case: Case) -> LayerSelectors:
    own = s.select(s.mean_keys(), s.keep_mass(level), rows=_ROWS, cols=_COLS, always=_ALWAYS)
    return s.rectified(own, apart=_ALWAYS)


METHODS = {
    method.name: method
    for method in (
        Method("a_shape", "the first block and the nearest ones, whatever they hold", "2407.02490", _a_shape),
        Method(
            "mean_keys",
            "blocks by the product of mean query and mean key, a share of them (as MoBA ranks them)",
            "063",
            _ranked(s.mean_keys(), s.keep_share),
        ),
        Method(
            "mean_keys_mass",
            "the same until the blocks are taken to hold so much of the mass",
            "063",
            _ranked(s.mean_keys(), s.keep_mass),
        ),
        Method(
            "key_bounds",
            "blocks by the most that a key within their bounds could score, a share of them (Quest)",
            "2406.10774",
            _ranked(s.key_bounds(), s.keep_share),
        ),
        Method(
            "sampled_mass",
            "blocks by their mass for one query of 16, over every second key, until they hold so much of it",
            "2503.16428",
            _sampled_mass,
        ),
        Method(
            "mean_mass",
            "smaller blocks by their mass by means of 16 queries and 16 keys, until they hold so much",
            "",
            _mean_mass,
        ),
        Method(
            "prism", "means in fast and in slow features of rotary positions, each by mass", "064", _prism
        ),
        Method(
            "proxy_attn", "one mean head ranks for all, each reads what its last queries need", "117", _proxy
        ),
        Method(
            "vertical_slash",
            "columns and diagonals that the last queries look at",
            "2407.02490",
            _vertical_slash,
        ),
        Method("hisa", "the best single keys of the best blocks by mean queries and keys", "150", _hisa),
        Method("dhsa", "single keys by the mean key of their 32, for all heads", "145", _dhsa),
        Method(
            "qada", "near keys, or all where near ones are not taken to hold enough of the mass", "085", _qada
        ),
        Method(
            "less_is_more",
            "single keys that heads name in turns, for later layers; layers 0 to 2 and 9 read everything",
            "122",
            _less_is_more,
        ),
        Method(
            "triangle_spans",
            "the nearest tokens, and as many of spans whose tokens look at each other, by one vector a span",
            "082",
            _triangle_spans,
        ),
        Method(
            "long_heads",
            "16 chunks of each head's choice, moved next to each other, at positions below their length",
            "062",
            _long_heads,
        ),
        Method(
            "rectified",
            "blocks by the product of means until they hold so much, means standing for those that it trusts",
            "072",
            _rectified,
        ),
        Method(
            "block_oracle",
            "blocks by their true mass, which takes dense attention to know: what blocks could do at best",
            "",
            _ranked(s.sampled_mass(1), s.keep_mass),
            oracle=True,
        ),
    )
}
"""The methods that come with Polyhead."""


def find(name: str) -> Method:
    """A method by name, or the one that a Python file defines as `METHOD`.

    Raises:
        UnknownName: no method is called so.
        ConfigError: a file that cannot be run, or that defines no method.
    """
    if _is_file(name):
        return _from_file(Path(name).expanduser())
    if name not in METHODS:
        raise unknown_name("method", name, METHODS)
    return METHODS[name]


def key(name: str) -> str:
    """What the results of a method are kept under: its name, or of a file the stem and what it says now.

    Raises:
        ConfigError: a file that cannot be read, or is no Python.
    """
    if not _is_file(name):
        return name
    file = Path(name).expanduser()
    return f"{file.stem}.{digest(file, what='methods')}"


def _is_file(name: str) -> bool:
    return isinstance(name, str) and name.endswith(".py")


def _from_file(file: Path) -> Method:
    module = run(file, kind="method", what="methods")
    found = getattr(module, "METHOD", None)
    if not isinstance(found, Method):
        raise ConfigError(
            f"methods: {file} must define METHOD, a polyhead.sparsify.methods.Method; got {given(found)}"
        )
    return found
