"""The kernels on tensors: memory, grids, and the sums over what the programs leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from polyhead.attend.across_heads import HeadMix
from polyhead.attend.problem import Problem
from polyhead.attend.stream import OwnGradients
from polyhead.attend.triton_heads import kernels
from polyhead.attend.triton_heads.sizes import Sizes, near

__all__ = ["backward", "forward"]


@dataclass
class _Call:
    """A call as the kernels take it: contiguous tensors, and the numbers and constants of every launch."""

    q: Tensor
    k: Tensor
    v: Tensor
    before: Tensor
    after: Tensor
    padding: Tensor
    numbers: tuple[int | float, ...]
    constants: dict[str, Any]
    sizes: Sizes

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, problem: Problem) -> _Call:
        batch, heads, queries, width = q.shape
        kv_heads, keys = k.shape[1:3]
        sizes, seen = Sizes.of(heads, kv_heads, max(width, v.shape[-1]), q.dtype), near(problem.mask)
        assert seen is not None
        nothing = q.new_empty(1, dtype=torch.float32)
        before, after = (
            part.matrix.detach().to(nothing).contiguous() if isinstance(part, HeadMix) else None
            for part in (problem.score, problem.weight_map)
        )
        far = queries + keys  # farther than any pair is apart
        padding = nothing
        if seen.real is not None:
            padding = seen.real.to(q.device, torch.uint8).expand(batch, keys).contiguous()
        full = q.dtype == torch.float32
        constants = {
            "D": width,
            "BEFORE": before is not None,
            "PADDED": seen.real is not None,
            "G": sizes.kv_heads,
            "REP": sizes.repeat,
            "GP": sizes.padded_kv,
            "RP": sizes.padded_repeat,
            "M": sizes.rows,
            "N": sizes.cols,
            "HX": sizes.rank,
            "DB": sizes.step,
            "DOT": "ieee",
            # three products of rounded numbers: nearly as exact as float32, on the tensor cores
            "MIX": "ieee" if full else "tf32x3",
            "WIDE": q.dtype == torch.bfloat16 and triton.knobs.runtime.interpret,
            "num_warps": sizes.warps,
            "num_stages": 1,
        }
        left, right = (far if side is None else max(-far, min(side, far)) for side in (seen.left, seen.right))
        return cls(
            q.contiguous(),
            k.contiguous(),
            v.contiguous(),
            nothing if before is None else before,
            nothing if after is None else after,
            padding,
            (queries, keys, left, right, problem.scale),
            constants,
            sizes,
        )

    @property
    def row_programs(self) -> int:
        """Programs that hold M rows each."""
        return self.q.shape[0] * -(-self.q.shape[2] // self.sizes.rows)

    @property
    def key_programs(self) -> int:
        """Programs that hold N keys each."""
        return self.k.shape[0] * -(-self.k.shape[2] // self.sizes.cols)

    def run(self, kernel: Any, programs: int, *tensors: Tensor, width: int = 0, **more: Any) -> None:
        """Launch a kernel; `width`: of the output, whose columns programs divide among them."""
        constants, pieces = self.constants | more, 1
        if width:
            columns = self.sizes.columns(width)
            constants, pieces = constants | {"DC": columns}, -(-width // columns)
        kernel[(programs, pieces)](*tensors, *self.numbers, **constants)

    def log_sum_exp(self) -> Tensor:
        """That of every row's mixed logits, `(B, H, L)`."""
        lse = self.q.new_empty(self.q.shape[:3], dtype=torch.float32)
        self.run(kernels.lse_kernel, self.row_programs, self.q, self.k, self.before, self.padding, lse)
        return lse

    def shares(self) -> Tensor:
        """Room for the gradient of a matrix, a share for each program."""
        rank = self.sizes.rank
        return self.q.new_empty(self.row_programs, rank, rank, dtype=torch.float32)

    def matrix(self, shares: Tensor) -> Tensor:
        """The gradient `(H, H)` of a matrix from the shares of that of matrix ⊗ 1_F over padded heads."""
        s = self.sizes
        total = shares.sum(0)
        padded = s.padded_kv * s.padded_repeat
        parts = s.rank // padded  # F
        total = total.view(padded, parts, padded, parts).diagonal(dim1=1, dim2=3).sum(-1)
        total = total.view(s.padded_kv, s.padded_repeat, s.padded_kv, s.padded_repeat)
        heads = s.kv_heads * s.repeat
        return total[: s.kv_heads, : s.repeat, : s.kv_heads, : s.repeat].reshape(heads, heads)


def _on(device: torch.device) -> Any:
    """The device of the tensors as the current one, which is where Triton launches."""
    return torch.cuda.device(device) if device.type == "cuda" else torch.no_grad()


def forward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, *, want_lse: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Output `(B, H, L, Dv)` and, if wanted, log-sum-exp `(B, H, L)` of the mixed logits."""
    with _on(q.device):
        call = _Call.of(q, k, v, problem)
        lse = call.log_sum_exp()
        out = q.new_empty(*q.shape[:3], v.shape[-1])
        call.run(
            kernels.out_kernel, call.row_programs,
            call.q, call.k, call.v, call.before, call.after, call.padding, lse, out,
            width=v.shape[-1], DV=v.shape[-1], AFTER=problem.weight_map is not None,
        )  # fmt: skip
    return out, lse if want_lse else None


def backward(
    q: Tensor, k: Tensor, v: Tensor, problem: Problem, grad: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, dict[int, Tensor]]:
    """Gradients for q, k and v, and by `id` for the matrices that require one."""
    with _on(q.device):
        call, own = _Call.of(q, k, v, problem), OwnGradients(problem)
        up, lse = grad.to(q.dtype).contiguous(), call.log_sum_exp()
        width, v_width = q.shape[-1], v.shape[-1]
        more = {"DV": v_width, "AFTER": problem.weight_map is not None}
        delta, before, after = torch.empty_like(lse), call.shares(), call.shares()
        inputs = (call.q, call.k, call.v, call.before, call.after, call.padding, lse, up)
        split = {"SPLIT": call.sizes.split}
        call.run(kernels.delta_kernel, call.row_programs, *inputs, delta, after, **split, **more)
        if grad_lse is not None:
            delta -= grad_lse
        dq, dk, dv = torch.empty_like(call.q), torch.zeros_like(call.k), torch.zeros_like(call.v)
        rows, keys = call.row_programs, call.key_programs
        call.run(kernels.queries_kernel, rows, *inputs, delta, dq, before, width=width, **split, **more)
        call.run(kernels.keys_kernel, keys, *inputs, delta, dk, width=width, **more)
        no_values = (call.q, call.k, call.before, call.after, call.padding, lse, up)
        call.run(kernels.values_kernel, keys, *no_values, dv, width=v_width, **more)
        for part, shares in ((problem.score, before), (problem.weight_map, after)):
            if isinstance(part, HeadMix) and part.matrix.requires_grad:
                own.add(part.matrix, call.matrix(shares).to(part.matrix.device))
    return dq, dk, dv, own.done()
