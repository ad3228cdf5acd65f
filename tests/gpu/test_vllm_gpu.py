"""Real vLLM, whole models: answers do not change with the company, and stock vLLM's do."""

from importlib.metadata import entry_points
from importlib.util import find_spec

import pytest

pytestmark = pytest.mark.gpu
NEEDED = find_spec("vllm") and any(p.name == "batchproof" for p in entry_points(group="vllm.general_plugins"))


@pytest.fixture(scope="session")
def rows(tmp_path_factory):
    if not NEEDED:
        pytest.skip("needs vLLM, with batchproof installed beside it")
    import vllm_runs

    folder = tmp_path_factory.mktemp("vllm")
    models = vllm_runs.write_models(folder, list(vllm_runs.MODELS))
    return vllm_runs.summarise(vllm_runs.run_all(vllm_runs.JOBS, models, folder))


def test_every_engine_answered(rows):
    assert [row["error"] for row in rows["rows"] if row["error"]] == []


@pytest.mark.parametrize("kind", ["greedy", "seeded"])
def test_no_answer_of_batchproof_changes_a_bit(rows, kind):
    ours = [row for row in rows["rows"] if row["side"] == "batchproof"]
    assert sum(row[f"{kind}_comparisons"] for row in ours) > 0
    assert [row["differences"] for row in ours if row[f"{kind}_differ"]] == []


def test_stock_answers_do_change_so_the_comparison_can_fail(rows):
    assert sum(row["greedy_differ"] for row in rows["rows"] if row["side"] == "stock") > 0


def test_requests_were_preempted(rows):
    """Else the run that is to show that this changes nothing would show nothing."""
    found = {row["side"]: row["preemptions"] for row in rows["rows"] if row["configuration"] == "preempted"}
    assert set(found) == {"stock", "batchproof"}
    assert min(found.values()) > 0


def test_prompts_in_chunks_give_the_bits_of_whole_ones(rows):
    ours = [row for row in rows["chunked_against_whole"] if row["side"] == "batchproof"]
    assert ours
    assert [row["differ"] for row in ours] == [0] * len(ours)
