"""Aims that were given up, from made-up rows (test data, no measurement): each has a reason, a limit and a floor."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest

FUSED, PLAIN, PAIR = "fused_add_rms_norm", "rms_norm", "rms_norm_pair"


def kernel(op, mode, m, n, ours, peer, copy=None):
    us = {"ours": ours, **dict.fromkeys(("eager", "F.rms_norm", "inductor", "liger", "quack"), peer)}
    us |= dict.fromkeys(("flashinfer", "flashinfer_cuda", "vllm"), peer)
    shape = {"op": op, "mode": mode, "dtype": "bf16", "m": m, "n": n, "variant": "", "bytes": m * n * 8}
    return {**shape, "us": us, "failed": {}, "roofline_us": copy}


def engine(variant, case, share):
    row = {"shape": "llama-1b", "variant": variant, "process": "shared", "case": case, "tokens_per_s": 9.0}
    return {**row, "speedup": 1.0, "step_us": 7.0, "share_recovered": share}


@pytest.fixture
def record(script):
    """Every aim that can be retired is missed, and its limit is below it."""
    model = {
        "model": "llama-8b", "layers": 32, "work": "prefill 4x2048", "mode": "eager",
        "tokens_per_s": {"stock": 80.0, "liger": 100.0, "patched": 99.5},
        "spread": {"stock": [79.0, 81.0], "liger": [99.0, 101.0], "patched": [98.0, 100.0]},
        "ratio_to_stock": {"stock": 1.0, "liger": 1.25, "patched": 1.24},
    }  # fmt: skip
    return {
        "device": {"name": script("benchlib.aims").GPU},
        "kernels": [
            kernel(FUSED, "chain", 64, 8192, 1.6, 2.08),
            kernel(FUSED, "chain", 1, 2048, 0.9, 1.5),
            kernel(FUSED, "hot", 4096, 1024, 5.0, 6.0, copy=5.6),
            kernel(FUSED, "hot", 4096, 2048, 11.0, 11.2, copy=12.0),
            kernel(PAIR, "cold", 4096, 128, 20.0, 24.0, copy=22.0),
            kernel(PLAIN, "cold", 4096, 32768, 130.0, 140.0, copy=127.0),
        ],
        "hf": [model],
        "vllm": [
            *(engine("ir", case, 0.25) for case in ("decode-1", "decode-8", "decode-32")),
            *(engine("ir-reorder", case, 0.8) for case in ("decode-1", "decode-8", "decode-32")),
        ],
    }


def said(script, record) -> dict[str, str]:
    """What the page's table says of each aim that can be retired."""
    table = script("results").aims_table(record).split("\n\nWhat is known")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("|")]
    return {row[0]: row[-1] for row in rows if row[0] in script("benchlib.retired").RETIRED}


def test_every_retired_aim_is_an_aim(script, record):
    works = [aim.work for aim in script("benchlib.aims").of(record)]
    assert [work for work in script("benchlib.retired").RETIRED if work not in works] == []
    assert len(works) == len(set(works))


def test_a_missed_aim_below_whose_figure_a_limit_lies_is_retired_with_its_reason(script, record):
    retired = script("benchlib.retired").RETIRED
    assert said(script, record) == dict.fromkeys(retired, "retired")
    reasons = script("results").aims_table(record).split("\n\nWhat is known")[1]
    for work, entry in retired.items():
        (line,) = (line for line in reasons.splitlines() if line.startswith(f"| {work} |"))
        _, held, limit, because = line.strip("| ").split(" | ")
        assert (float(held), because) == (entry.held, entry.because)
        assert re.search(r"\d", limit)


def slower(record, op, mode, m, n):
    (row,) = (row for row in record["kernels"] if (row["op"], row["mode"], row["m"], row["n"]) == (op, mode, m, n))
    row["us"]["ours"] *= 1.1


BELOW = {
    "CHAIN_FEW": lambda record: slower(record, FUSED, "chain", 64, 8192),
    "HOT": lambda record: slower(record, FUSED, "hot", 4096, 2048),
    "ONE_LAUNCH": lambda record: slower(record, PAIR, "cold", 4096, 128),
    "PLAIN_COPY": lambda record: slower(record, PLAIN, "cold", 4096, 32768),
    "PATCHED_AHEAD": lambda record: record["hf"][0]["tokens_per_s"].update(patched=98.0),
    "SHARE_1B": lambda record: record["vllm"][0].update(share_recovered=0.1),
}


@pytest.mark.parametrize("name", BELOW)
def test_a_figure_below_what_is_held_is_missed_again(script, record, name):
    BELOW[name](record)
    again = {work for work, met in said(script, record).items() if met == "**no**"}
    assert again == {getattr(script("benchlib.aims"), name)}


REACHED = {
    "CHAIN_FEW": lambda record: record["kernels"][1]["us"].update(ours=0.5),
    "HOT": lambda record: record["kernels"][3].update(roofline_us=10.0),
    "ONE_LAUNCH": lambda record: record["kernels"][4].update(roofline_us=18.0),
    "PATCHED_AHEAD": lambda record: record["hf"][0]["spread"].update(liger=[100.5, 101.0]),
}


@pytest.mark.parametrize("name", REACHED)
def test_an_aim_that_can_be_had_is_not_retired(script, record, name):
    REACHED[name](record)
    again = {work for work, met in said(script, record).items() if met == "**no**"}
    assert again == {getattr(script("benchlib.aims"), name)}


def test_without_the_rows_that_show_a_limit_nothing_is_retired(script, record):
    bare = deepcopy(record)
    bare["hf"][0].pop("spread")
    bare["vllm"] = bare["vllm"][:3]
    bare["kernels"] = [{**row, "roofline_us": None} for row in bare["kernels"]]
    assert set(said(script, bare).values()) <= {"**no**", "open"}


def test_a_met_aim_is_never_called_retired(script, record):
    record["kernels"][0]["us"]["ours"] = 1.0
    assert said(script, record)[script("benchlib.aims").CHAIN_FEW] == "yes"
