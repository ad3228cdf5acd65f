"""Seconds of vLLM's own latency benchmark with its batch-invariant norms, with batchproof's and by default.

Repeats the experiment of vLLM's PR 40413, which fused the residual add into the batch-invariant norm: a batch of 8 with
32 tokens in and 128 out. The engines of all variants and flags start side by side on the one GPU, because starting one
takes minutes. Only when each is ready, or has failed, are they measured: strictly one at a time, the others idle, in
interleaved rounds of which every second goes backwards. Each is then profiled once, for what runs in a decode step and
the time that each kernel adds to it. A variant that fails is in the result as missing, with the reason.

Without ``+rms_norm``, as under the default flags, vLLM compiles a norm that neither the change nor variant a touches:
there is no variant a there.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from errors import Refused
from timing import copy_gbps, release_memory
from vllm_tables import kernels_rows, latency_rows, step_rows
from vllm_worker import BATCH, PROMPT, TOKENS, write

HERE = Path(__file__).parent
WORKER = HERE / "vllm_worker.py"
GROUP = "vllm.general_plugins"
UNFUSED = "batchproof_bench_unfused"
OUTPUT = 128
BASELINE = "b"
VARIANTS = {
    "a": "before the change",
    "b": "vLLM batch-invariant",
    "c": "batchproof norms",
    "d": "batchproof norms, fused quantisation",
    "f": "batchproof norms and products",
    "g": "batchproof",
    "e": "vLLM default (varies)",
}
_OURS = {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": "batchproof", "BATCHPROOF_STRICT": "1"}
_NORMS = _OURS | {"BATCHPROOF_LINEAR": "0", "BATCHPROOF_ATTENTION": "0", "BATCHPROOF_SAMPLER": "0"}
_PRODUCTS = _NORMS | {"BATCHPROOF_FUSE_NORM_QUANT": "1", "BATCHPROOF_LINEAR": "1"}
ENVIRONMENTS = {
    "a": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": UNFUSED},
    "b": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": ""},
    "c": _NORMS | {"BATCHPROOF_FUSE_NORM_QUANT": "0"},
    "d": _NORMS | {"BATCHPROOF_FUSE_NORM_QUANT": "1"},
    "f": _PRODUCTS | {"BATCHPROOF_FUSE_ACTIVATION_QUANT": "0"},
    "g": _OURS,
    "e": {"VLLM_BATCH_INVARIANT": "0", "VLLM_PLUGINS": ""},
}
FLAGS = {
    "original": [
        "--attention-backend=TRITON_ATTN",
        "-cc.custom_ops+=+rms_norm",
        "-cc.pass_config.fuse_norm_quant=False",
    ],
    "default": [],
}
# With its cache sized by hand vLLM measures no free memory, which the engines beside it change all the time.
SHARE = ["--gpu-memory-utilization", "0.09", "--max-model-len", "4096"]
PUBLISHED = {"source": "vLLM PR 40413", "before_s": 0.5245, "after_s": 0.5136}
_SCHEME = {"num_bits": 8, "type": "float", "symmetric": True, "strategy": "tensor", "dynamic": False}
_SCHEME |= {"group_size": None, "observer": "minmax", "observer_kwargs": {}, "actorder": None, "block_structure": None}
_LAYERS = {"targets": ["Linear"], "output_activations": None, "weights": _SCHEME, "input_activations": _SCHEME}
MODEL_NAME = "Llama-3.1-8B-Instruct-FP8"
MODEL = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "attention_dropout": 0.0,
    "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009], "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336, "max_position_embeddings": 131072,
    "mlp_bias": False, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 500000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    "rope_scaling": {
        "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "use_cache": True, "vocab_size": 128256,
    "quantization_config": {
        "quant_method": "compressed-tensors", "format": "float-quantized", "quantization_status": "compressed",
        "global_compression_ratio": 1.0, "ignore": ["lm_head"], "kv_cache_scheme": None,
        "config_groups": {"group_0": _LAYERS},
    },
}  # fmt: skip
SHAPES = (  # of MODEL, for the floor of a step
    "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
    "vocab_size",
)  # fmt: skip
POLL_S = 0.1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--flags", nargs="+", choices=FLAGS, default=list(FLAGS), help="sets of vLLM's flags")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rounds", type=int, default=2, help="interleaved rounds, at least two")
    parser.add_argument("--iterations", type=int, default=10, help="timed iterations in a round")
    parser.add_argument("--warmup", type=int, default=3, help="iterations before them")
    parser.add_argument("--batch-size", type=int, default=BATCH, help=f"requests; default: {BATCH}")
    parser.add_argument("--input-len", type=int, default=PROMPT, help=f"tokens in, of each; default: {PROMPT}")
    parser.add_argument("--output-len", type=int, default=OUTPUT, help=f"tokens out, of each; default: {OUTPUT}")
    parser.add_argument("--kv-cache-gib", type=float, default=1, help="of every engine; default: 1")
    parser.add_argument("--no-profile", action="store_true", help=f"the profile's batch is {BATCH} whatever the other")
    parser.add_argument("--model", type=Path, help=f"folder of a model; default: the shapes of {MODEL_NAME}")
    parser.add_argument("--timeout", type=float, default=400, help="seconds to start all engines, and for any command")
    parser.add_argument("--logs", type=Path, help="folder for the engines' logs; default: a temporary one")


def run(options: argparse.Namespace, script: Path = WORKER) -> dict[str, Any]:
    """Measure all variants under every set of flags; ``script`` is what runs an engine."""
    if options.rounds < 2:
        raise Refused(f"--rounds is {options.rounds}, want at least 2: one order alone says nothing of drift")
    variants = [variant for variant in VARIANTS if variant in options.variants]
    logs = options.logs or Path(tempfile.mkdtemp(prefix="vllm_latency_logs_"))
    logs.mkdir(parents=True, exist_ok=True)
    print(f"logs in {logs}", flush=True)
    gbps = copy_gbps()
    release_memory()  # the engines need it
    with tempfile.TemporaryDirectory(prefix="vllm_latency_") as temporary:
        common = _common(options, Path(temporary))
        plugins = write_plugins(Path(temporary) / "plugins")
        launches: dict[str, Callable[[], Worker]] = {}
        for flags in options.flags:
            folder = Path(temporary) / flags
            folder.mkdir()
            for variant in variants:
                if (flags, variant) != ("default", "a"):
                    launches[f"{flags} {variant}"] = partial(
                        Worker, variant, flags=flags, arguments=common + FLAGS[flags], folder=folder, logs=logs,
                        plugins=plugins, script=script,
                    )  # fmt: skip
        rows, kernels, versions = _measure(launches, options)
    if all(row["median_s"] is None for row in rows):
        raise Refused("no variant could be measured:\n" + "\n".join(f"{row['name']}: {row['missing']}" for row in rows))
    result = _settings(options, variants, common) | {"copy_gbps": round(gbps, 1)} | versions
    result |= {"rows": rows, "kernels": kernels}
    print(f"\n{latency_rows(result)}\n\n{kernels_rows(result)}\n\n{step_rows(result)}\n", flush=True)
    return result


class Failed(Exception):  # noqa: N818
    """An engine did not start, or not do as told."""


class Worker:
    """An engine in a process group of its own."""

    def __init__(
        self, variant: str, flags: str, arguments: Sequence[str], folder: Path, logs: Path, plugins: Path, script: Path
    ) -> None:
        self.variant, self.flags, self.name = variant, flags, f"{flags}: {VARIANTS[variant]}"
        self.folder, self.asked = folder, 0
        self.log = logs / f"{flags}_{variant}.log"
        # a and b differ by a patch that the key of vLLM's compile cache need not see: each has a cache of its own.
        environment = _environment(variant, plugins) | {"VLLM_CACHE_ROOT": str(folder / f"cache_{variant}")}
        command = [sys.executable, str(script), str(folder), variant, "--", *arguments]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    def answer(self, kind: str) -> dict[str, Any] | None:
        """What the worker wrote to its file of this kind, or None as long as there is none."""
        ended = self.process.poll()  # asked before the file: a worker may write it and end
        path = self.folder / f"{self.variant}.{kind}"
        if path.exists():
            answer: dict[str, Any] = json.loads(path.read_text())
            if "error" in answer:
                raise Failed(answer["error"])
            return answer
        if ended is not None:
            raise Failed(f"ended with exit code {ended}: {last_error(self.log)}")
        return None

    def ask(self, what: str, timeout: float) -> dict[str, Any]:
        """Have it do something, and wait for the answer."""
        number, self.asked = self.asked, self.asked + 1
        write(self.folder / f"{self.variant}.{number}.command", {"do": what})
        deadline = time.monotonic() + timeout
        while (answer := self.answer(f"{number}.done")) is None:
            if time.monotonic() > deadline:
                raise Failed(f"no answer to {what!r} in {timeout:g} s")
            time.sleep(POLL_S)
        return answer

    def kill(self) -> None:
        """End it and its children: vLLM's engine is one, and holds the GPU's memory."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def start(workers: Mapping[str, Worker], timeout: float) -> tuple[dict[str, str], dict[str, str]]:
    """Wait until every engine is ready or has failed: why, of those that have, and the versions of the others."""
    missing: dict[str, str] = {}
    versions: dict[str, str] = {}
    waiting, began = dict(workers), time.monotonic()
    while waiting:
        passed = time.monotonic() - began
        for variant, worker in list(waiting.items()):
            try:
                answer = worker.answer("ready")
                if answer is None and passed > timeout:
                    raise Failed(f"not ready after {timeout:g} s: {last_error(worker.log)}")
            except Failed as failure:
                missing[variant] = _report(worker, failure)
                worker.kill()
            else:
                if answer is None:
                    continue
                versions |= answer
                print(f"{worker.name}: ready after {passed:.0f} s", flush=True)
            del waiting[variant]
        time.sleep(POLL_S)
    return missing, versions


def _measure(
    launches: Mapping[str, Callable[[], Worker]], options: argparse.Namespace
) -> tuple[list[dict[str, Any]], list[dict[str, Any]], dict[str, str]]:
    """Rows, kernels and versions of all engines; none is left, whatever happens."""
    workers: dict[str, Worker] = {}
    try:
        print(f"starting {len(launches)} engines", flush=True)
        for key, launch in launches.items():
            workers[key] = launch()
        missing, versions = start(workers, options.timeout)
        rounds = _time(workers, options, missing)
        untimed = set(missing)  # who fails at the profile alone has been timed
        kernels = [] if options.no_profile else _profile(workers, options.timeout, missing)
    finally:
        for worker in workers.values():
            worker.kill()
    rows: list[dict[str, Any]] = []
    for flags in options.flags:
        under = {worker.variant: key for key, worker in workers.items() if worker.flags == flags}
        absent = {variant: missing[key] for variant, key in under.items() if key in untimed}
        for row in summarise(flags, {variant: rounds[key] for variant, key in under.items()}, absent):
            reason = missing.get(under[row["variant"]])
            rows.append(row | ({"missing": reason} if reason else {}))
    return rows, kernels, versions


def _time(
    workers: Mapping[str, Worker], options: argparse.Namespace, missing: dict[str, str]
) -> dict[str, list[dict[str, Any]]]:
    """What each engine answered in each round."""
    rounds: dict[str, list[dict[str, Any]]] = {variant: [] for variant in workers}

    def measure(variant: str) -> None:
        answer = workers[variant].ask("measure", options.timeout)
        rounds[variant].append(answer)
        print(f"{workers[variant].name}: round {len(rounds[variant])}: {answer['avg_latency']:.4f} s", flush=True)

    for number in range(options.rounds):
        _each(workers, list(workers) if number % 2 == 0 else list(reversed(workers)), missing, measure)
    return rounds


def _profile(workers: Mapping[str, Worker], timeout: float, missing: dict[str, str]) -> list[dict[str, Any]]:
    """The kernels of a decode step of each engine."""
    kernels: list[dict[str, Any]] = []

    def profile(key: str) -> None:
        worker = workers[key]
        answer = worker.ask("profile", timeout)
        total = round(sum(count for _, count, _ in answer["kernels"]), 2)
        kernels.append({"flags": worker.flags, "variant": worker.variant, "total": total} | answer)
        print(f"{worker.name}: {total:g} kernels in a decode step", flush=True)

    _each(workers, list(workers), missing, profile)
    return kernels


def _each(
    workers: Mapping[str, Worker], order: Sequence[str], missing: dict[str, str], what: Callable[[str], None]
) -> None:
    """``what`` of every variant that has not failed yet, one after the other."""
    for variant in order:
        if variant in missing:
            continue
        try:
            what(variant)
        except Failed as failure:
            missing[variant] = _report(workers[variant], failure)
            workers[variant].kill()  # else what it may still be doing would be in its neighbours' time


def summarise(
    flags: str, rounds: Mapping[str, Sequence[Mapping[str, Any]]], missing: Mapping[str, str]
) -> list[dict[str, Any]]:
    """A row for each variant: every time, the median, and its ratio to vLLM's batch-invariant mode."""
    medians = {
        variant: statistics.median(latency for answer in answers for latency in answer["latencies"])
        for variant, answers in rounds.items()
        if variant not in missing
    }
    rows = []
    for variant, answers in rounds.items():
        median, base = medians.get(variant), medians.get(BASELINE)
        rows.append(
            {
                "flags": flags,
                "variant": variant,
                "name": VARIANTS[variant],
                "median_s": median,
                "ratio": median / base if median is not None and base is not None else None,
                "rounds_s": [answer["avg_latency"] for answer in answers],
                "latencies_s": [answer["latencies"] for answer in answers],
            }
        )
    return rows


def write_plugins(folder: Path) -> Path:
    """A folder for the import path in which vLLM finds the plug-ins: ours of this benchmark, and batchproof's."""
    folder.mkdir()
    shutil.copy(HERE / "vllm_unfused.py", folder)  # not from here, where modules of ours would hide installed ones
    _write_distribution(folder, UNFUSED, "vllm_unfused:register")
    if not importlib.metadata.entry_points(group=GROUP, name="batchproof"):  # a checkout that is not installed
        pyproject = (HERE.parent / "pyproject.toml").read_text()
        declared = re.search(rf'^\[project\.entry-points\."{GROUP}"\]\nbatchproof *= *"(.+)"', pyproject, re.MULTILINE)
        if declared:
            _write_distribution(folder, "batchproof_bench_plugin", declared.group(1), "batchproof")
    return folder


def _write_distribution(folder: Path, name: str, target: str, plugin: str | None = None) -> None:
    info = folder / f"{name}-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[{GROUP}]\n{plugin or name} = {target}\n")


def last_error(log: Path) -> str:
    """The last line of a log that names an error, not counting vLLM's that it could not start; or the last line."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [
        line for line in lines if re.search(r"(Error|Exception)\b.*:", line) and "initialization failed" not in line
    ]
    return (errors or lines or ["its log is empty"])[-1][-300:]


def _report(worker: Worker, failure: Failed) -> str:
    tail = worker.log.read_text(errors="replace").splitlines()[-60:]
    print(f"{worker.name}: {failure}; the end of {worker.log}:", *tail, sep="\n  ", flush=True)
    return str(failure)


def _environment(variant: str, plugins: Path) -> dict[str, str]:
    defaults = {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "PYTHONUNBUFFERED": "1"}
    defaults["VLLM_WORKER_MULTIPROC_METHOD"] = "spawn"  # as vLLM's command line has it
    path = os.pathsep.join([str(plugins), *filter(None, [os.environ.get("PYTHONPATH")])])
    return defaults | dict(os.environ) | ENVIRONMENTS[variant] | {"PYTHONPATH": path}


def _common(options: argparse.Namespace, temporary: Path) -> list[str]:
    """The arguments of vllm bench latency that all variants share."""
    model = options.model
    if model is None:
        model = temporary / MODEL_NAME
        model.mkdir()
        (model / "config.json").write_text(json.dumps(MODEL))
    return [
        *("--model", str(model), "--load-format", "dummy", "--skip-tokenizer-init", *SHARE),
        *("--kv-cache-memory-bytes", str(int(options.kv_cache_gib * (1 << 30)))),
        *("--batch-size", str(options.batch_size)),
        *("--input-len", str(options.input_len), "--output-len", str(options.output_len)),
        *("--num-iters", str(options.iterations), "--num-iters-warmup", str(options.warmup)),
    ]


def _settings(options: argparse.Namespace, variants: Sequence[str], common: Sequence[str]) -> dict[str, Any]:
    inherited = {key: value for key, value in sorted(os.environ.items()) if key.startswith(("VLLM_", "BATCHPROOF_"))}
    return {
        "note": "dummy weights: right for time, no proof of bits",
        "model": options.model.name if options.model else MODEL_NAME,
        "batch": options.batch_size,
        "input_tokens": options.input_len,
        "output_tokens": options.output_len,
        "rounds": options.rounds,
        "iterations": options.iterations,
        "warmup": options.warmup,
        "variants": {variant: VARIANTS[variant] for variant in variants},
        "environments": {variant: inherited | ENVIRONMENTS[variant] for variant in variants},
        "flags": {flags: FLAGS[flags] for flags in options.flags},
        "common_flags": list(common),
        "original": PUBLISHED,
        "context": PROMPT + TOKENS // 2,  # tokens of a request in the middle of the profile
        **({} if options.model else {"shapes": {key: MODEL[key] for key in SHAPES}}),
    }
