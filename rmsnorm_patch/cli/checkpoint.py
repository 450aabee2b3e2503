"""Load a causal language model from a local folder for the command line, offline, refusing what would be wrong later.

`from_pretrained` fills missing weights with random numbers and only warns; here that is an error.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedInput, UnsupportedModel
from .folder import BrokenCheckpoint, MissingCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TEXT = (
    "The statement above is true for every sequence of values. If the argument is omitted, the default is used, and "
    "the result is returned as a new object."
)


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode on its device, and its tokenizer where the folder has one."""

    folder: Path
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device

    def encode(self, prompt: str | None) -> torch.Tensor:
        """Token ids [1, length] of the prompt on the model's device; no prompt: a fixed text, or fixed random ids for
        a folder without tokenizer. Raises MissingCheckpoint for a prompt without tokenizer, UnsupportedInput for a
        prompt that gives no tokens."""
        if self.tokenizer is None:
            if prompt is not None:
                raise MissingCheckpoint(
                    str(self.folder), "no tokenizer files", "a folder with tokenizer.json", "add them, or drop --prompt"
                )
            generator = torch.Generator().manual_seed(0)
            ids = torch.randint(0, self.model.config.get_text_config().vocab_size, (1, 64), generator=generator)
            return ids.to(self.device)
        ids = self.tokenizer(_TEXT if prompt is None else prompt, return_tensors="pt").input_ids
        if ids.shape[-1] == 0:
            raise UnsupportedInput("--prompt", repr(prompt), "a text of at least one token", "give a longer prompt")
        return ids.to(self.device)

    def decode(self, tokens: torch.Tensor) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)


def device_of(name: str) -> torch.device:
    """The device called `name` ("auto": a GPU if there is one). Raises UnsupportedInput for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or not (name in here or (name == "cuda" and len(here) > 2)):
        raise UnsupportedInput("--device", repr(name), ", ".join(here), "choose one of these")
    return device


def load(
    folder: Path, config: dict[str, Any], dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> Loaded:
    """The model in `folder`. config: of `read_config`. dtype: a name of DTYPES, or "auto" for the checkpoint's own.

    Raises BrokenCheckpoint, UnsupportedModel (needs its own code, no causal language model),
    UnsupportedInput (device).
    """
    where = device_of(device)
    _check_code(folder, config, trust_remote_code)
    from transformers import AutoModelForCausalLM

    options = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=DTYPES.get(dtype, "auto"), use_safetensors=True, output_loading_info=True, **options
        )
    except Exception as error:
        raise _explained(folder, config, error) from error
    model, info = loaded
    _check_complete(folder, info)
    model = model.eval().to(where)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return Loaded(folder, model, _tokenizer(folder, options), torch.float32 if first is None else first.dtype, where)


def _check_code(folder: Path, config: dict[str, Any], trusted: bool) -> None:
    from transformers import CONFIG_MAPPING

    if config.get("auto_map") and not trusted and config.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedModel(
            str(folder),
            f"model type {config.get('model_type')!r}, which runs Python code from the folder",
            "model types of the installed transformers, and others only when you say so",
            "read that code, then pass --trust-remote-code",
        )


def _explained(folder: Path, config: dict[str, Any], error: Exception) -> Exception:
    """The typed error for what `from_pretrained` raised; an unforeseen one stays as it is."""
    from safetensors import SafetensorError

    text = " ".join(str(error).split())[:300]
    known = "model types of the installed transformers that have a causal language model"
    if isinstance(error, SafetensorError):
        return BrokenCheckpoint(
            str(folder), f"damaged weights ({text})", "whole safetensors files", "copy or download the weights again"
        )
    if isinstance(error, RuntimeError) and "size" in text:
        return BrokenCheckpoint(
            str(folder), f"weights of other shapes than config.json says ({text})", "files that belong together",
            "use the config.json that was saved with these weights",
        )
    if isinstance(error, ValueError | KeyError | OSError):
        return UnsupportedModel(
            str(folder),
            f"model type {config.get('model_type')!r}: {text}",
            known,
            "check config.json, or upgrade transformers",
        )
    return error


def _check_complete(folder: Path, info: dict[str, Any]) -> None:
    for what, names in (("missing", info.get("missing_keys")), ("of another shape", info.get("mismatched_keys"))):
        if names:
            shown = ", ".join(str(n) for n in sorted(map(str, names))[:3])
            raise BrokenCheckpoint(
                str(folder), f"{len(names)} weights {what}, e.g. {shown}", "every weight that config.json implies",
                "copy all *.safetensors files again, or check config.json",
            )


def _tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        raise BrokenCheckpoint(
            str(folder),
            f"unreadable tokenizer ({text})",
            "tokenizer files of this model",
            "copy them again, or remove them",
        ) from error
