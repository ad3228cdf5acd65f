"""all_reduce over real processes: the tree over ranks, one result for a row whatever the message, one rank's bits."""

import multiprocessing

import pytest
import torch
import torch.distributed as dist

from batchproof.errors import DtypeError, UnsupportedError
from batchproof.numerics import first_mismatch
from batchproof.ops.all_reduce import all_reduce
from batchproof.ops.linear import add_pieces, linear

ROWS = (1, 2, 7, 64, 257)
K, N, PIECES = 1024, 24, 4


def partials(ranks, dtype=torch.float32):
    """What every rank holds: rows whose sums round differently in every order."""
    generator = torch.Generator().manual_seed(ranks)
    powers = torch.randint(-8, 8, (ranks, max(ROWS), 33), generator=generator)
    return (torch.randn(powers.shape, generator=generator) * 2.0**powers).to(dtype)


def operands():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(65, K, generator=generator), torch.randn(N, K, generator=generator)


def work(rank, ranks, folder):
    """One rank: sums of messages of several sizes, and a layer whose K is split over the ranks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=ranks)
    try:
        sums = {
            (dtype, rows): all_reduce(partials(ranks, dtype)[rank, :rows].t().contiguous().t())
            for dtype in (torch.float32, torch.bfloat16)
            for rows in ROWS
        }
        x, weight = operands()
        part = slice(rank * K // ranks, (rank + 1) * K // ranks)
        layer = None
        if PIECES % ranks == 0:
            mine = linear(x[:, part], weight[:, part], pieces=PIECES // ranks, out_dtype=torch.float32)
            layer = all_reduce(mine)
        torch.save((sums, layer), folder / f"{rank}.pt")
    finally:
        dist.destroy_process_group()


@pytest.fixture(scope="module", params=[1, 2, 3, 4])
def gathered(request, tmp_path_factory):
    """(ranks, for each of them its sums by dtype and rows, and the layer)."""
    ranks, folder = request.param, tmp_path_factory.mktemp("ranks")
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=work, args=(rank, ranks, folder), daemon=True) for rank in range(ranks)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    return ranks, [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


def test_all_ranks_have_the_tree_of_all(gathered):
    ranks, found = gathered
    for (dtype, rows), out in found[0][0].items():
        wanted = add_pieces([part[:rows].float() for part in partials(ranks, dtype)]).to(dtype)
        assert first_mismatch(out, wanted) is None, f"{dtype}, {rows} rows"
        for others, _ in found[1:]:
            assert first_mismatch(others[dtype, rows], out) is None


def test_a_row_has_one_result_in_every_message(gathered):
    _, found = gathered
    sums = found[0][0]
    for (dtype, rows), out in sums.items():
        assert first_mismatch(out, sums[dtype, max(ROWS)][:rows]) is None, f"{dtype}, {rows} rows"


def test_a_layer_split_over_ranks_has_the_bits_of_one_rank(gathered):
    ranks, found = gathered
    if PIECES % ranks:
        pytest.skip(f"{PIECES} pieces are not split over {ranks} ranks")
    x, weight = operands()
    whole = linear(x, weight, pieces=PIECES, out_dtype=torch.float32)
    for _, layer in found:
        assert first_mismatch(layer, whole) is None


def test_the_order_matters_so_the_comparison_can_fail():
    parts = list(partials(4))
    assert first_mismatch(add_pieces(parts), parts[0] + parts[1] + parts[2] + parts[3]) is not None


def test_errors_say_what_is_wanted():
    with pytest.raises(UnsupportedError, match="want init_process_group first"):
        all_reduce(torch.zeros(3))
    with pytest.raises(DtypeError, match=r"tensor is torch\.int64"):
        all_reduce(torch.zeros(3, dtype=torch.int64))
