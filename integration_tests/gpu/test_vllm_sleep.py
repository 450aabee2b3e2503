"""Engines of vLLM whose weights change, and which sleep.

vLLM holds the device's free memory before a sleep against that behind it: no other engine may start meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from vllm_engines import Engines, Settings, check_same, started

pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.alone]
pytest.importorskip("vllm", reason="vLLM is not installed here")

SLEEPING = {
    "tiny-llama-sleep": Settings(
        engine={"enable_sleep_mode": True}, request={"changes": ["loaded", "slept", "restored"]}
    )
}


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory, vllm_processes: Any) -> Iterator[Engines]:
    cases = [("tiny-llama-sleep", route, False) for route in ("off", "ir")]
    with started(tmp_path_factory.mktemp("sleeping"), cases, SLEEPING, vllm_processes, at_once=1) as engines:
        yield engines


def test_the_next_step_reads_weights_that_a_trainer_loads_and_a_sleep_keeps(engines: Engines) -> None:
    """In captured graphs. What was loaded outlives a sleep, and the checkpoint's weights give the first bits again."""
    stock, patched = engines("tiny-llama-sleep", "off", False), engines("tiny-llama-sleep", "ir", False)
    loaded, slept, restored = patched["after"].values()
    assert loaded["logprobs"] != patched["logprobs"]
    assert slept["logprobs"] == loaded["logprobs"]
    assert restored["logprobs"] == patched["logprobs"]
    for how, answer in patched["after"].items():
        check_same(answer, stock["after"][how], tokens=False)
