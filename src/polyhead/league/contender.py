"""Who takes part: a mechanism, or several that take turns, with options: `moh:top_k=2`, `mha+static`."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from typing import Any

from polyhead.attend.masks import (
    blocks,
    causal,
    dilated,
    halo,
    lattice,
    neighborhood,
    prefix,
    shard,
    sink,
    strided,
    window,
)
from polyhead.attend.normalizers import entmax, sigmoid, softmax, sparsemax
from polyhead.attend.scores import alibi, relative_bias, soft_cap, t5_bias, temperature
from polyhead.attend.selectors import (
    keep_above,
    keep_blocks,
    keep_mass,
    keep_share,
    keep_total,
    key_bounds,
    mean_keys,
    mean_mass,
    sampled_mass,
    select,
    shared,
)
from polyhead.attend.top_k import top_k
from polyhead.checks import given, several
from polyhead.description import Part
from polyhead.errors import ConfigError, unknown_name
from polyhead.mechanisms import entry
from polyhead.nn.positions import alibi_position, no_position, rope, sinusoidal
from polyhead.nn.regularizers import attention_diversification, drop_head, shifted_groups, token_masking

__all__ = ["Contender", "contender"]

# what makes a description that a line of text can name
MAKERS: dict[str, Any] = {
    maker.__name__: maker
    for maker in (
        *(blocks, causal, dilated, halo, lattice, neighborhood, prefix, shard, sink, strided, window),
        *(entmax, sigmoid, softmax, sparsemax, top_k),
        *(alibi, relative_bias, soft_cap, t5_bias, temperature),
        *(select, mean_keys, mean_mass, key_bounds, sampled_mass, shared),
        *(keep_above, keep_blocks, keep_mass, keep_share, keep_total),
        *(alibi_position, no_position, rope, sinusoidal),
        *(attention_diversification, drop_head, shifted_groups, token_masking),
    )
}


class Contender(Part):
    """A mechanism, or several, of which the layers are taken in turn.

    Attributes:
        label: what it is called in the table.
        names: of the mechanisms.
        options: for each of them, pairs of option and value.
    """

    label: str
    names: tuple[str, ...]
    options: tuple[tuple[tuple[str, Any], ...], ...]

    def __post_init__(self) -> None:
        if not isinstance(self.label, str):
            raise ConfigError(f"label must be a text; got {given(self.label)}")
        if not several(self.names) or not self.names:
            raise ConfigError(
                f"{self.label}: names must be of mechanisms, at least one; got {given(self.names)}"
            )
        if not several(self.options) or len(self.options) != len(self.names):
            raise ConfigError(
                f"{self.label}: options must be pairs for each of the {len(self.names)} mechanism(s), () for "
                f"none; got {given(self.options)}"
            )


def contender(text: str) -> Contender:
    """Who takes part, read from a line of text.

    Args:
        text: the name of a mechanism, with options behind a colon: `moh`, `moh:top_k=2,qk_norm=True`,
            `mha:mask=window(16)`; or several with + between them, `mha+static`, for layers in turn. A value
            is a Python literal, a word (taken as a string) or a description that `polyhead` makes, such as
            `window(16)` or `entmax(1.5)`. Options that are left out have their defaults.

    Raises:
        UnknownName: no such mechanism.
        ConfigError: what cannot be read.
    """
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(
            f"a contender is the name of a mechanism with options, such as moh:top_k=2; got {given(text)}"
        )
    names, options = [], []
    for part in _split(text, "+"):
        name, colon, said = part.partition(":")
        names.append(entry(name.strip()).name)
        if colon and not said.strip():
            raise ConfigError(f"{text}: options such as top_k=2 must follow the colon")
        own = tuple(_options(text, said)) if colon else ()
        twice = [option for n, (option, _) in enumerate(own) if option in dict(own[:n])]
        if twice:
            raise ConfigError(f"{text}: {twice[0]} is given more than once")
        options.append(own)
    return Contender(text.strip(), tuple(names), tuple(options))


def _options(text: str, said: str) -> Iterator[tuple[str, Any]]:
    for pair in _split(said, ","):
        name, equals, value = pair.partition("=")
        if not equals or not name.strip().isidentifier() or not value.strip():
            raise ConfigError(f"{text}: options are name=value with commas between them; got {pair!r}")
        yield name.strip(), _value(text, value.strip())


def _split(text: str, at: str) -> list[str]:
    """Parts between separators that stand in no bracket and no quotation."""
    parts, depth, start, quote = [], 0, 0, ""
    for n, letter in enumerate(text):
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == at and depth == 0:
            parts.append(text[start:n])
            start = n + 1
    return [*parts, text[start:]]


def _value(text: str, said: str) -> Any:
    try:
        tree = ast.parse(said, mode="eval").body
    except (SyntaxError, ValueError, MemoryError, RecursionError):  # too deep, or with null bytes
        raise ConfigError(f"{text}: {said!r} cannot be read; write a number, a word, or window(16)") from None
    return _made(text, tree)


def _made(text: str, tree: ast.expr) -> Any:
    if isinstance(tree, ast.Name):
        return tree.id
    if isinstance(tree, ast.Tuple | ast.List):
        return tuple(_made(text, one) for one in tree.elts)
    if isinstance(tree, ast.BinOp) and isinstance(tree.op, ast.BitAnd | ast.BitOr):
        left, right = _made(text, tree.left), _made(text, tree.right)
        try:
            return left & right if isinstance(tree.op, ast.BitAnd) else left | right
        except TypeError:
            raise ConfigError(f"{text}: & and | join masks; got {ast.unparse(tree)}") from None
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
        maker = MAKERS.get(tree.func.id)
        if maker is None:
            raise unknown_name("description", tree.func.id, MAKERS)
        given_in = [_made(text, one) for one in tree.args]
        named = {one.arg: _made(text, one.value) for one in tree.keywords if one.arg is not None}
        try:
            return maker(*given_in, **named)
        except TypeError as error:
            raise ConfigError(f"{text}: {ast.unparse(tree)}: {error}") from None
    try:
        return ast.literal_eval(tree)
    except (ValueError, TypeError):  # a key that cannot be hashed
        raise ConfigError(f"{text}: {ast.unparse(tree)!r} cannot be read as a value") from None
