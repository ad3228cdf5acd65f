"""Gradients of the RMSNorm family, batch-invariant by construction: for training with the norms one samples with.

    xhat        = x / sqrt(mean(x**2) + eps)
    g           = grad_out * weight                 Llama; * (1 + weight) Gemma; * 1 unweighted
    grad_x      = (g - xhat * mean(g * xhat)) / sqrt(mean(x**2) + eps) + grad_residual_out
    grad_weight = sum over rows of grad_out * xhat

Roundings of the forward pass count as identities, as they do for autograd; what they rounded is what they pass on, so
Llama's grad_weight takes xhat rounded to the dtype, which is what its weight was multiplied with, and Gemma's takes it
unrounded. x is what was normalised: for the forms with a residual, the rounded sum, and grad_x is then the gradient
of both addends. Everything else is computed in fp32 (fp32 input: in fp64), statistics of rows included, which are not
kept from the forward pass, and each gradient is rounded once.

Invariance: the tree that sums a row is fixed by (hidden_size, dtype, form), as in ``rms_norm``, so a row of grad_x
depends on that row alone. grad_weight sums over the batch and so depends on all of it, but by a tree that is a
function of the row number alone, not of the number of rows, the grid or the GPU: rows are cut at multiples of CHUNK;
in a chunk, row r is added to lane r % LANES, in ascending order, and lanes are folded in halves; chunk c is added to
lane c % COMBINE_LANES, in ascending order, and those lanes are folded in halves. Each of these additions is
elementwise and written out, so no layout that Triton chooses can reorder it, and finite rows without a gradient add
zeros: padding a batch with them changes no bit. On the CPU sums are exact (see ``_exact``), those of 1024 rows at
multiples of 1024; such sums are added in ascending order.

Source: Zhang and Sennrich, 2019, differentiated; the roundings of Hugging Face's LlamaRMSNorm and GemmaRMSNorm.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import ArgumentError, UnsupportedError
from ..registry import OpSpec, register_spec
from . import _exact
from ._autograd import differentiable
from ._library import check_like, check_parameter, check_positive, check_rows, register_op, require_no_grad
from ._rms_norm_backward_kernel import launch

__all__ = ["rms_norm_backward", "rms_norm_backward_reference", "with_gradient"]


def rms_norm_backward_reference(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    gemma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The formulas in float64, each gradient rounded once."""
    wide, grad = x.double(), grad_out.double()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    y = wide * rstd
    g = grad if weight is None else grad * (weight.double() + (1.0 if gemma else 0.0))
    grad_x = (g - y * (g * y).mean(-1, keepdim=True)) * rstd
    if grad_residual_out is not None:
        grad_x = grad_x + grad_residual_out.double()
    if weight is None:
        return grad_x.to(x.dtype), None
    y = y if gemma else y.to(x.dtype).double()
    return grad_x.to(x.dtype), (grad * y).reshape(-1, x.shape[-1]).sum(0).to(x.dtype)


def _validate(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    weight_grad: bool,
) -> None:
    op = "rms_norm_backward"
    check_rows(op, x)
    check_like(op, "grad_out", grad_out, x)
    check_like(op, "grad_residual_out", grad_residual_out, x)
    check_parameter(op, "weight", weight, x)
    if weight is None and weight_grad:
        raise ArgumentError(f"{op}: weight_grad is True, but there is no weight")
    check_positive(op, "eps", eps)


def _empty_gradients(x: torch.Tensor, weight_grad: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(grad_x, grad_weight); a grad_weight that is not wanted has no elements, as schemas know no optional result."""
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, x.new_empty(x.shape[-1] if weight_grad else 0)


def _rms_norm_backward_cpu(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    gemma: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(grad_out, grad_residual_out, x, weight, eps, weight_grad)
    grad_x, grad_weight = _empty_gradients(x, weight_grad)
    scale = None if weight is None else weight.double() + (1.0 if gemma else 0.0)
    total = torch.zeros(grad_weight.shape, dtype=torch.float64)
    tensors = (grad_x, grad_out, x, x if grad_residual_out is None else grad_residual_out)
    chunks = zip(*(t.reshape(-1, x.shape[-1]).split(_exact.CHUNK) for t in tensors), strict=True) if x.numel() else ()
    for out, grad, rows, residual_grad in chunks:
        wide, grad = rows.double(), grad.double()
        rstd = 1.0 / (_exact.exact_sum(wide * wide).unsqueeze(-1) / x.shape[-1] + eps).sqrt()
        y = wide * rstd
        g = grad if scale is None else grad * scale
        mean = _exact.exact_sum(g * y).unsqueeze(-1) / x.shape[-1]
        result = (g - y * mean) * rstd
        out.copy_(_exact.rounded_to(result if grad_residual_out is None else result + residual_grad.double(), x.dtype))
        if weight_grad:
            total += _exact.exact_sum((grad * (y if gemma else y.to(x.dtype).double())).t())
    return grad_x, _exact.rounded_to(total, x.dtype)


def _rms_norm_backward_cuda(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    gemma: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(grad_out, grad_residual_out, x, weight, eps, weight_grad)
    grad_x, grad_weight = _empty_gradients(x, weight_grad)
    if x.numel() == 0:
        return grad_x, grad_weight.zero_()
    launch(grad_out, grad_residual_out, x, weight, eps, gemma, grad_x, grad_weight if weight_grad else None)
    return grad_x, grad_weight


def _rms_norm_backward_fake(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    gemma: bool,
    weight_grad: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    _validate(grad_out, grad_residual_out, x, weight, eps, weight_grad)
    return _empty_gradients(x, weight_grad)


def _refuse_second_derivative(ctx: Any, *grads: torch.Tensor) -> None:
    raise UnsupportedError("the gradient of a norm has no derivative of its own: want backward without create_graph")


_rms_norm_backward = differentiable(
    register_op(
        "rms_norm_backward(Tensor grad_out, Tensor? grad_residual_out, Tensor x, Tensor? weight, float eps, bool gemma,"
        " bool weight_grad) -> (Tensor, Tensor)",
        cpu=_rms_norm_backward_cpu, cuda=_rms_norm_backward_cuda, fake=_rms_norm_backward_fake,
    ),
    save=lambda ctx, inputs, output: None,
    backward=_refuse_second_derivative,
)  # fmt: skip


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    """For ``rms_norm(x, weight, eps, gemma)`` or ``add_rms_norm(x, residual, weight, eps, gemma)``."""
    x, *residual, weight, ctx.eps, ctx.gemma = inputs
    ctx.save_for_backward(output[1] if residual else x, weight)
    ctx.set_materialize_grads(False)


def _gradient(
    ctx: Any, grad_out: torch.Tensor | None, grad_residual_out: torch.Tensor | None = None
) -> tuple[Any, ...]:
    x, weight = ctx.saved_tensors
    *addends, needs_weight, _, _ = ctx.needs_input_grad
    grad_x, grad_weight = grad_residual_out, None
    if grad_out is not None:
        grad_x, grad_weight = _rms_norm_backward(
            grad_out, grad_residual_out, x, weight, ctx.eps, ctx.gemma, needs_weight
        )
    return (*(grad_x for _ in addends), grad_weight if needs_weight else None, None, None)


def with_gradient(op: Callable[..., Any]) -> Callable[..., Any]:
    """Give the overload of ``rms_norm`` or ``add_rms_norm`` its gradient; returns what to call it by."""
    return differentiable(op, _save, _gradient)


def rms_norm_backward(
    grad_out: torch.Tensor,
    grad_residual_out: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float = 1e-6,
    *,
    gemma: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gradients of ``rms_norm`` and of the forms with a residual; autograd calls it for them.

    Args:
        grad_out: [..., hidden_size] of x's dtype, any strides: the gradient of the normalised output.
        grad_residual_out: of the same shape and dtype: the gradient of the residual sum; None without a residual.
        x: [..., hidden_size], fp32, fp16 or bf16, any strides: what was normalised, so the sum if there is a residual.
        weight: [hidden_size] of x's dtype, or None for none.
        eps: what the forward pass added to the mean square; finite, not negative.
        gemma: whether it scaled by ``1 + weight``.

    Returns:
        The gradient of x (and of the residual: they have the same), contiguous, of x's shape and dtype; and that of
        the weight, zero for no rows, or None without one.

    Invariance: a row of the first result depends on that row, weight, eps and the form alone; the second is the sum
    over rows by a tree that is a function of the row number. See the module docstring.

    Raises:
        ShapeError, DtypeError, DeviceError, ArgumentError: before anything is computed.
        UnsupportedError: autograd would record the call.

    Source: Zhang and Sennrich, 2019, differentiated.
    """
    require_no_grad("rms_norm_backward", grad_out, grad_residual_out, x, weight)
    weighted = weight is not None
    grad_x, grad_weight = _rms_norm_backward(grad_out, grad_residual_out, x, weight, eps, gemma, weighted)
    return grad_x, grad_weight if weighted else None


def _sample(num_tokens: int, dtype: torch.dtype, device: torch.device, generator: torch.Generator) -> dict[str, Any]:
    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, device=device).to(dtype)

    names = ("grad_out", "grad_residual_out", "x")
    return {**{name: randn(num_tokens, 4096) for name in names}, "weight": randn(4096) * 0.1 + 1.0, "eps": 1e-6}


register_spec(
    OpSpec(
        "rms_norm_backward",
        rms_norm_backward,
        rms_norm_backward_reference,
        _sample,
        batch_axes={"grad_out": 0, "grad_residual_out": 0, "x": 0},
        tolerance="rms_norm_backward",
        row_outputs=1,
    )
)
