"""The Python program that shows a model's variance without the auditor."""

from __future__ import annotations

import contextlib
import io
from typing import Any

import torch

from .subjects import CausalLM, place_of

__all__ = ["program"]

_BATCH = """\
rows = {neighbours}
rows[{place}] = request
alone = model(request[None]).logits[0]
company = model(rows).logits[{place}]
"""
_PADDING = """\
lengths = torch.tensor({lengths}, device=device)
longest = int(lengths.max())
mask = (torch.arange(longest, device=device) >= longest - lengths[:, None]).long()
rows = {neighbours} * mask
rows[{place}, -len(request):] = request
positions = (mask.cumsum(-1) - 1).clamp(min=0)
alone = model(request[None]).logits[0]
company = model(rows, attention_mask=mask{positions}).logits[{place}, -len(request):]
"""
_DECODE = """\
alone_cache, cache = (model(request[None], use_cache=True).past_key_values for _ in range(2))
cache.batch_repeat_interleave({batch})
alone, company = [], []
for tokens in {tokens}:
    ids = torch.tensor(tokens, device=device)[:, None]
    alone.append(model(ids[{place}][None], past_key_values=alone_cache).logits[0])
    company.append(model(ids, past_key_values=cache).logits[{place}])
alone, company = torch.cat(alone), torch.cat(company)
"""
_CHUNKS = """\
alone = model(request[None]).logits[0]
cache, chunks = None, []
for start, end in {cuts}:
    out = model(request[None, start:end], past_key_values=cache, use_cache=True)
    cache = out.past_key_values
    chunks.append(out.logits[0])
company = torch.cat(chunks)
"""


_SHOW = """\
differ = (alone != company).nonzero()
print(len(differ), "of", alone.numel(), "logits differ")
if len(differ):
    token, word = differ[0].tolist()
    a, b = (logits[token, word].item() for logits in (alone, company))
    print(f"first: token {token}, vocabulary {word}: {a!r} against {b!r}")
"""


def program(model: Any, subject: CausalLM, relation: str, request: int, batch: int) -> str | None:
    """Lines that load the model from its path and print the first logit that differs.

    They are run here, on the model as it is: what they print stands last, as comments. None if no logit differs.
    """
    prompt, place = subject.prompts[request], place_of(batch)
    if relation == "batch":
        body = _BATCH.format(place=place, neighbours=_neighbours(subject, batch, len(prompt)))
    elif relation == "padding":
        lengths = subject.lengths(request, batch)
        positions = ", position_ids=positions" if "position_ids" in subject.accepted else ""
        neighbours = _neighbours(subject, batch, max(lengths))
        body = _PADDING.format(place=place, lengths=lengths, neighbours=neighbours, positions=positions)
    elif relation == "decode":
        tokens = [subject.next_tokens(request, batch, True, step)[:, 0].tolist() for step in range(subject.max_tokens)]
        body = _DECODE.format(place=place, batch=batch, tokens=tokens)
    else:
        body = _CHUNKS.format(cuts=subject.cuts(relation, len(prompt)))
    body = f"request = torch.tensor({prompt.tolist()}, device=device)\n{body}{_SHOW}"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(body, {"torch": torch, "model": model, "device": str(subject.device)})
    if printed.getvalue().startswith("0 of"):
        return None
    return "\n".join([*_load(model, subject), body, *(f"# {line}" for line in printed.getvalue().splitlines())])


def _load(model: Any, subject: CausalLM) -> list[str]:
    attention = model.config._attn_implementation
    ours = attention == "batchproof"
    stock = "" if ours else f", attn_implementation={attention!r}"
    load = f"AutoModelForCausalLM.from_pretrained({model.name_or_path!r}, dtype={model.dtype}{stock})"
    return [
        "import torch",
        "from transformers import AutoModelForCausalLM",
        *(["from batchproof.integrations.transformers import make_invariant"] if ours else []),
        "",
        "torch.set_grad_enabled(False)",
        "# The model as it is loaded: other changes that were made to the audited one are missing.",
        f"device = {str(subject.device)!r}",
        f"model = {load}.to(device).eval()",
        *(["make_invariant(model)"] if ours else []),
    ]


def _neighbours(subject: CausalLM, batch: int, tokens: int) -> str:
    if not subject.vary:
        return f"request.repeat({batch}, -(-{tokens} // len(request)))[:, -{tokens}:]"
    generator = f"torch.Generator().manual_seed({subject.seed})"
    return f"torch.randint({subject.vocabulary}, ({batch}, {tokens}), generator={generator}).to(device)"
