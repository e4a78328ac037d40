"""Where the keys of a call are cut into chunks of different lengths.

A chunk begins where what the later queries see on one side differs from what they see on the other: told from
the attention itself (`attention_chunks`), or by a small network from the keys (`learned_chunks`), which has
the first for a teacher.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from polyhead.attend.masks import Mask
from polyhead.attend.selectors.grid import Grid
from polyhead.attend.selectors.visible import real_keys, seen_pairs
from polyhead.checks import floating, given, number, whole
from polyhead.description import Part
from polyhead.errors import ConfigError, ShapeError

__all__ = [
    "AttentionChunks",
    "BoundaryPredictor",
    "Chunks",
    "EvenChunks",
    "LearnedChunks",
    "attention_chunks",
    "boundary_loss",
    "boundary_predictor",
    "boundary_ratio",
    "even_chunks",
    "learned_chunks",
]

_SMALL = 1e-6  # added to both sides of a ratio


class Chunks(Part):
    """Where chunks of keys begin."""

    def starts(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        """Whether a chunk begins at a key, bool `(B or 1, S)`; one begins at the first key in any case."""
        raise NotImplementedError

    def most(self, keys: int) -> int:
        """The largest number of chunks of so many keys."""
        raise NotImplementedError

    def flops(self, grid: Grid, width: int) -> int:
        """Operations of the matrix products that find the boundaries."""
        return 0


class EvenChunks(Chunks):
    """Chunks of one length."""

    size: int

    def __post_init__(self) -> None:
        whole("even_chunks: size", self.size, 1)

    def starts(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        return (torch.arange(grid.keys, device=q.device) % self.size == 0)[None]

    def most(self, keys: int) -> int:
        return -(-keys // self.size)


def even_chunks(size: int) -> Chunks:
    """Chunks of `size` keys, the last one may be shorter."""
    return EvenChunks(size)


def _best(scores: Tensor, length: int, threshold: float, distance: int) -> Tensor:
    """The boundaries, bool `(B, S)`: best scores first, none nearer than `distance` to one that was taken."""
    left = scores.masked_fill(~(scores > threshold), -math.inf)
    count = scores.shape[1] // length
    found = torch.zeros_like(left, dtype=torch.bool)
    if distance == 1:
        order = left.sort(dim=-1, descending=True, stable=True).indices[:, :count]
        return found.scatter_(1, order, True) & ~left.isneginf()
    places = torch.arange(scores.shape[1], device=scores.device)
    for _ in range(count):
        value, at = left.max(-1, keepdim=True)
        if bool(value.isneginf().all()):
            break
        found |= (places == at) & ~value.isneginf()
        left = left.masked_fill((places - at).abs() < distance, -math.inf)
    return found


def _check(part: AttentionChunks | LearnedChunks, name: str) -> None:
    whole(f"{name}: length", part.length, 1)
    object.__setattr__(part, "threshold", number(f"{name}: threshold", part.threshold))
    whole(f"{name}: distance", part.distance, 1)


class AttentionChunks(Chunks):
    """Chunks by the attention of the call. See `attention_chunks`."""

    length: int = 32
    window: int = 4
    threshold: float = 1.1
    distance: int = 8

    def __post_init__(self) -> None:
        _check(self, "attention_chunks")
        whole("attention_chunks: window", self.window, 1)

    def starts(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        ratio = boundary_ratio(q, k, mask, self.window, scale=grid.scale)
        return _best(ratio, self.length, self.threshold, self.distance)

    def most(self, keys: int) -> int:
        return min(keys, keys // self.length + 1)

    def flops(self, grid: Grid, width: int) -> int:
        return 2 * grid.batch * grid.heads * grid.queries * grid.keys * width


def attention_chunks(
    length: int = 32, *, window: int = 4, threshold: float = 1.1, distance: int = 8
) -> Chunks:
    """Chunks that begin where `boundary_ratio` is largest: they know the attention that they are to save.

    For trying what good boundaries would be worth; it costs dense attention, and only a call on a whole text,
    with as many queries as keys, can be asked.

    Args:
        length: there are at most so many keys to a boundary, in the mean: S/length boundaries.
        window: see `boundary_ratio`.
        threshold: boundaries have a larger ratio.
        distance: keys between two boundaries, at least; 1 for no condition.
    """
    return AttentionChunks(length, window, threshold, distance)


def boundary_ratio(
    q: Tensor, k: Tensor, mask: Mask | None = None, window: int = 4, *, scale: float | None = None
) -> Tensor:
    """How differently later queries look at the w keys before a place and at the w keys from it on: `(B, S)`.

        left[s]  = Σ_{i >= s+w-1} Σ_{j = s-w .. s-1}   A[i, j]        A: causal attention, mean over heads
        right[s] = Σ_{i >= s+w-1} Σ_{j = s .. s+w-1}   A[i, j]
        ratio[s] = (max(left, right) + 1e-6) / (min(left, right) + 1e-6)

    1 at the first and the last 2w tokens, which have too little on one side, and at padding, whose queries do
    not count either. It holds A, L × S numbers.

    Args:
        q, k: `(B, H, S, D)` and `(B, G, S, D)`, of a whole text.
        mask: who may see whom, besides causality; its paddings say which tokens are real.
        window: w.
        scale: of q·k; D^-1/2 by default.

    Raises:
        ShapeError: q, k and mask do not fit together, or are not of a whole text.
    """
    shapes = f"got q {given(q)} and k {given(k)}"
    if not all(isinstance(x, Tensor) and x.ndim == 4 and x.is_floating_point() for x in (q, k)):
        raise ShapeError(f"boundary_ratio: q and k must be tensors (B, H, S, D) and (B, G, S, D); {shapes}")
    batch, heads, queries, width = q.shape
    if k.shape[::3] != (batch, width) or not k.shape[1] or heads % k.shape[1]:
        raise ShapeError(f"boundary_ratio: q and k must agree in B and D, and G must divide H; {shapes}")
    keys = k.shape[2]
    if queries != keys:
        raise ShapeError(
            f"boundary_ratio: it takes as many queries as keys, a whole text; got {queries} and {keys}. "
            "Steps of decoding have learned_chunks or even_chunks"
        )
    whole("boundary_ratio: window", window, 1)
    if mask is not None:
        mask.check(batch=batch, heads=heads, queries=queries, keys=keys, offset=0)
    wide = torch.promote_types(q.dtype, torch.float32)
    grid = Grid(batch, heads, k.shape[1], queries, keys, 1, 1, width**-0.5 if scale is None else scale)
    places = torch.arange(keys, device=q.device)
    real = real_keys(mask, q.device)
    real = torch.ones(1, keys, dtype=torch.bool, device=q.device) if real is None else real
    hidden = (
        ~seen_pairs(mask, grid, 0, queries, places) | (places > places[:, None]) | ~real[:, None, :, None]
    )
    mean = q.new_zeros(batch, queries, keys, dtype=wide)
    for h in range(heads):
        logits = q[:, h].to(wide) @ k[:, h // grid.repeat].to(wide).mT * grid.scale
        own = hidden[:, h if hidden.shape[1] > 1 else 0]
        mean += logits.masked_fill(own, -math.inf).softmax(-1).nan_to_num(0.0)
    below = (mean / heads).flip(1).cumsum(1).flip(1)  # [i, j]: what the queries from i on give to key j
    at = places[2 * window : keys - 2 * window]
    ratio = torch.ones(batch, keys, dtype=wide, device=q.device)
    if len(at):
        row, near = at + window - 1, torch.arange(window, device=q.device)
        left = below[:, row[:, None], at[:, None] - 1 - near].sum(-1)
        right = below[:, row[:, None], at[:, None] + near].sum(-1)
        ratio[:, at] = (torch.maximum(left, right) + _SMALL) / (torch.minimum(left, right) + _SMALL)
    tokens = real.cumsum(-1)
    inside = real & (tokens > 2 * window) & (tokens[:, -1:] - tokens >= 2 * window)
    return ratio.masked_fill(~inside, 1.0)


class BoundaryPredictor(Part):
    """A small network that tells boundaries from keys. See `boundary_predictor`."""

    filters: Tensor
    filter_bias: Tensor
    mix: Tensor
    mix_bias: Tensor
    hidden: Tensor
    hidden_bias: Tensor
    out: Tensor
    out_bias: Tensor

    def __post_init__(self) -> None:
        floating("BoundaryPredictor: filters", self.filters, 2, "(C, w)")
        floating("BoundaryPredictor: mix", self.mix, 2, "(E, C)")
        floating("BoundaryPredictor: hidden", self.hidden, 2, "(E', 4E + 1)")
        channels, width, wide = self.filters.shape[0], self.mix.shape[0], self.hidden.shape[0]
        expected = {
            "filter_bias": (channels,),
            "mix": (width, channels),
            "mix_bias": (width,),
            "hidden": (wide, 4 * width + 1),
            "hidden_bias": (wide,),
            "out": (wide,),
            "out_bias": (),
        }
        for name, shape in expected.items():
            if getattr(self, name).shape != shape:
                raise ConfigError(
                    f"BoundaryPredictor: {name} must be {shape} to fit the others; "
                    f"got {given(getattr(self, name))}"
                )

    @property
    def window(self) -> int:
        """w, tokens that are looked at on either side."""
        return self.filters.shape[1]

    def logits(self, k: Tensor) -> Tensor:
        """`(B, S)` of keys `(B, G, S, D)`, positive where a chunk begins; -inf nearer than w to an end."""
        x = k.to(torch.promote_types(k.dtype, torch.float32)).transpose(2, 3).flatten(1, 2)  # B C S
        if x.shape[1] != len(self.filters):
            raise ShapeError(
                f"the boundary predictor reads {len(self.filters)} features of a token, all heads of keys "
                f"together; the call has {x.shape[1]}"
            )
        own = self.to(x.device, x.dtype)
        w, keys = self.window, x.shape[2]
        if keys < 2 * w:
            return x.new_full((x.shape[0], keys), -math.inf)
        x = F.conv1d(x, own.filters[:, None], own.filter_bias, groups=x.shape[1]).relu().transpose(1, 2)
        x = F.linear(x, own.mix, own.mix_bias).relu()  # [t]: of tokens t to t + w - 1
        left, right = x[:, :-w], x[:, w:]
        cosine = F.cosine_similarity(left, right, dim=-1)[..., None]
        both = torch.cat([left, right, (left - right).abs(), left * right, cosine], -1)
        found = F.linear(both, own.hidden, own.hidden_bias).relu() @ own.out + own.out_bias
        return F.pad(found, (w, w - 1), value=-math.inf)


def boundary_predictor(
    channels: int, *, window: int = 4, width: int = 256, hidden: int = 256
) -> BoundaryPredictor:
    """A small network that tells boundaries from the keys of a layer, with random weights, to be trained.

        e[t]   = ReLU(M · ReLU(depthwise convolution over the keys t .. t+w-1))      shared by both sides
        l, r   = e[s - w], e[s]
        logit  = MLP([l, r, |l - r|, l·r, cos(l, r)])                                one hidden layer

    Its tensors require gradients; `boundary_loss` is what makes them good, and `to_json` keeps them.

    Args:
        channels: features of a token's keys, all heads side by side, G·D.
        window: w, tokens on either side.
        width, hidden: E, and the width of the hidden layer.
    """
    for name, size in (("channels", channels), ("window", window), ("width", width), ("hidden", hidden)):
        whole(f"boundary_predictor: {name}", size, 1)

    def normal(*shape: int, fan: int) -> Tensor:
        return (torch.randn(shape) * (2 / fan) ** 0.5).requires_grad_()

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, requires_grad=True)

    return BoundaryPredictor(
        normal(channels, window, fan=window),
        zeros(channels),
        normal(width, channels, fan=channels),
        zeros(width),
        normal(hidden, 4 * width + 1, fan=4 * width + 1),
        zeros(hidden),
        normal(hidden, fan=hidden),
        zeros(),
    )


def boundary_loss(
    predictor: BoundaryPredictor,
    k: Tensor,
    ratio: Tensor,
    *,
    middle: float = math.log(1.1),
    gamma: float = 2.0,
) -> Tensor:
    """How far a predictor is from its teacher: focal cross-entropy with soft targets.

        t = sigmoid(4 (log ratio - middle)),   p = sigmoid(logit),   loss = mean |t - p|^γ · CE(p, t)

    The mean is over the places that have w keys before and behind them twice. Our readings: the middle of the
    targets lies at the ratio that a boundary must have, and the focal factor is taken from soft targets.

    Args:
        predictor: which is to learn where chunks end.
        k: keys `(B, G, S, D)`.
        ratio: `(B, S)`, of `boundary_ratio`.
        middle: log of the ratio that counts half as a boundary.
        gamma: γ; with 0 it is plain cross-entropy.

    Raises:
        ShapeError: the text has no such place, or `ratio` is of another one.
    """
    edge = 2 * predictor.window
    if k.shape[2] <= 2 * edge:
        raise ShapeError(
            f"boundary_loss: places are learned from that have {edge} keys on either side, more than "
            f"{2 * edge} in all; the text has {k.shape[2]}"
        )
    if ratio.shape != k.shape[::2]:
        raise ShapeError(
            f"boundary_loss: ratio must be (B, S), {tuple(k.shape[::2])} for these keys; got {given(ratio)}"
        )
    logits = predictor.logits(k.detach())[:, edge : k.shape[2] - edge]
    target = torch.sigmoid(4 * (ratio[:, edge : k.shape[2] - edge].to(logits.dtype).log() - middle))
    lost = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    return (lost * (target - logits.sigmoid()).abs() ** gamma).mean()


class LearnedChunks(Chunks):
    """Chunks by a trained network. See `learned_chunks`."""

    predictor: BoundaryPredictor
    length: int = 32
    threshold: float = 0.0
    distance: int = 8

    def __post_init__(self) -> None:
        _check(self, "learned_chunks")
        if not isinstance(self.predictor, BoundaryPredictor):
            raise ConfigError(
                f"learned_chunks: predictor must be a boundary_predictor(...); got {given(self.predictor)}"
            )

    def starts(self, q: Tensor, k: Tensor, mask: Mask | None, grid: Grid) -> Tensor:
        if grid.real is not None:  # what stands at padding must not count
            k = torch.where(grid.real[:, None, :, None], k, 0.0)
        return _best(self.predictor.logits(k), self.length, self.threshold, self.distance)

    def most(self, keys: int) -> int:
        return min(keys, keys // self.length + 1)

    def flops(self, grid: Grid, width: int) -> int:
        own = self.predictor
        numbers = own.filters.numel() + own.mix.numel() + own.hidden.numel() + own.out.numel()
        return 2 * grid.batch * grid.keys * numbers


def learned_chunks(
    predictor: BoundaryPredictor, length: int = 32, *, threshold: float = 0.0, distance: int = 8
) -> Chunks:
    """Chunks that begin where a trained network says so, from the keys as the layer hands them over.

    The paper's network reads keys before rotary positions turn them; here they are turned, and the network
    has to be trained on such.

    Args:
        predictor: `boundary_predictor(...)`, trained.
        length, distance: as in `attention_chunks`.
        threshold: boundaries have a larger logit.
    """
    return LearnedChunks(predictor, length, threshold, distance)
