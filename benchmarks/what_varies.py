"""Audit the ops of several libraries, each in a process of its own, and write what varies and from which size on.

``python benchmarks/what_varies.py`` writes benchmarks/results/<device>/what_varies.json, from which readme.py makes
docs/what_varies.md. Cases run side by side on the one GPU: no bit may depend on that either. ``--only LIBRARY --keep``
audits some of them again, and leaves the file's other rows as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any, NamedTuple

from batchproof.registry import all_specs
from run import describe, device_folder, write

HERE = Path(__file__).parent
ADAPTERS = HERE / "audited.py"


class Case(NamedTuple):
    """One audit: ``target`` as ``batchproof audit op`` takes it, with more of its options in ``options``."""

    library: str
    op: str
    target: str
    arguments: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    invariant_mode: bool = False


def _adapter(name: str) -> str:
    return f"{ADAPTERS}:{name}"


ROW, WEIGHT = "randn[M,4096]:bf16", "randn[4096]:bf16"
NORM = (f"x={ROW}", f"weight={WEIGHT}")
ADD_NORM = (f"x={ROW}", f"residual={ROW}", f"weight={WEIGHT}")
LOGITS = "randn[M,32000]:fp32"
FP8 = ("a=randn[M,4096]:fp8", "weight=randn[4096,4096]:fp8", "scale_a=ones[1]", "scale_b=ones[1]")
FEWER = ("--rows", "1024")
VLLM, INVARIANT = "vllm._custom_ops", "vllm.model_executor.layers.batch_invariant"

TORCH = {
    "mm": (f"input={ROW}", "mat2=randn[4096,4096]:bf16"),
    "addmm": ("bias=randn[4096]:bf16", f"input={ROW}", "mat2=randn[4096,4096]:bf16"),
    "bmm": ("input=randn[32,M,128]:bf16", "mat2=randn[32,128,256]:bf16"),
    "softmax": (f"input={LOGITS}",),
    "log_softmax": (f"input={LOGITS}",),
    "mean": (f"input={ROW}",),
    "total": (f"input={ROW}",),
    "layer_norm": (f"input={ROW}", f"weight={WEIGHT}", f"bias={WEIGHT}"),
    "rms_norm": (f"input={ROW}", f"weight={WEIGHT}"),
    "sdpa_decode": ("query=randn[M,8,1,64]:bf16", "key=randn[M,8,256,64]:bf16", "value=randn[M,8,256,64]:bf16"),
    "topk": (f"input={LOGITS}",),
    "embedding": ("input=randint(0,32000)[M]", "weight=randn[32000,1024]:bf16"),
    "cross_entropy": (f"input={LOGITS}", "target=randint(0,32000)[M]"),
}
WIDE = ("softmax", "log_softmax", "topk", "cross_entropy", "sdpa_decode")  # their rows are large
OUR_PRODUCTS = {
    "mm": (ROW, "randn[4096,4096]:bf16"),
    "addmm": ("randn[4096]:bf16", ROW, "randn[4096,4096]:bf16"),
    "bmm": ("randn[32,M,128]:bf16", "randn[32,128,256]:bf16"),
}


def cases() -> list[Case]:
    """Everything that is audited."""
    found = []
    for op, arguments in TORCH.items():
        options = FEWER if op in WIDE else ()
        name = "sum" if op == "total" else op
        found.append(Case("torch", name, _adapter(op), arguments, options))
        found.append(Case("torch.compile", name, _adapter(op), arguments, ("--compile", "--rows", "1024")))
    found.append(Case("torch", "_scaled_mm", _adapter("scaled_mm"), FP8))
    found.append(Case("torch", "multinomial", _adapter("multinomial"), (f"logits={LOGITS}",), FEWER))
    ours = [Case("batchproof", op, f"batchproof:{op}") for op in all_specs()]
    ours += [Case("batchproof", op, f"batchproof:{op}", arguments) for op, arguments in OUR_PRODUCTS.items()]
    return [*found, *_vllm(), *_others(), *ours]


def _vllm() -> list[Case]:
    quant, scale = "out=empty[M,4096]:fp8", "scale=full(0.05)[1]"
    per_token = ("epsilon=1e-6", "quant_dtype=torch.float8_e4m3fn")
    plain = {
        "rms_norm": (
            f"{VLLM}:rms_norm",
            ("out=empty[M,4096]:bf16", f"input={ROW}", f"weight={WEIGHT}", "epsilon=1e-6"),
        ),
        "fused_add_rms_norm": (
            f"{VLLM}:fused_add_rms_norm",
            (f"input={ROW}", f"residual={ROW}", f"weight={WEIGHT}", "epsilon=1e-6"),
        ),
        "rms_norm_static_fp8_quant": (_adapter("rms_norm_static_fp8_quant"), (quant, *NORM, scale)),
        "fused_add_rms_norm_static_fp8_quant": (
            _adapter("fused_add_rms_norm_static_fp8_quant"), (quant, *ADD_NORM, scale),
        ),
        "rms_norm_dynamic_per_token_quant": (
            f"{VLLM}:rms_norm_dynamic_per_token_quant", (f"input={ROW}", f"weight={WEIGHT}", *per_token),
        ),
        "rms_norm_per_block_quant": (
            f"{VLLM}:rms_norm_per_block_quant",
            (f"input={ROW}", f"weight={WEIGHT}", *per_token, "group_size=[1, 128]"),
        ),
        "silu_and_mul": (_adapter("silu_and_mul"), ("out=empty[M,4096]:bf16", "x=randn[M,8192]:bf16")),
        "silu_and_mul_quant": (_adapter("silu_and_mul_quant"), (quant, "x=randn[M,8192]:bf16", scale)),
        "rotary_embedding": (
            f"{VLLM}:rotary_embedding",
            (
                "positions=randint(0,4096)[M]", "query=randn[M,4096]:bf16", "key=randn[M,1024]:bf16", "head_size=128",
                "cos_sin_cache=randn[4096,128]:bf16", "is_neox=True",
            ),
        ),
        "cutlass_scaled_mm": (_adapter("cutlass_scaled_mm"), FP8),
        "scaled_fp8_quant, per tensor": (f"{VLLM}:scaled_fp8_quant", (f"input={ROW}",)),
        "scaled_fp8_quant, per token": (
            f"{VLLM}:scaled_fp8_quant", (f"input={ROW}", "use_per_token_if_dynamic=True"),
        ),
    }  # fmt: skip
    modes = [Case("vLLM", op, target, arguments) for op, (target, arguments) in plain.items()]
    modes += [
        Case("vLLM, VLLM_BATCH_INVARIANT=1", op, *plain[op], invariant_mode=True)
        for op in ("rms_norm", "fused_add_rms_norm", "rms_norm_static_fp8_quant", "cutlass_scaled_mm")
    ]
    own = {
        "mm_batch_invariant": (f"a={ROW}", "b=randn[4096,4096]:bf16"),
        "addmm_batch_invariant": ("bias=randn[4096]:bf16", f"a={ROW}", "b=randn[4096,4096]:bf16"),
        "bmm_batch_invariant": ("a=randn[32,M,128]:bf16", "b=randn[32,128,256]:bf16"),
        "linear_batch_invariant": (f"input={ROW}", "weight=randn[4096,4096]:bf16"),
        "softmax_batch_invariant": (f"input={LOGITS}", "dim=-1"),
        "log_softmax": (f"input={LOGITS}", "dim=-1"),
        "mean_batch_invariant": (f"input={ROW}", "dim=[-1]"),
        "rms_norm_batch_invariant": (f"input={ROW}", f"weight={WEIGHT}"),
    }
    modes += [
        Case("vLLM batch-invariant set", op, f"{INVARIANT}:{op}", arguments, FEWER if "softmax" in op else (), True)
        for op, arguments in own.items()
    ]
    modes += [
        Case("vLLM batch-invariant set", f"{op}, cuBLASLt without workspace", _adapter(f"mode_{op}"), TORCH[op])
        for op in ("mm", "addmm")
    ]
    sampling = "vllm.v1.sample.ops"
    request = ("index=randint(0,512)[M]", "pos=randint(0,4096)[M]", "temperature=full(0.8)[512]", "seed=arange[512]")
    samplers = {
        "gumbel_sample": (_adapter("gumbel_sample"), (f"logits={LOGITS}", *request)),
        "random_sample": (_adapter("random_sample"), (f"logits={LOGITS}",)),
        "apply_top_k_top_p_triton": (
            f"{sampling}.topk_topp_triton:apply_top_k_top_p_triton",
            (f"logits={LOGITS}", "k=randint(1,100)[M]:int32", "p=rand[M]"),
        ),
        "apply_top_k_top_p_pytorch": (
            f"{sampling}.topk_topp_sampler:apply_top_k_top_p_pytorch",
            (f"logits={LOGITS}", "k=randint(1,100)[M]", "p=rand[M]"),
        ),
        "compute_token_logprobs": (
            "vllm.v1.worker.gpu.sample.logprob:compute_token_logprobs",
            (f"logits={LOGITS}", "token_ids=randint(0,32000)[M,1]"),
        ),
    }
    return modes + [Case("vLLM samplers", op, *what, FEWER) for op, what in samplers.items()]


def _others() -> list[Case]:
    flashinfer = {
        "rmsnorm": ("flashinfer.norm:rmsnorm", (f"input={ROW}", f"weight={WEIGHT}")),
        "fused_add_rmsnorm": ("flashinfer.norm:fused_add_rmsnorm", (f"input={ROW}", *ADD_NORM[1:])),
        "silu_and_mul": ("flashinfer.activation:silu_and_mul", ("input=randn[M,8192]:bf16",)),
        "softmax": ("flashinfer.sampling:softmax", (f"logits={LOGITS}",)),
        "top_k_renorm_probs": ("flashinfer.sampling:top_k_renorm_probs", ("probs=rand[M,32000]", "top_k=50")),
        "top_p_renorm_probs": ("flashinfer.sampling:top_p_renorm_probs", ("probs=rand[M,32000]", "top_p=0.9")),
        "sampling_from_logits": (_adapter("flashinfer_sampling"), (f"logits={LOGITS}",)),
    }
    liger = {
        "rms_norm": (_adapter("liger_rms_norm"), NORM),
        "rms_norm, 256 wide": (
            _adapter("liger_rms_norm"), ("x=randn[M,256]:bf16", "weight=randn[256]:bf16"), ("--rows", "33000"),
        ),
        "fused_add_rms_norm": (_adapter("liger_fused_add_rms_norm"), ADD_NORM),
        "layer_norm": (_adapter("liger_layer_norm"), (*NORM, f"bias={WEIGHT}")),
        "softmax": (_adapter("liger_softmax"), ("x=randn[M,32000]:fp32",), FEWER),
        "swiglu": (_adapter("liger_swiglu"), (f"a={ROW}", f"b={ROW}")),
    }  # fmt: skip
    quack = {
        "rmsnorm_fwd": (_adapter("quack_rmsnorm"), ADD_NORM),
        "softmax_fwd": (_adapter("quack_softmax"), ("x=randn[M,32000]:fp32",), FEWER),
    }
    found = [Case("FlashInfer", op, *what, FEWER if "32000" in what[1][0] else ()) for op, what in flashinfer.items()]
    found += [Case("Liger", op, *what) for op, what in liger.items()]
    return found + [Case("Quack", op, *what) for op, what in quack.items()]


def run_case(case: Case, folder: Path, number: int, limit_s: float) -> dict[str, Any]:
    """Audit one case; its row of the result file."""
    path, began = folder / f"{number}.json", time.monotonic()
    environment = os.environ | {"TORCHINDUCTOR_COMPILE_THREADS": "1", "OMP_NUM_THREADS": "2", "TQDM_DISABLE": "1"}
    environment |= {"VLLM_BATCH_INVARIANT": "1" if case.invariant_mode else "0", "VLLM_PLUGINS": ""}
    command = [sys.executable, "-m", "batchproof.cli", "audit", "op", case.target, "--json", str(path)]
    command += ["--limit", str(limit_s * 0.6), *case.options]
    command += [word for argument in case.arguments for word in ("--arg", argument)]
    row: dict[str, Any] = {"library": case.library, "op": case.op, "arguments": list(case.arguments)}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=limit_s, cwd=folder, check=False
        )
        told = [line for line in done.stderr.splitlines() if line.strip()]
        why = told[-1][-300:] if told else f"exit code {done.returncode}"
    except subprocess.TimeoutExpired:
        why = f"not done after {limit_s:g} s"
    row["seconds"] = round(time.monotonic() - began, 1)
    if not path.exists():
        return row | {"verdict": "not audited", "error": why}
    report = json.loads(path.read_text().replace(f"{HERE.parent}/", ""))
    cause = next((check for check in report["checks"] if check["verdict"] == "varies"), None)
    kept = ("verdict", "classes", "gaps", "not_observed", "reproduction", "error")
    row |= {key: report[key] for key in kept}
    row["audit_seconds"] = round(report["seconds"], 1)
    row["varies"] = [check["relation"] for check in report["checks"] if check["verdict"] == "varies"]
    return row | {"cause": cause}


Rows = dict[tuple[str, str], dict[str, Any]]  # by library and op
OWN = ("commit", "date")  # facts that a row has of its own where they are not the file's


def keep(old: Mapping[str, Any], facts: Mapping[str, Any]) -> tuple[dict[str, Any], Rows, dict[str, Any]]:
    """What a result file has already, for a run that adds to it: facts, rows, and what every new row says of itself.

    SystemExit if ``facts``, those of this run, are of another device or other versions: one table has one of each.
    """
    others = [key for key, value in facts.items() if key not in OWN and old.get(key) != value]
    if others:
        seen = ", ".join(f"{key} {old.get(key)}" for key in others)
        raise SystemExit(f"--keep: the file is of {seen}, want {', '.join(str(facts[key]) for key in others)}")
    known = {(case.library, case.op) for case in cases()}
    rows = {key: row for row in old["rows"] if (key := (row["library"], row["op"])) in known}
    return dict(old), rows, {key: facts[key] for key in OWN if facts[key] != old[key]}


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/what_varies.json")
    parser.add_argument("--only", nargs="+", metavar="LIBRARY", help="libraries whose name begins so")
    parser.add_argument("--keep", action="store_true", help="keep the file's rows that are not audited again")
    parser.add_argument("--parallel", type=int, default=12, help="audits at a time; default 12")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds an audit may take; default 300")
    options = parser.parse_args()
    chosen = [c for c in cases() if not options.only or any(c.library.startswith(name) for name in options.only)]
    chosen.sort(key=lambda case: "--compile" not in case.options)  # the longest first
    out = options.out or HERE / "results" / device_folder() / "what_varies.json"
    order = {(case.library, case.op): i for i, case in enumerate(cases())}
    facts, rows, own = describe(), {}, {}
    if options.keep and out.exists():
        facts, rows, own = keep(json.loads(out.read_text()), facts)
    facts["asked"] = len(rows.keys() | {(case.library, case.op) for case in chosen})
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(options.parallel) as pool:
        waiting = [pool.submit(run_case, case, Path(folder), i, options.limit) for i, case in enumerate(chosen)]
        for future in as_completed(waiting):
            row = future.result() | own
            rows[row["library"], row["op"]] = row
            listed = [rows[key] for key in sorted(rows, key=order.__getitem__)]
            write(out, facts | {"rows": listed})  # what was done is kept if it is stopped
            said = row.get("error") or row["classes"] or ""
            print(f"{row['library']} {row['op']}: {row['verdict']} ({row['seconds']} s) {said[:100]}", flush=True)
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
