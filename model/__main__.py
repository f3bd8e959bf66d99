"""`python -m step_kernels.model COMMAND ...`; see `python -m step_kernels.model COMMAND --help`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from .cli.errors import UsageError

COMMANDS = ("predict",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that the first argument names.

    Returns:
        The command's status: 0, or 1 when a part of the work failed; 2, with one line on stderr, for what cannot be run;
        130 when interrupted.
    """
    rest = list(sys.argv[1:] if arguments is None else arguments)
    command = rest[0] if rest else "none"
    if command in ("-h", "--help"):
        print(f"usage: python -m step_kernels.model {{{','.join(COMMANDS)}}} ... (each has its own --help)")
        return 0
    try:
        if command == "predict":
            from .cli.predict import main as predict  # only a command that is asked for needs its packages

            return predict(rest[1:])
        raise UsageError(f"expected a command ({', '.join(COMMANDS)}), got {command}")
    except (UsageError, ImportError) as error:  # a missing optional package; import_extra says what to install
        # One line, whatever line breaks a path or a package has put into the reason.
        print("step_kernels.model: " + " ".join(line for line in str(error).splitlines() if line), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"step_kernels.model: out of GPU memory ({str(error).splitlines()[0]})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("step_kernels.model: interrupted", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
