"""Continuous batching of every model family: receipts do not depend on the batch, and are those of a plain generate."""

import gc

import pytest
import torch
import transformers

from batchproof.generation.receipt import ReceiptChain
from batchproof.integrations.transformers import Engine, Request, make_invariant

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "initializer_range": 0.3,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {  # windows of 16 are shorter than most prompts below
    "Llama": ("LlamaConfig", {"num_hidden_layers": 2, "rope_parameters": LLAMA3_ROPE}),
    "Mistral": ("MistralConfig", {"num_hidden_layers": 2, "sliding_window": 16, "head_dim": 16}),
    "Qwen2": ("Qwen2Config", {"num_hidden_layers": 2}),
    "Qwen3": ("Qwen3Config", {"num_hidden_layers": 2, "head_dim": 16}),
    "Gemma2": ("Gemma2Config", {"num_hidden_layers": 4, "sliding_window": 16, "head_dim": 16}),
    "Gemma3": ("Gemma3TextConfig", {"num_hidden_layers": 6, "sliding_window": 16, "head_dim": 16}),
}
PROMPT_LENGTHS = (3, 40, 17, 100, 16, 1, 64, 33)
NEW_TOKENS = 8


class Numbers:
    """A tokenizer whose text is the token ids."""

    def decode(self, token_ids, skip_special_tokens=True):
        return " ".join(map(str, token_ids))


def new_chain(request):
    return ReceiptChain("a model", request.prompt_ids, {}, torch.bfloat16)


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    config_name, extra = FAMILIES[request.param]
    config = getattr(transformers, config_name)(**SIZES, **extra)
    torch.manual_seed(0)
    model = getattr(transformers, f"{request.param}ForCausalLM")(config).to(torch.bfloat16).eval()
    make_invariant(model.to("cuda" if torch.cuda.is_available() else "cpu"))
    return model


@pytest.fixture(scope="module")
def requests():
    generator = torch.Generator().manual_seed(1)
    prompts = [tuple(torch.randint(3, 512, (n,), generator=generator).tolist()) for n in PROMPT_LENGTHS]
    return [Request(str(i), ids, NEW_TOKENS, temperature=i % 2 * 0.9, seed=i) for i, ids in enumerate(prompts)]


def receipts(model, requests, batch_size, max_batch_tokens=512):
    engine = Engine(model, Numbers(), new_chain, batch_size, max_batch_tokens)
    return {completion.request.id: completion.chain.hexdigest for completion in engine.run(requests)}


def test_receipts_do_not_depend_on_the_batch(model, requests):
    alone = receipts(model, requests, batch_size=1)
    for batch_size, max_batch_tokens in ((2, 512), (3, 8), (8, 30), (8, 512)):
        shuffled = requests[batch_size:] + requests[:batch_size]
        assert receipts(model, shuffled, batch_size, max_batch_tokens) == alone


def test_receipts_are_those_of_a_plain_generate(model, requests):
    greedy = [request for request in requests if request.temperature == 0.0]
    together = receipts(model, greedy, batch_size=len(greedy))
    for request in greedy:
        ids = torch.tensor([request.prompt_ids], device=model.device)
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=0,
            eos_token_id=None,
            output_logits=True,
            return_dict_in_generate=True,
        )
        chain = new_chain(request)
        for logits, token in zip(out.logits, out.sequences[0, ids.shape[1] :].tolist(), strict=True):
            row = logits[0].to(torch.bfloat16).cpu().contiguous()
            chain.add(row.view(torch.uint8).numpy().data, token)
        assert chain.hexdigest == together[request.id]


def test_a_changed_token_changes_the_receipt(model, requests):
    """The comparison above can fail."""
    other = Request("0", (4, *requests[0].prompt_ids[1:]), NEW_TOKENS)
    assert receipts(model, [other], 1)["0"] != receipts(model, requests[:1], 1)["0"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the collection is left as it is")
def test_the_end_of_a_run_collects_no_garbage_of_before(model, requests, monkeypatch):
    """transformers collects garbage when a batch processor goes: of a large process, that takes as long as the run."""
    seen, collect = [], gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: seen.append(gc.get_freeze_count()) or collect(*args))
    list(Engine(model, Numbers(), new_chain).run(requests[:2]))
    assert seen
    assert all(count > 10000 for count in seen), seen
    assert gc.get_freeze_count() == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU the collection is left as it is")
def test_objects_that_somebody_has_frozen_stay_frozen(model, requests):
    gc.freeze()
    try:
        before = gc.get_freeze_count()
        list(Engine(model, Numbers(), new_chain).run(requests[:1]))
        assert before >= gc.get_freeze_count() > before // 2  # some have gone of themselves
    finally:
        gc.unfreeze()
