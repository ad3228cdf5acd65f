"""The demo's figures and picture: requests whose logits change bits with the batch, stock against batchproof."""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

from batchproof import demo


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of this benchmark."""
    parser.add_argument("--model", help="folder or hub id; default: the built-in model")
    parser.add_argument("--picture", type=Path, help="where to put the plot, such as docs/demo.png")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run the demo; what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        code = demo.run(options.model, Path(folder))
        if options.picture is not None:
            shutil.copy(Path(folder, "demo.png"), options.picture)
        result: dict[str, Any] = json.loads(Path(folder, "demo.json").read_text())
    return result | {"exit_code": code}
