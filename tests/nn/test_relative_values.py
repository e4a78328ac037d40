"""Values by distance are what a sum over all pairs gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from close import close
from polyhead.nn.relative_values import by_distance, table_flops, tabled

F64 = {"dtype": torch.float64}


@pytest.mark.parametrize("reach", [1, 2, 5, 40])
@pytest.mark.parametrize(
    "keys", [torch.arange(9), torch.arange(-6, 3), torch.tensor([-30, -29, -4, -2, -1, 0, 3, 7, 8])]
)
def test_weights_are_summed_by_clipped_distance(reach: int, keys: torch.Tensor) -> None:
    weights = torch.randn(2, 3, 6, 9, generator=torch.Generator().manual_seed(0), **F64).requires_grad_()
    expected = torch.zeros(2, 3, 6, 2 * reach + 1, **F64)
    for i in range(6):
        for n, j in enumerate(keys.tolist()):
            expected[:, :, i, max(-reach, min(j - i, reach)) + reach] += weights[:, :, i, n]
    found = by_distance(weights, keys, reach)
    close(found, expected)
    (flow,) = torch.autograd.grad(found.sin().sum(), weights, retain_graph=True)
    (wanted,) = torch.autograd.grad(expected.sin().sum(), weights)
    close(flow, wanted)


def test_without_keys_all_sums_are_zero() -> None:
    assert by_distance(torch.zeros(2, 4, 0), torch.arange(0), 3).shape == (2, 4, 7)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("queries", "mixed"), [(1, True), (50, False)])
def test_a_table_is_mixed_or_mapped_first(queries: int, mixed: bool, bias: bool) -> None:
    torch.manual_seed(0)
    sums, table = torch.randn(2, 6, queries, 33, **F64), torch.randn(33, 16, **F64)
    to_values = nn.Linear(16, 12, bias, **F64)
    values = to_values(table).unflatten(-1, (3, 4)).transpose(0, 1).repeat_interleave(2, 0)  # 6 33 4
    close(tabled(sums, table, to_values, 3), sums @ values)
    mixing = 2 * queries * 6 * 16 * (33 + 4)
    mapping = 33 * 16 * 3 * 4 + 2 * queries * 6 * 33 * 4
    assert (mixing < mapping) == mixed
    assert table_flops(2 * queries, 6, table, to_values, 3) == 2 * min(mixing, mapping)
