"""Mixture of heads: what its paper says must hold, and that what is not chosen is not computed."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import polyhead as ph
from close import close
from flops import counting
from polyhead.errors import ConfigError, UnknownName
from polyhead.nn import auxiliary_losses, routed_heads
from polyhead.nn.chosen_rows import Group, Lane
from polyhead.nn.routed_heads import keys_of
from polyhead.nn.routing import load_balance, top_k

F64 = {"dtype": torch.float64}
X = torch.randn(3, 40, 32, generator=torch.Generator().manual_seed(0), **F64)


@pytest.fixture(autouse=True)
def _rows_are_packed_however_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(routed_heads, "SHORT", 0)


def built(name: str = "moh", seed: int = 0, **config: object) -> nn.Module:
    torch.manual_seed(seed)
    return ph.build(name, **{"dim": 32, "heads": 8, **config}, **F64).eval()


def dense(module: nn.Module, x: Tensor, *given: Tensor, **call: object) -> Tensor:
    """All heads of plain attention with the same weights, times the gates: nothing is left out."""
    options = {
        name: getattr(module.config, name)
        for name in ("heads", "kv_heads", "qk_norm", "bias", "position", "score", "normalizer", "mask")
    }
    plain = built("grouped_query", seed=9, **options)
    state = plain.state_dict()
    plain.load_state_dict({key: value for key, value in module.state_dict().items() if key in state})
    gates = module.choice(x).gates.transpose(1, 2)[..., None]
    plain.output.register_forward_pre_hook(lambda _, inputs: (inputs[0] * gates,))
    return plain(x, *given, **call)


WIDTHS = [(0, 1), (0, 4), (1, 2), (2, 2), (2, 6), (3, 2), (4, 4), (5, 1), (7, 1), (8, 0)]


@pytest.mark.parametrize("router", ["learned", "query_norm"])
@pytest.mark.parametrize(("shared", "k"), WIDTHS)
def test_gathering_equals_computing_all_heads_and_masking(shared: int, k: int, router: str) -> None:
    for kv_heads in (8, 4, 1):
        module = built(shared_heads=shared, top_k=k, kv_heads=kv_heads, router=router)
        twin = ph.reference("moh")
        options = {
            n: getattr(module.config, n)
            for n in ("heads", "kv_heads", "shared_heads", "top_k", "router", "rescale", "renormalise")
        }
        lower = torch.ones(40, 40, dtype=torch.bool).tril()
        close(module(X, mask=ph.causal()), dense(module, X, mask=ph.causal()))
        close(
            module(X, mask=ph.causal())[:1],
            twin(X[:1], parameters=module.state_dict(), mask=lower, **options),
        )
        close(module(X[:, :5], X), dense(module, X[:, :5], X))


@pytest.mark.parametrize(
    "options",
    [
        {"position": ph.nn.rope()},
        {"position": ph.nn.alibi_position(), "kv_heads": 2},
        {"position": ph.nn.sinusoidal(), "bias": True},
        {"position": ph.nn.rope(), "qk_norm": True, "bias": True},
        {"score": ph.soft_cap(2.0)},
        {"score": ph.score_function(lambda s, b, h, i, j: s - 0.1 * h * (i - j) * (1 + b))},
        {"normalizer": ph.entmax(1.5)},
        {"normalizer": ph.softmax(sink=torch.linspace(-1, 1, 8, dtype=torch.float64))},
        {"mask": ph.per_head([ph.causal() & ph.window(n) for n in range(3, 11)])},
        {"mask": ph.documents(torch.arange(40) // 15), "kv_heads": 4},
    ],
    ids=lambda o: " ".join(o),
)
def test_every_part_works_on_the_chosen_rows(options: dict[str, object]) -> None:
    module = built(shared_heads=3, top_k=2, **options)
    real = torch.ones(3, 40, dtype=torch.bool)
    real[1, :7] = False
    for mask in (None, ph.causal()):
        with torch.no_grad():
            close(module(X, mask=mask), dense(module, X, mask=mask))
            expected = dense(module, X, mask=mask, padding=real)
            close(module(X, mask=mask, padding=real)[real], expected[real])
    with torch.no_grad():
        full = module(X, mask=ph.causal())
        for batch in (1, 3):
            cache, parts = module.new_cache(batch), []
            for x in X[:batch].split([30, *[1] * 10], dim=1):
                parts.append(module(x, mask=ph.causal(), cache=cache))
            close(torch.cat(parts, dim=1), full[:batch])
    where = torch.stack([torch.arange(40) + 3 * n for n in range(3)])
    if isinstance(options.get("position"), type(ph.nn.rope())):
        close(module(X, positions=where), dense(module, X, positions=where))


def test_gradients_are_those_of_the_dense_form() -> None:
    module = built(shared_heads=2, top_k=2, kv_heads=4, position=ph.nn.rope())
    found = torch.autograd.grad(module(X, mask=ph.causal()).sin().sum(), list(module.parameters()))
    gates = module.choice(X).gates.transpose(1, 2)[..., None]
    q, (k, v) = module.projection.queries(X), module.projection.keys_values(X)
    q, k = module.position.turn(q, 0), module.position.turn(k, 0)
    heads = ph.attend(q, k, v, mask=ph.causal(), backend="reference") * gates
    y = heads.transpose(1, 2).flatten(2) @ module.output.weight.T
    for one, two in zip(found, torch.autograd.grad(y.sin().sum(), list(module.parameters())), strict=True):
        close(one, two, 1e-11)


def test_uniform_routers_and_all_heads_make_it_multi_head_attention() -> None:
    module, plain = built(shared_heads=2, top_k=6), built("mha", seed=5)
    with torch.no_grad():
        for name, p in module.named_parameters():
            if name.startswith("router"):
                p.zero_()
    plain.load_state_dict({n: p for n, p in module.state_dict().items() if not n.startswith("router")})
    close(module.choice(X).gates, torch.ones(3, 40, 8, **F64))
    close(module(X, mask=ph.causal()), plain(X, mask=ph.causal()))


@pytest.mark.parametrize(("shared", "k"), WIDTHS)
def test_gates(shared: int, k: int) -> None:
    module = built(shared_heads=shared, top_k=k)
    gates, active, r = module.choice(X)
    assert ((gates != 0).sum(-1) == shared + k).all()
    assert torch.equal(gates != 0, active)
    assert active[..., :shared].all()
    close(gates.sum(-1).mean(), torch.tensor(float(shared + k), **F64), 0.5 * (shared + k))
    if shared and k and module.router.split is not None:
        split = module.router.split(X).softmax(-1)
        close(gates[..., :shared].sum(-1), 2 * split[..., 0] * shared)
        close(gates[..., shared:].sum(-1), 2 * split[..., 1] * k)
    if k:
        assert torch.equal(active[..., shared:], top_k(r, k))
    published = built(shared_heads=shared, top_k=k, rescale=False, renormalise=False)
    raw = published.choice(X).gates[..., shared:]
    part = published.router.split(X).softmax(-1)[..., 1:] if shared and k else 1.0
    close(raw, r * active[..., shared:] * part)


def test_of_equal_scores_the_first_are_chosen() -> None:
    assert top_k(torch.tensor([[1.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]), 2).tolist() == [
        [False, True, True, False],
        [True, True, False, False],
    ]


def test_a_choice_depends_on_its_own_token_alone() -> None:
    module = built()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for found, expected in zip(module.choice(X[:, order]), module.choice(X), strict=True):
        assert torch.equal(found, expected[:, order])


# ---- nothing is computed for what was not chosen ----


def chosen_by_first_feature(**config: object) -> nn.Module:
    """Tokens with a positive first feature choose head 2 of the routed ones, others head 0, nobody head 1."""
    module = built(heads=4, shared_heads=1, top_k=1, **config)
    with torch.no_grad():
        module.router.routed.weight.zero_()
        module.router.routed.weight[:, 0] = torch.tensor([-1.0, -9.0, 1.0], **F64)
        module.router.routed.weight[1, 0] = 0.0
        module.router.routed.weight[1, 1] = -1e9
    return module


def test_what_no_token_chose_is_not_touched() -> None:
    module = chosen_by_first_feature()
    x = X.clone()
    x[..., 1] = 1.0
    width = module.head_dim
    head = slice(2 * width, 3 * width)  # the second routed head
    expected = module(x, mask=ph.causal())
    with torch.no_grad():
        module.projection.query.weight[head] = float("nan")
        module.output.weight[:, head] = float("nan")
    found = module(x, mask=ph.causal())
    assert torch.equal(found, expected)
    flow = torch.autograd.grad(found.sum(), [module.projection.query.weight, module.output.weight])
    assert flow[0][head].abs().max() == 0
    assert flow[1][:, head].abs().max() == 0
    cache = module.new_cache(3)
    stepped = [module(t, mask=ph.causal(), cache=cache) for t in x.split(1, dim=1)]
    close(torch.cat(stepped, dim=1), expected)


@pytest.mark.parametrize("skew", [0.0, 3.0])
@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_operations_are_those_of_active_heads_however_uneven_the_load(skew: float, router: str) -> None:
    counts = {}
    for k in (2, 6):
        module = built(dim=64, shared_heads=2, top_k=k, router=router)
        x = torch.randn(2, 700, 64, generator=torch.Generator().manual_seed(1), **F64)
        with torch.no_grad():  # some heads are chosen by nearly every token, others by few
            size = torch.linspace(1, 1 + skew, 8, **F64).repeat_interleave(8)[:, None]
            module.projection.query.weight.mul_(size)
            if router == "learned":
                x[..., 0] = 1.0
                module.router.routed.weight[:, 0] = torch.linspace(0, skew, 6, **F64)
        counter = counting()
        with torch.no_grad(), counter:
            module(x, mask=ph.window(700, 700))
        said = module.cost(700, batch=2)
        assert said.flops <= counter.get_total_flops() <= 1.1 * said.flops
        counts[k] = said
    plain = built("mha", dim=64).cost(700, batch=2)
    assert 2 * counts[2].scores == plain.scores
    assert 2 * counts[2].values == plain.values
    assert counts[2].cache_bytes == plain.cache_bytes
    assert counts[6].scores == plain.scores
    assert counts[2].projections < plain.projections + 2 * 2 * 700 * 64 * 10


def test_one_step_of_decoding_takes_the_active_heads_only() -> None:
    for batch in (1, 6):
        module, plain = built(shared_heads=2, top_k=2), built("mha")
        counted = {}
        for name, one in (("moh", module), ("mha", plain)):
            cache = one.new_cache(batch)
            with torch.no_grad():
                one(X[:1].repeat(batch, 8, 1), mask=ph.causal(), cache=cache)
                counter = FlopCounterMode(display=False)
                with counter:
                    one(X[:1, :1].repeat(batch, 1, 1), mask=ph.causal(), cache=cache)
            counted[name] = counter.get_flop_counts()["Global"]
        for kind in (torch.ops.aten.mm, torch.ops.aten.addmm):
            if kind in counted["mha"]:
                routers = 2 * batch * 32 * (2 + 6 + 2)
                assert counted["moh"][kind] <= counted["mha"][kind] * 3 / 4 + routers


# ---- losses ----


def test_balance_is_k_where_the_load_is_even_and_more_where_it_is_not() -> None:
    even = torch.full((12, 4), 0.25, **F64)
    chosen = torch.eye(4, dtype=torch.bool).repeat(3, 1) | torch.eye(4, dtype=torch.bool).roll(1, 1).repeat(
        3, 1
    )
    close(load_balance(even, chosen), torch.tensor(2.0, **F64))
    scores = (3 * torch.randn(200, 4, generator=torch.Generator().manual_seed(0), **F64)).softmax(-1)
    scores = scores * torch.tensor([4.0, 1.0, 1.0, 1.0], **F64)
    scores = scores / scores.sum(-1, keepdim=True)
    assert load_balance(scores, top_k(scores, 2)) > 2.05


@pytest.mark.parametrize("router", ["learned", "query_norm"])
def test_the_balance_loss_is_left_in_training_and_reaches_every_routed_head(router: str) -> None:
    module = built(shared_heads=2, top_k=2, router=router, balance=0.5).train()
    module(X, mask=ph.causal())
    ((name, loss),) = auxiliary_losses(module).items()
    assert name == "balance"
    choice = module.choice(X)
    close(loss, 0.5 * load_balance(choice.scores, choice.active[..., 2:]))
    weight = module.router.routed.weight if router == "learned" else module.projection.query.weight
    (flow,) = torch.autograd.grad(loss, weight, retain_graph=True)
    rows = flow if router == "learned" else flow.unflatten(0, (8, -1))[2:].flatten(1)
    assert (rows.abs().amax(1) > 0).all()
    module.eval()(X)
    assert auxiliary_losses(module) == {}


def test_padding_does_not_count_in_the_balance() -> None:
    module = built().train()
    real = torch.ones(3, 40, dtype=torch.bool)
    real[:, 30:] = False
    module(X.masked_fill(~real[..., None], float("nan")), padding=real)
    padded = auxiliary_losses(module)["balance"]
    module(X[:, :30])
    close(padded, auxiliary_losses(module)["balance"])
    module(X[:, :20], X, padding=real)  # padding of a context says nothing of the queries
    one = auxiliary_losses(module)["balance"]
    module(X[:, :20])
    close(one, auxiliary_losses(module)["balance"])


def test_training_can_be_compiled() -> None:
    torch._dynamo.reset()
    module = built().train()
    torch.compile(module, backend="eager")(X, mask=ph.causal())
    found = auxiliary_losses(module)["balance"]
    module(X, mask=ph.causal())
    close(found, auxiliary_losses(module)["balance"])
    torch._dynamo.reset()


# ---- the lengths of queries as routers ----


def test_the_longest_queries_are_chosen_and_gates_are_one() -> None:
    module = built(router="query_norm", shared_heads=4, top_k=2, position=ph.nn.rope())
    gates, active, _ = module.choice(X)
    lengths = module.projection.queries(X).norm(dim=-1).transpose(1, 2)[..., 4:]
    assert torch.equal(active[..., 4:], lengths >= lengths.sort(-1).values[..., -2:-1])
    assert torch.equal(gates, active.to(gates.dtype))
    assert not list(module.router.parameters())
    assert set(module.state_dict()) == set(built("mha").state_dict())


def test_in_training_gates_pass_their_gradient_straight_through() -> None:
    module = built(router="query_norm", shared_heads=4, top_k=2).train()
    queries = torch.randn(2, 8, 5, 4, **F64, requires_grad=True)
    x = torch.zeros(2, 5, 32, **F64)
    gates, active, r = module.router(x, queries)
    close(gates.detach(), active.double())
    up = torch.randn(2, 5, 8, **F64)
    (found,) = torch.autograd.grad((gates * up).sum(), queries, retain_graph=True)
    (expected,) = torch.autograd.grad((r * up[..., 4:] * active[..., 4:]).sum(), queries)
    close(found, expected)
    assert not module.eval().router(x, queries).gates.requires_grad


@pytest.mark.parametrize(
    ("lanes", "view"),
    [
        ([(2, 0), (3, 0), (4, 0)], True),  # heads of one sequence
        ([(3, 0), (3, 1), (3, 2)], True),  # one head of several
        ([(0, 0), (4, 0)], True),
        ([(5, 1)], True),
        ([(0, 0), (1, 0), (4, 0)], False),
        ([(1, 0), (2, 1)], False),
    ],
)
def test_keys_of_lanes_are_read_where_they_lie(lanes: list[tuple[int, int]], view: bool) -> None:
    k = torch.randn(3, 9, 6, 4).transpose(1, 2)  # as a projection splits heads
    v = torch.randn(3, 6, 9, 5)
    group = Group(
        tuple(Lane(head, item, 0, 1) for head, item in lanes),
        1,
        torch.zeros(len(lanes), 1, dtype=torch.int64),
    )
    keys, values = keys_of(group, k, v, 0, 6)
    for made, source in ((keys, k), (values, v)):
        assert (made.untyped_storage().data_ptr() == source.untyped_storage().data_ptr()) == view
        assert torch.equal(made[0], torch.stack([source[item, head] for head, item in lanes]))


@pytest.mark.parametrize("name", ["moh", "moa_heads"])
@pytest.mark.parametrize("position", [ph.nn.no_position(), ph.nn.alibi_position()])
def test_short_sequences_go_through_all_heads_with_the_same_answers(
    name: str, position: ph.nn.Position, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = built(name, position=position).train()
    x = torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(1), **F64)
    real = torch.arange(9) < torch.tensor([[9], [4], [7]])

    def run(short: int) -> list[Tensor]:
        monkeypatch.setattr(routed_heads, "SHORT", short)
        own = x.clone().requires_grad_()
        with counting() as counter:
            y = module(own, mask=ph.causal(), padding=real)
        module.zero_grad()
        (y.square().sum() + sum(auxiliary_losses(module).values())).backward()
        seen.append(counter.get_total_flops())
        return [y.detach(), own.grad, *(p.grad.clone() for p in module.parameters() if p.grad is not None)]

    seen: list[int] = []
    for packed, dense in zip(run(0), run(1 << 20), strict=True):
        close(dense, packed)
    assert seen[0] != seen[1]


# ---- refusals ----


def test_refusals() -> None:
    with pytest.raises(UnknownName, match="did you mean 'query_norm'"):
        built(router="query_nrm")
    with pytest.raises(ConfigError, match="shared_heads must be at most 8; got 9"):
        built(shared_heads=9)
    with pytest.raises(ConfigError, match=r"top_k \(with 6 heads to choose from\) must be at most 6"):
        built(shared_heads=2, top_k=7)
    with pytest.raises(ConfigError, match=r"top_k \(with 6 heads to choose from\) must be at least 1"):
        built(shared_heads=2, top_k=0)
    with pytest.raises(ConfigError, match="kv_heads must divide heads=8"):
        built(kv_heads=16)
    with pytest.raises(ConfigError, match="qk_norm makes all queries equally long"):
        built(router="query_norm", qk_norm=True)
    with pytest.raises(ConfigError, match="qk_norm must be True or False; got a tensor"):
        built(qk_norm=torch.ones(3))
    with pytest.raises(ConfigError, match="score must treat every head by itself"):
        built(score=ph.head_mix(torch.eye(8)))
    with pytest.raises(ConfigError, match="balance must be"):
        built(balance=-1.0)
