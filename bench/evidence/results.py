"""The results of one machine: a folder of JSON files, as the subcommands of bench write them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..kernels.schema import KernelResult
from ..model.schema import ModelResult
from ..schema import Result

MAIN, MODEL, KERNELS, PEERS = "bench.json", "model.json", "kernels.json", "peers.json"
PROFILE = "profile/model.json"  # of a run with the profiler attached, whose times do not count
READERS: dict[str, type[Result] | type[ModelResult] | type[KernelResult]] = {
    MAIN: Result,
    MODEL: ModelResult,
    KERNELS: KernelResult,
    PEERS: ModelResult,
    PROFILE: ModelResult,
}
# What makes a machine, its software included; two results that differ in one of these are never compared.
MACHINE = (
    "cpu",
    "architecture",
    "system",
    "cores",
    "threads",
    "cpu_instructions",
    "gpu",
    "gpu_capability",
    "gpu_memory_gib",
    "gpu_driver",
    "torch",
    "triton",
)


@dataclass(frozen=True)
class Evidence:
    """What one folder holds; None for a file that is not there.

    Attributes:
        name: the folder's.
        main, model, kernels, peers: results.
        profiled: a run for where the time goes alone.
    """

    name: str
    main: Result | None = None
    model: ModelResult | None = None
    kernels: KernelResult | None = None
    peers: ModelResult | None = None
    profiled: ModelResult | None = None

    @property
    def environment(self) -> Mapping[str, Any]:
        """Of the first result."""
        return next(found.environment for found in self.results())

    def results(self) -> list[Result | ModelResult | KernelResult]:
        """Those that are there."""
        every = (self.main, self.model, self.kernels, self.peers, self.profiled)
        return [found for found in every if found is not None]


def read(folder: Path) -> Evidence:
    """The results of a folder.

    Raises:
        UsageError: no results, one that cannot be read, or results of more than one machine.
    """
    found: dict[str, Any] = {}
    for name, reader in READERS.items():
        path = folder / name
        if not path.is_file():
            continue
        try:
            found[name] = reader.read(path)
        except (OSError, ValueError, TypeError) as error:
            raise UsageError(f"{path} is not a result of bench: {error}") from None
    if not found:
        raise UsageError(f"{folder} holds no results of bench ({', '.join(READERS)})")
    refuse_mixed(folder, {name: result.environment for name, result in found.items()})
    return Evidence(folder.name, *(found.get(name) for name in READERS))


def refuse_mixed(folder: Path, environments: Mapping[str, Mapping[str, Any]]) -> None:
    """Raises UsageError where two results were not measured on the same machine with the same software."""
    (first, expected), *others = environments.items()
    for name, environment in others:
        for key in MACHINE:
            if environment.get(key) != expected.get(key):
                raise UsageError(
                    f"{folder}: {first} and {name} are of different machines, {key} {expected.get(key)!r} and "
                    f"{environment.get(key)!r}: keep each machine in a folder of its own"
                )
