"""A process that imports vLLM once and forks a child for each program that it is told to run.

What a program imports first takes longer than an eager engine on a small model. A line of JSON on stdin asks for a
child: `words` (as behind `python`: a script, -m module or -c code, then its arguments), `env` (the child's whole
environment), `cwd`, `stdout` and `stderr` (files). A line on stdout answers: its process id, later its exit status.
A child ends as one of `multiprocessing` does: what was registered to run at exit runs, and what it imported goes with
its memory; to take that apart would take as long as an eager engine on a small model. Our package is not among what was
imported: each child loads the plugin anew.
"""

from __future__ import annotations

import atexit
import importlib
import json
import os
import runpy
import sys
import threading
import types
from typing import Any, NoReturn

from garbage import keep_what_is_there

IMPORTED = (
    *("vllm", "vllm.entrypoints.llm", "vllm.v1.engine.llm_engine", "vllm.v1.worker.cpu_worker"),
    *("vllm.model_executor.models.llama", "torch._inductor.compile_fx"),
)
ASKED = (("codecache", "torch_key"), ("cpu_vec_isa", "valid_vec_isa_list"))
"""What Inductor finds out and keeps: a digest of torch's sources, and vector instructions, by compiling for them."""


def answer(value: int) -> None:
    print(value, flush=True)


def become(request: dict[str, Any]) -> None:
    """This process, a new child, takes on what the request says; its own session, so that it can be ended whole."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    for number, (name, flags) in enumerate(
        [
            (os.devnull, os.O_RDONLY),
            *((request[to], os.O_WRONLY | os.O_CREAT | os.O_APPEND) for to in ("stdout", "stderr")),
        ]
    ):
        opened = os.open(name, flags)
        os.dup2(opened, number)
        os.close(opened)


def run(words: list[str]) -> None:
    """As `python *words`."""
    sys.argv = words
    if words[0] == "-c":
        code = compile(words[1], "<string>", "exec")
        sys.argv = ["-c", *words[2:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(code, main.__dict__)
    elif words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(words[0], run_name="__main__")


def end(words: list[str]) -> NoReturn:
    """This process, with the exit status of `python *words`."""
    status: Any = 1
    try:
        run(words)
        status = 0
    except SystemExit as ended:
        status = ended.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
    if isinstance(status, str):
        print(status, file=sys.stderr)
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads that are no daemons
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else status is not None)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for module, question in ASKED:
        getattr(importlib.import_module(f"torch._inductor.{module}"), question)()
    threads = os.listdir("/proc/self/task")
    if len(threads) > 1:
        sys.exit(f"{len(threads)} threads after the imports: a fork would leave a lock that nobody opens")
    keep_what_is_there()
    answer(os.getpid())
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            become(request)
            end(request["words"])
        answer(child)
        answer(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


if __name__ == "__main__":
    main()
