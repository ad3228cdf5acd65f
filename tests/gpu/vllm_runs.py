"""Stock vLLM's batch-invariant mode and batchproof's, in real engines, on models with random weights: who varies?

``python tests/gpu/vllm_runs.py --out FILE`` writes benchmarks/results/<device>/vllm_exactness.json. Engines run several
at a time on the one GPU: no bit may depend on that either.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
SCRIPT = HERE / "vllm_exactness.py"
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tools"), str(HERE)]

SIDES = {
    "stock": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": ""},
    "batchproof": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": "batchproof", "BATCHPROOF_STRICT": "1"},
}
MODELS = {
    "llama fp8": ("llama", True),
    "llama bf16": ("llama", False),
    "qwen3 bf16": ("qwen3", False),
    "gemma2 bf16": ("gemma2", False),
}
_ENGINE = {
    "skip_tokenizer_init": True, "max_model_len": 2048, "max_num_seqs": 512, "max_logprobs": 20, "seed": 0,
    "gpu_memory_utilization": 0.04, "kv_cache_memory_bytes": 1 << 30, "attention_backend": "TRITON_ATTN",
    "enforce_eager": False, "enable_prefix_caching": False, "max_num_batched_tokens": 8192,
    "compilation_config": {"custom_ops": ["+rms_norm"], "pass_config": {"fuse_norm_quant": False}},
}  # fmt: skip
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "graphs": {},
    "chunked": {"enable_prefix_caching": True, "max_num_batched_tokens": 512},
    "eager": {"enforce_eager": True},
    "default flags": {"attention_backend": None, "compilation_config": None},
    # Room for 240 pages of 16 tokens: of 300 neighbours few run at once, and those that grow drive others out
    "preempted": {"num_gpu_blocks_override": 240, "disable_log_stats": False},
}
_LLAMAS = ("llama fp8", "llama bf16")
MODELS_OF = {"graphs": tuple(MODELS), "chunked": _LLAMAS, "eager": _LLAMAS, "default flags": _LLAMAS[:1]}
MODELS_OF |= {"preempted": _LLAMAS[1:]}


class Job(NamedTuple):
    """One engine."""

    side: str
    model: str
    configuration: str


JOBS = tuple(
    Job(side, model, configuration)
    for configuration in CONFIGURATIONS
    for model in MODELS_OF[configuration]
    for side in SIDES
)


def run_all(
    jobs: Sequence[Job], models: Mapping[str, Path], folder: Path, parallel: int = 8, limit_s: float = 400,
    script: Path = SCRIPT,
) -> dict[Job, dict[str, Any]]:  # fmt: skip
    """Run the jobs, ``parallel`` at a time; what each wrote, or {"error": why it wrote nothing}."""
    waiting, running, results = list(jobs), {}, {}
    try:
        while waiting or running:
            while waiting and len(running) < parallel:
                job = waiting.pop(0)
                running[job] = (_start(job, models, folder, script), time.monotonic())
            for job, (process, began) in list(running.items()):
                late = time.monotonic() - began > limit_s
                if process.poll() is None and not late:
                    continue
                _kill(process)
                del running[job]
                results[job] = read_result(job, folder, f"not done after {limit_s:g} s" if late else "it ended")
                what = results[job].get("error", f"{len(results[job].get('comparisons', ()))} comparisons")
                print(f"{', '.join(job)}: {time.monotonic() - began:.0f} s: {what}", flush=True)
            time.sleep(0.1)
    finally:
        for process, _ in running.values():
            _kill(process)
    return results


def _file(job: Job, folder: Path, kind: str) -> Path:
    return folder / f"{'_'.join(job).replace(' ', '_')}.{kind}"


def _start(job: Job, models: Mapping[str, Path], folder: Path, script: Path) -> subprocess.Popen[bytes]:
    engine = _ENGINE | CONFIGURATIONS[job.configuration] | {"model": str(models[job.model])}
    _file(job, folder, "job").write_text(json.dumps({"engine": engine}))
    cache = {"VLLM_CACHE_ROOT": str(_file(job, folder, "cache")), "VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | cache | {"VLLM_USE_FLASHINFER_SAMPLER": "0", "TQDM_DISABLE": "1"} | SIDES[job.side]
    with _file(job, folder, "log").open("w") as log:
        return subprocess.Popen(
            [sys.executable, str(script), str(_file(job, folder, "job")), str(_file(job, folder, "json"))],
            env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def _kill(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError):  # the engine is a child of it, and holds memory of the GPU
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def read_result(job: Job, folder: Path, why: str) -> dict[str, Any]:
    """What a job wrote, or {"error": ...} with ``why`` and the telling lines of its log."""
    path = _file(job, folder, "json")
    if path.exists():
        result: dict[str, Any] = json.loads(path.read_text())
        return result
    lines = [line for line in _file(job, folder, "log").read_text(errors="replace").splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line or "degenerate" in line] or lines or ["its log is empty"]
    return {"error": f"{why}: {' | '.join(line[-200:] for line in telling[-3:])}"}


def summarise(results: Mapping[Job, Mapping[str, Any]]) -> dict[str, Any]:
    """The result file's rows: comparisons and differences of each engine, and between engines of one model."""
    from vllm_exactness import first_difference

    rows = []
    for job, result in results.items():
        row: dict[str, Any] = job._asdict() | {"error": result.get("error"), "preemptions": result.get("preemptions")}
        for kind in ("greedy", "seeded"):
            found = [c for c in result.get("comparisons", ()) if c["kind"] == kind]
            row |= {f"{kind}_comparisons": len(found), f"{kind}_differ": sum(not c["equal"] for c in found)}
        kept = ("prompt", "scenario", "position", "kind", "difference")
        row["differences"] = [{k: c[k] for k in kept} for c in result.get("comparisons", ()) if not c["equal"]]
        rows.append(row)
    across = []
    for job, result in results.items():
        whole = results.get(job._replace(configuration="graphs"), {})
        if job.configuration == "chunked" and "references" in result and "references" in whole:
            pairs = list(zip(result["references"], whole["references"], strict=True))
            differ = sum(first_difference(*pair) is not None for pair in pairs)
            across.append({"side": job.side, "model": job.model, "comparisons": len(pairs), "differ": differ})
    versions = {result["vllm"] for result in results.values() if "vllm" in result}
    return {"vllm": ", ".join(sorted(versions)), "rows": rows, "chunked_against_whole": across}


def with_rows_of(earlier: Mapping[str, Any], summary: dict[str, Any]) -> dict[str, Any]:
    """``summary`` with an earlier result file's rows of engines that were not run now; every row says of which commit.

    Refused if they are of another GPU, vLLM or torch.
    """
    for fact in ("device", "vllm", "torch"):
        if earlier[fact] != summary[fact]:
            raise SystemExit(f"the earlier file is of {fact} {earlier[fact]}, want {summary[fact]} as now")
    joined = dict(summary)
    for key, names in (("rows", ("side", "model", "configuration")), ("chunked_against_whole", ("side", "model"))):
        found = {
            tuple(row[name] for name in names): {"commit": result["commit"]} | row
            for result in (earlier, summary)
            for row in result[key]
        }
        places = [tuple(getattr(job, name) for name in names) for job in JOBS]
        joined[key] = [found[place] for place in sorted(found, key=places.index)]
    return joined


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--configurations", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES))
    parser.add_argument("--with-rows-of", type=Path, help="an earlier result file, for engines that are not run now")
    parser.add_argument("--parallel", type=int, default=8, help="engines at a time, 8 GB of GPU memory each")
    parser.add_argument("--limit", type=float, default=400, help="seconds an engine may take")
    parser.add_argument(
        "--logs", type=Path, help="folder for logs and answers, found there again if not done anew; default: temporary"
    )
    options = parser.parse_args()
    from run import describe, write

    folder = options.logs or Path(tempfile.mkdtemp(prefix="vllm_exactness_"))
    folder.mkdir(parents=True, exist_ok=True)
    chosen = [job for job in JOBS if _chosen(job, options)]
    with tempfile.TemporaryDirectory() as checkpoints:
        models = write_models(Path(checkpoints), options.models)
        results = run_all(chosen, models, folder, options.parallel, options.limit)
    found = {job: read_result(job, folder, "") for job in JOBS if job in chosen or _file(job, folder, "json").exists()}
    summary = describe() | summarise({job: results.get(job, result) for job, result in found.items()})
    if options.with_rows_of:
        summary = with_rows_of(json.loads(options.with_rows_of.read_text()), summary)
    write(options.out, summary)
    for row in summary["rows"]:
        print({key: value for key, value in row.items() if key != "differences"})
    print(*summary["chunked_against_whole"], sep="\n")
    return 0


def _chosen(job: Job, options: argparse.Namespace) -> bool:
    return job.model in options.models and job.configuration in options.configurations and job.side in options.sides


def write_models(folder: Path, names: Sequence[str]) -> dict[str, Path]:
    """The checkpoints, by the names of ``MODELS``."""
    from random_checkpoint import write_checkpoint

    models = {}
    for name in names:
        family, fp8 = MODELS[name]
        models[name] = folder / name.replace(" ", "_")
        write_checkpoint(models[name], family, fp8)
    return models


if __name__ == "__main__":
    sys.exit(main())
