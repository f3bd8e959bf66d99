"""Progress on stderr: a tqdm bar on a terminal, plain lines everywhere else."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable
from typing import Any, TextIO

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """Tells how far a piece of work has come, in steps or in seconds of a budget.

    Without a terminal, or without tqdm, a line is written at the start, at the end, and every ten seconds at most.
    """

    def __init__(
        self, title: str, total: int, *, stream: TextIO | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.title, self.total, self.done = title, total, 0
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._last_line = clock()
        self._bar = _bar(title, total, self._stream)
        if self._bar is None:
            self._line(f"{title}: started")

    def advance(self, text: str = "") -> None:
        """One more step is done; `text` says which."""
        self.reach(self.done + 1, text)

    def reach(self, done: int, text: str = "") -> None:
        """So many steps are done; a number above `total` shows as all of them."""
        self.done = min(done, self.total)
        if self._bar is not None:
            self._bar.n = self.done
            self._bar.set_postfix_str(text)
        elif self._clock() - self._last_line >= SECONDS_BETWEEN_LINES:
            self._line(f"{self.title}: {self.done} of {self.total} {text}".rstrip())

    def close(self) -> None:
        """Ends the bar, or writes the last line."""
        if self._bar is not None:
            self._bar.set_postfix_str("")
            self._bar.close()
        else:
            self._line(f"{self.title}: done")

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _line(self, text: str) -> None:
        self._last_line = self._clock()
        print(text, file=self._stream, flush=True)


def _bar(title: str, total: int, stream: TextIO) -> Any | None:
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    shape = "{desc}: {bar:30} {n_fmt}/{total_fmt} {postfix}"
    # A terminal that does not tell its width (0) would get an empty bar from tqdm.
    return tqdm(total=total, desc=title, file=stream, bar_format=shape, ncols=shutil.get_terminal_size().columns)
