"""Shared by all tests: the shipped checkpoints, seeded small models, one thread, no network."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import importlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

DATA = Path(__file__).resolve().parent / "data"

SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


SCRIPTS = DATA.parents[1] / "scripts"


@pytest.fixture(scope="session")
def script() -> Callable[[str], ModuleType]:
    """A script as a module: `script("gpu_record")`, `script("benchlib.aims")`. What it imports lies beside it."""
    if str(SCRIPTS) not in sys.path:
        sys.path.insert(0, str(SCRIPTS))
    return importlib.import_module


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """In the processes that run tests: the one that hands them out (`-n 2`) need not import torch."""
    import torch

    torch.set_num_threads(1)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


def pytest_collection_finish() -> None:
    _module("garbage", DATA.parent / "vllm_plugin" / "garbage.py").keep_what_is_there()


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the source checkout."""
    return DATA.parent.parent


@pytest.fixture(scope="session")
def shared_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for all workers of a run (`-n 2`), gone with its temporary files."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def random_checkpoint() -> Callable[..., Path]:
    """`random_checkpoint(folder, "qwen3", std=0.2, head_dim=32)`: a small random bf16 model that an engine can serve,
    with the shipped tokenizer. std: of all weights but the norms'. Further arguments are config fields. A model that is
    certain of its tokens is refused: equal logprobs would say nothing of its norms."""

    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    def save(folder: Path, model_type: str, std: float, **fields: object) -> Path:
        sizes = {"vocab_size": 258, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
        heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
        config = AutoConfig.for_model(model_type, **{**sizes, **heads, **fields})
        torch.manual_seed(3)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.uniform_(0.5, 1.5) if "norm" in name else parameter.normal_(std=std)
            logits = model.eval()(input_ids=torch.tensor([[5, 70, 101, 108, 111]])).logits
        surest = logits.float().log_softmax(-1).amax(-1).mean().item()
        assert surest < -0.3, f"{model_type}, std {std}: a token's logprob is {surest:.2f}; take a smaller std"
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(DATA / "tiny-llama").save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="session")
def first_layers() -> Callable[[Path, Path, int], Path]:
    """`first_layers(checkpoint, folder, 2)`: a model of the first layers of another, for tests that take a while for
    each layer."""
    from safetensors.torch import load_file, save_file

    def save(source: Path, folder: Path, count: int) -> Path:
        shutil.copytree(source, folder)
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
        further = tuple(f"model.layers.{i}." for i in range(count, config["num_hidden_layers"]))
        kept = {name: w for name, w in load_file(source / "model.safetensors").items() if not name.startswith(further)}
        save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return save


@pytest.fixture
def products_unknown() -> Iterator[None]:
    """What the process knows of split products, before a test and after it: nothing."""
    from rmsnorm_patch.fused.linear_norm import splits as linear_norm_splits

    def forget() -> None:
        for finder in linear_norm_splits.finders():
            finder.forget()

    forget()
    yield
    forget()


@pytest.fixture(scope="session")
def collect_garbage() -> Callable[[], None]:
    """Collects until nothing is found. What earlier tests left behind may take several rounds, since finalisers let go
    of more; in the middle of a count it would look like a change of ours."""

    def collect() -> None:
        for _ in range(20):
            if not gc.collect():
                return

    return collect


@pytest.fixture(scope="session")
def vllm_processes() -> ModuleType:
    """vllm_plugin/processes.py: engines and servers as child processes."""
    return _module("vllm_processes", DATA.parent / "vllm_plugin" / "processes.py")


@pytest.fixture(scope="session")
def compiled_cpp() -> None:
    """Inductor's C++ is compiled once for each source, also where a test turns its caches off."""
    import torch

    if not torch.cuda.is_available():
        _module("compiled_cpp", DATA.parent / "vllm_plugin" / "compiled_cpp.py").install()


@pytest.fixture(scope="session")
def quantised_models() -> ModuleType:
    """quantised_models.py: models whose products are quantised."""
    return _module("quantised_models", DATA.parent / "quantised_models.py")


@pytest.fixture(scope="session")
def compiled_code() -> ModuleType:
    """compiled_code.py: what Inductor makes of a model, to be compared."""
    return _module("compiled_code", DATA.parent / "compiled_code.py")


def _module(name: str, path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def shared_library(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`shared_library(source, "-lm")`: a C file compiled into a folder of its own."""
    from rmsnorm_patch.backends.cuda import launcher

    def build(source: Path, *words: str) -> Path:
        command = launcher.compiler()
        if not command:
            pytest.skip("needs a C compiler")
        path = tmp_path_factory.mktemp(source.stem) / f"lib{source.stem}.so"
        subprocess.run([*command, "-shared", "-fPIC", "-O1", str(source), "-o", str(path), *words], check=True)
        return path

    return build


@pytest.fixture(scope="session", params=["tiny-llama", "tiny-mistral"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """Folder of a trained byte-level checkpoint (bf16); the test runs once for each."""
    return DATA / request.param


@pytest.fixture(scope="session")
def tiny_llama() -> Path:
    return DATA / "tiny-llama"


@pytest.fixture
def small_model() -> Callable[..., PreTrainedModel]:
    """`small_model("qwen3", torch.bfloat16, num_hidden_layers=3)`: random weights of a fixed seed, norm weights away
    from 1, eval mode. Keyword arguments are config fields; None removes a default field."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def build(model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **fields: object) -> PreTrainedModel:
        wanted = {name: value for name, value in {**SMALL, **fields}.items() if value is not None}
        config = AutoConfig.for_model(model_type, **wanted)
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and parameter.ndim == 1:
                    parameter.uniform_(0.5, 1.5)
        return model

    return build
