"""What must hold of S2-Attention."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

import polyhead as ph
from mechanisms.variants import broken_rules
from polyhead.attend.masks import densify
from polyhead.errors import ConfigError, UnsupportedPattern
from polyhead.mechanisms.s2_attention import ShardedAttention
from polyhead.nn import rope

F64 = {"dtype": torch.float64}
X = torch.randn(2, 45, 32, generator=torch.Generator().manual_seed(0), **F64)
CAUSAL = ph.causal()
SMALL: dict[str, Any] = {"block_size": 4, "local_blocks": 2, "stride": 4}


def config(**options: Any) -> ShardedAttention:
    return ShardedAttention(**{"dim": 32, "heads": 4, **SMALL, **options})


def built(**options: Any) -> Any:
    torch.manual_seed(0)
    return config(**options).build(**F64).eval()


def blocks_read(own: ShardedAttention, count: int = 12) -> Tensor:
    """Which blocks of keys are read in a causal call, `(H, blocks, blocks)`; every block is read whole."""
    size, length = own.block_size, count * own.block_size
    dense = densify(own.pattern(), heads=own.heads, queries=length, keys=length)[0]
    dense = dense.unflatten(1, (count, size)).unflatten(3, (count, size))
    assert torch.equal(dense.all(4).all(2), dense.any(4).any(2))
    return dense[:, :, 0, :, 0] & torch.ones(count, count, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    "options",
    [
        {**SMALL, "block_size": 2, "local_blocks": 1, "kv_heads": 2, "compiled": True},
        {**SMALL, "block_size": 3, "stride": 3, "offset": 5, "dense_heads": 1},
        {**SMALL, "block_size": 1, "stride": 7, "bias": True},
    ],
    ids=str,
)
def test_small_blocks_keep_the_contract(options: dict[str, Any]) -> None:
    assert not broken_rules("s2_attention", **options)


@pytest.mark.parametrize(
    "options", [{"stride": 1}, {"local_blocks": 12}, {"dense_heads": 2}, {"block_size": 64}], ids=str
)
@pytest.mark.parametrize("mask", [None, CAUSAL], ids=repr)
def test_it_is_plain_attention_where_everything_is_read(
    options: dict[str, Any], mask: ph.Mask | None
) -> None:
    module = built(kv_heads=2, position=rope(100.0), **options)
    plain = ph.build("grouped_query", dim=32, heads=4, kv_heads=2, position=rope(100.0), **F64)
    plain.load_state_dict(module.state_dict())
    torch.testing.assert_close(module(X, mask=mask), plain(X, mask=mask), rtol=0, atol=1e-12)
    if "stride" not in options:
        less = built(kv_heads=2, position=rope(100.0))
        assert (less(X, mask=mask) - plain(X, mask=mask)).abs().max() > 1e-3


@pytest.mark.parametrize("heads", [4, 6], ids=lambda n: f"H{n}")
def test_heads_enough_read_everything_together(heads: int) -> None:
    read = blocks_read(config(dim=48, heads=heads))
    assert torch.equal(read.any(0), torch.ones(12, 12, dtype=torch.bool).tril())
    alike = blocks_read(config(dim=48, heads=heads, kv_heads=1)).any(0)  # all have the shard of one
    assert not torch.equal(alike, read.any(0))


def test_fewer_heads_than_shards_cover_as_many_residues_as_they_are() -> None:
    read = blocks_read(config(heads=2, stride=6, local_blocks=1)).any(0)
    assert read[11].nonzero().flatten().tolist() == [0, 3, 6, 9, 11]


def test_what_is_dropped_is_never_needed_again() -> None:
    """mask[m + 1, n] ≤ mask[m, n] but for what is new; of strides that move with the query it is not so."""

    def comes_back(read: Tensor) -> bool:
        fresh = torch.eye(12, dtype=torch.bool)[1:]
        return bool((read[..., 1:, :] & ~read[..., :-1, :] & ~fresh).any())

    assert not comes_back(blocks_read(config()))
    assert not comes_back(blocks_read(config(offset=3, kv_heads=2, dense_heads=1)))
    slash = densify(CAUSAL & (ph.window(1) | ph.strided(4)), queries=12, keys=12)[0]
    assert comes_back(slash)


def test_decoding_with_what_was_dropped_gone() -> None:
    """Of every head the blocks that the last query does not read are forgotten: it attends as before."""
    module = built(kv_heads=2)
    whole = module(X, mask=CAUSAL)
    q, (k, v) = module._queries(X, 0), module._rows(X, 0)
    outs = []
    for h in range(4):
        kept = densify(module.mask(), heads=4, queries=1, keys=45)[0, h, 0].nonzero().flatten()
        assert len(kept) < 30
        g = h // 2
        outs.append(ph.attend(q[:, h : h + 1, -1:], k[:, g : g + 1, kept], v[:, g : g + 1, kept]))
    torch.testing.assert_close(module.output(torch.cat(outs, 1))[:, 0], whole[:, -1], rtol=0, atol=1e-12)


def test_every_query_reads_its_own_block_and_heads_of_a_group_read_the_same() -> None:
    read = blocks_read(config(kv_heads=2, local_blocks=1))
    assert read.diagonal(dim1=1, dim2=2).all()
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[2], read[3])
    assert not torch.equal(read[1], read[2])


def test_a_head_reads_the_share_that_it_says() -> None:
    """About l·C + L/s keys a query: at 512 tokens in blocks of 8, 2 near and a quarter of the rest."""
    own = config(block_size=8)
    dense = densify(CAUSAL & own.pattern(), heads=4, queries=512, keys=512)[0]
    share = dense[:, -1].float().mean(-1)
    torch.testing.assert_close(share, torch.full((4,), (512 / 4 + 2 * 8 * 3 / 4) / 512), rtol=0, atol=8 / 512)


def test_blind_places_of_a_shard_that_all_share() -> None:
    """Two tokens far apart meet in some head, or, where all heads have one shard, mostly in none."""
    read, alike = blocks_read(config(local_blocks=1)), blocks_read(config(local_blocks=1, kv_heads=1))
    far = torch.ones(12, 12, dtype=torch.bool).tril(-1)
    assert read.any(0)[far].all()
    assert alike.any(0)[far].float().mean() < 1 / 3


def test_what_it_does_not_do_is_said() -> None:
    for options, words in (
        ({"stride": 0}, "stride must be at least 1; got 0"),
        ({"block_size": 1.5}, "block_size must be an integer"),
        ({"dense_heads": 5}, "dense_heads must be at most kv_heads=4; got 5"),
        ({"kv_heads": 3}, "kv_heads must divide heads=4"),
        ({"context_dim": 16}, "context_dim must be left out"),
    ):
        with pytest.raises(ConfigError, match=re.escape(words)):
            config(**options)
    for call in (lambda m: m(X, X), lambda m: m.new_context_cache(X)):
        with pytest.raises(UnsupportedPattern, match="s2_attention .* does not support a context"):
            call(built())
