"""A model folder's own files: config.json, the index of shards, the headers of the weights. Nothing large is read.

What is wrong with the files is known here, before a library of models is imported and before any weight is loaded.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import UnsupportedInput, UnsupportedModel

CONFIG, GENERATION = "config.json", "generation_config.json"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_WANTED = f"a folder with {CONFIG} and {WEIGHTS}, or shards with {INDEX}"
_AGAIN = "copy or download the files again"
_LFS = b"version https://git-lfs"
ADAPTER = "adapter_config.json"
_OTHER_KINDS = {
    ADAPTER: ("a PEFT adapter", "merge it into its base model with merge_and_unload, and save that"),
    "model_index.json": ("a diffusers pipeline", "give the folder of one of its models, text_encoder for example"),
    "params.json": ("a checkpoint in its maker's own format", "use the one in the format of transformers"),
}


class MissingCheckpoint(UnsupportedInput):
    """The path given is no folder with a model in it."""


class BrokenCheckpoint(UnsupportedModel):
    """The folder looks like a model, but its files are damaged or do not belong together."""


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder whose weights are all there, as far as their headers say.

    Raises MissingCheckpoint (no folder, no model in it), BrokenCheckpoint (damaged or missing files).
    """
    try:
        if not folder.is_dir():
            got = "a file" if folder.exists() else "no such folder"
            raise MissingCheckpoint(str(folder), got, _WANTED, "check the path; nothing is ever downloaded")
        names = {path.name for path in folder.iterdir()}
        _check_kind(folder, names)
        config = _json_object(folder / CONFIG)
        if ADAPTER in names and not any(name.startswith("adapter_model") for name in names):
            got = "no adapter_model.safetensors beside it, which would be loaded too"
            raise BrokenCheckpoint(str(folder / ADAPTER), got, "an adapter's two files", f"remove {ADAPTER}, or add it")
        if GENERATION in names:  # one that cannot be read would be passed over in silence
            _json_object(folder / GENERATION)
        check_weights(folder, names)
    except OSError as error:
        got = f"a folder that cannot be read ({error.strerror or error})"
        raise MissingCheckpoint(str(folder), got, _WANTED, "check the path and its permissions") from error
    return config


def _check_kind(folder: Path, names: set[str]) -> None:
    has_weights = any(name.endswith(".safetensors") and not name.startswith("adapter_") for name in names)
    if CONFIG in names and has_weights:
        return
    for name, (kind, step) in _OTHER_KINDS.items():
        if name in names:
            raise MissingCheckpoint(str(folder), f"{kind} ({name})", _WANTED, step)
    if CONFIG not in names:
        got = f"a folder without {CONFIG}"
        raise MissingCheckpoint(str(folder), got, _WANTED, "check the path; nothing is ever downloaded")
    if INDEX in names:
        return
    others = sorted(name for name in names if name.endswith((".bin", ".pt", ".pth", ".gguf", ".msgpack", ".h5")))
    got = "no *.safetensors" + (f", only {', '.join(others)}" if others else "")
    raise MissingCheckpoint(
        str(folder), got, "safetensors weights (pickled ones can run code)", "convert them with save_pretrained"
    )


def _check_is_file(path: Path) -> None:
    """Raise BrokenCheckpoint for what is no file: to open a FIFO would wait for ever. A link of a download's cache may
    lead nowhere."""
    if not path.is_file():
        kind = "a link that leads nowhere" if path.is_symlink() else "a folder" if path.is_dir() else "no regular file"
        raise BrokenCheckpoint(str(path), f"{kind} in its place", "a file", _AGAIN)


def _json_object(path: Path) -> dict[str, Any]:
    supported, again = "a JSON object in UTF-8", "copy the file again"
    _check_is_file(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise BrokenCheckpoint(str(path), f"no JSON ({error})", supported, again) from error
    if not isinstance(value, dict):
        raise BrokenCheckpoint(str(path), f"a JSON {type(value).__name__}", supported, again)
    return value


def check_weights(folder: Path, names: set[str]) -> None:
    """The weights that will be loaded, by their headers: one file, or the shards that the index names."""
    if WEIGHTS in names:
        header(folder / WEIGHTS)
    elif INDEX in names:
        _check_shards(folder)
    else:
        files = sorted(name for name in names if name.endswith(".safetensors"))
        shown = ", ".join(files[:3]) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
        if any("-of-" in name for name in files):
            raise BrokenCheckpoint(str(folder), f"shards without {INDEX} ({shown})", _WANTED, _AGAIN)
        raise MissingCheckpoint(
            str(folder), f"weights of another name ({shown})", _WANTED, "save the model with save_pretrained"
        )


def _check_shards(folder: Path) -> None:
    index = folder / INDEX
    written = _json_object(index)
    placed = written.get("weight_map")
    if not isinstance(placed, dict) or not placed or not all(isinstance(name, str) for name in placed.values()):
        got = "no weight_map" if placed is None else "a weight_map that is no object of file names"
        raise BrokenCheckpoint(str(index), got, 'a "weight_map" from weights to files', "copy the file again")
    if not isinstance(written.get("metadata"), dict):
        raise BrokenCheckpoint(str(index), "no metadata", 'an object "metadata", as save_pretrained writes it', _AGAIN)
    files = sorted(set(placed.values()))
    if missing := [name for name in files if not _is_inside(folder, name)]:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        got = f"{len(missing)} of {len(files)} shards missing: {shown}"
        raise BrokenCheckpoint(str(folder), got, f"every file that {INDEX} names", "download the missing shards")
    held = {name: header(folder / name) for name in files}
    if lost := sorted(weight for weight, name in placed.items() if weight not in held[name]):
        got = f"{len(lost)} weights that are not in the shard it names, e.g. {lost[0]} in {placed[lost[0]]}"
        raise BrokenCheckpoint(str(index), got, "an index of these shards", _AGAIN)


def _is_inside(folder: Path, name: str) -> bool:
    """Whether `name`, as an index writes it, is a file of `folder` or of a folder in it."""
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        return False
    try:
        return (folder / path).is_file()
    except OSError:  # a name that no file can have
        return False


def header(path: Path) -> frozenset[str]:
    """Names of the weights in a safetensors file, whose size fits its header. Raises BrokenCheckpoint."""
    from safetensors import SafetensorError, safe_open

    _check_is_file(path)
    try:
        with safe_open(path, framework="numpy") as opened:
            return frozenset(opened.keys())
    except (SafetensorError, ValueError) as error:
        with path.open("rb") as file:
            is_pointer = file.read(len(_LFS)) == _LFS
        why, step = ("a Git LFS pointer in its place", "run `git lfs pull`") if is_pointer else (str(error), _AGAIN)
        raise BrokenCheckpoint(str(path), f"damaged weights ({why})", "whole safetensors files", step) from error


def check_prompt(prompt: str | None) -> None:
    """Before anything is loaded. Raises UnsupportedInput for bytes that are no text in the terminal's encoding."""
    try:
        (prompt or "").encode()
    except UnicodeEncodeError as error:
        got, step = f"bytes that are no UTF-8 ({error.reason})", "write the prompt in UTF-8"
        raise UnsupportedInput("--prompt", got, "text", step) from error
