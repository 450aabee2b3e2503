"""The results page from made-up records (test data, no measurement): figures, verdicts, what is missing, plots."""

from __future__ import annotations

import json
import re
import sys
from copy import deepcopy

import pytest

from rmsnorm_patch.bench.suites import SUITES

FUSED, PLAIN, PAIR = "fused_add_rms_norm", "rms_norm", "rms_norm_pair"
PEERS = ("eager", "F.rms_norm", "inductor", "liger", "quack", "flashinfer", "flashinfer_cuda", "vllm")
PAGES = ("results.md", "results_quantised.md", "results_vllm.md")
EMPTY = {
    "digest": "test data " * 4,
    "device": {"name": "NVIDIA H200"},  # the aims are set for it
    "versions": {"torch": "0"},
    "tests": None,
    "kernels": [],
    "hf": [],
    "vllm": [],
}


def row(op, mode, m, n, ours, peer, dtype="bf16", variant="", roofline=None, **more):
    us = {"ours": ours, **dict.fromkeys(PEERS, peer)} if peer else {"ours": ours}
    shape = {"op": op, "mode": mode, "dtype": dtype, "m": m, "n": n, "variant": variant, "bytes": m * n * 8}
    return {**shape, "us": {**us, **more}, "failed": {}, "roofline_us": roofline}


def engine(shape, variant, case, speedup=1.02, share=0.6, process="shared"):
    row = {"shape": shape, "variant": variant, "process": process, "case": case, "tokens_per_s": 9.0}
    return {**row, "speedup": speedup, "step_us": 7.0, "share_recovered": share}


@pytest.fixture
def record(script):
    """Every section, every aim met."""
    suites = SUITES
    published = script("benchlib.aims").PUBLISHED["H200"]
    kernels = [
        row(op, "cold", 4096, item.case.n, 10.0, 11.0, roofline=9.95, ours_triton=10.2)
        for op, suite in ((FUSED, "prefill"), (PLAIN, "prefill_norm"))
        for item in suites[suite]
    ]
    kernels += [row(FUSED, "kernel", 4096, int(n), us - 0.5, None, theirs=us + 0.25) for n, us in published.items()]
    kernels += [row(FUSED, "chain", t.case.m, t.case.n, 1.0, 1.5) for t in suites["decode"]]
    kernels += [
        row(t.case.op, t.case.mode, t.case.m, t.case.n, 1.0, 1.5)
        for suite in ("quantised", "quantised_decode")
        for t in suites[suite]
    ]
    kernels += [row(FUSED, "hot", 4096, n, 1.0, 1.5) for n in (1024, 2048)]
    kernels += [row(PAIR, mode, 4096, 128, 1.0, 1.5, ours_two_launches=1.4) for mode in ("cold", "hot")]
    kernels += [row(op, "cold", 512, n, 1.0, 1.1) for op in (FUSED, PLAIN) for n in (65536, 131072, 262144)]
    kernels += [row(FUSED, "cold", 4096, 4096, 1.0, None, variant=v) for v in ("one rounding", "1+w", "weightless")]
    kernels += [row(PLAIN, "hot", 64, 768, 1.0, 2.0, dtype="fp32"), row(PLAIN, "hot", 64, 1536, 2.0, None)]
    kernels += [row(PLAIN, "cold", 4096, 1024, 2.0, 8.0, dtype="fp16")]
    kernels += [row(FUSED, "host", 8, 4096, 5.0, 10.0)]
    hf = [
        {
            "model": "llama-8b", "layers": 32, "work": work, "mode": "eager",
            "tokens_per_s": {"stock": 10.0, "F.rms_norm": 13.0, "patched": 14.0, "removed": 15.0},
            "ratio_to_stock": {"stock": 1.0, "F.rms_norm": 1.3, "patched": 1.4, "removed": 1.5},
        }
        for work in ("decode 1", "decode 32", "prefill 4x2048")
    ]  # fmt: skip
    counts = dict.fromkeys(script("profile_counts").METRICS, 1234.0)
    made = {
        "kernels": kernels,
        "hf": hf,
        "tests": {"passed": 7, "failed": 0, "skipped": 2},
        "vllm": [
            engine(shape, variant, case)
            for shape, variant in (("llama-8b", "ir"), ("llama-1b", "ir"), ("llama-1b", "ir-reorder"))
            for case in ("decode-1", "decode-8", "decode-32", "decode-256", "prefill")
        ],
        "jit": [{"what": "kernel", "op": FUSED, "n": 8192, "kernels": 1, "cold_ms": [99.0], "disk_ms": [1.5]}],
        "profile": [{**call, "kernels": 1, "counts": counts} for call in script("profile_counts").calls()],
        "sanitizer": [{"tool": "memcheck", "errors": 0, "passed": 5, "failed": 0, "skipped": 0}],
    }
    return {**deepcopy(EMPTY), **made}


def verdicts(script, record) -> dict[str, bool | None]:
    return {aim.work: aim.met for aim in script("benchlib.aims").of(record)}


def test_every_aim_is_met_by_figures_that_meet_it(script, record):
    assert set(verdicts(script, record).values()) == {True}


def test_every_aim_is_open_without_figures(script, record):
    assert set(verdicts(script, EMPTY).values()) == {None}
    assert verdicts(script, EMPTY).keys() == verdicts(script, record).keys()


@pytest.mark.parametrize(
    ("choose", "change", "aims"),
    [
        (lambda r: r["mode"] == "chain" and r["op"] == FUSED and r["m"] == 64, 1.2, ["dependent chain, 1 to 64 rows"]),
        (
            lambda r: r["mode"] == "chain" and r["op"] == FUSED and r["m"] == 256,
            1.4,
            ["dependent chain, 128 and 256 rows"],
        ),
        (lambda r: r["mode"] == "hot" and r["op"] == FUSED, 1.45, ["hot"]),
        (lambda r: r["mode"] == "kernel" and r["n"] == 16384, 136.0, ["kernel time alone"]),
        (lambda r: r["n"] == 262144 and r["op"] == PLAIN, 1.2, ["rows of 65536"]),
        (lambda r: r["variant"] == "1+w", 1.1, ["bytes per second"]),
        (lambda r: r["mode"] == "host", 9.0, ["over quack", "over add + F.rms_norm"]),
        (lambda r: r["op"] == PAIR, 1.3, ["one launch for both"]),
    ],
)
def test_one_slow_row_fails_its_aim_and_no_other(script, record, choose, change, aims):
    rows = [row for row in record["kernels"] if choose(row)]
    assert rows
    rows[-1]["us"]["ours"] = change
    failed = [work for work, met in verdicts(script, record).items() if met is not True]
    assert len(failed) == len(aims)
    assert all(any(aim in work for work in failed) for aim in aims), failed


def test_an_aim_is_not_met_while_a_peer_was_not_timed(script, record):
    for found in record["kernels"]:
        found["us"].pop("quack", None)
    aims = [aim for aim in script("benchlib.aims").of(record) if "not timed: quack" in aim.measured]
    assert len(aims) == 10
    assert {aim.met for aim in aims} == {None}


def test_the_in_place_form_does_not_count_for_host_cost(script, record):
    host = next(row for row in record["kernels"] if row["mode"] == "host")
    host["us"].update(ours=9.0, ours_inplace=1.0)
    assert [work for work, met in verdicts(script, record).items() if not met] == [
        "host cost of an eager fused add, output allocated, over quack",
        "host cost of an eager fused add, output allocated, over add + F.rms_norm",
    ]


def write(script, record, folder, monkeypatch) -> str:
    path = folder / "test-data.json"
    path.write_text(json.dumps(record))
    monkeypatch.setattr(sys, "argv", ["results.py", str(path), "--out", str(folder)])
    script("results").main()
    return "".join((folder / name).read_text() for name in PAGES)


def test_a_page_of_everything(script, record, tmp_path, monkeypatch):
    text = write(script, record, tmp_path, monkeypatch)
    assert "Not in this record" not in text
    assert "on NVIDIA H200" in text
    for name in ("results_roofline.svg", "results_decode.svg"):
        assert f"]({name})" in text
        assert (tmp_path / name).read_text().startswith("<?xml")


def test_each_way_of_quantising_has_a_table(script, record, tmp_path, monkeypatch):
    text = write(script, record, tmp_path, monkeypatch)
    for title, shapes, count in (("From memory", "4096 x ", 3), ("In a chain", "64 x ", 2)):
        section = text.split(f"## {title}\n")[1].split("\n## ")[0]
        assert re.findall(r"^\*\*(\w+)\.\*\*", section, flags=re.MULTILINE) == [
            *("fp8_static", "fp8_token", "fp8_block", "fp8_block_columns", "fp8_block_both", "int8_token")
        ]
        assert section.count(f"\n| {shapes}") == 6 * count


def test_each_way_of_quantising_is_held_against_its_aims(script, record):
    """The page would else show where a peer is ahead, and not that it matters."""

    def met(work: str) -> list[bool | None]:
        return [aim.met for aim in script("benchlib.aims").quantised(record) if aim.work.startswith(work)]

    # Against a copy; the best peer cold; of few rows; of 128 and 256; above our own norm.
    assert met("fp8_static, ") == [None, True, True, True, True]
    assert met("fp8_token, ") == [None, True, False, True, True]
    assert met("fp8_block, ") == [None, True, False, True, True]
    assert met("int8_token, ") == [None, True, True]
    quantised = [row for row in record["kernels"] if row["op"].endswith("fp8_static")]
    for mode, m, us, roofline in (("cold", 4096, 1.6, 1.5), ("chain", 64, 1.45, None), ("chain", 256, 1.45, None)):
        slow = next(row for row in quantised if (row["mode"], row["m"]) == (mode, m))
        slow["us"]["ours"], slow["roofline_us"] = us, roofline
    assert met("fp8_static, ") == [False, False, False, False, False]


def test_a_page_of_nothing_says_so_in_every_section(script, tmp_path, monkeypatch):
    text = write(script, EMPTY, tmp_path, monkeypatch)
    sections = re.split(r"^##? ", text, flags=re.MULTILINE)[2:]
    results = script("results")
    # Tests; links to three pages; the titles of two of them.
    assert len(sections) == len(results.SECTIONS) + len(results.QUANTISED_SECTIONS) + 6
    said = [section for section in sections[1:] if "](" not in section or section.startswith("Tests")]
    assert len(said) == len(sections) - 5
    assert all("Not in this record" in section for section in said)
    assert "svg" not in text


def test_the_same_record_gives_the_same_files(script, record, tmp_path, monkeypatch):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        write(script, record, folder, monkeypatch)
    for name in (*PAGES, "results_roofline.svg", "results_decode.svg"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_a_provider_without_a_figure_is_listed_with_the_reason(script, record):
    record["kernels"][0]["us"].pop("vllm")
    record["kernels"][0]["failed"] = {"vllm": "relative error 3"}
    page = script("results").page({"test-data.json": record}, [])
    assert "vllm has no figure at 4096 x 1024: relative error 3" in page


def test_earlier_records_can_still_be_read(script, repository, tmp_path, monkeypatch):
    for path in (repository / "records" / "superseded").glob("*.json"):
        assert "## Prefill, fused add" in script("results").page({path.name: json.loads(path.read_text())}, [])


@pytest.mark.parametrize(
    ("case", "changes", "aim"),
    [
        ("decode-32", {"speedup": 1.009}, "Llama-8B shapes, decode-1, decode-8, decode-32: tokens/s"),
        ("prefill", {"speedup": 0.996}, "Llama-8B shapes, decode-256, prefill: tokens/s"),
        ("decode-8", {"share_recovered": 0.49}, "Llama-8B shapes, decode-1, decode-8, decode-32: share"),
    ],
)
def test_one_slow_engine_fails_its_aim_and_no_other(script, record, case, changes, aim):
    (row,) = (row for row in record["vllm"] if row["shape"] == "llama-8b" and row["case"] == case)
    row.update(changes)
    (failed,) = (work for work, met in verdicts(script, record).items() if met is not True)
    assert aim in failed
    del row["share_recovered"], row["speedup"]
    assert verdicts(script, record)[failed] is None


def test_engines_that_share_weights_count_before_those_that_do_not(script, record):
    record["vllm"].append(engine("llama-8b", "ir", "decode-8", 0.5, -1.0, process="own"))
    assert set(verdicts(script, record).values()) == {True}


def test_engines_of_further_records_stand_in_place_of_the_first_records(script, record):
    old = {**record, "vllm": [engine("llama-8b", "ir", "decode-1", speedup=0.5, share=-0.5)]}
    both = [engine("llama-1b", "stock", "decode-1"), engine("llama-1b", "ir", "decode-1", share=0.25)]
    other = [{**both[0], "tokens_per_s": 8.0}, engine("llama-1b", "ir-reorder", "decode-1", share=0.75)]
    tests = {"passed": 99, "failed": 0, "skipped": 0}
    more = {**record, "tests": tests, "engine_tests": {**tests, "passed": 33}, "digest": "more " * 8, "kernels": []}
    third = {**more, "vllm": other, "sanitizer": []}
    records = {"old.json": old, "new.json": {**more, "vllm": both}, "third.json": third}
    engines, page = script("results").engines_page(records), script("results").page(records, [])
    of_tests = page.split("## Tests")[1]
    assert "old.json" not in engines
    assert engines.index("`records/new.json`") < engines.index("| 0.25 |") < engines.index("`records/third.json`")
    assert engines.index("`records/third.json`") < engines.index("| 0.75 |")
    assert re.findall(r"`records/(\w+).json`", of_tests) == ["old", "new"]  # the third has the same run
    assert "With vLLM engines: 33 passed" in of_tests
    merged = script("results").joined(records)
    assert merged["kernels"] == old["kernels"]
    assert [row["tokens_per_s"] for row in merged["vllm"]] == [9.0, 9.0, 9.0]


def test_records_of_two_gpus_make_no_page(script, record, tmp_path, monkeypatch, capsys):
    for name, gpu in (("a", "one"), ("b", "another")):
        (tmp_path / f"{name}.json").write_text(json.dumps({**record, "device": {"name": gpu}}))
    words = ["results.py", *(str(tmp_path / f"{name}.json") for name in "ab"), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit):
        script("results").main()
    assert "another, one" in capsys.readouterr().err
    assert not (tmp_path / "results.md").exists()


def test_figures_of_another_gpu_stand_beside_the_aims(script, record):
    """None is judged, none retired, and a column published for one GPU is not held against another."""
    for row in record["kernels"]:
        row["us"] = {name: 1.0 if name.startswith("ours") else 0.5 for name in row["us"]}
    page = script("results").page
    judged, beside = (page({"x.json": {**record, "device": {"name": gpu}}}, []) for gpu in ("NVIDIA H200", "another"))
    aims, given = (text.partition("## Prefill")[0] for text in (judged, beside))
    assert "**no**" in aims
    assert "**no**" not in given
    assert "retired" not in given
    assert "below" in given
    assert "[its page](results.md#aims) judges them" in given
    assert "| another GPU | open |" in given


def test_engines_that_were_started_twice_are_judged_over_their_starts(script, record):
    """The first start's "ir" is what "ir-off" is now, and its "ir-blocks" what "ir" is."""

    def start(variant: str, step: float, rate: float, **more: int) -> list[dict]:
        works = {"decode-1": {"step_us": step}, "prefill": {"tokens_per_s": rate}}
        return [{**engine("llama-8b-block", variant, case), **what, **more} for case, what in works.items()]

    record["vllm"] = [*start("stock", 100.0, 50.0), *start("ir", 101.0, 50.0), *start("ir-blocks", 98.0, 52.0)]
    assert "Several starts" not in script("results").engines_page({"a.json": record})
    record["vllm_starts"] = [
        row
        for number, step, rate in ((2, 97.0, 50.0), (3, 99.0, 49.0))
        for row in (*start("stock", 100.0, 50.0, start=number), *start("ir", step, rate, start=number))
    ]
    text = script("results").engines_page({"a.json": record})
    assert "| llama-8b-block | ir | decode-1 | -2.0 | -3.0 | -1.0 | -2.0 |" in text
    assert "| llama-8b-block | ir | prefill | -3.8 | +0.0 | +2.0 | +0.0 |" in text


def test_a_ratio_says_where_rounds_overlap(script, record):
    """Tokens a second of engines and of models; a step's ratio is of the device's time alone."""
    rates = {"stock": (100.0, [98.0, 102.0]), "ir": (103.0, [101.0, 105.0]), "removed": (110.0, [108.0, 112.0])}
    record["vllm"] = [
        {
            **engine("llama-8b", name, "decode-1"),
            "speedup": rate / 100,
            "tokens_per_s_range": span,
            "step_us": 700 / rate,
        }
        for name, (rate, span) in rates.items()
    ]
    lines = script("results").engines_page({"a.json": record})
    shown = {cells[3]: cells[5:8] for line in lines.splitlines() if len(cells := line.strip("| ").split(" | ")) == 9}
    assert shown["ir"] == ["1.0300~", "6.8", "-2.9 %"]
    assert shown["removed"] == ["1.1000", "6.4", "-9.1 %"]
    assert shown["stock"][2] == "-"
    record["hf"][0]["spread"] = {"stock": [9.0, 13.0], "F.rms_norm": [12.5, 13.5], "patched": [13.5, 14.5]}
    text = script("results").hf_table(record)
    assert "| 10 (1x) | 13 (1.300x~) | 14 (1.400x) |" in text


def test_engines_of_before_are_told_what_they_are_now(script, repository):
    """A record names them by the defaults of its day."""
    record = json.loads((repository / "records" / "superseded" / "nvidia-h100-80gb-hbm3-a5ca851e6155.json").read_text())
    page = " ".join(script("results").engines_page({"a.json": record}).split())
    assert 'In this record "ir-blocks" is what is called "ir" now; its "ir" is "ir-blocks-off" now.' in page
    assert 'In this record "ir-silu" is what is called "ir" now; its "ir" is "ir-silu-off" now.' in page
    record["vllm"] = [row for row in record["vllm"] if row["variant"] in ("stock", "ir")]
    assert "In this record" not in script("results").engines_page({"a.json": record})


@pytest.mark.parametrize("name", ["results", "results_h100"])
def test_the_page_is_that_of_its_records(script, repository, name):
    page = (repository / "docs" / f"{name}.md").read_text()
    names = re.findall(r"`records/([\w./-]+\.json)`", page.split("\n\n")[1])
    records = {file: json.loads((repository / "records" / file).read_text()) for file in names}
    drawn = re.findall(rf"\]\(({name}_\w+\.svg)\)", page)
    assert records
    assert script("results").page(records, drawn, name) == page
    quantised = (repository / "docs" / f"{name}_quantised.md").read_text()
    assert script("results").quantised_page(records, name) == quantised
    assert script("results").engines_page(records) == (repository / "docs" / f"{name}_vllm.md").read_text()
