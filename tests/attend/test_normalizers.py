"""Normalisers against their twins, the entmax package, transformers, and the properties that define them."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from polyhead.attend import entmax as rows
from polyhead.attend import entmax_rows, normalizers
from polyhead.attend.normalizers import entmax, sigmoid, softmax, sparsemax
from polyhead.attend.top_k import TopK, top_k
from polyhead.description import from_json, to_json
from polyhead.errors import ConfigError, ShapeError
from polyhead.reference import normalizers as naive

ALPHAS = (1.01, 1.2, 1.5, 1.75, 2.0)
EVERY = (
    softmax(),
    softmax(sink=0.3),
    softmax(sink=torch.tensor([0.5, -1.0, 2.0])),
    sigmoid(),
    sigmoid(bias=-1.5),
    sigmoid(bias=torch.tensor([0.5, -1.0, 2.0])),
    top_k(1),
    top_k(3),
    sparsemax(),
    *(entmax(a) for a in ALPHAS),
    entmax(torch.tensor([1.1, 1.5, 2.0])),
)


def scores(*shape, dtype=torch.float64, scale=2.0, seed=0):
    return (
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
        * scale
    )


def twin_rows(normalizer, z):
    """The weights (B, H, r, c) row by row from the naive twin."""
    out = torch.zeros_like(z, dtype=torch.float64)
    for b, h, i in torch.cartesian_prod(*map(torch.arange, z.shape[:3])).tolist():
        row = z[b, h, i]

        def of_head(value, h=h):
            return value[h].item() if isinstance(value, torch.Tensor) else value

        match normalizer:
            case normalizers.Softmax():
                out[b, h, i] = naive.softmax(row, sink=of_head(normalizer.sink))
            case normalizers.Sigmoid():
                out[b, h, i] = naive.sigmoid(row, bias=of_head(normalizer.bias) or 0.0)
            case TopK():
                out[b, h, i] = naive.top_k(row, k=normalizer.k)
            case normalizers.Entmax():
                out[b, h, i] = naive.entmax(row, alpha=of_head(normalizer.alpha))
    return out


@pytest.mark.parametrize("normalizer", EVERY, ids=repr)
def test_equals_the_naive_twin(normalizer):
    z = scores(2, 3, 3, 17)
    z[0, 1, 2, 5:] = -math.inf
    z[1, 0, 0, 1:] = -math.inf
    expected = twin_rows(normalizer, z)
    torch.testing.assert_close(normalizer.weights(z.clone()), expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(normalizer(z), expected, rtol=1e-9, atol=1e-9)
    single = normalizer.weights(z.float())
    torch.testing.assert_close(single.double(), expected, rtol=0, atol=5e-6)


@pytest.mark.parametrize("normalizer", EVERY, ids=repr)
def test_vjp_is_the_derivative(normalizer):
    """Called as a function, a normaliser is its own weights() and vjp(): gradcheck tests both."""
    spec, tensors = normalizer.flatten()
    tensors = tuple(t.double().requires_grad_() for t in tensors)
    if any((t == 2).any() for t in tensors):  # alpha must stay in range when it is perturbed
        tensors = (torch.tensor([1.1, 1.5, 1.9], dtype=torch.float64, requires_grad=True),)
    z = scores(2, 3, 2, 6).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, *t: spec.unflatten(t)(z), (z, *tensors))


@pytest.mark.parametrize("normalizer", EVERY, ids=repr)
def test_rows_that_see_nothing(normalizer):
    """They must neither raise nor reach another row, nor the gradients of the part's own tensors."""
    spec, tensors = normalizer.flatten()
    tensors = tuple(t.double().requires_grad_() for t in tensors)
    z = scores(1, 3, 4, 9)
    z[0, :, 2] = -math.inf
    z.requires_grad_()
    weights = spec.unflatten(tensors)(z)
    assert torch.equal(weights[0, :, 2], torch.zeros(3, 9, dtype=torch.float64))
    others = [0, 1, 3]
    alone = normalizer.to(dtype=torch.float64)(z[:, :, others])
    torch.testing.assert_close(weights[:, :, others], alone)
    up = scores(1, 3, 4, 9, seed=1)
    got = torch.autograd.grad(weights, (z, *tensors), up)
    assert torch.equal(got[0][0, :, 2], torch.zeros(3, 9, dtype=torch.float64))
    z_alone = z.detach()[:, :, others].clone().requires_grad_()
    expected = torch.autograd.grad(spec.unflatten(tensors)(z_alone), (z_alone, *tensors), up[:, :, others])
    torch.testing.assert_close(got[0][:, :, others], expected[0])
    for a, b in zip(got[1:], expected[1:], strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("normalizer", EVERY, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forbidden_pairs_weigh_exactly_nothing(normalizer, dtype):
    z = scores(2, 3, 4, 70, dtype=dtype)
    forbidden = scores(2, 3, 4, 70, seed=3) > 0.5
    weights = normalizer.weights(z.masked_fill(forbidden, -math.inf))
    assert weights.dtype == dtype
    assert torch.equal(weights[forbidden], torch.zeros_like(weights[forbidden]))
    assert (weights >= 0).all()
    assert (weights > 0).any(-1).all()


@pytest.mark.parametrize("normalizer", EVERY, ids=repr)
def test_description_round_trip(normalizer):
    again = from_json(to_json(normalizer))
    assert again == normalizer
    assert hash(again) == hash(normalizer)
    spec, tensors = normalizer.flatten()
    assert spec.unflatten(tensors) == normalizer


@pytest.mark.parametrize("normalizer", EVERY, ids=repr)
@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (1, 3, 0, 5), (1, 3, 4, 0), (1, 3, 4, 1)])
def test_empty_and_single(normalizer, shape):
    assert normalizer(torch.zeros(shape)).shape == shape


# softmax and sigmoid


def test_sink_equals_gpt_oss():
    """transformers' eager attention of GPT-OSS with its learned sinks, grouped heads and a causal mask."""
    modeling = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    sinks = scores(4)
    q, k, v = scores(2, 4, 5, 8), scores(2, 2, 5, 8, seed=1), scores(2, 2, 5, 8, seed=2)
    hidden = torch.full((5, 5), -math.inf, dtype=torch.float64).triu(1)
    module = SimpleNamespace(num_key_value_groups=2, sinks=sinks, training=False)
    out, weights = modeling.eager_attention_forward(module, q, k, v, hidden, scaling=0.3)
    logits = 0.3 * q @ k.repeat_interleave(2, 1).transpose(-1, -2) + hidden
    mine = softmax(sink=sinks)(logits)
    torch.testing.assert_close(mine, weights)
    torch.testing.assert_close((mine @ v.repeat_interleave(2, 1)).transpose(1, 2), out)


@pytest.mark.parametrize("sink", [None, 0.7, torch.tensor([0.5, -1.0], dtype=torch.float64)], ids=str)
def test_lse_is_the_log_of_the_denominator(sink):
    z = scores(3, 2, 4, 5)
    z[0, 0, 0] = -math.inf
    lse = softmax(sink=sink).lse(z)
    torch.testing.assert_close((z - lse[..., None]).exp().nan_to_num(0.0), softmax(sink=sink)(z))
    if sink is None:
        assert lse[0, 0, 0] == -math.inf


def test_lse_vjp_adds_the_share_of_the_sink():
    sink = scores(2, seed=5).requires_grad_()
    z = scores(3, 2, 4, 5).requires_grad_()
    part = softmax(sink=sink)
    up = scores(3, 2, 4, seed=7)
    expected = torch.autograd.grad(part.lse(z), (z, sink), up)
    weights = part(z).detach()
    own = part.lse_vjp(weights, up[..., None], (torch.ones(2, dtype=torch.float64),))
    torch.testing.assert_close(weights * up[..., None], expected[0])
    torch.testing.assert_close(own[0] - 1, expected[1])
    assert softmax().lse_vjp(weights, up[..., None], ()) == ()


def test_weights_of_large_logits():
    z = torch.tensor([[[[1e4, 1e4 - 1, -1e4], [3e38, -3e38, 3e38], [-3e38, -3e38, -3e38]]]])
    for normalizer in (softmax(), sparsemax(), entmax(1.5), entmax(1.2)):
        weights = normalizer(z)
        torch.testing.assert_close(weights.sum(-1), torch.ones(1, 1, 3))
        torch.testing.assert_close(weights[0, 0, 1], torch.tensor([0.5, 0.0, 0.5]))
        torch.testing.assert_close(weights[0, 0, 2], torch.full((3,), 1 / 3))
    torch.testing.assert_close(sigmoid()(z)[0, 0, 1], torch.tensor([1.0, 0.0, 1.0]))


# α-entmax: the lines that its description says must hold


def row_values():
    number = st.floats(-30, 30, allow_nan=False, width=32)
    return st.lists(
        st.one_of(number, st.just(-math.inf), st.sampled_from([0.0, 1.0])), min_size=1, max_size=40
    )


@settings(max_examples=60, deadline=None)
@given(row_values(), st.sampled_from([1.05, 1.3, 1.5, 1.9, 2.0]), st.floats(-20, 20), st.randoms())
def test_entmax_properties(values, alpha, shift, random):
    z = torch.tensor(values, dtype=torch.float64)
    weights = rows.entmax(z, alpha)
    seen = z > -math.inf
    assert (weights >= 0).all()
    assert torch.equal(weights[~seen], torch.zeros_like(weights[~seen]))
    if not seen.any():
        return
    torch.testing.assert_close(weights.sum(), torch.ones((), dtype=torch.float64), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.entmax(z + shift, alpha), weights, rtol=0, atol=1e-9)  # translation
    order = list(range(len(values)))
    random.shuffle(order)
    torch.testing.assert_close(rows.entmax(z[order], alpha), weights[order], rtol=0, atol=1e-12)
    rising = weights[z.argsort()]
    assert (rising.diff() >= -1e-15).all()  # order is kept
    torch.testing.assert_close(weights, naive.entmax(z, alpha=alpha), rtol=0, atol=1e-10)


@settings(max_examples=40, deadline=None)
@given(row_values())
def test_sorted_closed_forms(values):
    z = torch.tensor(values, dtype=torch.float64)
    torch.testing.assert_close(rows.sparsemax(z), naive.sparsemax(z), rtol=0, atol=1e-12)
    torch.testing.assert_close(rows.entmax15(z), naive.entmax15(z), rtol=0, atol=1e-11)
    torch.testing.assert_close(naive.entmax(z, alpha=1.5), naive.entmax15(z), rtol=0, atol=1e-11)
    torch.testing.assert_close(naive.entmax(z, alpha=2.0), naive.sparsemax(z), rtol=0, atol=1e-11)


def test_nears_softmax_as_alpha_nears_one():
    z = scores(20, 30)
    torch.testing.assert_close(rows.entmax(z, 1.001), z.softmax(-1), rtol=0, atol=1e-2)
    torch.testing.assert_close(rows.entmax(z, 1.00001), z.softmax(-1), rtol=0, atol=1e-4)


def test_sparser_as_alpha_grows():
    z = scores(50, 64)
    zeros = [(rows.entmax(z, a) == 0).sum(-1) for a in (1.1, 1.25, 1.5, 1.75, 2.0)]
    for fewer, more in itertools.pairwise(zeros):
        assert (more >= fewer).all()
    assert zeros[-1].double().mean() > zeros[0].double().mean() + 5


@pytest.mark.parametrize("columns", [1, 2, 63, 511, 512, 513, 1000, 1500])
@pytest.mark.parametrize("scale", [0.1, 1.0, 10.0])
def test_equals_the_entmax_package(columns, scale):
    package = pytest.importorskip("entmax")
    z = scores(40, columns, scale=scale)
    z[3, columns // 2 + 1 :] = -math.inf
    z[5] = z[5].round()  # ties
    for alpha, exact in ((1.5, package.entmax15), (2.0, package.sparsemax)):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
            expected = exact(z, dim=-1)
            mine = rows.entmax(z.to(dtype), alpha)
            torch.testing.assert_close(mine.double(), expected, rtol=0, atol=tolerance)
    bisected = package.entmax_bisect(z, 1.2, dim=-1, n_iter=60)
    torch.testing.assert_close(rows.entmax(z, 1.2), bisected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_gradients_equal_the_entmax_package(dim):
    package = pytest.importorskip("entmax")
    z = scores(5, 6, 7)
    up = scores(5, 6, 7, seed=2)
    for mine, theirs in ((rows.entmax15, package.entmax15), (rows.sparsemax, package.sparsemax)):
        a, b = (z.clone().requires_grad_() for _ in range(2))
        mine(a, dim).backward(up)
        theirs(b, dim=dim).backward(up)
        torch.testing.assert_close(a.grad, b.grad)
    shape = [1] * 3
    alpha = torch.tensor(1.37, dtype=torch.float64).reshape(shape)
    (a, x), (b, y) = ((z.clone().requires_grad_(), alpha.clone().requires_grad_()) for _ in range(2))
    rows.entmax(a, x, dim).backward(up)
    package.entmax_bisect(b, y, dim=dim, n_iter=60).backward(up)
    torch.testing.assert_close(a.grad, b.grad)
    torch.testing.assert_close(x.grad, y.grad)


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_gradcheck_in_scores_and_alpha(dim):
    z = scores(3, 4, 5).requires_grad_()
    shape = [3, 4, 5]
    shape[dim] = 1
    alpha = (1.05 + 0.9 * torch.rand(shape, dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z, a: rows.entmax(z, a, dim), (z, alpha))
    one = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z, a: rows.entmax(z, a, dim), (z, one))


def test_alpha_gradient_holds_in_single_precision_near_one():
    z, up = scores(1, 8, 16, 100, scale=1.0), scores(1, 8, 16, 100, seed=4)
    alpha = torch.linspace(1.01, 2.0, 8, dtype=torch.float64).requires_grad_()
    (exact,) = torch.autograd.grad(entmax(alpha)(z), alpha, up)
    single = alpha.detach().float().requires_grad_()
    (got,) = torch.autograd.grad(entmax(single)(z.float()), single, up.float())
    torch.testing.assert_close(got.double(), exact, rtol=1e-3, atol=1e-3)


def test_rows_that_need_many_steps():
    """Doubling gaps, where each Newton step of sparsemax drops few columns: still exact."""
    z = -(2.0 ** -torch.arange(0, 60, 0.25, dtype=torch.float64)).repeat(3, 1)
    z[1] *= 0.02
    z[2] = -torch.logspace(-12, 0, 240, dtype=torch.float64)
    for row in z:
        torch.testing.assert_close(rows.sparsemax(row), naive.sparsemax(row), rtol=0, atol=1e-13)
        torch.testing.assert_close(rows.entmax15(row), naive.entmax15(row), rtol=0, atol=1e-12)


def test_many_rows_are_worked_on_in_pieces(monkeypatch):
    z, up = scores(37, 50), scores(37, 50, seed=1)
    alpha = torch.linspace(1.1, 1.9, 37, dtype=torch.float64)[:, None]

    def run():
        results = []
        for a in (1.5, 2.0, 1.3, alpha):
            leaf = z.clone().requires_grad_()
            own = a.clone().requires_grad_() if isinstance(a, torch.Tensor) else a
            weights = rows.entmax(leaf, own)
            weights.backward(up)
            results += [weights, leaf.grad, *([own.grad] if isinstance(own, torch.Tensor) else [])]
        return results

    whole = run()
    monkeypatch.setattr(entmax_rows, "_CHUNK", 120)
    for a, b in zip(run(), whole, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_scores_are_kept_and_nan_stays_in_its_row():
    z = scores(3, 40)
    z[1, 7] = math.nan
    before = z.clone()
    weights = rows.entmax(z, 1.5)
    assert torch.equal(z.nan_to_num(9.0), before.nan_to_num(9.0))
    assert weights[1].isnan().any()
    torch.testing.assert_close(weights[[0, 2]], rows.entmax(z[[0, 2]], 1.5))


@pytest.mark.parametrize("alpha", [1.5, 1.3])
def test_compiles_into_one_graph(alpha):
    z = scores(4, 30)
    compiled = torch.compile(lambda z: rows.entmax(2 * z, alpha), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(z), rows.entmax(2 * z, alpha))
    leaf, other = (z.clone().requires_grad_() for _ in range(2))
    compiled(leaf).square().sum().backward()
    rows.entmax(2 * other, alpha).square().sum().backward()
    torch.testing.assert_close(leaf.grad, other.grad)


# errors


@pytest.mark.parametrize("alpha", [1.0, 0.5, 2.1, math.nan, math.inf, torch.tensor([1.5, 2.5])], ids=str)
def test_alpha_out_of_range(alpha):
    with pytest.raises(ConfigError, match=r"alpha must lie in \(1, 2\], got"):
        entmax(alpha)
    with pytest.raises(ConfigError, match=r"alpha must lie in \(1, 2\], got"):
        rows.entmax(torch.zeros(2, 2), alpha)


def test_messages():
    with pytest.raises(
        ConfigError, match=r"sink must be a number or a floating-point tensor \(H,\), got .*\(2, 2\)"
    ):
        softmax(sink=torch.zeros(2, 2))
    with pytest.raises(ConfigError, match="bias must be a finite number, got inf"):
        sigmoid(bias=math.inf)
    with pytest.raises(
        ConfigError,
        match=r"alpha must be a number or a floating-point tensor, got a tensor .* of torch.int64",
    ):
        entmax(torch.tensor([2]))
    with pytest.raises(
        ShapeError, match=r"alpha must broadcast to scores of shape \(2, 3\) with size 1 along dim -1"
    ):
        rows.entmax(torch.zeros(2, 3), torch.full((3,), 1.5))
    with pytest.raises(ShapeError, match="scores must be a floating-point tensor"):
        rows.entmax(torch.zeros(3, dtype=torch.long))


@pytest.mark.parametrize("sink", [None, 0.5, torch.tensor([-1.0, 300.0])], ids=["none", "one", "by head"])
def test_the_log_sum_exp_comes_with_the_weights(sink: float | torch.Tensor | None) -> None:
    scores = 40 * torch.randn(3, 2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    scores[0, 0, 1, 2:] = -math.inf
    scores[1, 1, 2] = -math.inf  # a row that may look at nothing
    part = softmax() if sink is None else softmax(sink=sink)
    expected = part.lse(scores)
    weights, lse = part.weights_and_lse(scores.clone())
    torch.testing.assert_close(lse, expected, rtol=1e-12, atol=1e-12)
    some = scores.isfinite().any(-1)
    torch.testing.assert_close(weights[some], part.weights(scores.clone())[some])
    nothing = part.weights_and_lse(scores[..., :0].clone())[1]
    torch.testing.assert_close(nothing, part.lse(scores[..., :0]))
