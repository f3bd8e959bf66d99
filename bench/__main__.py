"""`python -m bench`, run from the checkout; see `python -m bench --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the main job.

    Returns:
        0; 1 when a contender failed its gate or memory ran out; 2, with one line on stderr, for what cannot be run; 130
        when interrupted.
    """
    try:
        import torch

        from .errors import UsageError
        from .job import main as run_main_job
        from .settings import parse
    except ModuleNotFoundError as missing:
        return _refuse(f"{missing.name} is not installed: pip install '.[bench]' -c constraints.txt")
    except ImportError as broken:
        return _refuse(f"a package does not load: {broken}")
    try:
        return run_main_job(parse(sys.argv[1:] if arguments is None else arguments))
    except UsageError as error:
        return _refuse(str(error))
    except torch.OutOfMemoryError as error:
        print(
            f"bench: out of GPU memory, try a smaller --batch or --size ({str(error).splitlines()[0]})", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


def _refuse(reason: str) -> int:
    """One line on stderr, whatever line breaks a path or a package has put into the reason; exit status 2."""
    print("bench: " + " ".join(line for line in reason.splitlines() if line), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
