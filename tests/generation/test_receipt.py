"""A receipt is the documented hash chain and nothing else, and everything that decides an answer is in it."""

import hashlib
import json
import struct
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from batchproof import __version__
from batchproof.generation.receipt import ReceiptChain, environment, model_digest

MODEL = "ab" * 32
PARAMETERS = {"max_tokens": 4, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "seed": 1, "stop": ["\u00e9"]}
STEPS = ((b"\x00\x01\x02\x03", 5), (b"\x04\x05\x06\x07", 2047))
STATE = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a.weight": torch.tensor([1.0, -2.0, 0.0], dtype=torch.bfloat16),
}
CONFIG = {"hidden_size": 3, "rope_parameters": {"rope_theta": 10000.0}}


def chain(model=MODEL, prompt_ids=(12, 3), parameters=PARAMETERS, dtype=torch.bfloat16, steps=STEPS):
    result = ReceiptChain(model, prompt_ids, parameters, dtype)
    for logits, token in steps:
        result.add(logits, token)
    return result.hexdigest


def by_the_formula(header, steps):
    """The module's docstring, read afresh: hashlib only."""
    text = json.dumps(header, sort_keys=True, separators=(",", ":"))
    h = hashlib.sha256(b"batchproof receipt 1\n" + text.encode("ascii")).digest()
    for logits, token in steps:
        h = hashlib.sha256(h + logits + struct.pack("<I", token)).digest()
    return h.hex()


@pytest.mark.parametrize("steps", [(), STEPS[:1], STEPS, STEPS * 20], ids=len)
def test_the_chain_is_the_documented_formula(steps):
    header = {"logits_dtype": "bfloat16", "model": MODEL, "parameters": PARAMETERS, "prompt_ids": [12, 3]}
    assert chain(steps=steps) == by_the_formula(header, steps)


def test_the_chain_takes_bytes_and_memoryviews_alike():
    assert chain(steps=[(memoryview(logits), token) for logits, token in STEPS]) == chain()


@pytest.mark.parametrize("key", ["greedy", "seed 1", "top_p", "chat"])
def test_a_completions_receipt_is_the_formula_over_the_logits_of_a_plain_forward(built_in, completions_alone, key):
    completion = completions_alone[key]
    request = completion.request
    ids = [*request.prompt_ids, *completion.token_ids[:-1]]
    with torch.no_grad():
        logits = built_in.model(torch.tensor([ids], device=built_in.model.device)).logits[0]
    rows = logits[len(request.prompt_ids) - 1 :].cpu().contiguous().view(torch.uint8)
    names = ("max_tokens", "temperature", "top_p", "top_k", "seed")
    header = {
        "logits_dtype": str(built_in.model.dtype).removeprefix("torch."),
        "model": built_in.digest,
        "parameters": {**{name: getattr(request, name) for name in names}, "stop": list(request.stop)},
        "prompt_ids": list(request.prompt_ids),
    }
    steps = [(row.numpy().tobytes(), token) for row, token in zip(rows, completion.token_ids, strict=True)]
    assert completion.chain.hexdigest == by_the_formula(header, steps)


@pytest.mark.parametrize(
    "change",
    [
        {"model": "ab" * 31 + "ac"},
        {"prompt_ids": (12, 4)},
        {"prompt_ids": (3, 12)},
        {"prompt_ids": (1, 23)},
        {"prompt_ids": (12,)},
        {"dtype": torch.float16},
        {"parameters": {**PARAMETERS, "max_tokens": 5}},
        {"parameters": {**PARAMETERS, "temperature": 0.5000000000000001}},
        {"parameters": {**PARAMETERS, "top_p": 0.8999999999999999}},
        {"parameters": {**PARAMETERS, "top_k": 4}},
        {"parameters": {**PARAMETERS, "seed": -1}},
        {"parameters": {**PARAMETERS, "stop": []}},
        {"parameters": {**PARAMETERS, "stop": ["e\u0301"]}},
        {"steps": ((b"\x01\x01\x02\x03", 5), STEPS[1])},  # a bit of the first row
        {"steps": (STEPS[0], (b"\x04\x05\x06\x87", 2047))},  # the sign of the last row's last value
        {"steps": ((STEPS[0][0], 4), STEPS[1])},
        {"steps": (STEPS[0], (STEPS[1][0], 2046))},
        {"steps": STEPS[::-1]},
        {"steps": STEPS[:1]},
        {"steps": (*STEPS, STEPS[1])},
    ],
    ids=str,
)
def test_any_change_changes_the_receipt(change):
    assert chain(**change) != chain()


def test_the_order_of_parameters_and_the_type_of_the_prompt_do_not_change_it():
    assert chain(parameters=dict(reversed(PARAMETERS.items())), prompt_ids=[12, 3]) == chain()


def flip_a_bit(state, name):
    changed = {key: value.clone() for key, value in state.items()}
    changed[name].view(torch.uint8).view(-1)[0] ^= 1
    return changed


def test_a_models_digest_does_not_depend_on_the_order_of_names_or_on_strides():
    reordered = dict(reversed(STATE.items()))
    reordered["b.weight"] = STATE["b.weight"].t().contiguous().t()
    assert not reordered["b.weight"].is_contiguous()
    assert model_digest(reordered, dict(reversed(CONFIG.items()))) == model_digest(STATE, CONFIG)


@pytest.mark.parametrize(
    "noise",
    [
        {"_name_or_path": "/elsewhere"},
        {"transformers_version": "99.0"},
        {"dtype": "float32"},
        {"torch_dtype": "float32"},
        {"architectures": ["X"]},
        {"_attn_implementation": "eager"},
    ],
    ids=str,
)
def test_a_models_digest_leaves_out_what_changes_no_logit(noise):
    assert model_digest(STATE, {**CONFIG, **noise}) == model_digest(STATE, CONFIG)


@pytest.mark.parametrize("name", sorted(STATE))
def test_a_models_digest_sees_one_bit_of_one_weight(name):
    assert model_digest(flip_a_bit(STATE, name), CONFIG) != model_digest(STATE, CONFIG)


@pytest.mark.parametrize(
    "state",
    [
        {**STATE, "a.weight": torch.tensor([1.0, -2.0, -0.0], dtype=torch.bfloat16)},
        {**STATE, "a.weight": STATE["a.weight"].half()},
        {**STATE, "b.weight": STATE["b.weight"].reshape(3, 2)},
        {**STATE, "b.weight": STATE["b.weight"].view(torch.int32)},
        {"b.weight": STATE["b.weight"]},
        {"a.weight": STATE["a.weight"], "c.weight": STATE["b.weight"]},
        {**STATE, "c": torch.zeros(0)},
    ],
    ids=["minus zero", "dtype", "shape", "reinterpreted", "one less", "renamed", "an empty one more"],
)
def test_a_models_digest_sees_names_dtypes_shapes_and_signs_of_zero(state):
    assert model_digest(state, CONFIG) != model_digest(STATE, CONFIG)


@pytest.mark.parametrize("change", [{"hidden_size": 4}, {"rope_parameters": {"rope_theta": 1e6}}, {"eps": 1}], ids=str)
def test_a_models_digest_sees_its_configuration(change):
    assert model_digest(STATE, {**CONFIG, **change}) != model_digest(STATE, CONFIG)


def test_a_model_has_the_same_digest_before_and_after_it_is_made_invariant(built_in):
    assert model_digest(built_in.model.state_dict(), built_in.model.config.to_dict()) == built_in.digest
    assert len(bytes.fromhex(built_in.digest)) == 32


def test_the_environment_says_what_decides_bits(built_in):
    there = environment(built_in.model.device, built_in.model.dtype)
    assert there == built_in.environment
    assert list(there) == ["device", "dtype", "torch", "triton", "transformers", "batchproof"]
    assert there["dtype"] == "bfloat16"
    assert there["torch"] == torch.__version__
    assert there["batchproof"] == __version__
    assert all(isinstance(value, str) and value for value in there.values())


def test_the_environment_names_the_processor_and_a_package_that_is_missing(monkeypatch):
    def missing(package):
        raise PackageNotFoundError(package)

    monkeypatch.setattr("batchproof.generation.receipt.version", missing)
    there = environment(torch.device("cpu"), torch.float16)
    assert there["device"].startswith("cpu ")
    assert (there["dtype"], there["triton"]) == ("float16", "none")
