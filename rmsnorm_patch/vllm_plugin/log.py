"""What an engine's operator reads of us."""

from __future__ import annotations

import logging
from functools import cache

logger = logging.getLogger("vllm.rmsnorm_patch")
"""Below vLLM's logger, so that its handlers and its level apply in every worker."""


@cache
def warn_once(message: str) -> None:
    logger.warning("rmsnorm_patch: %s", message)
