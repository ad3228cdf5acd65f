"""The auditors on a GPU: kernels, grids and blocks on either side of a threshold, graphs, atomics, real vLLM's op."""

from importlib.util import find_spec

import pytest
import torch
import triton
import triton.language as tl
from mutation import Control, Mutant, check_control, check_mutant

from batchproof.audit.launches import launches
from batchproof.audit.model import audit_model
from batchproof.audit.op import audit_op
from batchproof.registry import all_specs

pytestmark = pytest.mark.gpu
WIDE = {"x": "randn[M,4096]:fp32"}


@triton.jit(do_not_specialize_on_alignment=["x_ptr"])  # for layouts, and so the order of a sum, follow it
def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr, BLOCK_SIZE: tl.constexpr):
    row, total = tl.program_id(0), tl.zeros((BLOCK_SIZE,), tl.float32)
    for start in range(0, N, BLOCK_SIZE):
        total += tl.load(x_ptr + row * N + start + tl.arange(0, BLOCK_SIZE))
    tl.store(out_ptr + row, tl.sum(total))


def row_sum(x, block, warps=4):
    x = x.contiguous()
    out = torch.empty(len(x), device=x.device)
    _sum_kernel[(len(x),)](x, out, x.shape[1], block, num_warps=warps)
    return out


def block_by_rows(x):
    return row_sum(x, 1024 if len(x) < 200 else 512)


def warps_by_rows(x):
    return row_sum(x, 1024, 4 if len(x) < 77 else 8)


def graph_only(x):
    return row_sum(x, 512 if torch.cuda.is_current_stream_capturing() else 1024)


def atomics(x, out):
    """Every element of a row is added to the row's sum as it arrives."""
    index = torch.arange(len(x), device=x.device).repeat_interleave(x.shape[1])
    out.zero_()
    out.index_add_(0, index, x.flatten())


def same_block(x):
    return row_sum(x, 1024)


def audit(function, arguments=WIDE, **options):
    usual = {"rows": 512, "device": "cuda", "name": function.__name__}
    return lambda: audit_op(function, arguments, **usual | options)


MUTANTS = [
    Mutant("gpu: block by rows", "vLLM 48271", audit(block_by_rows), "batch size", "block_by_rows", 200),
    Mutant("gpu: warps by rows", "autotune keyed on rows", audit(warps_by_rows), "batch size", "warps_by_rows", 77),
    Mutant("gpu: another kernel in a graph", "graph against eager", audit(graph_only), "graph against eager"),
    Mutant("gpu: float atomics", "vLLM 30097", audit(atomics, WIDE | {"out": "empty[M]"}), "repeat"),
]
CONTROLS = [
    Control("gpu: one block for all", audit(same_block)),
    Control("gpu: an op of batchproof", lambda: audit_op(all_specs()["fused_add_rms_norm"], rows=512)),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_killed_and_named(mutant):
    check_mutant(mutant)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_a_control_raises_no_alarm(control):
    check_control(control)


def test_launches_have_grid_and_block():
    x = torch.randn(7, 4096, device="cuda")
    (launch,) = launches(lambda: row_sum(x, 1024, 8), x.device)
    assert "_sum_kernel" in launch.kernel
    assert (launch.grid, launch.block) == ((7, 1, 1), (256, 1, 1))


def test_the_kernels_on_either_side_are_named():
    before, after = audit(warps_by_rows)().cause.launches
    assert before[0].block == (128, 1, 1)
    assert after[0].block == (256, 1, 1)


@pytest.mark.skipif(not find_spec("vllm"), reason="needs vLLM")
def test_the_flip_of_vllms_fused_norm_is_found_and_explained():
    from vllm import _custom_ops

    row = "randn[M,4096]:bf16"
    arguments = {"input": row, "residual": row, "weight": "randn[4096]:bf16", "epsilon": "1e-6"}
    report = audit_op(_custom_ops.fused_add_rms_norm, arguments)
    assert (report.cause.relation, report.cause.threshold) == ("batch size", 256)
    assert report.classes == "1-255 | 256-4096"
    before, after = report.cause.launches
    assert (before[0].block, after[0].block) == ((1024, 1, 1), (256, 1, 1))


@pytest.mark.parametrize("invariant", [False, True])
def test_a_model_on_the_gpu(invariant):
    from batchproof import make_invariant
    from batchproof.generation.model import load_stock

    model, _ = load_stock(None, "cuda")
    if invariant:
        make_invariant(model)
    report = audit_model(model, batch_sizes=(2, 8, 33))
    assert report.verdict == ("holds" if invariant else "varies"), report.text()
    assert invariant or (report.cause.op and report.cause.where)
