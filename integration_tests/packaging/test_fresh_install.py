"""The wheel and the source archive as a stranger installs them: new environments, each declared Python, no checkout."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
DECLARED = re.findall(r"Python :: (3\.\d+)\"", (ROOT / "pyproject.toml").read_text())
TINY_MODEL = """
import torch, rmsnorm_patch, sys
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
ids = torch.arange(12)[None]
before = model(ids).logits
report = rmsnorm_patch.apply(model)
assert len(report.norms) == 5, report
assert torch.equal(model(ids).logits, before)
assert rmsnorm_patch.verify(model, {"input_ids": ids}).passed
rmsnorm_patch.revert(model)
print(torch.__version__, rmsnorm_patch.__file__)
"""


def interpreter(version: str) -> str | None:
    """A Python of this version: this one, one on the PATH, or one that pyenv keeps."""
    if sys.version.startswith(f"{version}."):
        return sys.executable
    root = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    kept = sorted(str(path) for path in root.glob(f"versions/{version}.*/bin/python"))
    return next(iter(kept), None) or shutil.which(f"python{version}")


def run(*words: object, cwd: Path) -> str:
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=clean, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """ "wheel" and "sdist" -> the file, as `make dist` makes them."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, ROOT, cwd=folder)
    return {"wheel": next(folder.glob("*.whl")), "sdist": next(folder.glob("*.tar.gz"))}


def new_environment(python: str, folder: Path) -> Path:
    """Python of an empty environment that `python` makes."""
    run(python, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    return folder / "bin" / "python"


def pip_install(python: Path, *words: object) -> None:
    """By the pip of this environment, which works for another: one fewer to unpack."""
    run(sys.executable, "-m", "pip", "--python", python, "install", "--quiet", *words, cwd=python.parent)


KINDS = ("wheel", "sdist")
OTHERS = [
    pytest.param(version, kind, marks=() if at == number else pytest.mark.long)
    for number, version in enumerate([v for v in DECLARED if not sys.version.startswith(f"{v}.")][-2:])
    for at, kind in enumerate(KINDS)
]
"""make test: the wheel on one, the archive on the other."""


@pytest.mark.slow
@pytest.mark.parametrize(("version", "kind"), OTHERS)
def test_it_installs_and_answers(version: str, kind: str, built: dict[str, Path], tmp_path: Path) -> None:
    """What needs no torch, on two other Pythons: every file compiles there, and help and version are shown. The pure
    Python packages, what builds the archive among them, are those of this environment."""
    found = interpreter(version)
    if found is None:
        pytest.skip(f"this machine has no Python {version}")
    python = new_environment(found, tmp_path / "env")
    site = next((tmp_path / "env" / "lib").glob("python3*/site-packages"))
    (site / "outer.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    pip_install(python, "--no-deps", "--no-index", "--no-build-isolation", "--ignore-installed", built[kind])
    run(python, "-W", "error", "-m", "compileall", "-q", "-f", site / "rmsnorm_patch", cwd=tmp_path)
    script = python.parent / "rmsnorm-patch"
    assert run(script, "--version", cwd=tmp_path).startswith("rmsnorm_patch ")
    assert "verify" in run(script, "--help", cwd=tmp_path)


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("version", DECLARED)
def test_a_stranger_installs_and_patches(version: str, built: dict[str, Path], tmp_path: Path) -> None:
    """pip fetches what the package asks for, after the torch that this environment has: gigabytes where the index
    carries CUDA builds alone. The wheel leaves that torch as it is, and so does the source archive on top of it.

    A declared Python that is not here fails: what is declared is run."""
    found = interpreter(version)
    assert found is not None, f"Python {version} is declared and not here: install it, or do not declare it"
    python = new_environment(found, tmp_path / "env")
    release = torch.__version__.partition("+")[0]
    pip_install(python, f"torch=={release}")
    torch_before = run(python, "-c", "import torch; print(torch.__version__)", cwd=tmp_path).strip()
    for kind in ("wheel", "sdist"):
        # The source archive builds in isolation: what builds it comes from the index too.
        again = ["--force-reinstall", "--no-deps"] if kind == "sdist" else []
        pip_install(python, *again, built[kind])
        torch_now, package = run(python, "-c", TINY_MODEL, cwd=tmp_path).split()
        assert torch_now == torch_before
        assert Path(package).is_relative_to(tmp_path / "env")
        report = json.loads(run(python.parent / "rmsnorm-patch", "env", "--json", cwd=tmp_path))
        assert report["python"].startswith(f"{version}.")
        assert report["kernels"].startswith(str(tmp_path / "env"))
        assert report["outlook"]
