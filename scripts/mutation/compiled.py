"""Of one process with a GPU: kernels of the right source or of a fault, asked by probes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from .faults import Fault
from .probes import MAKERS, Probe

Ended = tuple[str, bool]
"""How work ended, and whether the process can take more. "": it was not asked, since the right source fails here."""


LEFT_OUT: set[str] = set()
"""Names of probes that the right source fails; set before processes are forked."""


@cache
def probes(file: str) -> tuple[Probe, ...]:
    """Probes whose kernels come from this file, the quickest to fail first."""
    return tuple(probe for probe in MAKERS[file]() if probe.name not in LEFT_OUT)


class Compiled:
    """What is bound is dropped when the source changes. alive: called before each probe."""

    def __init__(self, root: Path, alive: Callable[[], None]) -> None:
        from rmsnorm_patch import ops  # noqa: F401  # whose kernels take `configs_for` before it is replaced here
        from rmsnorm_patch.backends.cuda import arguments, jit, kernel_set
        from rmsnorm_patch.fused.gated_norm import kernel as _gated  # noqa: F401
        from rmsnorm_patch.fused.linear_norm import kernel as _partials  # noqa: F401
        from rmsnorm_patch.fused.norm_add import kernel as _add  # noqa: F401
        from rmsnorm_patch.fused.norm_quantised import kernel as quantised
        from rmsnorm_patch.fused.query_key_norm import kernel as _pair  # noqa: F401

        self.alive, self.folder = alive, root / "kernels" / "cuda"
        self.fault: Fault | None = None
        self.probe: Probe | None = None
        self.right, self.declared = jit.source_of, arguments.declared
        self.texts = {path.name: path.read_text() for path in self.folder.glob("*.cu*")}
        self.known: dict[Probe, dict[Any, str]] = {}
        self.last: dict[Any, str] = {}
        jit.source_of = self.source_of  # type: ignore[assignment]
        self.inherited, self.configs_for = jit.machine_code, kernel_set.configs_for
        jit.machine_code, kernel_set.configs_for = self.machine_code, self.one_config  # type: ignore[assignment]
        quantised.configs_for = self.one_config

    def machine_code(self, build: Any) -> bytes:
        code = self.inherited(build)
        self.last[build] = hashlib.sha256(code).hexdigest()
        return code

    def one_config(self, op: Any, dtype: Any, n: int, index: int) -> Any:
        """The schedule of the probe's row count alone, for every one: a compilation in place of several."""
        from rmsnorm_patch.backends.cuda.schedules import schedules

        assert self.probe is not None
        configs, rows = self.configs_for(op, dtype, n, index), self.probe.rows
        if self.probe.capability:
            configs = schedules(op, dtype, n, self.probe.capability)
        serving = [config for config in configs if config.m[0] <= rows <= config.m[1]][:1]
        return tuple(replace(config, m=(configs[0].m[0], configs[-1].m[1])) for config in serving) or configs

    def source_of(self, name: str) -> Any:
        from rmsnorm_patch.backends.cuda.jit import Source

        if self.fault is None:
            return self.right(name)
        texts = dict(self.texts)
        changed = Path(self.fault.file).name
        texts[changed] = self.fault.applied(texts[changed])
        headers = {file: text for file, text in texts.items() if file.endswith(".cuh")}
        arguments = self.declared(name, texts[name], headers)
        digest = hashlib.sha256(repr((name, sorted(texts.items()))).encode()).hexdigest()
        return Source(f"{texts[name]}\n{arguments.assertions()}", headers, digest, arguments)

    def wrong(self, probe: Probe, fault: Fault | None) -> str:
        """What a probe finds wrong with the source, "" if nothing. Raises what the call raises."""
        import torch

        from rmsnorm_patch.backends import bindings
        from rmsnorm_patch.backends.cuda import cache as kernel_cache
        from rmsnorm_patch.backends.cuda import kernel_set

        self.fault, self.probe, self.last = fault, probe, {}
        kernel_set._function.cache_clear()
        kernel_cache.forget()
        bindings.forget()
        self.alive()
        found = probe.call()
        torch.cuda.synchronize()
        return found

    def right_source(self, file: str) -> Ended:
        """Probes of a kernel file that its right source fails, a line each; "survived" where there are none."""
        failed = []
        for probe in probes(file):
            try:
                found = self.wrong(probe, None)
            except Exception as error:
                found = f"{type(error).__name__}: {error}"
            if not found and not any(build.config.source == file for build in self.last):
                found = "no kernel of this file was compiled"
            if found:
                failed.append(f"{probe.name}: {' '.join(found.split())[:300]}")
        return "\n".join(failed) or "survived", not failed

    def ended(self, fault: Fault) -> Ended:
        """A fault of a header is asked in every kernel."""
        name = Path(fault.file).name
        same = True
        for file in [name] if name.endswith(".cu") else sorted(MAKERS):
            for probe in probes(file):
                if probe not in self.known:
                    if not self._sound(probe):
                        return "", False
                    self.known[probe] = self.last
                how = self._asked(probe, fault)
                if how:
                    return how, how.startswith("does not compile") or self._sound(probe)
                same = same and self.last == self.known[probe]
        return ("same code" if same else "survived"), True

    def _asked(self, probe: Probe, fault: Fault) -> str:
        """How a fault ended in a probe; "" if it passed."""
        try:
            wrong = self.wrong(probe, fault)
        except Exception as error:
            text = " ".join(f"{type(error).__name__}: {error}".split())
            if "NVRTC_ERROR" in text:
                return f"does not compile: {text[-80:]!r}"
            return f"{'crashed' if 'CUDA' in text or 'launch' in text else 'killed'}: {text[:120]!r}"
        return f"killed: {wrong[:80]!r}" if wrong else ""

    def _sound(self, probe: Probe) -> bool:
        """Whether the right source still passes here: a store astray may have spoiled what later faults need."""
        try:
            return not self.wrong(probe, None)
        except Exception:
            return False
