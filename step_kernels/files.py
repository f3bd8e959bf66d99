"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write what becomes ``path`` when it is complete; until then an earlier one stays. Errors name ``path``."""
    part = path.with_name(f".{path.name}.part")
    try:
        yield part
        part.replace(path)
    except OSError as error:
        if error.errno and error.filename in (None, str(part)):  # None: of a full disk
            error.filename = str(path)
        raise
    finally:
        part.unlink(missing_ok=True)
