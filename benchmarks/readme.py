"""Write the figures of README.md and docs from the committed result files; ``--check`` only says whether they are."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import attention_tables
import audit_tables
import linear_tables
import sample_tables
import softmax_tables
import tables
import vllm_tables

HERE = Path(__file__).parent
README = HERE.parent / "README.md"
GEMMA = "h200/attention_gemma.json"
BENCHMARKS = HERE.parent / "docs" / "benchmarks.md"
VLLM = HERE.parent / "docs" / "vllm.md"
WHAT_VARIES = HERE.parent / "docs" / "what_varies.md"
NORMS: tuple[str, ...] = (
    "rms_norm",
    "rms_norm_quant",
    "layer_norm",
    "rms_norm_gated",
    "rms_norm_backward",
)


def load(path: str) -> dict[str, Any]:
    """A result file by its path under results/."""
    result: dict[str, Any] = json.loads((HERE / "results" / path).read_text())
    return result


def generate_table(path: str) -> str:
    """Tokens a second at each batch size, and batchproof's share of each stock figure."""
    result = load(path)
    threads = f", {result['threads']} threads" if "threads" in result else ""
    lines = [
        "| requests in the batch | stock `generate` | stock `generate_batch` | batchproof | share of each |",
        "|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        padded, continuous, ours = (row[f"{name}_tokens_per_s"] for name in ("padded", "continuous", "batchproof"))
        shares = f"{ours / padded:.2f}, {ours / continuous:.2f}"
        lines.append(f"| {row['batch_size']} | {padded:.0f} | {continuous:.0f} | {ours:.0f} | {shares} |")
    where = f"{result['device']}{threads}, torch {result['torch']}, transformers {result['transformers']}"
    lines.append("")
    what = f"Tokens a second, {result['tokens']} a request, {result['model']} model, {result['dtype']}"
    lines.append(f"{what}, {where} (`benchmarks/results/{path}`).")
    return "\n".join(lines)


def demo_table(path: str) -> str:
    """Requests whose bits changed, by batch size and way of running."""
    result = load(path)
    ways = result["ways"]
    lines = [f"| requests in the batch | {' | '.join(ways)} |", "|---" * (len(ways) + 1) + "|"]
    for i, size in enumerate(result["batch_sizes"]):
        label = f"{size} (again)" if size == 1 else str(size)
        lines.append(f"| {label} | {' | '.join(str(way['changed'][i]) for way in ways.values())} |")
    lines.append("")
    lines.append(
        f"Requests, of {result['requests']}, with a bit of their logits changed against the same request alone: "
        f"{result['model']} model, {result['dtype']}, {result['device']}, torch {result['torch']}, transformers "
        f"{result['transformers']}. {'; '.join(f'{name}: {_sentence(way)}' for name, way in ways.items())} "
        f"(`benchmarks/results/{path}`)."
    )
    return "\n".join(lines)


def _sentence(way: dict[str, Any]) -> str:
    return " ".join(way["how"].replace(";", ",").split())


def tests_line(path: str) -> str:
    """One line about a committed run of the tests."""
    result = load(path)
    counts = ", ".join(f"{result[key]} {key}" for key in ("passed", "failed", "skipped"))
    if result.get("not_reached"):
        counts += f", {result['not_reached']} not reached in the time there was"
    return (
        f"{result['device']}, torch {result['torch']}, triton {result['triton']}: {counts} "
        f"(`benchmarks/results/{path}`)."
    )


def norms_summary() -> str:
    """The norms in few lines."""
    return tables.summary({name: load(f"h200/{name}.json") for name in NORMS}, "docs/norms_latency_h200.png")


def norms_page(name: str) -> str:
    """All figures of one norm benchmark, and the plots, which are of the first."""
    plots = "".join(f"![{what}](norms_{what}_h200.png)\n\n" for what in ("latency", "bandwidth") if name == NORMS[0])
    return plots + tables.full(name, load(f"h200/{name}.json"))


Blocks = dict[str, Callable[[], str]]
LINEAR = ("h200/linear.json", "h200/linear_invariant.json")
LINEAR_MORE = {f"linear {what}": f"h200/linear_{what}.json" for what in ("scales", "blocks", "models")}


def linear_pages() -> Blocks:
    """The linear layers' tables: one model with every number of tokens, other formats of scales, other models."""
    blocks: Blocks = {"linear h200": lambda: linear_tables.page([load(path) for path in LINEAR], LINEAR)}
    for name, path in LINEAR_MORE.items():
        blocks[f"{name} h200"] = lambda p=path: linear_tables.page([load(p)], [p])  # type: ignore[misc]
    return blocks


def attention_pages() -> Blocks:
    """The tables of attention, and of softmax and sampling over vocabularies."""
    return {
        "attention h200": lambda: attention_tables.page(load("h200/attention.json"), "h200/attention.json"),
        "attention gemma h200": lambda: attention_tables.page(load(GEMMA), GEMMA),
        "softmax h200": lambda: softmax_tables.page(load("h200/softmax.json"), "h200/softmax.json"),
        "sample h200": lambda: sample_tables.page(load("h200/sample.json"), "h200/sample.json"),
    }


def pages() -> dict[Path, Blocks]:
    """What fills the markers of every page."""
    blocks: Blocks = {
        "demo cpu": lambda: demo_table("cpu/demo.json"),
        "generate cpu": lambda: generate_table("cpu/generate.json"),
        "generate h200": lambda: generate_table("h200/generate.json"),
        "tests h200": lambda: tests_line("h200/tests.json"),
    }
    if NORMS:
        blocks["norms h200"] = norms_summary
    blocks["linear h200"] = lambda: linear_tables.summary([load(path) for path in LINEAR], LINEAR)
    latency = load(vllm_tables.PATH)
    exactness, again, h100 = (load(path) for path in (vllm_tables.EXACTNESS, vllm_tables.AGAIN, vllm_tables.H100))
    throughput = load(vllm_tables.THROUGHPUT)
    blocks["vllm latency h200"] = lambda: vllm_tables.latency_table(latency)
    blocks["vllm throughput h200"] = lambda: vllm_tables.throughput_table(throughput)
    blocks["vllm exactness"] = lambda: vllm_tables.exactness_table(exactness)
    vllm = {
        "vllm latency h200": blocks["vllm latency h200"],
        "vllm exactness": lambda: vllm_tables.exactness_table(exactness, every=True),
        "vllm exactness again": lambda: vllm_tables.exactness_line(again),
        "vllm throughput h200": blocks["vllm throughput h200"],
        "vllm kernels h200": lambda: vllm_tables.kernels_table(latency),
        "vllm step": lambda: vllm_tables.step_table(latency),
        "vllm latency h100": lambda: vllm_tables.latency_rows(h100),
        "vllm step h100": lambda: vllm_tables.step_table(h100, vllm_tables.H100, "### The same on an H100"),
    }
    audited = load(audit_tables.PATH)
    blocks["what varies summary h200"] = lambda: audit_tables.summary(audited)
    served = load(audit_tables.SERVERS)
    audits: Blocks = {
        "what varies h200": lambda: audit_tables.what_varies(audited),
        "what varies servers h200": lambda: audit_tables.servers(served),
    }
    return {
        README: blocks,
        WHAT_VARIES: audits,
        BENCHMARKS: {f"{name} h200": partial(norms_page, name) for name in NORMS} | linear_pages() | attention_pages(),
        VLLM: vllm,
    }


def render(page: Path, text: str) -> str:
    """``text`` of ``page`` with every block between its markers made anew."""
    for name, block in pages()[page].items():
        begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text, count = re.subn(pattern, lambda _, b=begin, e=end, f=block: f"{b}\n{f()}\n{e}", text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page.name} has the block {name!r} {count} times, want once")
    return text


def main() -> int:
    """Write the pages, or check them."""
    stale = {page: rendered for page in pages() if (rendered := render(page, page.read_text())) != page.read_text()}
    if "--check" in sys.argv[1:]:
        return 1 if stale else 0
    for page, rendered in stale.items():
        page.write_text(rendered)
    return 0


if __name__ == "__main__":
    sys.exit(main())
