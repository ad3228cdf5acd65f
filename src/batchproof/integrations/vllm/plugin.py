"""The entry point of the plug-in, and what it reads of the environment."""

from __future__ import annotations

from ..._version import __version__
from ...errors import ModeError
from ...mode import read_flag, requested_by_environment
from .hooks import HOOKS
from .log import logger

__all__ = ["fuses_activation_quant", "fuses_norm_quant", "is_strict", "register"]

_done = False


def is_strict() -> bool:
    """Whether BATCHPROOF_STRICT forbids vLLM to start with a hook missing; default no."""
    return read_flag("BATCHPROOF_STRICT", default="0")


def fuses_norm_quant() -> bool:
    """Whether BATCHPROOF_FUSE_NORM_QUANT lets a norm and the quantisation behind it be one kernel; default yes."""
    return read_flag("BATCHPROOF_FUSE_NORM_QUANT", default="1")


def fuses_activation_quant() -> bool:
    """Whether BATCHPROOF_FUSE_ACTIVATION_QUANT makes SiLU and the quantisation behind it one kernel; default yes."""
    return read_flag("BATCHPROOF_FUSE_ACTIVATION_QUANT", default="1")


def register() -> None:
    """Put batchproof's kernels under vLLM if VLLM_BATCH_INVARIANT is 1; once a process, however often it is called.

    Raises:
        ModeError: an environment variable is neither 0 nor 1, or BATCHPROOF_STRICT is 1 and a hook is missing.
    """
    global _done
    if _done or not requested_by_environment():
        return
    # All switches are read here, those of passes too: a malformed one stops the start
    strict, fuse = is_strict(), fuses_norm_quant()
    fuses_activation_quant()
    wanted = [hook for hook in HOOKS if hook.is_wanted()]
    absent = {}
    for hook in wanted:
        reason = hook.missing()
        if reason is None:
            try:
                hook.install()
            except Exception as error:
                if strict:
                    raise
                reason = f"{type(error).__name__}: {error}"
        if reason is not None:
            absent[hook] = reason
    _done = True
    lines = [f"{hook.name}: {reason}; not batchproof's: {hook.serves}" for hook, reason in absent.items()]
    if lines and strict:
        raise ModeError("BATCHPROOF_STRICT is 1 and hooks into vLLM are missing: " + "; ".join(lines))
    for line in lines:
        logger.error("batchproof: HOOK MISSING, results may depend on the batch. %s", line)
    served = [hook.serves for hook in wanted if hook not in absent]
    if served:
        fused = "" if fuse else " (norm and quantisation kept apart)"
        logger.info("batchproof %s serves %s%s", __version__, "; ".join(served), fused)
