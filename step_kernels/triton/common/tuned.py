"""Rows of the kernels' tables that were measured on this machine's GPUs: read from the file that ``python -m step_kernels tune`` writes.

Nothing is measured while a program runs. What the file does not hold, and all where there is none, follows the committed tables.
``STEP_KERNELS_TUNED`` names another file, or is ``off``.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import triton

FORMAT = 1
Row = tuple[Any, ...]  # the numbers of a table's row, in its order
TRITON, VARLEN = ("triton",), ("varlen",)  # in place of such numbers: whose kernels attention runs
_NONE: Mapping[str, Row] = {}
_forced: dict[str, Row] = {}


class UnusedTuningWarning(UserWarning):
    """There is a file of measured rows, and the committed tables run all the same."""


def row(device: torch.device, *key: object) -> Row | None:
    """What was measured for a kernel on the device; ``key``: the kernel and what its table is indexed by."""
    if _forced and (taken := _forced.get(name_of(*key))) is not None:
        return taken
    found = rows(device)
    return found.get(name_of(*key)) if found else None


@functools.lru_cache(maxsize=4096)
def name_of(*key: object) -> str:
    """In the file. Remembered, as some ops look up at each call, of which making it would be a third."""
    return " ".join(map(str, key))


@contextlib.contextmanager
def forced(key: str, taken: Row) -> Iterator[None]:
    """Inside, the kernel runs with these numbers, whatever was measured. For ``tune``: not for use by several threads."""
    _forced[key] = taken
    try:
        yield
    finally:
        del _forced[key]


def may_name_varlen() -> bool:
    """Whether some row may be ``VARLEN``: asked before each call of attention, so of no device."""
    return bool(_forced) or _mentions_varlen()


@functools.cache
def _mentions_varlen() -> bool:
    with contextlib.suppress(OSError, ValueError):  # `rows` tells what is wrong with the file
        path = location()
        return path is not None and VARLEN[0] in path.read_text(encoding="utf-8")
    return False


def settled() -> bool:
    """Whether all kernels keep their rows from now on."""
    return not _forced


@functools.cache
def rows(device: torch.device) -> Mapping[str, Row]:
    """Of a GPU; of anything else none."""
    path = location()
    if device.type != "cuda" or path is None:
        return _NONE
    try:
        gpu = read(path).get(torch.cuda.get_device_name(device))
    except FileNotFoundError:
        if "STEP_KERNELS_TUNED" in os.environ:
            _warn(path, "there is no such file")
        return _NONE
    except (OSError, ValueError) as error:
        _warn(path, str(error))
        return _NONE
    if gpu is None:
        return _NONE
    if gpu["made_for"] != made_for():
        _warn(path, f"it was measured with {_told(gpu['made_for'])}, this is {_told(made_for())}")
        return _NONE
    return {key: tuple(numbers) for key, numbers in gpu["rows"].items()}


def location() -> Path | None:
    """The file, whether it is there or not; None: switched off.

    Raises:
        ValueError: the variable is neither ``off`` nor a file named ``*.json``: ``0`` or ``no`` would be taken for one that is not there.
    """
    named = os.environ.get("STEP_KERNELS_TUNED")
    if named == "off":
        return None
    if named:
        if not named.endswith(".json"):
            raise ValueError(f"environment variable STEP_KERNELS_TUNED: expected off or a file *.json, got {named!r}")
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "step_kernels" / "tuned.json"


def read(path: Path) -> dict[str, dict[str, Any]]:
    """GPU's name -> ``made_for``, ``rows`` and what else was measured.

    Raises:
        OSError, ValueError: it cannot be read, or is no file of this format.
    """
    content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"expected a file of format {FORMAT} that tune wrote")
    gpus = content.get("gpus")
    if not isinstance(gpus, dict) or not all(map(_is_entry, gpus.values())):
        raise ValueError("expected rows for each GPU, as tune writes them")
    return gpus


def _is_entry(entry: Any) -> bool:
    rows, made = (entry.get(name) for name in ("rows", "made_for")) if isinstance(entry, dict) else (None, None)
    numbers = rows.values() if isinstance(rows, dict) else [None]
    return isinstance(made, dict) and all(
        row in ([*TRITON], [*VARLEN])
        or (isinstance(row, list) and row and all(isinstance(number, int) for number in row))
        for row in numbers
    )


@functools.cache
def made_for() -> dict[str, str]:
    """What rows depend on besides the GPU: Triton, and the source of the kernels."""
    digest, folder = hashlib.sha256(), Path(__file__).parents[1]
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return {"triton": triton.__version__, "source": digest.hexdigest()[:16]}


def describe(device: torch.device) -> str:
    """Which rows run, for people."""
    count = len(rows(device))
    return f"{count} rows measured on this GPU, else the committed tables" if count else "the committed tables"


def _told(made: Mapping[str, str]) -> str:
    return f"Triton {made.get('triton')} and kernels {made.get('source')}"


def _warn(path: Path, why: str) -> None:
    message = f"{path}: {why}; the committed tables are used. `python -m step_kernels tune` measures again."
    warnings.warn(message, UnusedTuningWarning, stacklevel=2)
