"""The keys under which Inductor keeps what it compiled for an engine, as far as our passes are in them."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rmsnorm_patch.ops import sources
from rmsnorm_patch.vllm_plugin import (
    block_products,
    calls,
    linear_pass,
    norm_add_pass,
    quantised_pass,
    silu_pass,
)

PASSES = (block_products.PASS, quantised_pass.PASS, silu_pass.PASS, norm_add_pass.PASS, linear_pass)


@pytest.mark.parametrize("one", PASSES, ids=lambda one: getattr(one, "name", "linear"))
def test_the_key_of_every_pass_of_the_plugin_has_the_digest(one: object, monkeypatch: pytest.MonkeyPatch) -> None:
    uuid = one.wrap_uuid(lambda manager: "manager")  # type: ignore[attr-defined]
    before = uuid(SimpleNamespace())
    assert sources.digest() in before
    monkeypatch.setattr(calls, "VERSION", "of another source")
    assert uuid(SimpleNamespace()) != before
