"""What a model of any kind is run on: the prompt's tokens, a decoder's start, an image or a sound from a seed.

A model says itself how many tokens its image or sound becomes (`get_image_features`, `get_audio_features`), so that no
preprocessor is needed: the numbers need not look like a picture, they must only have the shape of one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UnsupportedInput, UnsupportedModel
from .folder import BrokenCheckpoint, MissingCheckpoint

TEXT = (
    "The statement above is true for every sequence of values. If the argument is omitted, the default is used, and "
    "the result is returned as a new object."
)
RANDOM_IDS = 64
DECODER_IDS = 16
SPECTROGRAM = 64
SEED = 0


def encode(tokenizer: Any, folder: Path, prompt: str | None, vocabulary: int | None) -> torch.Tensor:
    """Token ids [1, length] of the prompt; no prompt: a fixed text, or fixed random ids for a folder without tokenizer.

    vocabulary: rows of the model's embedding, None where it has none. Raises MissingCheckpoint for a prompt without
    tokenizer, UnsupportedInput for a prompt that gives no tokens, BrokenCheckpoint for ids beyond the vocabulary.
    """
    if tokenizer is None:
        if prompt is not None:
            got = "no tokenizer files"
            raise MissingCheckpoint(str(folder), got, "a folder with tokenizer.json", "add them, or drop --prompt")
        return torch.randint(0, vocabulary or 2, (1, RANDOM_IDS), generator=torch.Generator().manual_seed(SEED))
    ids: torch.Tensor = tokenizer(TEXT if prompt is None else prompt, return_tensors="pt").input_ids
    if ids.shape[-1] == 0:
        raise UnsupportedInput("--prompt", repr(prompt), "a text of at least one token", "give a longer prompt")
    if vocabulary is not None and int(ids.max()) >= vocabulary:
        raise BrokenCheckpoint(
            str(folder),
            f"a tokenizer that gives token {int(ids.max())} for a model with {vocabulary} embeddings",
            "tokenizer files of this model",
            "copy the tokenizer that belongs to these weights, or check vocab_size in config.json",
        )
    return ids.long()


def vocabulary_of(model: Any) -> int | None:
    """Rows of the model's embedding of tokens, None where it reads no tokens."""
    if "input_ids" not in parameters_of(model.forward):
        return None
    try:
        weight = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError):
        return int(getattr(model.config.get_text_config(), "vocab_size", 2))
    return int(weight.shape[0]) if weight.dim() == 2 else None


def parameters_of(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


@dataclass(frozen=True)
class Medium:
    """Tensors of an image or a sound, and the token that stands once for each of its features in the ids."""

    tensors: dict[str, torch.Tensor]
    token: int
    features: int


def model_inputs(model: Any, ids: torch.Tensor | None, warn: Callable[[str], None]) -> dict[str, torch.Tensor]:
    """Keyword arguments of `model` for token ids [1, length] (None: it reads none), with an image or a sound where the
    model takes one. warn: called where it could not be made, and the model is run on text alone.

    Raises UnsupportedModel for a model for which nothing can be made.
    """
    names = parameters_of(model.forward)
    sample = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if ids is None:
        return _without_text(model, names, sample)
    text = _text_inputs(model, names, ids.to(sample.device))
    wanted = False
    for media in (_images(model, sample), _sounds(model, sample)):
        for medium in media:
            wanted = True
            inputs = _with_medium(names, text, medium)
            if _runs(model, inputs):
                return inputs
    if wanted or hasattr(model.config, "vision_config") or hasattr(model.config, "audio_config"):
        warn("no image or sound could be made for this model: it is run on text alone")
    return text


def _text_inputs(model: Any, names: set[str], ids: torch.Tensor) -> dict[str, torch.Tensor]:
    if not getattr(model.config, "is_encoder_decoder", False) or "decoder_input_ids" not in names:
        return {"input_ids": ids}
    text = model.config.get_text_config(decoder=True)
    start = getattr(model.generation_config, "decoder_start_token_id", None) if generates(model) else None
    known = (start, getattr(text, "decoder_start_token_id", None), getattr(text, "bos_token_id", None), 0)
    first = torch.full((1, 1), int(next(value for value in known if value is not None)), device=ids.device)
    following = ids[:, : DECODER_IDS - 1] % int(getattr(text, "vocab_size", 2))
    inputs = {"input_ids": ids, "decoder_input_ids": torch.cat([first, following], dim=1)}
    if generates(model) or _runs(model, inputs):
        return inputs
    end = torch.full((1, 1), int(getattr(model.config, "eos_token_id", None) or 0), device=ids.device)
    return {"input_ids": torch.cat([torch.where(ids == end, ids + 1, ids), end], dim=1)}  # classified by its last token


def generates(model: Any) -> bool:
    """What the model says of itself, if anything."""
    return bool(getattr(model, "can_generate", bool)())


def _with_medium(names: set[str], text: dict[str, torch.Tensor], medium: Medium) -> dict[str, torch.Tensor]:
    ids = text["input_ids"]
    marks = torch.full((1, medium.features), medium.token, dtype=ids.dtype, device=ids.device)
    words = torch.where(ids == medium.token, (ids + 1) % max(medium.token, 2), ids)
    joined = torch.cat([words[:, :1], marks, words[:, 1:]], dim=1)
    inputs = {**text, "input_ids": joined, **medium.tensors}
    if "attention_mask" in names:
        inputs["attention_mask"] = torch.ones_like(joined)
    for name in names & {"mm_token_type_ids", "token_type_ids"}:
        inputs[name] = (joined == medium.token).long()
    return inputs


def _runs(model: Any, inputs: dict[str, torch.Tensor]) -> bool:
    try:
        with torch.no_grad():
            model(**inputs)
    except Exception:  # a shape that this model does not take: the caller tries another
        return False
    return True


def _random(shape: tuple[int, ...], like: torch.Tensor) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(SEED)).to(like)


def _features(model: Any, name: str, tensors: dict[str, torch.Tensor]) -> int:
    """How many tokens `tensors` become, 0 for what `model.<name>` does not take."""
    taken = {key: value for key, value in tensors.items() if key in _all_parameters(model, name)}
    try:
        with torch.no_grad():
            output = getattr(model, name)(**taken)
    except Exception:
        return 0
    output = getattr(output, "pooler_output", output)
    features = output if isinstance(output, (list, tuple)) else [output]
    return sum(feature.numel() // feature.shape[-1] for feature in features if isinstance(feature, torch.Tensor))


def _all_parameters(model: Any, name: str) -> set[str]:
    """Of the method of `model`, which may hand its own arguments on to that of `model.model`."""
    methods = (getattr(owner, name, None) for owner in (model, getattr(model, "model", None)))
    return {parameter for method in methods if method is not None for parameter in parameters_of(method)}


def _token(config: Any, *names: str) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((int(token) for token in values if isinstance(token, int)), None)


def _images(model: Any, like: torch.Tensor) -> Iterator[Medium]:
    """Images that the model turns into features, in the layouts that models take."""
    vision = getattr(model.config, "vision_config", None)
    token = _token(model.config, "image_token_id", "image_token_index")
    if vision is None or token is None or not hasattr(model, "get_image_features"):
        return
    for tensors in _image_layouts(vision, like):
        if features := _features(model, "get_image_features", tensors):
            taken = _all_parameters(model, "get_image_features") | parameters_of(model.forward)
            yield Medium({name: value for name, value in tensors.items() if name in taken}, token, features)


def _image_layouts(vision: Any, like: torch.Tensor) -> Iterator[dict[str, torch.Tensor]]:
    channels = int(getattr(vision, "num_channels", None) or getattr(vision, "in_channels", None) or 3)
    patch, merge = getattr(vision, "patch_size", 14), int(getattr(vision, "spatial_merge_size", 1) or 1)
    if isinstance(patch, int):
        side, frames = 2 * merge, int(getattr(vision, "temporal_patch_size", 1) or 1)
        grid = torch.tensor([[1, side, side]], device=like.device)
        patches = _random((side * side, channels * frames * patch * patch), like)
        yield {"pixel_values": patches, "image_grid_thw": grid, "grid_thw": grid}
    size = getattr(vision, "image_size", None) or 4 * merge * (patch if isinstance(patch, int) else patch[0])
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[1]))
    sizes = torch.tensor([[height, width]], device=like.device)
    image = _random((1, channels, height, width), like)
    yield {"pixel_values": image}
    yield {"pixel_values": image, "image_sizes": sizes}
    yield {"pixel_values": image[None], "image_sizes": sizes}
    yield {"pixel_values": torch.cat([image, image])[None], "image_sizes": sizes}  # the image, and its only tile


def _sounds(model: Any, like: torch.Tensor) -> Iterator[Medium]:
    """Sounds as spectrograms, [1, bins, length] or [1, length, bins]."""
    audio = getattr(model.config, "audio_config", None) or getattr(model.config, "encoder_config", None)
    token = _token(model.config, "audio_token_id", "audio_token_index")
    if audio is None or token is None:
        return
    names = parameters_of(model.forward)
    for sound in _spectrograms(audio, like):
        length = _spectrogram_length(audio)

        def masked(size: int, sound: torch.Tensor = sound) -> dict[str, torch.Tensor]:
            mask = torch.ones(1, size, dtype=torch.bool, device=like.device)
            return {"input_features": sound, "input_features_mask": mask, "feature_attention_mask": mask}

        counts = [_features(model, "get_audio_features", masked(length))]
        if not hasattr(model, "get_audio_features"):  # halved by a convolution, and again by pooling
            counts = [length // 4, length // 2]
        for count in filter(None, counts):
            for tensors in (masked(length), masked(count)):  # a mask of the spectrogram, or of what becomes of it
                yield Medium({name: value for name, value in tensors.items() if name in names}, token, count)


def _spectrogram_length(audio: Any) -> int:
    return 2 * (_token(audio, "max_source_positions") or SPECTROGRAM // 2)


def _spectrograms(audio: Any, like: torch.Tensor) -> Iterator[torch.Tensor]:
    bins = _token(audio, "num_mel_bins", "input_dim", "feature_size", "input_size", "n_mels") or 80
    sound = _random((1, bins, _spectrogram_length(audio)), like)
    yield sound
    yield sound.transpose(1, 2).contiguous()


def _without_text(model: Any, names: set[str], like: torch.Tensor) -> dict[str, torch.Tensor]:
    """An image or a sound for a model that reads nothing else."""
    config = model.config
    candidates: list[dict[str, torch.Tensor]] = []
    if "pixel_values" in names:
        layouts = _image_layouts(getattr(config, "vision_config", config), like)
        candidates += [{name: value for name, value in layout.items() if name in names} for layout in layouts]
    if "input_features" in names:
        candidates += [{"input_features": sound} for sound in _spectrograms(config, like)]
    if "input_values" in names:
        wave = _random((1, 16000), like)
        candidates += [{"input_values": wave}, {"input_values": wave[None]}]
    for inputs in candidates:
        if _runs(model, inputs):
            return inputs
    raise UnsupportedModel(
        type(model).__name__,
        f"a model that is run on {', '.join(sorted(names)[:6])}",
        "models that take token ids, images or sounds",
        "call rmsnorm_patch.verify(model, inputs) with inputs of your own",
    )
