"""compare_launches.py: versions stand side by side in one process, alternate and are told apart; the page of both."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--shapes", "1x64", "3x32", "--rounds", "4", "--host-rounds", "3"]

LAUNCHERS = """
import sys, tempfile
from pathlib import Path

checkout, driver, first, second = sys.argv[1:]
sys.path[:0] = [checkout, checkout + "/scripts"]
import compare_launches
from benchlib import trees

with tempfile.TemporaryDirectory() as place:
    numbers = {"one": int(first), "two": int(second)}
    compared = [trees.load(name, Path(checkout), Path(place), number) for name, number in numbers.items()]
    for tree in compared:
        tree.module("backends.cuda.driver").LIBRARY = driver
    print(compare_launches.check_launchers(compared))
"""


@pytest.fixture
def compare(script: Callable[[str], ModuleType]) -> ModuleType:
    return script("compare_launches")


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """In a process of its own: copies of the package stay imported."""
    command = [sys.executable, str(ROOT / "scripts" / "compare_launches.py"), "run", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def copied(folder: Path) -> Path:
    for name in ("kernels", "rmsnorm_patch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_versions_are_compared_and_timed(compare: ModuleType, tmp_path: Path) -> None:
    """One of them computes something else for plain norms: its bits are counted, and those of no other."""
    other = copied(tmp_path / "other")
    reference = other / "rmsnorm_patch" / "numerics" / "reference.py"
    before = reference.read_text()
    changed = before.replace(
        "def rms_norm(", "def rms_norm(*args):\n    return -_rms_norm(*args)\n\n\ndef _rms_norm(", 1
    )
    assert changed != before
    reference.write_text(changed)
    (other / "COMMIT").write_text("abc1234\n")
    target = tmp_path / "new" / "out.json"
    done = run("--old", str(ROOT), "--also", f"other={other}", *SMALL, "--json", str(target))
    assert done.returncode == 1, done.stderr
    record = json.loads(target.read_text())

    assert list(record["trees"]) == ["old", "again", "other", "now"]
    assert record["trees"]["other"]["commit"] == "abc1234"
    digests = {name: known["digest"] for name, known in record["trees"].items()}
    assert digests["old"] == digests["again"] == digests["now"]
    assert digests["other"] != digests["old"]

    bits = {(row["op"], row["n"]): row["differing"] for row in record["rows"] if row["what"] == "bits"}
    assert len(bits) == 6
    for (op, n), counts in bits.items():
        assert counts["again"] == counts["now"] == 0
        assert (counts["other"] >= n) is (op == "rms_norm")

    host = [row for row in record["rows"] if row["what"].startswith("host")]
    assert [row["what"] for row in host] == ["host bound", "host op"] * 6
    for row in host:
        assert min(row["us"].values()) > 0
        assert list(row["ratio"]) == ["again", "other", "now"]

    section = "\n".join(compare.tables_of(record, target.name))
    assert f"| other | abc1234 | {sum(counts['other'] == 0 for counts in bits.values())} of 6 | - |" in section
    assert section in done.stdout.replace("\n\n", "\n")


@pytest.mark.gpu
def test_graphs_are_timed_on_a_gpu(tmp_path: Path) -> None:
    target = tmp_path / "out.json"
    done = run("--old", str(ROOT), *SMALL, "--json", str(target))
    assert done.returncode == 0, done.stderr
    rows = [row for row in json.loads(target.read_text())["rows"] if row["what"] == "gpu"]
    assert [row["op"] for row in rows[::2]] == [
        "rms_norm",
        "fused_add_rms_norm",
        "fused_add_rms_norm_",
        "rms_norm_pair",
    ]
    for row in rows:
        assert min(row["us"].values()) > 0


@pytest.mark.parametrize(
    ("older", "numbers"),
    [(True, ("2", "3")), (True, ("2", "2")), (False, ("2", "2"))],
    ids=["older, apart", "older, one path", "now"],
)
def test_each_version_has_its_own_launcher(
    older: bool,
    numbers: tuple[str, str],
    shared_library: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Older versions open their library by the descriptor's own path."""
    driver = shared_library(ROOT / "integration_tests" / "backends" / "cuda" / "recording_driver.c")
    monkeypatch.setenv("RMSNORM_PATCH_CACHE_DIR", str(tmp_path / "cache"))
    checkout = ROOT
    if older:
        checkout = copied(tmp_path / "older")
        shutil.copytree(ROOT / "scripts", checkout / "scripts", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", checkout)
        loading = checkout / "rmsnorm_patch" / "backends" / "cuda" / "launcher" / "__init__.py"
        now = loading.read_text()
        before = now.replace("/proc{spelling}/self/fd/", "/proc/self/fd/")
        assert before != now
        loading.write_text(before)
    command = [sys.executable, "-c", LAUNCHERS, str(checkout), str(driver), *numbers]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if older and numbers[0] == numbers[1]:
        assert "2 versions have 1 libraries" in done.stderr
    else:
        assert (done.returncode, done.stdout.strip()) == (0, "c"), done.stderr


def test_a_round_visits_all_there_and_back(compare: ModuleType) -> None:
    """A machine that gets slower with every sample slows all alike."""
    clock = iter(range(1, 1000))
    seen: list[str] = []

    def sampler(name: str, factor: float) -> Callable[[], float]:
        def sample() -> float:
            seen.append(name)
            return factor * next(clock)

        return sample

    samplers = {name: sampler(name, factor) for name, factor in {"old": 1.0, "again": 1.0, "now": 1.25}.items()}
    samples = compare.alternated(samplers, 20)
    assert seen[:6] == ["old", "again", "now", "now", "again", "old"]
    found = compare.summary(samples)
    assert found["ratio"]["again"] == {"median": 1.0, "interval": [1.0, 1.0], "spread": [1.0, 1.0]}
    assert found["ratio"]["now"]["median"] == 1.25
    assert found["us"]["now"] == pytest.approx(1.25 * found["us"]["old"])


def test_ratios_are_of_the_same_round(compare: ModuleType) -> None:
    """Between rounds the machine may change; the middle of the ratios is not the ratio of the middles."""
    ratios = [1 + step / 1000 for step in range(100)]
    old = [float(7 ** (step % 3)) for step in range(100)]
    samples = {
        "old": [(us, us) for us in old],
        "now": [(us * ratio - 0.1, us * ratio + 0.1) for us, ratio in zip(old, ratios, strict=True)],
    }
    found = compare.summary(samples)["ratio"]["now"]
    assert found == {"median": 1.0495, "interval": [1.04, 1.059], "spread": [1.01, 1.089]}
    few = compare.summary({name: pairs[:3] for name, pairs in samples.items()})["ratio"]["now"]
    assert (few["median"], few["interval"]) == (1.001, [1.0, 1.002])


def test_a_commit_is_exported(compare: ModuleType, tmp_path: Path) -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("needs git's history")
    folder = tmp_path / "old"
    short = compare.trees.export("HEAD", folder)
    assert (folder / "COMMIT").read_text().strip() == short
    words = ["git", "show", "HEAD:rmsnorm_patch/kernel_files.py"]
    want = subprocess.run(words, cwd=ROOT, capture_output=True, check=True).stdout
    assert (folder / "rmsnorm_patch" / "kernel_files.py").read_bytes() == want
    assert (folder / "kernels" / "cuda" / "abi.cuh").exists()
    with pytest.raises(SystemExit, match="not empty"):
        compare.trees.export("HEAD", folder)


def test_the_page_has_the_tables_of_the_records(compare: ModuleType, tmp_path: Path) -> None:
    text = compare.PAGE.read_text()
    assert compare.page(text) == text
    ratio = {"median": 1.0049, "interval": [0.9951, 1.0062], "spread": [0.99, 1.01]}
    beyond = {**ratio, "median": 1.0051}
    shape = {"op": "rms_norm", "m": 8, "n": 4096}
    us = {"old": 1.5, "again": 1.5, "now": 1.5}
    record = {
        "device": "a GPU",
        "versions": {"torch": "2.14.0"},
        "trees": {
            "old": {"commit": "d3b7b4d", "digest": "0" * 64},
            "again": {"commit": "d3b7b4d", "digest": "0" * 64},
            "now": {"commit": "", "digest": "123456789abcdef"},
        },
        "rows": [
            {**shape, "what": "bits", "differing": {"again": 0, "now": 3}},
            {**shape, "what": "gpu", "us": us, "ratio": {"again": ratio, "now": beyond}},
            {**shape, "what": "host op", "us": us, "ratio": {"again": beyond, "now": ratio}},
        ],
    }
    (tmp_path / "some-gpu.json").write_text(json.dumps(record))
    new = compare.page(text, tmp_path)
    assert "a GPU, torch 2.14.0: `records/launches/some-gpu.json`. `old` is d3b7b4d." in new
    assert "| again | d3b7b4d | 1 of 1 | 1.0049 | 1.0051 | 1 of 1 | 0 of 1 |" in new
    assert "| now | 123456789abc | 0 of 1 | 1.0051 | 1.0049 | 0 of 1 | 1 of 1 |" in new
    assert "| rms_norm | 8 x 4096 | 1.50 | 1.0049 (0.9951-1.0062) | 1.0051 (0.9951-1.0062) |" in new
    assert "| rms_norm | 8 x 4096 | op | 1.50 | 1.0051 (" in new
    assert compare.page(new, tmp_path) == new
    head, rest = text.split(compare.BEGIN)
    assert new.startswith(head)
    assert new.endswith(rest.split(compare.END)[1])


@pytest.mark.parametrize("word", ["now=folder", "old=folder", "name", "a b=folder", "name="])
def test_a_name_that_is_taken_or_none_is_refused(compare: ModuleType, word: str) -> None:
    with pytest.raises(SystemExit):
        compare.parsed(["run", "--old", ".", "--also", word])
