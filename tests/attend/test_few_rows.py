"""Few rows over a long context, cut into parts for the threads of a CPU."""

import pytest
import torch
import torch.nn.functional as F

import polyhead as ph
from polyhead.attend import few_rows as file
from polyhead.attend.few_rows import attend_one, few_rows, parts_for


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("kv_heads", [1, 2, 3])
@pytest.mark.parametrize("keys", [40, 64, 97])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_sdpa(monkeypatch, threads, count, kv_heads, keys, batch, dtype):
    monkeypatch.setattr(file, "_SHORTEST", 16)
    threads(count)
    torch.manual_seed(0)
    q = torch.randn(batch, 3 * kv_heads, 1, 16, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, keys + 9, 16, dtype=dtype)[:, :, :keys] for _ in range(2))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    close = {"rtol": 0.016, "atol": 4e-3} if dtype == torch.bfloat16 else {}
    found = attend_one(q, k, v, 0.3)
    assert (found is None) == (parts_for(batch * kv_heads, keys) == 1)
    torch.testing.assert_close(ph.attend(q, k, v, scale=0.3), expected, **close)


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("keys", [31, 64, 97])
def test_what_is_added_and_the_log_sum_exp(monkeypatch, threads, count, keys):
    monkeypatch.setattr(file, "_SHORTEST", 16)
    threads(count)
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, n, 16, dtype=torch.float64) for n in (3, keys, keys))
    added = torch.randn(1, 3, keys, dtype=torch.float64)
    added[:, 0, : keys // 2 + 1] = -1e30  # a whole part that a row does not see
    out, lse = few_rows(q, k, v, added, 0.3)
    scores = 0.3 * q @ k.mT + added
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(out, scores.softmax(-1) @ v)


def test_the_context_is_cut_only_where_that_helps(threads):
    threads(2)
    assert parts_for(1, 8192) == parts_for(3, 8192) == 2
    assert parts_for(2, 8192) == parts_for(9, 8192) == parts_for(1, 1000) == 1
    threads(16)
    assert parts_for(3, 16384) == 16
    assert parts_for(12, 16384) == 4
    assert parts_for(12, 1024) == 2
    threads(1)
    assert parts_for(1, 8192) == 1


def test_what_has_to_be_asked_of_sdpa(monkeypatch, threads):
    monkeypatch.setattr(file, "_SHORTEST", 16)
    threads(2)
    q, k, v = (torch.randn(1, n, s, 16) for n, s in ((3, 1), (1, 64), (1, 64)))
    assert attend_one(q, k, v, None) is not None
    assert attend_one(q.requires_grad_(), k, v, None) is None
    with torch.no_grad():
        assert attend_one(q, k, v, None) is not None
    q = q.detach()
    assert attend_one(q, k, torch.randn(1, 1, 64, 8), None) is None
    assert attend_one(q, k.mT.contiguous().mT, v, None) is None
    with torch.autocast("cpu"):
        assert attend_one(q, k, v, None) is None
    apart = [torch.randn(2, 4, 64, 16)[:, ::2] for _ in range(2)]
    assert attend_one(torch.randn(2, 6, 1, 16), *apart, None) is None
