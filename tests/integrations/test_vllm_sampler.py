"""vLLM's sampler over ours, on a sampler with the interface of vLLM's: tokens, logprobs, and what is left to vLLM."""

import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from batchproof.integrations.vllm import log
from batchproof.integrations.vllm.hooks import HOOKS
from batchproof.numerics import bits_equal
from batchproof.ops.logprobs import log_softmax
from batchproof.ops.sample import sample

HOOK = next(hook for hook in HOOKS if hook.name == "sampler")
VOCAB, REQUESTS = 301, 16
GPU = "vllm.v1.worker.gpu"


class Table:
    """A parameter of every request: the host's, and the GPU's copy as of the last ``copy_to_uva``."""

    def __init__(self, dtype, value=0):
        self.np = torch.full((REQUESTS,), value, dtype=dtype).numpy()
        self.copies = 0
        self.copy_to_uva()

    def copy_to_uva(self):
        self.gpu = torch.from_numpy(self.np.copy())
        self.copies += 1


class SamplingStates:
    def __init__(self):
        self.vocab_size = VOCAB
        self.temperature, self.top_k = Table(torch.float32), Table(torch.int32, VOCAB)
        self.top_p, self.min_p = Table(torch.float32, 1), Table(torch.float32)
        self.seeds = Table(torch.int64)
        self.num_logprobs = np.full(REQUESTS, -1, dtype=np.int32)

    def max_num_logprobs(self, requests):
        return int(self.num_logprobs[requests].max())


class Sampler:
    """As vLLM 0.26 has it, but for what it draws: vLLM's tokens are all -7."""

    def __init__(
        self, max_num_reqs, vocab_size, device, req_states, logprobs_mode="raw_logprobs", num_speculative_tokens=1,
        use_fp64_gumbel=False,
    ):  # fmt: skip
        self.logprobs_mode = logprobs_mode
        self.compute_nans = False
        self.use_fp64_gumbel = use_fp64_gumbel
        self.req_states = req_states
        self.sampling_states = SamplingStates()
        self.penalties_state = SimpleNamespace(use_penalty=np.zeros(REQUESTS, dtype=bool), apply_penalties=self.keep)
        self.logit_bias_state = SimpleNamespace(
            use_logit_bias=np.zeros(REQUESTS, dtype=bool), apply_logit_bias=self.ban
        )
        self.bad_words_state = SimpleNamespace(num_bad_words=Table(torch.int32), apply_bad_words=self.keep)
        self.logprob_token_ids_state = SimpleNamespace(
            num_token_ids=Table(torch.int32), max_num_token_ids=lambda requests: 0
        )
        self.num_speculative_tokens = num_speculative_tokens
        self.use_flashinfer = False

    def keep(self, logits, requests, requests_np, input_ids, local_pos):
        assert input_ids.tolist() == list(range(100, 100 + len(requests_np)))

    def ban(self, logits, requests, requests_np, positions):
        """The bias here: never the position."""
        rows = np.nonzero(self.logit_bias_state.use_logit_bias[requests_np])[0]
        logits[rows, positions[rows]] = -torch.inf

    def add_request(self, req_idx, prompt_len, sampling_params):
        states = self.sampling_states
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
            getattr(states, name).np[req_idx] = sampling_params[name]
        states.num_logprobs[req_idx] = sampling_params.get("logprobs", -1)
        self.logit_bias_state.use_logit_bias[req_idx] = sampling_params.get("bias", False)

    def apply_staged_writes(self):
        for name in ("temperature", "top_k", "top_p", "min_p", "seeds"):
            getattr(self.sampling_states, name).copy_to_uva()

    def __call__(self, logits, input_batch):
        return SimpleNamespace(sampled_token_ids=torch.full((len(logits), 1), -7))


@dataclass
class InputBatch:
    idx_mapping: torch.Tensor
    idx_mapping_np: np.ndarray
    expanded_local_pos: torch.Tensor
    positions: torch.Tensor
    logits_indices: torch.Tensor
    input_ids: torch.Tensor
    seq_lens: torch.Tensor
    num_reqs: int
    is_prefilling_np: np.ndarray
    cu_num_logits: torch.Tensor


@dataclass
class SamplerOutput:
    sampled_token_ids: torch.Tensor
    logprobs_tensors: tuple
    num_nans: torch.Tensor | None
    num_sampled: torch.Tensor
    num_rejected: torch.Tensor


def compute_topk_scores(
    logits, num_logprobs, sampled_token_ids, cu_num_logits=None, logprob_token_ids_state=None,
    expanded_idx_mapping=None, max_per_req_token_ids=0, logits_mode=False,
):  # fmt: skip
    scores = logits.float() if logits_mode else log_softmax(logits.float())
    return scores.gather(1, sampled_token_ids.unsqueeze(1)), num_logprobs


def get_num_sampled_and_rejected(num_sampled, seq_lens, cu_num_logits, idx_mapping, prefill_len):
    whole = seq_lens[: len(num_sampled)] >= prefill_len[idx_mapping]
    return num_sampled * whole, torch.zeros_like(num_sampled)


@pytest.fixture
def vllm(monkeypatch):
    """A fresh vLLM, as far as sampling goes."""
    fresh = type("Sampler", (), {**vars(Sampler)})
    contents = {
        f"{GPU}.sample.sampler": {"Sampler": fresh},
        f"{GPU}.sample.logprob": {"compute_topk_scores": compute_topk_scores},
        f"{GPU}.sample.output": {"SamplerOutput": SamplerOutput},
        f"{GPU}.input_batch": {
            "InputBatch": InputBatch, "get_num_sampled_and_rejected": get_num_sampled_and_rejected,
        },
        f"{GPU}.metrics.logits": {"get_num_nans": lambda logits: logits.isnan().sum(-1)},
    }  # fmt: skip
    for package in ("vllm", "vllm.v1", "vllm.v1.worker", GPU, f"{GPU}.sample", f"{GPU}.metrics"):
        contents.setdefault(package, {})
    for name, names in contents.items():
        module = ModuleType(name)
        vars(module).update(names)
        monkeypatch.setitem(sys.modules, name, module)
    log.say_that_it_stays_vllms.cache_clear()
    return fresh


@pytest.fixture
def hooked(vllm):
    assert HOOK.probe() is None
    HOOK.install()
    HOOK.install()
    assert HOOK.probe() is None
    return vllm


ASKED = [
    {"temperature": 0.0}, {"temperature": 1.0, "seeds": 5}, {"temperature": 0.7, "seeds": -3, "top_k": 4},
    {"temperature": 1.3, "seeds": 2**40 + 1, "top_p": 0.6}, {"temperature": 1.0, "seeds": 9, "min_p": 0.2},
    {"temperature": 1.0, "seeds": 7, "bias": True}, {"temperature": 0.9, "seeds": 8, "logprobs": 3},
    {"temperature": 1.0, "seeds": 11, "top_k": 3, "logprobs": 0, "bias": True},
]  # fmt: skip
PREFILL = 5


def engine(sampler, **options):
    """A sampler to which ``ASKED`` were added, request 2 * i asking for ASKED[i]."""
    states = SimpleNamespace(prefill_len=SimpleNamespace(gpu=torch.full((REQUESTS,), PREFILL, dtype=torch.int32)))
    made = sampler(max_num_reqs=REQUESTS, vocab_size=VOCAB, device=torch.device("cpu"), req_states=states, **options)
    neutral = {"temperature": 1.0, "top_k": VOCAB, "top_p": 1.0, "min_p": 0.0, "seeds": 0}
    for i, asked in enumerate(ASKED):
        made.add_request(2 * i, PREFILL, neutral | asked)
    made.apply_staged_writes()
    return made


def step(sampler, logits, chosen, lengths):
    """One step of the requests that ask for ASKED[chosen], whose sequences have ``lengths`` with its tokens."""
    requests = np.array([2 * i for i in chosen], dtype=np.int32)
    n = len(chosen)
    seq_lens = torch.tensor([*lengths, 0, 0], dtype=torch.int32)  # padded for a CUDA graph
    batch = InputBatch(
        torch.from_numpy(requests), requests, torch.zeros(n, dtype=torch.int32), (seq_lens[:n] - 1).long(),
        torch.arange(n), torch.arange(100, 100 + n, dtype=torch.int32), seq_lens, n,
        np.array([length <= PREFILL for length in lengths], dtype=bool), torch.arange(n + 1, dtype=torch.int32),
    )  # fmt: skip
    return sampler(logits[chosen].clone(), batch)


@pytest.fixture
def logits(generator):
    return torch.randn(len(ASKED), VOCAB, generator=generator) * 3.0


ALL, LENGTHS = list(range(len(ASKED))), [9, 6, 300, 17, 8, 40, 77, 200]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_those_of_sample(hooked, logits, dtype):
    logits = logits.to(dtype)
    found = step(engine(hooked), logits, ALL, LENGTHS)
    biased = logits.clone()
    for row in (5, 7):
        biased[row, LENGTHS[row] - 1] = -torch.inf
    column = {name: [asked.get(name, default) for asked in ASKED] for name, default in (
        ("seeds", 0), ("temperature", 1.0), ("top_k", 0), ("top_p", 1.0), ("min_p", 0.0))}  # fmt: skip
    expected = sample(
        biased, torch.tensor(column["seeds"]), torch.tensor(LENGTHS), torch.tensor(column["temperature"]),
        torch.tensor(column["top_k"]), torch.tensor(column["top_p"]), torch.tensor(column["min_p"]),
    )  # fmt: skip
    assert found.sampled_token_ids.flatten().tolist() == expected.tolist()
    assert (found.num_sampled.tolist(), found.num_rejected.tolist()) == ([1] * len(ALL), [0] * len(ALL))
    assert found.num_nans is None


@pytest.mark.parametrize("mode", ["raw_logprobs", "raw_logits", "processed_logprobs", "processed_logits"])
def test_a_requests_answer_is_the_same_alone_and_with_others(hooked, logits, mode):
    sampler = engine(hooked, logprobs_mode=mode)
    together = step(sampler, logits, ALL, LENGTHS)
    backwards = step(sampler, logits, ALL[::-1], LENGTHS[::-1])
    for i in ALL:
        alone = step(sampler, logits, [i], LENGTHS[i : i + 1])
        for others, row in ((together, i), (backwards, len(ALL) - 1 - i)):
            assert alone.sampled_token_ids[0] == others.sampled_token_ids[row]
            if "logprobs" in ASKED[i]:
                assert bits_equal(alone.logprobs_tensors[0][0], others.logprobs_tensors[0][row])
        assert (alone.logprobs_tensors is None) == ("logprobs" not in ASKED[i])


def test_logprobs_are_of_the_logits_asked_for(hooked, logits):
    def score(mode):
        found = step(engine(hooked, logprobs_mode=mode), logits, [7, 6], [200, 20])
        return found.sampled_token_ids, *found.logprobs_tensors

    tokens, raw, most = score("raw_logits")
    assert most == 3
    assert bits_equal(raw, logits[[7, 6]].gather(1, tokens))
    assert bits_equal(score("processed_logits")[1], raw / torch.tensor([[1.0], [0.9]]))
    assert bits_equal(score("raw_logprobs")[1], log_softmax(logits[[7, 6]]).gather(1, tokens))
    assert bool((score("processed_logprobs")[1][0] > score("raw_logprobs")[1][0]).all()), "of the 3 that are left"


def test_prompts_not_read_to_their_end_give_no_token(hooked, logits):
    found = step(engine(hooked), logits, [0, 1, 2], [PREFILL - 1, PREFILL, 9])
    assert found.num_sampled.tolist() == [0, 1, 1]


def test_parameters_are_copied_when_a_request_was_added(hooked, logits):
    sampler = engine(hooked)
    seeds = sampler.sampling_states.seeds
    copies = seeds.copies
    sampler.apply_staged_writes()
    assert seeds.copies == copies
    before = step(sampler, logits, [1], [6]).sampled_token_ids
    sampler.add_request(2, 5, {"temperature": 0.0, "top_k": VOCAB, "top_p": 1.0, "min_p": 0.0, "seeds": 5})
    sampler.apply_staged_writes()
    assert seeds.copies == copies + 1
    after = step(sampler, logits, [1], [6]).sampled_token_ids
    assert before.item() != after.item() == int(logits[1].argmax())


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"use_fp64_gumbel": True}, "its noise is asked for in fp64"), ({"num_speculative_tokens": 4}, "are drafted")],
)
def test_other_engines_stay_vllms_and_the_log_says_why_once(hooked, logits, caplog, options, reason):
    sampler = engine(hooked, **options)
    for _ in range(2):
        assert step(sampler, logits, [1, 2], [6, 7]).sampled_token_ids.tolist() == [[-7], [-7]]
    assert caplog.text.count(reason) == 1


def test_a_sampler_with_more_to_do_is_not_ours(vllm, monkeypatch):
    class Wider(Sampler):
        def __init__(self, *arguments, **named):
            super().__init__(*arguments, **named)
            self.thinking_budget = {}

    monkeypatch.setattr(sys.modules[f"{GPU}.sample.sampler"], "Sampler", Wider)
    assert "Sampler has ['thinking_budget'] more and" in HOOK.probe()

    class Other(Sampler):
        def __call__(self, logits, input_batch, seeds):
            pass

    monkeypatch.setattr(sys.modules[f"{GPU}.sample.sampler"], "Sampler", Other)
    assert "Sampler.__call__ takes ['self', 'logits', 'input_batch', 'seeds'], want" in HOOK.probe()


@pytest.mark.parametrize(
    ("module", "name", "said"),
    [
        (f"{GPU}.sample.output", "SamplerOutput", "SamplerOutput has ['idx_mapping'"),
        (f"{GPU}.input_batch", "InputBatch", "InputBatch has no"),
        (f"{GPU}.sample.logprob", "compute_topk_scores", "compute_topk_scores takes"),
    ],
)
def test_an_interface_that_changed_is_named(vllm, monkeypatch, module, name, said):
    other = {"SamplerOutput": InputBatch, "InputBatch": SamplerOutput, "compute_topk_scores": lambda logits: logits}
    monkeypatch.setattr(sys.modules[module], name, other[name])
    assert HOOK.probe().startswith(said)
