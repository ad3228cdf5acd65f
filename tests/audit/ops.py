"""Ops that vary with the batch in one known way each, and ops that do not and might be thought to.

Every sum here is a tree of elementwise additions, so that nothing but what is planted varies on any machine.
"""

import functools

import torch
from mutation import Control, Mutant

from batchproof.audit.op import audit_op

WIDTH = 96
ROWS = 300
COUNTER = iter(range(10**9))


def halves(x):
    """Sum of the last axis: the second half is added to the first, and so on."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def pairs(x):
    """Sum of the last axis: each with the one beside it, and so on; other bits than ``halves``."""
    while x.shape[-1] > 1:
        if x.shape[-1] % 2:
            x = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
        x = x[..., ::2] + x[..., 1::2]
    return x[..., 0]


def rms(x, total=halves):
    return x * torch.rsqrt(total(x * x) / x.shape[-1] + 1e-6).unsqueeze(-1)


def product(x, weight, total=halves):
    return total(x.unsqueeze(1) * weight)


def norm_block_size(x, residual, weight):
    """In place, as vLLM's is: another tree of the sum from 256 rows on."""
    residual += x
    return rms(residual, halves if len(x) < 256 else pairs) * weight


def split_k(x, weight):
    """cuBLAS cuts K in two where few rows do not fill the GPU."""
    if len(x) > 48:
        return product(x, weight)
    half = x.shape[1] // 2
    return product(x[:, :half], weight[:, :half]) + product(x[:, half:], weight[:, half:])


def rows_mod_32(x):
    return rms(x, halves if len(x) % 32 == 0 else pairs)


def autotuned(x, weight):
    """The winner of a race held once for every power of two of rows."""
    return product(x, weight, (halves, pairs)[(len(x) - 1).bit_length() % 2])


def float_atomics(x, weight):
    """Partial sums arrive in another order at every call."""
    parts = (x.unsqueeze(1) * weight).chunk(8, -1)
    first = next(COUNTER) % 8
    sums = [halves(part) for part in (*parts[first:], *parts[:first])]
    return functools.reduce(torch.add, sums)


def nan_leak(x):
    """A mask by multiplication: 0 * NaN is NaN."""
    mask = torch.eye(len(x), dtype=x.dtype)
    return (mask.unsqueeze(-1) * x.unsqueeze(0)).amax(1)


def scale_of_the_batch(x):
    """A dynamic per-tensor scale."""
    scale = x.abs().amax() / 127
    return torch.round(x / scale) * scale


def logprobs_from_44(x):
    """A sampler that takes another softmax from 44 sequences on."""
    e = torch.exp(x - x.amax(-1, keepdim=True))
    return torch.log(e / (halves if len(x) < 44 else pairs)(e).unsqueeze(-1))


def shared_stream(logits):
    """One random stream for the batch: the noise of a row is that of its place."""
    noise = torch.rand(logits.shape, generator=torch.Generator().manual_seed(1))
    return torch.argmax(logits - torch.log(-torch.log(noise)), -1)


def operands_swapped(x, weight):
    """An fp8 product whose operands change places below 32 rows, and with them the order of the sum."""
    return product(x, weight, pairs if len(x) < 32 else halves)


def kv_split(query, keys, values):
    """Decode attention that cuts keys in as many pieces as leave the GPU full: 16 programs over the batch."""
    pieces = max(1, 16 // len(query))
    weights = torch.exp(halves(query.unsqueeze(1) * keys)) * 1e-3
    return functools.reduce(torch.add, [halves((w * v.t()).contiguous()) for w, v in _chunks(weights, values, pieces)])


def _chunks(weights, values, pieces):
    """(weights [M, 1, kv], values [kv, d]) of each piece."""
    cut = zip(weights.chunk(pieces, 1), values.chunk(pieces, 0), strict=True)
    return [(w.unsqueeze(1), v) for w, v in cut]


def expert_split(x, weight):
    """A mixture of two experts: split-K follows the tokens an expert got."""
    chosen = x[:, 0] > 0
    out = torch.empty(len(x), len(weight))
    for expert in (True, False):
        own = x[chosen == expert]
        out[chosen == expert] = product(own * (2.0 if expert else 1.0), weight, halves if len(own) > 3 else pairs)
    return out


def all_reduce_by_size(shards):
    """One-shot to 128 rows, a ring from there on: the ranks' parts are added in another order."""
    parts = list(shards.unbind(1))
    return functools.reduce(torch.add, parts if len(shards) <= 128 else parts[1:] + parts[:1])


def reduce_scatter(shards):
    """A ring: each quarter of the batch starts its sum at another rank."""
    parts, quarter = shards.unbind(1), max(1, len(shards) // 4)
    starts = [min(3, row // quarter) for row in range(len(shards))]
    sums = [functools.reduce(torch.add, parts[first:] + parts[:first]) for first in range(4)]
    return torch.stack([sums[first][row] for row, first in enumerate(starts)])


def cascade(query, keys):
    """A prefix that all share is attended to by itself from 8 sequences on."""
    scores = query.unsqueeze(1) * keys
    if len(query) < 8:
        return halves(scores.flatten(1))
    return halves(scores[:, :16].flatten(1)) + halves(scores[:, 16:].flatten(1))


def scalar_tail(x):
    """The last elements of the whole tensor, less than a vector of 16, take another exp."""
    flat = x.flatten()
    whole = flat.numel() // 16 * 16
    return torch.cat([flat[:whole] * 1.1 + 0.3, (flat[whole:] + 0.3 / 1.1) * 1.1]).view(x.shape)


def unaligned(x):
    """Rows that do not start at 16 bytes are read one by one, and summed in another order."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.element_size() % 16 == 0 for stride in x.stride()[:-1])
    return rms(x, halves if aligned else pairs)


def residual_only(x, residual):
    """The output is right, the changed argument is not: from 100 rows on it is rounded once more."""
    out = x + residual
    residual.copy_(out if len(x) < 100 else out.bfloat16().float())
    return out


def unwritten(x, out):
    """The grid is rounded down: rows beyond a multiple of 8 are never written."""
    whole = len(x) if len(x) < 8 else len(x) // 8 * 8
    out[:whole] = x[:whole] * 2


def gemv(x, weight):
    return product(x, weight, pairs if len(x) == 1 else halves)


def block_scale_over_rows(x):
    """A quantisation block of two rows: a row's scale is its neighbour's too."""
    padded = torch.cat([x, torch.zeros(len(x) % 2, x.shape[1])])
    scale = padded.view(-1, 2 * x.shape[1]).abs().amax(1).repeat_interleave(2)[: len(x), None] / 127
    return torch.round(x / scale) * scale


def flush_subnormals(x):
    """A vectorised path from 64 rows on that flushes subnormals to zero."""
    if len(x) < 64:
        return x * 1.5
    return torch.where(x.abs() < torch.finfo(x.dtype).tiny, torch.zeros_like(x), x) * 1.5


def cancellation_only(x):
    """Kahan's correction from 200 rows on: seen only where terms cancel."""
    total = halves(x.double()) if len(x) >= 200 else halves(x).double()
    return (total * 64).round() / 64


def centred(x):
    """The mean over the batch is subtracted, as a batch norm does in training."""
    return x - x.mean(0)


def waves(x, weight):
    """Stream-K: from one full wave of 132 programs on, and for every odd wave, K is cut in two."""
    return product(x, weight, pairs if (len(x) // 132) % 2 else halves)


FP32 = {"x": f"randn[M,{WIDTH}]:fp32"}
PRODUCT = FP32 | {"weight": f"randn[24,{WIDTH}]:fp32"}
SHARDS = {"shards": "randn[M,4,32]:fp32"}


def audit(function, arguments, **options):
    return audit_op(
        function, arguments, rows=ROWS, device="cpu", **{"most_calls": 12, "name": function.__name__} | options
    )


def mutant(function, arguments, seen, relation, threshold=None, classes=None, **options):
    run = functools.partial(audit, function, arguments, **options)
    return Mutant(function.__name__, seen, run, relation, function.__name__, threshold, classes)


MUTANTS = [
    mutant(norm_block_size, FP32 | {"residual": f"randn[M,{WIDTH}]", "weight": f"randn[{WIDTH}]"}, "vLLM 48271",
           "batch size", 256, "1-255 | 256-300"),
    mutant(split_k, PRODUCT, "cuBLAS bf16", "batch size", 49, "1-48 | 49-300"),
    mutant(rows_mod_32, FP32, "Megatron 6521", "batch size", 32, "by M mod 32"),
    mutant(autotuned, PRODUCT, "autotune keyed on rows", "batch size", 2, "1, 3-4, 9-16, 33-64, 129-256 | "
           "2, 5-8, 17-32, 65-128, 257-300"),
    mutant(float_atomics, PRODUCT, "vLLM 30097", "repeat"),
    mutant(nan_leak, FP32, "a mask by multiplication", "neighbours", 2),
    mutant(scale_of_the_batch, FP32, "dynamic per-tensor fp8", "neighbours", 2),
    mutant(logprobs_from_44, FP32, "vLLM 51187", "batch size", 44, "1-43 | 44-300"),
    mutant(shared_stream, {"logits": f"randn[M,{WIDTH}]"}, "multinomial over the batch", "position", 2),
    mutant(operands_swapped, PRODUCT, "vLLM 37718", "batch size", 32, "1-31 | 32-300"),
    mutant(kv_split, {"query": "randn[M,8]", "keys": "randn[64,8]", "values": "randn[64,4]"}, "KV splits by batch",
           "batch size", 2, "1 | 2 | 3 | 4 | 5 | 6-8 | 9-300"),
    mutant(expert_split, PRODUCT, "vLLM 36488", "neighbours"),
    mutant(all_reduce_by_size, SHARDS, "vLLM 50136", "batch size", 129, "1-128 | 129-300"),
    mutant(reduce_scatter, SHARDS, "vLLM 45683", "position", 2),
    mutant(cascade, {"query": "randn[M,8]", "keys": "randn[48,8]"}, "vLLM 32561", "batch size", 8, "1-7 | 8-300"),
    mutant(scalar_tail, {"x": "randn[M,13]"}, "libm on CPUs", "position", 2),
    mutant(unaligned, {"x": "randn[M,96]"}, "Triton's specialisation", "layout"),
    mutant(residual_only, FP32 | {"residual": f"randn[M,{WIDTH}]"}, "in-place results", "batch size", 100),
    mutant(unwritten, FP32 | {"out": f"empty[M,{WIDTH}]"}, "a grid rounded down", "position", 9),
    mutant(gemv, PRODUCT, "another kernel for one row", "batch size", 2, "1 | 2-300"),
    mutant(block_scale_over_rows, FP32, "scales over rows", "neighbours", 2),
    mutant(flush_subnormals, FP32, "flush to zero", "batch size", 64, "1-63 | 64-300"),
    mutant(cancellation_only, FP32, "compensated sums", "batch size", 200, "1-199 | 200-300"),
    mutant(centred, FP32, "batch norm in training", "neighbours", 2),
    mutant(waves, PRODUCT, "stream-K by waves", "batch size", 132, "1-131, 264-300 | 132-263"),
]  # fmt: skip


def fixed_split(x, weight):
    """K is cut in four for every M."""
    return functools.reduce(torch.add, [product(a, b) for a, b in zip(x.chunk(4, 1), weight.chunk(4, 1), strict=True)])


def another_grid(x, weight):
    """Tiles of rows follow M, the order of a sum does not."""
    tile = 16 if len(x) < 100 else 64
    return torch.cat([product(part, weight) for part in x.split(tile)]) if len(x) else product(x, weight)


def per_token_scale(x):
    scale = x.abs().amax(-1, keepdim=True) / 127
    return torch.round(x / scale).to(torch.int8), scale


def keyed_noise(logits, seeds):
    """The noise of a row is a function of its seed."""
    columns = torch.arange(logits.shape[1])
    noise = ((seeds.unsqueeze(-1) * 7919 + columns * 104729) % 1000003 + 0.5) / 1000003
    return torch.argmax(logits - torch.log(-torch.log(noise.double())), -1)


def in_place_norm(x, residual, weight):
    residual += x
    x.copy_(rms(residual) * weight)


def padded_inside(x):
    """Rows are padded to a multiple of 64 with NaN, and cut off again."""
    padding = torch.full((-len(x) % 64, x.shape[1]), float("nan"))
    return rms(torch.cat([x, padding]))[: len(x)]


def masked(x):
    return torch.where(x > 0, x, torch.zeros_like(x))


def with_a_sum_of_the_batch(x):
    """A statistic of the batch beside the rows' results: it is no request's."""
    return rms(x), x.mean()


def batch_last(x):
    return (x * 2.0 + 1.0).abs()


def varlen(x, starts):
    """Heads are rows of a request; where it starts changes nothing."""
    return rms(x) + (starts[1:] - starts[:-1]).repeat_interleave(3).unsqueeze(-1) * 0.0


CONTROLS = [
    Control(function.__name__, functools.partial(audit, function, arguments))
    for function, arguments in [
        (fixed_split, PRODUCT),
        (another_grid, PRODUCT),
        (per_token_scale, FP32),
        (keyed_noise, {"logits": "randn[M,50]", "seeds": "randint(0,1000)[M]"}),
        (in_place_norm, FP32 | {"residual": f"randn[M,{WIDTH}]", "weight": f"randn[{WIDTH}]"}),
        (padded_inside, FP32),
        (masked, {"x": "randn[M,33]:bf16"}),
        (with_a_sum_of_the_batch, FP32),
        (batch_last, {"x": "randn[7,M]"}),
        (varlen, {"x": "randn[3*M,32]", "starts": "arange[M+1]:int32"}),
        (torch.sort, {"input": "randn[M,40]"}),
        (torch.embedding, {"weight": "randn[50,16]", "indices": "randint(0,50)[M]"}),
    ]
]
