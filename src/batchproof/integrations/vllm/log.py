"""What the plug-in says, in vLLM's log."""

from __future__ import annotations

import functools
import logging

__all__ = ["logger", "say_that_it_stays_vllms"]

logger = logging.getLogger("vllm.batchproof")  # a child of vLLM's logger, whose handlers show it


@functools.cache
def say_that_it_stays_vllms(what: str, reason: str) -> None:
    """Once for each reason: ``what`` is not batchproof's."""
    logger.warning("batchproof: some %s vLLM's: %s", what, reason)
