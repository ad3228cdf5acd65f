"""The command line: batchproof generate | verify | demo | doctor | audit."""

from __future__ import annotations

import argparse
import contextlib
import json
import random
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import BatchproofError
from ..mode import requested_by_environment
from .audit import add_audit

__all__ = ["main"]

_GENERATE = """\
Continue prompts, one JSON record a line, so that no answer depends on what else is in the batch.

a prompt record:
  {"id": "a", "prompt": "In the beginning", "max_tokens": 32}
  {"id": "b", "messages": [{"role": "user", "content": "Hello"}], "temperature": 0.8, "top_p": 0.9, "top_k": 50,
   "seed": 7, "stop": ["\\n"]}

  id           default: line-N
  max_tokens   default 64
  temperature  default 0, which is greedy; else 1e-6 to 1e6
  top_p, top_k default 1 and 0, which filter nothing
  min_p        default 0; what has less than this share of the largest probability goes, before top_k and top_p
  repetition_penalty  default 1; the logits of tokens in the prompt and the answer so far are divided by it if above 0,
               else multiplied
  frequency_penalty, presence_penalty  default 0; -2 to 2, taken from the logits of tokens in the answer so far, for
               each time and once
  seed         default 0; the noise of a token is keyed by (seed, its position)
  logprobs, prompt_logprobs  default null; how many of the most probable tokens to tell at each token of the answer, or
               of the prompt

an answer record: id, text, token_ids, logprobs, finish_reason, receipt, environment, model, request; if asked for,
top_logprobs and prompt_logprobs: {"logprob", "rank", "top": [[token id, logprob], ...]} for each token, null for a
prompt's first. Logprobs are the model's, before penalties, temperature and filters.
Answers are appended as they finish. Stop the command at any time and run it again: it does what is left.

exit code: 0 all answered; 1 some lines were malformed (the others were answered); 2 it could not run.
"""
_VERIFY = """\
Recompute answers alone and in hostile company, and compare every bit: receipt, tokens, all logprobs, text.

  batchproof verify answers.jsonl
  batchproof verify answers.jsonl --model /path/to/model --sample 20

An answer from another environment (device, dtype, versions) is reported as such and is no failure: its receipt
holds there and says nothing here.

exit code: 0 none differs; 1 one does, or a line is unreadable; 2 it could not run.
"""
_DEMO = """\
The built-in model (or --model) in batches of 1, 2, 3, 8, 33 and all: whose logits change bits with the batch, stock
transformers' or batchproof's; some text; its receipts, checked again; a plot.

exit code: 0 batchproof's never changed; 1 they did; 2 it could not run.
"""
_DOCTOR = """\
What of batchproof is in force here: versions, environment variables, whether vLLM would load the plug-in, whether
each hook finds what it needs in this vLLM, who serves each op of a step, and what is known to vary with the batch.

  VLLM_BATCH_INVARIANT=1 batchproof doctor

exit code: 0 all there, or vLLM is not installed, or VLLM_BATCH_INVARIANT is not 1; 1 it is 1, but a hook is missing
or the plug-in would not be loaded; 2 it could not run.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns its exit code."""
    options = _parser().parse_args(arguments)
    try:
        requested_by_environment()  # a malformed value is an error here as anywhere
        code: int = options.command(options)
        return code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (BatchproofError, OSError) as error:
        print(f"batchproof: {error}", file=sys.stderr)
        return 2
    except ImportError as error:
        print(f"batchproof: {error}; want pip install 'batchproof[transformers]'", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="batchproof", description="LLM inference that does not depend on the batch.")
    parser.add_argument("--version", action="version", version=f"batchproof {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(
        name: str, help_text: str, description: str, function: Any, runs_model: bool = True
    ) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help_text, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(command=function)
        if runs_model:
            sub.add_argument("--model", metavar="DIR_OR_HUB_ID", help="default: the built-in model")
            sub.add_argument("--device", default="auto", help="cpu, cuda, cuda:1; default: the GPU if there is one")
        return sub

    def dtype(sub: argparse.ArgumentParser) -> None:
        choices = ("auto", "float32", "float16", "bfloat16")
        sub.add_argument("--dtype", default="auto", choices=choices, help="default: the checkpoint's")

    generate = command("generate", "answer a file of prompts, with receipts", _GENERATE, _generate)
    generate.add_argument("--in", dest="prompts", type=Path, required=True, metavar="PROMPTS.jsonl", help="read these")
    generate.add_argument(
        "--out", dest="answers", type=Path, required=True, metavar="ANSWERS.jsonl", help="append to these"
    )
    generate.add_argument(
        "--batch-size", type=_positive, default=32, metavar="N", help="most at once; default: %(default)s"
    )
    dtype(generate)

    verify = command("verify", "check answers again", _VERIFY, _verify)
    verify.add_argument("answers", type=Path, metavar="ANSWERS.jsonl", help="what generate wrote")
    verify.add_argument("--sample", type=_positive, metavar="N", help="check N records, drawn at random")
    verify.add_argument("--seed", type=int, default=0, help="of the sample, the order and the company; default 0")
    dtype(verify)

    demo = command("demo", "stock transformers against batchproof, here and now", _DEMO, _demo)
    demo.add_argument(
        "--out",
        type=Path,
        default=Path("demo_out"),
        metavar="DIR",
        help="for the plot and answers; default: %(default)s",
    )

    doctor = command("doctor", "what of batchproof is in force here", _DOCTOR, _doctor, runs_model=False)
    doctor.add_argument("--json", action="store_true", help="the same as one JSON object")

    add_audit(commands)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1")
    return int(text)


def _load(options: argparse.Namespace) -> Any:
    _quiet_transformers()
    from ..generation.model import Generator

    return Generator.load(options.model, options.device, options.dtype)


def _quiet_transformers() -> None:
    """Its progress bars and advice would stand between ours."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _generate(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    if not options.prompts.is_file():
        raise BatchproofError(f"no file {options.prompts}")
    generator = _load(options)
    from ..generation.generate import generate

    bar: tqdm[Any] = tqdm(unit="answer", disable=None, dynamic_ncols=True)
    tokens = 0

    def start(pending: int, found: int) -> None:
        bar.total, bar.n = pending + found, found
        bar.initial = found
        bar.refresh()

    def count(new: int) -> None:
        nonlocal tokens
        tokens += new
        elapsed = bar.format_dict["elapsed"]
        bar.set_postfix_str(f"{tokens / elapsed:.0f} tokens/s" if elapsed > 0 else "", refresh=False)
        bar.update(0)

    with bar:
        summary = generate(
            generator, options.prompts, options.answers, options.batch_size,
            on_start=start, on_tokens=count, on_answer=bar.update,
        )  # fmt: skip
    for number, reason in summary.malformed:
        print(f"{options.prompts} line {number}: {reason}", file=sys.stderr)
    there = f", {summary.found} were there" if summary.found else ""
    print(f"{summary.written} answers written to {options.answers}{there}", file=sys.stderr)
    return 1 if summary.malformed else 0


def _verify(options: argparse.Namespace) -> int:
    from tqdm import tqdm

    if not options.answers.is_file():
        raise BatchproofError(f"no file {options.answers}")
    generator = _load(options)
    from ..generation.verify import DIFFERS, UNREADABLE, read_answers, verify

    answers, unreadable = read_answers(options.answers)
    if options.sample is not None and options.sample < len(answers):
        answers = random.Random(options.seed).sample(answers, options.sample)
    with tqdm(total=2 * len(answers), unit="check", disable=None, dynamic_ncols=True) as bar:

        def advance(stage: str, verdict: Any) -> None:
            bar.set_postfix_str(stage, refresh=False)
            bar.update()

        verdicts = unreadable + verify(generator, answers, options.seed, advance)
    for verdict in verdicts:
        print(f"{verdict.id}: {verdict.outcome}" + (f": {verdict.reason}" if verdict.reason else ""))
    outcomes = Counter(verdict.outcome for verdict in verdicts)
    print(", ".join(f"{count} {outcome}" for outcome, count in sorted(outcomes.items())) or "no answers")
    return 1 if outcomes[DIFFERS] or outcomes[UNREADABLE] else 0


def _demo(options: argparse.Namespace) -> int:
    from ..demo import run

    code: int = run(options.model, options.out, options.device)
    return code


def _doctor(options: argparse.Namespace) -> int:
    from ..doctor import collect, render

    with contextlib.redirect_stdout(sys.stderr):  # where vLLM's log then goes, which would stand in the JSON
        report = collect()
    print(json.dumps(report, indent=2) if options.json else render(report))
    return 0 if report["ok"] else 1
