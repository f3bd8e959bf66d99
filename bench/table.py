"""`python -m bench.table PATH.json`: the Markdown tables that the README embeds, generated from committed evidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from . import report
from .kernels import report as kernels_report
from .kernels.schema import KIND as KERNELS
from .kernels.schema import KernelResult
from .model import report as model_report
from .model.schema import KIND as MODEL
from .model.schema import ModelResult
from .schema import Result

# How the file of a subcommand is shown, by what it says it is; the main job's says nothing.
KINDS: dict[str, Callable[[str], str]] = {
    KERNELS: lambda text: kernels_report.markdown_table(KernelResult.from_json(text)),
    MODEL: lambda text: model_report.markdown_table(ModelResult.from_json(text)),
}


def render(text: str) -> str:
    """The Markdown table of a result of any kind.

    Raises:
        ValueError, TypeError: not a result of bench.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = None  # the schema says what is wrong with it
    kind = data.get("kind") if isinstance(data, dict) else None
    if isinstance(kind, str) and kind in KINDS:
        return KINDS[kind](text)
    return report.markdown_table(Result.from_json(text))


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of one JSON file; returns the exit status."""
    paths = list(sys.argv[1:] if arguments is None else arguments)
    if len(paths) != 1 or paths[0].startswith("-"):
        print("usage: python -m bench.table PATH.json", file=sys.stderr)
        return 2
    try:
        print(render(Path(paths[0]).read_text(encoding="utf-8")))
    except OSError as error:
        print(f"{paths[0]} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, TypeError) as error:
        print(f"{paths[0]} is not a result of bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
