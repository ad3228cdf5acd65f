"""rope and its table: accuracy, both pairings, and bits that depend on a token and its position alone."""

import math

import pytest
import torch

from batchproof.errors import ArgumentError, DeviceError, DtypeError, ShapeError, UnsupportedError
from batchproof.numerics import TOLERANCES, first_mismatch, ulp_distance
from batchproof.ops import rope as module
from batchproof.ops._library import FLOAT_DTYPES
from batchproof.ops.rope import rope, rope_cos_sin, rope_reference

BATCHES = [1, 2, 3, 8, 31, 32, 33, 255, 256, 257, 1000]
POSITIONS = 300
INF, NAN = float("inf"), float("nan")
# head_dim, rot: whole, partial, odd rest, narrower than a vector, no rotation at all
DIMS = [(64, 64), (80, 32), (33, 6), (2, 2), (8, 0)]
interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernel itself runs in the other tests")


def frequencies(rot, device="cpu"):
    return (10000.0 ** -(torch.arange(rot // 2, dtype=torch.float64) * 2 / max(rot, 1))).float().to(device)


def inputs(generator, tokens, head_dim, rot, dtype=torch.float32, heads=3):
    device = generator.device
    x = torch.randn(tokens, heads, head_dim, generator=generator, device=device).to(dtype)
    positions = torch.randint(POSITIONS, (tokens,), generator=generator, device=device)
    return x, positions, rope_cos_sin(frequencies(rot, device), POSITIONS)


def assert_accurate(x, positions, cos_sin, interleaved, out):
    """Within the table's ulps, or its atol in units of the token's largest value."""
    expected, tolerance = rope_reference(x, positions, cos_sin, interleaved), TOLERANCES["rope"]
    near = (out.double() - expected.double()).abs() <= tolerance.atol * x.double().abs().amax((1, 2), keepdim=True)
    bad = ~(near | (ulp_distance(out, expected) <= tolerance.ulp))
    assert not bad.any(), f"{int(bad.sum())} off, first {out[bad][0].item()} against {expected[bad][0].item()}"


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rot"), DIMS)
def test_accuracy(head_dim, rot, interleaved, dtype, generator):
    arguments = inputs(generator, 7, head_dim, rot, dtype)
    out = rope(*arguments, interleaved)
    assert_accurate(*arguments, interleaved, out)
    assert first_mismatch(out[..., rot:], arguments[0][..., rot:]) is None


@pytest.mark.parametrize("interleaved", [False, True])
def test_is_a_complex_rotation(interleaved, generator):
    x, positions, cos_sin = inputs(generator, 5, 16, 16)
    pairs = x.double().view(5, 3, 8, 2) if interleaved else x.double().view(5, 3, 2, 8).mT
    angle = positions.double()[:, None, None] * frequencies(16, x.device).double()
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    expected = turned.reshape(5, 3, 16) if interleaved else turned.mT.reshape(5, 3, 16)
    torch.testing.assert_close(rope(x, positions, cos_sin, interleaved).double(), expected, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
def test_values_that_are_not_ordinary(dtype, generator):
    """Subnormals and cancelling pairs are accurate; what is not finite stays within its pair."""
    x, positions, cos_sin = inputs(generator, 4, 16, 16, dtype)
    x[0] = torch.finfo(dtype).smallest_normal / 4
    x[1, :, 8:] = (x[1, :, :8].float() * (cos_sin[positions[1], :8] / cos_sin[positions[1], 8:])).to(dtype)
    x[2, 0, 3], x[2, 1, 4], x[3] = NAN, INF, torch.finfo(dtype).max
    out = rope(x, positions, cos_sin)
    clean = x.clone()
    clean[2, 0, 3], clean[2, 1, 4] = 0.0, 0.0
    assert_accurate(clean[:3], positions[:3], cos_sin, False, rope(clean, positions, cos_sin)[:3])
    touched = torch.zeros(3, 16, dtype=torch.bool, device=x.device)
    touched[0, [3, 11]], touched[1, [4, 12]] = True, True
    assert torch.equal(out[2].isfinite(), ~touched)
    assert first_mismatch(out[2][~touched], rope(clean, positions, cos_sin)[2][~touched]) is None


@pytest.mark.parametrize("dtype", FLOAT_DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rot"), [(16, 16), (20, 6)])
def test_a_token_has_one_result(head_dim, rot, interleaved, dtype, generator):
    probe, position, cos_sin = inputs(generator, 1, head_dim, rot, dtype)
    alone = rope(probe, position, cos_sin, interleaved)
    for tokens in BATCHES:
        for place in sorted({0, tokens // 2, tokens - 1}):
            batch, positions, _ = inputs(generator, tokens, head_dim, rot, dtype)
            batch[0::4], batch[1::4], batch[2::4] = NAN, INF, torch.finfo(dtype).max
            batch[place], positions[place] = probe[0], position[0]
            out = rope(batch, positions, cos_sin, interleaved)
            assert first_mismatch(out[place], alone[0]) is None, f"token {place} of {tokens}"


def test_heads_do_not_meet(generator):
    x, positions, cos_sin = inputs(generator, 4, 64, 64, heads=37)
    whole = rope(x, positions, cos_sin)
    for heads in (slice(0, 1), slice(5, 22), slice(36, 37)):
        assert first_mismatch(rope(x[:, heads], positions, cos_sin), whole[:, heads]) is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rot"), [(16, 16), (21, 6)])
def test_layout_leaves_the_bits_alone(head_dim, rot, interleaved, dtype, generator):
    x, positions, cos_sin = inputs(generator, 6, head_dim, rot, dtype)
    expected = rope(x, positions, cos_sin, interleaved)
    empty = torch.full((6 * 3 * head_dim * 2 + 1,), NAN, dtype=dtype, device=x.device)
    shifted = empty.clone()[1 : x.numel() + 1].view_as(x).copy_(x)
    of_qkv = empty.clone()[:-1].view(6, 6, head_dim)[:, 2:5].copy_(x)
    spaced = empty.clone()[1:].view(6, 3, 2 * head_dim)[..., ::2].copy_(x)
    for same in (shifted, of_qkv, spaced, x.transpose(0, 1).contiguous().transpose(0, 1)):
        out = rope(same, positions, cos_sin, interleaved)
        assert out.is_contiguous()
        assert first_mismatch(out, expected) is None
        assert first_mismatch(rope(same[4:5], positions[4:5], cos_sin, interleaved), expected[4:5]) is None
    assert first_mismatch(rope(x, positions.int(), cos_sin, interleaved), expected) is None
    strided = positions.repeat_interleave(2)[::2], cos_sin.t().contiguous().t()
    assert first_mismatch(rope(x, *strided, interleaved), expected) is None


def test_empty(device):
    cos_sin = rope_cos_sin(frequencies(8, device), 4)
    for shape in ((0, 3, 8), (2, 0, 8)):
        positions = torch.zeros(shape[0], dtype=torch.int64, device=device)
        assert rope(torch.empty(shape, device=device), positions, cos_sin).shape == shape


def test_table_values():
    """Of the angle in fp32, as Hugging Face takes it: rounded before the cosine, not only after it."""
    cos_sin = rope_cos_sin(frequencies(8), 5000, scaling=1.25)
    assert cos_sin.dtype == torch.float32
    assert cos_sin.shape == (5000, 8)
    for position in (0, 1, 31, 32, 4999):
        angles = (torch.tensor(float(position)) * frequencies(8)).double().tolist()
        for i, angle in enumerate(angles):
            assert cos_sin[position, i].item() == pytest.approx(1.25 * math.cos(angle), abs=2.0**-24)
            assert cos_sin[position, 4 + i].item() == pytest.approx(1.25 * math.sin(angle), abs=2.0**-24)


@pytest.mark.parametrize("rot", [2, 6, 128, 6000])
def test_table_rows_depend_on_their_position_alone(rot):
    longest = rope_cos_sin(frequencies(rot), 1100)
    for positions in (0, 1, 2, 31, 32, 33, 100, 1099):
        assert first_mismatch(rope_cos_sin(frequencies(rot), positions), longest[:positions]) is None


def test_errors_name_the_value(device):
    cos_sin = rope_cos_sin(frequencies(8, device), 4)
    x, positions = torch.zeros(2, 3, 8, device=device), torch.zeros(2, dtype=torch.int64, device=device)
    with pytest.raises(ShapeError, match=r"x has shape \(2, 24\), want \[num_tokens, num_heads, head_dim\]"):
        rope(x.flatten(1), positions, cos_sin)
    with pytest.raises(ShapeError, match=r"positions has shape \(1,\), want \(2,\)"):
        rope(x, positions[:1], cos_sin)
    with pytest.raises(ShapeError, match=r"cos_sin has shape \(4, 8\), want .* at most 6"):
        rope(x[..., :6], positions, cos_sin)
    with pytest.raises(ShapeError, match=r"cos_sin has shape \(4, 7\), want .* rot even"):
        rope(x, positions, cos_sin[:, :7])
    with pytest.raises(DtypeError, match=r"x is torch.float64, want one of torch.float32"):
        rope(x.double(), positions, cos_sin)
    with pytest.raises(DtypeError, match=r"positions is torch.float32, want one of torch.int64, torch.int32"):
        rope(x, positions.float(), cos_sin)
    with pytest.raises(DtypeError, match=r"cos_sin is torch.float16, want one of torch.float32"):
        rope(x, positions, cos_sin.half())
    with pytest.raises(DeviceError, match="cos_sin is on meta, want"):
        rope(x, positions, cos_sin.to("meta"))
    with pytest.raises(UnsupportedError, match="no backward pass"):
        rope(x.requires_grad_(), positions, cos_sin)


def test_table_errors_name_the_value():
    with pytest.raises(DtypeError, match=r"inv_freq is torch.float64, want one of torch.float32"):
        rope_cos_sin(frequencies(8).double(), 4)
    with pytest.raises(ShapeError, match=r"inv_freq has shape \(2, 2\), want \(rot / 2,\)"):
        rope_cos_sin(frequencies(8).view(2, 2), 4)
    with pytest.raises(ArgumentError, match="num_positions is -1, want 0 or more"):
        rope_cos_sin(frequencies(8), -1)
    with pytest.raises(ArgumentError, match="scaling is nan, want a finite number"):
        rope_cos_sin(frequencies(8), 4, NAN)


@pytest.mark.parametrize("position", [-1, POSITIONS, 2**40])
def test_positions_outside_the_table(position, generator):
    x, positions, cos_sin = inputs(generator, 3, 16, 8)
    expected = rope(x, positions, cos_sin)
    positions[1] = position
    if not x.is_cuda:
        with pytest.raises(ArgumentError, match=rf"positions holds {position}, want 0 to {POSITIONS - 1}"):
            rope(x, positions, cos_sin)
        out = torch.empty_like(x)
        module.launch(x, positions, cos_sin, out, False)
    else:
        out = rope(x, positions, cos_sin)
    assert out[1, :, :8].isnan().all()
    assert first_mismatch(out[1, :, 8:], x[1, :, 8:]) is None
    torch.testing.assert_close(out[::2], expected[::2], rtol=0.0, atol=0.0)


@pytest.mark.parametrize("interleaved", [False, True])
def test_registered_op(interleaved, generator):
    x, positions, cos_sin = inputs(generator, 4, 16, 8, torch.float16)
    for argument in (x, x.transpose(0, 1).contiguous().transpose(0, 1)):
        torch.library.opcheck(torch.ops.batchproof.rope.default, (argument, positions, cos_sin, interleaved))


@interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("head_dim", "rot"), DIMS)
def test_kernel_in_the_interpreter(head_dim, rot, interleaved, dtype, generator):
    x, positions, cos_sin = inputs(generator, 3, head_dim, rot, dtype, heads=5)
    for same in (x, x.transpose(0, 1).contiguous().transpose(0, 1), x.repeat_interleave(2, -1)[..., ::2]):
        out = torch.empty_like(x)
        module.launch(same, positions, cos_sin, out, interleaved)
        assert first_mismatch(out, rope(x, positions, cos_sin, interleaved)) is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("interleaved", [False, True])
def test_a_table_in_the_activation_dtype(interleaved, dtype, generator):
    x, positions, cos_sin = inputs(generator, 5, 20, 16, dtype)
    table = cos_sin.to(dtype)
    expected = rope(x, positions, table.float(), interleaved)
    assert first_mismatch(rope(x, positions, table, interleaved), expected) is None
    assert_accurate(x, positions, table, interleaved, expected)
    with pytest.raises(DtypeError, match=r"cos_sin is torch.float64, want one of torch.float32, torch"):
        rope(x, positions, table.double(), interleaved)
    if not x.is_cuda and dtype == torch.float16:
        out = torch.empty_like(x)
        module.launch(x, positions, table, out, interleaved)
        assert first_mismatch(out, expected) is None


@interpreted
def test_kernel_with_more_heads_than_a_block(generator):
    x, positions, cos_sin = inputs(generator, 2, 256, 256, heads=37)
    out = torch.empty_like(x)
    module.launch(x, positions, cos_sin, out, False)
    assert first_mismatch(out, rope(x, positions, cos_sin)) is None
