"""The row kernels, compiled for sm_90 without a GPU: whatever the launch variant, a row is summed by one tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from batchproof.ops._row_launch import VARIANTS, row_plan

PROGRAM = Path(__file__).parent.parent / "layouts.py"
# 128, 256: several rows a program; 512 and 1024: a chunk a row; 4096, 5120, 8192: chunks, the last one partly filled
WIDTHS = (128, 256, 512, 1024, 4096, 5120, 8192)


def layouts(widths):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(PROGRAM), *map(str, widths)]
    return json.loads(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def bits(count, first=0):
    return [1 << bit for bit in range(first, first + count.bit_length() - 1)]


def along(strides, axis, dims):
    return [[stride * (i == axis) for i in range(dims)] for stride in strides]


def expected(entry):
    """The three sums of ``_row_tree``: vectors in a thread, groups over warps, lanes; threads take vectors in order."""
    threads, vec, rows = 32 * entry["warps"], entry["vec"], entry["rows"]
    vectors = threads // rows  # of a row
    place = along(bits(vectors), 1, 3) + along(bits(rows), 0, 3)  # what bit k of a thread's number stands for
    register = along(bits(vec), 2, 3)
    first = {"axis": 2, "shape": [rows, vectors, vec], "register": register, "lane": place[:5], "warp": place[5:]}
    if vectors <= 32:
        flat = [base[1:2] and [base[0], base[1]] for base in place]
        return first, [{"axis": 1, "shape": [rows, vectors], "register": [], "lane": flat[:5], "warp": flat[5:]}]
    groups = vectors // 32
    lane, warp = along(bits(32), 2, 3), along(bits(groups), 1, 3)
    second = {"axis": 1, "shape": [1, groups, 32], "register": [], "lane": lane, "warp": warp}
    return first, [
        second,
        {"axis": 1, "shape": [1, 32], "register": [], "lane": [[0, base[2]] for base in lane], "warp": []},
    ]


def differences(entry):
    """The sums of a compiled kernel that are not the tree's."""
    vectors, rest = expected(entry)
    found = [found for found in entry["sums"] if found["axis"] == 2 and found != vectors]
    return found + [found for found in entry["sums"] if found["axis"] != 2 and found not in rest]


@pytest.fixture(scope="module")
def compiled():
    return layouts(WIDTHS)


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_every_variant_adds_by_one_tree(compiled):
    kernels = {name.split(f", {width}")[0] for name in compiled for width in WIDTHS if f", {width}," in name}
    assert kernels == {
        "norm", "static", "token", "token int8", "block", "layer_norm", "norm, then gate", "gate, then norm",
    }  # fmt: skip
    for name, entry in compiled.items():
        assert entry["sums"], name
        assert differences(entry) == [], name


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_another_layout_would_be_seen(compiled):
    """The control: lanes that swap two vectors, and threads that hold two halves of them."""
    entry = next(entry for name, entry in compiled.items() if name.startswith("norm, 4096, bf16"))
    swapped = json.loads(json.dumps(entry))
    lane = swapped["sums"][0]["lane"]
    lane[0], lane[1] = lane[1], lane[0]
    assert differences(swapped) != []
    assert differences(entry | {"vec": 4}) != []
    assert differences(entry | {"warps": entry["warps"] * 2}) != []


def test_kinds_of_a_width_share_the_tree():
    """Vectors, rows of a program and accumulators make the tree; kinds differ in warps and order of reading only."""
    for width in (1, 100, 128, 256, 512, 1000, 4096, 65536):
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            plans = [row_plan(width, dtype, kind) for kind in VARIANTS]
            assert len({(plan.vec, plan.align, plan.rows, plan.accumulator) for plan in plans}) == 1
            if plans[0].align == 1:
                assert len({plan.variants for plan in plans}) == 1, "unaligned rows have one launch, and so one tree"


@pytest.mark.skipif(torch.version.hip is not None, reason="compiles for NVIDIA GPUs")
def test_a_block_of_softmax_is_summed_by_one_tree_whoever_does_it():
    found = layouts(())
    pairs = [(entry, found[name.replace("walk", "share")]) for name, entry in found.items() if name.endswith("walk")]
    assert len(pairs) == 6
    assert all(walk == share and len(walk) == 1 for walk, share in pairs)
