"""What a proof runs: teacher-forced forwards and a short greedy generation, each giving tensors to compare."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn as nn

from ..errors import NothingProved, RMSNormPatchError, UnsupportedInput

Inputs = Mapping[str, Any] | torch.Tensor | Sequence["Mapping[str, Any] | torch.Tensor"]
FORWARD = "forward"
GREEDY = "greedy"


@dataclass(frozen=True)
class Run:
    """One thing to do with a model. tokens: how many to generate, 0 for a forward."""

    name: str
    inputs: Mapping[str, Any]
    tokens: int = 0

    def __call__(self, model: nn.Module) -> tuple[torch.Tensor, ...]:
        """(logits,) [batch, sequence, vocabulary] of a forward; (sequences, logits) of a generation; on the CPU."""
        inputs = copy.deepcopy(dict(self.inputs))  # a forward may write what it is given (a cache, say)
        with torch.no_grad():
            if self.tokens:
                return _generate(model, inputs, self.tokens)
            return (main_output(model(**inputs)).detach().cpu(),)


def normalise(inputs: Inputs, model: nn.Module) -> list[dict[str, Any]]:
    """`inputs` as a list of keyword arguments, tensors on the model's device.

    Raises UnsupportedInput, and NothingProved for a tensor without elements.
    """
    given: Any = [inputs] if isinstance(inputs, torch.Tensor) or hasattr(inputs, "keys") else inputs
    device = device_of(model)
    made = []
    item: Any
    for item in given if isinstance(given, Sequence) else [given]:
        if isinstance(item, torch.Tensor):
            item = {"input_ids": item if item.dim() != 1 else item.unsqueeze(0)}
        if not hasattr(item, "keys") or not any(isinstance(item[name], torch.Tensor) for name in item.keys()):  # noqa: SIM118
            raise UnsupportedInput(
                "inputs",
                f"{type(item).__name__}",
                "a dict of tensors (input_ids, attention_mask, ...), a tensor of token ids, or a list of those",
                "pass tokenizer(text, return_tensors='pt')",
            )
        _check_positions(item)
        _check_ids(item, model)
        moved = {n: item[n].to(device) if isinstance(item[n], torch.Tensor) else item[n] for n in item.keys()}  # noqa: SIM118
        made.append({name: value for name, value in moved.items() if name != "labels"})
    if not made:
        raise UnsupportedInput("inputs", "an empty list", "at least one input", "pass one prompt")
    return made


_IDS = ("input_ids", "decoder_input_ids")


def _check_ids(item: Any, model: nn.Module) -> None:
    """Ids that no row of the embedding has stop a GPU, and with it the process's other work. Where other tensors than
    ids and masks are given, an id may stand for an image."""
    tensors = {name: item[name] for name in item.keys() if isinstance(item[name], torch.Tensor)}  # noqa: SIM118
    only_text = all(not value.is_floating_point() or name.endswith("mask") for name, value in tensors.items())
    for name in _IDS:
        ids = tensors.get(name)
        if ids is None:
            continue
        is_plain = ids.layout is torch.strided and not ids.is_nested and not ids.is_meta
        if not is_plain or ids.dtype not in (torch.int64, torch.int32) or ids.dim() != 2:
            shown = f"a tensor of {ids.dtype}, shape {tuple(ids.shape)}" if is_plain else _unlike(ids)
            raise UnsupportedInput(
                f"inputs: {name}",
                shown,
                "ids of int64 or int32, [batch, sequence]",
                "pass tokenizer(text, return_tensors='pt')",
            )
        rows = _embedding_rows(model, name)
        if rows is None or not only_text:
            continue
        least, most = int(ids.min()), int(ids.max())
        if least < 0 or most >= rows:
            raise UnsupportedInput(
                f"inputs: {name}",
                f"the id {least if least < 0 else most}",
                f"ids from 0 to {rows - 1}, the rows of the model's embedding",
                "use the tokenizer that belongs to this checkpoint",
            )


def _unlike(ids: torch.Tensor) -> str:
    kind = "nested" if ids.is_nested else str(ids.layout).removeprefix("torch.")
    return "a tensor on the meta device, which has no values" if ids.is_meta else f"a {kind} tensor"


def _embedding_rows(model: Any, name: str) -> int | None:
    """How many ids the model knows for this input; None where that cannot be asked."""
    try:
        part = model.get_decoder() if name.startswith("decoder") else model
        found = part.get_input_embeddings()
    except (AttributeError, NotImplementedError, TypeError):
        return None
    return found.num_embeddings if type(found) is nn.Embedding else None


def checked(run: Run, model: nn.Module) -> tuple[torch.Tensor, ...]:
    """`run` of the unpatched model. Raises UnsupportedInput where the model itself does not take the inputs."""
    try:
        return run(model)
    except (RMSNormPatchError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # the model's own code on inputs that nobody has looked at
        raise UnsupportedInput(
            "inputs",
            f"inputs on which the unpatched model raises {type(error).__name__}: {str(error)[:200]}",
            f"inputs that {type(model).__name__} runs on",
            "try them on the unpatched model: model(**inputs)",
        ) from error


def _check_positions(item: Any) -> None:
    for name in item.keys():  # noqa: SIM118
        if isinstance(item[name], torch.Tensor) and not item[name].numel():
            raise NothingProved(
                f"inputs: {name}",
                f"a tensor of shape {tuple(item[name].shape)}",
                "one position or more",
                "pass a prompt that is not empty",
            )


def device_of(model: nn.Module) -> torch.device:
    """Device of the first parameter that is really there."""
    devices = (parameter.device for parameter in model.parameters())
    return next((device for device in devices if device.type != "meta"), torch.device("cpu"))


def device_name(model: nn.Module) -> str:
    """The GPU's name, or "cpu"."""
    device = device_of(model)
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def dtype_of(model: nn.Module) -> torch.dtype:
    """The dtype of most of the model's floating-point parameters. (Those of a byte an element are quantised: the model
    computes in another dtype than theirs.)"""
    sizes: dict[torch.dtype, int] = {}
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter.element_size() > 1:
            sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel()
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


def main_output(output: Any) -> torch.Tensor:
    """The logits, or the last hidden state, or the first tensor there is."""
    for name in ("logits", "last_hidden_state"):
        found = getattr(output, name, None)
        if isinstance(found, torch.Tensor):
            return found
    if isinstance(output, torch.Tensor):
        return output
    values = output.values() if isinstance(output, Mapping) else output
    for value in values if isinstance(values, (tuple, list)) or isinstance(output, Mapping) else ():
        if isinstance(value, torch.Tensor):
            return value
    raise UnsupportedInput("model output", type(output).__name__, "logits or a hidden state", "verify the inner model")


def can_generate(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    return "input_ids" in inputs and bool(getattr(model, "can_generate", bool)())


def _generate(model: Any, inputs: Mapping[str, Any], tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Greedy, whatever the checkpoint's own sampling settings say."""
    config = copy.deepcopy(model.generation_config)
    config.update(do_sample=False, num_beams=1, temperature=None, top_p=None, top_k=None, max_length=None)
    config.update(max_new_tokens=tokens, return_dict_in_generate=True, output_logits=True, output_scores=False)
    config.update(disable_compile=True)  # of what a compiler makes of a patched layer no call is reported
    if config.pad_token_id is None:
        ends = config.eos_token_id
        config.pad_token_id = (ends[0] if isinstance(ends, list) else ends) if ends is not None else 0
    made = model.generate(**inputs, generation_config=config)
    return made.sequences.cpu(), torch.stack([step.detach().cpu() for step in made.logits], dim=1)
