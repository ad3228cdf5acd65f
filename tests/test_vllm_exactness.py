"""What is compared of vLLM's answers, and how engines that fail are told: the parts that need no vLLM."""

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import vllm_exactness as exactness
import vllm_runs as runs

sys.path.insert(0, str(Path(__file__).parent.parent / "tools"))
from safetensors import safe_open

import random_checkpoint

JOB = runs.Job("batchproof", "llama fp8", "graphs")
SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32}


def answer(logprob=-1.25, token=5, prompt=-2.5):
    step = {token: SimpleNamespace(logprob=logprob), 7: SimpleNamespace(logprob=-3.0)}
    done = SimpleNamespace(token_ids=[token], logprobs=[step])
    return exactness.answer_of(
        SimpleNamespace(outputs=[done], prompt_logprobs=[None, {5: SimpleNamespace(logprob=prompt)}])
    )


def test_equal_answers_are_equal():
    assert exactness.first_difference(answer(), answer()) is None


@pytest.mark.parametrize(
    "changed",
    [
        answer(logprob=math.nextafter(-1.25, 0.0)),
        answer(token=6),
        answer(prompt=math.nextafter(-2.5, 0.0)),
        answer() | {"tokens": [9]},
        answer() | {"logprobs": answer()["logprobs"] * 2},
    ],
    ids=["logprob", "token of the list", "prompt logprob", "tokens", "length"],
)
def test_the_smallest_change_is_found(changed):
    assert exactness.first_difference(changed, answer()) is not None


def test_minus_zero_is_not_zero():
    assert exactness.first_difference(answer(logprob=-0.0), answer(logprob=0.0)) is not None


def test_prompt_logprobs_that_were_not_asked_for_are_not_compared():
    assert exactness.first_difference(answer() | {"prompt": []}, answer()) is None


def test_weights_that_prove_nothing_are_told():
    assert exactness.is_degenerate([answer(), answer()])


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "engine.py"
        path.write_text(text)
        return path

    return write


def test_an_engine_that_fails_or_hangs_is_an_error_and_the_others_go_on(script, tmp_path, capsys):
    jobs = [JOB, JOB._replace(side="stock"), JOB._replace(configuration="eager")]
    path = script(
        "import json, os, sys, time\n"
        "job, out = sys.argv[1:]\n"
        "if 'stock' in out: raise ValueError('no memory')\n"
        "if 'eager' in out: time.sleep(60)\n"
        "wrote = {'vllm': '0', 'comparisons': [], 'references': [], 'plugins': os.environ['VLLM_PLUGINS']}\n"
        "json.dump(wrote, open(out, 'w'))\n"
    )
    results = runs.run_all(jobs, {"llama fp8": tmp_path}, tmp_path, 3, 3.0, path)
    assert results[jobs[0]]["plugins"] == "batchproof"
    assert "ValueError: no memory" in results[jobs[1]]["error"]
    assert "not done after 3 s" in results[jobs[2]]["error"]


def test_a_summary_counts_what_differs():
    compared = {"prompt": 40, "scenario": "among 3", "position": "last", "kind": "greedy"}
    same, other = compared | {"equal": True, "difference": None}, compared | {"equal": False, "difference": "tokens"}
    whole = {"vllm": "0.26.0", "comparisons": [same, other], "references": [answer()]}
    chunked = whole | {"references": [answer(logprob=-1.5)]}
    summary = runs.summarise({JOB: whole, JOB._replace(configuration="chunked"): chunked})
    assert summary["rows"][0]["greedy_comparisons"] == 2
    assert summary["rows"][0]["greedy_differ"] == 1
    assert summary["rows"][0]["differences"][0]["difference"] == "tokens"
    assert summary["chunked_against_whole"] == [
        {"side": "batchproof", "model": "llama fp8", "comparisons": 1, "differ": 1}
    ]


def test_rows_of_engines_that_were_not_run_again_are_kept_with_their_commit():
    facts = {"device": "a GPU", "vllm": "0.26.0", "torch": "2.11.0"}

    def result(commit, differ, *jobs):
        rows = [job._asdict() | {"greedy_differ": differ} for job in jobs]
        across = [{"side": "batchproof", "model": "llama fp8", "comparisons": 1, "differ": differ}]
        return facts | {"commit": commit, "rows": rows, "chunked_against_whole": across}

    stock, eager = JOB._replace(side="stock"), JOB._replace(configuration="eager")
    joined = runs.with_rows_of(result("old", 1, JOB, stock), result("new", 0, eager, JOB))
    assert [(row["side"], row["configuration"], row["commit"], row["greedy_differ"]) for row in joined["rows"]] == [
        ("stock", "graphs", "old", 1), ("batchproof", "graphs", "new", 0), ("batchproof", "eager", "new", 0),
    ]  # fmt: skip
    assert [(row["commit"], row["differ"]) for row in joined["chunked_against_whole"]] == [("new", 0)]
    assert joined["commit"] == "new"
    with pytest.raises(SystemExit, match=r"of vllm 0.25.0, want 0.26.0"):
        runs.with_rows_of(result("old", 1, JOB) | {"vllm": "0.25.0"}, result("new", 0, JOB))


@pytest.mark.parametrize("family", random_checkpoint.FAMILIES)
def test_a_checkpoint_loads_into_the_model_of_its_family(family, tmp_path):
    transformers = pytest.importorskip("transformers")
    random_checkpoint.write_checkpoint(tmp_path, family, layers=1, vocab=64, **SMALL)
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    logits = model(torch.arange(8)[None]).logits.float()
    assert 0.05 < logits.std() < 20


def test_fp8_weights_use_the_whole_range_of_their_scale(tmp_path):
    random_checkpoint.write_checkpoint(tmp_path, "llama", fp8=True, layers=1, vocab=64, **SMALL)
    with safe_open(tmp_path / "model.safetensors", "pt") as tensors:
        weight = tensors.get_tensor("model.layers.0.mlp.up_proj.weight")
        scale = tensors.get_tensor("model.layers.0.mlp.up_proj.weight_scale")
    assert weight.dtype == torch.float8_e4m3fn
    assert weight.float().abs().max() == 448
    assert 0.02 < (weight.float() * scale).std() < 0.04
