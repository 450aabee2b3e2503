"""Whether and how an engine's norms are served, as a pure function of what is known about the engine.

The arithmetic follows what is replaced, which vLLM decides by its IR priority and compile mode:
  native, compiled   Inductor's fusion: the norm reads the fp32 sum, one rounding at the end
  native, eager      vLLM's PyTorch code: fp32 sum, x * rstd rounded to the weight's dtype before the multiply
  vllm_c             vLLM's CUDA op: the norm reads the rounded sum
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..fused.linear_norm import splits as linear_norm_splits
from ..numerics.contract import FUNCTIONAL
from ..numerics.quantisation import SCHEMES, Scheme
from ..numerics.spec import NormSpec
from . import huggingface, schemes, settings
from .wrapping import original_of

Chosen = Literal["ir", "oot", "none"]

SPECS = {
    "rmsnorm_patch": NormSpec(eps=0.0, round_before_weight="none", output="input", sum="fp32"),
    "rmsnorm_patch_native": NormSpec(eps=0.0, round_before_weight="weight", output="input", sum="fp32"),
    "rmsnorm_patch_c": NormSpec(eps=0.0, round_before_weight="none", output="input", sum="rounded"),
    **huggingface.SPECS,
}
"""Provider name, as it stands in vLLM's IR priority lists -> the numerics it computes."""

FUSIONS = ("fuse_allreduce_rms", "enable_qk_norm_rope_fusion", "fuse_qk_norm_rope_kvcache")
"""vLLM's passes, by their names in its configuration, that compute a norm together with a neighbour of it."""

ALL_REDUCE = FUSIONS[0]
"""The one of them that computes a norm together with the all-reduce in front of it. With tensor parallel almost every
norm has one there, and the pass matches it before a provider is asked."""

NORM_QUANT = "fuse_norm_quant"
"""The pass of vLLM that computes a norm together with the quantisation behind it, in its CUDA ops."""

WEIGHT_ONLY = frozenset(
    {
        *("awq", "awq_marlin", "auto_awq", "gptq", "gptq_marlin", "auto_gptq"),
        *("bitsandbytes", "gguf", "moe_wna16", "experts_int8"),
    }
)
"""Quantisations that keep activations in bf16/fp16: no activation quantisation follows the norm. Of any other the
graph tells, norm by norm. vLLM 0.32 renames checkpoints of AWQ and GPTQ to "auto_awq" and "auto_gptq"."""


@dataclass(frozen=True)
class Facts:
    """What a decision rests on. incumbents: vLLM's default IR priority for rms_norm; capability: 90 for sm_90, None
    without an NVIDIA GPU; captures: whether CUDA graphs are; linear: `settings.read_linear()`; tried:
    `settings.read_tried()`; transformers: what its modules compute, where that was asked for; fusions: passes of vLLM
    that may take norms into kernels of their own; quantised: `settings.read_quantised()`; norm_quant: whether vLLM's
    pass of that name is on; without_gain: `schemes.without_gain()`, asked for route "auto" alone; norm_add:
    `settings.read_norm_add()`; silu_quantised: `settings.read_silu_quantised()`; blocks: `settings.read_blocks()`."""

    requested: settings.Route
    version: str
    has_ir: bool
    has_oot: bool
    device_type: str
    compiled: bool
    incumbents: tuple[str, ...] = ("native",)
    quantization: str | None = None
    tensor_parallel: int = 1
    batch_invariant: bool = False
    capability: int | None = None
    captures: bool = True
    linear: settings.Linear = "auto"
    tried: str = ""
    transformers: huggingface.Numerics | None = None
    fusions: tuple[str, ...] = ()
    quantised: settings.Quantised = "auto"
    norm_quant: bool = False
    without_gain: str = ""
    norm_add: settings.NormAdds = "auto"
    silu_quantised: settings.SiluQuantised = "auto"
    blocks: settings.Blocks = "auto"

    @property
    def may_quantise_rows(self) -> bool:
        """Whether products of a compiled graph may read quantised rows."""
        return self.compiled and self.quantization is not None and self.quantization not in WEIGHT_ONLY

    @property
    def may_part_products(self) -> bool:
        """Whether norms may quantise for products that do it themselves. A batch-invariant engine has one library for
        any number of rows, and with it one arithmetic."""
        return self.may_quantise_rows and self.blocks != "off" and not self.batch_invariant

    @property
    def needs_parted_products(self) -> bool:
        """Whether the engine gains only where its norms quantise for such products."""
        return self.may_part_products and self.without_gain == schemes.BLOCKS_INSIDE


@dataclass(frozen=True)
class Decision:
    """route "none" stands aside; provider names the numerics (a key of SPECS), "" with route "none". linear: a product
    and the fused norm that reads it become one op (`passes.linear_norm`), reorder: whose product may have other bits.
    offset: norms with fp32 `1 + w` weights are served too, by their class (`oot_route`). numerics: the classes of
    transformers that its norms compute as, "" for the engine's own numerics; refused: why these although transformers'
    were asked for; invariant: it is a batch-invariant engine; quantised: norms write quantised rows where the graph has
    readers of such (`passes.norm_quantised`); blocks: also for products that quantise blocks themselves
    (`passes.block_products`); needs_blocks: norms that cannot are left to vLLM; silu_quantised: the schemes whose rows
    silu_and_mul writes (`passes.silu_quantised`), none for no such pass; norm_add: norms take the residual-adds behind
    them (`passes.norm_add`); apart: norms stay apart from the all-reduces in front of them, which vLLM's pass
    ALL_REDUCE would fuse by default."""

    route: Chosen
    provider: str
    reason: str
    warning: bool = False
    linear: bool = False
    reorder: bool = False
    offset: bool = False
    numerics: str = ""
    refused: str = ""
    invariant: bool = False
    quantised: bool = False
    norm_add: bool = False
    silu_quantised: tuple[Scheme, ...] = ()
    blocks: bool = False
    needs_blocks: bool = False
    apart: bool = False

    def __str__(self) -> str:
        how = f"route {self.route}, provider {self.provider}" if self.route != "none" else "off, vLLM's own norms"
        return f"{how}: {self.reason}"


def _aside(reason: str, warning: bool = False) -> Decision:
    return Decision("none", "", reason, warning)


def decide(facts: Facts) -> Decision:
    """The route and the numerics for one engine, with the reason in a sentence."""
    decision = _decide(facts)
    if facts.transformers is None or decision.numerics:
        return decision
    return replace(decision, refused=_no_transformers(facts) or decision.reason)


def _decide(facts: Facts) -> Decision:
    if facts.requested == "off":
        return _aside(f"{settings.VARIABLE}=off")
    if why := settings.unsupported_release(facts.version, facts.tried):
        return _aside(why, warning=True)
    route = facts.requested
    if route == "auto":
        if not facts.has_ir and (why := settings.unknown_without_ir(facts.version, facts.tried)):
            return _aside(why, warning=True)
        route = "ir" if facts.has_ir else "oot"
    if (route == "ir" and not facts.has_ir) or (route == "oot" and not facts.has_oot):
        return _aside(f"vLLM {facts.version} does not offer the {route!r} route", warning=True)
    if facts.device_type not in ("cuda", "cpu"):
        return _aside(f"no kernels for device type {facts.device_type!r}")
    if why := _left_to_quantisation(facts, route):
        return _aside(why)
    if route == "oot" and facts.compiled and facts.tensor_parallel > 1:
        return _aside("tensor parallel: the out-of-tree norm would hide it from the all-reduce fusion")
    numerics = "" if facts.transformers is None or _no_transformers(facts) else facts.transformers.reason
    if facts.requested == "auto" and facts.compiled and facts.tensor_parallel > 1 and not numerics:
        how = f"{settings.VARIABLE}=ir serves them all the same"
        return _aside(f"tensor parallel: behind an all-reduce our norms were not seen to be faster; {how}")
    provider = _provider(facts)
    if not provider:
        return _aside(f"the IR priority begins with {facts.incumbents[0]!r}, which was asked for")
    asked = "asked for" if facts.requested == route else f"vLLM {facts.version} offers it"
    if numerics and facts.transformers is not None:
        provider = facts.transformers.provider
    reason = f"{asked}; numerics of {numerics or _NAMES[provider]}"
    parallel = facts.compiled and facts.tensor_parallel > 1
    apart = parallel and ALL_REDUCE not in facts.fusions
    if apart:
        reason += f"; tensor parallel: vLLM's pass {ALL_REDUCE} is off for them"
    elif parallel:
        reason += f"; tensor parallel: vLLM's pass {ALL_REDUCE} was turned on, and takes those behind an all-reduce"
    offset = apart or not parallel  # a class would hide its norms from that pass
    served = Decision(
        route, provider, reason, offset=offset, numerics=numerics, invariant=facts.batch_invariant, apart=apart
    )
    return _with_passes(facts, served)


def _with_passes(facts: Facts, served: Decision) -> Decision:
    """What the graph passes do in an engine whose norms are served, each with its words."""
    reason = served.reason
    measured = facts.device_type == "cuda" and facts.capability in linear_norm_splits.MEASURED
    linear = facts.compiled and facts.captures and measured and facts.linear != "off"
    linear = linear and not facts.batch_invariant  # how a product is split depends on its rows
    reorder = linear and facts.linear == "reorder"
    if linear:
        reason += "; norms add up the parts of split products"
        reason += " where no all-reduce stands between" if facts.tensor_parallel > 1 else ""
    if reorder:
        reason += f", and of products that are split for them ({settings.LINEAR_VARIABLE}=reorder)"
    norm_add = facts.compiled and facts.norm_add != "off"
    if facts.compiled and not norm_add:
        reason += f"; {settings.NORM_ADD_VARIABLE}=off leaves the adds behind norms apart"
    quantised = facts.may_quantise_rows
    if quantised:
        reason += f"; quantization {facts.quantization!r}: norms write quantised rows where the graph reads such"
    if facts.needs_parted_products:
        reason += f", and for products that quantise blocks themselves ({settings.BLOCKS_VARIABLE}={facts.blocks}); "
        reason += "where a trial of such rows fails, norms stay vLLM's"
    silu_quantised = _silu_quantised(facts) if quantised else ()
    if silu_quantised:
        rows = "such" if facts.silu_quantised == "on" else " and ".join(silu_quantised)
        reason += f"; silu_and_mul writes {rows} rows too ({settings.SILU_QUANTISED_VARIABLE}={facts.silu_quantised})"
    if facts.batch_invariant:
        reason += "; batch-invariant: a row's bits follow from it and its length alone"
    return replace(
        served,
        reason=reason,
        linear=linear,
        reorder=reorder,
        quantised=quantised,
        norm_add=norm_add,
        silu_quantised=silu_quantised,
        blocks=facts.may_part_products,
        needs_blocks=facts.needs_parted_products,
    )


def _silu_quantised(facts: Facts) -> tuple[Scheme, ...]:
    if facts.silu_quantised == "off":
        return ()
    return tuple(scheme for scheme in SCHEMES if facts.silu_quantised == "on" or scheme in schemes.SILU)


def _left_to_quantisation(facts: Facts, route: str) -> str:
    """Why vLLM's own norms run in front of quantisations, or ""."""
    if not facts.may_quantise_rows:
        return ""
    if facts.quantised == "off":
        return f"quantization {facts.quantization!r}: {settings.QUANTISED_VARIABLE}=off leaves its norms to vLLM"
    if facts.norm_quant and route == "ir":
        return f"quantization {facts.quantization!r}: vLLM's pass {NORM_QUANT} was turned on, and takes its norms"
    if facts.needs_parted_products:
        return ""
    if facts.without_gain and facts.requested == "auto":
        why = f"steps were not seen to be shorter; {settings.VARIABLE}=ir serves its norms all the same"
        if facts.without_gain == schemes.BLOCKS_INSIDE and facts.blocks == "off":
            why = f"{settings.BLOCKS_VARIABLE}=off leaves its norms to vLLM"
        return f"quantization {facts.quantization!r}: {facts.without_gain}, and {why}"
    return ""


_NAMES = {
    "rmsnorm_patch": "Inductor's fusion",
    "rmsnorm_patch_native": "vLLM's PyTorch norm",
    "rmsnorm_patch_c": "vLLM's CUDA op",
}


def _no_transformers(facts: Facts) -> str:
    """Why norms that are served do not compute what transformers' modules do; "" where they can."""
    if facts.transformers is not None and not facts.transformers.provider:
        return facts.transformers.reason
    if facts.compiled and facts.fusions:
        return f"vLLM's passes {', '.join(facts.fusions)} take norms into kernels with numerics of their own"
    return ""


def _provider(facts: Facts) -> str:
    incumbent = next((name for name in facts.incumbents if name not in SPECS), "native")
    if incumbent == "vllm_c":
        return "rmsnorm_patch_c"
    if incumbent == "native":
        return "rmsnorm_patch" if facts.compiled else "rmsnorm_patch_native"
    return ""


def facts_of(vllm_config: Any, incumbents: tuple[str, ...]) -> Facts:
    """Read a VllmConfig; only names that exist from vLLM 0.26 to 0.33 are used."""
    import vllm
    from vllm import envs
    from vllm.config import CompilationMode, CUDAGraphMode
    from vllm.platforms import current_platform

    compilation, requested = vllm_config.compilation_config, settings.read()
    model = vllm_config.model_config
    quantisation = getattr(vllm_config, "quant_config", None)
    return Facts(
        requested=requested,
        version=vllm.__version__,
        has_ir=has_ir(),
        has_oot=has_oot(),
        device_type=current_platform.device_type,
        compiled=compilation.mode not in (None, CompilationMode.NONE) and compilation.backend != "eager",
        incumbents=incumbents,
        quantization=None if model is None else model.quantization,
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        batch_invariant=bool(envs.VLLM_BATCH_INVARIANT),
        capability=_capability(current_platform),
        captures=compilation.cudagraph_mode != CUDAGraphMode.NONE,
        linear=settings.read_linear(),
        tried=settings.read_tried(),
        transformers=huggingface.asked_of(model),
        fusions=tuple(name for name in FUSIONS if getattr(compilation.pass_config, name, None)),
        quantised=settings.read_quantised(),
        norm_quant=bool(getattr(compilation.pass_config, NORM_QUANT, None)),
        without_gain=schemes.without_gain(quantisation) if requested == "auto" else "",
        norm_add=settings.read_norm_add(),
        silu_quantised=settings.read_silu_quantised(),
        blocks=settings.read_blocks(),
    )


def decision_for(vllm_config: Any) -> Decision:
    """What this engine's norms get; raises UnsupportedInput for a bad variable."""
    from vllm.platforms import current_platform

    default = getattr(type(current_platform), "get_default_ir_op_priority", None)
    if default is None:
        incumbents = _incumbents_without_ir(vllm_config.compilation_config.custom_ops, current_platform.device_type)
    else:
        original = original_of(default)
        found = default(vllm_config) if original is None else original(type(current_platform), vllm_config)
        incumbents = tuple(found.rms_norm)
    return decide(facts_of(vllm_config, incumbents))


def _incumbents_without_ir(custom_ops: Sequence[str], device_type: str) -> tuple[str, ...]:
    """What serves a norm where no priority does: vLLM's CUDA op, if the list of custom ops lets it."""
    enabled = "+rms_norm" in custom_ops or ("all" in custom_ops and "-rms_norm" not in custom_ops)
    return ("vllm_c", "native") if enabled and device_type == "cuda" else ("native",)


def _capability(platform: Any) -> int | None:
    """Asked of the driver's management library, which does not start CUDA."""
    if not platform.is_cuda():
        return None
    found = platform.get_device_capability()
    return None if found is None else int(found.to_int())


def has_ir() -> bool:
    try:
        from vllm import ir
    except ImportError:
        return False
    return all(hasattr(getattr(ir.ops, name, None), "register_impl") for name in FUNCTIONAL)


def has_oot() -> bool:
    try:
        from vllm.model_executor.custom_op import CustomOp
    except ImportError:
        return False
    return hasattr(CustomOp, "register_oot")
