"""The record of what was proved and measured on a GPU, and the check that it still speaks of this code.

    python scripts/gpu_record.py run --record records/nvidia-h200.json     # on a machine with a GPU
    python scripts/gpu_record.py run --parts kernels --suite decode qk --warm-jobs 14
    python scripts/gpu_record.py run --parts vllm --vllm-json vllm.json    # rows of scripts/bench_vllm.py
    python scripts/gpu_record.py run --parts vllm --vllm-json vllm2.json --start 2    # other engines, started anew
    python scripts/gpu_record.py merge A.json B.json --record R.json       # parts that ran side by side on two GPUs
    python scripts/gpu_record.py explain --record R.json --test NAME --because "what showed it to be the test's own"
    python scripts/gpu_record.py check                                     # anywhere: non-zero when a record is stale

`run` can be given in parts: each replaces its own rows of a record with the same digest, and refuses one with another,
so that no record mixes two versions of the code. records/README.md says what a record holds.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import re
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]  # `check` runs anywhere, without the package too

from benchlib import explained, sanitizer  # noqa: E402
from benchlib.checkout import python  # noqa: E402
from benchlib.pytest_runs import merged, run_tests, totals  # noqa: E402

from rmsnorm_patch.bench.versions import versions  # noqa: E402

RECORDS = ROOT / "records"

LAUNCH_CODE = ("numerics", "backends", "ops", "fused")
"""Folders of the package between a tensor and a kernel; with everything in `kernels/` they are what a record proves."""

SUITES = ["prefill", "prefill_norm", "decode", "hot", "qk", "quantised", "quantised_decode"]
SUITES += ["long", "odd", "variants", "fp16", "fp32", "host"]
HF = [
    "--shape llama-8b --rounds 4",
    "--shape llama-8b --layers 8 --compile --batch 1 --variants stock F.rms_norm patched",
    "--shape llama-8b --layers 8 --compile reduce-overhead --ops --batch 1 --variants stock F.rms_norm patched",
]


def covered_files(root: Path) -> list[Path]:
    suffixes = (".py", ".cu", ".cuh", ".c", ".h", ".toml", ".json")
    folders = (root / "kernels", *(root / "rmsnorm_patch" / name for name in LAUNCH_CODE))
    return sorted(p for folder in folders for p in folder.rglob("*") if p.is_file() and p.suffix in suffixes)


def contents_of(paths: list[Path], root: Path) -> dict[str, str]:
    """The sha256 of each file by its path in the checkout `root`."""
    return {path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def files(root: Path | None = None) -> dict[str, str]:
    """`contents_of` the covered files of a checkout, of this one by default."""
    return contents_of(covered_files(root or ROOT), root or ROOT)


def digest_of(listed: dict[str, str]) -> str:
    """sha256 over the names and contents of `files()`, in their order."""
    total = hashlib.sha256()
    for name, content in listed.items():
        total.update(name.encode() + b"\0")
        total.update(bytes.fromhex(content))
    return total.hexdigest()


def digest(root: Path | None = None) -> str:
    """The name of a checkout's version of the kernels and launch code."""
    return digest_of(files(root))


def plugin_files() -> dict[str, str]:
    """`contents_of` the vLLM plugin."""
    return contents_of(sorted((ROOT / "rmsnorm_patch" / "vllm_plugin").rglob("*.py")), ROOT)


def device() -> dict[str, object]:
    import torch

    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "capability": list(torch.cuda.get_device_capability(0)),
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
    }


def kernel_tests(workers: int) -> dict[str, object]:
    """Counts of the GPU tests but vLLM's."""
    return _beside(["integration_tests/gpu", *(f"--ignore={path}" for path in _engine_tests())], workers, "worksteal")


def engine_tests(workers: int) -> dict[str, object]:
    """Counts of vLLM's GPU tests, and the plugin's files, of which they speak and which `files` does not hold.

    Those that share engines stand in one file, which a worker takes whole.
    """
    return {**_beside([str(path) for path in _engine_tests()], workers, "loadfile"), "files": plugin_files()}


def _beside(words: list[str], workers: int, spread: str) -> dict[str, object]:
    """Tests side by side where there are several workers; those marked `alone` then run last, by themselves."""
    if workers < 2 or importlib.util.find_spec("xdist") is None:
        return run_tests(words)
    beside = run_tests([*words, "-n", str(workers), "--dist", spread, "-m", "not alone"])
    return merged([beside, run_tests([*words, "-m", "alone"])])


def _engine_tests() -> list[Path]:
    return sorted((ROOT / "integration_tests/gpu").glob("test_vllm_*.py"))


def _rows_from(script: str, *arguments: str) -> list[dict]:
    """The rows that a benchmark script writes to its --json; one that fails ends the run."""
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        python(f"scripts/{script}", *arguments, "--json", str(rows))
        return json.loads(rows.read_text())


def _kernel_rows(args: argparse.Namespace) -> list[dict]:
    """Rows of `rmsnorm-patch bench-kernels` over the suites that are asked for."""
    suites = [word for name in args.suite for word in ("--suite", name)]
    limits = ["--seconds", str(args.seconds), "--warm-jobs", str(args.warm_jobs)]
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        python("-m", "rmsnorm_patch", "bench-kernels", *suites, *limits, "--rows", str(rows))
        return json.loads(rows.read_text())


def vllm_rows(path: Path) -> list[dict]:
    """Rows of scripts/bench_vllm.py, refused where they were measured with other kernels or launch code."""
    result = json.loads(path.read_text())
    if result.get("digest") != digest():
        raise SystemExit(
            f"{path}: measured with code {str(result.get('digest'))[:12]}, this tree is {digest()[:12]}; "
            "run scripts/bench_vllm.py again"
        )
    return [row for row in result["rows"] if "@" not in row["variant"]]  # those ran other schedules than the tree's


def _replace(old: list[dict], new: list[dict], key: tuple[str, ...]) -> list[dict]:
    identity = lambda row: tuple(row.get(k, "") for k in key)  # noqa: E731
    fresh = {identity(row) for row in new}
    return [row for row in old if identity(row) not in fresh] + new


KEYS = {
    "kernels": ("op", "mode", "dtype", "m", "n", "variant"),
    "hf": ("model", "layers", "work", "mode"),
    "vllm": ("shape", "variant", "process", "case"),
    "vllm_starts": ("shape", "variant", "process", "case", "start"),
    "jit": ("what", "op", "n"),
    "profile": ("op", "dtype", "m", "n", "provider"),
    "sanitizer": ("tool",),
}
"""The lists of a record, and what makes a row of each the same one, to be replaced by a newer run."""

SECTIONS = {"kernel_time": "kernels"}
"""Parts whose rows go into the list of another."""

TESTS = {"tests": kernel_tests, "engine_tests": engine_tests}
"""Parts that are counts of tests."""

PARTS = (*TESTS, "kernels", "kernel_time", *(section for section in KEYS if section not in ("kernels", "vllm_starts")))


def _measure(part: str, args: argparse.Namespace) -> list[dict]:
    if part == "kernels":
        return _kernel_rows(args)
    if part == "kernel_time":
        return _rows_from("kernel_time.py", *(("--provider", *args.provider) if args.provider else ()))
    if part == "hf":
        return [row for words in args.hf for row in _rows_from("bench_hf.py", *words.split())]
    if part == "vllm":
        return vllm_rows(args.vllm_json)
    if part == "jit":
        return _rows_from("bench_jit.py")
    if part == "profile":
        return _rows_from("profile_counts.py")
    return sanitizer.run(args.tool, args.sanitizer_tests, args.seconds)


def begin(path: Path, fresh: bool, parts: list[str]) -> dict:
    """The record at `path`, or an empty one for this code and device; refuses to mix digests."""
    before = json.loads(path.read_text()) if path.exists() else {}
    if before and before["digest"] != digest():
        if not fresh:
            raise SystemExit(f"{path}: holds another version of the code; give --fresh to start it anew")
        before = {}
    if before and parts == ["vllm"]:  # measured already: taking the rows in needs no GPU
        return before
    record = {"digest": digest(), "files": files(), "device": device()}
    record |= {**dict.fromkeys(TESTS), **{section: [] for section in KEYS}}
    return {**record, **before, "device": record["device"], "versions": {**before.get("versions", {}), **versions()}}


def write(args: argparse.Namespace) -> None:
    path: Path = args.record
    record = begin(path, args.fresh, args.parts)
    path.parent.mkdir(parents=True, exist_ok=True)
    for part in args.parts:
        if part in TESTS:
            record[part] = TESTS[part](args.workers)
        else:
            section, rows = SECTIONS.get(part, part), _measure(part, args)
            if part == "vllm" and args.start:
                section, rows = "vllm_starts", [{**row, "start": args.start} for row in rows]
            record[section] = _replace(record.get(section, []), rows, KEYS[section])
        if part == "vllm":
            measured = json.loads(args.vllm_json.read_text())
            record["versions"] = {**measured.get("versions", {}), **record["versions"]}
            record["kernels_of_a_step"] = {**record.get("kernels_of_a_step", {}), **measured.get("kernels", {})}
        if digest() != record["digest"]:
            raise SystemExit(f"{path}: kernels or launch code changed while {part} ran; its rows are not written")
        path.write_text(json.dumps(record, indent=1) + "\n")
        held = {name: len(record.get(name, ())) for name in KEYS}
        print(f"{path}: {part} written; tests {totals(record['tests'])}, rows {held}", flush=True)


def merge(args: argparse.Namespace) -> None:
    """One record of what was run at the same time on several GPUs of one kind."""
    read = {path: json.loads(path.read_text()) for path in args.records}
    first = read[args.records[0]]
    for path, other in list(read.items())[1:]:
        for what in ("digest", "device"):
            if other[what] != first[what]:
                raise SystemExit(f"{path}: its {what} is {other[what]}, that of {args.records[0]} is {first[what]}")
        if twice := [part for part in TESTS if first[part] and other[part]]:
            raise SystemExit(f"{path}: holds {twice[0]}, which an earlier file of these holds too; leave one out")
        first = {
            **first,
            **{part: other[part] or first[part] for part in TESTS},
            **{section: _replace(first.get(section, []), other.get(section, []), key) for section, key in KEYS.items()},
            "versions": {**first["versions"], **other["versions"]},
            "kernels_of_a_step": {**first.get("kernels_of_a_step", {}), **other.get("kernels_of_a_step", {})},
        }
    args.record.write_text(json.dumps(first, indent=1) + "\n")


def _follows(record: dict) -> bool:
    """Whether the digest of a record is that of the files it lists."""
    try:
        return digest_of(record.get("files", {})) == record["digest"]
    except ValueError:  # a content that is not hexadecimal
        return False


def _named(names: list[str]) -> str:
    """The first three names, and how many there are beside them."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def problems_of(record: dict, tree: dict[str, str]) -> list[str]:
    """What keeps a record from speaking for the files it lists, as `tree` has them; it says nothing of other files."""
    changed = [name for name, content in record.get("files", {}).items() if tree.get(name) != content]
    if not changed:
        return findings_of(record)
    stale = (
        f"recorded for code {record['digest'][:12]}, changed or removed since: {_named(changed)}; "
        "run scripts/gpu_record.py run on that GPU and commit the result"
    )
    return [stale, *findings_of(record)]


def proved_by(record: dict, tree: dict[str, str]) -> list[str]:
    """The files of `tree` that a record lists as they are; none where it has findings."""
    if findings_of(record):
        return []
    return [name for name, content in tree.items() if record["files"].get(name) == content]


def findings_of(record: dict) -> list[str]:
    """What keeps a record from speaking for any code."""
    found = []
    if not _follows(record):
        found.append(
            f"digest {record['digest'][:12]} does not follow from its files; "
            "restore the record as it was written, or run scripts/gpu_record.py run on that GPU"
        )
    if not record["tests"]:
        found.append("holds no test run; run with --parts tests")
    elif not record["tests"]["passed"] or explained.unexplained(record["tests"]):
        counts = {name: record["tests"][name] for name in ("passed", "failed", "skipped")}
        found.append(f"GPU tests {counts}, failed: {explained.unexplained(record['tests'])}")
    engines = record.get("engine_tests")
    if engines and engines["files"] == plugin_files() and (failures := explained.unexplained(engines)):
        found.append(f"tests of vLLM engines with this plugin: {failures}")
    found += [f"{part} {what}" for part in TESTS for what in explained.misplaced(record.get(part) or {})]
    for row in record["kernels"]:
        wrong = {name: why for name, why in row["failed"].items() if name.startswith("ours")}
        if wrong:
            found.append(f"{row['op']} {row['mode']} {row['dtype']} {row['m']}x{row['n']}: no figure for {wrong}")
    for row in record.get("sanitizer", ()):
        if row["tool"] == sanitizer.PLANTED and not row["errors"]:
            found.append("compute-sanitizer did not see the planted fault: that it saw no other says nothing")
        elif row["tool"] != sanitizer.PLANTED and (row["errors"] != 0 or row["failed"] or not row["passed"]):
            found.append(f"compute-sanitizer {row}")
    return found


def explain(args: argparse.Namespace) -> None:
    """Why a test of a record failed, where it was shown to be the test's own fault."""
    record = json.loads(args.record.read_text())
    explained.explain([record[part] for part in TESTS if record.get(part)], args.test, args.because)
    args.record.write_text(json.dumps(record, indent=1) + "\n")


def check(args: argparse.Namespace) -> None:
    """Exit 1 where a file has no record, or a record speaks of other code, or of what failed and is not explained."""
    tree = files()
    records = {path.name: json.loads(path.read_text()) for path in sorted(RECORDS.glob("*.json"))}
    problems = [f"{name}: {what}" for name, record in records.items() for what in problems_of(record, tree)]
    proved = {name: proved_by(record, tree) for name, record in records.items()}
    missing = [name for name in tree if not any(name in listed for listed in proved.values())]
    if missing:
        problems.append(f"no record has {_named(missing)}; run scripts/gpu_record.py run on a GPU")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(1)
    matching = f"{len(records)} record(s) match the code ({digest_of(tree)[:12]}, {len(tree)} files)"
    partial = [f"{name}: {len(p)} of {len(tree)} files" for name, p in proved.items() if len(p) < len(tree)]
    print("; ".join([matching, *partial]))


def _default_record() -> Path:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_record run: needs a CUDA device; this machine has none")
    return RECORDS / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-") + ".json")


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the GPU tests and the benchmarks, write the record")
    run.add_argument("--record", type=Path, help="default: records/<gpu>.json")
    run.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        help="default: all, vllm only with --vllm-json",
    )
    run.add_argument("--workers", type=int, default=0, help="processes of the GPU tests, where pytest-xdist is here")
    run.add_argument("--suite", nargs="+", default=SUITES, help="of rmsnorm-patch bench-kernels")
    run.add_argument("--provider", nargs="*", default=[], help="[name=]module:function, one more in kernel_time")
    run.add_argument("--warm-jobs", type=int, default=0, help="processes that compile ahead of the kernels' timing")
    run.add_argument("--seconds", type=float, default=3600, help="limit of the kernels' timing, and of each sanitizer")
    run.add_argument("--hf", nargs="+", default=HF, help="runs of scripts/bench_hf.py, the arguments of each a string")
    run.add_argument("--vllm-json", type=Path, help="what scripts/bench_vllm.py wrote")
    run.add_argument("--start", type=int, help="from 2: these engines were started anew, and stand beside earlier ones")
    run.add_argument(
        "--tool", nargs="+", choices=sanitizer.TOOLS, default=list(sanitizer.TOOLS), help="of compute-sanitizer"
    )
    run.add_argument("--sanitizer-tests", nargs="+", default=["integration_tests/gpu"])
    run.add_argument("--fresh", action="store_true", help="replace a record of another version of the code")
    join = verbs.add_parser("merge", help="one record of several that hold different parts")
    join.add_argument("records", type=Path, nargs="+", metavar="RECORD")
    join.add_argument("--record", type=Path, required=True, help="the file to write")
    reason = verbs.add_parser("explain", help="say why a test failed that was shown to be wrong itself")
    reason.add_argument("--record", type=Path, required=True)
    reason.add_argument("--test", required=True, metavar="NAME", help="as it stands among the record's failures")
    reason.add_argument("--because", required=True, metavar="REASON", help="the evidence, and what became of the test")
    verbs.add_parser("check", help="compare the files of every record with this tree")
    args = parser.parse_args()
    if args.verb == "run":
        args.parts = args.parts or [part for part in PARTS if part != "vllm" or args.vllm_json]
        if "vllm" in args.parts and not args.vllm_json:
            parser.error("--parts vllm: give the file of scripts/bench_vllm.py as --vllm-json")
        if args.start is not None and args.start < 2:
            parser.error(f"--start {args.start}: the first start has no number, give 2 or more")
    return args


def main() -> None:
    args = parsed()
    if args.verb != "run":
        {"check": check, "merge": merge, "explain": explain}[args.verb](args)
        return
    args.record = args.record or _default_record()
    write(args)


if __name__ == "__main__":
    main()
