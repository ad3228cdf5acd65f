"""vLLM's passes over compiled graphs, with ours for norm and quantisation, and without those that would vary.

A norm and the fp8 quantisation behind it become one op with the bits of the two, so the fusion needs no leave: it is
made whatever ``pass_config.fuse_norm_quant`` says, unless ``BATCHPROOF_FUSE_NORM_QUANT`` is 0. vLLM's own fusions of
norms put kernels in the graph that choose their threads by the number of tokens; they are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import torch
import torch._inductor.pattern_matcher as pm
from torch import Tensor, fx
from vllm.compilation.passes.fusion.matcher_utils import MatcherQuantFP8, MatcherSiluAndMul
from vllm.compilation.passes.inductor_pass import enable_fake_mode
from vllm.compilation.passes.pass_manager import PostGradPassManager
from vllm.compilation.passes.utility.noop_elimination import NoOpEliminationPass
from vllm.compilation.passes.vllm_inductor_pass import VllmInductorPass, VllmPatternMatcherPass
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.utils.quant_utils import kFp8DynamicTokenSym, kFp8StaticTensorSym

from ...ops import activation_quant as _activation_quant  # noqa: F401 - defines the op
from ...ops import rms_norm_quant as _rms_norm_quant  # noqa: F401 - defines the ops
from ...ops import scaled_mm_gated as _scaled_mm_gated  # noqa: F401 - defines the op
from .log import logger
from .plugin import fuses_activation_quant, fuses_norm_quant

__all__ = ["ActivationQuantFusionPass", "InvariantPassManager", "NormQuantFusionPass"]

_ops = torch.ops.batchproof
_FP8 = torch.float8_e4m3fn
_VARYING = (
    "RMSNormQuantFusionPass",  # static and per-block kernels: threads by the number of tokens
    "AllReduceFusionPass",  # the sum over ranks by message size, and a norm of its own
    "QKNormRoPEFusionPass",  # heads a warp by the number of tokens
)

Form = tuple[float, bool]  # eps, gemma
Quantize = Callable[..., tuple[Tensor, Tensor]]


class InvariantPassManager(PostGradPassManager):
    """vLLM's pass manager, whose list of passes is changed once it is made."""

    def configure(self, config: VllmConfig) -> None:
        """Make the list for ``config``."""
        super().configure(config)
        left_out = sorted({type(p).__name__ for p in self.passes} & set(_VARYING))
        if left_out:
            logger.info("batchproof leaves out %s, whose kernels vary with the batch", ", ".join(left_out))
        self.passes = [p for p in self.passes if type(p).__name__ not in _VARYING]
        wanted = ((fuses_activation_quant(), ActivationQuantFusionPass), (fuses_norm_quant(), NormQuantFusionPass))
        with set_current_vllm_config(config, check_compile=False):
            first = [isinstance(p, NoOpEliminationPass) for p in self.passes]
            place = first.index(True) + 1 if True in first else 0
            self.passes[place:place] = [fusion(config) for is_wanted, fusion in wanted if is_wanted]


class _FusionPass(VllmPatternMatcherPass):
    """Replace what patterns match; ``what`` is fused with its quantisation, for people."""

    what: str

    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        self.patterns = pm.PatternMatcherPass(pass_name=f"batchproof_{self.what}_quant")

    def learn(self, graph: fx.Graph) -> None:
        """Add the patterns that a graph may need."""

    def follow(self, graph: fx.Graph) -> None:
        """Replace what the new nodes are fused with in their turn."""

    @VllmInductorPass.time_and_log
    def __call__(self, graph: fx.Graph) -> None:
        """Fuse in place."""
        self.learn(graph)
        self.matched_count = self.patterns.apply(graph)
        self.follow(graph)
        self.match_table[self.pass_name] += self.matched_count
        logger.debug("batchproof fused %d %ss with their quantisation", self.matched_count, self.what)

    def uuid(self) -> str:
        """Of the compile cache; what else graphs depend on is in ``hooks._compile_key``."""
        return str(self.hash_source(_FusionPass, self, *_PAIRS))


class NormQuantFusionPass(_FusionPass):
    """Replace ``rms_norm`` or ``add_rms_norm`` and the fp8 quantisation of its output by the op that does both.

    The quantisation is recognised by vLLM's own matcher, where it is compiled. As a custom op, with ``+quant_fp8``, it
    is called with arguments that the matcher does not write, and stays a kernel of its own. Patterns hold literals,
    so they are made when a graph has a norm of a new epsilon.
    """

    what = "norm"

    @enable_fake_mode
    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        self._static = MatcherQuantFP8(kFp8StaticTensorSym)
        self._per_token = MatcherQuantFP8(kFp8DynamicTokenSym)
        self._known: set[Form] = set()

    def learn(self, graph: fx.Graph) -> None:
        """Those of norms of forms that were not seen before."""
        for form in sorted(set(_forms(graph)) - self._known):
            self._known.add(form)
            self._register(form)

    @enable_fake_mode
    def _register(self, form: Form) -> None:
        for make, quantize in product(_PAIRS, (self._static, self._per_token)):
            pattern, replacement, inputs = make(quantize, quantize is self._static, *form)
            pm.register_replacement(pattern, replacement, inputs, pm.fwd_only, self.patterns)


class ActivationQuantFusionPass(_FusionPass):
    """Replace SiLU-and-multiply and the static fp8 quantisation of its output by the op that does both.

    The activation is then batchproof's, whose exponential may differ from the compiler's by an ulp. With batchproof's
    fp8 product before it, it becomes one op with that.
    """

    what = "activation"

    @enable_fake_mode
    def __init__(self, config: VllmConfig) -> None:
        super().__init__(config)
        activate, quantize = MatcherSiluAndMul(), MatcherQuantFP8(kFp8StaticTensorSym)

        def pattern(x: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = quantize(activate(x), scale)[0]
            return out

        pm.register_replacement(
            pattern, _ops.silu_and_mul_static_fp8_quant.default, [_example(5, 16), _scale()], pm.fwd_only, self.patterns
        )
        self.of_products = pm.PatternMatcherPass(pass_name="batchproof_product_activation_quant")
        for dtype in (torch.bfloat16, torch.float16):
            self._register_product(dtype)

    def follow(self, graph: fx.Graph) -> None:
        """One op of a product and its activation."""
        logger.debug("batchproof fused %d products with their activation", self.of_products.apply(graph))

    def _register_product(self, dtype: torch.dtype) -> None:
        def pattern(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor) -> Tensor:
            product = _ops.scaled_mm.default(a, b, scale_a, scale_b, None, dtype)
            out: Tensor = _ops.silu_and_mul_static_fp8_quant.default(product, scale)
            return out

        def replacement(a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, scale: Tensor) -> Tensor:
            out: Tensor = _ops.scaled_mm_silu_and_mul_static_fp8_quant.default(a, b, scale_a, scale_b, scale, dtype)
            return out

        inputs = [_example(5, 32).to(_FP8), _example(16, 32).to(_FP8).t(), _scale(), _scale(), _scale()]
        pm.register_replacement(pattern, replacement, inputs, pm.fwd_only, self.of_products)


def _forms(graph: fx.Graph) -> Iterator[Form]:
    """(eps, gemma) of every norm."""
    for node in graph.nodes:
        if node.target in (_ops.rms_norm.default, _ops.add_rms_norm.default):
            yield node.args[-2], node.args[-1]


def _plain(quantize: Quantize, static: bool, eps: float, gemma: bool) -> tuple[Any, Any, list[Tensor]]:
    """Without a residual."""
    if static:

        def pattern(x: Tensor, weight: Tensor, scale: Tensor) -> Any:
            return quantize(_ops.rms_norm.default(x, weight, eps, gemma), scale)[0]

        def replacement(x: Tensor, weight: Tensor, scale: Tensor) -> Any:
            return _ops.rms_norm_static_fp8_quant.default(x, weight, scale, eps, gemma)

        return pattern, replacement, [_example(5, 16), _example(16), _scale()]

    def pattern_per_token(x: Tensor, weight: Tensor) -> Any:
        return quantize(_ops.rms_norm.default(x, weight, eps, gemma))

    def replacement_per_token(x: Tensor, weight: Tensor) -> Any:
        return _ops.rms_norm_dynamic_per_token_quant.default(x, weight, eps, gemma, _FP8, None)

    return pattern_per_token, replacement_per_token, [_example(5, 16), _example(16)]


def _with_residual(quantize: Quantize, static: bool, eps: float, gemma: bool) -> tuple[Any, Any, list[Tensor]]:
    """With one; the sum is an output too."""
    if static:

        def pattern(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> Any:
            y, total = _ops.add_rms_norm.default(x, residual, weight, eps, gemma)
            return quantize(y, scale)[0], total

        def replacement(x: Tensor, residual: Tensor, weight: Tensor, scale: Tensor) -> Any:
            return _ops.add_rms_norm_static_fp8_quant.default(x, residual, weight, scale, eps, gemma)

        return pattern, replacement, [_example(5, 16), _example(5, 16), _example(16), _scale()]

    def pattern_per_token(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        y, total = _ops.add_rms_norm.default(x, residual, weight, eps, gemma)
        return *quantize(y), total

    def replacement_per_token(x: Tensor, residual: Tensor, weight: Tensor) -> Any:
        return _ops.add_rms_norm_dynamic_per_token_quant.default(x, residual, weight, eps, gemma, _FP8, None)

    return pattern_per_token, replacement_per_token, [_example(5, 16), _example(5, 16), _example(16)]


_PAIRS = (_with_residual, _plain)


def _example(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="cuda")


def _scale() -> Tensor:
    return torch.empty(1, 1, dtype=torch.float32, device="cuda")
