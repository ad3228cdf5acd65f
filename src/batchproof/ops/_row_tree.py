"""One row in pieces, and its sum by one tree, whatever number of threads takes it: what the norms' kernels are made of.

A row is cut in vectors of 16 bytes (VEC elements) and those in groups of 32, a group being what one warp loads at
once. The sum of a row is taken in this order, which no launch can change:

1. the VEC elements of a vector, in ascending order;
2. vectors with the same place in their group, over the groups: group g with group g + G/2, then g + G/4, and so on,
   G being the number of groups rounded up to a power of two (groups past the end of the row are zeros, and x + 0 = x);
3. the 32 sums that are left, halves first.

Step 2 splits where the warps of a launch split: groups that one warp holds are added in its registers, those of
different warps through shared memory, the same additions either way. So the number of warps is free, and with it the
launch may follow the number of tokens. The additions within a warp and between warps are those of ``tl.sum``; a test
compiles every launch and compares their layouts, and another compares their bits.
"""

from __future__ import annotations

from ._triton import tl, triton

__all__ = [
    "AT_ONCE",
    "LATER",
    "along_rows",
    "chunk_of",
    "launch_dependents",
    "load_chunks",
    "load_rows",
    "normalised",
    "row_mean",
    "row_rstd",
    "rows_of_program",
    "rsqrt_exact",
    "vector_sums",
    "wait_for_inputs",
]

# What kernels are told in PDL, beside 0: when the next kernel's programs are let in
LATER, AT_ONCE = tl.constexpr(1), tl.constexpr(2)


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Until the kernels before this one are complete. Nothing is read or written before, not even weights."""
    if PDL == AT_ONCE:
        tl.extra.cuda.gdc_launch_dependents()
    if PDL:
        tl.extra.cuda.gdc_wait()


@triton.jit
def launch_dependents(PDL: tl.constexpr):
    """Let the next kernel's programs take their places; they wait for this kernel's end before they read."""
    if PDL == LATER:
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def rows_of_program(num_rows, num_inner, ROWS: tl.constexpr, FLAT: tl.constexpr):
    """This program's rows [ROWS, 1], which of them there are, and where they are on the two axes of rows.

    A program of one row has it. Dividing takes longer than all the rest before the first load, so FLAT rows, those of
    one axis, do without.
    """
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)[:, None]
    if ROWS == 1:
        row_mask = True
    else:
        row_mask = row < num_rows
    if FLAT:
        outer = row.to(tl.int64)
        inner = row * 0
    else:
        outer = (row // num_inner).to(tl.int64)
        inner = row % num_inner
    return row, row_mask, outer, inner


@triton.jit
def vector_sums(values, CHUNK: tl.constexpr, VEC: tl.constexpr):
    """Step 1: [ROWS, ...] of CHUNK elements a row to [ROWS, CHUNK / VEC]."""
    return tl.sum(tl.reshape(values, [values.shape[0], CHUNK // VEC, VEC]), axis=2)


@triton.jit
def _fold(parts, HALF: tl.constexpr):
    """One level of step 2 over a tuple of chunks: the chunk HALF further on is added, where there is one."""
    folded = ()
    for i in tl.static_range(HALF):
        if i + HALF < len(parts):
            folded = folded + (parts[i] + parts[i + HALF],)
        elif i < len(parts):
            folded = folded + (parts[i],)
    return folded


@triton.jit
def row_mean(parts, HIDDEN: tl.constexpr, CHUNKS_2: tl.constexpr):
    """Steps 2 and 3, over HIDDEN: a tuple of up to CHUNKS_2 (a power of two) times [ROWS, warps * 32] to [ROWS]."""
    for level in tl.static_range(1, 9):
        if (CHUNKS_2 >> level) > 0:
            parts = _fold(parts, CHUNKS_2 >> level)
    lanes = parts[0]
    ROWS: tl.constexpr = lanes.shape[0]
    LANES: tl.constexpr = lanes.shape[1]
    if LANES > 32:
        lanes = tl.sum(tl.reshape(lanes, [ROWS, LANES // 32, 32]), axis=1)
    total = tl.sum(lanes, axis=1)
    if (HIDDEN & (HIDDEN - 1)) == 0:
        mean = total * (1.0 / HIDDEN)  # exactly the quotient, and sooner there
    elif total.dtype == tl.float64:
        mean = total / HIDDEN
    else:
        mean = tl.div_rn(total, tl.full(total.shape, HIDDEN, tl.float32))
    return mean


@triton.jit
def along_rows(statistic):
    """[ROWS] as what rows [ROWS, n] are computed with: [ROWS, 1], or for one row a scalar.

    A scalar has no layout. A tensor has the one its sum left it in, and Triton may bring the whole row into that one,
    which is a shuffle for every element, and another tree where a sum follows.
    """
    if statistic.shape[0] == 1:
        result = tl.sum(statistic, axis=0)  # of one element: no addition
    else:
        result = statistic[:, None]
    return result


@triton.jit
def rsqrt_exact(x):
    """1 / sqrt(x) with both operations rounded as IEEE 754 says, in fp32 or fp64."""
    if x.dtype == tl.float64:
        root = 1.0 / tl.sqrt(x)
    else:
        root = tl.div_rn(1.0, tl.sqrt_rn(x))
    return root


@triton.jit
def row_rstd(parts, eps, HIDDEN: tl.constexpr, CHUNKS_2: tl.constexpr):
    """1 / sqrt(mean of squares + eps) of rows, [ROWS], from what ``row_mean`` takes; eps is fp64, and rounded here."""
    mean = row_mean(parts, HIDDEN, CHUNKS_2)
    return rsqrt_exact(mean + tl.full(mean.shape, eps, mean.dtype))


@triton.jit
def load_rows(
    x_ptr, residual_ptr, residual_out_ptr, weight_ptr, columns, row_mask,
    HIDDEN: tl.constexpr, CHUNK: tl.constexpr, CHUNKS: tl.constexpr, VEC: tl.constexpr, ACC: tl.constexpr,
    AHEAD: tl.constexpr, HOLD: tl.constexpr, LATE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """The rows' chunks in the activation dtype (where HOLD), their weights (where AHEAD), and their sums of squares.

    Row pointers and mask are [ROWS, 1], columns [1, CHUNK], or both with one axis more. A residual is added, and the
    rounded sum stored and returned in x's place. AHEAD chunks are on their way before the first is used: all of them
    where latency counts; none where rows are many, so that reads and writes alternate, which HBM likes better.
    """
    loaded = ()
    residuals = ()
    weights = ()
    values = ()
    parts = ()
    for i in tl.static_range(CHUNKS + AHEAD):
        if i < CHUNKS:
            at = i * CHUNK + columns
            mask = (at < HIDDEN) & row_mask
            loaded = loaded + (tl.load(x_ptr + at, mask=mask, other=0.0),)
            if residual_ptr is not None:
                residuals = residuals + (tl.load(residual_ptr + at, mask=mask, other=0.0),)
            if AHEAD > 0 and weight_ptr is not None:
                weights = weights + (tl.load(weight_ptr + at, mask=at < HIDDEN, other=0.0),)
            if i == CHUNKS - 1 and not LATE:
                launch_dependents(PDL)
        if i >= AHEAD:
            value = loaded[i - AHEAD]
            if residual_ptr is not None:
                at = (i - AHEAD) * CHUNK + columns
                mask = (at < HIDDEN) & row_mask
                value = (value.to(ACC) + residuals[i - AHEAD].to(ACC)).to(value.dtype)
                tl.store(residual_out_ptr + at, value, mask=mask)
            if HOLD:
                values = values + (value,)
            wide = value.to(ACC)
            parts = parts + (vector_sums(wide * wide, CHUNK, VEC),)
    if LATE:
        launch_dependents(PDL)
    return values, weights, parts


@triton.jit
def load_chunks(ptr, columns, row_mask, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, COUNT: tl.constexpr):
    """The first COUNT chunks of rows or of a weight: all of them, or none where ``chunk_of`` will read them in turn."""
    chunks = ()
    if ptr is not None:
        for i in tl.static_range(COUNT):
            at = i * CHUNK + columns
            chunks = chunks + (tl.load(ptr + at, mask=(at < HIDDEN) & row_mask, other=0.0),)
    return chunks


@triton.jit
def chunk_of(chunks, ptr, columns, row_mask, i: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr):
    """Chunk i of rows or of a weight: what ``load_chunks`` returned, or else read now."""
    if len(chunks) > 0:
        chunk = chunks[i]
    else:
        at = i * CHUNK + columns
        chunk = tl.load(ptr + at, mask=(at < HIDDEN) & row_mask, other=0.0)
    return chunk


@triton.jit
def scale_row(value, rstd, weight, GEMMA: tl.constexpr):
    """``value`` [ROWS, n] normalised, with the roundings of Llama or Gemma; ``weight`` [1, n] or None."""
    y = value.to(rstd.dtype) * rstd
    if weight is not None:
        if GEMMA:
            y = y * (1.0 + weight.to(rstd.dtype))
        else:
            y = y.to(value.dtype).to(rstd.dtype) * weight.to(rstd.dtype)
    return y.to(value.dtype)


@triton.jit
def normalised(
    values, weights, source_ptr, weight_ptr, columns, row_mask, rstd,
    i: tl.constexpr, HIDDEN: tl.constexpr, CHUNK: tl.constexpr, GEMMA: tl.constexpr,
):  # fmt: skip
    """Chunk i of the normalised rows, from what ``load_rows`` returned; what it did not hold is read again."""
    value = chunk_of(values, source_ptr, columns, row_mask, i, HIDDEN, CHUNK)
    weight = None
    if weight_ptr is not None:
        weight = chunk_of(weights, weight_ptr, columns, True, i, HIDDEN, CHUNK)
    return scale_row(value, rstd, weight, GEMMA)
