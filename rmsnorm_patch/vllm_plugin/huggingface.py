"""What the norms of a model compute in transformers, for engines that are to compute the same to the bit.

transformers' own model is built from the engine's configuration, on the meta device. `scan` then runs each of its norm
classes on probes, as it does for a model that is patched. No table of families stands here.

    RMSNORM_PATCH_VLLM_NUMERICS=huggingface
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from ..errors import RMSNormPatchError
from ..numerics.spec import NormSpec
from ..scan.norms import scan_norms
from ..scan.plan import NormSite
from ..scan.probe import undisturbed
from . import settings

ROUNDED_BEFORE, ROUNDED_ONCE = "rmsnorm_patch_hf_llama", "rmsnorm_patch_hf_olmo"
SPECS = {
    ROUNDED_BEFORE: NormSpec(eps=0.0, round_before_weight="input", output="input", sum="rounded"),
    ROUNDED_ONCE: NormSpec(eps=0.0, round_before_weight="none", output="input", sum="rounded"),
}
"""Provider -> its numerics. In both the norm reads the sum as transformers stores it. The second one's are those of a
`1 + w` in fp32 too, with the weight offset that `oot_route` adds."""


@dataclass(frozen=True)
class Counterpart:
    """One norm of transformers' model. columns: None for a norm without a weight, which takes any."""

    class_name: str
    columns: int | None
    eps: float
    adds_one: bool


@dataclass(frozen=True)
class Numerics:
    """provider: "" where it is not known what transformers computes, or where no provider computes it, and `reason`
    says why; else the classes whose numerics it has. norms: path -> `Counterpart`."""

    provider: str
    reason: str
    norms: tuple[tuple[str, Counterpart], ...] = ()

    def of(self, path: str, columns: int, has_weight: bool) -> Counterpart | None:
        """The counterpart of an engine's norm: of the same path, else what all norms of that length agree on."""
        length = columns if has_weight else None
        at = dict(self.norms).get(path)
        if at is not None and at.columns == length:
            return at
        alike = [norm for _, norm in self.norms if norm.columns == length]
        return alike[0] if len({(norm.eps, norm.adds_one) for norm in alike}) == 1 else None


def computes_offset(provider: str) -> bool:
    """Whether a norm with an fp32 `1 + w` weight has transformers' numerics with this provider."""
    return provider == ROUNDED_ONCE


def asked_of(model_config: Any) -> Numerics | None:
    """`numerics_of` the model of an engine; None where its own numerics are asked for, or no model is known yet."""
    if model_config is None or settings.read_numerics() == "engine":
        return None
    return numerics_of(model_config.hf_config)


def numerics_of(config: Any) -> Numerics:
    """Of the model that a transformers configuration describes; never raises for one that cannot be judged."""
    try:
        return _numerics_of(config.to_json_string(use_diff=False), _Held(config))
    except (AttributeError, TypeError, ValueError) as error:
        return Numerics("", f"its configuration cannot be read ({type(error).__name__}: {error})")


class _Held:
    """Takes a configuration past a cache that looks at its text."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    def __hash__(self) -> int:
        return 0


@lru_cache(maxsize=8)
def _numerics_of(text: str, held: _Held) -> Numerics:
    import transformers

    name = next(iter(held.config.architectures or ()), "")
    release = f"transformers {transformers.__version__}"
    cls = getattr(transformers, name, None) if name else None
    if cls is None:
        return Numerics("", f"{release} has no model class {name!r}")
    try:
        sites = _sites(cls, held.config)
    except RMSNormPatchError as error:
        return Numerics("", f"{release}, {name}: {error}")
    except Exception as error:  # foreign code, which may fail in any way
        return Numerics("", f"{release} cannot build {name} ({type(error).__name__}: {error})")
    return judge(sites, f"{release}, {name}")


def _sites(cls: Any, config: Any) -> tuple[NormSite, ...]:
    config = copy.deepcopy(config)
    if not isinstance(config, cls.config_class):  # one that vLLM brought along
        config = cls.config_class.from_dict(config.to_dict())
    config._attn_implementation = "eager"  # others look for packages that this process may lack
    with undisturbed(), _default_dtype(torch.float32):
        with torch.device("meta"):
            model = cls(config)
        for module in model.modules():
            if type(module).__module__.partition(".")[0] == "vllm":
                raise RuntimeError(f"vLLM has put its {type(module).__name__} in the place of transformers' class")
        return scan_norms(model)


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """vLLM builds its models under another one, and probes are made in the default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def judge(sites: tuple[NormSite, ...], model: str) -> Numerics:
    """The provider whose numerics all RMSNorms of transformers' model have. model: for the reason."""
    known = [(site, site.spec) for site in sites if site.spec is not None and site.gating is None]
    found: dict[str, set[str]] = {}
    for site, spec in known:
        if spec.has_weight:
            provider, why = _provider_of(spec)
            if not provider:
                return Numerics("", f"{model}: {site.class_name} {why}")
            found.setdefault(provider, set()).add(site.class_name)
    if len(found) > 1:
        listed = " and ".join(", ".join(sorted(classes)) for classes in found.values())
        return Numerics("", f"{model}: its norm classes round in different places ({listed})")
    classes = sorted({site.class_name for site, _ in known})
    norms = tuple((path, _norm(site, spec)) for site, spec in known for path in (site.path, *site.shared_paths))
    return Numerics(next(iter(found), ROUNDED_ONCE), f"{model}: {', '.join(classes)}", norms)


def _provider_of(spec: NormSpec) -> tuple[str, str]:
    """(provider, "") or ("", why none has these numerics)."""
    if spec.group is not None:
        return "", f"norms groups of {spec.group} columns"
    if spec.weight_offset == "weight_dtype":
        return "", "adds 1 to the weight in the weight's dtype, where vLLM adds it in fp32"
    if spec.round_before_weight != "none" and spec.weight_offset == "none":
        return ROUNDED_BEFORE, ""  # rounding to the weight's dtype is the same: others are not served
    if spec.round_before_weight == "none" and spec.output == "input":
        return ROUNDED_ONCE, ""
    return "", f"computes {spec.round_before_weight=}, {spec.weight_offset=}, {spec.output=}"


def _norm(site: NormSite, spec: NormSpec) -> Counterpart:
    columns = site.hidden_size if spec.has_weight else None
    return Counterpart(site.class_name, columns, spec.resolve_eps(torch.bfloat16), spec.weight_offset != "none")
