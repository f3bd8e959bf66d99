"""``python -m step_kernels.model``: the command line."""

import sys

from step_kernels_cli import main

if __name__ == "__main__":
    sys.exit(main())
