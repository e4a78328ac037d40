"""Attention in near-linear time: keys that are like the query exactly, all others from a sample."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, overload

import torch
from jaxtyping import Float
from torch import Tensor

from polyhead.attend import attend
from polyhead.attend.masks import Mask, causal, chosen, where
from polyhead.checks import flag, whole
from polyhead.errors import ConfigError, ShapeError
from polyhead.nn.merged_softmax import merged

__all__ = ["angular_buckets", "hyper_attention"]

_WIDEST = 16  # bits of a bucket

Part = tuple[Tensor, Tensor]  # output and log-sum-exp


@overload
def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bits: int = 7,
    block: int = 256,
    samples: int = 256,
    least: int = 4096,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def hyper_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    bits: int = 7,
    block: int = 256,
    samples: int = 256,
    least: int = 4096,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def hyper_attention(
    q: Float[Tensor, "B H L D"],
    k: Float[Tensor, "B G S D"],
    v: Float[Tensor, "B G S Dv"],
    *,
    causal: bool = False,
    bits: int = 7,
    block: int = 256,
    samples: int = 256,
    least: int = 4096,
    scale: float | None = None,
    generator: torch.Generator | None = None,
    return_lse: bool = False,
) -> Float[Tensor, "B H L Dv"] | tuple[Float[Tensor, "B H L Dv"], Float[Tensor, "B H L"]]:
    """An estimate of softmax attention from one block of like keys and a sample of all others.

        keys, sorted by their bucket (`angular_buckets`), are cut into blocks; query i has a block N(i)
        Z_i   = Σ over j in N(i) of exp(s_ij)  +  (S / samples) · Σ over drawn j not in N(i) of exp(s_ij)
        out_i = the same sums with v_j,  over Z_i                                 s_ij = scale · q_i·k_j

    Keys are drawn uniformly, with replacement, so Z_i is right in the mean; out_i, a quotient, nearly.
    Without causality queries are sorted by their buckets too, and the n-th part of them has the n-th block.
    Under a causal mask the past is halved again and again: second halves read first halves this way, and
    what is no longer than `least` is exact. There a query has the block in which the keys of its bucket have
    their middle, so that no later query moves it. Query heads of a group sort and draw keys once.

    O(L · (block + samples) · D) products besides hashing, times log(L / least) if causal; memory grows with
    L. What is drawn depends on the generator and on lengths, and not on what later tokens hold. Gradients
    flow through the keys that are read. Neither padding nor other masks.

        def own(call):
            return ph.hyper_attention(call.q, call.k, call.v, causal=True, scale=call.scale)

        with ph.attach(model, handler=own):

    runs a pretrained decoder this way; steps of decoding, shorter than `least`, are exact.

    Han et al., "HyperAttention: Long-context Attention in Near-Linear Time" (paper 160, arXiv 2310.05869).
    The official code sorts the queries of a second half too, by which later queries have a part in earlier
    outputs; and its order of buckets is the inverse of the one in which neighbours differ in one bit. It pads
    the last block with zero keys that get weight; here the last block is shorter. The paper's sampling by the
    norms of values is in neither.

    Args:
        q, k, v: as in `attend`; queries are the last L of the S tokens if causal.
        causal: whether a query reads its past alone.
        bits: hyperplanes, 2^bits buckets; 1 to 16.
        block: keys of a block.
        samples: keys that are drawn; 0 for none: like keys alone.
        least: calls on fewer queries, causal ones on no more, are exact, as are those on one block of keys.
        scale: factor of q·k. Default 1/sqrt(D).
        generator: of hyperplanes and samples; None: torch's default one.
        return_lse: also return log Z.

    Raises:
        ConfigError: a number is not allowed.
        ShapeError: causal with more queries than keys.
    """
    flag("hyper_attention: causal", causal)
    flag("hyper_attention: return_lse", return_lse)
    for name, value, low in (
        ("bits", bits, 1),
        ("block", block, 1),
        ("samples", samples, 0),
        ("least", least, 1),
    ):
        whole(f"hyper_attention: {name}", value, low)
    if bits > _WIDEST:
        raise ConfigError(f"hyper_attention: bits must be at most {_WIDEST}; got {bits}")
    if causal and q.shape[2] > k.shape[2]:
        raise ShapeError(
            f"hyper_attention: causal queries are the last of the {k.shape[2]} keys; got {q.shape[2]} queries"
        )
    device = q.device if generator is None else generator.device
    planes = torch.randn(q.shape[3], bits, generator=generator, device=device).to(q.device)
    own = _Hyper(planes, block, samples, least, scale, generator)
    out, lse = own.past(q, k, v) if causal else own.all(q, k, v, ranked=True)
    return (out, lse) if return_lse else out


def angular_buckets(x: Float[Tensor, "*n D"], planes: Float[Tensor, "D bits"]) -> Tensor:
    """The bucket of each vector by the sides of hyperplanes that it is on, integers of the leading shape.

    The signs of x·planes are read as a Gray code, so that neighbouring buckets differ in one sign.
    """
    wide = torch.promote_types(x.dtype, torch.float32)
    sides = (x.detach().to(wide) @ planes.to(wide) > 0).long()
    bucket = (sides << torch.arange(sides.shape[-1], device=x.device)).sum(-1)
    for shift in (1, 2, 4, 8):
        bucket = bucket ^ (bucket >> shift)
    return bucket


@dataclass(frozen=True)
class _Hyper:
    planes: Tensor
    block: int
    samples: int
    least: int
    scale: float | None
    generator: torch.Generator | None

    def past(self, q: Tensor, k: Tensor, v: Tensor) -> Part:
        """Causal attention of the last of the tokens."""
        queries, tokens = q.shape[2], k.shape[2]
        if queries <= self.least:
            return self._exact(q, k, v, causal())
        before = tokens - queries
        if before:
            own = self.past(q, k[:, :, before:], v[:, :, before:])
            return _joined(own, self.all(q, k[:, :, :before], v[:, :, :before]))
        half = (queries + 1) // 2
        (q0, q1), (k0, k1), (v0, v1) = ((x[:, :, :half], x[:, :, half:]) for x in (q, k, v))
        first, second = self.past(q0, k0, v0), self.past(q1, k1, v1)
        second = _joined(second, self.all(q1, k0, v0))
        return torch.cat([first[0], second[0]], 2), torch.cat([first[1], second[1]], 2)

    def all(self, q: Tensor, k: Tensor, v: Tensor, ranked: bool = False) -> Part:
        """Attention of all queries to all keys. ranked: queries have blocks by their order, not by places."""
        queries, keys = q.shape[2], k.shape[2]
        if queries < self.least or keys <= self.block:
            return self._exact(q, k, v)
        buckets, order = angular_buckets(k, self.planes).sort(dim=-1, stable=True)
        k, v = (x.take_along_dim(order[..., None], 2) for x in (k, v))
        asked = angular_buckets(q, self.planes)
        blocks = -(-keys // self.block)
        if ranked:
            own = asked.argsort(dim=-1, stable=True).argsort(-1) // -(-queries // blocks)
        else:
            known = buckets.repeat_interleave(q.shape[1] // k.shape[1], 1).contiguous()
            ends = [torch.searchsorted(known, asked, right=right) for right in (False, True)]
            own = ((ends[0] + ends[1]) // 2).clamp(max=keys - 1) // self.block
        like = self._exact(q, k, v, chosen(own[..., None], rows=1, cols=self.block, first=keys - queries))
        return _joined(like, self._sampled(q, k, v, own)) if self.samples else like

    def _sampled(self, q: Tensor, k: Tensor, v: Tensor, own: Tensor) -> Part:
        """What is not in the query's own block of sorted keys, from a sample."""
        size, keys, device = (*k.shape[:2], self.samples), k.shape[2], k.device
        at = torch.randint(
            keys,
            size,
            generator=self.generator,
            device=device if self.generator is None else self.generator.device,
        ).to(device)
        of = at // self.block
        group, first = q.shape[1] // k.shape[1], self.samples - q.shape[2]
        k, v = (x.take_along_dim(at[..., None], 2) for x in (k, v))
        elsewhere = where(lambda b, h, i, j: of[b, h // group, j] != own[b, h, i - first])
        out, lse = self._exact(q, k, v, elsewhere)
        return out, lse + math.log(keys / self.samples)

    def _exact(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None = None) -> Part:
        return attend(q, k, v, mask=mask, scale=self.scale, return_lse=True)


def _joined(one: Part, other: Part) -> Part:
    (y, lse), (z, more) = one, other
    return merged((y, z), (lse, more)), torch.logaddexp(lse, more)
