"""One token over a long context, cut into parts for the threads of a CPU."""

import pytest
import torch
import torch.nn.functional as F

from polyhead.cache import one_token
from polyhead.cache.one_token import attend_one


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
    monkeypatch.setattr(one_token, "_SHORTEST", 16)
    threads(count)
    torch.manual_seed(0)
    q = torch.randn(batch, 3 * kv_heads, 1, 16, dtype=dtype)
    k, v = (torch.randn(batch, kv_heads, keys + 9, 16, dtype=dtype)[:, :, :keys] for _ in range(2))
    expected = F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)
    close = {"rtol": 0.016, "atol": 4e-3} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(attend_one(q, k, v, 0.3), expected, **close)


def test_the_context_is_cut_only_where_that_helps(threads):
    def parts(batch, kv_heads, keys):
        k = torch.empty(batch, kv_heads, keys, 16)
        return one_token._parts(torch.empty(batch, kv_heads, 1, 16), k, k)

    threads(2)
    assert parts(1, 1, 8192) == parts(1, 3, 8192) == 2
    assert parts(1, 2, 8192) == parts(2, 1, 8192) == parts(1, 1, 2000) == 1
    threads(1)
    assert parts(1, 1, 8192) == 1
