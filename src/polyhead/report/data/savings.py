"""What a report says of smaller caches: what each that was tried cost, and which one is recommended."""

from __future__ import annotations

from dataclasses import dataclass

from polyhead.report.data.fields import check, number

__all__ = ["Point", "Recommendation", "Savings"]


@dataclass(frozen=True)
class Point:
    """One way to choose KV heads, one size, and what came of it.

    Attributes:
        policy: `full` (the untouched model), `random`, or the name of another way to choose, such as `both
            scores`.
        kv_fraction: share of KV heads that keep the full context, 0 to 1.
        heads_kept: their number.
        seed: for policies that draw; None otherwise.
        needle_accuracy: share of hidden facts that the model finds again, 0 to 1.
        needles: how many were hidden.
        perplexity: of held-out text.
        cache_bytes: pairs (context length, bytes held by the KV cache).
        decode_tokens_per_second: at the context length that `Savings.decode_how` names.
        heads: the KV heads kept, pairs (layer, KV head); may be empty where they are not told.
        needles_whole: how many of the hidden facts the model finds with its whole cache.
        needles_kept: how many of these it finds with this cache too.
    """

    policy: str
    kv_fraction: float
    heads_kept: int
    seed: int | None = None
    needle_accuracy: float | None = None
    needles: int = 0
    perplexity: float | None = None
    cache_bytes: tuple[tuple[int, int], ...] = ()
    decode_tokens_per_second: float | None = None
    heads: tuple[tuple[int, int], ...] = ()
    needles_whole: int | None = None
    needles_kept: int | None = None

    def __post_init__(self) -> None:
        check(0 <= self.kv_fraction <= 1, f"kv_fraction must lie in 0..1, got {self.kv_fraction}")
        for name in ("kv_fraction", "needle_accuracy", "perplexity", "decode_tokens_per_second"):
            object.__setattr__(self, name, number(getattr(self, name)))

    @property
    def share_kept(self) -> float | None:
        """Of the facts that the model finds with its whole cache, the share found with this one too."""
        if self.needles_kept is None or not self.needles_whole:
            return None
        return self.needles_kept / self.needles_whole


@dataclass(frozen=True)
class Savings:
    """What a smaller cache costs: the untouched model, and points for every choice and size that was tried.

    The three `..._how` say in a sentence each on what the numbers were measured. `verdict` says why no
    smaller cache is recommended, where none is, and `python` are lines that make the cache of any point.
    """

    baseline: Point
    points: tuple[Point, ...]
    needle_how: str = ""
    perplexity_how: str = ""
    decode_how: str = ""
    verdict: str = ""
    python: str = ""

    def policies(self) -> list[str]:
        """The policies among the points, in order of appearance, `random` last."""
        names = dict.fromkeys(p.policy for p in self.points)
        return [n for n in names if n != "random"] + ["random"] * ("random" in names)


@dataclass(frozen=True)
class Recommendation:
    """The smallest cache whose answers hold.

    Attributes:
        before: the untouched model, measured as `after` was.
        after: the recommended choice; preferably on texts, needles and seeds not used to choose it.
        why: one or two sentences.
        python: the lines that apply it.
        how: on what `before` and `after` were measured.
        chance: as many heads chosen at random, on some of the same facts.
    """

    before: Point
    after: Point
    why: str
    python: str
    how: str = ""
    chance: tuple[Point, ...] = ()
