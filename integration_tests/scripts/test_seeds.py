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
    (runs,) = re.findall(r"^Runs are those of (.*?)\.\n\n", page, flags=re.DOTALL | re.MULTILINE)
    names = re.findall(r"`records/([\w./-]+\.json)`", runs)
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
    assert cells(text, "rms_norm") == [read, read, "ran", read, read, read, "compiled", "ran", "compiled", "ran"]
    assert cells(text, "rms_norm_gated") == [*[read] * 6, *["compiled"] * 3, "ran"]  # not in the record
    assert cells(text, "rms_norm_quantised")[3:6] == ["no"] * 3
    tests = {"failed": 1, "failures": ["a::b"]}
    failed = seeds.targets_text([{**record, "files": listed, "tests": tests}])
    assert cells(failed, "rms_norm") == [*[read] * 6, *["compiled"] * 3, "ran"]
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
    shape = {"op": "fused_add_rms_norm", "dtype": "bf16", "m": 4096, "n": 16384, "variant": ""}
    kernel = {**shape, "mode": "kernel", "us": {"ours": 100.0, "theirs": 101.0}}
    cold = {**shape, "mode": "cold", "us": {"ours": 110.0, "flashinfer_cuda": 132.0}}
    record = {"kernels": [kernel, cold], "device": {"name": "NVIDIA H200"}}
    quoted = ["135.23", "133.98", "0.991"]
    assert cells(seeds.published_text(record), "16384") == ["100.00", "101.00", "1.200", *quoted, "1.352"]
    assert cells(seeds.published_text(record), "1024")[:3] == ["-", "-", "-"]
    another = {**record, "device": {"name": "test data"}}
    assert seeds.published_text(another) == seeds.MISSING


def test_published_rows_of_other_gpus_stand_there_to_the_last(seeds):
    """Beside ours of a GPU that has none: FlashInfer's column and the speed-up, and no ratio between two GPUs."""
    shape = {"op": "fused_add_rms_norm", "dtype": "bf16", "m": 4096, "n": 32768, "variant": ""}
    record = {"kernels": [{**shape, "mode": "kernel", "us": {"ours": 350.0}}], "device": {"name": "test data"}}
    b200, h20 = seeds.other_gpus_text(record).split("**H20**")
    assert cells(b200, "32768") == ["350.00", "-", "182.34", "225.41", "1.236"]
    assert len(b200.split("\n| ")) == 2 + 20
    assert len(h20.split("\n| ")) == 2 + 16
    assert seeds.other_gpus_text({**record, "kernels": []}) == seeds.MISSING
