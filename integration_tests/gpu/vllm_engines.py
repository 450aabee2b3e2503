"""Engines of vLLM on this GPU, for tests that read what several of them answered."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from answers import check_near

DATA = Path(__file__).resolve().parents[1] / "data"
PROMPTS = ("You may", "This program is", "Error: ", "When a")
"""On these the checkpoints' two best tokens stay 0.13 apart in an fp32 run: what differs is not a tie."""
TOKENS = 24
LOGPROB_TOLERANCE = 0.05
"""Logprobs of a bf16 model whose norms differ in the order of a row's sum: its logits are of the order 10, where bf16
steps by 0.06, and the final matrix product averages the differences."""

WIDE = {"hidden_size": 4096, "intermediate_size": 14336, "head_dim": 128, "num_attention_heads": 8}
"""Of Llama-8B's widths: few rows of its down projection are split along K, on an H100 and on an H200."""

Case = tuple[str, str, bool]
"""Its name, RMSNORM_PATCH_VLLM and enforce_eager. The name begins with that of its checkpoint, of two words."""


@dataclass(frozen=True)
class Settings:
    """Of an engine, beside those that all have: arguments of `LLM`, further fields of a request, variables."""

    engine: dict[str, Any] = field(default_factory=dict)
    request: dict[str, Any] = field(default_factory=dict)
    variables: dict[str, str] = field(default_factory=dict)


@dataclass
class Engines:
    """`engines("tiny-llama", "ir", True)`: the answer of integration_tests/vllm_plugin/engine.py."""

    work: Path
    settings: dict[str, Settings]
    prompts: list[list[int]]
    processes: Any
    futures: dict[Case, Future[dict[str, Any]]] = field(default_factory=dict)

    def __call__(self, name: str, route: str, eager: bool) -> dict[str, Any]:
        return self.futures[name, route, eager].result()

    def run(self, name: str, route: str, eager: bool) -> dict[str, Any]:
        work = self.work / f"{name}-{route}-{eager}"
        model = "-".join(name.split("-")[:2])
        folder = self.work / model if (self.work / model).exists() else DATA / model
        settings = self.settings.get(name, Settings())
        request = {
            "model": str(folder),
            "enforce_eager": eager,
            "prompts": self.prompts,
            "max_tokens": TOKENS,
            "engine": {"gpu_memory_utilization": 0.05, **settings.engine},
            **settings.request,
        }
        variables = {"RMSNORM_PATCH_VLLM": route, **settings.variables}
        answer: dict[str, Any] = self.processes.run_engine(request, work, work / "cache", **variables)
        return answer


@contextmanager
def started(
    work: Path, cases: list[Case], settings: dict[str, Settings], processes: Any, at_once: int = 0
) -> Iterator[Engines]:
    """The engines of `cases`. settings: by the name of a case. at_once: how many start together; 0 is all."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(DATA / "tiny-llama")
    engines = Engines(work, settings, [tokenizer(prompt).input_ids for prompt in PROMPTS], processes)
    with ThreadPoolExecutor(max_workers=at_once or len(cases)) as pool:
        for case in cases:
            engines.futures[case] = pool.submit(engines.run, *case)
        yield engines


def check_same(patched: dict[str, Any], stock: dict[str, Any], tokens: bool) -> None:
    if tokens:
        assert patched["tokens"] == stock["tokens"]
    check_near(patched, stock, LOGPROB_TOLERANCE)
