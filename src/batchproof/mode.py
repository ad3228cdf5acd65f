"""The switch: while it is on, aten's matrix products, softmaxes, layer norms and means are batchproof's, in any code.

``enable()`` and ``disable()`` set it for the process; ``with batch_invariant():`` holds it on for a block and may be
nested and entered from several threads. It is a switch of the process, as torch's dispatcher is: while one thread is
inside, the ops are batch-invariant for every thread, and what was there before is restored when the last has left.

While it is on, ``F.scaled_dot_product_attention`` takes its decomposition into matrix products and softmax, and
torch.compile'd functions run eagerly, because Inductor would generate reductions of its own.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from .errors import DtypeError, ModeError, UnsupportedError

__all__ = [
    "ENVIRONMENT_VARIABLE",
    "batch_invariant",
    "disable",
    "enable",
    "enable_if_requested",
    "is_enabled",
    "read_flag",
    "requested_by_environment",
]

ENVIRONMENT_VARIABLE = "VLLM_BATCH_INVARIANT"
_ROUTED = (torch.float32, torch.float16, torch.bfloat16)
_KEYS = ("CPU", "CUDA")

_lock = threading.RLock()
_holders = 0  # blocks that are open
_switched_on = False  # what enable() and disable() set
_installed: ExitStack | None = None


def requested_by_environment() -> bool:
    """Whether VLLM_BATCH_INVARIANT asks for batch invariance: "1" yes, "0" or unset no, anything else a ModeError."""
    return read_flag(ENVIRONMENT_VARIABLE, default="0")


def read_flag(variable: str, default: str) -> bool:
    """Whether an environment variable, ``default`` where it is unset, is "1"; ModeError if it is neither 0 nor 1."""
    value = os.environ.get(variable, default)
    if value not in ("0", "1"):
        raise ModeError(f"{variable} is {value!r}, want 0 or 1")
    return value == "1"


def is_enabled() -> bool:
    """Whether aten's ops are batchproof's at this moment."""
    return _installed is not None


def enable() -> None:
    """Turn the switch on for the process. Calling it twice is calling it once."""
    global _switched_on
    with _lock:
        _switched_on = True
        _settle()


def enable_if_requested() -> bool:
    """``enable()`` if VLLM_BATCH_INVARIANT is 1; returns whether it is. ModeError if it is neither 0 nor 1."""
    requested = requested_by_environment()
    if requested:
        enable()
    return requested


def disable() -> None:
    """Undo ``enable``. Open ``batch_invariant`` blocks keep the switch on until they are left."""
    global _switched_on
    with _lock:
        _switched_on = False
        _settle()


@contextmanager
def batch_invariant() -> Iterator[None]:
    """Hold the switch on for a block; re-entrant, and restored exactly, also after an exception."""
    _hold(+1)
    try:
        yield
    finally:
        _hold(-1)


def _hold(change: int) -> None:
    global _holders
    with _lock:
        _holders += change
        try:
            _settle()
        except BaseException:
            _holders -= change
            raise


def _settle() -> None:
    """Install or restore, so that the dispatcher is as the switch says."""
    global _installed
    wanted = _switched_on or _holders > 0
    if wanted and _installed is None:
        with ExitStack() as stack:
            _install(stack)
            _installed = stack.pop_all()
    elif not wanted and _installed is not None:
        stack, _installed = _installed, None
        stack.close()


def _install(stack: ExitStack) -> None:
    """Route every aten overload that a spec names; push what undoes it on ``stack``."""
    from .registry import all_specs

    routes = {name: function for spec in all_specs().values() for name, function in spec.aten.items()}
    library = torch.library.Library("aten", "IMPL")
    stack.callback(library._destroy)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*[Oo]verrid", category=UserWarning)  # it is meant
        for name, function in routes.items():
            for key in _KEYS:
                _route(library, name, function, key)
        library.impl(torch.ops.aten.linear.default, _linear, "CompositeImplicitAutograd")
    _decompose_attention(stack)
    stance = torch.compiler.set_stance("force_eager")
    stack.callback(stance.__exit__, None, None, None)


def _route(library: torch.library.Library, name: str, function: Callable[..., Any], key: str) -> None:
    """Override one overload on one backend, with its out= and its in-place form if they take the same arguments."""
    packet, _, overload_name = name.partition(".")
    overloads = getattr(torch.ops.aten, packet)
    base = getattr(overloads, overload_name or "default")
    _override(library, base, function, key, lambda result, args, out: result)
    if "out" in overloads.overloads() and _arguments(overloads.out) == _arguments(base):
        _override(
            library, overloads.out, function, key, lambda result, args, out: out.resize_(result.shape).copy_(result)
        )
    in_place = getattr(torch.ops.aten, f"{packet}_", None)
    if in_place is not None and _arguments(in_place.default) == _arguments(base):
        _override(library, in_place.default, function, key, lambda result, args, out: args[0].copy_(result))


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``aten::linear`` by one route: torch's own adds the bias before or after rounding as x is contiguous or not."""
    rows = x.reshape(-1, x.shape[-1])
    out = rows @ weight.t() if bias is None else torch.addmm(bias, rows, weight.t())
    return out.view(*x.shape[:-1], weight.shape[0])


def _arguments(overload: Any) -> list[str]:
    return [argument.name for argument in overload._schema.arguments if argument.name != "out"]


def _override(
    library: torch.library.Library,
    overload: Any,
    function: Callable[..., Any],
    key: str,
    deliver: Callable[[Any, tuple[Any, ...], Any], Any],
) -> None:
    """Send one overload to ``function`` and what it returns to ``deliver``, which makes the overload's result of it."""
    original = _kernel(overload, key)

    def routed(keyset: Any, *args: Any, **kwargs: Any) -> Any:
        dtypes = {a.dtype for a in args if isinstance(a, torch.Tensor)}
        if original is not None and _exact_arithmetic(dtypes):
            return original.call_boxed(keyset, *args, **kwargs)
        if not dtypes <= set(_ROUTED):
            raise UnsupportedError(
                f"{overload} of {', '.join(sorted(map(str, dtypes)))} has no batch-invariant form; "
                f"want one of {', '.join(map(str, _ROUTED))}, or leave batch-invariant mode for this call"
            )
        out = kwargs.pop("out", None)
        with torch.no_grad():  # autograd, if it is wanted, has been recorded above this kernel
            result = function(*args, **kwargs)
        if out is not None and (out.dtype, out.device) != (result.dtype, result.device):
            raise DtypeError(f"{overload}: out is {out.dtype} on {out.device}, want {result.dtype} on {result.device}")
        return deliver(result, args, out)

    library.impl(overload, routed, key, with_keyset=True)


def _kernel(overload: Any, key: str) -> Any:
    """What the dispatcher would run now, to be called for what is exact anyway; None if this build has nothing."""
    try:
        return torch.library.get_kernel(overload, key)
    except RuntimeError:
        return None


def _exact_arithmetic(dtypes: set[torch.dtype]) -> bool:
    """Integer sums have no rounding, so no order; neither have the float64 sums that ``_exact`` makes exact."""
    from .ops import _exact

    integers = all(not d.is_floating_point and not d.is_complex for d in dtypes)
    return integers or _exact.is_computing()


def _decompose_attention(stack: ExitStack) -> None:
    """Leave scaled_dot_product_attention only its decomposition, and undo that with ``stack``."""
    flags = torch.backends.cuda
    for setting, enabled in (
        (flags.enable_flash_sdp, flags.flash_sdp_enabled()),
        (flags.enable_mem_efficient_sdp, flags.mem_efficient_sdp_enabled()),
        (flags.enable_cudnn_sdp, flags.cudnn_sdp_enabled()),
    ):
        stack.callback(setting, enabled)
        setting(False)
    stack.callback(flags.enable_math_sdp, flags.math_sdp_enabled())
    flags.enable_math_sdp(True)
