"""Load a model of any kind from a local folder for the command line, offline, refusing what would be wrong later.

`from_pretrained` fills missing weights with random numbers, leaves out what the configuration does not name, and only
warns; here both are errors, and every other failure gets the diagnosis that fits.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..api import check_backend
from ..backends.names import Backend
from ..errors import UnsupportedInput, UnsupportedModel
from . import inputs
from .folder import CONFIG, GENERATION, BrokenCheckpoint

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
AUTO_CLASSES = (
    "AutoModelForCausalLM",
    "AutoModelForImageTextToText",
    "AutoModelForMultimodalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification",
    "AutoModelForMaskedLM",
    "AutoModel",
)
"""Tried in this order for a folder whose config.json names no class that is known here."""
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")


@dataclass(frozen=True)
class Checkpoint:
    """A model in eval mode on its device, and its tokenizer where the folder has one. notes: what the user should know
    about the folder."""

    folder: Path
    model: Any
    tokenizer: Any
    dtype: torch.dtype
    device: torch.device
    notes: tuple[str, ...] = ()

    @property
    def generates(self) -> bool:
        """Whether the model continues a prompt."""
        return inputs.vocabulary_of(self.model) is not None and inputs.generates(self.model)

    def inputs(self, prompt: str | None, warn: Callable[[str], None]) -> dict[str, torch.Tensor]:
        """What the model is run on: the prompt, and whatever else it takes; see `model_inputs` and `encode`."""
        vocabulary = inputs.vocabulary_of(self.model)
        ids = None if vocabulary is None else inputs.encode(self.tokenizer, self.folder, prompt, vocabulary)
        return inputs.model_inputs(self.model, ids, warn)

    def check_generates(self) -> None:
        """Raise UnsupportedModel for a model without a language-model head."""
        if not self.generates:
            raise UnsupportedModel(
                str(self.folder),
                f"{type(self.model).__name__}, which has no language-model head",
                "models that generate text",
                "use `rmsnorm-patch plan`, `verify` or `bench`, which need none",
            )

    def decode(self, tokens: torch.Tensor) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(tokens, skip_special_tokens=True)


def device_of(name: str) -> torch.device:
    """The device called `name` ("auto": a GPU if there is one). Raises UnsupportedInput for one that is not here."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    here = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    try:
        device = torch.device(name.strip().lower())
    except RuntimeError:
        device = None
    if device == torch.device("cpu:0"):
        return torch.device("cpu")
    if device is None or not (str(device) in here or (str(device) == "cuda" and len(here) > 2)):
        raise UnsupportedInput("--device", repr(name), ", ".join(here), "choose one of these")
    return device


def load(
    folder: Path,
    config: dict[str, Any],
    dtype: str = "auto",
    device: str = "auto",
    trust_remote_code: bool = False,
    prompt: str | None = None,
    backend: Backend = "auto",
) -> Checkpoint:
    """The model in `folder`. config: of `read_config`. dtype: a name of DTYPES, or "auto" for the checkpoint's own.

    What can be known without the weights is asked before they are read. Raises BrokenCheckpoint, MissingCheckpoint (a
    prompt without tokenizer), UnsupportedModel (needs its own code, or a library that is not here), UnsupportedInput
    (device, prompt, backend).
    """
    where = device_of(device)
    check_backend(backend, where)
    _check_code(folder, config, trust_remote_code)
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": trust_remote_code}
    read = _configuration(folder, config, options)
    tokenizer = _tokenizer(folder, options)
    rows = getattr(read.get_text_config(), "vocab_size", None)
    inputs.encode(tokenizer, folder, prompt, rows if isinstance(rows, int) else None)
    options |= {"dtype": DTYPES.get(dtype, "auto"), "use_safetensors": True}
    model, notes = _model(folder, config, read, options)
    model = model.eval().to(where)
    first = next((p for p in model.parameters() if p.is_floating_point()), None)
    return Checkpoint(folder, model, tokenizer, torch.float32 if first is None else first.dtype, where, tuple(notes))


def _check_code(folder: Path, config: dict[str, Any], trusted: bool) -> None:
    from transformers import CONFIG_MAPPING

    if config.get("auto_map") and not trusted and config.get("model_type") not in CONFIG_MAPPING:
        raise UnsupportedModel(
            str(folder),
            f"model type {config.get('model_type')!r}, which runs Python code from the folder",
            "model types of the installed transformers, and others only when you say so",
            "read that code, then pass --trust-remote-code",
        )


def _configuration(folder: Path, config: dict[str, Any], options: dict[str, Any]) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig

    try:
        return AutoConfig.from_pretrained(folder, **options)
    except ImportError as error:
        raise _needs_library(folder, error) from error
    except Exception as error:
        kind = config.get("model_type")
        if kind in CONFIG_MAPPING:
            raise _bad_config(folder, config, error) from error
        raise UnsupportedModel(
            str(folder), f"model type {kind!r}: {_short(error)}", "model types of the installed transformers",
            "check config.json, or upgrade transformers",
        ) from error  # fmt: skip


def _bad_config(folder: Path, config: dict[str, Any], error: Exception) -> BrokenCheckpoint:
    written = config.get("transformers_version")
    return BrokenCheckpoint(
        str(folder / CONFIG),
        f"a configuration that {config.get('model_type')!r} does not take ({_short(error)})",
        "values that fit together",
        "correct it" + (f", or use transformers {written}, which wrote it" if written else ""),
    )


def _needs_library(folder: Path, error: Exception) -> UnsupportedModel:
    got = f"a model that needs a library which is not here ({_short(error)})"
    return UnsupportedModel(str(folder), got, "models whose libraries are installed", "install what it names")


def _short(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:300]}" if text else type(error).__name__


def _model(folder: Path, config: dict[str, Any], read: Any, options: dict[str, Any]) -> tuple[Any, list[str]]:
    """(model, notes); the base model for a folder whose weights lack the output head and nothing else."""
    from transformers import AutoModel

    notes: list[str] = []
    model, info = _from_pretrained(_class_of(config, read, options["trust_remote_code"]), folder, config, options)
    missing = set(map(str, info.get("missing_keys") or ()))
    if missing and missing <= _head_weights(model):
        notes.append(f"{folder} has no language-model head ({', '.join(sorted(missing))}): loaded without one")
        model, info = _from_pretrained(AutoModel, folder, config, options)
    _check_complete(folder, model, info)
    unused = sorted(map(str, info.get("unexpected_keys") or ()))
    if unused:
        notes.append(f"{len(unused)} weights of {folder} are not used by {type(model).__name__}, e.g. {unused[0]}")
    return model, notes


def _class_of(config: dict[str, Any], read: Any, trusted: bool) -> Any:
    """The class that config.json names, else the first kind of model that transformers has for it."""
    import transformers

    own = config.get("auto_map") if trusted else None
    if isinstance(own, dict) and (named := [name for name in AUTO_CLASSES if name in own]):
        return getattr(transformers, named[0])
    for name in config.get("architectures") or ():
        found = getattr(transformers, str(name), None)
        if isinstance(found, type) and (issubclass(found, transformers.PreTrainedModel) or hasattr(found, "_backends")):
            return found  # with _backends: it stands for a class whose library is missing, and says which
    known = (getattr(transformers, name, None) for name in AUTO_CLASSES)
    return next((kind for kind in known if kind and type(read) in kind._model_mapping), transformers.AutoModel)


def _from_pretrained(
    kind: Any, folder: Path, config: dict[str, Any], options: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    try:
        loaded: tuple[Any, dict[str, Any]] = kind.from_pretrained(folder, output_loading_info=True, **options)
    except Exception as error:
        raise _explained(kind, folder, config, options, error) from error
    return loaded


def _explained(kind: Any, folder: Path, config: dict[str, Any], options: dict[str, Any], error: Exception) -> Exception:
    """The typed error for what `from_pretrained` raised; lack of memory stays as it is."""
    from safetensors import SafetensorError

    text = _short(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return error
    if isinstance(error, SafetensorError):
        return BrokenCheckpoint(
            str(folder), f"damaged weights ({text})", "whole safetensors files", "copy or download the weights again"
        )
    quantised = config.get("quantization_config")
    if quantised is not None:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        return UnsupportedModel(
            str(folder),
            f"weights quantised with {method!r}, which cannot be loaded here ({text})",
            "quantised models whose library and device are here, and all others",
            "install the library that it names, or use a checkpoint that is not quantised",
        )
    if isinstance(error, ImportError):
        return _needs_library(folder, error)
    if (why := _cannot_be_built(kind, folder, options)) is not None:
        return _bad_config(folder, config, why)
    if (why := _cannot_generate(folder)) is not None:
        return why
    if isinstance(error, RuntimeError) and "size" in text:
        return BrokenCheckpoint(
            str(folder), f"weights of other shapes than config.json says ({text})", "files that belong together",
            "use the config.json that was saved with these weights",
        )  # fmt: skip
    return UnsupportedModel(
        str(folder),
        f"model type {config.get('model_type')!r}: {text}",
        "models that the installed transformers loads",
        "check config.json, or upgrade transformers",
    )


def _cannot_be_built(kind: Any, folder: Path, options: dict[str, Any]) -> Exception | None:
    """What the model's own constructor raises for this configuration, weights apart."""
    from transformers import AutoConfig

    build: Any = getattr(kind, "from_config", None) or kind._from_config
    wanted = {name: options[name] for name in ("local_files_only", "trust_remote_code")}
    try:
        with torch.device("meta"):
            build(AutoConfig.from_pretrained(folder, **wanted))
    except Exception as error:
        return error
    return None


def _cannot_generate(folder: Path) -> BrokenCheckpoint | None:
    """What is wrong with generation_config.json, which a model that generates reads with its weights."""
    from transformers import GenerationConfig

    path = folder / GENERATION
    try:
        if path.is_file():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        got = f"settings that transformers does not take ({_short(error)})"
        return BrokenCheckpoint(str(path), got, "settings of generation that fit together", "correct or remove it")
    return None


def _head_weights(model: Any) -> set[str]:
    """Names of the parameters of the layer that turns hidden states into logits."""
    try:
        head = model.get_output_embeddings()
    except (AttributeError, NotImplementedError):
        head = None
    owned = set() if head is None else {id(parameter) for parameter in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in owned}


def _check_complete(folder: Path, model: Any, info: dict[str, Any]) -> None:
    step = "copy all *.safetensors files again, or check config.json"
    for what, names in (("missing", info.get("missing_keys")), ("of another shape", info.get("mismatched_keys"))):
        if names:
            shown = ", ".join(sorted(map(str, names))[:3])
            got = f"{len(names)} weights {what}, e.g. {shown}"
            raise BrokenCheckpoint(str(folder), got, "every weight that config.json implies", step)
    containers = {f".{path}" for path, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)}
    unused = sorted(map(str, info.get("unexpected_keys") or ()))
    if more := [name for name in unused if any(path.endswith(_container(name)) for path in containers)]:
        got = f"{len(more)} weights in layers or experts that config.json does not name, e.g. {more[0]}"
        step = "use the config.json that was saved with these weights"
        raise BrokenCheckpoint(str(folder), got, "a configuration that names every weight", step)


def _container(name: str) -> str:
    """ ".layers" for "layers.3.norm.weight": the file may leave out the model's prefix. Nothing ends in " "."""
    found = re.match(r"(?:model\.)?(.+?)\.\d+\.", name)
    return f".{found[1]}" if found else " "


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer(folder: Path, options: dict[str, Any]) -> Any:
    if not has_tokenizer(folder):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, **options)
    except ImportError as error:
        raise _needs_library(folder, error) from error
    except Exception as error:
        raise BrokenCheckpoint(
            str(folder),
            f"unreadable tokenizer ({_short(error)})",
            "tokenizer files of this model",
            "copy them again, or remove them",
        ) from error
