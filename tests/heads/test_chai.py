"""Heads that use the map of another one."""

import itertools

import pytest
import torch
import transformers as t

import polyhead as ph
from hf.tiny import DECODERS, SIZES, bert, llama, make, tokens
from polyhead.errors import ConfigError, ShapeError, UnknownName
from polyhead.heads import clustered, head_maps
from polyhead.heads.clustering import average_linkage, cosine_distances, error_of, first_flat, medoids
from polyhead.hf import attach

IDS = tokens(1, 24)


def wide():
    """Four heads with keys of their own."""
    return make(t.LlamaForCausalLM, t.LlamaConfig(**SIZES | {"num_key_value_heads": 4}))


@torch.no_grad()
def logits(model, ids=IDS, **more):
    return model(ids, use_cache=False, **more).logits


@pytest.mark.parametrize("make_model", [llama, wide, DECODERS["gpt2"]], ids=["gqa", "mha", "gpt2"])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_equals_its_twin(make_model, count):
    model, seen = make_model().double(), []

    def look(call):
        out = call.proceed()
        seen.append((call, out))
        return out

    with clustered(model, count, tokens=4) as sharing, attach(model, handler=look):
        logits(model)
    assert len(seen) == 2
    for (call, out), labels in zip(seen, sharing.labels, strict=True):
        expected, clusters = ph.reference("chai")(call.q[0], call.k[0], call.v[0], count=count, tokens=4)
        torch.testing.assert_close(out[0], expected)
        assert [[h for h in range(4) if labels[0, h] == n] for n in range(count)] == clusters


def test_as_many_clusters_as_heads_change_nothing():
    for name in ("llama", "mistral", "gemma2", "gpt_oss"):
        model = DECODERS[name]()
        dense = logits(model)
        with clustered(model, 4):
            torch.testing.assert_close(logits(model), dense, atol=1e-5, rtol=1e-5)
        with clustered(model, [2, None]) as sharing:
            assert (logits(model) - dense).abs().max() > 1e-3
        assert sharing.labels[1] is None
        torch.testing.assert_close(logits(model), dense, atol=1e-5, rtol=1e-5)


def test_heads_with_the_same_queries_and_keys_are_joined_without_error():
    model = wide().double()
    with torch.no_grad():
        for layer in model.model.layers:
            for weight in (layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight):
                weight[16:24] = weight[:8]  # head 2 looks as head 0 does
    dense = logits(model)
    for by in ("first", "medoid"):
        with clustered(model, 3, representative=by) as sharing:
            torch.testing.assert_close(logits(model), dense)
        assert [labels[0].tolist() for labels in sharing.labels] == [[0, 1, 0, 2]] * 2
    assert sharing.saved().scores == pytest.approx(0.25)
    assert sharing.saved().keys == pytest.approx(0.25)
    assert sharing.saved().cache == pytest.approx(0.125)


def test_maps_within_a_cluster_are_the_same_bits_and_sum_to_one():
    """With unit vectors as values the outputs are the maps."""
    model, found = wide(), []

    def look(call):
        found.append(sharing(call.replace(v=torch.eye(24).expand(1, 4, 24, 24), below=())))
        return call.proceed()

    with clustered(model, 2) as sharing, attach(model, handler=look):
        logits(model)
    for maps, labels in zip(found, sharing.labels, strict=True):
        torch.testing.assert_close(maps.sum(-1), torch.ones(1, 4, 24))
        assert maps.triu(1).abs().max() == 0.0
        for a, b in itertools.combinations(range(4), 2):
            same = torch.equal(maps[0, a, 5:], maps[0, b, 5:])
            assert same == bool(labels[0, a] == labels[0, b])


@torch.no_grad()
@pytest.mark.parametrize("prompt", [2, 5, 12])
@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "gpt2"])
def test_steps_equal_the_whole_call_and_labels_stay(name, prompt):
    model = DECODERS[name]().double()
    with clustered(model, 2) as sharing:
        whole = logits(model)
        known = [labels.clone() for labels in sharing.labels]
        cache, parts = t.DynamicCache(config=model.config), []
        for part in IDS.split([prompt, *[1] * (24 - prompt)], 1):
            parts.append(model(part, past_key_values=cache).logits)
            if sum(p.shape[1] for p in parts) >= 5:
                assert all(torch.equal(a, b) for a, b in zip(known, sharing.labels, strict=True))
    torch.testing.assert_close(torch.cat(parts, 1), whole)


@torch.no_grad()
def test_later_tokens_have_no_part_in_it():
    model = llama().double()
    other = IDS.clone()
    other[:, 12:] = 7
    with clustered(model, 2):
        torch.testing.assert_close(logits(model)[:, :12], logits(model, other)[:, :12])


@torch.no_grad()
def test_keys_that_no_representative_has_are_never_read():
    """A cache without them would do: in their place stands what would spoil everything."""
    model = wide().double()
    with clustered(model, 2) as sharing:
        cache = t.DynamicCache(config=model.config)
        model(IDS[:, :12], past_key_values=cache)
        copy = t.DynamicCache(config=model.config)
        for n, layer in enumerate(cache.layers):
            keys = layer.keys.clone()
            unread = sorted(set(range(4)) - set(sharing.representatives[n][0].tolist()))
            keys[:, unread] = torch.nan
            copy.update(keys, layer.values.clone(), n)
        for n in range(12, 24):
            expected = model(IDS[:, n : n + 1], past_key_values=cache).logits
            found = model(IDS[:, n : n + 1], past_key_values=copy).logits
            torch.testing.assert_close(found, expected)
    assert sharing.saved().keys == 0.5


@torch.no_grad()
def test_every_sequence_of_a_padded_batch_is_treated_as_if_it_were_alone():
    model = llama().double()
    ids = tokens(3, 24)
    mask = torch.ones_like(ids)
    mask[1, :6] = 0
    mask[2, :21] = 0  # three real tokens: too few to know
    with clustered(model, 2) as sharing:
        cache = t.DynamicCache(config=model.config)
        found = [model(ids, attention_mask=mask, past_key_values=cache).logits]
        steps = tokens(3, 5) + 1
        for n in range(5):
            mask = torch.cat([mask, torch.ones(3, 1, dtype=torch.long)], 1)
            found.append(model(steps[:, n : n + 1], attention_mask=mask, past_key_values=cache).logits)
        found = torch.cat(found, 1)
        together = [labels.clone() for labels in sharing.labels]
        for item in range(3):
            real = int(mask[item].sum())
            row = torch.cat([ids, steps], 1)[item : item + 1, -real:]
            alone = logits(model, row)
            # positions are shifted, and Llama turns by them in float32
            torch.testing.assert_close(found[item : item + 1, -real:], alone, atol=1e-4, rtol=1e-3)
            assert all(torch.equal(a[item], b[0]) for a, b in zip(together, sharing.labels, strict=True))


@torch.no_grad()
def test_more_clusters_err_less():
    errors = []
    for seed in range(4):
        model = wide()
        ids = torch.randint(3, 99, (1, 40), generator=torch.Generator().manual_seed(seed))
        dense = logits(model, ids)
        row = []
        for count in (1, 2, 3, 4):
            with clustered(model, count):
                row.append(float((logits(model, ids) - dense).square().mean()))
        errors.append(row)
    means = torch.tensor(errors).mean(0)
    assert bool((means[:-1] > means[1:]).all())


def test_maps_of_texts_give_counts_and_fixed_clusters():
    model = llama()
    maps = head_maps(model, text=tokens(6, 24), tokens=4)
    assert maps.layers[0].shape == (6, 4, 16)
    seen = []
    with attach(model, handler=lambda call: seen.append(call) or call.proceed()):
        logits(model, tokens(6, 24)[:1, :4])
    weights = (seen[0].q @ seen[0].k.repeat_interleave(2, 1).mT * seen[0].scale).double()
    weights = weights.masked_fill(torch.ones(4, 4).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(maps.layers[0][0], weights[0].flatten(1), atol=1e-5, rtol=1e-5)
    for errors, count in zip(maps.errors(), maps.counts(0.2), strict=True):
        assert errors[-1] < 1e-9
        assert 1 <= count <= 4
    assert maps.counts(1.0) == [1, 1]
    scores = maps.similarity()
    assert scores.widths == (4, 4)
    assert 0 < scores.flat.min() <= scores.flat.max() <= 1
    labels = maps.labels(2)
    with clustered(model, 2, labels=labels) as sharing:
        logits(model, tokens(2, 12))
    assert all(
        torch.equal(own[0], one) and torch.equal(own[1], one)
        for own, one in zip(sharing.labels, labels, strict=True)
    )


def test_linkage_joins_the_nearest_in_the_mean():
    draw = torch.Generator().manual_seed(0)
    for heads in (2, 5, *[9, 12] * 10):  # clusters of unequal size count by their members
        x = torch.rand(heads, 25, generator=draw, dtype=torch.float64)
        far = cosine_distances(x)
        clusters = [[h] for h in range(heads)]
        for count in range(heads, 0, -1):
            labels = average_linkage(far, count)
            assert [(labels == n).nonzero().view(-1).tolist() for n in range(count)] == clusters
            if count > 1:
                pairs = list(itertools.combinations(range(count), 2))
                means = [far[clusters[m]][:, clusters[n]].mean().item() for m, n in pairs]
                m, n = pairs[means.index(min(means))]
                clusters[m] = sorted(clusters[m] + clusters.pop(n))
                clusters.sort()
    scipy = pytest.importorskip("scipy.cluster.hierarchy")
    theirs = torch.tensor(scipy.fcluster(scipy.linkage(x.numpy(), "average", "cosine"), 4, "maxclust"))
    ours = average_linkage(far, 4)
    assert torch.equal(theirs[:, None] == theirs, ours[:, None] == ours)


def test_centres_and_the_bend():
    x = torch.tensor([[0.0, 1.0], [0.0, 1.2], [5.0, 0.0], [5.2, 0.0], [5.1, 0.0]])
    assert error_of(x, 2) == pytest.approx(0.02 + 0.02, rel=1e-4)
    assert error_of(x, 5) == pytest.approx(0.0, abs=1e-12)
    errors = torch.tensor([error_of(x, c) for c in range(1, 6)])
    assert first_flat(errors, 0.05) == 2
    assert first_flat(torch.zeros(4), 0.05) == 1
    assert first_flat(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.0]), 0.05) == 5
    far = cosine_distances(torch.tensor([[1.0, 0.0], [1.0, 0.2], [1.0, 0.4], [0.0, 1.0]]))
    assert medoids(far, average_linkage(far, 2)).tolist() == [1, 3]


def test_wrong_input_is_said():
    model = llama()
    for counts, message in (
        (5, "count of layer 0 must be at least 1 and at most 4; got 5|count of layer 0"),
        (0, "counts must be at least 1"),
        ([2], "has 2 attention layers, but 1 counts are given"),
    ):
        with pytest.raises(ConfigError, match=message), clustered(model, counts):
            pass
    with pytest.raises(UnknownName, match="representative"), clustered(model, 2, representative="last"):
        pass
    with (
        pytest.raises(ShapeError, match=r"labels of layer 0 must be integers \(4,\)"),
        clustered(model, 2, labels=[torch.zeros(3, dtype=torch.long)] * 2),
    ):
        pass
    with (
        pytest.raises(ConfigError, match="layer 0 has 1 labels and a count of 2"),
        clustered(model, 2, labels=[torch.zeros(4, dtype=torch.long)] * 2),
    ):
        pass
    with pytest.raises(ConfigError, match="layer 0 is no causal self-attention"), clustered(bert(), [2, 2]):
        pass
    with pytest.raises(ConfigError, match="every text must have at least 5 tokens"):
        head_maps(model, text=tokens(1, 4))
    cache = t.DynamicCache(config=model.config)
    with torch.no_grad():
        model(IDS[:, :8], past_key_values=cache)
        with clustered(model, 2), pytest.raises(ConfigError, match="the first were not seen"):
            model(IDS[:, 8:9], past_key_values=cache)
