"""What the plug-in takes over of vLLM, hook by hook: the interface each needs, and how it is put in place.

Everything of vLLM is imported inside the functions, so that this module can be read where vLLM is not installed.
"""

from __future__ import annotations

import functools
import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from ..._version import __version__
from ...mode import read_flag
from . import attention_hooks
from .oot import lacks, register, taken_by_another

__all__ = ["HOOKS", "PROVIDER", "Hook"]

PROVIDER = "batchproof"  # of vLLM's IR ops, and our key in VllmConfig.additional_config


@dataclass(frozen=True)
class Hook:
    """One extension point: what it serves, what it needs of vLLM, and how it is installed.

    ``switch`` is the environment variable that has to be 1 for it, if there is one; ``default`` is what it counts as
    where it is not set.
    """

    name: str
    serves: str
    probe: Callable[[], str | None]
    install: Callable[[], None]
    switch: str | None = None
    default: Callable[[], str] = lambda: "0"

    def is_wanted(self) -> bool:
        """Whether it is to be installed; ModeError if its switch is neither 0 nor 1."""
        return self.switch is None or read_flag(self.switch, default=self.default())

    def missing(self) -> str | None:
        """None if the interface is there, else what is missing, in one line."""
        try:
            return _wrong_platform() or self.probe()
        except Exception as error:  # whatever a probe trips over is what is missing
            return f"{type(error).__name__}: {error}"


def _wrong_platform() -> str | None:
    from vllm.platforms import current_platform

    return None if current_platform.is_cuda() else f"vLLM runs on {current_platform.device_name}, want CUDA"


def _on_hopper() -> str:
    """1 where products have kernels of their own, which are faster than vLLM's; elsewhere they are slower."""
    try:
        from vllm.platforms import current_platform

        return "1" if current_platform.is_cuda() and current_platform.is_device_capability(90) else "0"
    except ImportError:
        return "0"


def _probe_layer(name: str, *parameters: str) -> str | None:
    from vllm.model_executor.layers import layernorm

    layer = getattr(layernorm, name)
    signature = list(inspect.signature(layer.forward_cuda).parameters)
    if signature != ["self", "x", "residual"]:
        return f"{name}.forward_cuda takes {signature}, want ['self', 'x', 'residual']"
    absent = [wanted for wanted in parameters if wanted not in inspect.getsource(layer.__init__)]
    sets_none = f"{name} sets no {', '.join(absent)}" if absent else None
    return taken_by_another(name) or lacks(layer, "register_oot") or sets_none


def _install_layer(name: str) -> None:
    from vllm.model_executor.layers import layernorm

    from ...ops._row_launch import use_dependent_launch
    from . import layers

    use_dependent_launch(False)  # as long as the kernels around a norm are vLLM's, which let nothing in early
    register(getattr(layernorm, name), getattr(layers, f"Invariant{name}"))


def _probe_ir_ops() -> str | None:
    from vllm import ir
    from vllm.config.kernel import IrOpPriorityConfig
    from vllm.platforms import current_platform

    from . import ir_ops

    for name in ir_ops.PROVIDERS:
        wanted = list(inspect.signature(getattr(ir_ops, name)).parameters)
        op = getattr(ir.ops, name)
        found = list(inspect.signature(op.impls["native"].impl_fn).parameters)
        if found != wanted:
            return f"vllm.ir.ops.{name} takes {found}, want {wanted}"
        if name not in IrOpPriorityConfig.__dataclass_fields__:
            return f"IrOpPriorityConfig has no {name}"
    return lacks(type(current_platform), "get_default_ir_op_priority")


def _install_ir_ops() -> None:
    from vllm import ir
    from vllm.platforms import current_platform

    from . import ir_ops

    for name in ir_ops.PROVIDERS:
        op = getattr(ir.ops, name)
        if PROVIDER not in op.impls:
            op.register_impl(PROVIDER)(getattr(ir_ops, name))
    _wrap_classmethod(type(current_platform), "get_default_ir_op_priority", _prefer_ours)


def _prefer_ours(original: Callable[..., Any], cls: Any, vllm_config: Any) -> Any:
    """The platform's order of IR op providers with ours first, and our mark on the key of vLLM's compile cache."""
    from . import ir_ops

    priority = original(vllm_config)
    for name in ir_ops.PROVIDERS:
        setattr(priority, name, [PROVIDER, *(p for p in getattr(priority, name) if p != PROVIDER)])
        chosen = getattr(vllm_config.kernel_config.ir_op_priority, name)
        if chosen and chosen[0] != PROVIDER:
            raise ValueError(
                f"--ir-op-priority.{name} is {chosen}, want none or {PROVIDER!r} first while VLLM_BATCH_INVARIANT is 1"
            )
    if isinstance(vllm_config.additional_config, dict):
        vllm_config.additional_config[PROVIDER] = _compile_key()
    return priority


def _compile_key() -> dict[str, Any]:
    """What compiled graphs depend on beyond the files that vLLM hashes itself."""
    from .plugin import fuses_activation_quant, fuses_norm_quant

    sources = sorted(Path(__file__).parent.glob("*.py"))
    digest = hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()
    return {
        "version": __version__,
        "source": digest[:16],
        "fuse_norm_quant": fuses_norm_quant(),
        "fuse_activation_quant": fuses_activation_quant(),
        "hooks": [hook.name for hook in HOOKS if hook.switch and hook.is_wanted()],
    }


def _probe_softmax() -> str | None:
    from vllm.model_executor.layers import batch_invariant

    ours = getattr(batch_invariant.softmax_batch_invariant, "__module__", "").startswith("batchproof.")
    found = list(inspect.signature(batch_invariant.softmax_batch_invariant).parameters)
    if found != ["input", "dim", "dtype"]:
        return f"softmax_batch_invariant takes {found}, want ['input', 'dim', 'dtype']"
    if getattr(batch_invariant, "_batch_invariant_MODE", False) and not ours:
        return "vLLM has registered its own already"
    return None


def _install_softmax() -> None:
    from vllm.model_executor.layers import batch_invariant

    from .aten import softmax

    batch_invariant.softmax_batch_invariant = softmax  # which the mode registers when it is turned on


_CALLERS = ("batch_invariant", "linear", "vocab_parallel_embedding")  # of linear_batch_invariant, by their own names


def _probe_linear() -> str | None:
    for caller in _CALLERS:
        module = import_module(f"vllm.model_executor.layers.{caller}")
        function = getattr(module, "linear_batch_invariant", None)
        if function is None:
            return f"{module.__name__} has no linear_batch_invariant"
        found = list(inspect.signature(function).parameters)
        if found != ["input", "weight", "bias"]:
            return f"linear_batch_invariant takes {found}, want ['input', 'weight', 'bias']"
    return None


def _install_linear() -> None:
    from .aten import linear

    for caller in _CALLERS:
        module: Any = import_module(f"vllm.model_executor.layers.{caller}")
        module.linear_batch_invariant = linear
    _let_in_early()


def _let_in_early() -> None:
    """Kernels let one another in at once: an engine's weights stay as they are."""
    from ...ops._hopper import use_static_weights
    from ...ops._row_launch import use_dependent_launch

    use_dependent_launch(True, at_once=True)
    use_static_weights(True)


def _put_first(kernels: list[Any], ours: Any) -> None:
    """Into a list of vLLM's, of which the first kernel that takes a layer is chosen; once."""
    if ours not in kernels:
        kernels.insert(0, ours)
    _let_in_early()


def _probe_fp8_linear() -> str | None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFP8ScaledMMLinearKernel
    from vllm.platforms.interface import PlatformEnum

    wanted = ["self", "A", "B", "out_dtype", "As", "Bs", "bias", "output_shape"]
    found = list(inspect.signature(CutlassFP8ScaledMMLinearKernel.apply_scaled_mm).parameters)
    if found != wanted:
        return f"apply_scaled_mm takes {found}, want {wanted}"
    kernels = getattr(linear, "_POSSIBLE_FP8_KERNELS", {})
    return None if kernels.get(PlatformEnum.CUDA) else "there is no list of fp8 linear kernels for CUDA"


def _install_fp8_linear() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    from .linear import InvariantFP8ScaledMMLinearKernel

    _put_first(linear._POSSIBLE_FP8_KERNELS[PlatformEnum.CUDA], InvariantFP8ScaledMMLinearKernel)


def _probe_fp8_block_linear() -> str | None:
    from vllm.model_executor.kernels import linear
    from vllm.model_executor.kernels.linear.scaled_mm.BlockScaledMMLinearKernel import FP8BlockParams
    from vllm.model_executor.kernels.linear.scaled_mm.cutlass import CutlassFp8BlockScaledMMKernel as Base
    from vllm.model_executor.layers.quantization.input_quant_fp8 import QuantFP8
    from vllm.platforms.interface import PlatformEnum

    from .block_linear import InvariantFp8BlockScaledMMKernel as Ours

    for name in ("is_supported", "can_implement", "process_weights_after_loading", "apply_weights"):
        found, wanted = (list(inspect.signature(getattr(kernel, name)).parameters) for kernel in (Base, Ours))
        if found != wanted:
            return f"{Base.__name__}.{name} takes {found}, want {wanted}"
    found = list(inspect.signature(QuantFP8.forward_cuda).parameters)[:2]
    if found != ["self", "x"]:
        return f"QuantFP8.forward_cuda takes {found} first, want ['self', 'x']"
    absent = {"weight", "weight_scale", "weight_scale_inv"} - FP8BlockParams.__dataclass_fields__.keys()
    if absent:
        return f"FP8BlockParams has no {', '.join(sorted(absent))}"
    kernels = getattr(linear, "_POSSIBLE_FP8_BLOCK_KERNELS", {})
    if not kernels.get(PlatformEnum.CUDA):
        return "there is no list of fp8 linear kernels with scales for blocks for CUDA"
    return lacks(Base, "_get_layer_params", "apply_block_scaled_mm")


def _install_fp8_block_linear() -> None:
    from vllm.model_executor.kernels import linear
    from vllm.platforms.interface import PlatformEnum

    from .block_linear import InvariantFp8BlockScaledMMKernel

    _put_first(linear._POSSIBLE_FP8_BLOCK_KERNELS[PlatformEnum.CUDA], InvariantFp8BlockScaledMMKernel)


def _probe_graph_passes() -> str | None:
    from vllm.compilation.passes.fusion.matcher_utils import MatcherQuantFP8
    from vllm.compilation.passes.pass_manager import PostGradPassManager
    from vllm.platforms import current_platform

    default = "vllm.compilation.passes.pass_manager.PostGradPassManager"
    seen = current_platform.get_pass_manager_cls()
    if seen not in (default, _PASS_MANAGER):
        return f"the platform's pass manager is {seen}, want {default}"
    found = inspect.signature(MatcherQuantFP8.__init__).parameters
    if "quant_key" not in found:
        return f"MatcherQuantFP8 takes {list(found)}, want a quant_key"
    if "self.passes" not in inspect.getsource(PostGradPassManager):
        return "PostGradPassManager has no passes"
    return lacks(PostGradPassManager, "configure")


_PASS_MANAGER = f"{__package__}.passes.InvariantPassManager"


def _install_graph_passes() -> None:
    from vllm.platforms import current_platform

    from . import passes  # noqa: F401 - fails here, and not in the middle of a compilation

    _wrap_classmethod(type(current_platform), "get_pass_manager_cls", lambda original, cls: _PASS_MANAGER)


def _probe_sampler() -> str | None:
    from .sampler import probe_sampler

    return probe_sampler()


def _install_sampler() -> None:
    from .sampler import install_sampler

    install_sampler()


def _wrap_classmethod(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replace a class method by ``wrapper(original, cls, *args)``; once."""
    original = getattr(owner, name)
    if getattr(original, "_batchproof", False):
        return

    @functools.wraps(original.__func__)
    def wrapped(cls: Any, *args: Any) -> Any:
        return wrapper(original, cls, *args)

    wrapped._batchproof = True  # type: ignore[attr-defined]
    setattr(owner, name, classmethod(wrapped))


HOOKS = (
    Hook(
        "rms_norm",
        "RMSNorm layers, with a residual or without",
        lambda: _probe_layer("RMSNorm", "variance_epsilon", "variance_size_override", "has_weight"),
        lambda: _install_layer("RMSNorm"),
    ),
    Hook(
        "gemma_rms_norm",
        "GemmaRMSNorm layers",
        lambda: _probe_layer("GemmaRMSNorm", "variance_epsilon"),
        lambda: _install_layer("GemmaRMSNorm"),
    ),
    Hook("ir_ops", "vllm.ir's rms_norm and fused_add_rms_norm, whoever calls them", _probe_ir_ops, _install_ir_ops),
    Hook(
        "graph_passes",
        "norms fused with fp8 quantisation in compiled graphs, without vLLM's fusions whose kernels vary",
        _probe_graph_passes,
        _install_graph_passes,
    ),
    Hook("softmax", "softmax over aten, as samplers call it", _probe_softmax, _install_softmax),
    Hook(
        "linear",
        "unquantised linear layers and the language model's head",
        _probe_linear,
        _install_linear,
        switch="BATCHPROOF_LINEAR",
        default=_on_hopper,
    ),
    Hook(
        "fp8_linear",
        "fp8 linear layers with scales for the tensor, for tokens and for channels",
        _probe_fp8_linear,
        _install_fp8_linear,
        switch="BATCHPROOF_LINEAR",
        default=_on_hopper,
    ),
    Hook(
        "fp8_block_linear",
        "fp8 linear layers with scales for blocks of 128 by 128",
        _probe_fp8_block_linear,
        _install_fp8_block_linear,
        switch="BATCHPROOF_LINEAR",  # by request alone, until it has been timed against DeepGEMM
    ),
    Hook(
        "attention",
        "attention of the Triton backend",
        attention_hooks.probe_attention,
        attention_hooks.install_attention,
        switch="BATCHPROOF_ATTENTION",
        default=_on_hopper,
    ),
    Hook(
        "rope",
        "rotary embeddings, with the write of the Triton backend's cache",
        attention_hooks.probe_rope,
        attention_hooks.install_rope,
        switch="BATCHPROOF_ATTENTION",
        default=_on_hopper,
    ),
    Hook(
        "sampler",
        "sampling in the model runner V2, by (seed, position), with top-k, top-p and min-p",
        _probe_sampler,
        _install_sampler,
        switch="BATCHPROOF_SAMPLER",
        default=lambda: "1",
    ),
)
