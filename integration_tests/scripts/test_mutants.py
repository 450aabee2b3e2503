"""Faults are generated from sources as they are, run by the tests that fit, and survivors are told one by one."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from rmsnorm_patch.backends.cuda import nvrtc
from rmsnorm_patch.backends.cuda.schedules import schedules

PYTHON = '''"""A docstring with 3 < 4."""
LIMIT: int = 7

def f(a: int = 1, *, b: bool = True) -> int:
    """Another, 5 + 6."""
    if a <= 2 and not b:
        a += 1
        store(a)
    return a, b
'''
CUDA = """// A comment: 1 < 2
#define N 3
static_assert(4 < 5, "6");
template <int K>
__device__ void f(float (&sums)[8]) {
    for (int i = 0; i < K; ++i) sums[i] = sums[i] + 1.0f;
    __syncthreads();
    if (K == 2 && !done) store_row<K>(sums);
    asm volatile("bar.sync 0;" ::: "memory");
}
"""


@pytest.fixture(scope="module")
def faults(script) -> ModuleType:
    return script("mutation.faults")


@pytest.fixture(scope="module")
def mutants(script) -> ModuleType:
    return script("mutants")


def changes(faults: ModuleType, name: str, text: str) -> set[tuple[str, str]]:
    return {(" ".join(fault.before.split()), fault.after) for fault in faults.faults_of(name, text)}


def test_faults_of_python(faults):
    """Of what runs: no docstring, annotation, default or module constant."""
    assert changes(faults, "f.py", PYTHON) == {
        ("<=", "<"),
        ("2", "3"),
        ("and", " or "),
        ("not", ""),
        ("+=", "-="),
        ("1", "2"),
        ("store(a)", "pass"),
        ("a, b", "b, a"),
    }


def test_faults_of_cuda(faults):
    """Barriers, stores and inline assembly go as statements; comments, macros, templates and assertions stay."""
    found = changes(faults, "f.cu", CUDA)
    assert found >= {
        ("__syncthreads();", ";"),
        ("store_row<K>(sums);", ";"),
        ("sums[i] = sums[i] + 1.0f;", ";"),
        ('asm volatile("bar.sync 0;" ::: "memory");', ";"),
        ("<", "<="),
        ("==", "!="),
        ("&&", "||"),
        ("!", ""),
        ("+", "-"),
        ("1.0f", "2.0f"),
    }
    assert not {"3", "4", "5", "int"} & {before for before, _ in found}


def test_every_python_fault_compiles_and_names_are_unique(faults, mutants):
    for suite in mutants.SUITES:
        found = mutants.faults(suite)
        assert len({fault.named() for fault in found}) == len(found) > 400
        for fault in found:
            text = (mutants.ROOT / fault.file).read_text()
            assert text[fault.start : fault.end] == fault.before
            assert fault.applied(text) != text
            if fault.file.endswith(".py"):
                compile(fault.applied(text), fault.file, "exec")


def test_every_file_has_tests_or_probes(mutants, script):
    """Of a file without any, every fault would survive."""
    kernels = {Path(fault.file).name for fault in mutants.faults("cuda") if fault.file.endswith(".cu")}
    assert kernels <= set(script("mutation.probes").MAKERS)
    for suite in ("triton", "layer_calls"):
        for file in {fault.file for fault in mutants.faults(suite)}:
            asked = mutants.SUITES[suite].asked(file)
            assert asked, file
            assert all((mutants.ROOT / test).exists() for test in asked), file


def test_a_sample_follows_from_its_seed(mutants):
    first, again, other = (mutants.chosen("triton", 20, seed, "") for seed in (1, 1, 2))
    assert first == again != other
    assert len(first) == 20


def test_what_is_called_equivalent_is_a_fault_of_today_with_a_reason(mutants):
    names = {fault.named() for suite in mutants.SUITES for fault in mutants.faults(suite)}
    for name, why in mutants.equivalents().items():
        assert name in names, name
        assert len(why) > 20, name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_is_called_equivalent_for_every_schedule_is(arch, dtype):
    """Passes over the chunks of a thread by U + K in place of U * K; chunks of a row of parts by T + K * C or T * K + C
    in place of T * K * C. Gated, with the weights behind x and gate: the last pass is known by U + K too. With the add
    behind the norm: no weights a part ahead of their use."""
    lengths = [*range(8, 1024, 8), *range(1024, 66048, 256)]
    for op, n in ((op, n) for op in ("rms_norm", "fused_add_rms_norm", "rms_norm_gated") for n in lengths):
        for config in schedules(op, dtype, n, arch):
            share = -(-n // config.vec // (config.threads_per_row * config.cluster))
            rows, stage = config.rows_per_thread, dict(config.defines).get("STAGE", 1)
            assert -(-(rows + share) // stage) * stage >= rows * share, config
            if op == "rms_norm_gated" and dict(config.defines)["WEIGHT_AT"] == 1:
                assert -(-rows * share // stage) * stage >= rows + share, config
    for n in lengths:
        assert all(dict(config.defines)["WEIGHT_AT"] != 3 for config in schedules("rms_norm_add", dtype, n, arch))
    for n in range(8, 66048, 8) if dtype == torch.bfloat16 else ():
        for config in schedules("rms_norm_partials", dtype, n, arch)[:1]:
            chunks, threads, cluster = n // config.vec, config.threads_per_row, config.cluster
            share = -(-chunks // (threads * cluster))
            wrong = {threads + share * cluster, threads * share + cluster}
            assert chunks == threads * share * cluster or chunks not in wrong, config


def test_results_lie_where_spoiled_ones_lay(script):
    """Both of a call: of numbers and of bytes."""
    kept: list[tuple[torch.Tensor, ...]] = []

    def call() -> tuple[torch.Tensor, ...]:
        kept.append((torch.ones(3), torch.ones(2, dtype=torch.int8), torch.ones(2).to(torch.float8_e4m3fn)))
        return kept[-1]

    found = script("mutation.probes")._anew(call)
    assert all(each is again for each, again in zip(found, kept[1], strict=True))
    numbers, *rest = kept[0]
    assert numbers.isnan().all()
    assert [each.view(torch.int8).tolist() for each in rest] == [[-1, -1], [-1, -1]]


def test_faults_that_end_without_a_gpu(repository: Path):
    """One that does not compile, one in a header that the kernels do not take in, one that changes no code, one that
    does."""
    if nvrtc.find() is None:
        pytest.skip("NVRTC is not installed")
    program = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1] + "/scripts", sys.argv[1]]
from mutation import faults, probes, without_gpu
root = Path(sys.argv[1])
probes.MAKERS = {"rms_norm_pair.cu": probes.MAKERS["rms_norm_pair.cu"]}
file = "kernels/cuda/rms_norm_pair.cu"
text = (root / file).read_text()
changes = (("args.m + ROWS_PER_CTA", "args.m + ROWS_IN_CTA"), ("args.m + ROWS_PER_CTA", "ROWS_PER_CTA + args.m"))
changes += (("< first_ctas", "<= first_ctas"),)
work = []
for before, after in changes:
    start = text.index(before)
    work.append(faults.Fault(file, 1, start, start + len(before), before, after, "", after))
work.append(faults.Fault("kernels/cuda/quantise.cuh", 1, 0, 0, "", "unknown;", "", "header"))
noted = []
without_gpu.run(root, work, 2, float("inf"), lambda fault, how: noted.append((fault.source_line, how)))
print(*sorted(noted), sep=chr(10))
"""
    done = subprocess.run([sys.executable, "-c", program, repository], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-3:] == [
        "('ROWS_PER_CTA + args.m', 'same code')",
        "('args.m + ROWS_IN_CTA', 'does not compile')",
        "('header', 'same code')",
    ]
    assert "other code: kernels/cuda/rms_norm_pair.cu: `<= first_ctas`" in done.stdout


def test_tests_see_the_fault_and_nobody_else_does(repository: Path, tmp_path: Path):
    """A fault of the rewrite layer in a program of its own: one that kills, one that does not, and the right source. A
    test that is asked first is one of those asked; one that is no longer there kills nothing."""
    test = tmp_path / "test_it.py"
    test.write_text(
        "from rmsnorm_patch.rewrite import handover\n\ndef test_it():\n    assert handover.MAX_UNTAKEN == 64\n"
    )
    program = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1] + "/scripts"]
from mutation import faults, in_python
root, test = Path(sys.argv[1]), sys.argv[2]
file = "rmsnorm_patch/rewrite/handover.py"
text = (root / file).read_text()
work = []
for before, after in (("MAX_UNTAKEN = 64", "MAX_UNTAKEN = 65"), ("link.untaken += 1", "link.untaken += 2")):
    start = text.index(before)
    fault = faults.Fault(file, 1, start, start + len(before), before, after, "constant", "")
    work.append(in_python.Asked(fault, [test]))
work.append(in_python.Asked(None, [test]))
answers = [answer for _, answer in in_python.ends(root, work, 1, 120)]
without = in_python.Asked(work[0].fault, [test], left_out=answers[0].red)
answers += [answer for _, answer in in_python.ends(root, [without], 1, 120)]
other = Path(test).with_name("test_other.py")
other.write_text("def test_other(): pass")
for fault, first in ((work[0].fault, "test_it"), (None, "test_it"), (work[0].fault, "test_that_was")):
    asked = in_python.Asked(fault, [str(other)], first=[f"{test}::{first}"])
    answers += [answer for _, answer in in_python.ends(root, [asked], 1, 120)]
print(*(f"{answer.end} {len(answer.red)} {answer.passed}" for answer in answers), sep=chr(10))
print(list(in_python.ends(root, work, 2, 120, stop=0.0)))
"""
    words = [sys.executable, "-c", program, repository, test]
    done = subprocess.run(list(map(str, words)), capture_output=True, text=True, check=True)
    told = ["killed 1 0", "survived 0 1", "survived 0 1", "survived 0 0"]
    first = ["killed 1 0", "survived 0 1", "survived 0 1"]
    assert done.stdout.splitlines() == [*told, *first, "[]"]
    assert "MAX_UNTAKEN = 64" in (repository / "rmsnorm_patch/rewrite/handover.py").read_text()


WAITING = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1] + "/scripts"]
from mutation import in_python
work, seconds = [in_python.Asked(None, [sys.argv[2]])], float(sys.argv[3])
print([answer.end for _, answer in in_python.ends(Path(sys.argv[1]), work, 1, seconds)])
"""


def waiting(repository: Path, tmp_path: Path, seconds: int) -> list[str]:
    """A program that runs one test, which starts a process and waits for it."""
    test = tmp_path / "test_it.py"
    test.write_text(
        "import os, subprocess, sys, time\n\ndef test_it():\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"    open({str(tmp_path / 'new')!r}, 'w').write(str(child.pid))\n"
        f"    os.replace({str(tmp_path / 'new')!r}, {str(tmp_path / 'pid')!r})\n    time.sleep(600)\n"
    )
    return [sys.executable, "-c", WAITING, str(repository), str(test), str(seconds)]


def runs(pid: str) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "Z (zombie)" not in status.read_text()


def test_hung_children_and_what_they_started_are_ended(repository: Path, tmp_path: Path):
    done = subprocess.run(waiting(repository, tmp_path, 20), capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "['hung']"
    assert not runs((tmp_path / "pid").read_text())


def test_a_run_that_is_ended_leaves_no_process(repository: Path, tmp_path: Path):
    with subprocess.Popen(waiting(repository, tmp_path, 1200), stdout=subprocess.PIPE, text=True) as program:
        while not (tmp_path / "pid").exists():
            assert program.poll() is None
            time.sleep(0.05)
        pid = (tmp_path / "pid").read_text()
        assert runs(pid)
        program.terminate()
        assert program.wait() == 128 + signal.SIGTERM
    assert not runs(pid)


def test_outcomes_are_resumed_and_merged(mutants, script, tmp_path):
    """What one run saw stays seen; ends of a file that has changed since are not taken."""
    outcomes = script("mutation.outcomes")
    faults = mutants.faults("triton")
    first, second, third = faults[0], faults[1], faults[-1]
    assert first.file != third.file
    here, there = (outcomes.Outcomes(mutants.ROOT, "triton", faults, tmp_path / name) for name in ("here", "there"))
    here.note(first, "killed")
    here.note(second, "survived")
    there.left_out = ["test"]
    there.note(first, "survived")
    there.note(second, "hung")
    there.note(third, "killed")
    both = outcomes.Outcomes(mutants.ROOT, "triton", faults)
    for name in ("here", "there"):
        both.take(tmp_path / name)
    assert [both.of(fault) for fault in (first, second, third, faults[2])] == ["killed", "hung", "killed", None]
    told = mutants.summary("triton", faults, both, None)
    assert (told["run"], told["ends"]["killed"], told["ends"]["hung"], told["left_out"]) == (3, 2, 1, ["test"])
    assert len(told["not_run"]) == len(faults) - 3
    changed = (tmp_path / "there").read_text().replace(there._sources[third.file], "0" * 64)
    (tmp_path / "there").write_text(changed)
    late = outcomes.Outcomes(mutants.ROOT, "triton", faults)
    late.take(tmp_path / "there")
    assert [late.of(fault) for fault in (first, third)] == ["survived", None]
    with pytest.raises(SystemExit, match="not of cuda"):
        outcomes.Outcomes(mutants.ROOT, "cuda", mutants.faults("cuda")).take(tmp_path / "here")


def test_what_saw_a_fault_or_its_nearest_is_asked_first_next_time(mutants, script, tmp_path):
    """In a file that has changed since, too."""
    outcomes = script("mutation.outcomes")
    faults = mutants.faults("layer_calls")
    of_one = [fault for fault in faults if fault.file == faults[0].file]
    here = outcomes.Outcomes(mutants.ROOT, "layer_calls", faults, tmp_path / "here")
    here.note(of_one[0], "killed", "a.py::first")
    here.note(of_one[1], "killed")
    here.note(of_one[4], "killed", "a.py::fifth")
    here.note(of_one[5], "killed", "a.py::fifth")
    here.note(faults[-1], "killed", "a.py::elsewhere")
    held = (tmp_path / "here").read_text()
    (tmp_path / "here").write_text(held.replace(here._sources[faults[0].file], "0" * 64))
    again = outcomes.Outcomes(mutants.ROOT, "layer_calls", faults)
    again.take(tmp_path / "here")
    assert again.of(of_one[0]) is None
    assert again.likely(of_one[0]) == ["a.py::first", "a.py::fifth"]
    assert again.likely(of_one[0], 1) == ["a.py::first"]
    assert again.likely(of_one[5]) == again.likely(of_one[8]) == ["a.py::fifth", "a.py::first"]
    assert again.likely(faults[-1]) == ["a.py::elsewhere"]
