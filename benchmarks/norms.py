"""What every benchmark of a norm does: open the gate for all cases, then race ours against the peers on each."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from tqdm import tqdm

import batchproof
import gate
import peers
import timing
from batchproof.errors import BatchproofError
from batchproof.registry import OpSpec, get_spec
from cases import Case
from errors import Refused
from peers import Calls
from tables import OURS, best_peer, failures
from timing import Prepare

ROUNDS, QUICK_ROUNDS = 12, 5
QUICK_TOKENS = (1, 32, 512, 4096)
HOW = {
    "cold": "every buffer is read from memory: the sets a graph goes over exceed the L2 cache twice, unless that takes "
    f"more than {timing.MAX_SETS}: one row of 4096 is still partly in the cache",
    "warm": f"{timing.WARM_SETS} sets, in the L2 cache when tokens are few; absent where that would be cold as well",
    "figures": "CUDA graphs, contenders in shuffled turns; microseconds a launch: median, 20th and 80th percentile",
    "floor_us": "bytes that must be moved, weights not counted, over the copy bandwidth of this run",
    "compiled_tokens": "torch.compile is given static shapes, and is raced for these numbers of tokens only",
    "missing": "peers that could not be imported; a row's: peers that do not run it, or compute something else",
    "gate": f"of every case: accuracy, and bits against batches of 1 and {gate.BATCHES}, with adversarial rows as well",
}


def rms_norm(b: Any) -> Any:
    """Ours, on a case's buffers, where it is not the op that is raced."""
    return batchproof.rms_norm(b.x, b.weight, b.eps)


def add_rms_norm(b: Any) -> Any:
    """Ours, of a residual sum."""
    return batchproof.add_rms_norm(b.x, b.residual, b.weight, b.eps)


def forward(call: Callable[[Any], Any]) -> Prepare:
    """A contender that is timed as it is called."""
    return lambda b: partial(call, b)


@dataclass(frozen=True)
class Race:
    """A benchmark's cases, and what runs on them.

    Attributes:
        cases: in the order of the result file.
        specs: by op, what the gate holds ours to.
        missing_ops: ops the library does not have, and why; their cases are left out.
        calls: by op, ours; default: the spec's op on the case's inputs.
        extra: further contenders of ours, by name and op.
        prepare: makes a contender of a call.
        compiled_tokens: the tokens for which contenders that are compiled for one shape are raced.
        host: whether the host's time for an eager call is taken.
    """

    cases: Sequence[Case]
    specs: Mapping[str, OpSpec]
    missing_ops: Mapping[str, str] = field(default_factory=dict)
    calls: Calls = field(default_factory=dict)
    extra: Mapping[str, Calls] = field(default_factory=dict)
    prepare: Callable[[Callable[[Any], Any]], Prepare] = forward
    compiled_tokens: Sequence[int] = ()
    host: bool = True


def add_arguments(
    parser: argparse.ArgumentParser, ops: Sequence[str], hidden: Sequence[int], tokens: Sequence[int]
) -> None:
    """The options that narrow a benchmark."""
    several = {"nargs": "+", "metavar": "N", "type": int}
    parser.add_argument("--ops", nargs="+", choices=ops, default=list(ops), metavar="OP", help=", ".join(ops))
    parser.add_argument("--hidden", default=list(hidden), help=f"hidden sizes; default: {_listed(hidden)}", **several)
    parser.add_argument("--tokens", help=f"numbers of tokens; default: {_listed(tokens)}", **several)
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, default=list(peers.PEERS), metavar="PEER",
                        help=f"default: all of {', '.join(peers.PEERS)}; none given: ours alone")  # fmt: skip
    parser.add_argument("--rounds", type=int, help=f"measurements of each contender; default: {ROUNDS}")
    parser.add_argument("--seconds", type=float, help="begin no case after so long; the file names those left out")
    parser.add_argument("--quick", action="store_true", help=f"tokens {_listed(QUICK_TOKENS)}, {QUICK_ROUNDS} rounds")
    parser.set_defaults(all_tokens=tuple(tokens))


def tokens(options: argparse.Namespace) -> list[int]:
    """The numbers of tokens that were asked for."""
    quick = [size for size in options.all_tokens if size in QUICK_TOKENS]
    return options.tokens or (quick if options.quick else list(options.all_tokens))


def find(ops: Iterable[str]) -> tuple[dict[str, OpSpec], dict[str, str]]:
    """The specs of ``ops``, and a reason for each op the library does not have."""
    specs, missing = {}, {}
    for op in ops:
        try:
            specs[op] = get_spec(op)
        except BatchproofError:
            missing[op] = "no op of that name in the registry"
    return specs, missing


def run(race: Race, options: argparse.Namespace) -> dict[str, Any]:
    """Gate, race, print; the result file's contents. Raises ``Refused`` before anything is timed."""
    deadline = time.monotonic() + (options.seconds or float("inf"))
    generator = torch.Generator("cuda" if timing.has_gpu() else "cpu").manual_seed(0)
    cases = [case for case in race.cases if case.op in race.specs]
    with timing.side_stream(), torch.no_grad():
        _gate(race, cases, generator)
        calls, missing = peers.load(options.peers)
        result: dict[str, Any] = {
            "how": HOW,
            "copy_gbps": round(timing.copy_gbps(), 1),
            "empty_kernel_us": timing.empty_kernel_us(),
            "l2_bytes": timing.l2_bytes(),
            "rounds": options.rounds or (QUICK_ROUNDS if options.quick else ROUNDS),
            "peers": peers.versions(calls),
            "missing": missing,
            "missing_ops": dict(race.missing_ops),
            "compiled_tokens": list(race.compiled_tokens),
            "left_out": [],
            "host_us": {},
            "rows": [],
        }
        for case in tqdm(cases, "race", unit="case"):
            if time.monotonic() > deadline:
                result["left_out"].append(case.name)
                continue
            _case(race, case, calls, result, generator)
    print(report(result))
    return result


def _gate(race: Race, cases: Sequence[Case], generator: torch.Generator) -> None:
    """All cases, so that a run that cannot be published costs no timing, and says everything that is wrong."""
    found = []
    for case in tqdm(cases, "gate", unit="case"):
        try:
            problems = gate.problems(race.specs[case.op], case.inputs(generator), generator)
        except Exception as error:
            problems = [timing.reason(error)]
        found += [f"{case.name}: {problem}" for problem in problems]
    if found:
        raise Refused("\n".join(found))


def _case(
    race: Race, case: Case, calls: Mapping[str, Calls], result: dict[str, Any], generator: torch.Generator
) -> None:  # fmt: skip
    """Race the contenders on one case and add its row, and its op's host times if it is the op's first."""
    contenders: Calls = {OURS: race.calls.get(case.op, lambda b: race.specs[case.op].op(**b.inputs))}
    contenders |= {name: made[case.op] for name, made in race.extra.items() if case.op in made}
    missing = _check_peers(race, case, calls, contenders)
    timing.release_memory()
    rotations = timing.rotations(case.distinct, timing.l2_bytes())
    sets = [case.buffers(generator) for _ in range(max(rotations.values()))]
    prepared = {name: race.prepare(call) for name, call in contenders.items()}
    times = {}
    for mode, count in rotations.items():
        passes = timing.passes(count, case.moved)
        times[mode], failed = timing.race(prepared, sets[:count], passes, result["rounds"])
        missing |= failed
        if OURS in failed:
            raise Refused(f"{case.name}: ours does not run: {failed[OURS]}")
        prepared = {name: contender for name, contender in prepared.items() if name not in failed}
    if race.host and case.op not in result["host_us"]:
        result["host_us"][case.op] = {
            name: round(timing.host_us(prepare(sets[0])), 2) for name, prepare in prepared.items()
        }
    row = {
        "case": case.name,
        "op": case.op,
        "label": case.label,
        "shape": case.shape,
        "tokens": case.shape[0],
        "hidden": case.shape[-1],
    }
    floor = case.moved / result["copy_gbps"] / 1e3
    result["rows"].append({**row, "floor_us": round(floor, 4), "sets": rotations, "missing": missing, "times": times})


def _check_peers(race: Race, case: Case, calls: Mapping[str, Calls], contenders: Calls) -> dict[str, str]:
    """Add the peers that compute this case to ``contenders``; the reasons of those that do not."""
    device = "cuda" if timing.has_gpu() else "cpu"
    missing: dict[str, str] = {}
    expected = None
    for name, made in calls.items():
        if case.op not in made or (name in peers.STATIC and case.shape[0] not in race.compiled_tokens):
            continue
        b = case.buffers(torch.Generator(device).manual_seed(1))  # the same for all
        if expected is None:
            reference = race.specs[case.op].reference(**b.inputs)
            expected = reference[0] if isinstance(reference, tuple) else reference
        try:
            problem = gate.peer_problem(race.prepare(made[case.op])(b)(), expected)
        except Exception as error:
            problem = timing.reason(error)
        if problem is None:
            contenders[name] = made[case.op]
        else:
            missing[name] = problem
    return missing


def report(result: Mapping[str, Any]) -> str:
    """The run in a line a case, and what is missing from it."""
    columns = f"{'ours':>8} {'best':>8} {'ratio':>5}"
    lines = [
        f"copy {result['copy_gbps']:.0f} GB/s, empty kernel {result['empty_kernel_us']:.2f} us",
        f"{'times in us, cold, then warm':50} {'floor':>7} {columns} {'share':>5} {columns}  best peers",
    ]
    for row in result["rows"]:
        cold, warm = row["times"]["cold"], row["times"].get("warm")
        share = row["floor_us"] / cold[OURS]["median_us"]
        best = [found[0] for times in (cold, warm) if times and (found := best_peer(times))]
        line = f"{row['case']:50.50} {row['floor_us']:7.2f} {_raced(cold)} {share:5.2f} {_raced(warm)}"
        lines.append(f"{line}  {', '.join(dict.fromkeys(best))}".rstrip())
    lines += [f"host us a call, {op}: {_pairs(times)}" for op, times in result["host_us"].items()]
    lines += [f"missing peer {name}: {why}" for name, why in result["missing"].items()]
    lines += [f"missing op {op}: {why}" for op, why in result["missing_ops"].items()]
    lines += [f"missing peer {name} from {case} on: {why}" for (name, why), case in failures(result).items()]
    lines += [f"left out for lack of time: {name}" for name in result["left_out"]]
    return "\n".join(lines)


def _raced(times: Mapping[str, Mapping[str, float]] | None) -> str:
    if times is None:
        return " " * 23
    ours, best = times[OURS]["median_us"], best_peer(times)
    return f"{ours:8.2f} " + (f"{best[1]:8.2f} {ours / best[1]:5.2f}" if best else f"{'-':>8} {'-':>5}")


def _pairs(figures: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in figures.items())


def _listed(numbers: Iterable[int]) -> str:
    return " ".join(map(str, numbers))
