"""Generate faults of the kernels and of the rewrite layer, run the tests that fit, list what survives.

    python scripts/mutants.py count                             faults of each suite's files
    python scripts/mutants.py run triton --sample 40 --seed 1   Triton kernels, in the interpreter
    python scripts/mutants.py run layer_calls                   what rewritten layers call; every fault
    python scripts/mutants.py run cuda --workers 12             CUDA kernels; needs a GPU
    python scripts/mutants.py run triton --only 'row_math.py'   those whose name holds a text

A run writes `records/mutants/<suite>.json`: counts, and each survivor. A survivor that is no fault stands in
`scripts/mutation/equivalent.toml` with the reason. Exit status 1: another one survived.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

from benchlib.stamp import stamp  # noqa: E402
from mutation.faults import Fault, faults_of  # noqa: E402

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

RECORDS = ROOT / "records" / "mutants"
EQUIVALENT = ROOT / "scripts" / "mutation" / "equivalent.toml"


@dataclass(frozen=True)
class Suite:
    """files: whose faults, as patterns. tests: below `integration_tests`, for every file; none for kernels that
    `mutation.on_gpu` checks itself. own: name of a file -> tests that are asked first, or alone where `tests` is empty.
    """

    files: tuple[str, ...]
    tests: tuple[str, ...] = ()
    own: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def asked(self, file: str) -> list[str]:
        """The tests of one file's faults, those of its own first."""
        named = (*self.own.get(Path(file).name, ()), *self.tests)
        return [f"integration_tests/{test}" for test in dict.fromkeys(named)]


NUMERICS = ("backends/triton/test_numerics.py", "backends/triton/test_machine_code.py")
QUANTISED = ("backends/triton/test_quantised.py",)
ADDED = ("backends/triton/test_norm_add.py", "fused/test_norm_add.py")
GATED = ("backends/triton/test_gated.py", "fused/test_gated_norm.py")
SUITES = {
    "triton": Suite(
        ("kernels/triton/*.py",),
        own={
            "rms_norm.py": NUMERICS,
            "fused_add_rms_norm.py": NUMERICS,
            "row_math.py": (*NUMERICS, *QUANTISED, *ADDED, *GATED),
            "rms_norm_quantised.py": QUANTISED,
            "rms_norm_add.py": ADDED,
            "rms_norm_gated.py": GATED,
        },
    ),
    "layer_calls": Suite(
        tuple(f"rmsnorm_patch/rewrite/{name}.py" for name in ("layer_calls", "guards", "handover", "norms")),
        (
            "rewrite/test_eps.py",
            "rewrite/test_mixed_dtypes.py",
            "rewrite/test_native.py",
            "rewrite/test_native_take.py",
            "rewrite/test_native_norms.py",
            "rewrite/test_status.py",
            "rewrite/test_handover.py",
            "rewrite/test_handover_links.py",
            "rewrite/test_norm_adds.py",
            "rewrite/test_native_norm_adds.py",
            "adversarial/test_patching_guards.py",
            "adversarial/test_patching_aliasing.py",
            "adversarial/test_patching_training.py",
            "proof/test_hand_overs_not_taken.py",
            "pairs/test_layer_forms.py",
            "pairs/test_rewritten_layers.py",
            "pairs/test_through.py",
        ),
        own={
            "guards.py": ("adversarial/test_patching_guards.py",),
            "handover.py": ("rewrite/test_handover.py", "rewrite/test_handover_links.py"),
            "norms.py": ("rewrite/test_native_norms.py", "rewrite/test_status.py"),
        },
    ),
    "cuda": Suite(("kernels/cuda/*.cu", "kernels/cuda/*.cuh")),
}


def faults(suite: str) -> list[Fault]:
    """Every fault of a suite's files."""
    paths = sorted(path for pattern in SUITES[suite].files for path in ROOT.glob(pattern))
    named = ((path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)
    return [fault for name, text in named for fault in faults_of(name, text)]


def equivalents() -> dict[str, str]:
    """Name of a fault -> why it is none."""
    return {entry["fault"]: entry["why"] for entry in tomllib.loads(EQUIVALENT.read_text()).get("equivalent", ())}


def chosen(suite: str, sample: int | None, seed: int, only: str) -> list[Fault]:
    """The faults of a run: a sample by seed where one is asked for."""
    found = [fault for fault in faults(suite) if only in fault.named()]
    if sample is not None and sample < len(found):
        found = sorted(random.Random(seed).sample(found, sample), key=lambda fault: (fault.file, fault.start))
    return found


def run_python(suite: str, wanted: list[Fault], args: argparse.Namespace) -> dict[str, list[str]]:
    """How each fault ended, by name of the end. SystemExit where the tests fail without a fault."""
    from mutation import in_python

    in_python.import_heavy()
    asked = SUITES[suite].asked
    if not args.no_baseline:
        every = list(dict.fromkeys(test for fault in wanted for test in asked(fault.file)))
        end, took = in_python.ends(ROOT, None, every, 10 * args.seconds)
        print(f"without a fault: {end} in {took:.0f} s", flush=True)
        if end != "survived":
            raise SystemExit("mutants: the tests fail without a fault; MUTANTS_LOG=FILE shows why")
    found: dict[str, list[str]] = {"survived": [], "killed": [], "hung": [], "not run": []}
    stop = time.monotonic() + args.limit
    order = random.Random(args.seed).sample(wanted, len(wanted))  # a run that is cut short has some of each file
    for number, fault in enumerate(order, 1):
        if time.monotonic() > stop:
            found["not run"].append(fault.named())
            continue
        end, took = in_python.ends(ROOT, fault, asked(fault.file), args.seconds)
        found[end].append(fault.named())
        print(f"{number}/{len(order)} {end} in {took:.0f} s: {fault.named()}", flush=True)
    return found


def summary(suite: str, wanted: list[Fault], found: dict[str, list[str]], args: argparse.Namespace) -> dict[str, Any]:
    """What a run's record holds."""
    known = equivalents()
    return {
        "suite": suite,
        **stamp(),
        "faults": len(faults(suite)),
        "run": len(wanted) - len(found.get("not run", ())),
        "sample": None if args.sample is None else {"size": args.sample, "seed": args.seed},
        "files": dict(sorted(Counter(fault.file for fault in wanted).items())),
        "ends": {end: len(names) for end, names in found.items()},
        "equivalent": sorted(name for name in found["survived"] if name in known),
        "survived": sorted(name for name in found["survived"] if name not in known),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("count", help="faults of each suite, by kind")
    run = verbs.add_parser("run", help="run tests against each fault")
    run.add_argument("suite", choices=tuple(SUITES))
    run.add_argument("--sample", type=int, help="so many faults; default: every one")
    run.add_argument("--seed", type=int, default=0, help="of the sample")
    run.add_argument("--only", default="", help="faults whose name holds this text")
    run.add_argument("--seconds", type=float, default=1200, help="of one fault, before it counts as hung")
    run.add_argument("--workers", type=int, default=1, help="processes that compile and run CUDA kernels")
    run.add_argument("--limit", type=float, default=7200, help="seconds after which no further fault is begun")
    run.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    run.add_argument("--record", type=Path, help="default: records/mutants/<suite>.json")
    return parser.parse_args()


def main() -> None:
    args = parsed()
    if args.verb == "count":
        for suite in SUITES:
            found = faults(suite)
            kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(Counter(fault.kind for fault in found).items()))
            print(f"{suite}: {len(found)} ({kinds})")
        return
    wanted = chosen(args.suite, args.sample, args.seed, args.only)
    if args.suite == "cuda":
        from mutation import on_gpu

        found = on_gpu.run(ROOT, wanted, args.workers, args.limit)
    else:
        found = run_python(args.suite, wanted, args)
    result = summary(args.suite, wanted, found, args)
    path = args.record or RECORDS / f"{args.suite}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key != "files"}, indent=1))
    raise SystemExit(1 if result["survived"] else 0)


if __name__ == "__main__":
    main()
