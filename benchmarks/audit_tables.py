"""Markdown tables of what_varies.json: which ops' bits follow the batch, from which size on, and by what.

And of what_varies_servers.json: which relations vary in which server.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from batchproof.audit.launches import explain
from batchproof.audit.report import Launch

PATH = "h200/what_varies.json"
SERVERS = "h200/what_varies_servers.json"
# Relations of the batch: what is said of a row if they vary. A layout is the row's own.
PLACES = {
    "repeat": "not the same from run to run",
    "neighbours": "by what the neighbours hold",
    "position": "by the place in the batch",
    "padding": "by padding",
    "chunking": "by chunking",
    "graph against eager": "in a CUDA graph",
}

Result = Mapping[str, Any]


def what_varies(result: Result, path: str = PATH) -> str:
    """A table for every library, in the order of the audits, and how they were audited."""
    parts = [counts(result), ""]
    for library in dict.fromkeys(row["library"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["library"] == library]
        parts += [f"### {library}", "", "| op | bit classes of M | the bits vary | cause |", "|---|---|---|---|"]
        parts += [_line(row) for row in rows]
        parts.append("")
    parts.append(
        f"{result['device']}, torch {result['torch']}, triton {result['triton']} (`benchmarks/results/{path}`, with "
        "the arguments of every audit, the kernels on either side of a threshold, and a program that shows it)."
    )
    return "\n".join(parts)


LIBRARIES = {
    "torch": "torch", "torch.compile": "torch, compiled", "vLLM": "vLLM", "vLLM, VLLM_BATCH_INVARIANT=1": "vLLM's mode",
    "vLLM batch-invariant set": "vLLM's batch-invariant ops", "vLLM samplers": "vLLM's samplers",
    "FlashInfer": "FlashInfer", "Liger": "Liger", "Quack": "Quack", "batchproof": "batchproof",
}  # fmt: skip


def summary(result: Result, path: str = PATH) -> str:
    """A line for every library: which of its ops vary with the batch, and from which size on."""
    lines = ["| ops of | audited | vary with the batch, from a batch of |", "|---|---|---|"]
    for library, name in LIBRARIES.items():
        rows = [row for row in result["rows"] if row["library"] == library and row["verdict"] != "not audited"]
        found = [f"{row['op']} {_from(row['cause'])}" for row in rows if varies_with_batch(row)]
        lines.append(f"| {name} | {len(rows)} | {', '.join(found) or 'none'} |")
    return "\n".join(
        [*lines, "", f"{result['device']}, torch {result['torch']}; what and why: [what varies](docs/what_varies.md) "
         f"(`benchmarks/results/{path}`)."]
    )  # fmt: skip


def _from(cause: Result) -> str:
    return "(from run to run)" if cause["relation"] == "repeat" else str(cause["threshold"])


def counts(result: Result) -> str:
    """How many ops vary, others' and batchproof's."""
    audited = [row for row in result["rows"] if row["verdict"] != "not audited"]
    ours = [row for row in audited if row["library"] == "batchproof"]
    others = [row for row in audited if row["library"] != "batchproof"]
    return (
        f"{len(audited)} audits. Of {len(others)} ops of others, {sum(map(varies_with_batch, others))} vary with the "
        f"batch or from run to run, and {sum(map(varies_by_layout_alone, others))} by layout alone; of batchproof's "
        f"{len(ours)}, {sum(map(varies_with_batch, ours))} and {sum(map(varies_by_layout_alone, ours))}."
    )


def varies_with_batch(row: Result) -> bool:
    """Whether a relation of the batch varies, not just that of a row's layout."""
    return any(relation != "layout" for relation in row.get("varies", ()))


def varies_by_layout_alone(row: Result) -> bool:
    """Whether the layout of a row is all that its bits depend on."""
    return list(row.get("varies", ())) == ["layout"]


def _line(row: Result) -> str:
    if row["verdict"] == "not audited":
        return f"| {row['op']} | | not audited | {_cell(row.get('error') or 'see the file')} |"
    found = row["varies"]
    said = [PLACES[relation] for relation in found if relation in PLACES]
    if "batch size" in found:
        threshold = row["cause"]["threshold"] if row["cause"]["relation"] == "batch size" else None
        said.insert(0, "by M" + (f", first at {threshold}" if threshold else ""))
    if "layout" in found:
        said.append("by layout")
    why = _cause(row["cause"]) if row["cause"] else ""
    return f"| {row['op']} | {_cell(row['classes'] or '')} | {', '.join(said) or 'no'} | {_cell(why)} |"


def _cause(cause: Result) -> str:
    """What differs between the launches on either side, or what was seen."""
    if cause["relation"] == "batch size" and cause["launches"]:
        before, after = ([Launch(**launch) for launch in side] for side in cause["launches"])
        return f"`{explain(before, after)}`"
    differs = cause["difference"]
    return f"{cause['detail']} ({differs['elements']} of {differs['of']} elements)" if differs else cause["detail"]


# What a server's check has in its detail only, as batchproof.audit.server.relations writes it.
_STORM = re.compile(r"of (\d+) requests.*?words in the others' prompts: (\d+)")
_RUNNING = re.compile(r"at most (\d+) running by the server's own count")


def servers(result: Result, path: str = SERVERS) -> str:
    """A line for every relation, a column for every server; how much each audit compared; how they were audited."""
    rows = result["rows"]
    checks = [{check["relation"]: check for check in row.get("checks", ())} for row in rows]
    relations = dict.fromkeys(relation for found in checks for relation in found)
    table = {relation: [_found(found.get(relation)) for found in checks] for relation in relations}
    table["answers compared"] = [str(sum(check["cases"] for check in found.values())) for found in checks]
    table["most requests seen running at once"] = [_running(found.values()) for found in checks]
    lines = [f"| relation | {' | '.join(row['server'] for row in rows)} |", "|---" * (len(rows) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(map(_cell, cells))} |" for name, cells in table.items()]
    failed = "".join(f" {row['server']}: {row['error']}." for row in rows if row.get("error"))
    return "\n".join(
        [*lines, "", "The smallest case in which an answer was another than alone; where it was tried twice more, and "
         "did not come out the same, it says so, and no threshold is named. Up to "
         f"{result['max_concurrency']} requests were sent together; those running are by the server's own count, asked "
         f"for while they ran.{failed} 4 layers with random weights of an 8B model's shapes, TRITON_ATTN, eager, "
         f"{result['device']}, vLLM {result['vllm']}, torch {result['torch']} (`benchmarks/results/{path}`, with all "
         "flags, and what differed)."]
    )  # fmt: skip


def _found(check: Result | None) -> str:
    """The verdict, and of what varies the smallest case."""
    if check is None or check["verdict"] != "varies":
        return check["verdict"] if check else "not audited"
    storm, detail = _STORM.search(check["detail"]), check["detail"]
    if check["threshold"] is not None:
        case = f"from {check['threshold']} {check['unit']} on"
    elif storm:
        case = f"{storm[1]} requests, the others of {storm[2]} word{'' if storm[2] == '1' else 's'}"
    else:
        case = detail.split(";")[0]
    return f"varies: {case}" + (", not each time" if "not the same each time" in detail else "")


def _running(checks: Iterable[Result]) -> str:
    counts = [int(found[1]) for check in checks if (found := _RUNNING.search(check["detail"]))]
    return str(max(counts)) if counts else "not counted"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
