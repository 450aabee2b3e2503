"""Generate faults of the kernels and of the rewrite layer, run the tests that fit, list what survives.

    python scripts/mutants.py count                             faults of each suite's files
    python scripts/mutants.py run triton --sample 40 --seed 1   Triton kernels, in the interpreter
    python scripts/mutants.py run layer_calls                   what rewritten layers call; every fault
    python scripts/mutants.py run cuda --workers 12 --gpus 0,1  CUDA kernels; needs a GPU
    python scripts/mutants.py compile                           those of them that end without a GPU
    python scripts/mutants.py run triton --only 'row_math.py'   those whose name holds a text
    python scripts/mutants.py run triton --time-limit 300       goes on where the last run ended
    python scripts/mutants.py merge triton there.json           adds what a run elsewhere kept with --resume there.json

How each fault ended is kept in `records/mutants/ends`: a later run asks what is new, changed or was not run; with
`--survivors` what no test saw, too; with `--fresh` all. The test that saw a fault is kept with it, and asked first the
next time, as it is of faults that stand near. `records/mutants/<suite>.json` has counts and each survivor.
One that is no fault stands in `scripts/mutation/equivalent.toml` with the reason. Exit status 1: another one survived.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "scripts")]

from benchlib.stamp import stamp  # noqa: E402
from mutation.equivalents import equivalents  # noqa: E402
from mutation.faults import Fault, faults_of  # noqa: E402
from mutation.outcomes import ENDS, NOT_SEEN, Outcomes  # noqa: E402

RECORDS = ROOT / "records" / "mutants"


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


ASSEMBLY = "backends/triton/test_inline_assembly.py"
NUMERICS = (ASSEMBLY, "backends/triton/test_numerics.py", "backends/triton/test_machine_code.py")
QUANTISED = (ASSEMBLY, "backends/triton/test_quantised.py")
ADDED = (ASSEMBLY, "backends/triton/test_norm_add.py", "fused/test_norm_add.py")
SILU = ("backends/triton/test_silu.py", ASSEMBLY)
GATED = (ASSEMBLY, "backends/triton/test_gated.py", "fused/test_gated_norm.py")
SUITES = {
    "triton": Suite(
        ("kernels/triton/*.py",),
        own={
            "rms_norm.py": NUMERICS,
            "fused_add_rms_norm.py": NUMERICS,
            "row_math.py": (*NUMERICS, *QUANTISED, *ADDED, *GATED),
            "quantise.py": (*QUANTISED, *SILU),
            "rms_norm_quantised.py": (*QUANTISED, *SILU),
            "rms_norm_add.py": ADDED,
            "rms_norm_gated.py": (*GATED, *SILU),
            "silu_and_mul_quantised.py": SILU,
        },
    ),
    "layer_calls": Suite(
        tuple(
            f"rmsnorm_patch/rewrite/{name}.py"
            for name in ("layer_calls", "guards", "handover", "norms", "attributes", "guise")
        ),
        (
            "rewrite/test_changed_code.py",
            "rewrite/test_reasons.py",
            "rewrite/test_eps.py",
            "rewrite/test_links.py",
            "rewrite/test_carries.py",
            "rewrite/test_norm_forwards.py",
            "adversarial/test_patching_training.py",
            "pairs/test_layer_forms.py",
            "pairs/test_rewritten_layers.py",
            "pairs/test_query_key_forms.py",
            "rewrite/test_native_take.py",
            "rewrite/test_native_through.py",
            "rewrite/test_mixed_dtypes.py",
            "rewrite/test_native_norms.py",
            "rewrite/test_native_norm_adds.py",
            "rewrite/test_native.py",
            "rewrite/test_status.py",
            "rewrite/test_native_query_key.py",
            "adversarial/test_patching_life_cycle.py",
            "proof/test_hand_overs_not_taken.py",
            "adversarial/test_patching_held_forwards.py",
            "proof/test_rewrite_mutants.py",
            "rewrite/test_handover.py",
            "rewrite/test_handover_links.py",
            "adversarial/test_patching_aliasing.py",
            "pairs/test_query_key.py",
            "adversarial/test_patching_guards.py",
            "rewrite/test_pair_bits.py",
            "pairs/test_through.py",
            "rewrite/test_norm_adds.py",
            "rewrite/test_gated_norms.py",
            "adversarial/test_patching_compile.py",
        ),
        own={
            "attributes.py": ("rewrite/test_eps.py", "rewrite/test_reasons.py"),
            "guise.py": ("rewrite/test_norm_forwards.py", "rewrite/test_gated_norms.py"),
            "guards.py": ("adversarial/test_patching_guards.py",),
            "layer_calls.py": ("pairs/test_unusual_forwards.py",),
            "handover.py": ("rewrite/test_carries.py", "rewrite/test_links.py", "rewrite/test_handover.py"),
            "norms.py": (
                "rewrite/test_norm_forwards.py",
                "rewrite/test_norm_attributes.py",
                "rewrite/test_patched_classes.py",
                "rewrite/test_status.py",
                "rewrite/test_native_norms.py",
            ),
        },
    ),
    "cuda": Suite(("kernels/cuda/*.cu", "kernels/cuda/*.cuh")),
}


def faults(suite: str) -> list[Fault]:
    """Every fault of a suite's files."""
    paths = sorted(path for pattern in SUITES[suite].files for path in ROOT.glob(pattern))
    named = ((path.relative_to(ROOT).as_posix(), path.read_text()) for path in paths)
    return [fault for name, text in named for fault in faults_of(name, text)]


def chosen(suite: str, sample: int | None, seed: int, only: str) -> list[Fault]:
    """The faults of a run: a sample by seed where one is asked for."""
    found = [fault for fault in faults(suite) if only in fault.named()]
    if sample is not None and sample < len(found):
        found = sorted(random.Random(seed).sample(found, sample), key=lambda fault: (fault.file, fault.start))
    return found


def run_python(todo: list[Fault], outcomes: Outcomes, args: argparse.Namespace, stop: float) -> None:
    """Run the tests of each fault. SystemExit where a test fails without a fault, unless such tests are left out."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    from mutation import in_python

    in_python.import_heavy()
    asked = SUITES[args.suite].asked
    left_out = outcomes.left_out
    if not args.no_baseline:
        left_out = _red(list(dict.fromkeys(test for fault in todo for test in asked(fault.file))), args, stop)
        if left_out and not args.leave_out_red:
            raise SystemExit(f"mutants: red without a fault: {left_out}; MUTANTS_LOG=FILE shows why")
        outcomes.left_out = sorted({*outcomes.left_out, *left_out})
    tests = {fault.file: [test for test in asked(fault.file) if test not in left_out] for fault in todo}
    able = [fault for fault in todo if tests[fault.file]]

    def work() -> Iterator[in_python.Asked]:
        """Each when its turn comes, so that it is asked first what the ones before it died of."""
        for fault in able:
            first = [test for test in outcomes.likely(fault) if test not in left_out]
            yield in_python.Asked(fault, tests[fault.file], left_out, first=first)

    for number, (each, answer) in enumerate(in_python.ends(ROOT, work(), args.workers, args.seconds, stop), 1):
        assert each.fault is not None
        by = answer.red[0] if answer.red and "::" in answer.red[0] else ""
        outcomes.note(each.fault, answer.end, by)
        told = f"{answer.end} by {by}" if by else answer.end
        print(f"{number}/{len(able)} {told} in {answer.seconds:.0f} s: {each.fault.named()}", flush=True)


def _red(files: list[str], args: argparse.Namespace, stop: float) -> list[str]:
    """Ids of tests that are red without a fault, or files that cannot be collected or do not end."""
    from mutation import in_python

    found: list[str] = []
    work = [in_python.Asked(None, [file], to_the_end=True) for file in files]
    for each, answer in in_python.ends(ROOT, work, args.workers, 4 * args.seconds, stop):
        counts = f"{answer.passed} passed, {answer.skipped} skipped, {len(answer.red)} red in {answer.seconds:.0f} s"
        print(f"without a fault: {each.tests[0]}: {answer.end}, {counts}", flush=True)
        found += answer.red or ([each.tests[0]] if answer.end != "survived" else [])
    return sorted(set(found))


def summary(suite: str, wanted: list[Fault], outcomes: Outcomes, sample: dict[str, int] | None) -> dict[str, Any]:
    """What a run's record holds."""
    known = equivalents()
    names: dict[str, list[str]] = {end: [] for end in (*ENDS, "not run")}
    for fault in wanted:
        names[outcomes.of(fault) or "not run"].append(fault.named())
    return {
        "suite": suite,
        **stamp(),
        "faults": len(faults(suite)),
        "run": len(wanted) - len(names["not run"]),
        "sample": sample,
        "files": dict(sorted(Counter(fault.file for fault in wanted).items())),
        "ends": {end: len(found) for end, found in names.items()},
        "left_out": outcomes.left_out,
        "equivalent": sorted(name for name in names["survived"] if name in known),
        "survived": sorted(name for name in names["survived"] if name not in known),
        "not_run": sorted(names["not run"]),
    }


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    verbs.add_parser("count", help="faults of each suite, by kind")
    run = verbs.add_parser("run", help="run tests against each fault")
    run.add_argument("suite", choices=tuple(SUITES))
    run.add_argument("--sample", type=int, help="so many faults; default: every one")
    run.add_argument("--seed", type=int, default=0, help="of the sample, and of the order")
    run.add_argument("--only", default="", help="faults whose name holds this text")
    run.add_argument("--seconds", type=float, default=1200, help="of the tests of one fault, before it counts as hung")
    run.add_argument("--workers", type=int, default=1, help="faults at a time")
    run.add_argument("--gpus", default="", help="indices for the CUDA kernels, as 0,1,2; default: the first one")
    run.add_argument("--time-limit", type=float, default=7200, help="seconds after which the rest is not run")
    run.add_argument("--fresh", action="store_true", help="forget how faults ended before")
    run.add_argument("--survivors", action="store_true", help="run again what no test saw")
    run.add_argument("--unexplained", action="store_true", help="run again survivors without a reason")
    run.add_argument("--no-baseline", action="store_true", help="do not run the tests without a fault first")
    run.add_argument(
        "--leave-out-red", action="store_true", help="go on without tests and probes that are red without a fault"
    )
    compiled = verbs.add_parser("compile", help="CUDA kernels: what does not compile, and what changes no machine code")
    compiled.set_defaults(suite="cuda")
    compiled.add_argument("--only", default="", help="faults whose name holds this text")
    compiled.add_argument("--workers", type=int, default=1, help="faults at a time")
    compiled.add_argument("--time-limit", type=float, default=7200, help="seconds after which the rest is not compiled")
    merge = verbs.add_parser("merge", help="add how faults ended elsewhere, and write the record")
    merge.add_argument("suite", choices=tuple(SUITES))
    merge.add_argument("kept", nargs="*", type=Path)
    for verb in (run, compiled, merge):
        verb.add_argument("--record", type=Path, help="default: records/mutants/<suite>.json")
        verb.add_argument("--resume", type=Path, help="how faults ended; default: records/mutants/ends/<suite>.json")
    args = parser.parse_args()
    if args.verb != "count":
        args.record = args.record or RECORDS / f"{args.suite}.json"
        args.resume = args.resume or RECORDS / "ends" / f"{args.suite}.json"
    return args


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run what is to be run; the record."""
    stop = time.monotonic() + args.time_limit
    wanted = chosen(args.suite, args.sample, args.seed, args.only)
    outcomes = Outcomes(ROOT, args.suite, faults(args.suite), args.resume)
    if args.resume.exists() and not args.fresh:
        outcomes.take(args.resume)
    again = (None, *(NOT_SEEN if args.survivors else ()))
    known = equivalents()
    todo = [
        fault
        for fault in wanted
        if (end := outcomes.of(fault)) in again
        or (args.unexplained and end == "survived" and fault.named() not in known)
    ]
    todo = random.Random(args.seed).sample(todo, len(todo))  # a run that is cut short has some of each file
    if args.suite == "cuda":
        from mutation import on_gpu

        gpus = [gpu for gpu in args.gpus.split(",") if gpu]
        outcomes.left_out += on_gpu.run(ROOT, todo, args.workers, gpus, stop, outcomes.note, args.leave_out_red)
    else:
        run_python(todo, outcomes, args, stop)
    sample = None if args.sample is None else {"size": args.sample, "seed": args.seed}
    return summary(args.suite, wanted, outcomes, sample)


def compiled(args: argparse.Namespace) -> dict[str, Any]:
    """Compile what was not run; the record."""
    from mutation import without_gpu

    every = faults(args.suite)
    outcomes = Outcomes(ROOT, args.suite, every, args.resume)
    if args.resume.exists():
        outcomes.take(args.resume)
    todo = [fault for fault in every if outcomes.of(fault) is None and args.only in fault.named()]
    without_gpu.run(ROOT, todo, args.workers, time.monotonic() + args.time_limit, outcomes.note)
    return summary(args.suite, every, outcomes, None)


def merge(args: argparse.Namespace) -> dict[str, Any]:
    every = faults(args.suite)
    outcomes = Outcomes(ROOT, args.suite, every, args.resume)
    for path in (args.resume, *args.kept):
        if path.exists():
            outcomes.take(path)
    outcomes.write()
    return summary(args.suite, every, outcomes, None)


def main() -> None:
    args = parsed()
    if args.verb == "count":
        for suite in SUITES:
            found = faults(suite)
            kinds = ", ".join(f"{kind} {n}" for kind, n in sorted(Counter(fault.kind for fault in found).items()))
            print(f"{suite}: {len(found)} ({kinds})")
        return
    result = {"run": run, "compile": compiled, "merge": merge}[args.verb](args)
    args.record.parent.mkdir(parents=True, exist_ok=True)
    args.record.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({key: value for key, value in result.items() if key not in ("files", "not_run")}, indent=1))
    raise SystemExit(1 if result["survived"] else 0)


if __name__ == "__main__":
    main()
