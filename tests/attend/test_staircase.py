"""Rows picked out of a causal call, cut into rectangles: every pair once, and the dense form's numbers."""

import pytest
import torch

import polyhead as ph
from polyhead.attend.backends import staircase
from polyhead.attend.masks import gathered
from polyhead.errors import BackendRefused, PolyheadError


def picked(heads, rows, keys, *, seed=0, order=True):
    generator = torch.Generator().manual_seed(seed)
    found = torch.stack([torch.randperm(keys, generator=generator)[:rows] for _ in range(heads)])
    return found.sort(1).values if order else found


LAYOUTS = {
    "even": picked(3, 200, 600),
    "without order": picked(3, 200, 600, order=False),
    "first and last": torch.stack([torch.arange(200), torch.arange(400, 600), torch.arange(0, 600, 3)]),
    "repeated at the end": picked(3, 200, 600).clamp(max=420),
    "before the first key and behind the last": picked(3, 200, 600) * 2 - 300,
    "nothing": torch.full((3, 200), -1),
    "one row": torch.full((3, 200), 511),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_pieces_hold_every_pair_once(layout):
    positions = LAYOUTS[layout]
    count = torch.zeros(3, 200, 600)
    for rows, columns, added in staircase._pieces(positions, 600, torch.float32):
        seen = 1.0 if added is None else (added[0] == 0).float()
        count[:, rows, columns] += seen
        assert added is None or added.numel() <= 3 * staircase._ROWS * 600
    assert torch.equal(count, (torch.arange(600) <= positions[..., None]).float())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equals_the_dense_form(layout, dtype):
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 3, n, 8, generator=generator, dtype=dtype) for n in (200, 600, 600))
    k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (k, v))  # as a projection makes them
    leaves = [x.requires_grad_() for x in (q, k, v)]
    up = torch.randn(q.shape, generator=generator, dtype=dtype)
    mask = gathered(ph.causal(), LAYOUTS[layout], first=400)
    found = []
    for backend in ("staircase", "reference"):
        out = ph.attend(*leaves, mask=mask, scale=0.7, backend=backend)
        found.append((out, *torch.autograd.grad(out, leaves, up)))
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_gradients_that_are_expanded_or_transposed():
    q, k, v = (torch.randn(1, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (200, 600, 600))
    mask = gathered(ph.causal(), LAYOUTS["even"], first=400)
    found = []
    for backend in ("staircase", "reference"):
        out = ph.attend(q.mT.contiguous().mT, k.mT.contiguous().mT, v, mask=mask, backend=backend)
        found.append(torch.autograd.grad(out.sum() + out.mT.cumsum(-1).sum(), (q, k, v)))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_when_it_runs():
    q, k, v = (torch.randn(1, 3, n, 8) for n in (200, 600, 600))
    mask = gathered(ph.causal(), LAYOUTS["even"], first=400)
    assert ph.explain(q, k, v, mask=mask).backend == "staircase"
    for call, reason in (
        ({"mask": ph.causal()}, "not a causal mask over queries"),
        ({"mask": gathered(ph.window(9), LAYOUTS["even"], first=400)}, "not a causal mask over queries"),
        ({"mask": mask, "score": ph.alibi(3)}, "no score maps"),
        ({"mask": mask, "normalizer": ph.softmax(sink=0.0)}, "by plain softmax"),
        ({"mask": mask, "dropout": 0.1}, "no dropout"),
        ({"mask": mask, "return_lse": True}, "log-sum-exp"),
    ):
        with pytest.raises(BackendRefused, match=reason):
            ph.attend(q, k, v, backend="staircase", **call)
    with pytest.raises(BackendRefused, match="float32 and float64 on a CPU, not for torch.bfloat16"):
        ph.attend(*(x.bfloat16() for x in (q, k, v)), mask=mask, backend="staircase")
    few = gathered(ph.causal(), LAYOUTS["even"][:, :9], first=591)
    assert "would not be quicker" in ph.explain(q[:, :, :9], k, v, mask=few).refused["staircase"]


def test_no_second_derivative():
    q, k, v = (torch.randn(1, 3, n, 8, requires_grad=True) for n in (200, 600, 600))
    out = ph.attend(q, k, v, mask=gathered(ph.causal(), LAYOUTS["even"], first=400), backend="staircase")
    with pytest.raises(PolyheadError, match="create_graph"):
        torch.autograd.grad(out.sum(), q, create_graph=True)
