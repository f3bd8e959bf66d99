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
        print(f"bench: {missing.name} is not installed: pip install '.[bench]' -c constraints.txt", file=sys.stderr)
        return 2
    try:
        return run_main_job(parse(sys.argv[1:] if arguments is None else arguments))
    except UsageError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(
            f"bench: out of GPU memory, try a smaller --batch or --size ({str(error).splitlines()[0]})", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
