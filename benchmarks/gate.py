"""What stands before every time: ours is accurate and batch-invariant on this case, and a peer computes the same thing.

Ours is held to its spec's reference and tolerance, and compared bit for bit with itself in batches of other sizes, on
ordinary rows and on rows made so that every order of a sum rounds elsewhere. A peer only has to be near: what it is
checked for is a call that does something else, or nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch

from batchproof.numerics import TOLERANCES, as_bits, first_mismatch, ulp_distance
from batchproof.registry import Inputs, OpSpec

sys.path.append(str(Path(__file__).parent.parent / "tests"))  # the adversaries and units of the tests
from invariance import cancelling, scale_of, wide_exponents

ADVERSARIES = (cancelling, wide_exponents)
BATCHES = (2, 17, 130, 257, 1025)  # other sizes than the case's; besides single rows
PEER_ERROR = 0.05  # of the norm of the output: formats and roundings differ by less, other formulas by more


def problems(spec: OpSpec, inputs: Inputs, generator: torch.Generator) -> list[str]:
    """What is wrong with ``spec``'s op on ``inputs``, and on adversarial changes of them."""
    found = _inaccuracies(spec, inputs) + _variances(spec, inputs, generator)
    for change in ADVERSARIES:
        variances = _variances(spec, change(inputs, spec, generator), generator)
        found += [f"{change.__name__} rows: {variance}" for variance in variances]
    return found


def peer_problem(out: Any, expected: torch.Tensor) -> str | None:
    """Why a peer's output is not the op's first one, or None."""
    first = (out[0] if isinstance(out, tuple) else out).float().flatten()
    wanted = expected.float().flatten()
    if first.shape != wanted.shape:
        return f"it returns {first.numel()} elements, want {wanted.numel()}"
    error = float((first - wanted).norm() / wanted.norm())
    return None if error <= PEER_ERROR else f"its result is off by {error:.2g} of the norm"


def _inaccuracies(spec: OpSpec, inputs: Inputs) -> list[str]:
    """Outputs that are further from the reference than the table allows; integer codes may be one step off."""
    tolerance, expected = TOLERANCES[spec.tolerance], spec.reference(**inputs)
    found = []
    for i, (out, wanted) in enumerate(
        zip(spec.run(inputs), expected if isinstance(expected, tuple) else (expected,), strict=True)
    ):
        if out.dtype != wanted.dtype or out.shape != wanted.shape:
            found.append(f"output {i} is {tuple(out.shape)} {out.dtype}, want {tuple(wanted.shape)} {wanted.dtype}")
            continue
        difference = (out.double() - wanted.double()).abs()
        if out.is_floating_point():
            near = difference <= tolerance.atol * scale_of(spec, inputs, wanted)
            bad = ~near & (ulp_distance(out, wanted) > tolerance.ulp)
        else:
            bad = difference > 1
        if bad.any():
            place = tuple(int(index) for index in bad.nonzero()[0])
            values = f"{out[place].double().item()!r} against {wanted[place].double().item()!r}"
            found.append(f"output {i}: {int(bad.sum())} of {bad.numel()} inaccurate, first at {place}: {values}")
    return found


def _variances(spec: OpSpec, inputs: Inputs, generator: torch.Generator) -> list[str]:
    """First, middle and last row alone, and with others in batches of other sizes, against the whole batch."""
    full = spec.run_rows(inputs)
    tokens, device = len(full[0]), full[0].device
    probes = torch.tensor(sorted({0, tokens // 2, tokens - 1}), device=device)
    batches = list(probes.split(1))
    for size in BATCHES:
        index = torch.randint(tokens, (size,), generator=generator, device=device)
        places = torch.linspace(0, size - 1, min(size, len(probes)), device=device).long()
        index[places] = probes[: len(places)]
        batches.append(index)
    found = []
    for index in batches:
        label = f"row {int(index[0])} alone" if len(index) == 1 else f"rows of M={tokens} in a batch of {len(index)}"
        for i, (out, whole) in enumerate(zip(spec.run_rows(spec.select(inputs, index)), full, strict=True)):
            # by their bits, because indexing lacks kernels for some 8-bit formats
            if mismatch := first_mismatch(as_bits(out), as_bits(whole)[index]):
                found.append(f"{label}: bits of output {i}: {mismatch}")
    return found
