"""Aims that were given up, from made-up rows (test data, no measurement): each has a reason, a limit and a floor."""

from __future__ import annotations

import re
from copy import deepcopy

import pytest

FUSED, PLAIN, PAIR = "fused_add_rms_norm", "rms_norm", "rms_norm_pair"
SCHEMES = ("fp8_static", "fp8_token", "fp8_block", "fp8_block_columns", "fp8_block_both", "int8_token")
FEW = ("decode-1", "decode-8", "decode-32")


def kernel(op, mode, m, n, ours, peer, copy=None, dtype="bf16", **more):
    us = {"ours": ours, **dict.fromkeys(("eager", "F.rms_norm", "inductor", "liger", "quack"), peer)}
    us |= {**dict.fromkeys(("flashinfer", "flashinfer_cuda", "vllm"), peer), **more}
    shape = {"op": op, "mode": mode, "dtype": dtype, "m": m, "n": n, "variant": "", "bytes": m * n * 8}
    return {**shape, "us": us, "failed": {}, "roofline_us": copy}


def engine(shape, variant, case, share, step=7.0, speed=9.0):
    row = {"shape": shape, "variant": variant, "process": "shared", "case": case, "tokens_per_s": speed}
    spread = {"tokens_per_s_range": [speed - 1, speed + 1], "step_us_range": [step - 0.5, step + 0.5]}
    return {**row, **spread, "speedup": speed / 9.0, "step_us": step, "share_recovered": share}


def quantised():
    """Rows of every scheme that miss their aims: few rows and more in a chain, many from memory."""
    found = [kernel(FUSED, "chain", m, 4096, 1.5, 2.4) for m in (16, 256)]
    for scheme in SCHEMES:
        op, far = f"{FUSED}_{scheme}", scheme in ("fp8_block_columns", "fp8_block_both")
        peer = {"fp8_static": 2.3, "fp8_block": 3.85, "fp8_block_both": 2.0}.get(scheme, 2.9)
        found.append(kernel(op, "cold", 4096, 4096, 30.0, 29.5, copy=28.0 if far else 29.7))
        found.append(kernel(op, "chain", 16, 4096, 2.0, peer))
        found.append(kernel(op, "chain", 256, 4096, 2.0, 1.7 if scheme == "fp8_block_both" else 4.0))
    return found


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
        "digest": "test data",
        "device": {"name": script("benchlib.aims").GPU},
        "kernels": [
            kernel(FUSED, "chain", 64, 8192, 1.6, 2.08),
            kernel(FUSED, "chain", 1, 2048, 0.9, 1.5),
            kernel(FUSED, "hot", 4096, 1024, 5.0, 6.0, copy=5.6),
            kernel(FUSED, "hot", 4096, 2048, 11.0, 11.2, copy=12.0),
            kernel(PAIR, "cold", 4096, 128, 20.0, 24.0, copy=22.0),
            kernel(PLAIN, "cold", 4096, 32768, 130.0, 140.0, copy=127.0),
            kernel(FUSED, "cold", 4096, 4096, 10.0, 10.15, copy=10.0, ours_triton=10.6),
            kernel(FUSED, "chain", 128, 8192, 2.3, 2.55),
            kernel(PLAIN, "cold", 512, 65536, 38.0, 37.2, copy=34.0),
            kernel(PLAIN, "hot", 1, 768, 1.0, 1.4, dtype="fp32"),
            kernel(PLAIN, "hot", 1, 1536, 1.9, 2.0),
            *quantised(),
        ],
        "hf": [model],
        "vllm": [
            *(engine("llama-1b", "ir", case, 0.25) for case in FEW),
            *(engine("llama-1b", "ir-reorder", case, 0.8) for case in FEW),
            *(engine("llama-8b", "ir", case, 0.48, step=6.52, speed=9.01) for case in FEW),
            *(engine("llama-8b", "stock", case, None) for case in FEW),
            *(engine("llama-8b", "removed", case, None, step=6.0) for case in FEW),
        ],
    }


def tables(script, record) -> str:
    return script("results").aims_table(record) + "\n" + script("results").quantised_aims(record)


def lines_of(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]


def said(script, record) -> dict[str, str]:
    """What the tables say of each aim that can be retired."""
    retired = script("benchlib.retired").RETIRED
    return {row[0]: row[3] for row in lines_of(tables(script, record)) if row[0] in retired and row[1].startswith("a")}


def test_every_retired_aim_is_an_aim(script, record):
    aims, retired = script("benchlib.aims"), script("benchlib.retired")
    works = [aim.work for aim in [*aims.of(record), *aims.quantised(record)]]
    assert [work for work in retired.RETIRED if work not in works] == []
    assert len(works) == len(set(works))


def test_a_missed_aim_below_whose_figure_a_limit_lies_is_retired_with_its_reason(script, record):
    retired = script("benchlib.retired").RETIRED
    assert said(script, record) == dict.fromkeys(retired, "retired")
    reasons = [row for row in lines_of(tables(script, record)) if row[0] in retired and not row[1].startswith("a")]
    assert len(reasons) == len(retired)
    for work, held, limit, because in reasons:
        assert (float(held), because) == (retired[work].held, retired[work].because)
        assert re.search(r"\d", limit)


def slower(record, op, mode, m, n):
    (row,) = (row for row in record["kernels"] if (row["op"], row["mode"], row["m"], row["n"]) == (op, mode, m, n))
    row["us"]["ours"] *= 1.1


BELOW = {
    "CHAIN_FEW": lambda record: slower(record, FUSED, "chain", 64, 8192),
    "HOT": lambda record: slower(record, FUSED, "hot", 4096, 2048),
    "ONE_LAUNCH": lambda record: slower(record, PAIR, "cold", 4096, 128),
    "PLAIN_COPY": lambda record: slower(record, PLAIN, "cold", 4096, 32768),
    "SHARE_1B": lambda record: record["vllm"][0].update(share_recovered=0.1),
    "FUSED_MEAN": lambda record: record["kernels"][6]["us"].update(ours=10.06),
    "CHAIN_MANY": lambda record: slower(record, FUSED, "chain", 128, 8192),
    "LONG": lambda record: slower(record, PLAIN, "cold", 512, 65536),
    "DTYPES": lambda record: record["kernels"][9]["us"].update(ours=1.1),
    "TRITON": lambda record: record["kernels"][6]["us"].update(ours_triton=11.0),
    "SHARE_8B": lambda record: record["vllm"][6].update(share_recovered=0.4),
}


@pytest.mark.parametrize("name", BELOW)
def test_a_figure_below_what_is_held_is_missed_again(script, record, name):
    BELOW[name](record)
    again = {work for work, met in said(script, record).items() if met == "**no**"}
    assert again == {getattr(script("benchlib.aims"), name)}


REACHED = {
    "CHAIN_FEW": lambda record: record["kernels"][0].update(bytes=1000),
    "HOT": lambda record: record["kernels"][3].update(roofline_us=10.0),
    "ONE_LAUNCH": lambda record: record["kernels"][4].update(roofline_us=18.0),
    "FUSED_MEAN": lambda record: record["kernels"][6].update(roofline_us=9.9),
    "CHAIN_MANY": lambda record: record["kernels"][7].update(bytes=1000),
    "SHARE_8B": lambda record: record["vllm"][6].update(step_us_range=[7.2, 7.3]),
}


@pytest.mark.parametrize("scheme", SCHEMES[1:])
def test_quantising_that_adds_more_than_is_held_is_missed_again(script, record, scheme):
    """What is held is the most that counts there, not the least."""
    slower(record, f"{FUSED}_{scheme}", "chain", 16, 4096)
    work = script("benchlib.aims").of_quantised(f"{FUSED}_{scheme}", "few: above our bf16 norm")
    assert said(script, record)[work] == "**no**"


@pytest.mark.parametrize("name", REACHED)
def test_an_aim_that_can_be_had_is_not_retired(script, record, name):
    REACHED[name](record)
    again = {work for work, met in said(script, record).items() if met == "**no**"}
    assert again == {getattr(script("benchlib.aims"), name)}


def test_without_the_rows_that_show_a_limit_nothing_is_retired(script, record):
    bare = deepcopy(record)
    bare["hf"][0].pop("spread")
    bare["vllm"] = [row for row in bare["vllm"] if row["variant"] == "ir"]
    bare["kernels"] = [{**row, "roofline_us": None} for row in bare["kernels"] if row["op"] in (FUSED, PLAIN, PAIR)]
    for row in bare["kernels"]:
        row["us"] = {name: us for name, us in row["us"].items() if row["dtype"] != "fp32" or name == "ours"}
    words = {work: word for work, word in said(script, bare).items() if word == "retired"}
    assert words == {script("benchlib.aims").DTYPES: "retired"}  # its limit is a launch of our own


def test_a_met_aim_is_never_called_retired(script, record):
    record["kernels"][0]["us"]["ours"] = 1.0
    assert said(script, record)[script("benchlib.aims").CHAIN_FEW] == "yes"


def test_another_gpu_has_reasons_and_limits_and_holds_nothing(script, record):
    record["device"]["name"] = "another"
    for row in record["kernels"]:
        row["us"]["ours"] *= 1.5
    retired = script("benchlib.retired").RETIRED
    known = {row[0]: row[1:] for row in lines_of(tables(script, record)) if row[0] in retired and len(row) == 3}
    assert known[script("benchlib.aims").HOT][1] == retired[script("benchlib.aims").HOT].because
    assert "held instead" not in tables(script, record)


@pytest.mark.parametrize("name", ["results", "results_quantised", "results_h100", "results_h100_quantised"])
def test_no_page_has_a_bare_no(repository, name):
    """Each missed aim has a line below the table that says why."""
    text = (repository / "docs" / f"{name}.md").read_text().partition("## Aims")[2].partition("\n## ")[0]
    table, *reasons = text.split("\n\n| work |")[1:]
    judged = {row[0]: row[-1] for row in lines_of(table)[1:]}
    missed = {work for work, word in judged.items() if word not in ("yes", "open")}
    assert len(judged) > 20
    assert missed
    assert {judged[work] for work in missed} <= {"retired", "below"}
    rows = [row for part in reasons for row in lines_of(part)[1:]]
    assert sorted(row[0] for row in rows) == sorted(missed)
    assert all(".md#" in row[-1] for row in rows)
