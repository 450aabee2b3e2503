"""Whether a call goes into a graph, or runs while something else is compiled."""

from __future__ import annotations

import torch

_is_compiling = torch.compiler.is_compiling
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling


def is_traced() -> bool:
    """Whether this call is traced into a graph: by Dynamo, or under a dispatch mode while something is compiled.

    `torch.compiler.is_compiling` alone says so in all threads while one of them compiles, and of the real calls that a
    compiler makes itself. Tracers without Dynamo (export, make_fx, functionalization) see a call by a mode of theirs.
    """
    return _is_dynamo_compiling() or (_is_compiling() and torch._C._len_torch_dispatch_stack() > 0)
