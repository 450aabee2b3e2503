"""The command line; `rmsnorm-patch` starts `main`."""

from .app import main

__all__ = ["main"]
