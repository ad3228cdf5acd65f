"""Auditing a model: the same request alone and in company, every op compared, and the first that varies named."""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from ...errors import ArgumentError
from ..report import HOLDS, NOT_EXERCISED, VARIES, Check, Launch, Report, Series, describe_environment
from .comparison import EQUAL, Comparison, Findings, Variance
from .observe import MODULE_OUTPUT
from .program import program
from .subjects import CausalLM, Inputs, Module

__all__ = ["MODES", "audit_model"]

MODES = ("batch", "padding", "decode", "chunked prefill", "token by token", "cached prefix")
_SWEPT = ("batch", "padding", "decode")  # relations with a batch size


@torch.no_grad()
def audit_model(
    model: nn.Module,
    prompts: Sequence[str] | Sequence[Sequence[int]] | None = None,
    *,
    tokenizer: Any = None,
    inputs: Inputs | None = None,
    batch_sizes: Sequence[int] = (2, 3, 8, 33),
    modes: Sequence[str] = MODES,
    vary: bool = True,
    max_tokens: int = 4,
    require: Sequence[str] = (),
    progress: Callable[[str, int, int], None] | None = None,
    seed: int = 0,
) -> Report:
    """Whether a request's results depend on what it is computed with, and the first op where they begin to.

    Args:
        model: in eval mode; a causal language model with transformers' signature, stock or made invariant, or any
            module, with ``inputs``.
        prompts: the requests, as token ids, or as texts with a ``tokenizer``; two random ones if None.
        tokenizer: what makes token ids of texts.
        inputs: for a plain module: its arguments (a tensor, a tuple or a dict, batch axis first) for a list of request
            numbers. The same number must give the same request. Only relation "batch" is exercised then.
        batch_sizes: numbers of requests to try; the smallest that varies is bisected.
        modes: relations to exercise, out of MODES; "repeat" comes first in any case.
        vary: whether neighbours are other requests, or copies of the audited one.
        max_tokens: tokens to decode.
        require: relations without which the verdict is "not audited".
        progress: called with (relation, done, of) as each relation begins.
        seed: of all random tokens.

    Raises:
        ArgumentError: a value out of range, or a model in training mode.
    """
    started = time.monotonic()
    _validate(model, batch_sizes, modes, max_tokens)
    subject: CausalLM | Module
    if inputs is not None:
        subject = Module(model, inputs, vary)
    else:
        subject = CausalLM(model, _token_ids(prompts, tokenizer), vary, max_tokens, seed)
    audit = _Audit(model, subject, sorted(set(batch_sizes)))
    checks = audit.checks(modes, progress)
    cause = next((check for check in checks if check.verdict == VARIES), None)
    settings = {"batch_sizes": list(audit.sizes), "modes": list(modes), "vary": vary, "seed": seed}
    if isinstance(subject, CausalLM):
        settings |= {"max_tokens": max_tokens, "prompts": [prompt.tolist() for prompt in subject.prompts]}
    path = getattr(model, "name_or_path", "")
    return Report(
        target="model",
        name=type(model).__name__ + (f" {path}" if path else ""),
        checks=tuple(checks),
        not_observed=audit.not_observed(),
        series=tuple(audit.series),
        reproduction=audit.reproduction(cause) if cause else None,
        required=tuple(require),
        settings=settings,
        environment=audit.environment(),
        seconds=time.monotonic() - started,
    )


class _Audit:
    """One audit: runs relations and keeps what was not observed and what is to be plotted."""

    def __init__(self, model: nn.Module, subject: CausalLM | Module, sizes: list[int]) -> None:
        self.model, self.subject, self.sizes = model, subject, sizes
        self.series: list[Series] = []
        tensor = next(iter((*model.parameters(), *model.buffers())), torch.empty(0))
        self.device = tensor.device
        self._unseen: Counter[tuple[str, str, str, str]] = Counter()
        self._shows: dict[str, tuple[int, int]] = {}  # relation: request and batch whose logits differ

    def checks(self, modes: Sequence[str], progress: Callable[[str, int, int], None] | None) -> list[Check]:
        """Exercise relations; none but "repeat" if the model varies from call to call alone."""
        done: list[Check] = []
        relations = ("repeat", *(mode for mode in MODES if mode in modes))
        for relation in relations:
            if progress is not None:
                progress(relation, len(done), len(relations))
            if done and done[0].verdict == VARIES:
                detail = "the model varies from call to call alone, so that company cannot be blamed"
                done.append(Check(relation, NOT_EXERCISED, detail=detail))
            else:
                done.append(self.check(relation))
        return done

    def check(self, relation: str) -> Check:
        """Exercise one relation."""
        try:
            reason = self.subject.refusal(relation)
            if reason is None:
                batch, request, findings = self._sweep(relation, self.sizes if relation in _SWEPT else [1])
        except Exception as error:  # the model is others' code, and may raise anything
            reason = f"it raised {type(error).__name__}: {error}"
        if reason is None and findings.first is None and findings.spread.get("") is None:
            reason = "the model's output could not be compared"
        if reason is not None:
            return Check(relation, NOT_EXERCISED, detail=reason)
        if findings.first is not None:
            return self._varies(relation, findings, findings.first, request, batch)
        return Check(relation, HOLDS, findings.compared, detail=self._extent(relation, batch))

    def _sweep(self, relation: str, sizes: Sequence[int]) -> tuple[int, int, Findings]:
        """Batch sizes in ascending order until one varies; then the smallest that does, by bisection."""
        held, seen, compared = 1, {}, 0
        for size in sizes:
            seen[size] = self._run(relation, size)
            compared += seen[size][1].compared
            if seen[size][1].varying:
                break
            held = size
        while seen[size][1].varying and size - held > 1:
            middle = (held + size) // 2
            seen[middle] = self._run(relation, middle)
            compared += seen[middle][1].compared
            if seen[middle][1].varying:
                size = middle
            else:
                held = middle
        request, findings = seen[size]
        findings.compared = compared
        differing = [n for n, (_, found) in seen.items() if found.outputs_differ]
        if differing:
            self._shows[relation] = seen[min(differing)][0], min(differing)
        return size, request, findings

    def _extent(self, relation: str, batch: int) -> str:
        """How far a relation that holds was exercised."""
        requests = range(self.subject.requests)
        sizes = f"batches of {', '.join(map(str, self.sizes))}; the largest: " if relation in _SWEPT else ""
        return sizes + "; ".join(self.subject.describe(relation, request, batch) for request in requests)

    def _run(self, relation: str, batch: int, vary: bool = True) -> tuple[int, Findings]:
        """(request, findings) of the first request that varies, or of all of them."""
        findings = Findings()
        request = 0
        for request in range(self.subject.requests):
            for recording, layout, call in self.subject.steps(relation, request, batch, vary):
                with Comparison(self.model, recording, layout, findings):
                    call()
            if findings.varying:
                break
        for (op, path, reason), count in findings.unseen.items():
            self._unseen[relation, op, _generic(path), re.sub(r"\d+", "*", reason)] += count
        return request, findings

    def _varies(self, relation: str, findings: Findings, first: Variance, request: int, batch: int) -> Check:
        op, suspects = first.op, findings.suspected()
        if op == MODULE_OUTPUT and suspects:
            op += f" (not observed in it: {', '.join(suspects)})"
        told = [
            f"{self.subject.describe(relation, request, batch)}: {findings.varying} outputs of ops and modules differ"
        ]
        if not findings.outputs_differ:
            told.append("the model's own output does not")
        if relation in _SWEPT:
            told += [f"it holds among {batch - 1}"] if batch > 2 else []
        if relation in _SWEPT and self.subject.vary:
            copies = self._run(relation, batch, vary=False)[1].varying
            told.append("among copies of itself too" if copies else "not among copies of itself: contents decide")
        if first.inputs != EQUAL:
            told.append("its inputs are not known to be equal, so the cause may be before it")
        self._plot(relation, findings, batch)
        return Check(
            relation,
            VARIES,
            findings.compared,
            detail="; ".join(told),
            threshold=batch if relation in _SWEPT else None,
            unit="requests",
            op=op,
            where=f"{first.path or type(self.model).__name__} ({first.source})",
            difference=first.difference,
            launches=self._launches(first),
        )

    def _launches(self, first: Variance) -> tuple[tuple[Launch, ...], tuple[Launch, ...]] | None:
        """The kernels of the op on either side, without what both begin and end with; None if that is all of them."""
        from ..launches import differing, launches

        if first.again is None:
            return None
        try:
            alone, other = differing(*(launches(call, self.device) for call in first.again))
        except Exception:  # a profiler that is not to be had, or an op that runs once only, must not cost the finding
            return None
        return (alone, other) if alone or other else None

    def _plot(self, relation: str, findings: Findings, batch: int) -> None:
        """How the difference grows from block to block: the longest list of modules that ran."""
        lists = [
            [f"{path}.{i}" if path else str(i) for i in range(len(module))]
            for path, module in self.model.named_modules()
            if isinstance(module, nn.ModuleList)
        ]
        blocks = max(lists, key=len, default=[])
        labels = [*blocks, "logits" if isinstance(self.subject, CausalLM) else "output"]
        self.series.append(
            Series(
                title=f"{relation}: spread over layers" + (f", {batch} requests" if relation in _SWEPT else ""),
                kind="spread",
                x_label="module",
                y_label="largest difference / largest value",
                x=tuple(labels),
                y=tuple(findings.spread.get(path) for path in [*blocks, ""]),
            )
        )

    def not_observed(self) -> tuple[str, ...]:
        """What was not compared, once each, with how often and where."""
        merged: dict[tuple[str, str, str], Counter[str]] = {}
        for (relation, op, path, reason), count in self._unseen.items():
            merged.setdefault((op, path, reason), Counter())[relation] += count
        return tuple(
            f"{op} in {path}: {reason} ({', '.join(f'{name} {n} times' for name, n in counts.items())})"
            for (op, path, reason), counts in merged.items()
        )

    def environment(self) -> dict[str, str]:
        """Device and versions."""
        environment = describe_environment(self.device)
        if isinstance(self.subject, CausalLM) and type(self.model).__module__.startswith("transformers."):
            import transformers

            environment["transformers"] = transformers.__version__
        return environment

    def reproduction(self, cause: Check) -> str | None:
        """A program that loads the model anew and prints the first logit that differs; None if none does."""
        path = getattr(self.model, "name_or_path", "")
        if not path or not isinstance(self.subject, CausalLM) or cause.relation not in self._shows:
            return None
        request, batch = self._shows[cause.relation]
        return program(self.model, self.subject, cause.relation, request, batch)


def _validate(model: nn.Module, batch_sizes: Sequence[int], modes: Sequence[str], max_tokens: int) -> None:
    if model.training:
        raise ArgumentError("the model is in training mode, want model.eval()")
    if not batch_sizes or min(batch_sizes) < 2:
        raise ArgumentError(f"batch_sizes is {tuple(batch_sizes)}, want one or more numbers from 2 on")
    unknown = [mode for mode in modes if mode not in MODES]
    if unknown:
        raise ArgumentError(f"modes has {', '.join(unknown)}, want out of {', '.join(MODES)}")
    if max_tokens < 1:
        raise ArgumentError(f"max_tokens is {max_tokens}, want 1 or more")


def _token_ids(prompts: Sequence[Any] | None, tokenizer: Any) -> Sequence[Sequence[int]] | None:
    if prompts is None:
        return None
    if not prompts:
        raise ArgumentError("prompts is empty, want one or more")
    if tokenizer is None and any(isinstance(prompt, str) for prompt in prompts):
        raise ArgumentError("prompts are texts, want token ids, or a tokenizer")
    return [tokenizer(p)["input_ids"] if isinstance(p, str) else p for p in prompts]


def _generic(path: str) -> str:
    """A module path without its layer's number."""
    return re.sub(r"\.\d+(?=\.|$)", ".*", path) or "the model itself"
