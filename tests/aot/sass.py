"""What compiled kernels say of their speed: programs that fit a multiprocessor, widths of memory accesses, loads that nothing overlaps.

Read from registers, shared memory and machine code (SASS). It tells nothing of time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .ahead_of_time import Launch

# Per multiprocessor: (bytes of shared memory, warps, programs). CUDA programming guide, "Technical specifications per compute capability".
LIMITS = {
    80: (164 * 1024, 64, 32),
    86: (100 * 1024, 48, 16),
    89: (100 * 1024, 48, 24),
    90: (228 * 1024, 64, 32),
    100: (228 * 1024, 64, 32),
    120: (100 * 1024, 48, 24),
}
RESERVED = 1024  # bytes of shared memory that the system takes per program
TENSOR_COLUMNS = 512  # of tensor memory (tcgen05), which a program takes in whole columns and others wait for
QUARTER = 16384  # registers of each of a multiprocessor's four parts; a warp takes a multiple of 256 from one of them
LINE = re.compile(r"^(LBB\d+):|^\S+\t(?:@!?\w+ )?([A-Z][\w.]*) ?(.*);$", re.MULTILINE)
MATMUL = re.compile(r"(UTC)?[HIQ]?G?MMA")
WIDTH = re.compile(r"\.U?(8|16|64|128)\b")  # bits; without one: 32


def programs_per_multiprocessor(launch: Launch) -> int:
    """How many programs the architecture holds at a time, by registers, shared and tensor memory, warps and programs."""
    shared, warps, programs = LIMITS[launch.architecture]
    (threads,) = re.findall(r"\.reqntid (\d+)", launch.kernel.asm["ptx"])  # of all warps, specialised ones too
    own = int(threads) // 32
    per_warp = -(-launch.resources["registers"] * 32 // 256) * 256
    by_registers = QUARTER // per_warp * 4 // own
    by_shared = shared // (-(-launch.shared_memory // 128) * 128 + RESERVED)
    columns = getattr(launch.kernel.metadata, "tmem_size", 0)
    by_tensor = TENSOR_COLUMNS // columns if columns else programs
    return min(by_registers, by_shared, by_tensor, warps // own, programs)


def warps_per_multiprocessor(launch: Launch) -> int:
    """Of the programs that it holds at a time; not of Triton's own specialised warps."""
    return programs_per_multiprocessor(launch) * launch.kernel.metadata.num_warps


def instructions(launch: Launch) -> Iterator[tuple[str, str]]:
    """(mnemonic with its modifiers, operands), in the order of the code; a label is ("label", its name)."""
    for label, mnemonic, operands in LINE.findall(launch.kernel.asm["sass"]):
        yield ("label", label) if label else (mnemonic, operands)


def access_bytes(launch: Launch) -> dict[str, Counter[int]]:
    """How many instructions of each kind move how many bytes a thread: "load", "store", "async" (to shared memory); "tma": 0 bytes."""
    kinds = {"LDG": "load", "STG": "store", "LDGSTS": "async", "UTMALDG": "tma", "UTMASTG": "tma"}
    found: dict[str, Counter[int]] = {kind: Counter() for kind in kinds.values()}
    for mnemonic, _ in instructions(launch):
        kind = kinds.get(mnemonic.split(".")[0])
        if kind is not None:
            bits = WIDTH.findall(mnemonic)
            found[kind][0 if kind == "tma" else int(bits[-1]) // 8 if bits else 4] += 1
    return found


def exposed_waits(launch: Launch) -> list[int]:
    """Where bulk loads to shared memory are waited for with no matmul since they were issued: whole latencies that the program itself does
    not hide. For each such place, the number of matmul instructions before it in the code: 0 in a prologue.

    TMA: a wait for the barrier, by register and offset, that the load's bytes were announced to; cp.async: a wait for all that is under way.
    Loads waited for together count once; those of a ring of barriers, found by a running index, never do.
    """
    found: list[int] = []
    issued: set[str] = set()
    matmuls, before_label = 0, {}
    for mnemonic, operands in instructions(launch):
        name, *modifiers = mnemonic.split(".")
        waited = ""
        if name == "label":
            before_label[operands] = matmuls
        elif MATMUL.fullmatch(name):
            matmuls += 1
            issued.clear()
        elif name == "BRA" and before_label.get(operands.split()[-1], matmuls) < matmuls:
            issued.clear()  # the end of a loop of matmuls, whose last loads are of later steps
        elif name == "SYNCS" and modifiers[0] == "ARRIVE":
            issued.add(operands.split(", ")[1])
        elif name == "LDGDEPBAR":
            issued.add("cp.async")
        elif name == "SYNCS" and modifiers[0] == "PHASECHK":
            waited = operands.split(", ")[1]
        elif name == "DEPBAR" and operands == "SB0, 0x0":
            waited = "cp.async"
        elif operands.startswith("UR"):  # a barrier's register is written anew
            issued = {barrier for barrier in issued if not re.match(rf"\[{operands.split(',')[0]}\b", barrier)}
        if waited in issued:
            found.append(matmuls)
            issued.clear()
    return found
