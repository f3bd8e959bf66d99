"""The generated regions of a Markdown file.

`<!-- table: FILE.json -->` holds that result's table, `<!-- report: FOLDER -->` the summary of a machine; both end with
`<!-- end of table -->` or `<!-- end of report -->`, and their paths are relative to the file.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from ..table import render
from .results import read
from .text import summary

# Up to its own end and over no other region's start or end: a lost mark must not swallow what is written by hand.
REGION = re.compile(
    r"<!-- (table|report): (\S+) -->\n((?:(?!<!-- (?:table:|report:|end of )).)*)<!-- end of \1 -->", re.DOTALL
)
MARK = re.compile(r"<!-- (?:table:|report:|end of (?:table|report)).*")


def regenerated(text: str, root: Path) -> str:
    """The text with every region as it must be.

    Args:
        text: Markdown.
        root: what paths are relative to.

    Raises:
        ValueError: a region's start has no end, or the reverse.
        UsageError, OSError, ValueError, TypeError: a region's results cannot be read.
    """
    kinds: dict[str, Callable[[Path], str]] = {
        "table": lambda path: render(path.read_text(encoding="utf-8")),
        "report": lambda path: summary(read(path)),
    }

    def region(found: re.Match[str]) -> str:
        kind, path, _ = found.groups()
        return f"<!-- {kind}: {path} -->\n{kinds[kind](root / path).strip()}\n\n<!-- end of {kind} -->"

    alone = MARK.search(REGION.sub("", text))
    if alone is not None:
        raise ValueError(f"expected a start and an end of every region, got {alone.group()!r} alone")
    return REGION.sub(region, text)
