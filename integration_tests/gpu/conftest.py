"""Markers of the GPU tests."""

from __future__ import annotations

import pytest


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "case(*numbers): the bad-input cases that a test covers")
    config.addinivalue_line("markers", "sanitized: small and direct, so that compute-sanitizer can watch it")
