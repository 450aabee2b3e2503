"""What is read out of Nsight Compute's table."""

from __future__ import annotations

import pytest


@pytest.fixture(scope="module")
def profile_counts(script):
    return script("profile_counts")


def table(profile_counts, names: list[str]) -> str:
    """ncu's CSV for kernels of these names; the value of a metric is a thousand times the kernel's number."""
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
    ]
    for number, name in enumerate(names):
        lines += [f'"{number}","1","{name}","{m}","sector","{number:,},000"' for m in profile_counts.METRICS]
    return "\n".join(lines)


def test_kernels_between_markers_belong_to_one_call(profile_counts):
    calls = profile_counts.calls()
    names, kernels = [], []
    for call in calls:
        kernels.append(3 if call["provider"] == "eager" else 1)
        names += ["spin_kernel(long)", *["void at::native::kernel<float, 4>()"] * kernels[-1]]
    rows = profile_counts.rows_of(profile_counts.parse(table(profile_counts, names)))
    assert [row["kernels"] for row in rows] == kernels
    assert [{k: row[k] for k in call} for row, call in zip(rows, calls, strict=True)] == calls
    assert rows[0]["counts"]["smsp__inst_executed.sum"] == (1 + 2 + 3) * 1000
    assert rows[1]["counts"]["smsp__inst_executed.sum"] == 5000


def test_a_call_without_kernels_is_refused(profile_counts):
    names = ["spin_kernel"] * len(profile_counts.calls())
    with pytest.raises(SystemExit, match=r"kernels for \d+ calls"):
        profile_counts.rows_of(profile_counts.parse(table(profile_counts, names)))


def test_output_without_a_table_is_refused(profile_counts):
    with pytest.raises(SystemExit, match=r"no table in ncu's output:\n==ERROR=="):
        profile_counts.parse("==ERROR== The user does not have permission")
