"""A norm whose second row lies where nothing is: run under compute-sanitizer, to see that it sees our kernels.

A gigabyte off, because small allocations lie side by side: 60 rows too many ended inside the result, and nothing was
found.
"""

from __future__ import annotations

import torch

from rmsnorm_patch import ops
from rmsnorm_patch.numerics.spec import FP32_WEIGHT_MULTIPLY


class FarApart:
    """Claims two rows, the second a gigabyte behind the first."""

    def __init__(self, x: torch.Tensor) -> None:
        self.__cuda_array_interface__ = {
            "shape": (2, x.shape[1]),
            "strides": (2**30, x.element_size()),
            "typestr": "<f2",
            "data": (x.data_ptr(), False),
            "version": 3,
        }


if __name__ == "__main__":
    x, weight = (torch.ones(*shape, dtype=torch.float16, device="cuda") for shape in ((1, 1024), (1024,)))
    ops.bind_rms_norm(FP32_WEIGHT_MULTIPLY, "cuda")(torch.as_tensor(FarApart(x), device="cuda"), weight, 1e-6)
    torch.cuda.synchronize()
