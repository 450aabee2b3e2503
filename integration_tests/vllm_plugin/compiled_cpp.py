"""Inductor's C++ compiler, asked once for each source: engines that differ in their norms share the rest.

vLLM gives every configuration a cache of its own, in which Inductor would compile the same kernels once more. What was
compiled stays with the environment, as Inductor's own cache stays where vLLM does not move it.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path

from filelock import FileLock

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # `kept`: test folders are not packages
from kept import kept_folder


@cache
def release_of(compiler: str) -> str:
    """What the compiler and torch's headers are, which a command does not say."""
    import torch

    told = subprocess.run([compiler, "--version"], check=True, capture_output=True, text=True).stdout
    return f"{told}{torch.__version__} {torch.version.git_version}"


def key_of(words: list[str]) -> str:
    """Of a compiler's command: its words, without the folders of the files that it reads and writes, and what those
    that it reads hold. Inductor names a source by its content, a header by what it includes too."""
    total = hashlib.sha256(release_of(words[0]).encode())
    output = words[words.index("-o") + 1]
    for word in words:
        read = word != output and os.path.isfile(word)
        total.update(f"{os.path.basename(word) if read or word == output else word}\0".encode())
        total.update(Path(word).read_bytes() if read else b"")
    return total.hexdigest()


def install() -> None:
    """In this process; all of them share what was compiled."""
    from torch._inductor import cpp_builder

    compile_now, folder = cpp_builder._run_compile_cmd, kept_folder("cpp")

    def compile_once(command: str, cwd: str) -> None:
        words = shlex.split(command)
        output, kept = Path(words[words.index("-o") + 1]), folder / key_of(words)
        with FileLock(f"{kept}.lock"):
            if not kept.exists():
                compile_now(command, cwd)
                shutil.copy(output, kept.with_suffix(".new"))
                kept.with_suffix(".new").rename(kept)
        shutil.copy(kept, output)

    cpp_builder._run_compile_cmd = compile_once
