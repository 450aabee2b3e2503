"""The keys under which Inductor keeps what it compiled for an engine, as far as our passes are in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rmsnorm_patch.ops import sources
from rmsnorm_patch.vllm_plugin import calls
from rmsnorm_patch.vllm_plugin.passes import block_products, linear_norm, norm_add, norm_quantised, silu_quantised

PASSES = (
    block_products.NEEDED,
    block_products.PASS,
    norm_quantised.PASS,
    silu_quantised.PASS,
    norm_add.PASS,
    linear_norm,
)


@pytest.mark.parametrize("one", PASSES, ids=lambda one: getattr(one, "name", "linear"))
def test_the_key_of_every_pass_of_the_plugin_has_the_digest(one: object, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = one.wrap_uuid(lambda manager: "manager")  # type: ignore[attr-defined]
    before = uuid(SimpleNamespace())
    assert sources.digest() in before
    monkeypatch.setattr(calls, "VERSION", "of another source")
    assert uuid(SimpleNamespace()) != before
