"""The papers that Polyhead is about, and which of them are built.

    from polyhead.papers import paper, papers

    paper("059").title            # "Fast Transformer Decoding: One Write-Head is All You Need"
    paper("multi_query").built_in # ("mechanisms/multi_query.py",)
    sum(p.built for p in papers())

What is known of a paper is packaged data; whether it is built is never written down, but looked up: a
mechanism is built when the registry has it, any other work when its file is there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from importlib import resources
from pathlib import Path

from polyhead.checks import given
from polyhead.errors import UnknownName, unknown_name

__all__ = ["Paper", "built_in", "paper", "papers"]

# Papers that are built as something other than a mechanism, and where in the package.
_ELSEWHERE = {
    "048": ("mechanisms/facets.py",),
    "054": ("nn/head_mask.py",),
    "061": ("attend/normalizers.py", "attend/entmax.py"),
    "062": ("hf/long_heads.py", "nn/long_heads.py"),
    "064": ("attend/selectors/prism.py",),
    "066": ("heads/chai.py", "heads/clustering.py", "heads/head_maps.py", "heads/shared_maps.py"),
    "069": ("intensity.py",),
    "072": ("attend/selectors/rectified.py",),
    "078": ("heads/retrieval.py",),
    "082": ("attend/selectors/triangle_spans.py", "attend/selectors/triangles.py"),
    "085": ("attend/selectors/qada.py", "heads/key_gaussians.py"),
    "099": ("nn/regularizers/token_masking.py",),
    "104": ("mechanisms/multi_head_moe.py",),
    "105": ("cache/duo.py",),
    "107": (
        "attend/selectors/spans.py",
        "cache/spans.py",
        "cache/span_plan.py",
        "cache/span_programme.py",
        "cache/influence.py",
    ),
    "109": ("nn/latent_plan.py",),
    "117": ("attend/selectors/proxy_attn.py",),
    "122": ("attend/selectors/less_is_more.py",),
    "141": ("cache/razor.py",),
    "142": ("heads/measurements/repeats.py",),
    "145": ("attend/selectors/dhsa.py",),
    "150": ("attend/selectors/hisa.py",),
    "160": ("nn/hyper_attention.py",),
    "162": ("heads/measurements/received.py",),
    "163": ("mechanisms/neighborhood_attention.py",),
    "166": ("hf/layer_routing.py", "nn/layer_router.py", "cache/flux.py"),
    "188": ("attend/masks/neighborhood.py", "attend/simulate.py"),
    "195": ("heads/sensitivity.py", "heads/budget.py"),
}

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Paper:
    """One paper.

    Attributes:
        number: its number here, three digits as text: "059".
        name: what its mechanism, measurement or idea is called here: "multi_query".
        aliases: what further parts of it are called here.
        short: what the field calls it: "MQA".
        title: the title of the paper.
        year: when it came out, as a preprint where there was one.
        arxiv: its arXiv number, None where it has none that is certain.
        kind: what it contributes: "mechanism", "analysis", "cache", "theory", ...
        theme: the part of the field that it belongs to.
        code: the authors' repository on GitHub ("owner/name"), None where none is known.
    """

    number: str
    name: str
    aliases: tuple[str, ...]
    short: str
    title: str
    year: int
    arxiv: str | None
    kind: str
    theme: str
    code: str | None

    @property
    def url(self) -> str | None:
        """Where the paper can be read."""
        return f"https://arxiv.org/abs/{self.arxiv}" if self.arxiv else None

    @property
    def built_in(self) -> tuple[str, ...]:
        """The files of the package that build it, relative to the package; empty if it is not built."""
        return built_in(self.number)

    @property
    def built(self) -> bool:
        """Whether anything in the package builds it."""
        return bool(self.built_in)


@cache
def papers() -> tuple[Paper, ...]:
    """Every paper, by number."""
    text = resources.files("polyhead").joinpath("data", "papers.json").read_text(encoding="utf-8")
    return tuple(Paper(**row | {"aliases": tuple(row["aliases"])}) for row in json.loads(text))


def paper(which: str) -> Paper:
    """The paper with this number ("059", "59") or name ("multi_query", "MQA").

    Raises:
        UnknownName: no paper has it; the message suggests the nearest names.
    """
    if not isinstance(which, str):
        raise UnknownName(f"papers are called by number or name, such as '059' or 'MQA'; got {given(which)}")
    wanted = which.strip().lower()
    for one in papers():
        if wanted in (one.name, *one.aliases) or wanted.zfill(3) == one.number:
            return one
    for one in papers():  # after all of ours, because the field gives some names twice (MoA)
        if wanted == one.short.lower():
            return one
    raise unknown_name("paper", which, (one.name for one in papers()))


def built_in(number: str) -> tuple[str, ...]:
    """The files, relative to the package, in which the paper with this number is built now."""
    return tuple(dict.fromkeys(_files(number)))


def _files(number: str) -> Iterator[str]:
    from polyhead.mechanisms import registry

    for entry in registry.catalog():
        if entry.paper == number:
            yield entry.file
    for file in _ELSEWHERE.get(number, ()):
        if (_PACKAGE / file).is_file():
            yield file
