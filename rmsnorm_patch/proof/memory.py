"""What a proof takes beside the model, and what there is."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
import torch.nn as nn

from ..errors import UnsupportedInput
from .replica import private_buffers
from .runs import Run, dtype_of

HEADROOM = 1.25
"""Memory asked for, over the bytes that are counted: activations and the allocator's rounding."""

_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUP = Path("/proc/self/cgroup")
_HOST = Path("/proc/meminfo")


def of_copy(model: nn.Module, dtype: torch.dtype) -> dict[torch.device, int]:
    """Bytes of a copy of the weights in `dtype`, by device."""
    needed: dict[torch.device, int] = {}
    for tensor in (*model.parameters(), *model.buffers()):
        size = dtype.itemsize if tensor.is_floating_point() else tensor.element_size()
        needed[tensor.device] = needed.get(tensor.device, 0) + tensor.numel() * size
    return needed


def of_proof(model: nn.Module, runs: Sequence[Run], norms: Sequence[nn.Module], space: int) -> dict[torch.device, int]:
    """Bytes, by device: an estimate, said before anything runs.

    Counted: logits of every run (original, patched, in the wide dtype) and the norms' outputs, at most `space`, on the
    CPU; buffers that replicas have for themselves, three at a time.
    """
    cpu, dtype = torch.device("cpu"), dtype_of(model)
    tokens = [_tokens(run) for run in runs]
    vocabulary = _vocabulary(model)
    kept = sum(tokens) * vocabulary * (2 * dtype.itemsize + 8)
    widths = sum(p.numel() for norm in norms for p in norm.parameters() if p.dim() == 1)
    kept += sum(min(space, count * widths * dtype.itemsize) for count in tokens)
    needed = {cpu: kept}
    for buffer in private_buffers(model):
        size = buffer.numel() * buffer.element_size()
        needed[buffer.device] = needed.get(buffer.device, 0) + 3 * size
    return {device: size for device, size in needed.items() if size and device.type != "meta"}


def said(needed: dict[torch.device, int]) -> str:
    """In words, what is needed and what there is on each device."""
    needs = []
    for device, size in needed.items():
        available = free(device)
        needs.append(f"{gib(size)} GiB on {device}" + ("" if available is None else f" (free {gib(available)})"))
    return f"memory: about {', '.join(needs)}"


def check(needed: dict[torch.device, int]) -> None:
    """Raises UnsupportedInput where a proof would not fit."""
    for device, size in needed.items():
        available = free(device)
        if available is not None and size > available:
            raise UnsupportedInput(
                "inputs",
                f"a proof that takes about {gib(size)} GiB on {device}, where {gib(available)} GiB are free",
                "inputs whose logits and norm outputs fit beside the model",
                "pass fewer or shorter inputs; a few hundred tokens say as much as many",
            )


def free(device: torch.device) -> int | None:
    """Bytes that this process can still take on `device`; on the CPU within the limit of its container, which the
    host's own figure does not know. None where nothing is known."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type != "cpu":
        return None
    sizes = [size for size in (_free_of_host(), *_free_of_groups()) if size is not None]
    return max(0, min(sizes)) if sizes else None


def _free_of_host() -> int | None:
    fields = dict(line.split(":", 1) for line in _lines(_HOST) if ":" in line)
    return int(fields["MemAvailable"].split()[0]) * 1024 if "MemAvailable" in fields else None


def _free_of_groups() -> Iterator[int]:
    """Of each control group around this process that has a limit, version 2 or 1; the innermost need not be the
    tightest. File pages that nobody used lately are given back on demand, and count as free."""
    for line in _lines(_OWN_GROUP):
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root = _GROUPS / "memory" if controllers else _GROUPS
        limit_name, used_name, reclaimable = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
            if controllers
            else ("memory.max", "memory.current", "inactive_file")
        )
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            limit, used = _number(folder / limit_name), _number(folder / used_name)
            if limit is not None and used is not None:
                statistics = dict(line.split()[:2] for line in _lines(folder / "memory.stat"))
                yield limit - used + int(statistics.get(reclaimable, 0))
            if folder == root:
                break


def _number(path: Path) -> int | None:
    """None for "max" and where there is no such file."""
    lines = _lines(path)
    return int(lines[0]) if lines and lines[0].isdigit() else None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="ascii").splitlines()
    except OSError:
        return []


def _tokens(run: Run) -> int:
    """Positions of the main input: ids [batch, sequence], or the leading dimensions of the first tensor."""
    tensors = [value for value in run.inputs.values() if isinstance(value, torch.Tensor) and value.dim()]
    main = run.inputs.get("input_ids", tensors[0] if tensors else None)
    if not isinstance(main, torch.Tensor) or not main.dim():
        return run.tokens
    return main.shape[:2].numel() + run.tokens * main.shape[0]


def _vocabulary(model: nn.Module) -> int:
    """Columns of the main output: those of the output embedding, else the model's width."""
    config = getattr(model, "config", None)
    for part in (config, getattr(config, "text_config", None)):
        for name in ("vocab_size", "hidden_size"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    return 0


def gib(size: int) -> str:
    return f"{size / 2**30:.1f}"
