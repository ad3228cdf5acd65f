"""Markdown tables of the result files about vLLM: its latency, and the exactness of its answers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

PATH = "h200/vllm_latency.json"
H100 = "h100/vllm_latency.json"
THROUGHPUT = "h200/vllm_throughput.json"
AGAIN = "h100/vllm_exactness_batchproof.json"  # batchproof's side alone, of newer kernels
EXACTNESS = "h100/vllm_exactness.json"
# The first kind whose pattern is in a kernel's name is the kernel's kind.
KINDS = {
    "activation": r"silu|gelu|act_and_mul|activation",
    "norm with quantisation": r"(norm|rsqrt).*(quant|fp8|clamp)|quant.*norm",
    "norm": r"norm|rsqrt",
    "quantisation": r"quant|fp8_e4m3|clamp",
    "attention and KV cache": (
        r"attention|attn|flash|^(merge|prefill)_kernel|(reshape|rope)_and_cache|rotary|reduce_segments"
    ),
    "matrix products": r"gemm|cutlass|nvjet|matmul|cublas|splitk|gemv|mm_kernel|product_kernel",
    "residual add": r"fused_add|functor_add",
    "copies and fills": r"^mem(cpy|set)( |$)",
    "others": r"",
}
STEP_VARIANTS = ("e", "b", "g")  # vLLM's two modes, and all of batchproof
_QUANTISED = "norms and quantisation"  # one kernel here, two there
STEP_KINDS = {"norm with quantisation": _QUANTISED, "norm": _QUANTISED, "residual add": _QUANTISED}
STEP_KINDS |= {"quantisation": _QUANTISED}
STEP_ORDER = ("matrix products", "attention and KV cache", _QUANTISED, "activation", "others", "copies and fills")
NOTHING = "nothing runs"

Result = Mapping[str, Any]


def latency_table(result: Result, path: str = PATH) -> str:
    """Seconds of each variant under each set of flags, with the caption that says what was measured and where."""
    flags = "; ".join(f"{name}: `{' '.join(words)}`" if words else f"{name}: none" for name, words in _flags(result))
    published = result["original"]
    caption = (
        f"Median seconds for a batch of {result['batch']}, {result['input_tokens']} tokens in, "
        f"{result['output_tokens']} out, with `vllm bench latency`: at least {result['rounds']} interleaved "
        f"rounds of {result['iterations']} iterations, {result['model']}, dummy weights (right for time, no proof of "
        f"bits), {result['device']}, vLLM {result['vllm']}, torch {result['torch']} (`benchmarks/results/{path}`). "
        f"Flags: {flags}. {published['source']} reported {published['before_s']} s before the change and "
        f"{published['after_s']} s after it, on its author's machine. vLLM's own lm_head is one kernel in all runs of "
        "a mode: what it differs by from engine to engine is no variant's doing, and is in the seconds; the last "
        "column leaves it out of both sides of the ratio."
    )
    return f"{latency_rows(result)}\n\n{caption}"


def latency_rows(result: Result) -> str:
    """The table alone."""
    heads = {_key(entry): lm_head_us(entry["kernels"]) for entry in result["kernels"]}
    lines = [
        "| variant | flags | seconds | ratio to vLLM batch-invariant | lm_head, us a step | ratio without lm_head |",
        "|---|---|---|---|---|---|",
    ]
    others = {_key(row): _without_lm_head(row, heads.get(_key(row)), result) for row in result["rows"]}
    for row in result["rows"]:
        seconds = f"{row['median_s']:.4f}" if row["median_s"] is not None else f"missing: {row['missing']}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.3f}"
        head = heads.get(_key(row))
        lm_head = "" if head is None else f"{head:.0f}"
        rest, base = others[_key(row)], others.get((row["flags"], "b"))
        without = f"{rest / base:.3f}" if rest and base else ""
        lines.append(f"| {row['name']} | {row['flags']} | {_cell(seconds)} | {ratio} | {lm_head} | {without} |")
    return "\n".join(lines)


def throughput_table(result: Result, path: str = THROUGHPUT) -> str:
    """Tokens a second of each variant, and its share of vLLM's default."""
    seconds = {_key(row): row["median_s"] for row in result["rows"]}
    tokens = result["batch"] * result["output_tokens"]
    lines = ["| variant | flags | seconds | tokens out a second | share of vLLM default |", "|---|---|---|---|---|"]
    for row in result["rows"]:
        took, default = seconds[_key(row)], seconds.get((row["flags"], "e"))
        share = f"{default / took:.3f}" if took and default else ""
        figures = f"{took:.3f} | {tokens / took:.0f}" if took else f"{_cell('missing: ' + row['missing'])} | "
        lines.append(f"| {row['name']} | {row['flags']} | {figures} | {share} |")
    caption = (
        f"{result['batch']} requests at once, {result['input_tokens']} tokens in, {result['output_tokens']} out, with "
        f"`vllm bench latency`: median of {result['rounds']} interleaved rounds of {result['iterations']}, "
        f"{result['model']}, dummy weights, {result['device']}, vLLM {result['vllm']} (`benchmarks/results/{path}`)."
    )
    return "\n".join([*lines, "", caption])


def _key(row: Result) -> tuple[str, str]:
    return row["flags"], row["variant"]


def _without_lm_head(row: Result, head_us: float | None, result: Result) -> float | None:
    """Seconds less those of lm_head, which runs once for every token out."""
    seconds: float | None = row["median_s"]
    return None if seconds is None or head_us is None else seconds - result["output_tokens"] * head_us * 1e-6


def lm_head_us(kernels: list[list[Any]]) -> float | None:
    """The longest product of which a step has one: the same code and weights in every variant of one mode.

    None where lm_head runs the kernel that other layers run, too.
    """
    products = [us for name, count, us in kernels if count == 1.0 and kind_of(name) == "matrix products"]
    return max(products, default=None)


def kernels_table(result: Result, path: str = PATH) -> str:
    """Kernels of a decode step of each variant, and the caption."""
    caption = (
        f"Kernels of one decode step of a batch of {result['batch']}, and their microseconds together, "
        f"{result['device']}, vLLM {result['vllm']}, {result['model']}; by the kernels' names, kinds of which all "
        f"variants launch equally many left out. A kernel that starts before the one ahead of it has ended, as "
        f"batchproof's norms and products do among themselves, counts the time that it waits "
        f"(`benchmarks/results/{path}`)."
    )
    return f"{kernels_rows(result)}\n\n{caption}"


def kernels_rows(result: Result) -> str:
    """The table alone: all kernels of a step, then those kinds of which the variants launch different numbers."""
    variants = result["variants"]
    lines = [f"| flags | kernels | {' | '.join(variants.values())} |", "|---" * (len(variants) + 2) + "|"]
    for flags, _ in _flags(result):
        found = {entry["variant"]: entry for entry in result["kernels"] if entry["flags"] == flags}
        if not found:
            continue
        kinds = {variant: by_kind(entry["kernels"]) for variant, entry in found.items()}
        lines.append(_line(flags, "all", {variant: _sum(entry["kernels"]) for variant, entry in found.items()}, result))
        for kind in KINDS:
            figures = {variant: counts.get(kind, (0.0, 0.0)) for variant, counts in kinds.items()}
            if len({count for count, _ in figures.values()}) > 1:
                lines.append(_line(flags, kind, figures, result))
    return "\n".join(lines)


def step_table(
    result: Result, path: str = PATH, heading: str = "### A decode step, kernel by kernel"
) -> str:  # fmt: skip
    """A decode step, kernel by kernel, with its plot and caption; nothing where no step was read from a trace."""
    if not step_entries(result):
        return ""
    caption = (
        f"Launches in one decode step of a batch of {result['batch']} and the microseconds that they add to it, "
        f"{result['device']}, vLLM {result['vllm']}, {result['model']}, {result['context']} tokens a request. A kernel "
        "adds the time from the latest end of those that started before it to its own end, so that all of them and "
        "the time when nothing runs are the step, though kernels start early. A step goes from its first "
        "kernel to the next step's, and is the median of those in the middle of a profiled run that launch the same "
        "kernels; the last row is the seconds of the benchmark, which has no profiler, over its tokens out. Floor: "
        f"what a kind has to move, once, at the {result['copy_gbps']:.0f} GB/s of a copy in the same run: weights; "
        "keys and values; what norms and activations read and write if their output is quantised at once "
        f"(`benchmarks/results/{path}`)."
    )
    picture = f"vllm_step_{path.split('/')[0]}.png"
    return f"{heading}\n\n![A decode step]({picture})\n\n{step_rows(result)}\n\n{caption}"


def step_rows(result: Result) -> str:
    """The table alone: kinds of kernels, the time when nothing runs, the step, and the step without a profiler."""
    entries, floor = step_entries(result), floor_us(result)
    names = [result["variants"][variant] for variant in STEP_VARIANTS if variant in result["variants"]]
    lines = [f"| flags | kernels | floor, us | {' | '.join(names)} |", "|---" * (len(names) + 3) + "|"]
    seconds = {_key(row): row["median_s"] for row in result["rows"]}
    for flags in dict.fromkeys(flags for flags, _ in entries):
        found = {variant: entry for (under, variant), entry in entries.items() if under == flags}
        kinds = {variant: step_by_kind(entry) for variant, entry in found.items()}
        for kind in STEP_ORDER:
            figures = {variant: groups.get(kind, (0.0, 0.0)) for variant, groups in kinds.items()}
            if any(count for count, _ in figures.values()):
                lines.append(_step_line(flags, kind, floor.get(kind), figures, result))
        gaps = {variant: (None, entry["gap_us"]) for variant, entry in found.items()}
        lines.append(_step_line(flags, NOTHING, None, gaps, result))
        whole = {v: (sum(count for count, _ in kinds[v].values()), entry["step_us"]) for v, entry in found.items()}
        lines.append(_step_line(flags, "**step**", sum(floor.values()) or None, whole, result))
        timed = {v: (None, 1e6 * s / result["output_tokens"]) for v in found if (s := seconds.get((flags, v)))}
        lines.append(_step_line(flags, "without the profiler", None, timed, result))
    return "\n".join(lines)


def step_entries(result: Result) -> dict[tuple[str, str], Result]:
    """What was read of decode steps, by flags and variant, in the order in which they are shown."""
    found = {_key(entry): entry for entry in result["kernels"] if "step_us" in entry}
    return {(flags, v): found[flags, v] for flags, _ in _flags(result) for v in STEP_VARIANTS if (flags, v) in found}


def step_by_kind(entry: Result) -> dict[str, tuple[float, float]]:
    """(launches, microseconds added) of each kind of what runs in a step."""
    groups: dict[str, tuple[float, float]] = {}
    for name, launches, added, _ in entry["added"]:
        kind = kind_of(name)
        kind = STEP_KINDS.get(kind, kind)
        count, us = groups.get(kind, (0.0, 0.0))
        groups[kind] = (count + launches, us + added)
    return groups


def floor_us(result: Result) -> dict[str, float]:
    """Microseconds that each kind of kernels needs to move its bytes once, at the bandwidth of a copy in the run.

    For the model of the benchmark: fp8 weights, but a bf16 language model's head; bf16 activations and cache.
    """
    if "shapes" not in result:
        return {}
    shapes, batch = result["shapes"], result["batch"]
    layers, hidden, inner = (shapes[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    queries = shapes["num_attention_heads"] * shapes["head_dim"]
    keys_and_values = 2 * shapes["num_key_value_heads"] * shapes["head_dim"]
    weights = layers * (hidden * (2 * queries + keys_and_values) + 3 * hidden * inner)
    rows = layers * batch
    moved = {
        "matrix products": weights + 2 * shapes["vocab_size"] * hidden,
        "attention and KV cache": rows * result["context"] * 2 * keys_and_values,
        # Two norms read both halves of a sum and write it and fp8; attention's output to fp8; the last norm, to bf16.
        _QUANTISED: rows * (2 * (3 * 2 + 1) * hidden + (2 + 1) * queries) + batch * 3 * 2 * hidden,
        "activation": rows * (2 * 2 + 1) * inner,
    }
    return {kind: count / (1e3 * result["copy_gbps"]) for kind, count in moved.items()}


SIDES = {"stock": "vLLM batch-invariant", "batchproof": "with batchproof"}
CONFIGURATIONS = {
    "graphs": "CUDA graphs",
    "chunked": "CUDA graphs, prompts in chunks of 512, prefix caching",
    "eager": "eager",
    "default flags": "CUDA graphs, default flags",
    "preempted": "CUDA graphs, a cache of 3840 tokens, from which requests are preempted",
}


def exactness_table(result: Result, every: bool = False, path: str = EXACTNESS) -> str:
    """Comparisons that differ, stock and with batchproof; ``every`` adds what else was compared and what differed."""
    found = {(row["model"], row["configuration"], row["side"]): row for row in result["rows"]}
    names = " | ".join(f"{name}: changed" for name in SIDES.values())
    lines = [f"| model | run | {names} |", "|---|---|---|---|"]
    for model, configuration in dict.fromkeys((model, configuration) for model, configuration, _ in found):
        cells = [_changed(found.get((model, configuration, side)), "greedy") for side in SIDES]
        preempted = [found.get((model, configuration, side), {}).get("preemptions") for side in SIDES]
        times = f" ({' and '.join(str(count) for count in preempted if count)} times)" if any(preempted) else ""
        lines.append(f"| {model} | {CONFIGURATIONS[configuration]}{times} | {' | '.join(cells)} |")
    lines += [
        "",
        "A request alone against the same request in company: 3, 40 and 300 neighbours, at first, middle and last "
        "place, prefill past 256 tokens, long neighbours, cached prefixes; prompts of 40, 300 and 700 tokens, 12 "
        "greedy tokens; token ids, the 20 best logprobs and the prompt's compared to the bit. 4 layers with random "
        f"weights of an 8B model's shapes (Gemma-2: the 2B's), TRITON_ATTN, {result['device']}, vLLM "
        f"{result['vllm']}, torch {result['torch']} (`benchmarks/results/{path}`{_commits(result)}).",
    ]
    if every:
        lines += ["", *_else_compared(result)]
    return "\n".join(lines)


def exactness_line(result: Result, path: str = AGAIN) -> str:
    """What a run of one side compared, in a sentence."""
    compared, differ = (
        sum(row[f"{kind}_{what}"] for row in result["rows"] for kind in ("greedy", "seeded"))
        for what in ("comparisons", "differ")
    )
    failed = "".join(
        f" {row['model']}, {row['configuration']}: {row['error']}." for row in result["rows"] if row["error"]
    )
    return (
        f"The same on an {result['device']}, with batchproof: {differ} of {compared} comparisons differ in "
        f"{len(result['rows'])} engines (`benchmarks/results/{path}`, commit {result['commit']}).{failed}"
    )


def _commits(result: Result) -> str:
    """Of which commits the sides' rows are, where they are not of one run."""
    sides = {side: sorted({row.get("commit", result["commit"]) for row in result["rows"] if row["side"] == side})
             for side in SIDES}  # fmt: skip
    if len({commit for commits in sides.values() for commit in commits}) == 1:
        return ""
    return "; " + ", ".join(f"{SIDES[side]}: run at {' and '.join(commits)}" for side, commits in sides.items())


def _changed(row: Result | None, kind: str) -> str:
    if row is None:
        return "-"
    return (
        f"not run: {_cell(row['error'])}"
        if row["error"]
        else f"{row[f'{kind}_differ']} of {row[f'{kind}_comparisons']}"
    )


def _else_compared(result: Result) -> list[str]:
    seeded = [
        f"{row['model']}, {row['configuration']}, {SIDES[row['side']]}: {_changed(row, 'seeded')}"
        for row in result["rows"]
    ]
    lines = [f"With a seed, at temperature 0.8, alone against 300 neighbours, changed: {'; '.join(seeded)}."]
    across = [
        f"{row['model']}, {SIDES[row['side']]}: {row['differ']} of {row['comparisons']}"
        for row in result["chunked_against_whole"]
    ]
    if across:
        lines += [
            "",
            f"Prompts in chunks of 512 against whole prompts, in another engine, changed: {'; '.join(across)}.",
        ]
    for side in SIDES:
        places: dict[str, int] = {}
        for row in (row for row in result["rows"] if row["side"] == side):
            for difference in row["differences"]:
                if difference["kind"] == "greedy":
                    place = f"{difference['prompt']} tokens {difference['scenario']}"
                    places[place] = places.get(place, 0) + 1
        listed = ", ".join(f"{place} ({count})" for place, count in sorted(places.items(), key=lambda item: -item[1]))
        lines += ["", f"What changed, {SIDES[side]}: {listed or 'nothing'}."]
    return lines


def kind_of(name: str) -> str:
    """The kind of a kernel."""
    return next(kind for kind, pattern in KINDS.items() if re.search(pattern, name.lower()))


def by_kind(kernels: list[list[Any]]) -> dict[str, tuple[float, float]]:
    """(launches, microseconds together) of each kind of kernel in a decode step."""
    groups: dict[str, list[list[Any]]] = {}
    for kernel in kernels:
        groups.setdefault(kind_of(kernel[0]), []).append(kernel)
    return {kind: _sum(group) for kind, group in groups.items()}


def _sum(kernels: list[list[Any]]) -> tuple[float, float]:
    return round(sum(count for _, count, _ in kernels), 2), sum(count * us for _, count, us in kernels)


def _line(flags: str, kind: str, figures: Mapping[str, tuple[float, float]], result: Result) -> str:
    cells = []
    for variant in result["variants"]:
        count, us = figures.get(variant, (None, 0.0))
        cells.append("-" if count is None else f"{count:g} ({us:.0f} us)" if count else "0")
    return f"| {flags} | {kind} | {' | '.join(cells)} |"


def _step_line(
    flags: str, kind: str, floor: float | None, figures: Mapping[str, tuple[float | None, float]], result: Result
) -> str:
    cells = ["" if floor is None else f"{floor:.0f}"]
    for variant in (variant for variant in STEP_VARIANTS if variant in result["variants"]):
        count, us = figures.get(variant, (0.0, 0.0))
        cells.append(f"{us:.0f} us" if count is None else f"{count:.4g} ({us:.0f} us)" if count else "-")
    return f"| {flags} | {kind} | {' | '.join(cells)} |"


def _flags(result: Result) -> list[tuple[str, list[str]]]:
    return list(result["flags"].items())


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
