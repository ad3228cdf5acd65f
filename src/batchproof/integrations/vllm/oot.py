"""vLLM's registry of out-of-tree layers, and what else every hook asks of an interface.

As in ``hooks``, everything of vLLM is imported inside the functions.
"""

from __future__ import annotations

from typing import Any

__all__ = ["lacks", "register", "taken_by_another"]


def lacks(owner: Any, *names: str) -> str | None:
    """Which of the names there are none of, in a few words; None if there are all."""
    absent = [name for name in names if not hasattr(owner, name)]
    return f"{getattr(owner, '__name__', owner)} has no {', '.join(absent)}" if absent else None


def taken_by_another(name: str) -> str | None:
    """Which other plug-in's layer stands for vLLM's of this name, in a few words; None if none does."""
    from vllm.model_executor.custom_op import op_registry_oot

    taken = op_registry_oot.get(name)
    if taken is None or taken.__module__.startswith("batchproof."):
        return None
    return f"another plug-in has registered {taken.__module__}.{taken.__qualname__} for {name}"


def register(base: Any, ours: Any) -> None:
    """Have vLLM make ``ours`` where a model asks for ``base``; once."""
    from vllm.model_executor.custom_op import op_registry_oot

    name = base.__name__
    if name in op_registry_oot:
        return
    base.register_oot(name=name)(ours)
    ours.name = base.name  # by which the custom_ops switches +name and -name know it
