"""Triton kernels, compiled or interpreted."""
