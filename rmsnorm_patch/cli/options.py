"""The options that commands share."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

DTYPE_NAMES = {
    **dict.fromkeys(("float32", "fp32", "float"), "float32"),
    **dict.fromkeys(("bfloat16", "bf16"), "bfloat16"),
    **dict.fromkeys(("float16", "fp16", "half"), "float16"),
    "auto": "auto",
}
"""What --dtype takes -> the dtype's own name."""


def dtype_name(text: str) -> str:
    """The name of the dtype called `text`, "bf16" and "torch.bfloat16" for example. Raises typer.BadParameter."""
    name = DTYPE_NAMES.get(text.strip().lower().removeprefix("torch."))
    if name is None:
        raise typer.BadParameter(f"{text!r} is not one of {', '.join(map(repr, DTYPE_NAMES))}.")
    return name


class BackendName(str, Enum):
    auto, reference, triton, cuda = "auto", "reference", "triton", "cuda"


Model = Annotated[Path, typer.Argument(metavar="MODEL", help="Folder with config.json and *.safetensors.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout, the rest on stderr.")]
DtypeOption = Annotated[
    str,
    typer.Option("--dtype", parser=dtype_name, metavar="DTYPE", help="float32, bfloat16, float16; auto: as saved."),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N; auto prefers a GPU.")]
BackendOption = Annotated[
    BackendName, typer.Option("--backend", help="reference, triton or cuda; auto: by device and shape.")
]
Include = Annotated[list[str] | None, typer.Option("--include", help="Pattern on norm paths; may be repeated.")]
Exclude = Annotated[list[str] | None, typer.Option("--exclude", help="Pattern on norm paths; may be repeated.")]
Trust = Annotated[bool, typer.Option("--trust-remote-code", help="Let the checkpoint's own Python code run.")]
Prompt = Annotated[str | None, typer.Option("--prompt", help="Text to run on; a fixed English text by default.")]
VllmModel = Annotated[
    Path | None, typer.Option("--vllm-model", metavar="MODEL", help="Say what vLLM would do with each norm of MODEL.")
]
VllmArguments = Annotated[
    list[str] | None,
    typer.Option("--vllm-arg", help="Argument of `vllm serve`, as --vllm-arg=--enforce-eager; may be repeated."),
]
NewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Tokens to generate.")]
Rounds = Annotated[int, typer.Option("--rounds", min=1, help="Timed rounds, stock and patched in turn.")]
Threads = Annotated[
    int | None, typer.Option("--threads", min=1, help="By default OMP_NUM_THREADS, else the fastest number.")
]
