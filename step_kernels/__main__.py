"""``python -m step_kernels``: the command line; without words the self-check, `info`."""

import sys

from step_kernels_cli import main

if __name__ == "__main__":
    sys.exit(main(otherwise="info"))
