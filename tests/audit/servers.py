"""A small server that really batches, planted variances in it, and what an audit of it has to say.

An engine thread takes all requests that wait into the running batch and computes a step for one sequence at a time: its
bits depend on the sequence alone, until a mutant overrides a method. An idle engine waits until every open connection
has sent its request: the audit opens connections before it sends on any, so batches are whole, whatever the load here.
"""

import json
import select
import threading
import time
import zlib
from contextlib import contextmanager
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from mutation import Control, Mutant

from batchproof.audit.server import audit_server

HIDDEN, LAYERS, VOCABULARY, BLOCK = 32, 2, 211, 16


class Sequence:
    def __init__(self, number, body):
        self.number = number
        self.prompt = [zlib.crc32(word.encode()) % VOCABULARY for word in body["prompt"].split()]
        self.max_tokens, self.temperature = body["max_tokens"], body["temperature"]
        self.seed = body.get("seed", 0)
        self.generator = torch.Generator().manual_seed(self.seed)
        self.keys, self.values = torch.zeros(2, LAYERS, len(self.prompt) + self.max_tokens, HIDDEN)
        self.computed = self.cached = 0  # tokens whose keys and values are there; how many of them came from the cache
        self.tokens, self.logprobs, self.tops = [], [], []
        self.done = threading.Event()

    def query_tokens(self, chunk):
        """Tokens to compute in the next step."""
        return (self.prompt + self.tokens)[self.computed :][: chunk or None]


class Engine:
    """The model, its batch and its cache of prefixes.

    ``chunk``: tokens of a prompt in a step, all if 0. ``slots``: sequences in a batch at most. ``quiet_s``: how long
    nothing must have arrived before an idle engine begins, for clients that do not open their connections beforehand.
    """

    def __init__(self, cache=False, chunk=0, slots=1024, quiet_s=0.0, step_s=0.002):
        self.cache = {} if cache else None
        self.chunk, self.slots, self.quiet_s, self.step_s = chunk, slots, quiet_s, step_s
        g = torch.Generator().manual_seed(0)
        self.embedding = torch.randn(VOCABULARY, HIDDEN, generator=g)
        self.qkv = torch.randn(LAYERS, 3, HIDDEN, HIDDEN, generator=g) / HIDDEN**0.5
        self.mlp = torch.randn(LAYERS, HIDDEN, HIDDEN, generator=g) / HIDDEN**0.5
        self.head = torch.randn(VOCABULARY, HIDDEN, generator=g) / HIDDEN**0.5
        self.waiting, self.batch = [], []
        self.listener = None
        self.expected = self.count = self.longest = (
            0  # accepted connections that have sent nothing yet; requests; prompt
        )
        self.last_arrival = 0.0
        self.stopping = False
        self.changed = threading.Condition()

    def run(self):
        while not self.stopping:
            with self.changed:
                while not self.batch and not self.stopping and not self.ready():
                    self.changed.wait(0.001)
                room = self.slots - len(self.batch)
                for sequence in self.waiting[:room]:
                    self.reuse(sequence)
                self.batch += self.waiting[:room]
                self.waiting = self.waiting[room:]
            self.step()
            self.batch = [sequence for sequence in self.batch if not sequence.done.is_set()]

    def ready(self):
        quiet = time.monotonic() - self.last_arrival >= self.quiet_s
        return self.waiting and not self.expected and quiet and not select.select([self.listener], [], [], 0)[0]

    def submit(self, body):
        with self.changed:
            self.expected -= 1
            self.count += 1
            sequence = Sequence(self.count, body)
            self.longest = max(self.longest, len(sequence.prompt))
            self.waiting.append(sequence)
            self.last_arrival = time.monotonic()
            self.changed.notify()
        sequence.done.wait()
        return sequence

    def step(self):
        time.sleep(self.step_s)  # room for others to arrive meanwhile
        for sequence in self.batch:
            tokens = sequence.query_tokens(self.chunk)
            for token in tokens:
                hidden = self.forward(sequence, token)
            if sequence.computed == len(sequence.prompt) + len(sequence.tokens):
                self.store(sequence)
                self.emit(sequence, hidden)
        for sequence in self.batch:
            if len(sequence.tokens) == sequence.max_tokens:
                sequence.done.set()

    def forward(self, sequence, token):
        """One token through the model, its keys and values kept."""
        at = sequence.computed
        hidden = self.embedding[token]
        for layer in range(LAYERS):
            query, key, value = torch.mv(self.qkv[layer].flatten(0, 1), hidden).chunk(3)
            sequence.keys[layer, at], sequence.values[layer, at] = key, value
            scores = torch.mv(sequence.keys[layer, : at + 1], query) / HIDDEN**0.5
            hidden = hidden + self.attend(sequence, scores, sequence.values[layer, : at + 1])
            hidden = hidden + torch.tanh(torch.mv(self.mlp[layer], hidden))
            hidden = hidden / hidden.square().mean().sqrt()
        sequence.computed += 1
        return hidden

    def attend(self, sequence, scores, values):
        return torch.mv(values.t(), torch.softmax(scores, 0))

    def emit(self, sequence, hidden):
        logits = self.logits(sequence, hidden)
        logprobs = self.log_softmax(logits)
        token = self.choose(sequence, logits)
        sequence.tokens.append(token)
        sequence.logprobs.append(float(logprobs[token]))
        best = torch.topk(logprobs, 5)
        sequence.tops.append({f" t{i}": float(p) for p, i in zip(*map(torch.Tensor.tolist, best), strict=True)})

    def logits(self, sequence, hidden):
        return torch.mv(self.head, hidden)

    def in_halves(self, hidden):
        half = HIDDEN // 2
        return torch.mv(self.head[:, :half], hidden[:half]) + torch.mv(self.head[:, half:], hidden[half:])

    def log_softmax(self, logits):
        return torch.log_softmax(logits, 0)

    def choose(self, sequence, logits):
        if not sequence.temperature:
            return int(logits.argmax())
        p = torch.softmax(logits / sequence.temperature, 0)
        return int(torch.multinomial(p, 1, generator=self.stream(sequence)))

    def stream(self, sequence):
        return sequence.generator

    def reuse(self, sequence):
        """Take the longest cached prefix, in whole blocks, and short of the last token, which is to be computed."""
        if self.cache is None:
            return
        for end in range((len(sequence.prompt) - 1) // BLOCK * BLOCK, 0, -BLOCK):
            owner = self.cache.get(tuple(sequence.prompt[:end]))
            if owner is not None:
                sequence.keys[:, :end], sequence.values[:, :end] = owner.keys[:, :end], owner.values[:, :end]
                sequence.computed = sequence.cached = end
                return

    def store(self, sequence):
        if self.cache is not None:
            for end in range(BLOCK, len(sequence.prompt) + 1, BLOCK):
                self.cache.setdefault(tuple(sequence.prompt[:end]), sequence)


class HalvesFromFive(Engine):
    def logits(self, sequence, hidden):
        return self.in_halves(hidden) if len(self.batch) >= 5 else super().logits(sequence, hidden)


class SharedStream(Engine):
    def stream(self, sequence):
        return self.batch[0].generator


class CacheMerges(Engine):
    def attend(self, sequence, scores, values):
        if not sequence.cached:
            return super().attend(sequence, scores, values)
        top, parts = scores.max(), []  # flash decoding: the cached part and the rest, each normalised, then merged
        for part in (slice(0, sequence.cached), slice(sequence.cached, None)):
            weights = torch.exp(scores[part] - top)
            parts.append((torch.mv(values[part].t(), weights), weights.sum()))
        return (parts[0][0] + parts[1][0]) / (parts[0][1] + parts[1][1])


class TileByNeighbour(Engine):
    """The longest query of the batch chooses the tile, as in FlashAttention-3."""

    def step(self):
        self.queries = {sequence: len(sequence.query_tokens(self.chunk)) for sequence in self.batch}
        super().step()

    def logits(self, sequence, hidden):
        others = [tokens for other, tokens in self.queries.items() if other is not sequence]
        return self.in_halves(hidden) if max(others, default=0) >= 10 else super().logits(sequence, hidden)


class EverySecondAnswer(Engine):
    def logits(self, sequence, hidden):
        return self.in_halves(hidden) if sequence.number % 2 else super().logits(sequence, hidden)


class LogprobsFrom44(Engine):
    def log_softmax(self, logits):
        if len(self.batch) < 44:
            return super().log_softmax(logits)
        return torch.log(torch.exp(logits - logits.max()) / torch.exp(logits - logits.max()).sum())


class AfterDeparture(Engine):
    """Another kernel in the step after some of the batch have left, as for another captured batch size."""

    before = frozenset()

    def step(self):
        now = frozenset(self.batch)
        self.shrunk = bool(now & self.before and self.before - now)
        self.before = now
        super().step()

    def logits(self, sequence, hidden):
        return self.in_halves(hidden) if self.shrunk else super().logits(sequence, hidden)


class DecodesBesidePrefill(Engine):
    """A batch with prompts in it decodes by another kernel."""

    def logits(self, sequence, hidden):
        mixed = sequence.tokens and any(not other.tokens for other in self.batch)
        return self.in_halves(hidden) if mixed else super().logits(sequence, hidden)


class Handler(BaseHTTPRequestHandler):
    def setup(self):
        super().setup()
        self.submitted = False

    def finish(self):
        if not self.submitted:  # it came for something else, or went away
            with self.server.engine.changed:
                self.server.engine.expected -= 1
        super().finish()

    def do_GET(self):
        if self.path == "/v1/models":
            self.answer(
                200, {"data": [{"id": "tiny", "owned_by": "tests", "max_model_len": self.server.max_model_len}]}
            )
        elif self.path == "/metrics" and self.server.metrics:
            running = float(len(self.server.engine.batch))
            self.answer(200, f'# HELP x\nvllm:num_requests_running{{engine="0",model_name="tiny"}} {running}\n')
        else:
            self.answer(404, {"error": "no such page"})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.keys.add(self.headers["Authorization"])
        with self.server.engine.changed:
            self.server.completions += 1
            failing = self.server.fails(self.server.completions)
        if failing:
            return self.answer(500, {"error": f"out of luck, {self.headers['Authorization']}"})
        self.submitted = True
        if self.path == "/v1/chat/completions":
            assert body["logprobs"] is True
            body |= {"prompt": body["messages"][0]["content"], "logprobs": body["top_logprobs"]}
            return self.answer(200, chat_completion(self.server.engine.submit(body)))
        return self.answer(200, self.server.describe(self.server.engine.submit(body)))

    def answer(self, status, body):
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments):
        pass


class Server(ThreadingHTTPServer):
    request_queue_size = 512  # connections that wait to be accepted
    daemon_threads = True
    block_on_close = False

    def __init__(self, engine, metrics=False, fails=lambda number: False, describe=None, max_model_len=2048):
        super().__init__(("127.0.0.1", 0), Handler)
        self.engine, self.metrics, self.fails, self.max_model_len = engine, metrics, fails, max_model_len
        self.describe = describe or completion
        self.completions, self.keys = 0, set()
        engine.listener = self.socket
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def get_request(self):
        with self.engine.changed:  # so that a connection is never neither in the listener's queue nor expected
            self.engine.expected += 1
            return super().get_request()

    def handle_error(self, request, client_address):
        pass  # a client that went away


def completion(sequence):
    tokens = [f" t{token}" for token in sequence.tokens]
    logprobs = {"tokens": tokens, "token_logprobs": sequence.logprobs, "top_logprobs": sequence.tops}
    usage = {"prompt_tokens": len(sequence.prompt), "prompt_tokens_details": {"cached_tokens": sequence.cached}}
    return {"choices": [{"text": "".join(tokens), "logprobs": logprobs, "finish_reason": "length"}], "usage": usage}


def chat_completion(sequence):
    """The same answer as chat has it."""
    body = completion(sequence)
    (choice,) = body["choices"]
    found = choice.pop("logprobs")
    columns = zip(found["tokens"], found["token_logprobs"], found["top_logprobs"], strict=True)
    content = [
        {"token": token, "logprob": value, "top_logprobs": [{"token": t, "logprob": v} for t, v in top.items()]}
        for token, value, top in columns
    ]
    choice |= {"message": {"role": "assistant", "content": choice.pop("text")}, "logprobs": {"content": content}}
    return body


@contextmanager
def serving(engine, **options):
    """The server, running, on a port of its own."""
    server = Server(engine, **options)
    threads = [
        threading.Thread(target=engine.run, daemon=True),
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True),
    ]
    for thread in threads:
        thread.start()
    try:
        yield server
    finally:
        engine.stopping = True
        server.shutdown()
        server.server_close()
        for thread in threads:
            thread.join()


def audit(engine, max_concurrency=8, **options):
    """The audit of a server with this engine."""
    with serving(engine()) as server:
        return audit_server(server.url, "tiny", max_concurrency=max_concurrency, **{"max_tokens": 4} | options)


def mutant(name, seen, engine, relation, threshold=None, **options):
    return Mutant(name, seen, partial(audit, engine, **options), relation, threshold=threshold)


MUTANTS = [
    mutant("server: reduction order from 5 requests", "vLLM 48271", HalvesFromFive, "concurrency", 5),
    mutant("server: random stream shared by the batch", "transformers", SharedStream, "seeded sampling", 2),
    mutant("server: cache hit merges differently", "sglang 34683", partial(CacheMerges, cache=True), "cache"),
    mutant("server: tile by a neighbour's 10 tokens", "vLLM 47069, 51902", TileByNeighbour, "long neighbours", 10),
    mutant("server: every second answer differs", "float atomics", EverySecondAnswer, "repeat"),
    mutant("server: logprobs from 44 sequences", "vLLM 51187", LogprobsFrom44, "concurrency", 44, max_concurrency=48),
    mutant("server: step after a neighbour has left", "captured batch sizes", AfterDeparture, "short neighbours"),
    mutant(
        "server: decode beside a prefill", "mixed batches", DecodesBesidePrefill, "staggered arrivals", max_tokens=12
    ),
]
CONTROLS = [
    Control("server: one row at a time", partial(audit, Engine)),
    Control("server: cached prefixes", partial(audit, partial(Engine, cache=True), require=("cache",))),
    Control("server: prompts in chunks of 64", partial(audit, partial(Engine, chunk=64), max_concurrency=12)),
]
