"""Rounds that overlap judge no aim; what misses it in every round goes before them (test data, no measurement)."""

from __future__ import annotations

import pytest

FEW = ("decode-1", "decode-8", "decode-32")


@pytest.fixture
def aims(script):
    return script("benchlib.aims")


def record(aims, **sections) -> dict:
    empty = {"device": {"name": aims.GPU}, "kernels": [], "hf": [], "vllm": []}
    return {**empty, **sections}


def judged(aims, work: str, **sections):
    (aim,) = [aim for aim in aims.of(record(aims, **sections)) if aim.work == work]
    return aim


def model(work: str, spread: dict[str, tuple[float, float]]) -> dict:
    rates = {name: sum(ends) / 2 for name, ends in spread.items()}
    ratios = {name: rate / rates["stock"] for name, rate in rates.items()}
    row = {"model": "llama-8b", "layers": 32, "work": work, "mode": "eager", "spread": spread}
    return {**row, "tokens_per_s": rates, "ratio_to_stock": ratios}


AHEAD = {"stock": (9.0, 11.0), "patched": (14.0, 16.0)}


@pytest.mark.parametrize(
    ("columns", "met", "said"),
    [
        ({"liger": (12.0, 13.0)}, True, "liger"),
        ({"liger": (15.5, 17.5)}, None, "liger); rounds overlap: 14 to 16 tokens/s, liger 16 to 18"),
        ({"liger": (16.5, 17.5)}, False, "liger"),
        ({"liger": (15.0, 21.0), "quack": (16.5, 16.6)}, False, "quack"),
        ({"liger": (13.0, 14.5)}, None, "liger); rounds overlap"),
        ({"liger": (13.0, 13.9), "quack": (11.0, 14.5)}, None, "quack); rounds overlap"),
    ],
)
def test_the_patched_model_is_ahead_of_every_column(aims, columns, met, said):
    aim = judged(aims, aims.PATCHED_AHEAD, hf=[model("decode 1", {**AHEAD, **columns})])
    assert aim.met is met
    assert said in aim.measured
    assert ("rounds overlap" in aim.measured) == (met is None)


def engines(**spans: tuple[tuple[float, float], tuple[float, float]]) -> list[dict]:
    """Case -> what its rounds span, ours and stock's."""
    found = []
    for case in FEW:
        mine, stock = spans.get(case.replace("-", "_"), ((104.0, 106.0), (99.0, 101.0)))
        for variant, span in (("ir", mine), ("stock", stock)):
            row = {"shape": "llama-8b", "variant": variant, "process": "shared", "case": case}
            found.append({**row, "tokens_per_s_range": list(span), "speedup": sum(mine) / sum(stock)})
    return found


@pytest.mark.parametrize(
    ("spans", "met", "case"),
    [
        ({}, True, "decode"),
        ({"decode_8": ((99.5, 101.0), (99.0, 101.0))}, None, "decode-8"),
        ({"decode_8": ((96.0, 98.0), (99.0, 101.0))}, False, "decode-8"),
        ({"decode_1": ((90.0, 99.5), (99.0, 101.0)), "decode_8": ((96.0, 98.0), (99.0, 101.0))}, False, "decode-8"),
    ],
    ids=["ahead", "overlap", "behind", "behind beside one that overlaps"],
)
def test_engines_are_ahead_where_rounds_are_apart(aims, spans, met, case):
    aim = judged(aims, aims.TOKENS_8B, vllm=engines(**spans))
    assert aim.met is met
    assert case in aim.measured
    assert ("rounds overlap" in aim.measured) == (met is None)


@pytest.mark.parametrize(
    ("repeats", "met", "said"),
    [
        ([[120.0, 130.0]], True, "130.0 ms at worst (rms_norm, N = 0)"),
        ([[189.0, 1046.0]], None, "1046.0 ms at worst (rms_norm, N = 0); repeats overlap: 189.0 to 1046.0 ms"),
        ([[510.0, 520.0]], False, "520.0 ms at worst (rms_norm, N = 0)"),
        ([[189.0, 1046.0], [510.0, 520.0]], False, "520.0 ms at worst (rms_norm, N = 1)"),
    ],
)
def test_repeats_of_a_compilation_on_both_sides_of_the_limit_judge_nothing(aims, repeats, met, said):
    rows = [
        {"what": "first call", "op": "rms_norm", "n": n, "cold_ms": cold, "disk_ms": [1.0]}
        for n, cold in enumerate(repeats)
    ]
    aim = judged(aims, "JIT, kernels of a first call cold", jit=rows)
    assert (aim.met, aim.measured) == (met, said)
