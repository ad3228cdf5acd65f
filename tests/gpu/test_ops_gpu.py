"""What only a GPU shows: graphs, the compiler, tiles, streams, and tensors past 2**31 elements."""

import pytest
import torch

from batchproof.numerics import first_mismatch
from batchproof.ops import linear as linear_module
from batchproof.ops import scaled_mm as scaled_mm_module
from batchproof.ops._hopper import is_hopper
from batchproof.ops._triton import processors
from batchproof.ops.linear import linear
from batchproof.ops.rms_norm import add_rms_norm, fused_add_rms_norm, rms_norm, rms_norm_reference
from batchproof.ops.scaled_mm import scaled_mm_reference
from batchproof.registry import all_specs, get_spec
from invariance import assert_same

pytestmark = pytest.mark.gpu
SPECS = [pytest.param(spec, dtype, id=f"{name}-{dtype}") for name, spec in all_specs().items() for dtype in spec.dtypes]
HALVES = [torch.float16, torch.bfloat16]


def skip_unless_hopper(device):
    if not is_hopper(device):
        pytest.skip("there is one tile for all elsewhere than on Hopper")


def sample(spec, dtype, device, rows):
    return spec.sample_inputs(rows, dtype, device, torch.Generator(device).manual_seed(3))


@pytest.mark.parametrize("rows", [1, 33, 257])
@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_a_cuda_graph_replays_the_bits_of_eager(spec, dtype, rows, device):
    inputs = sample(spec, dtype, device, rows)
    expected = spec.run(inputs)  # also compiles, which a capture may not
    # In place: what is replayed reads what the replay before it wrote, so the inputs are put back each time.
    static = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spec.op(**static)
    out = out if isinstance(out, tuple) else (out,)
    for replay in range(3):
        for tensor in out:
            tensor.fill_(float("nan") if tensor.is_floating_point() else -7)
        for name, value in inputs.items():
            if isinstance(value, torch.Tensor):
                static[name].copy_(value)
        graph.replay()
        assert_same(out, expected, f"replay {replay}")


@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_inductor_keeps_the_bits_of_eager(spec, dtype, device):
    torch._dynamo.reset()
    in_place, tensors = spec.in_place, None

    def call(**arguments):
        out = spec.op(**{k: v.clone() if k in in_place else v for k, v in arguments.items()})
        return out if isinstance(out, tuple) else (out,)

    compiled = torch.compile(call, fullgraph=True)
    for rows in (1, 8, 33, 257):
        tensors = sample(spec, dtype, device, rows)
        assert_same(compiled(**tensors), spec.run(tensors), f"{rows} rows")


@pytest.mark.parametrize("dtype", HALVES)
def test_inductor_keeps_the_bits_of_a_block(dtype, device):
    """Norm, linear and norm with elementwise work between them that Inductor may fuse, but not into our sums."""
    weight, scale = torch.randn(512, 512, device=device).to(dtype) * 0.05, torch.ones(512, device=device, dtype=dtype)

    def block(x, residual):
        out, residual = add_rms_norm(x, residual, scale)
        return add_rms_norm(linear(out, weight), residual, scale)

    compiled = torch.compile(block, fullgraph=True)
    x, residual = (torch.randn(300, 512, device=device).to(dtype) for _ in range(2))
    whole = compiled(x, residual)
    assert_same(whole, block(x, residual))
    for rows in (1, 7, 33, 256):
        assert_same(compiled(x[:rows], residual[:rows]), tuple(t[:rows] for t in whole), f"{rows} rows")


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("k", [64, 100, 4096, 14336])
def test_all_tiles_agree(k, dtype, device):
    skip_unless_hopper(device)
    generator = torch.Generator(device).manual_seed(0)
    a = torch.randn(1, 300, k, generator=generator, device=device).to(dtype)
    b = torch.randn(1, k, 320, generator=generator, device=device).to(dtype)
    layouts = {"[K, N]": b, "[N, K]": b.transpose(1, 2).contiguous().transpose(1, 2)}
    tiles = [tile for _, tile in (*linear_module.HOPPER_TILES, *linear_module.GENERIC_TILES)]
    expected = linear_module.launch(a, b, tile=tiles[0])
    for tile in tiles:
        for name, same in layouts.items():
            assert first_mismatch(linear_module.launch(a, same, tile=tile), expected) is None, f"{tile}, {name}"
        for rows in (1, 15, 129):
            out = linear_module.launch(a[:, -rows:], b, tile=tile)
            assert first_mismatch(out, expected[:, -rows:]) is None, f"{tile}, {rows} rows"


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("k", [64, 100, 4096, 14336])
def test_all_fp8_tiles_agree(k, blocks, device):
    """Random bytes but for NaN: subnormals, and sums that cancel over all exponents of fp8."""
    skip_unless_hopper(device)
    generator = torch.Generator(device).manual_seed(k)
    a, weight = (
        torch.randint(0, 256, (n, k), generator=generator, device=device, dtype=torch.uint8) for n in (300, 320)
    )
    for codes in (a, weight):
        codes[codes & 127 == 127] = 0
    a, b = a.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn).t()
    shapes = ((300, -(-k // 128)), (-(-k // 128), 3)) if blocks else ((300, 1), (1, 320))
    scales = [torch.rand(shape, generator=generator, device=device) * 1e-3 for shape in shapes]
    tiles = [tile for _, tile in (scaled_mm_module.HOPPER_BLOCK_TILES if blocks else scaled_mm_module.HOPPER_TILES)]
    expected = scaled_mm_module.launch(a, b, *scales, None, torch.float32, tiles[0])
    wanted = scaled_mm_reference(a, b, *scales, None, torch.float32)
    assert float((expected - wanted).norm() / wanted.norm()) < 1e-3
    for tile in tiles:
        assert_same((scaled_mm_module.launch(a, b, *scales, None, torch.float32, tile),), (expected,), f"{tile}")
        for rows in (1, 15, 16, 129):
            some = [scales[0][-rows:], scales[1]]
            out = scaled_mm_module.launch(a[-rows:], b, *some, None, torch.float32, tile)
            assert_same((out,), (expected[-rows:],), f"{tile}, {rows} rows")


def hopper_shapes():
    """Every shape that M may choose."""
    from batchproof.ops._hopper import SHAPES

    return [shape for _, shapes in SHAPES for shape in shapes]


def assert_shapes_agree(product, tokens, weight, expected, **given):
    """Each shape gives the rows of ``expected``: poisoned outputs, any number of tokens, weights read early or not."""
    from batchproof.ops import _hopper, _hopper_product

    for shape in hopper_shapes():
        for rows in (len(tokens), 1, 15, 16, 17, 64, 129, 256):
            static = rows % 2 == 0
            out = torch.full_like(expected[:rows], float("nan"))
            some = given | ({"scale_a": given["scale_a"][-rows:]} if "scale_a" in given else {})
            if not _hopper.takes(tokens[-rows:], weight, out, shape):
                assert len(weight) % 8, "what the TMA cannot store"
                continue
            _hopper_product.launch(tokens[-rows:], weight, out, shape, static_weights=static, **some)
            assert_same((out,), (expected[-rows:],), f"{product}: {shape}, {rows} rows")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scales", ["tensor", "token"])
@pytest.mark.parametrize(("d", "k"), [(64, 64), (100, 1040), (14336, 4096), (161, 256)])
def test_the_hopper_product_with_its_activation_has_the_bits_of_the_two(d, k, scales, dtype, device, monkeypatch):
    """Any number of tokens that it is for, weights read early or not; and the op past them."""
    from batchproof.ops import _hopper, scaled_mm_gated
    from batchproof.ops.activation import silu_and_mul
    from batchproof.ops.activation_quant import silu_and_mul_static_fp8_quant

    skip_unless_hopper(device)
    generator = torch.Generator(device).manual_seed(k)
    tokens, weight = (
        torch.randint(0, 256, (m, k), generator=generator, device=device, dtype=torch.uint8) for m in (48, 2 * d)
    )
    tokens[:40][tokens[:40] & 127 == 127] = 0  # NaN stays in the last tokens
    weight[weight & 127 == 127] = 0
    tokens, weight = tokens.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
    sizes = ((1,), (1,)) if scales == "tensor" else ((48, 1), (1, 2 * d))
    scale_a, scale_b = ((torch.rand(size, generator=generator, device=device) + 0.1) * 0.02 for size in sizes)
    product = scaled_mm_module.scaled_mm(tokens, weight.t(), scale_a, scale_b, None, dtype)
    scale = silu_and_mul(product)[:40].float().abs().quantile(0.9).reshape(1) / 448.0
    expected = silu_and_mul_static_fp8_quant(product, scale)
    values = expected[:40].float().abs()
    assert (values == 448.0).any()
    assert ((values > 0) & (values < 448.0)).float().mean() > 0.1
    taken = []
    launch = _hopper._kernel()
    monkeypatch.setattr(
        _hopper, "_kernel", lambda: lambda *arguments: taken.append(len(arguments[0])) or launch(*arguments)
    )
    for rows in (1, 2, 8, 15, 16, 17, 31, 32, 33, 48):
        some = scale_a if scales == "tensor" else scale_a[-rows:]
        for static in (False, True):
            monkeypatch.setattr(_hopper, "_static_weights", static)
            out = scaled_mm_gated.scaled_mm_silu_and_mul_static_fp8_quant(
                tokens[-rows:], weight.t(), some, scale_b, scale, dtype
            )
            assert_same((out.view(torch.uint8),), (expected[-rows:].view(torch.uint8),), f"{rows} rows, {static=}")
    assert set(taken) >= {1, 2, 8, 15, 16, 17, 31, 32}


@pytest.mark.parametrize("scales", ["tensor", "token", "block", "bias"])
@pytest.mark.parametrize(("n", "k"), [(320, 64), (200, 4096), (136, 1040), (321, 256)])
def test_the_hopper_product_of_fp8_has_the_bits_of_every_tile(n, k, scales, device):
    skip_unless_hopper(device)
    generator = torch.Generator(device).manual_seed(k)
    tokens, weight = (
        torch.randint(0, 256, (m, k), generator=generator, device=device, dtype=torch.uint8) for m in (300, n)
    )
    tokens[:150][tokens[:150] & 127 == 127] = 0  # NaN stays in some tokens, of which no other may hear
    weight[weight & 127 == 127] = 0
    tokens, weight = tokens.view(torch.float8_e4m3fn), weight.view(torch.float8_e4m3fn)
    groups = -(-k // 128)
    shapes = {"tensor": ((1,), (1,)), "block": ((300, groups), (groups, -(-n // 128)))}
    rows, columns = shapes.get(scales, ((300, 1), (1, n)))
    scale_a, scale_b = (torch.rand(size, generator=generator, device=device) * 1e-3 for size in (rows, columns))
    bias = torch.randn(n, generator=generator, device=device).bfloat16() if scales == "bias" else None
    tile = scaled_mm_module.HOPPER_BLOCK_TILES[-1][1]
    expected = scaled_mm_module.launch(tokens, weight.t(), scale_a, scale_b, bias, torch.bfloat16, tile)
    assert expected[:150].isfinite().all()
    assert expected[150:].isnan().any()
    scale_a, scale_b = scaled_mm_module.split_scales(tokens, weight.t(), scale_a, scale_b)
    assert_shapes_agree(
        scales, tokens, weight, expected, scale_a=scale_a, scale_b=scale_b, bias=bias, blocks=scales == "block"
    )


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("n", "k"), [(320, 64), (200, 4096), (136, 1040), (321, 256)])
def test_the_hopper_product_of_halves_has_the_bits_of_every_tile(n, k, dtype, device):
    skip_unless_hopper(device)
    generator = torch.Generator(device).manual_seed(k)
    tokens, weight = (torch.randn(m, k, generator=generator, device=device) for m in (300, n))
    tokens = (tokens * torch.exp2(torch.randint(-9, 9, (300, k), generator=generator, device=device))).to(dtype)
    tokens[7], tokens[9], weight = float("nan"), float("inf"), weight.to(dtype)
    bias = torch.randn(n, generator=generator, device=device).to(dtype)
    for given in (None, bias):
        tile = linear_module.HOPPER_TILES[-1][1]
        expected = linear_module.launch(tokens.unsqueeze(0), weight.t().unsqueeze(0), given, tile=tile)[0]
        assert_shapes_agree(f"{dtype}, bias {given is not None}", tokens, weight, expected, bias=given)


@pytest.mark.parametrize("scales", ["token", "block", "bias"])
def test_a_product_in_two_launches_has_the_bits_of_one(scales, device):
    skip_unless_hopper(device)
    from batchproof.ops import _hopper, _hopper_product

    m, n, k = 512, 6144, 4096
    parts = _hopper.parts_for(m, n, k, processors(device))
    if len(parts) == 1:
        pytest.skip(f"{n} columns are one launch on {processors(device)} multiprocessors")
    generator = torch.Generator(device).manual_seed(k)
    tokens, weight = (torch.randn(s, k, generator=generator, device=device).to(torch.float8_e4m3fn) for s in (m, n))
    rows, columns = ((m, k // 128), (k // 128, n // 128)) if scales == "block" else ((m, 1), (1, n))
    scale_a, scale_b = (torch.rand(size, generator=generator, device=device) for size in (rows, columns))
    bias = torch.randn(n, generator=generator, device=device).bfloat16() if scales == "bias" else None
    some = (scale_a, scale_b, bias, scales == "block")
    one, two = (torch.full((m, n), float("nan"), dtype=torch.bfloat16, device=device) for _ in range(2))
    _hopper_product.launch(tokens, weight, one, parts[0].shape, *some)
    assert _hopper.product(tokens, weight, two, *some)
    assert_same((two,), (one,), scales)


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_tiles_agree_on_pieces_of_k(pieces, device):
    skip_unless_hopper(device)
    generator = torch.Generator(device).manual_seed(pieces)
    a, b = (torch.randn(*s, generator=generator, device=device).bfloat16() for s in ((1, 130, 4096), (1, 4096, 320)))
    expected = linear_module.launch(a, b, pieces=pieces, out_dtype=torch.float32)
    for _, tile in linear_module.HOPPER_TILES:
        out = linear_module.launch(a, b, tile=tile, pieces=pieces, out_dtype=torch.float32)
        assert_same((out,), (expected,), f"{tile}")
    parts = zip(a.chunk(pieces, -1), b.chunk(pieces, 1), strict=True)
    ranks = [linear_module.launch(x, y, out_dtype=torch.float32) for x, y in parts]
    assert_same((linear_module.add_pieces(ranks),), (expected,), "by hand")


def test_a_tile_that_splits_k_would_be_seen(device):
    """The control for ``test_all_tiles_agree``: the same inputs, K summed in two halves, give other bits."""
    a, b = torch.randn(1, 64, 4096, device=device).bfloat16(), torch.randn(1, 4096, 320, device=device).bfloat16()
    whole = linear_module.launch(a, b)
    halves = [linear_module.launch(a[..., s], b[:, s]).float() for s in (slice(0, 2048), slice(2048, None))]
    assert first_mismatch((halves[0] + halves[1]).bfloat16(), whole) is not None


@pytest.mark.parametrize("rows", [524289, 600000])
def test_norms_past_2_to_the_31_elements(rows, device):
    """[600000, 4096] bf16 is 2.46e9 elements, 4.9 GB: row offsets pass 2**31 elements and 2**32 bytes."""
    free, _ = torch.cuda.mem_get_info()
    if free < 30 * 2**30:
        pytest.skip(f"needs 30 GiB of GPU memory, {free / 2**30:.0f} are free")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.empty(rows, 4096, dtype=torch.bfloat16, device=device).normal_(generator=generator)
    residual = torch.empty_like(x).normal_(generator=generator)
    weight = torch.randn(4096, generator=generator, device=device).bfloat16()
    out, (fused, total) = rms_norm(x, weight), add_rms_norm(x, residual, weight)
    ends = [slice(0, 5), slice(2**31 // 4096 - 3, min(2**31 // 4096 + 3, rows)), slice(rows - 5, rows)]
    kept = [(x[s].clone(), residual[s].clone()) for s in ends]
    for s in ends:
        assert first_mismatch(out[s], rms_norm(x[s].clone(), weight)) is None, f"rows {s}"
        assert_same((fused[s], total[s]), add_rms_norm(x[s].clone(), residual[s].clone(), weight), f"rows {s}")
    del out
    fused_add_rms_norm(x, residual, weight)
    for s, (x_rows, residual_rows) in zip(ends, kept, strict=True):
        assert_same((x[s], residual[s]), add_rms_norm(x_rows, residual_rows, weight), f"in place, rows {s}")


def test_heads_past_2_to_the_31_elements(device):
    free, _ = torch.cuda.mem_get_info()
    if free < 20 * 2**30:
        pytest.skip(f"needs 20 GiB of GPU memory, {free / 2**30:.0f} are free")
    qkv = torch.empty(270000, 64, 128, dtype=torch.bfloat16, device=device).normal_()
    heads = qkv[:, :40]
    out = rms_norm(heads)
    for s in (slice(0, 2), slice(262143, 262146), slice(269998, 270000)):
        assert first_mismatch(out[s], rms_norm(heads[s].clone())) is None


@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_another_stream_has_the_same_bits_and_is_the_one_used(spec, dtype, device):
    inputs = sample(spec, dtype, device, 33)
    expected = spec.run(inputs)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        assert not stream.query()
        late = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        out = spec.run(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(out, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize(("spec", "dtype"), SPECS)
def test_another_device_than_the_current_one(spec, dtype):
    inputs = sample(spec, dtype, torch.device("cuda:0"), 33)
    expected = spec.run(inputs)
    with torch.cuda.device(0):
        moved = {k: v.to("cuda:1") if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        out = spec.run(moved)
    assert_same([t.to("cuda:0") for t in out], expected)


def test_stock_norms_vary_here_or_the_control_is_gone(device):
    """The control: cuBLAS gives other bits for few rows on Hopper, and the comparison sees it."""
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("measured on Hopper")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(2048, 4096, generator=generator, device=device).bfloat16()
    weight = torch.randn(4096, 4096, generator=generator, device=device).bfloat16()
    whole = torch.nn.functional.linear(x, weight)
    assert any(
        first_mismatch(torch.nn.functional.linear(x[:rows], weight), whole[:rows]) for rows in (1, 2, 8, 16, 32, 48)
    )
    mine = linear(x, weight)
    for rows in (1, 2, 8, 16, 32, 48):
        assert first_mismatch(linear(x[:rows], weight), mine[:rows]) is None


def test_references_run_on_the_gpu(device):
    x = torch.randn(3, 64, device=device)
    assert rms_norm_reference(x).device == x.device
    assert get_spec("rms_norm").reference is rms_norm_reference
