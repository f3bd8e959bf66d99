"""`python -m bench report [FOLDER ...]`: from committed JSON to Markdown, plots, and the README's tables."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ..errors import UsageError
from ..job import shown
from ..settings import DEFAULT_OUT, OneLineParser
from ..table import render
from . import plots, readme
from .results import READERS, Evidence, read
from .text import summary

RESULTS = DEFAULT_OUT.parent


def main(arguments: Sequence[str]) -> int:
    """Prints the summary and the tables of each folder, draws its plots into it, and rewrites the README's regions where asked.

    Returns:
        0; 2 for a folder without results or with results of several machines.
    """
    given = _parser().parse_args(arguments)
    folders = given.folder or committed(RESULTS)
    if not folders:
        raise UsageError(f"no results below {shown(RESULTS)}: run `python -m bench suite` first, or name a folder")
    machines = [(folder, read(folder)) for folder in folders]
    for folder, evidence in machines:
        print(f"# {evidence.name}\n\n{summary(evidence)}\n")
        for name in READERS:
            if (folder / name).is_file():
                print(f"## {name}\n\n{render((folder / name).read_text(encoding='utf-8'))}\n")
    if given.readme is not None:
        _rewrite(given.readme)
    if not given.no_plots:
        for folder, evidence in machines:
            _draw(folder, evidence)
    return 0


def committed(results: Path) -> list[Path]:
    """Folders that hold results, the uncommitted latest ones left out."""
    folders = (
        sorted(path for path in results.iterdir() if path.is_dir() and path != DEFAULT_OUT) if results.is_dir() else []
    )
    return [folder for folder in folders if any((folder / name).is_file() for name in READERS)]


def _rewrite(path: Path) -> None:
    try:
        before = path.read_text(encoding="utf-8")
        after = readme.regenerated(before, path.resolve().parent)
        if after != before:
            path.write_text(after, encoding="utf-8")
    except (OSError, ValueError, TypeError) as error:
        raise UsageError(f"--readme {path}: {error}") from None
    print(f"{shown(path)}: {'as it was' if after == before else 'rewritten'}", file=sys.stderr)


def _draw(folder: Path, evidence: Evidence) -> None:
    try:
        written = plots.write(evidence, folder)
    except UsageError as missing:
        print(f"no plots: {missing}", file=sys.stderr)
        return
    for path in written:
        print(f"drawn: {shown(path)}", file=sys.stderr)


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog="python -m bench report",
        description="Shows results: bars met and missed, the paper's figures beside ours, tables and plots. Never mixes machines: a "
        "folder is one machine.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "folder", nargs="*", type=Path, help="folders of results (default: all below bench/results but latest)"
    )
    parser.add_argument("--readme", type=Path, help="also rewrite the generated tables of this Markdown file")
    parser.add_argument("--no-plots", action="store_true", help="draw nothing")
    return parser
