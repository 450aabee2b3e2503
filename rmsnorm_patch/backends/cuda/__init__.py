"""CUDA kernels: schedules, compilation, cache, launch."""
