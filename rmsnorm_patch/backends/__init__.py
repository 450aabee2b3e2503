"""What computes a norm: CUDA kernels, Triton kernels. Which one serves a call is `ops.dispatch`'s choice."""
