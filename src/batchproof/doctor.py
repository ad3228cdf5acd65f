"""What of batchproof is in force here: versions, variables, the plug-in of vLLM, its hooks, and who serves each op."""

from __future__ import annotations

import os
import platform
import textwrap
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, entry_points, version
from typing import Any

import torch

from ._version import __version__
from .mode import ENVIRONMENT_VARIABLE, read_flag

__all__ = ["collect", "render"]

_ABSENT = "not installed"
_GROUP, _PLUGIN = "vllm.general_plugins", "batchproof"
_FUSE, _ALLOWED = "BATCHPROOF_FUSE_NORM_QUANT", "VLLM_PLUGINS"
# Name, what counts if it is not set (None: nothing, or that depends), what it does. All but _ALLOWED are switches.
_VARIABLES = (
    (ENVIRONMENT_VARIABLE, "0", "1: batch-invariant mode, in vLLM and by batchproof.enable_if_requested()"),
    ("BATCHPROOF_STRICT", "0", "1: vLLM does not start if a hook is missing; 0: the log says so"),
    (_FUSE, "1", "1: norm and fp8 quantisation are one kernel in vLLM's compiled graphs; 0: they stay two"),
    (
        "BATCHPROOF_FUSE_ACTIVATION_QUANT",
        "1",
        "1: SiLU and fp8 quantisation are one kernel, batchproof's, in vLLM's compiled graphs; 0: vLLM's own",
    ),
    (
        "BATCHPROOF_LINEAR",
        None,
        "1: vLLM's linear layers and lm_head are batchproof's; 0: vLLM's own; unset: 1 on Hopper, 0 elsewhere",
    ),
    (
        "BATCHPROOF_ATTENTION",
        None,
        "1: vLLM's Triton attention and rope are batchproof's; 0: vLLM's own; unset: 1 on Hopper, 0 elsewhere",
    ),
    (
        "BATCHPROOF_SAMPLER",
        "1",
        "1: vLLM's sampler, of its model runner V2, is batchproof's; 0: vLLM's own",
    ),
    (_ALLOWED, None, "the plug-ins that vLLM may load, with commas between; unset: all"),
    ("VLLM_USE_FLASHINFER_SAMPLER", "1", "0: vLLM's own sampler does without FlashInfer, whose bits follow the batch"),
)
_WIDTHS = (26, 40, 50)  # of the table's columns, in characters: a line of 120


def collect() -> dict[str, Any]:
    """Look at this environment.

    Returns:
        A report of JSON values. ``ok`` is false if VLLM_BATCH_INVARIANT is 1 and vLLM is installed, but a hook is
        missing or the plug-in would not be loaded; ``verdict`` says in one line what follows.

    Raises:
        ModeError: a variable that switches something is neither 0 nor 1.
    """
    variables = [_variable(name, default, meaning) for name, default, meaning in _VARIABLES]
    switches = {name: read_flag(name, default or "0") for name, default, _ in _VARIABLES if name != _ALLOWED}
    versions = _versions()
    has_vllm = versions["vllm"] != _ABSENT
    obstacle = _plugin_obstacle(has_vllm)
    hooks = _look_at_hooks() if has_vllm else []
    report: dict[str, Any] = {
        "versions": versions,
        "gpus": _gpus(),
        "environment": variables,
        "plugin": {"group": _GROUP, "name": _PLUGIN, "obstacle": obstacle},
        "hooks": hooks,
        "coverage": _coverage(hooks, obstacle is None, switches) if has_vllm else [],
        "transformers": _transformers_models(versions["transformers"] != _ABSENT),
    }
    missing = [hook["name"] for hook in hooks if hook["wanted"] and hook["missing"] is not None]
    return report | _verdict(has_vllm, switches[ENVIRONMENT_VARIABLE], obstacle, missing)


def render(report: dict[str, Any]) -> str:
    """A report of ``collect`` as text to read."""
    lines = ["versions"]
    lines += [f"  {name:<14}{value}" for name, value in report["versions"].items()]
    lines += [f"  {'GPU':<14}{gpu['name']}, compute capability {gpu['capability']}" for gpu in report["gpus"]]
    if not report["gpus"]:
        lines.append(f"  {'GPU':<14}torch sees none")
    lines += ["", "environment variables"]
    for variable in report["environment"]:
        lines.append(f"  {variable['name']} {_shown(variable)}")
        lines.append(f"      {variable['meaning']}")
    lines += ["", "transformers", f"  {_transformers_line(report['transformers'])}"]
    plugin = report["plugin"]
    lines += ["", "vLLM", f"  plug-in {plugin['name']} in {plugin['group']}: {plugin['obstacle'] or 'ok'}"]
    lines += [f"  hook {hook['name']} ({hook['serves']}): {hook['missing'] or 'ok'}" for hook in report["hooks"]]
    if report["coverage"]:
        rows = [(row["op"], row["served_by"], row["varies"]) for row in report["coverage"]]
        lines += ["", *_table([("op", "served by", "known to vary"), *rows])]
    else:
        lines.append("  not installed: no hooks to look at, no ops to serve")
    return "\n".join([*lines, "", report["verdict"]])


def _version(package: str) -> str:
    """From the package's metadata: importing vLLM takes seconds and starts CUDA."""
    try:
        return version(package)
    except PackageNotFoundError:
        return _ABSENT


def _versions() -> dict[str, str]:
    return {
        "python": platform.python_version(),
        "batchproof": __version__,
        "torch": str(torch.__version__),
        "triton": _version("triton"),
        "CUDA": torch.version.cuda or "not in this torch",
        "transformers": _version("transformers"),
        "vllm": _version("vllm"),
    }


def _gpus() -> list[dict[str, str]]:
    if not torch.cuda.is_available():
        return []
    indices = range(torch.cuda.device_count())
    capabilities = [".".join(map(str, torch.cuda.get_device_capability(i))) for i in indices]
    return [{"name": torch.cuda.get_device_name(i), "capability": capabilities[i]} for i in indices]


def _variable(name: str, default: str | None, meaning: str) -> dict[str, str | None]:
    return {"name": name, "value": os.environ.get(name), "default": default, "meaning": meaning}


def _shown(variable: dict[str, str | None]) -> str:
    if variable["value"] is not None:
        return f"is {variable['value']!r}"
    return "is not set" + (f", which is {variable['default']}" if variable["default"] is not None else "")


def _plugin_obstacle(has_vllm: bool) -> str | None:
    """Why vLLM would not load the plug-in, or None; the names are compared as vLLM compares them."""
    found = [point for point in entry_points(group=_GROUP) if point.name == _PLUGIN]
    if not found:
        return "this installation of batchproof has no such entry point; want it installed again with pip"
    allowed = os.environ.get(_ALLOWED)
    if allowed is not None and _PLUGIN not in allowed.split(","):
        return f"{_ALLOWED} is {allowed!r}, want {_PLUGIN} in it"
    if has_vllm:
        try:
            found[0].load()
        except Exception as error:  # vLLM logs whatever it is, and goes on without the plug-in
            return f"loading it fails: {_one_line(error)}"
    return None


def _all_hooks() -> Sequence[Any]:
    from .integrations.vllm.hooks import HOOKS

    return HOOKS


def _look_at_hooks() -> list[dict[str, Any]]:
    return [
        {"name": hook.name, "serves": hook.serves, "wanted": hook.is_wanted(), "missing": hook.missing()}
        for hook in _all_hooks()
    ]


def _one_line(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())


def _coverage(hooks: Sequence[dict[str, Any]], loaded: bool, switches: dict[str, bool]) -> list[dict[str, Any]]:
    """Who serves each op, as things stand."""
    from .integrations.vllm.coverage import COVERAGE, NORM_QUANT, NOTHING

    there = {hook["name"] for hook in hooks if hook["wanted"] and hook["missing"] is None and loaded}
    rows = []
    for row in COVERAGE:
        served_by, varies = f"vLLM: {row.vllm}", row.varies
        if not switches[ENVIRONMENT_VARIABLE]:  # the texts are about the mode
            served_by, varies = "vLLM: its kernels outside batch-invariant mode", "not looked at outside the mode"
        elif row.hook in there and row is NORM_QUANT and "rms_norm" not in there:  # the pass fuses our norms alone
            served_by, varies = "vLLM: its norm and its quantisation, two kernels", "as its norm's"
        elif row.hook in there:
            served_by, varies = "batchproof", NOTHING
            if row is NORM_QUANT and not switches[_FUSE]:
                served_by = f"batchproof's norm and vLLM's quantisation, two kernels ({_FUSE}=0)"
        rows.append({"op": row.op, "hook": row.hook, "served_by": served_by, "varies": varies})
    return rows


def _transformers_models(installed: bool) -> dict[str, Any]:
    """The model types that ``make_invariant`` covers, or why they cannot be told."""
    if not installed:
        return {"model_types": [], "obstacle": _ABSENT}
    try:
        from .integrations.transformers.swap import FAMILIES
    except ImportError as error:
        return {"model_types": [], "obstacle": f"importing the integration fails: {_one_line(error)}"}
    return {"model_types": list(FAMILIES), "obstacle": None}


def _transformers_line(models: dict[str, Any]) -> str:
    return str(models["obstacle"] or f"make_invariant covers {', '.join(models['model_types'])}")


def _verdict(has_vllm: bool, mode: bool, obstacle: str | None, missing: Sequence[str]) -> dict[str, Any]:
    problems = [f"hooks missing: {', '.join(missing)}"] if missing else []
    problems += ["the plug-in would not be loaded"] if obstacle else []
    if not has_vllm:
        ok, verdict = True, "vLLM is not installed: there is nothing to hook into"
    elif mode and problems:
        ok, verdict = False, f"vLLM would run without all of batchproof: {'; '.join(problems)}"
    elif mode:
        ok, verdict = True, "all there; what is known to vary in the table is vLLM's and still varies"
    else:
        also = f"; {'; '.join(problems)}" if problems else ""
        ok, verdict = True, f"{ENVIRONMENT_VARIABLE} is not 1: vLLM runs as if batchproof were not there{also}"
    return {"ok": ok, "verdict": verdict}


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    lines = []
    for row in rows:
        cells = [textwrap.wrap(cell, width, break_on_hyphens=False) for cell, width in zip(row, _WIDTHS, strict=True)]
        for i in range(max(map(len, cells))):
            parts = [cell[i] if i < len(cell) else "" for cell in cells]
            line = "  ".join(f"{part:<{width}}" for part, width in zip(parts, _WIDTHS, strict=True))
            lines.append(line.rstrip())
    return lines
