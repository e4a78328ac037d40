"""What takes a compiler or a GPU: the same mechanisms, compiled by inductor, and on CUDA."""

from __future__ import annotations

import pytest
import torch

import polyhead as ph
from conformance.contract import Call, Case, call, close

NAMES = [entry.name for entry in ph.catalog()]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_inductor_gives_the_same_answer_and_gradient(name: str) -> None:
    case = Case(ph.entry(name))
    for pattern in case.patterns():
        module = case.build(head_dim=16, dtype=torch.float32)
        torch._dynamo.reset()
        compiled = torch.compile(module)
        for length in (33, 50):
            c = call(module, pattern, length=length, dtype=torch.float32)
            x = c.x.requires_grad_()
            found = Call(x, c.context, c.mask)(compiled)
            expected = Call(x, c.context, c.mask)(module)
            close(found, expected, 1e-5)
            (one,), (two,) = (torch.autograd.grad(y.sin().sum(), x) for y in (found, expected))
            close(one, two, 1e-4)
    torch._dynamo.reset()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cuda_gives_the_answer_of_the_cpu(name: str, dtype: torch.dtype) -> None:
    case = Case(ph.entry(name))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for pattern in case.patterns():
        module = case.build(head_dim=16, dtype=dtype)
        c = call(module, pattern, length=33, dtype=dtype)
        with torch.no_grad():
            exact = Call(c.x.double(), None if c.context is None else c.context.double(), c.mask)
            expected = exact(case.build(head_dim=16))
            module = module.cuda()
            on_gpu = Call(c.x.cuda(), None if c.context is None else c.context.cuda(), c.mask)
            close(on_gpu(module).cpu(), expected, tolerance)
            real = torch.ones(2, 33, dtype=torch.bool, device="cuda")
            real[1, :4] = False
            close(on_gpu(module, padding=real)[0].cpu(), expected[0], tolerance)
            if pattern == "causal_self":
                for cache in (
                    module.new_cache(2),
                    module.new_cache(2, window=33),
                    module.new_cache(2, max_length=33),
                ):
                    parts = [on_gpu(module, x=x, cache=cache) for x in on_gpu.x.split([20, *[1] * 13], dim=1)]
                    close(torch.cat(parts, dim=1).cpu(), expected, tolerance)
