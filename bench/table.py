"""`python -m bench.table PATH.json`: the Markdown table that the README embeds, generated from committed evidence."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from .report import markdown_table
from .schema import Result


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the table of one JSON file; returns the exit status."""
    paths = list(sys.argv[1:] if arguments is None else arguments)
    if len(paths) != 1 or paths[0].startswith("-"):
        print("usage: python -m bench.table PATH.json", file=sys.stderr)
        return 2
    try:
        print(markdown_table(Result.read(Path(paths[0]))))
    except OSError as error:
        print(f"{paths[0]} cannot be read: {error.strerror}", file=sys.stderr)
        return 2
    except (ValueError, TypeError) as error:
        print(f"{paths[0]} is not a result of bench: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
