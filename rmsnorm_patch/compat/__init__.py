"""Doors for other frameworks: our kernels behind the names, signatures and layouts that they expect."""
