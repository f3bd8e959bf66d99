"""Which lines of host code that name CUDA, graphs, streams, recordings or descriptors have run: ``pytest --standin=launch --standin-lines``.

A line that no test reaches on the stand-in stands in UNREACHED with the reason; the run fails by one that is neither reached nor listed,
and by one that is listed for nothing.
"""

from __future__ import annotations

import ast
import io
import re
import sys
import threading
import tokenize
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = ("step_kernels", "step_kernels/model", "bench")  # the second is a link
WORDS = re.compile(r"cuda|(?<!photo)graph|stream|captur(?!e_output)|descriptor|describable", re.IGNORECASE)

# (file, function): why no test reaches such lines of it here.
UNREACHED = {
    ("step_kernels/info.py", "_devices"): "tests/gpu/test_selfcheck.py names the device itself",
    ("step_kernels/selfcheck_gpu.py", "_compiled"): "needs Inductor on a GPU",
    ("bench/jobs.py", "run"): "needs a second GPU",
    ("bench/costs.py", "trace"): "asks CUDA's profiler",
    ("bench/everything.py", "run"): "starts other processes, which take minutes",
}

executed: dict[str, set[int]] = {}


def watch() -> None:
    """From now on, in every thread."""
    for folder in FOLDERS:
        executed.update({str(path): set() for path in sorted((ROOT / folder).rglob("*.py"))})

    def on_call(frame: Any, event: str, argument: Any) -> Any:
        lines = executed.get(frame.f_code.co_filename)
        if lines is None:
            return None

        def on_line(frame: Any, event: str, argument: Any) -> Any:
            lines.add(frame.f_lineno)
            return on_line

        return on_line

    threading.settrace(on_call)
    sys.settrace(on_call)


def stop() -> None:
    threading.settrace(None)  # type: ignore[arg-type]
    sys.settrace(None)


def complaints() -> list[str]:
    """Lines that are neither reached nor listed, and entries of the list that nothing needs."""
    missing, unused = [], set(UNREACHED)
    for path, lines in executed.items():
        file = str(Path(path).relative_to(ROOT))
        source = Path(path).read_text()
        for number, function, extent in lines_of(source):
            if lines.isdisjoint(extent):
                unused.discard((file, function))
                if (file, function) not in UNREACHED:
                    missing.append(f"{file}:{number}: not reached: {source.splitlines()[number - 1].strip()}")
    return missing + [f"{file}: listed, but reached or gone: {function}" for file, function in sorted(unused)]


def lines_of(source: str) -> Iterator[tuple[int, str, range]]:
    """Lines inside of functions that hold such a name, or the string "cuda"; the function; the lines of the statement, without its body.

    Kernels are left out: they are Triton's.
    """
    named = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if (token.type == tokenize.NAME and WORDS.search(token.string)) or token.string in ('"cuda"', "'cuda'"):
            named.add(token.start[0])
    found = [(one.name, extent_of(x)) for one in functions(ast.parse(source)) for x in statements(one)]
    for number in sorted(named):
        around = [(name, extent) for name, extent in found if number in extent]
        if around:
            yield number, *min(around, key=lambda one: len(one[1]))


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and not any("jit" in ast.unparse(one) for one in node.decorator_list):
            yield node


def statements(function: ast.FunctionDef) -> Iterator[ast.stmt]:
    for statement in function.body:
        for node in ast.walk(statement):
            if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield node


def extent_of(statement: ast.stmt) -> range:
    body = getattr(statement, "body", None)
    end = statement.end_lineno or statement.lineno
    return range(statement.lineno, max(body[0].lineno if body else end + 1, statement.lineno + 1))
