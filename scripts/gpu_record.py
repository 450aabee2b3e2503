"""The record of what was proved and measured on a GPU, and the check that it still speaks of this code.

    python scripts/gpu_record.py run --record records/nvidia-h200.json     # on a machine with a GPU
    python scripts/gpu_record.py check                                     # anywhere: non-zero when a record is stale

`run` can be given in parts (`--parts tests`, `--parts kernels --suite decode`): a part replaces its own rows of a
record with the same digest, and refuses one with another, so that no record mixes two versions of the code.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "records"

LAUNCH_CODE = (
    "semantics.py",
    "reference.py",
    "ops.py",
    "validate.py",
    "dispatch.py",
    "registry.py",
    "jit.py",
    "nvrtc.py",
    "driver.py",
    "cuda_backend.py",
    "cuda_pair.py",
    "triton_backend.py",
    "triton_loader.py",
)
"""Files of the package between a tensor and a kernel; with everything in `kernels/` they are what a record proves."""

PEERS = ("torch", "triton", "transformers", "liger-kernel", "quack-kernels", "flashinfer-python", "vllm")


def covered_files() -> list[Path]:
    suffixes = (".py", ".cu", ".cuh", ".toml", ".json")
    kernels = [p for p in (ROOT / "kernels").rglob("*") if p.is_file() and p.suffix in suffixes]
    package = ROOT / "rmsnorm_patch"
    launch = [package / name for name in LAUNCH_CODE if (package / name).exists()]
    launch += [p for p in package.glob("launch*") if p.is_file()]
    return sorted(kernels + launch)


def digest() -> str:
    """sha256 over the names and contents of `covered_files()`."""
    total = hashlib.sha256()
    for path in covered_files():
        total.update(path.relative_to(ROOT).as_posix().encode() + b"\0")
        total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3]))}
    for name in PEERS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


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


def _python(*arguments: str, check: bool = True) -> None:
    """Run this interpreter in the checkout, with the checkout's package ahead of an installed one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    subprocess.run([sys.executable, *arguments], cwd=ROOT, env=environment, check=check)


def run_tests() -> dict[str, object]:
    """Counts of the GPU tests, and the names of those that failed."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "junit.xml"
        tests = ("-m", "pytest", "integration_tests/gpu", "-q", "-p", "no:cacheprovider")
        _python(*tests, f"--junitxml={report}", check=False)  # failures are counted below
        suite = ElementTree.parse(report).getroot().find("testsuite")
    total, skipped = int(suite.get("tests")), int(suite.get("skipped"))
    failed = int(suite.get("failures")) + int(suite.get("errors"))
    names = [
        f"{case.get('classname')}::{case.get('name')}"
        for case in suite.iter("testcase")
        if case.find("failure") is not None or case.find("error") is not None
    ]
    return {"passed": total - failed - skipped, "failed": failed, "skipped": skipped, "failures": names}


def run_kernels(suites: list[str], seconds: float) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        _python("scripts/bench_kernels.py", "--suite", *suites, "--seconds", str(seconds), "--json", str(rows))
        return json.loads(rows.read_text())


def run_hf(arguments: list[str]) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows.json"
        _python("scripts/bench_hf.py", *arguments, "--json", str(rows))
        return json.loads(rows.read_text())


def _replace(old: list[dict], new: list[dict], key: tuple[str, ...]) -> list[dict]:
    fresh = {tuple(row[k] for k in key) for row in new}
    return [row for row in old if tuple(row[k] for k in key) not in fresh] + new


def write(args: argparse.Namespace) -> None:
    path: Path = args.record
    record = {
        "digest": digest(),
        "device": device(),
        "versions": versions(),
        "tests": None,
        "kernels": [],
        "hf": [],
        "vllm": [],
    }
    if path.exists():
        before = json.loads(path.read_text())
        if before["digest"] == record["digest"]:
            record = {**before, "device": record["device"], "versions": {**before["versions"], **record["versions"]}}
        elif not args.fresh:
            raise SystemExit(f"{path}: holds another version of the code; give --fresh to start it anew")
    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        path.write_text(json.dumps(record, indent=1) + "\n")

    if "tests" in args.parts:
        record["tests"] = run_tests()
        save()
    if "kernels" in args.parts:
        record["kernels"] = _replace(
            record["kernels"], run_kernels(args.suite, args.seconds), ("op", "mode", "dtype", "m", "n")
        )
        save()
    if "hf" in args.parts:
        record["hf"] = _replace(record["hf"], run_hf(args.hf.split()), ("model", "layers", "work", "mode"))
        save()
    print(f"{path}: written, digest {record['digest'][:12]}, tests {record['tests']}")


def check(args: argparse.Namespace) -> None:
    """Exit 1 where a record is missing, speaks of other code, or holds failed tests."""
    paths = sorted(RECORDS.glob("*.json"))
    problems = [] if paths else ["records/: no record; run scripts/gpu_record.py run on a GPU"]
    now = digest()
    for path in paths:
        record = json.loads(path.read_text())
        if record["digest"] != now:
            problems.append(
                f"{path.name}: recorded for code {record['digest'][:12]}, this tree is {now[:12]}; "
                "run scripts/gpu_record.py run on that GPU and commit the result"
            )
        if not record["tests"]:
            problems.append(f"{path.name}: holds no test run; run with --parts tests")
        elif record["tests"]["failed"] or not record["tests"]["passed"]:
            problems.append(f"{path.name}: GPU tests {record['tests']}")
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        raise SystemExit(1)
    print(f"{len(paths)} record(s) match the code ({now[:12]}, {len(covered_files())} files)")


def _default_record() -> Path:
    import torch

    if not torch.cuda.is_available():
        raise SystemExit("gpu_record run: needs a CUDA device; this machine has none")
    return RECORDS / (re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(0).lower()).strip("-") + ".json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="run the GPU tests and the benchmarks, write the record")
    run.add_argument("--record", type=Path, help="default: records/<gpu>.json")
    run.add_argument("--parts", nargs="+", choices=("tests", "kernels", "hf"), default=["tests", "kernels", "hf"])
    run.add_argument(
        "--suite", nargs="+", default=["prefill", "prefill_norm", "kernel", "decode", "hot", "long", "dtypes", "host"]
    )
    run.add_argument("--seconds", type=float, default=3600, help="begin no further kernel case after this long")
    run.add_argument("--hf", default="--shape llama-8b", help="arguments of scripts/bench_hf.py, in one string")
    run.add_argument("--fresh", action="store_true", help="replace a record of another version of the code")
    verbs.add_parser("check", help="compare every record's digest with this tree")
    args = parser.parse_args()
    if args.verb == "run":
        args.record = args.record or _default_record()
        write(args)
    else:
        check(args)


if __name__ == "__main__":
    main()
