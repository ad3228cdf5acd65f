"""batchproof audit op | model | server."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import ArgumentError

__all__ = ["add_audit", "resolve"]

_AUDIT = """\
Find what varies with the batch, and from which size on.

  batchproof audit op torch:mm --arg input=randn[M,4096]:bf16 --arg mat2=randn[4096,4096]:bf16
  batchproof audit model --model DIR
  batchproof audit server --base-url http://127.0.0.1:8000/v1 --model NAME

exit code: 0 all relations that were exercised hold; 1 one varies; 2 it could not be audited, or a relation that
--require names was not exercised.
"""
_OP = """\
Audit any importable callable: module:name, module:class.name, file.py:name. Outputs and changed arguments count.

  batchproof audit op vllm._custom_ops:fused_add_rms_norm --arg input=randn[M,4096]:bf16 \\
      --arg residual=randn[M,4096]:bf16 --arg weight=randn[4096]:bf16 --arg epsilon=1e-6
  batchproof audit op torch:nn.functional.softmax --arg input=randn[M,50257] --arg dim=-1 --html softmax.html
  batchproof audit op batchproof:rms_norm          an op of batchproof brings its own arguments

arguments: NAME=VALUE, or VALUE by place. If the callable does not know a NAME, all go by place, in the order given.
  randn[M,4096]:bf16     a row a request; M marks the axis of the batch, 8*M is eight rows a request
  randn[4096]            no M: the same tensor in every batch (fp32 where no dtype is named)
  randint(0,100)[M]:int64, rand, zeros, ones, full(0.5)[1]
  arange[M+1]:int32      numbers of places in the batch, such as cu_seqlens
  empty[M,4096]:bf16     an output to be written, spoilt before every call
  M                      the batch size itself
  1e-6, True, None, torch.bfloat16, 'text'

relations: repeat (the same call again: told apart from invariance), neighbours (their values), position, padding,
batch size (bit classes, every change followed to the exact size), chunking, graph against eager (CUDA), layout.
"""
_MODEL = """\
Run a request alone and in company, watch every op, and name the first whose bits change: its module, source line,
kernels, and how the difference spreads from layer to layer.

  batchproof audit model --model DIR                     as transformers loads it
  batchproof audit model --model DIR --make-invariant    with batchproof's switch on
"""
_SERVER = """\
Ask any OpenAI-compatible server the same questions alone and in company, from outside, and compare every token and
logprob exactly. Loopback addresses only, unless --allow-remote.

  batchproof audit server --base-url http://127.0.0.1:8000/v1 --model NAME --max-concurrency 300
"""
COMPILED_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)


def add_audit(commands: Any) -> None:
    """Add ``audit`` and its three targets to the parser's commands."""
    raw = argparse.RawDescriptionHelpFormatter
    audit = commands.add_parser("audit", help="find what varies", description=_AUDIT, formatter_class=raw)
    targets = audit.add_subparsers(required=True, metavar="TARGET")

    def target(name: str, help_text: str, description: str, function: Callable[..., int]) -> argparse.ArgumentParser:
        sub: argparse.ArgumentParser = targets.add_parser(
            name, help=help_text, description=description, formatter_class=raw
        )
        sub.set_defaults(command=function)
        sub.add_argument("--json", type=Path, metavar="FILE", help="write the report as JSON")
        sub.add_argument("--html", type=Path, metavar="FILE", help="write the report as one page with its plots")
        sub.add_argument("--require", action="append", default=[], metavar="RELATION", help="must be exercised; repeat")
        sub.add_argument("--seed", type=int, default=0, help="of inputs; default 0")
        return sub

    op = target("op", "any callable of tensors", _OP, _audit_op)
    op.add_argument("function", metavar="MODULE:NAME")
    op.add_argument("--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument; repeat")
    op.add_argument("--rows", type=int, metavar="N", help="requests, and largest batch; default 4096, on a CPU 1024")
    op.add_argument("--sizes", metavar="1,2,256", help="batch sizes to try; default: many")
    op.add_argument("--device", metavar="DEVICE", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    op.add_argument("--dtype", default="bfloat16", help="of the inputs of an op of batchproof; default bfloat16")
    op.add_argument("--limit", type=float, default=300.0, metavar="SECONDS", help="try no more sizes then; default 300")
    op.add_argument("--compile", action="store_true", help="audit torch.compile of it, compiled for every size")

    model = target("model", "a transformers model, op by op", _MODEL, _audit_model)
    model.add_argument("--model", metavar="DIR_OR_HUB_ID", help="default: the built-in model")
    model.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: the GPU if there is one")
    model.add_argument("--dtype", default="auto", help="float32, float16 or bfloat16; default: the checkpoint's")
    model.add_argument("--make-invariant", action="store_true", help="audit it with batchproof's switch on")
    model.add_argument("--batch-sizes", metavar="2,3,8", help="numbers of requests to try")

    server = target("server", "an OpenAI-compatible server, from outside", _SERVER, _audit_server)
    server.add_argument("--base-url", required=True, metavar="URL")
    server.add_argument("--model", required=True, metavar="NAME", help="as the server calls it")
    server.add_argument("--max-concurrency", type=int, default=300, metavar="N", help="default 300")
    server.add_argument("--max-requests", type=int, default=4000, metavar="N", help="default 4000")
    server.add_argument("--max-tokens", type=int, default=16, metavar="N", help="of an answer; default 16")
    server.add_argument("--chat", action="store_true", help="ask /v1/chat/completions, not /v1/completions")
    server.add_argument("--limit", type=float, default=600.0, metavar="SECONDS", help="default 600")
    server.add_argument("--allow-remote", action="store_true", help="an address that is not this machine's")
    server.add_argument("--api-key-file", type=Path, metavar="FILE", help="holds the key, if one is wanted")


def resolve(text: str) -> Any:
    """The object that ``module:name`` or ``file.py:name`` means; ArgumentError if there is none."""
    place, _, name = text.partition(":")
    if not place or not name:
        raise ArgumentError(f"function is {text!r}, want MODULE:NAME or FILE.py:NAME")
    try:
        module = _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, OSError) as error:
        raise ArgumentError(f"function is {text!r}, but {place} cannot be imported: {error}") from error
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise ArgumentError(f"function is {text!r}, but {place} has no {name}")
        found = getattr(found, part)
    if not callable(found):
        raise ArgumentError(f"function is {text!r}, of type {type(found).__name__}, want something that can be called")
    return found


def _load_file(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None or not path.is_file():
        raise OSError(f"no Python file {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


def _audit_op(options: argparse.Namespace) -> int:
    import torch

    from ..audit.op import audit_op

    dtype = getattr(torch, options.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise ArgumentError(f"dtype is {options.dtype!r}, want float32, float16 or bfloat16")
    sizes = _numbers("sizes", options.sizes) if options.sizes else None
    with _reporting("audit op") as progress:
        arguments = _arguments(options.arg)
        function = _own_op(options.function) if not arguments else None
        function = function or resolve(options.function)
        if options.compile:
            torch._dynamo.config.recompile_limit = 1024
            torch._dynamo.config.accumulated_recompile_limit = 4096
            function, sizes = torch.compile(function, dynamic=False), sizes or _compiled_sizes(options)
        report = audit_op(
            function, arguments, rows=options.rows, device=options.device, dtype=dtype, sizes=sizes,
            limit_s=options.limit, seed=options.seed, require=options.require, progress=progress,
            name=options.function.replace(":", ".") + (", compiled" if options.compile else ""),
        )  # fmt: skip
    return _finish(report, options)


def _audit_model(options: argparse.Namespace) -> int:
    from ..audit.model import audit_model
    from ..generation.model import load_stock
    from ..integrations.transformers import make_invariant

    with _reporting("audit model") as progress:
        model, _ = load_stock(options.model, options.device, options.dtype)
        if options.make_invariant:
            make_invariant(model)
        more: dict[str, Any] = {}
        if options.batch_sizes:
            more["batch_sizes"] = _numbers("batch-sizes", options.batch_sizes)
        report = audit_model(model, require=options.require, seed=options.seed, progress=progress, **more)
    return _finish(report, options)


def _audit_server(options: argparse.Namespace) -> int:
    from ..audit.server import audit_server

    key = options.api_key_file.read_text().strip() if options.api_key_file else None
    with _reporting("audit server") as progress:
        report = audit_server(
            options.base_url, options.model, max_concurrency=options.max_concurrency, limit_s=options.limit,
            max_requests=options.max_requests, max_tokens=options.max_tokens, chat=options.chat,
            allow_remote=options.allow_remote, require=options.require, progress=progress, api_key=key,
            seed=options.seed,
        )  # fmt: skip
    return _finish(report, options)


def _finish(report: Any, options: argparse.Namespace) -> int:
    """Write the reports that were asked for, each whole or not at all, and print the text."""
    if options.json:
        _write(options.json, report.to_json())
    if options.html:
        from ..audit.html import render_html

        _write(options.html, render_html(report))
    print(report.text(), end="")
    code: int = report.exit_code
    return code


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_file = path.with_name(path.name + ".part")
    partial_file.write_text(text, encoding="utf-8")
    partial_file.replace(path)


def _arguments(given: list[str]) -> Any:
    """``--arg`` values as a mapping, or as a list if they go by place."""
    pairs = [text.split("=", 1) if text.split("=", 1)[0].isidentifier() else [text] for text in given]
    if all(len(pair) == 2 for pair in pairs):
        return dict(pairs)
    if all(len(pair) == 1 for pair in pairs):
        return [pair[0] for pair in pairs]
    raise ArgumentError(f"--arg has {given!r}, want all as NAME=VALUE or all by place")


def _own_op(text: str) -> Any:
    """The spec of ``batchproof:NAME``."""
    from ..registry import all_specs

    place, _, name = text.partition(":")
    return all_specs().get(name) if place == "batchproof" else None


def _compiled_sizes(options: argparse.Namespace) -> list[int]:
    return [size for size in COMPILED_SIZES if size <= (options.rows or 1024)]


def _numbers(option: str, text: str) -> list[int]:
    parts = text.split(",")
    if not all(part.strip().isdigit() and int(part) > 0 for part in parts):
        raise ArgumentError(f"--{option} is {text!r}, want whole numbers from 1 with commas between")
    return [int(part) for part in parts]


@contextlib.contextmanager
def _reporting(title: str) -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar, where there is a terminal and tqdm; what audited code prints goes to stderr."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else torch's profiler tells of every start
    try:
        from tqdm import tqdm
    except ImportError:
        with contextlib.redirect_stdout(sys.stderr):
            yield lambda *_: None
        return
    with tqdm(desc=title, disable=None, dynamic_ncols=True, leave=False) as bar, contextlib.redirect_stdout(sys.stderr):
        yield partial(_advance, bar)


def _advance(bar: Any, stage: str, done: int, of: int) -> None:
    bar.total, bar.n = of, done
    bar.set_postfix_str(stage, refresh=False)
    bar.refresh()
