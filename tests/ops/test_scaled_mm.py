"""scaled_mm: exactness on the CPU, vLLM's and torch's conventions, tiles that agree, wgmma alone on Hopper."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchproof.errors import ArgumentError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, first_mismatch, ulp_distance
from batchproof.ops import scaled_mm as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops._quantize import quantize_per_block_reference, quantize_per_token_reference
from batchproof.ops.linear import add_pieces
from batchproof.ops.scaled_mm import scaled_mm, scaled_mm_reference

FP8 = torch.float8_e4m3fn
SHAPES = [(1, 1), (5, 16), (33, 100), (129, 300), (64, 1024), (200, 130)]  # N, K: past groups of 128 and tiles
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def operands(generator, m, n, k, scales="token"):
    """(a, b, scale_a, scale_b)."""
    device = generator.device
    a, w = (torch.randn(rows, k, generator=generator, device=device) for rows in (m, n))
    if scales == "block":
        a, scale_a = quantize_per_block_reference(torch.nn.functional.pad(a, (0, -k % 128)), 128)
        a = a[:, :k]
        scale_b = torch.rand(-(-k // 128), -(-n // 128), generator=generator, device=device) + 0.1
        return a, w.clamp(-4, 4).to(FP8).t(), scale_a, scale_b
    (a, scale_a), (w, scale_b) = quantize_per_token_reference(a), quantize_per_token_reference(w)
    if scales == "tensor":
        return a, w.t(), scale_a.mean().reshape(1), scale_b.mean().reshape(1)
    return a, w.t(), scale_a, scale_b.t()


def assert_accurate(out, given, bias=None):
    a, b, scale_a, scale_b = given
    wanted = scaled_mm_reference(*given, bias, out.dtype)
    ones = [s.abs() for s in (scale_a, scale_b)]
    unit = scaled_mm_reference(a.float().abs().to(FP8), b.float().abs().to(FP8), *ones, None, torch.float32).double()
    tolerance = TOLERANCES["scaled_mm"]
    near = (out.double() - wanted.double()).abs() <= tolerance.atol * unit
    bad = ~(near | (ulp_distance(out, wanted) <= tolerance.ulp))
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {wanted[bad][0].item()}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("scales", ["tensor", "token", "block"])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_accuracy(n, k, scales, dtype, generator):
    given = operands(generator, 7, n, k, scales)
    bias = torch.randn(n, generator=generator, device=generator.device).to(dtype)
    assert_accurate(scaled_mm(*given, out_dtype=dtype), given)
    assert_accurate(scaled_mm(*given, bias, out_dtype=dtype), given, bias)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the CPU's exactness")
@pytest.mark.parametrize("scales", ["tensor", "token"])
def test_the_cpu_is_exact(scales, generator):
    """fp8 sums fit float64: the only rounding is the last one."""
    given = operands(generator, 9, 50, 700, scales)
    assert first_mismatch(scaled_mm(*given), scaled_mm_reference(*given)) is None


@pytest.mark.parametrize("scales", ["tensor", "token", "block"])
@pytest.mark.parametrize("m", [1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 128, 129])
def test_a_row_has_one_result(m, scales, generator):
    a, b, scale_a, scale_b = operands(generator, 129, 130, 300, scales)
    whole = scaled_mm(a, b, scale_a, scale_b)
    rows = slice(129 - m, 129)
    some = scale_a if scales == "tensor" else scale_a[rows]
    assert first_mismatch(scaled_mm(a[rows], b, some, scale_b), whole[rows]) is None


@pytest.mark.parametrize("scales", ["tensor", "token", "block"])
def test_layouts_change_no_bit(scales, generator):
    a, b, scale_a, scale_b = operands(generator, 20, 48, 256, scales)
    expected = scaled_mm(a, b, scale_a, scale_b)
    wide = torch.zeros(20, 300, device=a.device).to(FP8)
    wide.view(torch.uint8)[:, 3:259] = a.view(torch.uint8)
    by_rows = b.view(torch.uint8).contiguous().view(FP8)  # a weight [K, N], which is copied
    by_columns = a.view(torch.uint8).t().contiguous().t().view(FP8)
    assert by_rows.stride() != b.stride()
    for left, right in ((wide[:, 3:259], b), (a, by_rows), (by_columns, b)):
        assert first_mismatch(scaled_mm(left, right, scale_a, scale_b), expected) is None


def test_shapes_of_scales(generator):
    a, b, scale_a, scale_b = operands(generator, 6, 40, 64)
    expected = scaled_mm(a, b, scale_a, scale_b)
    for left in (scale_a, scale_a.flatten()):
        for right in (scale_b, scale_b.flatten(), scale_b.t()):
            assert first_mismatch(scaled_mm(a, b, left, right), expected) is None
    one = torch.tensor(0.5, device=a.device)
    for scalar in (one, one[None], one[None, None]):
        assert first_mismatch(scaled_mm(a, b, scalar, scale_b), scaled_mm(a, b, one.expand(6), scale_b)) is None


def test_nan_and_overflow_stay_in_their_row(generator):
    a, b, scale_a, scale_b = operands(generator, 5, 40, 256)
    expected = scaled_mm(a, b, scale_a, scale_b)
    a = a.float()
    a[1, 7] = float("nan")
    scale_a = scale_a.clone()
    scale_a[3] = float("inf")
    out = scaled_mm(a.to(FP8), b, scale_a, scale_b)
    assert bool(out[1].isnan().all())
    assert not bool(out[3].isfinite().any())
    for row in (0, 2, 4):
        assert first_mismatch(out[row], expected[row]) is None


@pytest.mark.parametrize(("m", "n", "k"), [(0, 8, 16), (3, 0, 16), (3, 8, 0)])
def test_empty(m, n, k, device):
    a, b = torch.zeros(m, k, device=device).to(FP8), torch.zeros(n, k, device=device).to(FP8).t()
    one = torch.ones(1, device=device)
    bias = torch.ones(n, device=device, dtype=torch.bfloat16)
    out = scaled_mm(a, b, one, one, bias)
    assert out.shape == (m, n)
    assert bool((out == 1).all())


def test_errors_say_what_was_seen_and_what_is_wanted(generator):
    a, b, scale_a, scale_b = operands(generator, 4, 40, 256)
    with pytest.raises(DtypeError, match=r"a is torch.bfloat16, want one of torch.float8_e4m3fn"):
        scaled_mm(a.bfloat16(), b, scale_a, scale_b)
    with pytest.raises(DtypeError, match=r"scale_a is torch.float64, want one of torch.float32"):
        scaled_mm(a, b, scale_a.double(), scale_b)
    with pytest.raises(DtypeError, match=r"out_dtype is torch.float64"):
        scaled_mm(a, b, scale_a, scale_b, out_dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"shapes \(4, 256\) and \(40, 256\), want \[M, K\] and \[K, N\]"):
        scaled_mm(a, b.t(), scale_a, scale_b)
    with pytest.raises(
        ShapeError, match=r"scale_a has shape \(3, 1\) and scale_b \(1, 40\), want one scale or \(4, 1\)"
    ):
        scaled_mm(a, b, scale_a[:3], scale_b)
    with pytest.raises(ShapeError, match=r"for blocks of 128 \(4, 2\) and \(2, 1\)"):
        scaled_mm(a, b, torch.ones(4, 2, device=a.device), torch.ones(3, 1, device=a.device))
    with pytest.raises(ShapeError, match=r"bias has shape \(4,\), want \(40,\)"):
        scaled_mm(a, b, scale_a, scale_b, torch.ones(4, dtype=torch.bfloat16, device=a.device))
    with pytest.raises(DtypeError, match=r"bias is torch.float32, want one of torch.bfloat16"):
        scaled_mm(a, b, scale_a, scale_b, torch.ones(40, device=a.device))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        scaled_mm(a, b, scale_a.requires_grad_(), scale_b)


def test_registered_op(generator):
    op = torch.ops.batchproof.scaled_mm.default
    for scales in ("tensor", "token", "block"):
        given = operands(generator, 4, 24, 256, scales)
        bias = torch.ones(24, device=generator.device, dtype=torch.float16)
        # its check of the schema multiplies inputs, which fp8 cannot be
        torch.library.opcheck(op, (*given, bias, torch.float16), test_utils="test_faketensor")


def test_compiled_equals_eager(generator):
    _, b, _, scale_b = operands(generator, 4, 24, 256)

    def layer(x):
        a, scale_a = quantize_per_token_reference(x)
        return scaled_mm(a, b, scale_a, scale_b)

    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (1, 5):
        x = torch.randn(rows, 256, generator=generator, device=generator.device)
        assert first_mismatch(compiled(x), layer(x)) is None


@interpreted
@pytest.mark.parametrize("scales", ["tensor", "token", "block"])
@pytest.mark.parametrize(("m", "n", "k"), [(1, 1, 1), (17, 65, 300), (5, 130, 257)])
def test_every_tile_in_the_interpreter(m, n, k, scales, generator):
    given = operands(generator, m, n, k, scales)
    bias = torch.randn(n, generator=generator)
    for tiles in (module.HOPPER_BLOCK_TILES, module.GENERIC_TILES, () if scales == "block" else module.HOPPER_TILES):
        for _, tile in tiles:
            assert_accurate(module.launch(*given, None, torch.float32, tile), given)
            assert_accurate(module.launch(*given, bias, torch.float32, tile), given, bias)


@pytest.mark.parametrize("scales", ["token", "block"])
def test_k_split_over_ranks_has_the_bits_of_one_rank(scales, generator):
    """Tensor-parallel sizes 2, 4 and 8, split by hand. Scales of rows and columns come after the sum over ranks."""
    a, b, *given = operands(generator, 33, 130, 2048, scales)
    ones = [torch.ones(1, device=a.device)] * 2
    for pieces in (2, 4, 8):
        whole = scaled_mm(a, b, *(given if scales == "block" else ones), None, torch.float32, pieces=pieces)
        for ranks in (n for n in (2, 4, 8) if n <= pieces):
            parts = [ones] * ranks
            if scales == "block":
                parts = list(zip(given[0].chunk(ranks, 1), given[1].chunk(ranks, 0), strict=True))
            sums = [
                scaled_mm(x, y, *part, None, torch.float32, pieces=pieces // ranks)
                for x, y, part in zip(a.chunk(ranks, 1), b.chunk(ranks, 0), parts, strict=True)
            ]
            assert first_mismatch(add_pieces(sums), whole) is None, f"{ranks} ranks, {pieces} pieces"
        assert_accurate(scaled_mm(a, b, *given, pieces=pieces), (a, b, *given))


def test_pieces_are_multiples_of_groups(generator):
    given = operands(generator, 2, 8, 256)
    with pytest.raises(ArgumentError, match=r"pieces is 4 and K 256, .* K a multiple of pieces \* 128"):
        scaled_mm(*given, pieces=4)


@interpreted
@pytest.mark.parametrize("scales", ["token", "block"])
def test_pieces_in_the_interpreter(scales, generator):
    given = operands(generator, 5, 40, 512, scales)
    for tiles in (module.HOPPER_BLOCK_TILES[:1], module.GENERIC_TILES):
        for pieces in (1, 2, 4):
            assert_accurate(module.launch(*given, None, torch.float32, tiles[0][1], pieces), given)


def test_on_hopper_no_tile_compiles_to_mma_sync():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    script = Path(__file__).parent.parent / "tensor_cores.py"
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    assert len(found) == 6 + 16 + 27 + 2
    for launch, seen in found.items():
        assert seen["mma.sync"] == 0, launch
        assert seen["wgmma"] >= seen["steps of k"], launch
        assert seen["fits"], launch
        assert seen["barriers lost"] == [], launch
