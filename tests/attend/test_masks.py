"""Masks pair by pair: against loops that spell the definition, and against what other libraries mean."""

import copy
import doctest
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from polyhead.attend import masks as masks_module
from polyhead.attend.masks import (
    And,
    Mask,
    Or,
    Padding,
    Window,
    blocks,
    causal,
    densify,
    dilated,
    documents,
    halo,
    is_causal,
    lattice,
    neighborhood,
    padding,
    per_head,
    prefix,
    shard,
    sink,
    strided,
    tile_map,
    where,
    window,
)
from polyhead.description import from_json, to_json
from polyhead.errors import ConfigError, PolyheadError, ShapeError

KEYS = 12
IDS = torch.tensor([[0, 0, 0, 1, 1, 4, 4, 4, 4, -1, -1, -1], [3, 1, 1, 3, -1, 3, 0, 0, 1, 1, -1, 0]])
REAL = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 0, 1, 1, 1, 1, 1, 1, 1]]).bool()
LENGTHS = torch.tensor([3, 7])


def truth(rule, batch, queries, keys):
    """The dense mask by loops over (b, i, j), with queries aligned to the end of the keys."""
    found = np.zeros((batch, queries, keys), dtype=bool)
    for b in range(batch):
        for r in range(queries):
            for j in range(keys):
                found[b, r, j] = rule(b, r + keys - queries, j)
    return found


def same_document(b, i, j):
    return i >= 0 and IDS[b, i] >= 0 and IDS[b, i] == IDS[b, j]


DEFINITIONS = [
    (causal(), lambda b, i, j: j <= i),
    (window(3), lambda b, i, j: i - 3 <= j <= i),
    (window(3, 2), lambda b, i, j: i - 3 <= j <= i + 2),
    (window(0, 4), lambda b, i, j: i <= j <= i + 4),
    (window(None, 2), lambda b, i, j: j <= i + 2),
    (window(2, None), lambda b, i, j: j >= i - 2),
    (window(None, None), lambda b, i, j: True),
    (sink(3), lambda b, i, j: j < 3),
    (sink(0), lambda b, i, j: False),
    (prefix(5), lambda b, i, j: j < 5),
    (prefix(LENGTHS), lambda b, i, j: j < LENGTHS[b]),
    (dilated(2, 3), lambda b, i, j: j in [i - 3 * m for m in (0, 1, 2)]),
    (dilated(1, 2, right=2), lambda b, i, j: j in [i - 2 * m for m in (1, 0, -1, -2)]),
    (strided(4), lambda b, i, j: (i - j) % 4 == 0),
    (blocks(5), lambda b, i, j: i // 5 == j // 5),
    (blocks(5, LENGTHS), lambda b, i, j: (i - int(LENGTHS[b])) // 5 == (j - int(LENGTHS[b])) // 5),
    (shard(2, 3), lambda b, i, j: j // 2 in (0, 3)),
    (shard(2, 3, 4), lambda b, i, j: j // 2 in (1, 4)),
    (halo(None, 5), lambda b, i, j: i >= 0 and i // 5 == j // 5),
    (halo(None, 3, 2), lambda b, i, j: i >= 0 and i // 3 * 3 - 2 <= j < i // 3 * 3 + 5),
    (halo(None, 3, 6), lambda b, i, j: i >= 0 and abs(i // 3 - j // 3) < 3),
    (lattice(None, 4), lambda b, i, j: i >= 0 and (i - j) % 4 == 0),
    (documents(IDS), same_document),
    (documents(IDS[1]), lambda b, i, j: same_document(1, i, j)),
    (padding(REAL), lambda b, i, j: REAL[b, j]),
    (padding(REAL[1:]), lambda b, i, j: REAL[1, j]),
    (where(lambda b, h, i, j: (i + j + b) % 3 == 0), lambda b, i, j: (i + j + b) % 3 == 0),
    (~causal(), lambda b, i, j: j > i),
    (causal() & (window(2) | sink(2)), lambda b, i, j: j <= i and (j >= i - 2 or j < 2)),
    (causal() & documents(IDS) | prefix(LENGTHS) & padding(REAL),
     lambda b, i, j: (j <= i and same_document(b, i, j)) or (j < LENGTHS[b] and REAL[b, j])),
]  # fmt: skip


@pytest.mark.parametrize("queries", [1, 7, 12, 15], ids=lambda n: f"L{n}")
@pytest.mark.parametrize(("mask", "rule"), DEFINITIONS, ids=[repr(m) for m, _ in DEFINITIONS])
def test_a_mask_is_its_definition(mask, rule, queries):
    dense = densify(mask, batch=2, heads=3, queries=queries, keys=KEYS)
    assert dense.dtype == torch.bool
    assert dense.shape[0] in (1, 2)
    assert dense.shape[1:] == (1, queries, KEYS)
    np.testing.assert_array_equal(dense.expand(2, -1, -1, -1)[:, 0].numpy(), truth(rule, 2, queries, KEYS))


def test_an_offset_places_the_queries():
    dense = densify(window(2), queries=3, keys=10, offset=4)
    assert [row.nonzero().flatten().tolist() for row in dense[0, 0]] == [[2, 3, 4], [3, 4, 5], [4, 5, 6]]


def test_each_head_has_its_mask():
    masks = [causal(), window(2) & padding(REAL), causal(), documents(IDS)]
    dense = densify(per_head(masks), batch=2, heads=4, queries=9, keys=KEYS)
    for head, mask in enumerate(masks):
        alone = densify(mask, batch=2, heads=4, queries=9, keys=KEYS)
        assert torch.equal(dense[:, head], alone.expand(2, -1, -1, -1)[:, 0])
    # a backend that walks heads piecewise asks for some of them
    b, h = torch.arange(2).view(-1, 1, 1, 1), torch.tensor([3, 1]).view(-1, 1, 1)
    i, j = torch.arange(3, 12)[:, None], torch.arange(KEYS)
    assert torch.equal(per_head(masks).allowed(b, h, i, j), dense[:, [3, 1]])


def test_a_function_sees_every_index():
    mask = where(lambda b, h, i, j: (b == 1) & (h == 2) & (i == 3) & (j == 4))
    assert densify(mask, batch=2, heads=3, queries=6, keys=6).nonzero().tolist() == [[1, 2, 3, 4]]


@pytest.mark.parametrize("shape", [(0, 1, 4, 4), (1, 1, 0, 4), (1, 1, 4, 0), (0, 2, 0, 0)], ids=str)
def test_nothing_to_mask(shape):
    batch, heads, queries, keys = shape
    ids, real = torch.zeros(batch, keys, dtype=torch.int32), torch.ones(batch, keys, dtype=torch.bool)
    parts = [window(3), prefix(torch.zeros(batch, dtype=torch.int64)), documents(ids), padding(real)]
    mask = parts[0] & (parts[1] | parts[2]) & parts[3] & per_head([blocks(2)] * heads)
    assert densify(mask, batch=batch, heads=heads, queries=queries, keys=keys).numel() == 0
    tiles = tile_map(mask, batch=batch, heads=heads, queries=queries, keys=keys, rows=2, cols=2)
    assert tiles.some.shape[2:] == (-(-queries // 2), -(-keys // 2))
    assert not tiles.some.any()
    assert tiles.density() == 0.0


# --- neighbourhoods ------------------------------------------------------------------------------------


def nearest(places, x, window):
    """The `window` of `places` nearest to x; the one before x where two are equally near."""
    return sorted(sorted(places), key=lambda y: abs(y - x))[:window]


def axis_truth(length, window, dilation, causal, stride):
    """Neighbours on one axis, said as nearest places of the same group, without any window arithmetic."""
    found = torch.zeros(length, length, dtype=torch.bool)
    for x in range(length):
        group = [y for y in range(length) if y % dilation == x % dilation]
        at = group.index(x)
        team = group[at - at % stride : at - at % stride + stride]  # queries that share a window
        if causal:
            team_end = at - at % stride + stride - 1
            last = group[min(team_end, len(group) - 1)]
            seen = [y for y in group if y <= last][-window:]
            seen = [y for y in seen if y <= x]
        else:
            middle = team[stride // 2] if stride // 2 < len(team) else team[-1]
            seen = nearest(group, middle, window)
        found[x, seen] = True
    return found


GRIDS = [
    ((9,), (3,), 1, False, 1),
    ((9,), (4,), 1, False, 1),
    ((11,), (3,), 3, False, 1),
    ((11,), (5,), 2, True, 1),
    ((17,), (2,), 8, False, 1),
    ((12,), (4,), 1, False, 4),
    ((13,), (5,), 1, False, 3),
    ((13,), (4,), 3, True, 2),
    ((5, 7), (3, 3), 1, False, 1),
    ((6, 5), (2, 5), (3, 1), False, 1),
    ((6, 8), (3, 2), (2, 4), (True, False), (2, 1)),
    ((4, 3, 5), (3, 3, 2), (1, 1, 2), (True, False, False), 1),
    ((4, 4, 4), (2, 3, 4), (2, 1, 1), False, (2, 3, 1)),
    ((3, 1, 2), (3, 1, 2), 1, False, 1),
]


@pytest.mark.parametrize("settings", GRIDS, ids=str)
def test_neighbours_are_the_nearest_places(settings):
    grid, size = settings[:2]
    mask = neighborhood(*settings)
    axes = [mask.grid, mask.window, mask.dilation, mask.causal, mask.stride]
    expected = torch.ones(1, 1, dtype=torch.bool)
    for setting in zip(*axes, strict=True):
        expected = torch.kron(expected.int(), axis_truth(*setting).int()).bool()
    places = int(np.prod(grid))
    dense = densify(mask, queries=places, keys=places)[0, 0]
    assert torch.equal(dense, expected)
    assert dense.diagonal().all() or max(mask.stride) > 1
    if not any(mask.causal):
        assert (dense.sum(1) == int(np.prod(size))).all()
    # while the grid is filled place by place, the same mask serves
    assert torch.equal(
        densify(mask, queries=2, keys=places - 1)[0, 0], expected[places - 3 : -1, : places - 1]
    )


def test_blocks_and_lattices_of_a_picture():
    """5 × 7 places: blocks of 2 × 3 with a halo of 1 × 2, and lattices of step 2 × 3, by coordinates."""
    places = [(y, x) for y in range(5) for x in range(7)]
    around, net = (
        densify(m, queries=35, keys=35)[0, 0] for m in (halo((5, 7), (2, 3), (1, 2)), lattice((5, 7), (2, 3)))
    )
    for i, (y, x) in enumerate(places):
        top, left = y // 2 * 2, x // 3 * 3
        for j, (v, u) in enumerate(places):
            assert around[i, j] == (top - 1 <= v < top + 3 and left - 2 <= u < left + 5)
            assert net[i, j] == ((y - v) % 2 == 0 and (x - u) % 3 == 0)


def test_blocks_and_lattices_are_neighbourhoods_where_they_fit():
    def same(one, other):
        return torch.equal(*(densify(m, queries=48, keys=48) for m in (one, other)))

    assert same(halo((6, 8), 2), neighborhood((6, 8), 2, stride=2))
    assert same(lattice((6, 8), (3, 2)), neighborhood((6, 8), (2, 4), dilation=(3, 2)))
    assert same(halo((6, 8), (6, 8)), window(None, None))
    assert same(halo(None, 1, 3), window(3, 3))


def test_neighbourhoods_that_are_something_else():
    def same(a, b, n):
        return torch.equal(densify(a, queries=n, keys=n), densify(b, queries=n, keys=n))

    assert same(neighborhood(12, 5, causal=True), window(4), 12)
    assert same(neighborhood((3, 4), (3, 4)), window(None, None), 12)
    assert same(neighborhood(12, 4, stride=4), blocks(4), 12)
    assert same(neighborhood(12, 1), window(0), 12)
    assert same(neighborhood((3, 4), (1, 4)), blocks(4), 12)
    assert same(neighborhood((3, 4), (3, 1)), strided(4), 12)


# --- what other libraries mean -------------------------------------------------------------------------


@pytest.mark.parametrize(("queries", "keys"), [(5, 5), (3, 8), (1, 6)])
def test_causal_is_torchs_lower_right_causal(queries, keys):
    from torch.nn.attention.bias import causal_lower_right

    theirs = causal_lower_right(queries, keys)._materialize()
    assert torch.equal(densify(causal(), queries=queries, keys=keys)[0, 0], theirs.to(torch.bool))


def from_transformers(function, queries, keys, batch=2):
    b, h = torch.arange(batch).view(-1, 1, 1, 1), torch.zeros(1, 1, 1, dtype=torch.int64)
    i, j = torch.arange(queries)[:, None] + keys - queries, torch.arange(keys)
    return function(b, h, i, j).expand(batch, 1, queries, keys)


@pytest.mark.parametrize("queries", [12, 5])
def test_transformers_masks(queries):
    hf = pytest.importorskip("transformers.masking_utils")
    pairs = [
        (causal(), hf.causal_mask_function),
        (window(4 - 1), hf.sliding_window_causal_mask_function(4)),
        (window(4, 4), hf.sliding_window_bidirectional_mask_function(4)),
        (causal() & blocks(5), hf.chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64))),
        (causal() & blocks(5, LENGTHS), hf.chunked_causal_mask_function(5, LENGTHS)),
        (causal() | documents(IDS), hf.or_masks(hf.causal_mask_function, hf.blockwise_overlay(IDS))),
        (causal() & padding(REAL), hf.and_masks(hf.causal_mask_function, hf.padding_mask_function(REAL))),
        (documents(IDS.clamp(min=0)), hf.packed_sequence_mask_function(IDS.clamp(min=0))),
    ]
    for mask, theirs in pairs:
        ours = densify(mask, batch=2, queries=queries, keys=KEYS).expand(2, -1, -1, -1)
        assert torch.equal(ours, from_transformers(theirs, queries, KEYS)), mask


def test_attention_gym_masks():
    gym = pytest.importorskip("attn_gym.masks")
    ids = torch.tensor([0, 0, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3])
    ends = torch.tensor([0, 2, 5, 9, 12])
    flagged = torch.zeros(KEYS, dtype=torch.bool)
    flagged[:2] = True
    pairs = [
        (window(3), gym.generate_sliding_window(3)),
        (causal() | prefix(4), gym.generate_prefix_lm_mask(4)),
        (dilated(3, 2, right=3), gym.generate_dilated_sliding_window(6, 2)),
        (causal() & documents(ids), gym.generate_doc_mask_mod(gym.causal_mask, ends)),
        (
            window(2, 2) | sink(2) | where(lambda b, h, i, j: i < 2),
            gym.generate_global_sliding_window(2, flagged),
        ),
    ]
    zero, index = torch.zeros((), dtype=torch.int64), torch.arange(KEYS)
    for mask, theirs in pairs:
        ours = densify(mask, queries=KEYS, keys=KEYS)[0, 0]
        assert torch.equal(ours, theirs(zero, zero, index[:, None], index)), mask
    index = torch.arange(49)
    theirs = gym.generate_natten(7, 7, 5, 3)(0, 0, index[:, None], index)
    assert torch.equal(densify(neighborhood((7, 7), (5, 3)), queries=49, keys=49)[0, 0], theirs)


LOCAL = """
011111100
001111110
000111111
000011111
000001111
000000111
"""
TRIANGLE = """
111100000
111110000
111111000
111111100
111111110
111111111
"""
PACKED = """
100000000
110000000
001000000
001100000
001110000
000001000
000001100
000001110
000001111
"""


@pytest.mark.parametrize(
    ("mask", "drawn"),
    [
        (window(2, 3), LOCAL),  # xformers' LocalAttentionFromBottomRightMask(2, 3)
        (causal(), TRIANGLE),  # LowerTriangularFromBottomRightMask()
        (causal() & documents([0, 0, 1, 1, 1, 2, 2, 2, 2]), PACKED),  # BlockDiagonalCausalMask, 2 + 3 + 4
    ],
    ids=["local", "triangle", "packed"],
)
def test_xformers_masks(mask, drawn):
    theirs = torch.tensor([[bit == "1" for bit in row] for row in drawn.split()])
    assert torch.equal(densify(mask, queries=len(theirs), keys=9)[0, 0], theirs)


def test_which_masks_are_the_causal_one():
    found = [mask for mask in PLAIN if is_causal(mask)]
    assert found == [causal()]
    assert is_causal(window(None, 0))
    for other in (None, ~causal(), window(None, 1), causal() & sink(1), causal() | sink(1), torch.ones(2, 2)):
        assert not is_causal(other)


# --- masks are data ------------------------------------------------------------------------------------

PLAIN = [
    causal(),
    window(255),
    window(3, 4),
    window(None, None),
    window(2, None),
    sink(4),
    prefix(7),
    dilated(4, 2),
    dilated(4, 2, 1),
    strided(3),
    blocks(16),
    blocks(16, 3),
    shard(64, 4),
    shard(64, 4, 3),
    halo(None, 8, 3),
    halo((8, 8), (2, 4), (3, 0)),
    halo(9, 3),
    lattice((8, 8), 4),
    lattice(None, (3,)),
    neighborhood(64, 7),
    neighborhood((8, 8), (3, 5), dilation=(2, 1), causal=(True, False), stride=(1, 2)),
    neighborhood((4, 4, 4), 3, causal=True),
    causal() & (window(255) | sink(4)),
    ~(causal() | window(2)) & ~sink(1) | blocks(3),
    per_head([causal(), window(3) & sink(2), ~blocks(2)]),
]
HELD = [
    padding(REAL),
    documents(IDS),
    prefix(LENGTHS),
    blocks(4, LENGTHS),
    causal() & padding(REAL) | sink(1),
]


@pytest.mark.parametrize("mask", PLAIN, ids=repr)
def test_a_mask_prints_as_it_is_written(mask):
    again = eval(repr(mask), vars(masks_module))
    assert again == mask
    assert hash(again) == hash(mask)
    assert repr(again) == repr(mask)


def test_spelling():
    assert repr(causal() & (window(255) | sink(4))) == "causal() & (window(255) | sink(4))"
    assert repr(causal() & window(3) | sink(4)) == "(causal() & window(3)) | sink(4)"
    assert repr(~(causal() & sink(1)) & ~sink(2)) == "~(causal() & sink(1)) & ~sink(2)"
    assert repr(padding(REAL) & prefix(LENGTHS)) == "padding(<bool 2×12>) & prefix(<int64 2>)"
    assert repr(neighborhood(9, 3)) == "neighborhood(9, 3)"


@pytest.mark.parametrize("mask", [*PLAIN, *HELD], ids=repr)
def test_a_mask_goes_through_json_pickle_and_copies(mask):
    hash(mask)
    for again in (
        from_json(json.loads(json.dumps(to_json(mask)))),
        pickle.loads(pickle.dumps(mask)),
        copy.deepcopy(mask),
    ):
        assert type(again) is type(mask)
        assert again == mask
        assert hash(again) == hash(mask)
    spec, tensors = mask.flatten()
    assert spec.unflatten(tensors) == mask


def test_masks_differ_by_what_they_hold():
    assert padding(REAL) == padding(REAL.clone())
    assert padding(REAL) != padding(~REAL)
    assert window(3) != window(4)
    assert sink(3) != prefix(3)
    assert causal() == window(None, 0)


def test_joining_flattens_and_drops_repeats():
    a, b, c = causal(), sink(2), window(3)
    assert (a & b) & c == a & (b & c) == And((a, b, c))
    assert (a | b) | c == a | (b | c) == Or((a, b, c))
    assert hash((a & b) & c) == hash(a & (b & c))
    assert a & a == a
    assert (a | b) | a == a | b
    assert ~~a is a
    assert And((And((a, b)), b)) == a & b
    held = padding(REAL)
    assert held & held == held
    assert len((held & padding(REAL.clone())).terms) == 2  # told apart without reading the tensors


# --- what is refused -----------------------------------------------------------------------------------


def test_a_mask_joins_masks_only():
    with pytest.raises(
        ConfigError, match=r"& joins two masks, but one side is int and the other is causal\(\)"
    ):
        causal() & 3
    with pytest.raises(ConfigError, match=r"\| joins two masks, but one side is str"):
        "x" | causal()
    with pytest.raises(ConfigError, match=r"wrap a bool tensor of real tokens in padding\(...\)"):
        causal() & REAL
    for attempt in (lambda: causal() and sink(1), lambda: not causal()):
        with pytest.raises(ConfigError, match="combine masks with &, | and ~ instead of and, or and not"):
            attempt()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: window(-2), "window: left must be at least 0; got -2"),
        (lambda: window(3, -1), r"pass None, not -1\): right must be at least 0; got -1"),
        (lambda: window(2.5), r"window: left must be an integer, at least 0; got 2.5 \(float\)"),
        (lambda: window(True), r"window: left must be an integer, at least 0; got True \(bool\)"),
        (lambda: sink(-1), "sink: n must be at least 0; got -1"),
        (lambda: sink(LENGTHS), "sink: n must be an integer"),
        (lambda: prefix("a"), r"prefix: n must be an integer, at least 0; got 'a' \(str\)"),
        (lambda: prefix(REAL), r"integer tensor \(B,\); got a tensor \(2, 12\) of torch.bool"),
        (lambda: dilated(2, 0), "dilated: dilation must be at least 1; got 0"),
        (lambda: strided(0), "strided: stride must be at least 1; got 0"),
        (lambda: blocks(0), "blocks: size must be at least 1; got 0"),
        (lambda: documents(REAL), r"integer tensor \(S,\) or \(B, S\); got a tensor \(2, 12\) of torch.bool"),
        (lambda: padding(REAL.long()), r"at real tokens; got a tensor \(2, 12\) of torch.int64 .*\.bool\(\)"),
        (lambda: padding([1, 0]), r"got \[1, 0\] \(list\)"),
        (lambda: per_head([]), "per_head: masks must be a list of masks, one for each head; got"),
        (lambda: per_head([causal(), None]), "per_head: masks must be a list of masks"),
        (lambda: where(3), r"where: function must be callable as f\(b, h, i, j\), got 3"),
        (lambda: neighborhood((2, 2, 2, 2), 1), "grid must have 1 to 3 axes"),
        (lambda: neighborhood((4, 4), (3, 3, 3)), "window needs one value, or one for each of the 2 axes"),
        (lambda: neighborhood((4, 0), 1), r"neighborhood: grid\[1\] must be at least 1; got 0"),
        (lambda: neighborhood((8, 8), 3, dilation=3), "does not fit axis 0; .* at most its length, 8"),
        (lambda: neighborhood(9, 3, stride=4), "stride 4 on axis 0 .* at most 3"),
        (lambda: neighborhood(9, 3, causal=1), "causal must be True or False"),
        (lambda: shard(0, 2), "shard: size must be at least 1; got 0"),
        (lambda: halo((4, 4), 2, -1), "halo: halo must be at least 0; got -1"),
        (lambda: halo((4, 4), 2, (1, 1, 1)), "halo needs one value, or one for each of the 2 axes"),
        (lambda: halo((4, 4), 0), r"halo: block\[0\] must be at least 1; got 0"),
        (lambda: halo("ab", 2), r"halo: grid\[0\] must be an integer, at least 1; got 'ab'"),
        (lambda: lattice((2, 2, 2, 2), 1), "lattice: grid must have 1 to 3 axes"),
        (lambda: lattice((4, 4), (1, 2, 3)), "step needs one value, or one for each of the 2 axes"),
        (lambda: And(()), "And: terms must be masks, at least one"),
        (lambda: tile_map(causal(), queries=4, keys=4, rows=0, cols=2), "tile_map: rows must be at least 1"),
    ],
)
def test_bad_settings_are_named(make, message):
    with pytest.raises(ConfigError, match=message):
        make()


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (padding(REAL[:, :9]), "padding: mask has 9 positions but there are 12 keys"),
        (padding(torch.cat([REAL, REAL])), "padding: mask has 4 rows but the batch has 2 items"),
        (documents(IDS[:, :9]), "documents: ids has 9 positions but there are 12 keys"),
        (documents(torch.cat([IDS, IDS])), "documents: ids has 4 rows but the batch has 2 items"),
        (prefix(torch.tensor([1, 2, 3])), "prefix: n has 3 entries but the batch has 2 items"),
        (blocks(2, torch.tensor([1])), "blocks: start has 1 entries but the batch has 2 items"),
        (per_head([causal()] * 4), "per_head: 4 masks for 3 heads"),
        (halo((3, 3), 3), "the grid 3×3 has 9 places but the call has 12 keys"),
        (lattice((3, 3), 3), "the grid 3×3 has 9 places but the call has 12 keys"),
        (neighborhood((3, 3), 3), "the grid 3×3 has 9 places but the call has 12 keys"),
    ],
)
def test_data_that_does_not_fit_the_call_is_named(mask, message):
    for wrapped in (mask, ~(causal() & mask), sink(1) | mask, per_head([causal(), mask, causal()])):
        for use in (densify, tile_map):
            size = {"rows": 2, "cols": 2} if use is tile_map else {}
            with pytest.raises(ShapeError, match=message):
                use(wrapped, batch=2, heads=3, queries=5, keys=12, **size)


def test_queries_off_the_grid_are_refused():
    with pytest.raises(ShapeError, match="12 keys, and queries at positions -1 to 11"):
        densify(neighborhood((3, 4), 3), queries=13, keys=12)


def test_a_function_must_answer_with_booleans():
    with pytest.raises(ConfigError, match=r"must return a bool tensor; got torch.int64"):
        densify(where(lambda b, h, i, j: i - j), queries=2, keys=2)


def test_every_refusal_is_ours():
    assert issubclass(ConfigError, PolyheadError)
    assert issubclass(ShapeError, PolyheadError)


def test_masks_can_be_made_and_used_inside_a_compiled_function():
    @torch.compile(backend="eager", fullgraph=True)
    def seen(x, real):
        return densify(causal() & (window(3) | sink(2)) & padding(real), batch=2, queries=len(x), keys=12)

    expected = densify(causal() & (window(3) | sink(2)) & padding(REAL), batch=2, queries=5, keys=12)
    assert torch.equal(seen(torch.ones(5), REAL), expected)


def test_a_mask_of_ones_own():
    class Even(Mask):
        def allowed(self, b, h, i, j):
            return (j % 2 == 0).expand(len(i), -1)

        def bounds(self, b, h, i0, i1, j0, j1):
            return torch.tensor(True), torch.tensor(False)

    dense = densify(Even() & window(1), queries=4, keys=4)[0, 0]
    assert dense.nonzero().tolist() == [[0, 0], [1, 0], [2, 2], [3, 2]]
    assert isinstance(Even() & padding(torch.ones(1, 4, dtype=torch.bool)), And)
    assert isinstance(causal(), Window)
    assert isinstance(padding(REAL), Padding)


def test_the_guide_is_true():
    guide = Path(__file__).parents[2] / "docs" / "guide" / "masks.md"
    # the fence that closes a block would be taken for expected output
    text = guide.read_text(encoding="utf-8").replace("```python\n", "").replace("\n\n```\n", "\n\n")
    examples = doctest.DocTestParser().get_doctest(text, {}, guide.name, str(guide), 0)
    assert len(examples.examples) > 10
    assert doctest.DocTestRunner(verbose=False).run(examples).failed == 0


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [*PLAIN[:-1], *HELD, per_head([documents(IDS), prefix(LENGTHS)])], ids=repr)
def test_on_a_gpu_the_mask_is_the_same(mask):
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    call = {"batch": 2, "heads": 2, "queries": 9, "keys": KEYS}
    here, there = densify(mask, **call), densify(mask, **call, device="cuda")
    assert there.is_cuda
    assert torch.equal(here, there.cpu())
    tiles, far = (tile_map(mask, **call, rows=2, cols=3, device=device) for device in ("cpu", "cuda"))
    assert torch.equal(tiles.some, far.some.cpu())
    assert torch.equal(tiles.every, far.every.cpu())
