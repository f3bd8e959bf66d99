"""`python -m bench.table PATH.json`: the Markdown tables that the README embeds, generated from committed evidence."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import report
from .kernels import report as kernels_report
from .kernels.schema import KIND as KERNELS
from .kernels.schema import KernelResult
from .model import report as model_report
from .model.schema import KIND as MODEL
from .model.schema import ModelResult
from .schema import Result

AnyResult = Result | KernelResult | ModelResult
# What reads and shows the file of a subcommand, by what it says it is; the main job's says nothing.
READERS: dict[str | None, Callable[[str], AnyResult]] = {
    None: Result.from_json,
    KERNELS: KernelResult.from_json,
    MODEL: ModelResult.from_json,
}
TABLES: dict[type, Callable[[Any], str]] = {
    Result: report.markdown_table,
    KernelResult: kernels_report.markdown_table,
    ModelResult: model_report.markdown_table,
}


def result_of(text: str) -> AnyResult:
    """A result of any kind.

    Raises:
        ValueError, TypeError: not a result of bench.
    """
    try:
        data = json.loads(text)
    except json.JSONDecodeError:
        data = None  # the schema says what is wrong with it
    kind = data.get("kind") if isinstance(data, dict) else None
    return READERS.get(kind if isinstance(kind, str) else None, Result.from_json)(text)


def render(text: str) -> str:
    """The Markdown table of a result of any kind.

    Raises:
        ValueError, TypeError: not a result of bench.
    """
    result = result_of(text)
    return TABLES[type(result)](result)


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
