"""Patch the two shipped checkpoints, prove them, compare text and speed: what `make demo` runs.

    python scripts/demo.py [MODEL ...] [options of `rmsnorm-patch demo`]

Without a GPU the shipped checkpoints run no kernel. Then one norm with its add is proved on the Triton kernel, in
Triton's interpreter, and the ratios that a GPU's record has are shown.

Exit status 0: every proof passed and the text is the same; 1: something differs.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

from rmsnorm_patch.cli import main

ROOT = Path(__file__).resolve().parent.parent
SHIPPED = ROOT / "integration_tests" / "data"
NORM = "model.layers.0.post_attention_layernorm"
"""The one that the interpreter proves: it stands behind an add, in the same layer."""
LOUD = ("torchao", "torch.utils._pytree")
"""Loggers of libraries that transformers imports where they are installed: they warn of what no model here needs."""


def kernel_in_the_interpreter() -> int:
    """Prove one norm with its add on the Triton kernel; the exit status of `rmsnorm-patch verify`."""
    print("\nThis machine has no GPU: the rewriting was proved with the model's own arithmetic, and no kernel ran.")
    if find_spec("triton") is None:
        print("Triton is not installed, so none can run in its interpreter.")
        return 0
    print("Now one norm and its add run on the Triton kernel, in Triton's interpreter:", flush=True)
    words = ["verify", str(SHIPPED / "tiny-llama"), "--backend", "triton", "--device", "cpu", "--include", NORM]
    words += ["--site", NORM, "--prompt", "Return", "--max-new-tokens", "1"]
    os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported: in a process of its own
    process = multiprocessing.get_context("spawn").Process(target=program, args=(words,))
    process.start()
    process.join()
    return process.exitcode or 0


def program(words: list[str]) -> None:
    """`rmsnorm-patch` without what libraries say of themselves; ends the process."""
    for name in LOUD:
        logging.getLogger(name).setLevel(logging.ERROR)
    main(words)


def recorded() -> str:
    """What the record that the results page is made of says of models on its GPU, beside the CPU's ratios."""
    from benchlib.aims import overlap

    page = (ROOT / "docs" / "results.md").read_text()
    name = re.search(r"`(records/[\w./-]+\.json)`", page)
    record = json.loads((ROOT / name[1]).read_text()) if name else {"hf": []}
    found = [
        f"{row['ratio_to_stock']['patched']:.2f}x ({row['work']}{', rounds overlap' if overlap(row, 'stock') else ''})"
        for row in record["hf"]
        if (row["model"], row["mode"]) == ("llama-8b", "eager") and "patched" in row["ratio_to_stock"]
    ]
    if not name or not found:
        return "No record of a GPU has models."
    device = record["device"]["name"]
    return (
        f"\nThe ratios above are a CPU's, without kernels. On an {device} kernels ran, and patched over stock was "
        f"{', '.join(found)}: Llama-8B shapes, {name[1]}."
    )


def without_a_gpu(given: list[str]) -> bool:
    """Whether the shipped checkpoints ran as they are, on a machine with no GPU."""
    if any(word in ("--json", "--help", "--backend") for word in given) or os.environ.get("TRITON_INTERPRET"):
        return False
    import torch

    return not torch.cuda.is_available()


def run(given: list[str]) -> int:
    names_models = bool(given) and not given[0].startswith("-")
    models = [] if names_models else [str(SHIPPED / name) for name in ("tiny-llama", "tiny-mistral")]
    try:
        program(["demo", *models, *given])
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    if models and status == 0 and without_a_gpu(given):
        status = kernel_in_the_interpreter()
        print(recorded())
    return status


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
