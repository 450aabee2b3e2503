"""The page of published figures beside ours: made from one record, theirs marked, what ran told from what compiles."""

from __future__ import annotations

import json
import re

import pytest


@pytest.fixture(scope="module")
def seeds(script):
    return script("seeds")


@pytest.fixture(scope="module")
def shown(repository) -> dict[str, dict]:
    """The records that the page names, in its order."""
    page = (repository / "docs" / "seeds.md").read_text()
    names = dict.fromkeys(re.findall(r"`records/([\w./-]+\.json)`", page))
    return {name: json.loads((repository / "records" / name).read_text()) for name in names}


def test_the_page_is_that_of_its_record(seeds, shown, repository):
    assert seeds.page(shown) == (repository / "docs" / "seeds.md").read_text()


def test_a_section_comes_from_the_first_record_that_has_it(seeds):
    row = {"op": "rms_norm", "mode": "cold", "dtype": "fp16", "m": 4096, "n": 1024, "variant": ""}
    empty = {"digest": "a" * 64, "device": {"name": "test data"}, "kernels": [], "tests": None, "files": {}}
    timed = {**empty, "digest": "b" * 64, "kernels": [{**row, "us": {"ours": 2.0, "eager": 8.0}}]}
    sections = seeds.page({"one.json": empty, "other.json": timed}).split("## ")
    assert "From `records/other.json`, code digest `bbbbbbbbbbbbbbbb`" in sections[2]
    assert "Not in this record." in sections[3]
    assert "From" not in sections[3]


def test_every_document_has_a_section(seeds, shown):
    page = seeds.page(shown)
    assert len(seeds.DOCUMENTS) == 5
    assert all(f"## {title}" in page and command in page for title, _, command, _ in seeds.DOCUMENTS)


def cells(text: str, op: str) -> list[str]:
    (line,) = [line for line in text.split("\n") if line.startswith(f"| {op} |")]
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_what_ran_is_what_the_record_has_tests_of(seeds):
    record = {"device": {"capability": [9, 0]}, "tests": {"failed": 0}}
    listed = {
        "kernels/cuda/rms_norm_rows.cu": "",
        "kernels/cuda/rms_norm_stream.cu": "",
        "kernels/triton/rms_norm.py": "",
    }
    text = seeds.targets_text([{**record, "files": listed}])
    read = "compiled, read"
    assert cells(text, "rms_norm") == [read, read, "ran", read, read, read, "ran", "compiled", "ran"]
    assert cells(text, "rms_norm_gated") == [*[read] * 6, "compiled", "compiled", "ran"]  # not in the record
    assert cells(text, "rms_norm_quantised")[3:6] == ["no"] * 3
    tests = {"failed": 1, "failures": ["a::b"]}
    failed = seeds.targets_text([{**record, "files": listed, "tests": tests}])
    assert cells(failed, "rms_norm") == [*[read] * 6, "compiled", "compiled", "ran"]
    explained = {**tests, "explained": {"a::b": "the test is wrong"}}
    assert seeds.targets_text([{**record, "files": listed, "tests": explained}]) == text


def test_gigabytes_a_second_of_fp16_rows(seeds):
    row = {"op": "rms_norm", "mode": "cold", "dtype": "fp16", "m": 4096, "n": 1024, "variant": ""}
    text = seeds.bandwidth_text({"kernels": [{**row, "us": {"ours": 2.0, "ours_triton": 4.0, "eager": 8.0}}]})
    # 2 * 2 * 4096 * 1024 bytes in 2, in 4 and in 8 microseconds.
    assert cells(text, "1024") == ["8389", "4194", "2097", "4.00", "2.00", "135.46", "19.84", "6.83"]


def test_latency_bandwidth_and_rate_of_the_naive_kernels(seeds):
    call = {"op": "rms_norm", "dtype": "fp32", "m": 1, "n": 2048, "kernels": 3, "dram_percent": 1.0}
    row = {**call, "provider": "naive", "us": 6.0, "counts": dict.fromkeys(seeds.METRICS, 1.0)}
    text = seeds.profile_text({"profile": [row], "device": {"name": "test data"}})
    # 3 * 4 * 2048 bytes and 5 * 2048 operations in 6 microseconds.
    assert cells(text, "naive") == ["test data", "3", "6.00", "4.10", "1.71"]


def test_flashinfer_is_held_against_ours_of_one_run(seeds):
    shape = {"op": "fused_add_rms_norm", "dtype": "bf16", "m": 4096, "n": 20480, "variant": ""}
    kernel = {**shape, "mode": "kernel", "us": {"ours": 100.0}}
    cold = {**shape, "mode": "cold", "us": {"ours": 110.0, "flashinfer_cuda": 132.0}}
    text = seeds.published_text({"kernels": [kernel, cold], "device": {"name": "test data"}})
    row = cells(text, "20480")
    assert row == ["100.00", "-", "-", "115.74", "-", "1.200", "-", "1.024"]
