"""Classes that are derived from vLLM's norms, such as those of its Transformers backend, are served as those are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed in this environment; `make test-vllm` builds one")

PROGRAM = """
import torch
from rmsnorm_patch import vllm_plugin
from rmsnorm_patch.ops import Bound
vllm_plugin.register()
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.custom_op import op_registry_oot
from vllm.model_executor.layers import layernorm
from vllm.model_executor.models.transformers.fusers.rms_norm import TPAwareGemmaRMSNorm, TPAwareRMSNorm

torch.manual_seed(0)
torch.set_default_dtype(torch.bfloat16)
ran, run = [], Bound.run
Bound.run = lambda op, *operands: (ran.append(op.op), run(op, *operands))[1]
vllm_config = VllmConfig()
vllm_config.compilation_config.mode = 0

def made(cls, *given, **named):
    with set_current_vllm_config(vllm_config), torch.no_grad():
        norm = cls(*given, **named)
        norm.weight.data.normal_()
    return norm

def served(norm, *given):
    ran.clear()
    return norm(*given), len(ran)
"""

BACKEND = """
x, residual = torch.randn(2, 3, 96)
for cls, base in ((TPAwareRMSNorm, layernorm.RMSNorm), (TPAwareGemmaRMSNorm, layernorm.GemmaRMSNorm)):
    norm = made(cls, hidden_size=96, eps=1e-5)
    by_ir = ROUTE == "ir" and base is layernorm.RMSNorm
    assert type(norm).__name__ == ("" if by_ir else "Patched") + cls.__name__, type(norm)
    assert isinstance(norm, cls) and type(norm).name == base.name
    if by_ir:
        continue
    got, calls = served(norm, x)
    assert calls == 1 and torch.equal(got, norm.forward_native(x))
    both, calls = served(norm, x.clone(), residual.clone())
    assert calls == 1 and all(map(torch.equal, both, norm.forward_native(x, residual)))
    norm.tp_size = 2  # its own forward is the outer one: it gathers what is shared out
    try:
        norm(x[:, :95])
    except ValueError as error:
        assert "does not tile it evenly" in str(error)
    else:
        raise AssertionError("its own forward was passed by")
"""

OTHERS = """
class Scaled(layernorm.RMSNorm):
    def forward(self, x, residual=None):
        return 2 * super().forward(x)

class Arithmetic(layernorm.RMSNorm):
    def forward_native(self, x, residual=None):
        return 3 * x

class Further(Scaled):
    def extra_repr(self):
        return "further"

class Registered(layernorm.RMSNorm):
    pass

class Foreign(Registered):
    pass

op_registry_oot["Registered"] = Foreign
x = torch.randn(3, 96)
for cls in (Scaled, Further):
    norm = made(cls, 96)
    got, calls = served(norm, x)
    assert calls == 1 and torch.equal(got, 2 * norm.forward_native(x)), cls
    assert type(made(cls, 96)) is type(norm)
norm = made(Arithmetic, 96)
got, calls = served(norm, x)
assert calls == 0 and torch.equal(got, 3 * x)
assert type(norm) is Arithmetic
assert type(made(Registered, 96)) is Foreign
"""


@pytest.mark.parametrize("route", ["ir", "oot"])
def test_norms_of_the_transformers_backend(
    route: str, environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]
) -> None:
    """Those with `1 + w` weights on both routes. What the derived class does around the norm stays."""
    program = f"ROUTE = {route!r}\n{PROGRAM}{BACKEND}"
    done = run_program(["-c", program], environment(RMSNORM_PATCH_VLLM=route))
    assert done.returncode == 0, done.stderr[-3000:]


def test_only_classes_without_arithmetic_of_their_own(
    environment: Callable[..., dict[str, str]], run_program: Callable[..., Any]
) -> None:
    done = run_program(["-c", PROGRAM + OTHERS], environment(RMSNORM_PATCH_VLLM="oot"))
    assert done.returncode == 0, done.stderr[-3000:]
