"""How the Triton backend is found, loaded and refused."""

from __future__ import annotations

import ast
import subprocess
import sys
import threading
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import rmsnorm_patch
from rmsnorm_patch import ops
from rmsnorm_patch.backends.triton import backend as triton_backend
from rmsnorm_patch.backends.triton import loader as triton_loader
from rmsnorm_patch.backends.triton import schedules
from rmsnorm_patch.errors import KernelBuildError, UnsupportedInput
from rmsnorm_patch.kernel_files import kernels_dir
from rmsnorm_patch.numerics import operands
from rmsnorm_patch.numerics.contract import PLAIN_OPS
from rmsnorm_patch.numerics.spec import LLAMA


def test_cpu_tensors_need_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert triton_backend.available("cpu") == (False, "CPU tensors need TRITON_INTERPRET=1")
    with pytest.raises(UnsupportedInput, match=r"x on cpu for backend='triton'.*TRITON_INTERPRET=1.*backend='auto'"):
        ops.bind_rms_norm(LLAMA, "triton")(torch.ones(2, 64), None, 1e-6)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert triton_backend.available("cpu")[0]
    assert torch.equal(ops.bind_rms_norm(LLAMA, "triton")(torch.ones(2, 64), None, 0.0), torch.ones(2, 64))


def test_devices_without_kernels_are_named() -> None:
    assert triton_backend.available("mps") == (False, "no kernels for devices of type mps")


def test_missing_triton_is_a_reason_and_not_a_crash() -> None:
    """In a process where importing triton fails."""
    script = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch\n"
        "from rmsnorm_patch import ops\n"
        "from rmsnorm_patch.backends.triton import backend as triton_backend\n"
        "from rmsnorm_patch.numerics.spec import LLAMA\n"
        "print(triton_backend.available('cpu'))\n"
        "print(ops.bind_rms_norm(LLAMA)(torch.ones(2, 4), None, 0.0).sum().item())\n"
    )
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.splitlines() == ["(False, 'triton is not installed')", "8.0"]


def test_a_thread_waits_for_kernels_that_another_one_is_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of what is half loaded `sys.modules` has the module, but not yet its kernel."""
    import triton

    loads, may_go_on = threading.Event(), threading.Event()
    decorate: Any = triton.jit

    def jit(*given: Any, **named: Any) -> Any:
        loads.set()
        may_go_on.wait(10)
        return decorate(*given, **named)

    monkeypatch.setattr(triton, "jit", jit)
    monkeypatch.setattr(triton_loader, "_PACKAGES", {True: "", False: "_loaded_by_two_threads"})
    monkeypatch.setattr(triton_loader, "_LOADED", {}, raising=False)
    found: list[ModuleType] = []
    threads = [
        threading.Thread(target=lambda: found.append(triton_loader.load("row_math", interpreted=False)))
        for _ in range(2)
    ]
    threads[0].start()
    assert loads.wait(10)
    threads[1].start()
    threads[1].join(0.2)
    early = list(found)
    may_go_on.set()
    for thread in threads:
        thread.join()
    assert early == []
    assert [hasattr(module, "reciprocal_rms") for module in found] == [True, True]


def test_interpreted_and_compiled_kernels_live_side_by_side() -> None:
    compiled = triton_loader.load("rms_norm", interpreted=False)
    interpreted = triton_loader.load("rms_norm", interpreted=True)
    assert type(compiled.rms_norm).__name__ == "JITFunction"
    assert type(interpreted.rms_norm).__name__ == "InterpretedFunction"
    assert Path(compiled.__file__) == Path(interpreted.__file__)
    assert triton_loader.load("rms_norm", interpreted=False) is compiled


def test_the_interpreter_rounds_to_nearest_even() -> None:
    values = torch.tensor([1.00390625, 1.01171875, -1.00390625, 3.3e38, 1e-40, float("nan"), float("-inf")])
    found = torch.from_numpy(triton_loader._round_to_bf16(values.numpy())).view(torch.bfloat16)
    assert torch.equal(found.nan_to_num(), values.bfloat16().nan_to_num())
    assert found[:3].tolist() == [1.0, 1.015625, -1.0]


def test_importing_the_package_leaves_triton_alone() -> None:
    script = "import sys, rmsnorm_patch.ops, rmsnorm_patch.backends.triton.backend as _; "
    script += "print('triton.language' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert found.strip() == "False"


def test_every_launch_says_whether_products_are_fused() -> None:
    """Launches of what is compiled already, which name their stream, compile nothing."""
    launches = []
    for file in Path(rmsnorm_patch.__file__).parent.rglob("*.py"):
        for call in ast.walk(ast.parse(file.read_text())):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Subscript):
                keywords = {each.arg for each in call.keywords}
                if keywords & {"BLOCK", "NESTED", "DEPENDENT"} or "**values" in ast.unparse(call):
                    launches.append(f"{file.name}: {ast.unparse(call)}")
    assert len(launches) == 6
    assert [each for each in launches if "**COMPILE_OPTIONS" not in each and "**layout.options" not in each] == []


def test_warmup_compiles_by_running(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    key = (torch.bfloat16, (328,), torch.bfloat16, torch.device("cpu"))  # a length of this test alone
    for op in PLAIN_OPS:
        layouts = triton_backend.bind(op, LLAMA)._layouts  # type: ignore[attr-defined]
        assert key not in layouts
        triton_backend.warmup(op, LLAMA, 328, torch.bfloat16, torch.bfloat16, device="cpu")
        assert key in layouts


@pytest.mark.parametrize("op", PLAIN_OPS)
def test_each_device_has_a_layout_of_its_own(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPUs of two generations in one process: only the newer one may be launched dependently."""
    targets = {"cpu": triton_backend.Target.nvidia(9), "meta": triton_backend.Target.nvidia(8)}
    monkeypatch.setattr(triton_backend.Target, "of", lambda device, dependent: targets[device.type])
    launched: list[bool] = []
    monkeypatch.setattr(
        triton_backend._Op, "_launch", lambda self, name, layout, *rest: launched.append(layout.constants["DEPENDENT"])
    )
    monkeypatch.setattr(operands, "check_in_place", lambda *_: None)  # all of a meta tensor lies at address 0
    bound = triton_backend.bind(op, LLAMA)
    for device in ("cpu", "meta", "cpu"):
        rows = [torch.zeros(2, 336, device=device) for _ in range(PLAIN_OPS[op].operands)]
        bound(*rows, torch.ones(336, device=device), 1e-6)
    assert launched == [True, False, True]


@pytest.mark.parametrize("kernel", ["rms_norm", "fused_add_rms_norm"])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_schedules_cover_every_length_without_a_whole_chunk_to_spare(itemsize: int, kernel: str) -> None:
    for warp_size in (32, 64):
        for n in (*range(1, 2000), 2880, 5120, 7168, 24449, 32768, 65536, 262144):
            found = schedules.schedule(kernel, n, itemsize, warp_size)
            assert found.block * found.chunks >= n > found.block * (found.chunks - 1)
            assert found.block & (found.block - 1) == 0
            assert found.num_warps * warp_size <= 1024
            assert found.streamed == 0 or found.rows == 1
            assert found.streamed % schedules.UNROLL == 0
            assert found.streamed < found.chunks  # the loop over them has no masks, so they must all be full
            vec = schedules.vector_elements(n, itemsize)
            assert n % vec == 0
            assert vec * itemsize <= 16


# (rows, block, chunks, warps, streamed, batch, ahead, prefetch, prefetch of the weight, late launch)
CHOSEN = {
    ("rms_norm", 128, 2, False): (8, 128, 1, 4, 0, 1, 1, False, True, False),
    ("rms_norm", 1024, 2, False): (4, 512, 2, 8, 0, 2, 2, False, True, False),
    ("rms_norm", 4096, 2, False): (1, 2048, 2, 8, 0, 2, 2, False, True, False),
    ("rms_norm", 8192, 2, False): (1, 4096, 2, 16, 0, 2, 1, True, True, False),
    ("rms_norm", 4096, 4, False): (1, 2048, 2, 16, 0, 2, 1, True, True, False),
    ("rms_norm", 16384, 2, False): (1, 8192, 2, 32, 0, 2, 1, True, True, False),
    ("rms_norm", 131072, 2, False): (1, 8192, 16, 32, 8, 16, 1, False, True, False),
    ("fused_add_rms_norm", 128, 2, False): (8, 128, 1, 4, 0, 1, 1, False, False, False),
    ("fused_add_rms_norm", 2048, 2, False): (1, 2048, 1, 8, 0, 1, 1, False, True, True),
    ("fused_add_rms_norm", 4096, 2, False): (1, 4096, 1, 16, 0, 1, 1, False, False, True),
    ("fused_add_rms_norm", 8192, 2, False): (1, 8192, 1, 32, 0, 1, 1, True, False, False),
    ("fused_add_rms_norm", 20480, 2, False): (1, 4096, 5, 16, 0, 5, 1, True, False, False),
    ("fused_add_rms_norm", 24576, 2, False): (1, 4096, 6, 16, 0, 5, 1, True, False, False),
    ("fused_add_rms_norm", 65536, 2, True): (1, 8192, 8, 32, 4, 2, 1, True, False, False),
    ("fused_add_rms_norm", 131072, 2, False): (1, 8192, 16, 32, 8, 2, 1, False, False, False),
}


@pytest.mark.parametrize("asked", CHOSEN)
def test_what_is_chosen(asked: tuple[str, int, int, bool]) -> None:
    kernel, n, itemsize, wide_sum = asked
    assert tuple(schedules.schedule(kernel, n, itemsize, wide_sum=wide_sum)) == CHOSEN[asked]


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("[[1, 1024], ", "[[1, 1000], ", "row_bytes"),
        ("[131073], ", "[131073, 200000], ", "row_bytes"),
        ("128,  1,   ", "100,  1,   ", r"rules\[2\].threads"),
        ("0, 1, 0],", "2, 1, 0],", r"rules\[0\].PREFETCH"),
        ('"threads"', '"warps"', r"rules\[0\].threads"),
        ("schema = 1", "schema = 2", "schema"),
    ],
)
def test_a_mistake_in_a_file_is_named(tmp_path: Path, old: str, new: str, named: str) -> None:
    text = (kernels_dir() / "triton" / "schedules" / "rms_norm.toml").read_text()
    assert old in text
    file = tmp_path / "rms_norm.toml"
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(KernelBuildError, match=named):
        schedules.read_rules(file)
