"""Influence of blocks of attention, and the search for spans."""

import itertools
import json
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from cache import tiny
from hf.tiny import DECODERS, bert, llama, t5, tokens
from polyhead.cache import spans
from polyhead.cache.influence import Influence, entries
from polyhead.cache.spans import Sample, SpanPlan
from polyhead.errors import ConfigError, ShapeError, UnsupportedModel
from polyhead.hf import attach

IDS = tokens(1, 21)


class Written:
    """A handler with weights written out, of which gradients are kept or an entry is taken away."""

    def __init__(self, entry=None, part=1.0):
        self.entry, self.part = entry, part
        self.weights = {}

    def __call__(self, call):
        k, v = (x.repeat_interleave(call.layer.heads // call.layer.kv_heads, 1) for x in (call.k, call.v))
        scores = call.q @ k.mT * call.scale
        if call.score is not None:  # soft caps
            scores = 50.0 * (scores / 50.0).tanh()
        n = torch.arange(call.q.shape[2])
        seen = n[:, None] >= n
        if call.layer.window is not None:
            seen = seen & (n[:, None] - n < call.layer.window)
        scores = scores.masked_fill(~seen, -torch.inf)
        if call.normalizer.sink is not None:
            sink = call.normalizer.sink.view(1, -1, 1, 1).to(scores).expand(*scores.shape[:3], 1)
            weights = torch.cat([scores, sink], -1).softmax(-1)[..., :-1]
        else:
            weights = scores.softmax(-1)
        if self.entry is not None and self.entry[0] == call.layer.index:
            _, head, t, j = self.entry
            removed = weights.clone()
            removed[0, head, t] = weights[0, head, t] / (1 - weights[0, head, t, j])
            removed[0, head, t, j] = 0.0
            weights = weights + self.part * (removed - weights)
        if torch.is_grad_enabled():
            weights = weights.detach().requires_grad_() if not weights.requires_grad else weights
            weights.retain_grad()
        self.weights[call.layer.index] = weights
        return weights @ v


def loss(model, ids=IDS, handler=None):
    with attach(model, handler=handler):
        logits = model(ids, use_cache=False).logits
    return F.cross_entropy(logits[0, :-1], ids[0, 1:])


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss", "gpt2"])
@pytest.mark.parametrize("block", [1, 4, 8])
def test_equals_its_twin(name, block):
    model = DECODERS[name]().double().requires_grad_(False)
    written = Written()
    loss(model, handler=written).backward()
    (found,) = spans.influence(model, [IDS], block=block)
    assert (found.length, found.block) == (21, block)
    for layer, weights in written.weights.items():
        a, g = weights[0].detach(), weights.grad[0]
        if name == "gpt_oss":  # the twin knows no sinks: the formula is the same, the row's mean too
            e = a * ((a * g).sum(-1, keepdim=True) - g) / (1 - a)
            e = F.pad(e, (0, -21 % block, 0, -21 % block))
            twin = e.unflatten(2, (-1, block)).sum(3).unflatten(1, (-1, block)).sum(2)
        else:
            twin = ph.reference("attention_influence")(a, g, block)
        torch.testing.assert_close(found.layers[layer], twin)
        assert found.layers[layer].abs().max() > 1e-4


def test_it_tells_what_the_loss_loses():
    """Against the loss with a part of one entry removed, and, where the entry is small, with all of it."""
    model = DECODERS["gpt2"]().double().requires_grad_(False)
    (found,) = spans.influence(model, [IDS], block=1)  # Llama's norms are in float32
    written = Written()
    with torch.no_grad():
        before = loss(model, handler=written)
    ratios = []
    for layer, head, t in itertools.product(range(2), range(4), (5, 12, 15, 19)):
        weights = written.weights[layer][0, head, t]
        for j in range(t + 1):
            if 1e-4 < weights[j] < 0.999 and j % 2 == 0:
                with torch.no_grad():
                    little = (loss(model, handler=Written((layer, head, t, j), 1e-5)) - before) / 1e-5
                    whole = loss(model, handler=Written((layer, head, t, j))) - before
                said = found.layers[layer][head, t, j]
                torch.testing.assert_close(said, little, rtol=1e-2, atol=1e-6)
                if weights[j] < 0.01:
                    ratios.append(float(whole / said))
    assert len(ratios) > 20
    assert 0.95 < np.median(ratios) < 1.05
    assert np.mean(np.abs(np.array(ratios) - 1) < 0.2) > 0.9


def test_rows_of_weights_whose_sum_is_one_lose_nothing_by_a_common_part():
    """Σ_j A_j (g_j - Σ g A) = 0: E times 1 - A sums to nothing."""
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(50, 9, generator=draw, dtype=torch.float64).mul(3).softmax(-1)
    g = torch.randn(50, 9, generator=draw, dtype=torch.float64)
    torch.testing.assert_close((entries(a, g, False) * (1 - a)).sum(-1), torch.zeros(50).double())
    torch.testing.assert_close(entries(a, g + 7.0, False), entries(a, g, False))


def test_a_weight_of_nearly_one_is_exact_in_float32():
    draw = torch.Generator().manual_seed(0)
    scores = torch.randn(200, 16, generator=draw, dtype=torch.float64)
    scores[:, 3] += 18.0
    a, g = scores.softmax(-1), torch.randn(200, 16, generator=draw, dtype=torch.float64)
    expected = entries(a, g, False)
    rest = a.clone()
    rest[:, 3] = 0.0
    torch.testing.assert_close(expected[:, 3], a[:, 3] * ((rest * g).sum(-1) / rest.sum(-1) - g[:, 3]))
    found = entries(scores.float().softmax(-1), g.float(), False)
    torch.testing.assert_close(found[:, 3].double(), expected[:, 3], atol=1e-4, rtol=1e-4)


def test_samples_are_averaged_and_sorted_by_length():
    model = llama().double()
    ids = tokens(3, 12)
    together = spans.influence(model, [ids[:2], tokens(1, 8), ids[2]], block=4)
    assert [one.length for one in together] == [8, 12]
    alone = [spans.influence(model, [row], block=4)[0] for row in ids]
    for layer in range(2):
        mean = torch.stack([one.layers[layer] for one in alone]).mean(0)
        torch.testing.assert_close(together[1].layers[layer], mean)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.grad is not None for p in model.parameters())


def test_only_what_counts_moves_the_loss():
    model = llama().double()
    counted = torch.zeros(1, 21, dtype=torch.bool)
    counted[0, 7] = True
    (found,) = spans.influence(model, [Sample(IDS, counted)], block=1)
    for layer in found.layers:
        assert layer[:, 8:].abs().max() == 0.0  # later queries have no part in it
        assert layer[:, :8].abs().max() > 0.0
    assert found.layers[1][:, :7].abs().max() == 0.0  # in the last layer, the query itself alone


def drawn(seed=0, layers=2, heads=2, lengths=(32, 64), block=8):
    draw = torch.Generator().manual_seed(seed)
    return [
        Influence(
            n,
            block,
            tuple(
                torch.rand(heads, n // block, n // block, generator=draw, dtype=torch.float64).tril() ** 3
                for _ in range(layers)
            ),
            (1,) * layers,
        )
        for n in lengths
    ]


RULES = [(8.0, 0.0), (16.0, 0.0), (-8.0, 0.5), (0.0, 0.5), (0.0, 1.0)]


def brute(found, density, least, per_layer, rules=RULES):
    """Every choice that is allowed, with its losses, one head and one block at a time."""
    units = [(n, h) for n, x in enumerate(found[0].layers) for h in range(len(x))]
    table = {}
    for one, (n, h), r in itertools.product(found, units, range(len(rules))):
        blocks = one.length // one.block
        s = max(1, int((rules[r][0] + rules[r][1] * one.length) // one.block))
        x = one.layers[n][h]
        table[one.length, (n, h), r] = sum(
            abs(float(x[i, j])) for i in range(blocks) for j in range(1, i + 1) if i - j >= s
        )
        table[one.length, r] = min(s + 1, blocks) / blocks
    for picked in itertools.product(range(len(rules)), repeat=len(units)):
        if any(
            len({r for r, (m, _) in zip(picked, units, strict=True) if m == n}) > per_layer
            for n in range(len(found[0].layers))
        ):
            continue
        kept = [sum(table[one.length, r] for r in picked) / len(units) for one in found]
        if all(least * density - 1e-9 <= x <= density + 1e-9 for x in kept):
            yield tuple(
                sum(table[one.length, u, r] for u, r in zip(units, picked, strict=True)) for one in found
            )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("per_layer", [1, 2])
def test_one_length_is_solved_exactly(seed, per_layer):
    found = drawn(seed, lengths=(64,))
    (plan,) = spans.search(found, 0.5, rules=RULES, least=0.5, per_layer=per_layer)
    best = min(brute(found, 0.5, 0.5, per_layer))
    np.testing.assert_allclose(plan.losses, best)
    assert plan.densities[0] <= 0.5 + 1e-9
    assert all(len(set(zip(a.tolist(), b.tolist(), strict=True))) <= per_layer for a, b in pairs(plan))


def pairs(plan):
    return list(zip(plan.alpha, plan.beta, strict=True))


@pytest.mark.parametrize("seed", range(2))
def test_two_lengths_give_plans_that_none_beats(seed):
    found = drawn(seed)
    plans = spans.search(found, 0.6, rules=RULES, least=0.5, points=7)
    allowed = set(brute(found, 0.6, 0.5, 2))
    front = [x for x in allowed if not any(y != x and y[0] <= x[0] and y[1] <= x[1] for y in allowed)]
    assert len(plans) > 1
    for plan in plans:
        assert any(np.allclose(plan.losses, x) for x in front)
        assert all(x <= 0.6 + 1e-9 for x in plan.densities)
    np.testing.assert_allclose(plans[0].losses[1], min(x[1] for x in allowed))
    np.testing.assert_allclose(min(plan.losses[0] for plan in plans), min(x[0] for x in allowed))


def test_no_plan_of_one_rule_for_all_loses_less():
    found = drawn(3, layers=3, heads=4, lengths=(128,))
    for rule in spans.candidates([128], step=16, slopes=5):
        everywhere = spans.search(found, 1.0, rules=[rule], least=0.0)[0]
        own = spans.search(
            found, everywhere.densities[0], rules=spans.candidates([128], step=16, slopes=5), least=0.0
        )[0]
        assert own.losses[0] <= everywhere.losses[0] + 1e-9


def test_what_a_plan_says_is_what_its_selectors_read():
    (found,) = spans.influence(llama().double(), [tokens(1, 60)], block=4)
    rules = spans.candidates([60], step=4, slopes=5)
    plan = spans.search([found], 0.4, rules=rules, shared=False)[0]
    lost = kept = 0.0
    for selector, x in zip(plan.selectors(), found.layers, strict=True):
        read = ph.reference("spans")(
            60, 60, alpha=selector.alpha.tolist(), beta=selector.beta.tolist(), first=4, rows=4, cols=4
        )
        lost += float(x.abs().masked_fill(read, 0.0).sum())
        kept += float(read.sum(-1).amax(-1).sum() / 15)
    np.testing.assert_allclose(plan.losses[0], lost)
    np.testing.assert_allclose(plan.densities[0], kept / 8)
    assert plan.kept(60).flat.mean() == pytest.approx(60 * plan.densities[0])


def test_heads_that_share_keys_share_a_rule_which_costs_the_worst_of_them():
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(4, 8, 8, generator=draw, dtype=torch.float64).tril()
    found = [Influence(64, 8, (x,), (2,))]
    (plan,) = spans.search(found, 0.6, rules=RULES, least=0.0)
    assert plan.alpha[0][0] == plan.alpha[0][1]
    assert plan.alpha[0][2] == plan.alpha[0][3]
    worst = [
        max(
            sum(float(x[h, i, j]) for i in range(8) for j in range(1, i + 1) if i - j >= s)
            for h in (2 * g, 2 * g + 1)
        )
        for g, s in enumerate(
            max(1, int((plan.alpha[0][2 * g] + 64 * plan.beta[0][2 * g]) // 8)) for g in (0, 1)
        )
    ]
    np.testing.assert_allclose(plan.losses[0], sum(worst))


def test_candidates_are_those_of_the_paper():
    found = spans.candidates([2048, 4096, 8192], longest=12288)
    assert (0.0, 1.0) in found
    assert (1024.0, 0.0) in found
    assert all(a + b * 2048 > 0 for a, b in found)
    assert all(a + b * n <= n for a, b in found for n in (2048, 4096, 8192, 12288))
    assert {b for _, b in found} <= {n / 8 for n in range(9)}
    alphas = np.linspace(-2048, 8192, 11)  # (8192 + 2048) / 1024 + 1 of them
    expected = [
        (a, b)
        for a in alphas
        for b in np.linspace(0, 1, 9)
        if a + b * 2048 > 0 and all(a + b * n <= n for n in (2048, 4096, 8192, 12288))
    ]
    assert found == expected


@torch.no_grad()
def test_a_plan_goes_through_json_into_a_model():
    model = llama()
    (found,) = spans.influence(model, [tokens(1, 40)], block=4)
    plan = spans.search([found], 0.5, rules=spans.candidates([40], step=4, slopes=5))[0]
    again = ph.from_json(json.loads(json.dumps(ph.to_json(plan), allow_nan=False)))
    assert again == plan
    dense = model(IDS, use_cache=False).logits
    with ph.sparse(model, again.selectors()):
        cut = model(IDS, use_cache=False).logits
    with ph.sparse(model, SpanPlan((torch.zeros(4),) * 2, (torch.ones(4),) * 2, 4).selectors()):
        whole = model(IDS, use_cache=False).logits
    torch.testing.assert_close(whole, dense, atol=1e-5, rtol=1e-4)
    assert (cut - dense).abs().max() > 1e-3


def test_a_cache_of_a_plan_keeps_spans_and_frees_the_rest():
    model, ids = tiny.llama(), tiny.tokens(2, 40)  # 6 heads in 3 pairs, 3 layers
    alpha = (torch.tensor([8.0, 1.0, 2.0, 2.0, -4.0, 13.0]), None, torch.full((6,), 4.0))
    beta = (torch.tensor([0.0, 0.0, 0.25, 0.0, 0.25, 0.0]), None, torch.zeros(6))
    plan = SpanPlan(alpha, beta, 4)
    windows = [[8, 8, 12], [1, 1, 1], [4, 4, 4]]  # at 30 tokens, of whole blocks, the longer one of a pair
    full = [[False] * 3, [True] * 3, [False] * 3]
    cache = plan.cache(model, 30)
    with torch.no_grad():
        parts = [ids[:, :30], *ids[:, 30:].split(1, 1)]
        found = torch.cat([model(one, past_key_values=cache).logits for one in parts], 1)
    torch.testing.assert_close(found, tiny.masked_forward(model, ids, full, 4, windows), rtol=0, atol=1e-9)
    assert cache.held() == [[12, 12, 16], [40] * 3, [8] * 3]
    assert plan.cache(model, 30, prefill="dense").layers[0].dense


def test_a_cache_of_a_plan_of_another_model_is_refused():
    plan = SpanPlan((torch.ones(4),) * 2, (torch.zeros(4),) * 2, 4)
    with pytest.raises(ConfigError, match="plan is of 2 layers .* LlamaForCausalLM has 3"):
        plan.cache(tiny.llama(), 30)
    plan = SpanPlan((torch.ones(4),) * 3, (torch.zeros(4),) * 3, 4)
    with pytest.raises(ConfigError, match="plan is of 4 heads in layer 0, .* has 6"):
        plan.cache(tiny.llama(), 30)
    with pytest.raises(ConfigError, match="length"):
        plan.cache(tiny.llama(), 0)


def test_a_plan_is_known_where_nothing_of_it_was_imported():
    plan = SpanPlan((torch.ones(4), None), (torch.zeros(4), None), 4)
    code = "import json, sys, polyhead as ph; print(ph.from_json(json.load(sys.stdin)).selectors()[1])"
    data = json.dumps(ph.to_json(plan))
    done = subprocess.run(
        [sys.executable, "-c", code], input=data, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "None"


def test_plans_are_put_in_the_order_of_the_loss():
    model = llama()
    whole = SpanPlan((torch.zeros(4),) * 2, (torch.ones(4),) * 2, 4)
    none = SpanPlan((torch.ones(4),) * 2, (torch.zeros(4),) * 2, 4)
    with torch.no_grad():
        answers = model.generate(IDS[:, :4], max_new_tokens=30, min_new_tokens=30, do_sample=False)
    # the dense model's own answers: what reads as it does loses least
    assert spans.validated(model, [none, whole], [answers]) == [whole, none]


def test_wrong_input_is_said():
    model = llama()
    with pytest.raises(UnsupportedModel, match="influence are for decoders|influence"):
        spans.influence(t5(), [IDS])
    with pytest.raises(UnsupportedModel, match="no causal self-attention"):
        spans.influence(bert(), [IDS])
    with pytest.raises(ConfigError, match="at least one sample"):
        spans.influence(model, [])
    with pytest.raises(ShapeError, match="counted must be bool of the shape of ids"):
        spans.influence(model, [Sample(IDS, torch.ones(1, 3, dtype=torch.bool))])
    with pytest.raises(ConfigError, match="not at its last token"):
        spans.influence(model, [Sample(IDS, torch.ones(1, 21, dtype=torch.bool))])
    with pytest.raises(ConfigError, match="a sample must be token ids"):
        spans.influence(model, ["text"])
    found = drawn(lengths=(64,))
    with pytest.raises(ConfigError, match="no choice was found that keeps between 0.18 and 0.2"):
        spans.search(found, 0.2, rules=RULES)
    for wrong in ([(1.0, float("nan"))], 5, [(1, "a")], [], [1.0], "ab", [(1.0, 0.0, 0.0)]):
        with pytest.raises(ConfigError, match="rules must be pairs"):
            spans.search(found, 0.5, rules=wrong)
    with pytest.raises(ConfigError, match="each of another length"):
        spans.search(found * 2, 0.5, rules=RULES)
    with pytest.raises(ConfigError, match="density must be a finite number above 0 and at most 1"):
        spans.search(found, 0.0)
    with pytest.raises(ConfigError, match="search: found must be what influence"):
        spans.search([], 0.5)
