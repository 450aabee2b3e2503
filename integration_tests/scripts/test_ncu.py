"""What is read out of Nsight Compute's table: counts of a call, durations of a kernel."""

from __future__ import annotations

import pytest

from rmsnorm_patch.backends.cuda import nvrtc


@pytest.fixture(scope="module")
def ncu(script):
    return script("benchlib.ncu")


@pytest.fixture(scope="module")
def profile_counts(script):
    return script("profile_counts")


@pytest.fixture(scope="module")
def kernel_time(script):
    return script("kernel_time")


def table(metrics, names: list[str]) -> str:
    """ncu's CSV for kernels of these names; the value of a metric is a thousand times the kernel's number."""
    lines = [
        "==PROF== Connected to process 1",
        '"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"',
    ]
    for number, name in enumerate(names):
        lines += [f'"{number}","1","{name}","{m}","sector","{number:,},000"' for m in metrics]
    return "\n".join(lines)


def test_kernels_between_markers_belong_to_one_call(profile_counts):
    calls = profile_counts.calls()
    names, kernels = [], []
    for call in calls:
        kernels.append(1 if call["provider"] == "ours" else 3)
        names += ["spin_kernel(long)", *["void at::native::kernel<float, 4>()"] * kernels[-1]]
    metrics = [*profile_counts.METRICS, profile_counts.DURATION, profile_counts.THROUGHPUT]
    rows = profile_counts.rows_of(table(metrics, names))
    assert [row["kernels"] for row in rows] == kernels
    assert [{k: row[k] for k in call} for row, call in zip(rows, calls, strict=True)] == calls
    assert rows[0]["counts"]["smsp__inst_executed.sum"] == (1 + 2 + 3) * 1000
    assert rows[1]["counts"]["smsp__inst_executed.sum"] == (5 + 6 + 7) * 1000  # the kernel's number; a marker has one
    assert rows[0]["us"] == 1 + 2 + 3
    assert rows[0]["dram_percent"] == round((1 + 4 + 9) * 1000 / (1 + 2 + 3), 2)  # weighted by duration
    assert {row["provider"] for row in rows if row["dtype"] == "fp32"} == {"naive", "eager", "ours"}


def test_a_profile_is_told_with_latency_rates_and_metrics(profile_counts):
    counts = dict.fromkeys(profile_counts.METRICS, 7.0)
    call = {"op": "rms_norm", "dtype": "fp32", "m": 1, "n": 2048, "provider": "naive", "kernels": 3, "counts": counts}
    line = profile_counts.line_of({**call, "us": 6.0, "dram_percent": 0.5})
    # 3 * 4 * 2048 bytes and 5 * 2048 operations in 6 microseconds.
    assert line.startswith("rms_norm fp32 1x2048 naive: 3 kernels; 6.00 us, DRAM at 0.5 %, 4.10 GB/s, 1.71 GFLOPS; ")
    assert line.endswith("bank conflicts 7")
    added = profile_counts.line_of({**call, "op": "fused_add_rms_norm", "us": 6.0, "dram_percent": 0.5})
    assert "GB/s" not in added


@pytest.mark.parametrize("architecture", ["sm_89", "sm_90", "sm_100", "sm_120"])
def test_the_naive_kernels_compile(script, architecture):
    naive = script("benchlib.naive")
    if not nvrtc.find():
        pytest.skip("no NVRTC here")
    source = naive.SOURCE.read_text()
    code = nvrtc.compile_source(naive.SOURCE.name, source, {}, (f"--gpu-architecture={architecture}",))
    assert all(name.encode() in code for name in naive.KERNELS)


def test_a_call_without_kernels_is_refused(profile_counts):
    names = ["spin_kernel"] * len(profile_counts.calls())
    with pytest.raises(SystemExit, match=r"kernels for \d+ calls"):
        profile_counts.rows_of(table(profile_counts.METRICS, names))


def test_durations_are_medians_of_a_call_s_launches_in_microseconds(kernel_time):
    outside = ["theirs=module:function"]
    calls = kernel_time.calls(outside)
    assert {name for _, name in calls} == {"ours", "ours_inplace", "theirs"}
    names = ["spin_kernel(long)", *["rms_norm_rows"] * kernel_time.REPEATS] * len(calls)
    rows = kernel_time.rows_of(table([kernel_time.METRIC], names), outside)
    assert [row["n"] for row in rows] == list(kernel_time.COLUMNS)
    # The kernel's number is its nanoseconds in thousands, so microseconds; the marker ahead of it counts as one.
    assert rows[0]["us"] == {"ours": 3.0, "ours_inplace": 9.0, "theirs": 15.0}
    assert rows[0]["spread"]["ours"] == [1.0, 5.0]
    assert rows[0]["mode"] == "kernel"


def test_a_missing_launch_is_refused(kernel_time):
    names = ["spin_kernel(long)", *["rms_norm_rows"] * kernel_time.REPEATS] * len(kernel_time.calls([]))
    with pytest.raises(SystemExit, match="kernels for"):
        kernel_time.rows_of(table([kernel_time.METRIC], names[:-1]), [])


def test_output_without_a_table_is_refused(ncu):
    with pytest.raises(SystemExit, match=r"no table in ncu's output:\n==ERROR=="):
        ncu.calls_of("==ERROR== The user does not have permission")
