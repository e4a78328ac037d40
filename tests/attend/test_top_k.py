"""Top-k softmax: which logits it keeps, whatever the row, and what a call of it needs."""

import math

import pytest
import torch

import polyhead as ph
from polyhead.attend.top_k import kth_largest
from polyhead.errors import BackendRefused, ConfigError


def rows(columns, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 2, 5, columns, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("columns", [5, 63, 64, 67, 513, 2048])
@pytest.mark.parametrize("k", [1, 4, 31])
def test_the_kth_largest_is_that_of_a_sort(columns, k):
    if k > columns:
        k = columns
    z = rows(columns)
    z[0, 0, 0] = 1.5  # all alike
    z[0, 0, 1] = -math.inf
    z[0, 0, 2, 2:] = -math.inf  # fewer than k
    z[0, 0, 3] = z[0, 0, 3].round()  # many ties
    z[0, 0, 4] = torch.arange(columns).flip(0)  # the largest side by side
    expected = z.sort(-1, descending=True).values[..., k - 1 : k]
    assert torch.equal(kth_largest(z, k), expected)


@pytest.mark.parametrize("columns", [40, 700])
@pytest.mark.parametrize("shift", [0.0, -3e4, 3e4])
def test_keeps_the_k_largest_and_no_other(columns, shift):
    z = rows(columns) + shift
    weights = ph.top_k(7)(z)
    distinct = (z.sort(-1).values.diff() > 0).all(-1)
    kept = weights > 0
    smallest = torch.where(kept, z, math.inf).amin(-1)
    largest_dropped = torch.where(kept, -math.inf, z).amax(-1)
    assert (kept.sum(-1)[distinct] == 7).all()
    assert (kept.sum(-1) >= 7).all()
    assert (smallest > largest_dropped).all()
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 5))
    ratio = (z - z.amax(-1, keepdim=True)).exp() * weights.amax(-1, keepdim=True)
    torch.testing.assert_close(weights[kept], ratio[kept], rtol=1e-5, atol=1e-7)


def test_equal_logits_are_kept_together():
    z = torch.tensor([3.0, 1.0, 2.0, 2.0, 0.0, 2.0]).expand(1, 1, 1, 6)
    weights = ph.top_k(2)(z)
    assert (weights > 0).flatten().tolist() == [True, False, True, True, False, True]
    assert weights[0, 0, 0, 2] == weights[0, 0, 0, 3] == weights[0, 0, 0, 5]


def test_rows_of_k_or_fewer_are_softmax():
    z = rows(40)
    z[..., 6:] = -math.inf
    torch.testing.assert_close(ph.top_k(6)(z), torch.softmax(z, -1))
    torch.testing.assert_close(ph.top_k(9)(z), torch.softmax(z, -1))
    assert torch.equal(ph.top_k(40)(rows(40)), torch.softmax(rows(40), -1))
    far = rows(40, dtype=torch.float64)
    far[..., 2:] = -math.inf
    far[..., 1] = far[..., 0] - 600  # a weight that float64 still holds
    torch.testing.assert_close(ph.top_k(6)(far), torch.softmax(far, -1), rtol=1e-12, atol=0)


def test_dropped_keys_get_no_gradient():
    z = rows(50, dtype=torch.float64).requires_grad_()
    weights = ph.top_k(4)(z)
    (grad,) = torch.autograd.grad(weights, z, torch.randn_like(weights))
    assert torch.equal(grad[weights == 0], torch.zeros_like(grad[weights == 0]))
    assert (grad[weights > 0] != 0).all()


def test_attend_equals_the_dense_form_where_rows_are_long():
    """More columns than the groups need, causal, grouped heads, padding."""
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, heads, 300, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2))
    real = torch.arange(300) < torch.tensor([[300], [211]])
    leaves = [x.requires_grad_() for x in (q, k, v)]
    up = torch.randn(2, 4, 300, 8, generator=generator, dtype=torch.float64)
    found = []
    for backend in ("tiles", "reference"):
        out = ph.attend(*leaves, mask=ph.causal() & ph.padding(real), normalizer=ph.top_k(6), backend=backend)
        found.append((out, *torch.autograd.grad(out, leaves, up)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_runs_in_tiles_and_has_no_log_sum_exp():
    q, k, v = (torch.randn(1, 2, 400, 8) for _ in range(3))
    with ph.strict():
        assert ph.explain(q, k, v, mask=ph.causal(), normalizer=ph.top_k(8)).backend == "tiles"
    with pytest.raises(BackendRefused, match=r"return_lse is defined for softmax only, not for TopK"):
        ph.attend(q, k, v, normalizer=ph.top_k(8), return_lse=True, backend="tiles")


@pytest.mark.parametrize("k", [0, -1, 2.5, None, True])
def test_k_is_checked(k):
    with pytest.raises(ConfigError, match=r"k must be"):
        ph.top_k(k)


def test_a_module_with_top_k_decodes_as_it_reads():
    torch.manual_seed(0)
    module = ph.build("mha", dim=32, heads=4, normalizer=ph.top_k(3)).eval()
    x = torch.randn(2, 20, 32)
    whole = module(x, mask=ph.causal())
    cache = module.new_cache(2, max_length=20)
    steps = [module(x[:, n : n + 1], mask=ph.causal(), cache=cache) for n in range(20)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-4, atol=1e-5)
    assert ph.from_json(ph.to_json(module.config)) == module.config
