"""The built wheel and an editable install, each in an environment of its own, used from a folder that is not ours."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow


def run(*words: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def pip(*words: object, cwd: Path, python: Path | str = sys.executable) -> None:
    # --no-index: nothing is fetched. The build backend is the one of this environment.
    flags = ("--no-deps", "--no-build-isolation", "--no-index")
    run(sys.executable, "-m", "pip", "--python", python, *words, *flags, cwd=cwd)


def environment(folder: Path) -> Path:
    """Python of a fresh environment that sees the packages of this one, but no editable install in it."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    site = next((folder / "lib").glob("python3*/site-packages"))
    (site / "outer.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return folder / "bin" / "python"


def kernel_files(repository: Path) -> set[str]:
    """The kernel sources under version control, relative to `kernels/`."""
    listed = run("git", "ls-files", "kernels", cwd=repository).splitlines()
    return {name.removeprefix("kernels/") for name in listed if not name.endswith(".gitkeep")}


@pytest.fixture(scope="module")
def wheel(repository: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    pip("wheel", repository, "--wheel-dir", target, cwd=target)
    return next(target.glob("rmsnorm_patch-*.whl"))


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, repository: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """("wheel" or "editable", python of the environment it is installed in)."""
    folder = tmp_path_factory.mktemp(request.param)
    python = environment(folder / "env")
    what = [request.getfixturevalue("wheel")] if request.param == "wheel" else ["-e", repository]
    pip("install", "--ignore-installed", *what, cwd=folder, python=python)
    return request.param, python


def test_wheel_holds_the_package_and_its_kernels_only(wheel: Path, repository: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = Parser().parsestr(archive.read(next(n for n in names if n.endswith("/METADATA"))).decode())
        entries = archive.read(next(n for n in names if n.endswith("/entry_points.txt"))).decode()
    assert {name.split("/")[0].split("-")[0] for name in names} == {"rmsnorm_patch"}
    shipped = {n.removeprefix("rmsnorm_patch/kernels/") for n in names if n.startswith("rmsnorm_patch/kernels/")}
    assert kernel_files(repository) <= shipped
    assert not [n for n in names if n.endswith((".pyc", ".safetensors")) or "kernels/__init__" in n]
    sources = run("git", "ls-files", "rmsnorm_patch", cwd=repository).split()
    assert set(sources) <= set(names)
    assert metadata["Requires-Python"] == ">=3.10"
    assert any(name.endswith("/licenses/LICENSE") for name in names)
    assert "rmsnorm-patch = rmsnorm_patch.cli:main" in entries


def test_engines_find_their_plugins(installed: tuple[str, Path], tmp_path: Path) -> None:
    """Each group is read as its engine reads it: every entry point is loaded, and called without an argument."""
    code = """
import json, sys
from importlib.metadata import entry_points
found = {}
for group in ("vllm.general_plugins", "sglang.srt.plugins"):
    for point in entry_points(group=group):
        if point.dist.name == "rmsnorm_patch":
            found[group] = point.name, point.value, point.load()()
print(json.dumps([found, sorted({"vllm", "sglang"} & set(sys.modules))]))
"""
    found, imported = json.loads(run(installed[1], "-c", code, cwd=tmp_path))
    assert found == {
        "vllm.general_plugins": ["rmsnorm_patch", "rmsnorm_patch.vllm_plugin:register", None],
        "sglang.srt.plugins": ["rmsnorm_patch", "rmsnorm_patch.compat.sglang_plugin:register", None],
    }
    assert imported == []


def test_installed_package_finds_its_kernels(installed: tuple[str, Path], repository: Path, tmp_path: Path) -> None:
    kind, python = installed
    code = "import json, rmsnorm_patch; from rmsnorm_patch.kernel_files import kernels_dir; "
    code += "print(json.dumps([rmsnorm_patch.__file__, str(kernels_dir())]))"
    package, kernels = map(Path, json.loads(run(python, "-c", code, cwd=tmp_path)))
    if kind == "wheel":
        assert package.is_relative_to(python.parent.parent)
        assert kernels == package.parent / "kernels"
    else:
        assert package == repository / "rmsnorm_patch" / "__init__.py"
        assert kernels == repository / "kernels"
    assert all((kernels / name).is_file() for name in kernel_files(repository))


LIBRARY = (
    "import rmsnorm_patch, kernels; from transformers.integrations import hub_kernels; print(kernels.get_kernel)\n"
)


def test_kernels_library_of_hugging_face_is_not_shadowed_in_a_checkout(
    installed: tuple[str, Path], repository: Path
) -> None:
    run(installed[1], "-c", LIBRARY, cwd=repository)


WHEEL = pytest.mark.parametrize("installed", ["wheel"], indirect=True)
"""The environment of a checkout has an editable install, which the other tests run."""


@WHEEL
def test_triton_kernels_load_from_the_wheel_beside_that_library(installed: tuple[str, Path], tmp_path: Path) -> None:
    """The interpreter runs the kernel file that the install carries."""
    code = (
        f"import os; os.environ['TRITON_INTERPRET'] = '1'; import torch; {LIBRARY}"
        "from rmsnorm_patch import ops; from rmsnorm_patch.numerics.spec import LLAMA\n"
        "x, w = torch.randn(3, 96), torch.rand(96)\n"
        "y = ops.bind_rms_norm(LLAMA, 'triton')(x, w, 1e-6)\n"
        "torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (96,), w, 1e-6), atol=1e-6, rtol=1e-6)"
    )
    run(installed[1], "-c", code, cwd=tmp_path)


@WHEEL
def test_console_script_proves_a_model(installed: tuple[str, Path], tiny_llama: Path, tmp_path: Path) -> None:
    script = installed[1].parent / "rmsnorm-patch"
    proof = json.loads(run(script, "verify", tiny_llama, "--device", "cpu", "--json", cwd=tmp_path))
    assert proof["passed"] is True
    assert proof["fired"]["pairs_fused"] == 8


def test_env_says_what_this_machine_gets(installed: tuple[str, Path], tmp_path: Path) -> None:
    shown = run(installed[1].parent / "rmsnorm-patch", "env", cwd=tmp_path)
    assert shown.split("\n")[0].strip() == "what this machine gets"
    assert "not faster" in shown


def source_archive(repository: Path, folder: Path) -> Path:
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", folder, repository, cwd=folder)
    return next(folder.glob("*.tar.gz"))


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_two_builds_have_one_digest(wheel: Path, repository: Path, tmp_path: Path) -> None:
    """The archive, and the wheel that it makes when it lies elsewhere and its files are newer, with other rights."""
    folders = [tmp_path / name for name in ("one", "two", "three", "unpacked")]
    for folder in folders:
        folder.mkdir()
    archive = source_archive(repository, folders[0])
    assert digest(source_archive(repository, folders[1])) == digest(archive)
    with tarfile.open(archive) as packed:
        names = {name.split("/", 1)[1] for name in packed.getnames() if "/" in name}
        packed.extractall(folders[3])
    assert {f"kernels/{name}" for name in kernel_files(repository)} <= names
    assert {"pyproject.toml", "README.md", "LICENSE", "rmsnorm_patch/py.typed"} <= names
    assert not [name for name in names if name.startswith((".venv", ".git/"))]
    unpacked = next(folders[3].iterdir())
    for path in unpacked.rglob("*.*"):
        path.chmod(0o600 if path.is_file() else 0o700)
        os.utime(path)
    pip("wheel", unpacked, "--wheel-dir", folders[2], cwd=tmp_path)
    assert digest(next(folders[2].glob("*.whl"))) == digest(wheel)
