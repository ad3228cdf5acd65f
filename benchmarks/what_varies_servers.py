"""Audit real vLLM servers from outside: batch-invariant mode as vLLM has it, with batchproof's plug-in, and off.

``python benchmarks/what_varies_servers.py`` starts ``vllm serve`` once for each on this machine, side by side on the
GPU, with random weights of an 8B model's shapes and the built-in model's tokenizer, audits them one after another and
writes benchmarks/results/<device>/what_varies_servers.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batchproof.audit.server import audit_server
from run import describe, device_folder, write

HERE = Path(__file__).parent
sys.path.append(str(HERE.parent / "tools"))
MODEL = "random-llama"
SERVERS = {
    "vLLM default": {"VLLM_BATCH_INVARIANT": "0", "VLLM_PLUGINS": ""},
    "vLLM batch-invariant": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": ""},
    "with batchproof": {"VLLM_BATCH_INVARIANT": "1", "VLLM_PLUGINS": "batchproof", "BATCHPROOF_STRICT": "1"},
}
# The flags of vLLM's PR 40413, and eager, which starts fastest and launches the same kernels.
FLAGS = [
    "--attention-backend=TRITON_ATTN", "-cc.custom_ops+=+rms_norm", "-cc.pass_config.fuse_norm_quant=False",
    "--enforce-eager", "--max-model-len=2048", "--max-num-seqs=512", "--max-logprobs=20",
    "--gpu-memory-utilization=0.1", "--kv-cache-memory-bytes=4294967296", "--enable-prompt-tokens-details",
    f"--served-model-name={MODEL}", "--uvicorn-log-level=warning",
]  # fmt: skip


def write_model(folder: Path) -> Path:
    """A checkpoint of four layers whose vocabulary is that of the built-in model's tokenizer, beside it."""
    from random_checkpoint import write_checkpoint

    built_in = HERE.parent / "src" / "batchproof" / "models" / "tiny_llama"
    vocabulary = json.loads((built_in / "config.json").read_text())["vocab_size"]
    write_checkpoint(folder, "llama", False, layers=4, vocab=vocabulary)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(built_in / name, folder)
    return folder


def start(name: str, model: Path, port: int, logs: Path) -> subprocess.Popen[bytes]:
    """A server in a process group of its own."""
    environment = os.environ | {"VLLM_NO_USAGE_STATS": "1", "HF_HUB_OFFLINE": "1", "VLLM_USE_FLASHINFER_SAMPLER": "0"}
    environment |= SERVERS[name] | {"VLLM_CACHE_ROOT": str(logs / f"{port}_cache")}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS]
    with (logs / f"{name.replace(' ', '_')}.log").open("w") as log:
        return subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )


def wait(process: subprocess.Popen[bytes], port: int, deadline: float) -> str | None:
    """Wait until a server answers; why not, if it does not."""
    while time.monotonic() < deadline:
        if process.poll() is not None:
            return f"it ended with exit code {process.returncode}"
        with suppress(OSError), urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2):
            return None
        time.sleep(0.5)
    return "it did not answer in time"


def audit(name: str, port: int, options: argparse.Namespace) -> dict[str, Any]:
    """A row of the result file."""
    report = audit_server(
        f"http://127.0.0.1:{port}/v1", MODEL, max_concurrency=options.max_concurrency, limit_s=options.limit
    )
    print(f"{name}\n{report.text()}", flush=True)
    if options.reports:
        options.reports.mkdir(parents=True, exist_ok=True)
        (options.reports / f"{name.replace(' ', '_')}.json").write_text(report.to_json())
    checks = json.loads(report.to_json())["checks"]
    return {
        "server": name, "environment": SERVERS[name], "verdict": report.verdict, "error": report.error,
        "checks": checks, "not_observed": report.not_observed, "seconds": round(report.seconds, 1),
    }  # fmt: skip


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<device>/what_varies_servers.json")
    parser.add_argument("--servers", nargs="+", choices=SERVERS, default=list(SERVERS))
    parser.add_argument("--max-concurrency", type=int, default=300, help="default 300")
    parser.add_argument("--limit", type=float, default=300.0, help="seconds an audit may take; default 300")
    parser.add_argument("--start-limit", type=float, default=300.0, help="seconds to start in; default 300")
    parser.add_argument("--logs", type=Path, help="folder for the servers' logs; default: a temporary one")
    parser.add_argument("--reports", type=Path, help="folder for the audits' whole reports")
    options = parser.parse_args()
    logs = options.logs or Path(tempfile.mkdtemp(prefix="what_varies_servers_"))
    logs.mkdir(parents=True, exist_ok=True)
    out = options.out or HERE / "results" / device_folder() / "what_varies_servers.json"
    facts = describe() | {"vllm": version("vllm"), "flags": FLAGS, "max_concurrency": options.max_concurrency}
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = write_model(Path(folder) / MODEL)
        ports = {name: free_port() for name in options.servers}
        processes = {name: start(name, model, port, logs) for name, port in ports.items()}
        try:
            deadline = time.monotonic() + options.start_limit
            for name, process in processes.items():
                why = wait(process, ports[name], deadline)
                if why is None:
                    rows.append(audit(name, ports[name], options))
                else:
                    rows.append({"server": name, "verdict": "not audited", "error": f"{why}; its log is in {logs}"})
                    print(f"{name}: {why}", flush=True)
                write(out, facts | {"rows": rows})  # what was done is kept if it is stopped
        finally:
            for process in processes.values():
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    print(f"written to {out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
