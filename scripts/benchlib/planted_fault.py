"""A norm over 60 rows more than its operand has: run under compute-sanitizer, to see that it sees our kernels."""

from __future__ import annotations

import torch

from rmsnorm_patch import ops
from rmsnorm_patch.semantics import FP32_WEIGHT_MULTIPLY


class TooLong:
    """Claims 64 rows at the address of 4."""

    def __init__(self, x: torch.Tensor) -> None:
        shape = (64, x.shape[1])
        self.__cuda_array_interface__ = {"shape": shape, "typestr": "<f2", "data": (x.data_ptr(), False), "version": 3}


if __name__ == "__main__":
    x, weight = (torch.ones(*shape, dtype=torch.float16, device="cuda") for shape in ((4, 1024), (1024,)))
    ops.bind_rms_norm(FP32_WEIGHT_MULTIPLY, "cuda")(torch.as_tensor(TooLong(x), device="cuda"), weight, 1e-6)
    torch.cuda.synchronize()
