"""Whole models on the GPU: logits that neither batch, padding nor chunks can move, and receipts of the engine."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, DynamicCache  # noqa: E402

from batchproof.generation.model import Generator  # noqa: E402
from batchproof.integrations.transformers import Request, make_invariant  # noqa: E402
from batchproof.numerics import first_mismatch  # noqa: E402

pytestmark = pytest.mark.gpu
VOCAB = 32000
# two layers of the real ones' shapes
SHAPES = {
    "llama": {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    "qwen3": {
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "gemma3_text": {
        "hidden_size": 1152,
        "intermediate_size": 6912,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 64,
        "layer_types": ["sliding_attention", "full_attention"],
    },
}


@pytest.fixture(scope="module", params=SHAPES)
def model(request):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(
        request.param, num_hidden_layers=2, vocab_size=VOCAB, max_position_embeddings=2048, **SHAPES[request.param]
    )
    built = AutoModelForCausalLM.from_config(config).to("cuda", torch.bfloat16).eval()
    for parameter in built.parameters():
        parameter.data.normal_(0.0, parameter.shape[-1] ** -0.5 if parameter.dim() > 1 else 0.2)
    make_invariant(built)
    return built


def prompts(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, VOCAB, (n,), generator=generator).cuda() for n in lengths]


@torch.no_grad()
def test_prefill_at_once_in_chunks_and_token_by_token(model):
    ids = prompts(300)[0][None]
    whole = model(ids).logits
    for sizes in ([150, 150], [1, 255, 44], [16] * 18 + [12], [1] * 300):
        cache, start = DynamicCache(config=model.config), 0
        for size in sizes:
            logits = model(ids[:, start : start + size], past_key_values=cache, use_cache=True).logits
            found = first_mismatch(logits, whole[:, start : start + size])
            assert found is None, f"chunks of {sizes[:3]}..., tokens from {start}: {found}"
            start += size


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("count", [2, 9, 33, 129])
def test_alone_and_among_others(model, count, side):
    lengths = [40, 1, 200, *((7 * i) % 90 + 1 for i in range(count - 3))][:count]
    rows = prompts(*lengths)
    width = max(lengths)
    pads = [(width - n, 0) if side == "left" else (0, width - n) for n in lengths]
    ids = torch.stack([torch.nn.functional.pad(r, p) for r, p in zip(rows, pads, strict=True)])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(r), p) for r, p in zip(rows, pads, strict=True)])
    positions = (mask.cumsum(-1) - 1).clamp_min(0)
    for order in (torch.arange(count), torch.arange(count).flip(0)):
        chosen = order.cuda()
        logits = model(ids[chosen], attention_mask=mask[chosen], position_ids=positions[chosen]).logits
        for place, i in enumerate(order.tolist()):
            if i < 3 or i == count - 1:
                alone = model(rows[i][None]).logits[0]
                found = first_mismatch(logits[place][mask[i].bool()], alone)
                assert found is None, f"prompt {i} at place {place} of {count}: {found}"


@torch.no_grad()
def test_right_padding_without_positions(model):
    rows = prompts(90, 200)
    ids = torch.stack([torch.nn.functional.pad(rows[0], (0, 110)), rows[1]])
    mask = (torch.arange(200, device="cuda") < torch.tensor([[90], [200]], device="cuda")).long()
    logits = model(ids, attention_mask=mask).logits
    assert first_mismatch(logits[0, :90], model(rows[0][None]).logits[0]) is None


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_receipts_do_not_depend_on_the_batch(dtype):
    generator = Generator.load(None, "cuda", dtype)
    requests = [
        Request(str(i), tuple(range(5, 6 + (13 * i) % 40)), 12, temperature=(i % 3) * 0.5, top_p=0.9, seed=i)
        for i in range(40)
    ]
    receipts = {}
    for batch_size, most_tokens in ((1, 512), (3, 16), (40, 512), (17, 64)):
        engine = generator.engine(batch_size, most_tokens)
        answers = {c.request.id: (c.chain.hexdigest, c.token_ids, c.logprobs) for c in engine.run(requests[::-1])}
        for request_id, answer in answers.items():
            assert receipts.setdefault(request_id, answer) == answer, f"request {request_id} in batches of {batch_size}"
    assert len(receipts) == 40
    assert len({receipt for receipt, _, _ in receipts.values()}) == 40
