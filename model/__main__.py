"""`python -m step_kernels.model COMMAND ...`; see `python -m step_kernels.model COMMAND --help`.

A command is one entry in `COMMANDS`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch

from .cli.errors import UsageError

Command = Callable[[Sequence[str]], int]


def _predict() -> Command:
    from .cli.predict import main as run

    return run


# What imports a command, so that one does not need what another one needs.
COMMANDS: dict[str, Callable[[], Command]] = {"predict": _predict}


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Returns:
        The command's status: 0, or 1 when a part of the work failed; 2, with one line on stderr, for what cannot be run;
        130 when interrupted.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    if rest[:1] in (["-h"], ["--help"]):
        print(f"usage: python -m step_kernels.model {{{','.join(COMMANDS)}}} ... (each has its own --help)")
        return 0
    load = COMMANDS.get(rest[0]) if rest else None
    if load is None:
        return _refuse(f"expected a command ({', '.join(COMMANDS)}), got {rest[0] if rest else 'none'}")
    try:
        return load()(rest[1:])
    except (UsageError, ImportError) as error:  # a missing optional package; import_extra says what to install
        return _refuse(str(error))
    except torch.OutOfMemoryError as error:
        print(f"step_kernels.model: out of GPU memory ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("step_kernels.model: interrupted", file=sys.stderr)
        return 130


def _refuse(reason: str) -> int:
    """One line on stderr, whatever line breaks a path or a package has put into the reason; exit status 2."""
    print("step_kernels.model: " + " ".join(line for line in reason.splitlines() if line), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
