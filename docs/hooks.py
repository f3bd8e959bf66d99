"""What the site needs beside its pages: files from elsewhere in the checkout, and docstrings' code as Markdown.

Links in Markdown are those of the checkout, so that they work there too; on the site everything stands in one folder.
"""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
ELSEWHERE = ("CHANGELOG.md", "CITATION.cff", "CONTRIBUTING.md", "LICENSE", "examples/*.py", "bench/results/*/*.png")
LITERAL_BLOCK = re.compile(r"::\n\n((?:(?: {4}.*)?\n)*(?: {4}.*))")


def on_files(files: Files, config: Any) -> Files:
    for pattern in ELSEWHERE:
        for path in sorted(ROOT.glob(pattern)):
            if "latest" not in path.parts:
                name = path.relative_to(ROOT).as_posix()
                files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    prefix = "docs/" if (ROOT / page.file.src_uri).exists() else "../"
    return markdown.replace(f"]({prefix}", "](")


class LiteralBlocks(griffe.Extension):
    """``text::`` with indented lines behind it is how docstrings hold code; Markdown wants a fence."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = LITERAL_BLOCK.sub(_fenced, obj.docstring.value)


def _fenced(block: re.Match[str]) -> str:
    return f":\n\n```python\n{textwrap.dedent(block[1])}\n```"
