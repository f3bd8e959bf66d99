"""The one exception that the command line turns into a single line and exit status 2."""

from __future__ import annotations

from step_kernels.model.cli.errors import UsageError

__all__ = ["UsageError", "need_extra"]


def need_extra(package: str, purpose: str) -> UsageError:
    """The error for a missing optional package.

    Args:
        package: name on the package index, for example "scikit-image".
        purpose: what it is needed for.
    """
    return UsageError(f"{package} is not installed, needed for {purpose}: pip install '.[bench]' -c constraints.txt")
