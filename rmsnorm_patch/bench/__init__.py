"""Norm kernels of every provider side by side on one GPU: ours, the installed peers, and a copy of the same bytes."""
