"""Logits written to a safetensors file, and a model held against them: the same proof between two machines."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn

from ..errors import NothingProved, UnsupportedInput, UnsupportedModel, VerificationFailed
from ..numerics.tolerances import LOGIT_ERROR_RATIO
from ..patch_state import check_module
from ..scan.probe import dtype_name
from . import flow, logits, wide
from .options import check_path
from .replica import replica
from .report import versions
from .runs import FORWARD, Inputs, Run, checked, device_name, dtype_of, normalise

FORMAT = "rmsnorm_patch logits 1"
_VOLATILE = ("_name_or_path", "transformers_version", "_attn_implementation", "dtype", "torch_dtype", "use_cache")
_NEXT = "record it again with rmsnorm_patch.proof.record_logits"


@dataclass(frozen=True)
class Comparison:
    """A model against recorded logits.

    error: rms over positions and vocabulary of the distance, relative to the recorded logits. own_error: that of the
        recorded run against its own run in a wider dtype. Two runs of one model in one precision each lie own_error
        from the truth, sqrt(2) of it from each other if independent; allowed = k * sqrt(2) * own_error.
    """

    path: str
    recorded_on: dict[str, str]
    positions: int
    error: float
    own_error: float
    allowed: float
    top1_agreement: float
    max_abs: float
    bit_identical: bool

    @property
    def passed(self) -> bool:
        return bool(self.positions) and (self.bit_identical or self.error <= self.allowed)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def to_json(self, indent: int | None = None) -> str:
        return json.dumps(self.to_dict(), indent=indent)

    def explain(self) -> str:
        """One line."""
        verdict = "bit-identical to" if self.bit_identical else f"{self.error:.3e} (relative rms) from"
        return (
            f"logits {verdict} those in {self.path}, allowed {self.allowed:.3e}; top-1 {self.top1_agreement:.4f} over "
            f"{self.positions} positions, max abs {self.max_abs:.2e}"
        )


def record_logits(model: nn.Module, inputs: Inputs, path: str | Path) -> None:
    """Write the logits of `model`, as it is, with its inputs and what identifies it, to a safetensors file.

    The file holds `input.<i>.<name>`, `logits.<i>` [batch, sequence, vocabulary] and metadata. The model's own error
    is measured by a wider copy for the moment (as in `verify`). Raises UnsupportedInput, NothingProved where there is
    nothing that another model could be held against (NaN or Inf, no position).
    """
    from safetensors.torch import save_file

    check_module(model)
    check_path("path", path)
    items = normalise(inputs, model)
    runs = [Run(f"{FORWARD} {number}", item) for number, item in enumerate(items)]
    running = replica(model)
    outputs = [checked(run, running)[0] for run in runs]
    _check_defined(str(path), runs, outputs)
    own = _own_error(model, runs, outputs)
    tensors = {f"logits.{number}": output.contiguous().clone() for number, output in enumerate(outputs)}
    for number, item in enumerate(items):
        for name, value in item.items():
            if isinstance(value, torch.Tensor):
                tensors[f"input.{number}.{name}"] = value.cpu().contiguous().clone()
    described = {
        "format": FORMAT,
        "model_class": type(model).__name__,
        "config_digest": config_digest(model),
        "weights_digest": weights_digest(model),
        "dtype": dtype_name(dtype_of(model)),
        "device": device_name(model),
        "own_error": repr(own),
        **versions(),
    }
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, target, metadata=described)


def compare_logits(model: nn.Module, path: str | Path, raise_on_failure: bool = True) -> Comparison:
    """Run `model`, patched or not, on the inputs in the file and hold its logits against the recorded ones.

    Raises UnsupportedInput (no such file, not such a file, truncated), UnsupportedModel (another class, configuration,
    dtype or other weights), VerificationFailed (its `proof` is the Comparison) unless `raise_on_failure` is False.
    """
    check_module(model)
    check_path("path", path)
    described, tensors = _load(Path(path))
    _check_model(model, path, described)
    numbers = sorted(int(name.split(".")[1]) for name in tensors if name.startswith("logits."))
    recorded, now, same = [], [], True
    running = replica(model)
    for number in numbers:
        stem = f"input.{number}."
        given = {name.removeprefix(stem): value for name, value in tensors.items() if name.startswith(stem)}
        item = normalise(given, model)[0]
        output, expected = Run(FORWARD, item)(running)[0], tensors[f"logits.{number}"]
        if output.shape != expected.shape:
            raise UnsupportedModel(
                str(path),
                f"logits of shape {tuple(output.shape)}, recorded {tuple(expected.shape)}",
                "equal shapes",
                _NEXT,
            )
        same = same and bool(torch.equal(output, expected))
        recorded.append(logits.rows(expected, item))
        now.append(logits.rows(output, item))
    errors = logits.errors(now, recorded)
    own = float(described["own_error"])
    result = Comparison(
        path=str(path),
        recorded_on={name: described[name] for name in ("device", "torch") if name in described},
        positions=int(errors.relative.numel()),
        error=errors.typical(logits.routes_to_experts(model)),
        own_error=own,
        allowed=LOGIT_ERROR_RATIO * 2**0.5 * own,
        top1_agreement=logits.distributions(recorded, now)[1],
        max_abs=logits.largest(errors),
        bit_identical=same,
    )
    if raise_on_failure and not result.passed:
        raise VerificationFailed(
            str(path),
            result.explain(),
            f"{result.allowed:.3e}: {LOGIT_ERROR_RATIO} x sqrt(2) x the recorded model's own error",
            "run verify on this machine; compare versions and dtype with those in the file",
            result,
        )
    return result


def check_recording(model: nn.Module, path: str | Path) -> None:
    """Raise what `compare_logits` would raise before it runs `model`."""
    _check_model(model, path, _load(Path(path))[0])


def config_digest(model: nn.Module) -> str:
    """sha256 of the configuration without what a path, a version or a dtype puts into it; "" without one."""
    config = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return ""
    return hashlib.sha256(json.dumps(_stable(config.to_dict()), sort_keys=True, default=str).encode()).hexdigest()  # type: ignore[union-attr]


def weights_digest(model: nn.Module) -> str:
    """sha256 over names, shapes and the first 64 values of every parameter; "" where some are not loaded."""
    total = hashlib.sha256()
    for name, parameter in model.named_parameters():
        if parameter.device.type == "meta":
            return ""
        values = parameter.detach().flatten()[:64].to("cpu", torch.float64)
        total.update(f"{name} {tuple(parameter.shape)}".encode())
        total.update(values.numpy().tobytes())
    return total.hexdigest()


def _stable(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _stable(item) for name, item in value.items() if name not in _VOLATILE}
    return value


def _check_defined(path: str, runs: list[Run], outputs: list[torch.Tensor]) -> None:
    actual = [logits.rows(out, run.inputs) for out, run in zip(outputs, runs, strict=True)]
    positions, undefined = sum(map(len, actual)), sum(int(logits.undefined(part).sum()) for part in actual)
    if undefined or not positions:
        raise NothingProved(
            path,
            f"logits of {positions} positions, NaN or Inf at {undefined} of them",
            "finite logits at one position or more",
            "pass inputs that the model answers, with an attention mask that leaves some of them",
        )


def _own_error(model: nn.Module, runs: list[Run], outputs: list[torch.Tensor]) -> float:
    """Of the recorded logits; by permitted rounding where there is no wider run."""
    experts = logits.routes_to_experts(model)
    actual = [logits.rows(out, run.inputs) for out, run in zip(outputs, runs, strict=True)]
    try:
        reference = wide.wide_outputs(model, runs)
    except wide.Unavailable:
        original = replica(model, patched=False)
        norms = {path: module for path, module in original.named_modules() if "norm" in type(module).__name__.lower()}
        with flow.permitted_rounding(norms, 0):
            reference = [run(original)[0] for run in runs]
    return logits.errors(
        actual, [logits.rows(out, run.inputs) for out, run in zip(reference, runs, strict=True)]
    ).typical(experts)


def _load(path: Path) -> tuple[dict[str, str], dict[str, torch.Tensor]]:
    from safetensors import SafetensorError, safe_open

    def refused(got: str) -> UnsupportedInput:
        return UnsupportedInput(str(path), got, f"a complete safetensors file of the format {FORMAT!r}", _NEXT)

    if not path.is_file():
        raise refused("a folder" if path.is_dir() else "no regular file" if path.exists() else "no such file")
    try:
        with safe_open(path, framework="pt") as opened:
            described = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise refused(f"a file that cannot be read ({error})") from error
    if described.get("format") != FORMAT:
        raise refused(f"a file of the format {described.get('format', 'unknown')!r}")
    needed = {"model_class", "config_digest", "weights_digest", "dtype", "own_error"}
    if missing := sorted(needed - described.keys()):
        raise refused(f"a file without {', '.join(missing)}")
    if not any(name.startswith("logits.") for name in tensors):
        raise refused("a file without logits")
    return described, tensors


def _check_model(model: nn.Module, path: str | Path, described: dict[str, str]) -> None:
    ours = {
        "model_class": type(model).__name__,
        "dtype": dtype_name(dtype_of(model)),
        "config_digest": config_digest(model),
        "weights_digest": weights_digest(model),
    }
    for name, value in ours.items():
        if value and described[name] and value != described[name]:
            shown = [text[:16] if name.endswith("_digest") else text for text in (value, described[name])]
            raise UnsupportedModel(
                str(path),
                f"{name} {shown[0]}",
                f"the recorded model's: {name} {shown[1]}",
                "load the checkpoint and dtype that were recorded, or record this one",
            )
