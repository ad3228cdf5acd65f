"""How products are cut on Hopper, and which run by its kernel: on a CPU, as no bit depends on it."""

import pytest
import torch

from batchproof.ops import _hopper
from batchproof.ops._hopper import SHAPES, Part, Shape, parts_for, shape_for, takes

H200 = 132  # multiprocessors
FP8, BF16 = torch.float8_e4m3fn, torch.bfloat16


@pytest.mark.parametrize(
    ("m", "n", "expected"),
    [
        (1, 4096, Shape(1, 16, True, 12, 1)),
        (16, 128256, Shape(1, 16, True, 12, 1)),
        (17, 4096, Shape(1, 32, True, 12, 1)),
        (33, 28672, Shape(1, 128, False, 8, 1)),
        (64, 6144, Shape(1, 64, False, 12, 1)),
        (64, 4096, Shape(1, 32, False, 16, 1)),
        (65, 4096, Shape(1, 64)),
        (128, 6144, Shape(2, 64)),
        (256, 4096, Shape(2, 64)),
        (256, 28672, Shape(2, 128)),
        (65536, 64, Shape(2, 64)),  # of tiles of 128 half would be wasted
        (64, 5120, Shape(1, 64, False, 12, 1)),  # 80 tiles: of 160 narrower ones some programs would do two
        (256, 2560, Shape(2, 64)),
        (256, 5120, Shape(2, 128)),
        (65, 8, Shape(1, 32)),
    ],
)
def test_the_tile_whose_waves_cost_least_is_taken(m, n, expected):
    assert shape_for(m, n, H200) == expected


@pytest.mark.parametrize("multiprocessors", [1, 16, 78, 132])
def test_every_size_has_a_shape_whose_tiles_cover_it(multiprocessors):
    for m in [*range(1, 300), 511, 512, 513, 4095, 4096, 65536]:
        for n in (1, 8, 100, 4096, 128256):
            shape = shape_for(m, n, multiprocessors)
            left, right = (n, m) if shape.swap else (m, n)
            across = -(-right // shape.width)
            down = shape.tiles(m, n) // across
            assert down * shape.height >= left > (down - 1) * shape.height
            assert across * shape.width >= right > (across - 1) * shape.width


@pytest.mark.parametrize(
    ("m", "n", "expected"),
    [
        (512, 6144, (Part(0, 4224, Shape(2, 128)), Part(4224, 6144, Shape(2, 64)))),
        (256, 28672, (Part(0, 25344, Shape(2, 128)), Part(25344, 28672, Shape(2, 64)))),
        (512, 4096, (Part(0, 4096, Shape(2, 128)),)),  # less than a wave
        (1024, 6144, (Part(0, 6144, Shape(2, 128)),)),  # nearly three
        (8192, 28672, (Part(0, 28672, Shape(2, 128)),)),  # so many that the last hardly counts
        (16, 28672, (Part(0, 28672, Shape(1, 16, True, 12, 1)),)),
    ],
)
def test_a_wave_that_would_be_half_empty_is_of_smaller_tiles(m, n, expected):
    assert parts_for(m, n, 4096, H200) == expected
    assert parts_for(m, n, 2048, H200) == (Part(0, n, shape_for(m, n, H200)),), "too short for another launch"


@pytest.mark.parametrize("multiprocessors", [1, 16, 78, 132])
def test_parts_cover_the_columns_once_from_one_scale_s_block_on(multiprocessors):
    several = 0
    for m in [*range(1, 300), 384, 511, 512, 640, 768, 1024, 4096, 65536]:
        for n in (1, 8, 100, 2560, 4096, 5120, 6144, 28672, 128256):
            parts = parts_for(m, n, 4096, multiprocessors)
            assert [0, *(part.stop for part in parts)] == [*(part.start for part in parts), n]
            assert all(part.start % 128 == 0 and not part.shape.swap for part in parts[1:])
            several += len(parts) > 1
    assert several or multiprocessors == 1


def test_a_consumer_that_reads_few_tokens_swaps():
    """wgmma has 64 rows on one side: with fewer tokens than that on it, the rest would be work for nothing."""
    for most, shapes in SHAPES:
        assert all(shape.swap == (most is not None and most <= 32) for shape in shapes)
        assert all(shape.width >= most for shape in shapes if shape.swap)


def aligned(m, n, k, dtype):
    return (torch.zeros(*size, dtype=dtype) for size in ((m, k), (n, k)))


@pytest.mark.parametrize(("dtype", "k"), [(FP8, 16), (FP8, 4096), (BF16, 8), (torch.float16, 72)])
def test_what_the_tma_can_read_is_taken(dtype, k):
    tokens, weight = aligned(5, 24, k, dtype)
    assert takes(tokens, weight, torch.empty(5, 24, dtype=BF16), Shape(2, 128))
    assert takes(tokens[1:4], weight[8:], torch.empty(3, 16, dtype=BF16), Shape(2, 128))


def test_what_the_tma_cannot_read_or_write_is_not_taken():
    swapped, straight = SHAPES[0][1][0], Shape(2, 128)
    tokens, weight = aligned(5, 24, 64, FP8)
    out = torch.empty(5, 24, dtype=BF16)

    def wide(rows, columns):
        return torch.zeros(rows, columns, dtype=FP8)

    assert not takes(wide(5, 65)[:, 1:], weight, out, straight), "rows of 65 bytes"
    assert not takes(wide(5, 80)[:, 1:65], weight, out, straight), "an odd address"
    assert not takes(wide(64, 5).t(), weight, out, straight), "k is not the fastest axis"
    assert not takes(tokens[:1].expand(5, 64), weight, out, straight), "a stride of 0"
    assert not takes(tokens[:, :0], weight[:, :0], out, straight), "no k"
    assert not takes(tokens.float(), weight.float(), out, straight), "fp32"
    assert not takes(tokens, weight[:20], torch.empty(5, 20, dtype=BF16), straight), "rows of 40 bytes to store"
    assert takes(tokens, weight[:20], torch.empty(5, 20, dtype=BF16), swapped), "which are stored directly if swapped"
    assert not takes(tokens, weight, out.float(), straight), "fp32 is stored directly only"
    assert takes(tokens, weight, out.float(), swapped)


def test_elsewhere_the_kernel_is_not_asked():
    tokens, weight = aligned(5, 24, 64, BF16)
    out = torch.full((5, 24), float("nan"), dtype=BF16)
    assert not _hopper.product(tokens, weight, out)
    assert out.isnan().all()
