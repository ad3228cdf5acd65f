"""batchproof in vLLM: a plug-in that ``pip install`` puts beside it, and that ``VLLM_BATCH_INVARIANT=1`` switches on.

vLLM runs ``register`` in each of its processes (entry point group ``vllm.general_plugins``). Without the variable it
touches nothing. With it, vLLM's own batch-invariant mode stays as it is, guards included, and what the ``HOOKS`` name
is served by batchproof's kernels. A hook looks for the interface it needs, not for a version; one whose interface is
not there is an error in the log, and under ``BATCHPROOF_STRICT=1`` vLLM does not start.
"""

from .hooks import HOOKS, Hook
from .plugin import register

__all__ = ["HOOKS", "Hook", "register"]
