"""`python -m bench [kernels | model | peers | suite | report]`, run from the checkout; see `python -m bench --help`.

Without a subcommand: the main job. A subcommand is one entry in `COMMANDS`.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence

Command = Callable[[Sequence[str]], int]


def _main_job() -> Command:
    from .job import main as run
    from .settings import parse

    return lambda arguments: run(parse(arguments))


def _kernels() -> Command:
    from .kernels.job import main as run
    from .kernels.settings import parse

    return lambda arguments: run(parse(arguments))


def _model() -> Command:
    from .model.job import main as run
    from .model.settings import parse

    return lambda arguments: run(parse(arguments))


def _peers() -> Command:
    from .peers.job import main as run
    from .peers.settings import parse

    return lambda arguments: run(parse(arguments))


def _suite() -> Command:
    from .suite.job import main as run
    from .suite.settings import parse

    return lambda arguments: run(parse(arguments))


def _report() -> Command:
    from .evidence.command import main as run

    return run


# What imports a subcommand, so that one command does not need what another one needs.
COMMANDS: dict[str, Callable[[], Command]] = {
    "kernels": _kernels,
    "model": _model,
    "peers": _peers,
    "suite": _suite,
    "report": _report,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the main job, or the subcommand that the first argument names.

    Returns:
        0; 1 when a contender failed its gate or memory ran out; 2, with one line on stderr, for what cannot be run; 130
        when interrupted.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(
            signal.SIGINT, signal.default_int_handler
        )  # a shell's background jobs ignore it: no budget could end them
    rest = list(sys.argv[1:] if arguments is None else arguments)
    load = COMMANDS.get(rest[0]) if rest else None
    if load is not None:
        del rest[0]
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # PyTorch's profiler would announce itself on stderr at every start
    try:
        import torch

        from .errors import UsageError

        command = (load or _main_job)()
    except ModuleNotFoundError as missing:
        return _refuse(f"{missing.name} is not installed: pip install '.[bench]' -c constraints.txt")
    except ImportError as broken:
        return _refuse(f"a package does not load: {broken}")
    try:
        return command(rest)
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
