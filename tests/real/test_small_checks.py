"""Small checks of papers on SmolLM2-135M-Instruct and all-MiniLM-L6-v2, without any training.

What papers do to trained models before they heal them by more training. What came out here is written down in
tools/checks/; the tests hold it, so that a change that alters it is noticed.
"""

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.heads import amplified
from polyhead.hf import attach
from polyhead.mechanisms.explicit_multihead import merged, virtual
from polyhead.tasks import held_out_text, sample_text
from polyhead.tasks.texts import sentences

pytestmark = pytest.mark.real
LAYERS, HEADS, GROUPS = 30, 9, 3


@pytest.fixture(scope="module")
def smollm2(smollm2):
    model, tokenizer = smollm2
    model.requires_grad_(False)
    return model, tokenizer(sample_text(), return_tensors="pt", verbose=False).input_ids[:, :200]


@pytest.fixture(scope="module")
def minilm(minilm):
    model, tokenizer = minilm
    model.requires_grad_(False)
    found = sentences(held_out_text())
    texts = [" ".join(found[n : n + 4]) for n in range(0, 64, 4)]
    return model, tokenizer(texts, return_tensors="pt", padding=True, truncation=True, max_length=128)


def loss(model, ids):
    return F.cross_entropy(model(ids, use_cache=False).logits[0, :-1], ids[0, 1:])


@torch.no_grad()
def nats(smollm2, handler=None):
    """Nats a token, with a handler at every layer."""
    if handler is None:
        return float(loss(*smollm2))
    with attach(smollm2[0], handler=handler):
        return float(loss(*smollm2))


@pytest.fixture(scope="module")
def plain(smollm2):
    return nats(smollm2)


def gated(gates):
    """A handler that multiplies the heads of every layer; `gates` (layers, heads)."""
    return lambda call: call.proceed() * gates[call.layer.index][:, None, None]


@pytest.fixture(scope="module")
def importance(smollm2):
    """|∂L/∂ξ| of a factor ξ of every head, as paper 054 has it, over eight pieces of text."""
    model, ids = smollm2
    factors = {}

    def watched(call):
        out = call.proceed()
        factors[call.layer.index] = one = out.new_ones(len(out), HEADS, 1, 1).requires_grad_()
        return out * one

    pieces = ids.view(8, 25)
    with attach(model, handler=watched):
        logits = model(pieces, use_cache=False).logits
        value = F.cross_entropy(logits[:, :-1].flatten(0, 1), pieces[:, 1:].flatten())
    grads = torch.autograd.grad(value, [factors[n] for n in range(LAYERS)])
    return torch.stack([g.flatten(1).abs().sum(0) for g in grads])


MECHANISMS = {
    "complex_rotation": {"kv_heads": GROUPS},
    "knocking_heads": {"kv_heads": GROUPS},
    "knocking_heads, linear": {"kv_heads": GROUPS, "knock": "linear", "on": ("q", "k", "v")},
    "explicit_multihead": {"stored_heads": GROUPS, "norm_at": None},
}


@pytest.mark.parametrize("name", MECHANISMS)
def test_what_starts_as_attention_takes_a_trained_layer_over(smollm2, name):
    model, ids = smollm2
    old = model.model.layers[7].self_attn
    new = ph.build(
        name.partition(",")[0], dim=576, heads=HEADS, position=ph.nn.rope(base=100000.0), **MECHANISMS[name]
    ).eval()
    trained = {
        f"projection.{one}.weight": getattr(old, f"{one[0]}_proj").weight for one in ("query", "key", "value")
    }
    missing, unknown = new.load_state_dict(trained | {"output.weight": old.o_proj.weight}, strict=False)
    assert missing  # what the mechanism adds, as it starts
    assert not unknown
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
        handle = old.register_forward_hook(
            lambda _, args, given, out: (new(given["hidden_states"], mask=ph.causal()), *out[1:]),
            with_kwargs=True,
        )
        after = model(ids, use_cache=False).logits
        new.output.weight.mul_(1.01)
        other = model(ids, use_cache=False).logits
        handle.remove()
    torch.testing.assert_close(after, before, rtol=0, atol=2e-3)
    assert (other - before).abs().max() > 0.02  # the hook is what answers


def test_choosing_heads_by_the_norms_of_queries_is_worse_than_by_lot_without_training(smollm2, plain):
    """Seven heads of nine for every token: the first of each group, and four of the other six (paper 002)."""
    draw = torch.Generator().manual_seed(0)

    def chosen(score):
        def handler(call):
            others = score(call).unflatten(1, (GROUPS, -1))[:, :, 1:].flatten(1, 2)
            kept = torch.zeros_like(others).scatter(1, others.topk(4, dim=1).indices, 1.0)
            gates = torch.cat([torch.ones_like(kept[:, :3, None]), kept.unflatten(1, (GROUPS, 2))], 2)
            return call.proceed() * gates.flatten(1, 2)[..., None]

        return handler

    by_norm = nats(smollm2, chosen(lambda call: call.q.norm(dim=-1)))
    by_lot = nats(smollm2, chosen(lambda call: torch.rand(call.q.shape[:3], generator=draw)))
    print(f"nats a token: all {plain:.3f}, by norm {by_norm:.3f}, by lot {by_lot:.3f}")
    assert plain + 0.3 < by_lot < by_norm - 0.3


def test_six_heads_of_nine_need_healing(smollm2, plain, importance):
    """The least important query head of every group left out, or the most important one (paper 008)."""
    grouped = importance.view(LAYERS, GROUPS, -1)

    def without(which):
        gates = torch.ones_like(grouped).scatter(2, which[..., None], 0.0)
        return nats(smollm2, gated(gates.flatten(1)))

    least, most = without(grouped.argmin(-1)), without(grouped.argmax(-1))
    print(f"nats a token: all {plain:.3f}, without the least {least:.3f}, without the most {most:.3f}")
    assert plain + 0.5 < least < most


def test_heads_of_smollm2_matter_unequally(smollm2, plain, importance):
    """Gini coefficient of the importance, and what a tenth of the heads is worth (paper 054)."""
    ordered, where = importance.flatten().sort()
    share = ordered.cumsum(0) / ordered.sum()
    gini = float(1 - 2 * share.mean() + 1 / len(share))

    def without(heads):
        return nats(smollm2, gated(torch.ones(LAYERS * HEADS).index_fill(0, heads, 0.0).view(LAYERS, HEADS)))

    tenth = len(where) // 10
    lot = torch.randperm(len(where), generator=torch.Generator().manual_seed(0))[:tenth]
    least, drawn, most = without(where[:tenth]), without(lot), without(where[-tenth:])
    print(f"gini {gini:.2f}; nats: all {plain:.3f}, least {least:.3f}, by lot {drawn:.3f}, most {most:.3f}")
    assert 0.3 < gini < 0.7
    assert most > max(least, drawn) + 1


def test_attention_of_smollm2_does_not_select(smollm2, plain):
    """Logits times 2, 4 and 16: a model whose heads pick single tokens would not mind (paper 026)."""
    found = []
    for factor in (2, 4, 16):
        with amplified(smollm2[0], factor):
            found.append(nats(smollm2) / plain)
    print("loss in times that of the model: " + ", ".join(f"{x:.2f}" for x in found))
    assert 1.05 < found[0] < found[1] < found[2]
    assert found[2] > 1.5


def test_two_virtual_heads_for_three(smollm2, plain):
    """Keys and values of three heads as combinations of two, against means and dropping one (paper 042)."""
    layers = [layer.self_attn for layer in smollm2[0].model.layers]
    maps = [(one, name) for one in layers for name in ("k_proj", "v_proj")]
    before = {where: getattr(*where).weight.data for where in maps}

    def factored(layer):
        module = ph.build("mha", dim=576, heads=GROUPS, head_dim=64)
        with torch.no_grad():
            module.projection.key.weight.copy_(layer.k_proj.weight)
            module.projection.value.weight.copy_(layer.v_proj.weight)
        new = merged(virtual(module, 2)).projection
        return {"k_proj": new.key.weight.data, "v_proj": new.value.weight.data}

    def shared(weight, mean):
        first, second, third = weight.view(GROUPS, 64, 576)
        one = (first + second) / 2 if mean else first
        return torch.cat([one, one, third])

    ways = {
        "virtual": {(one, name): weight for one in layers for name, weight in factored(one).items()},
        "mean": {where: shared(weight, True) for where, weight in before.items()},
        "dropped": {where: shared(weight, False) for where, weight in before.items()},
    }
    errors, losses = {}, {}
    for way, weights in ways.items():
        errors[way] = sum(
            float((w - before[at]).norm() / before[at].norm()) for at, w in weights.items()
        ) / len(maps)
        for (one, name), weight in weights.items():
            getattr(one, name).weight.data = weight
        losses[way] = nats(smollm2)
        for (one, name), weight in before.items():
            getattr(one, name).weight.data = weight
    print(f"nats: all {plain:.3f}; " + ", ".join(f"{w} {losses[w]:.2f}, error {errors[w]:.2f}" for w in ways))
    assert nats(smollm2) == plain
    assert errors["virtual"] < errors["mean"] < errors["dropped"]
    assert plain + 1 < losses["mean"] < losses["virtual"] < losses["dropped"]


def test_hierarchical_attention_keeps_more_of_sentence_embeddings_than_short_blocks(minilm):
    """Layers 1, 3 and 5 replaced: trees of four children, blocks of 4 and 16 tokens, means (paper 009)."""
    model, inputs = minilm
    real = inputs.attention_mask.bool()
    replaced = (1, 3, 5)

    @torch.no_grad()
    def embeddings():
        states, kept = model(**inputs).last_hidden_state, real[..., None].float()
        return F.normalize((states * kept).sum(1) / kept.sum(1), dim=-1)

    def answers(tree):
        def hook(_, args, given, out):
            return tree(args[0] if args else given["hidden_states"], padding=real), *out[1:]

        return hook

    def with_trees():
        handles = []
        for n in replaced:
            old = model.encoder.layer[n].attention.self
            tree = ph.build("hierarchical_self_attention", dim=384, heads=12, branch=4, bias=True).eval()
            with torch.no_grad():
                for name in ("query", "key", "value"):
                    getattr(tree.projection, name).weight.copy_(getattr(old, name).weight)
                    getattr(tree.projection, name).bias.copy_(getattr(old, name).bias)
                tree.output.weight.copy_(torch.eye(384))  # the model has its own behind
                tree.output.bias.zero_()
            handles.append(old.register_forward_hook(answers(tree), with_kwargs=True))
        found = embeddings()
        for handle in handles:
            handle.remove()
        return found

    def with_calls(change):
        def handler(call):
            return change(call).proceed() if call.layer.index in replaced else call.proceed()

        with attach(model, handler=handler):
            return embeddings()

    def blocks(width):
        return with_calls(
            lambda call: call.replace(
                mask=ph.blocks(width) if call.mask is None else call.mask & ph.blocks(width)
            )
        )

    plain = embeddings()
    found = {
        "trees": with_trees(),
        "blocks of 4": blocks(4),
        "blocks of 16": blocks(16),
        "means": with_calls(lambda call: call.replace(scale=0.0)),
    }
    near = {name: float((e * plain).sum(-1).mean()) for name, e in found.items()}
    pairs = torch.triu_indices(len(plain), len(plain), 1)
    places = {
        name: (e @ e.T)[pairs[0], pairs[1]].argsort().argsort().double()
        for name, e in (found | {"plain": plain}).items()
    }
    order = {
        name: float(torch.corrcoef(torch.stack([places[name], places["plain"]]))[0, 1]) for name in found
    }
    print(", ".join(f"{name}: cosine {near[name]:.2f}, ranks {order[name]:.2f}" for name in found))
    for score in (near, order):
        assert score["blocks of 16"] > score["trees"] > max(score["means"], score["blocks of 4"])


def test_heads_of_minilm_share_hardly_any_projection(minilm):
    """The nearest shared map times a vector for each head: a rank of one per coordinate (paper 041)."""
    errors = []
    for layer in minilm[0].encoder.layer:
        for name in ("query", "key", "value"):
            rows = getattr(layer.attention.self, name).weight.view(12, 32, 384).transpose(0, 1)
            squares = torch.linalg.svdvals(rows).square()
            errors.append(float((squares[:, 1:].sum() / squares.sum()).sqrt()))
    print(f"relative errors from {min(errors):.2f} to {max(errors):.2f}")
    assert min(errors) > 0.8
    assert max(errors) < (11 / 12) ** 0.5  # what unrelated rows of one size have at most
