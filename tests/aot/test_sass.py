"""What is read off compiled kernels, on a few lines of machine code and by hand; on real kernels: where tests assert it."""

from types import SimpleNamespace

import pytest
from aot.ahead_of_time import Launch
from aot.sass import access_bytes, exposed_waits, programs_per_multiprocessor


def launch(
    architecture: int = 90, *, registers: int = 32, warps: int = 4, shared: int = 0, tensor: int = 0, code: str = ""
) -> Launch:
    lines = (line.strip() for line in code.strip().splitlines())
    sass = "\n".join(line if line.endswith(":") else f"--:-:-:-:1\t{line};" for line in lines)
    assembly = {"ptx": f".reqntid {32 * warps}", "sass": sass}
    metadata = SimpleNamespace(shared=shared, tmem_size=tensor)
    made = Launch("kernel", (1,), SimpleNamespace(asm=assembly, metadata=metadata), architecture)
    made.resources = {"registers": registers}
    return made


@pytest.mark.parametrize(
    ("architecture", "registers", "warps", "shared", "programs"),
    [
        (90, 32, 4, 0, 16),  # 64 warps
        (86, 32, 4, 0, 12),  # 48 warps
        (86, 32, 1, 0, 16),  # 16 programs
        (90, 72, 4, 64, 7),  # 7 warps of 9 x 256 registers in each quarter
        (90, 73, 4, 64, 6),
        (90, 255, 8, 0, 1),
        (90, 128, 8, 113 * 1024, 2),  # 2 x (113 + 1) KiB: all there is
        (90, 128, 8, 113 * 1024 + 1, 1),
    ],
)
def test_programs_per_multiprocessor(architecture, registers, warps, shared, programs):
    made = launch(architecture, registers=registers, warps=warps, shared=shared)
    assert programs_per_multiprocessor(made) == programs


@pytest.mark.parametrize(("columns", "programs"), [(0, 16), (128, 4), (256, 2), (512, 1)])
def test_programs_share_tensor_memory(columns, programs):
    assert programs_per_multiprocessor(launch(100, tensor=columns)) == programs


def test_access_bytes():
    code = """
        LDG.E R4, desc[UR32][R10.64]
        @!P1 LDG.E.128 R4, desc[UR32][R10.64]
        LDG.E.U16.CONSTANT R4, desc[UR32][R10.64]
        @P3 STG.E.64 desc[UR32][R70.64], R44
        LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR32][R10.64]
        @UP1 UTMALDG.2D [UR4], [UR12]
    """
    expected = {"load": {4: 1, 16: 1, 2: 1}, "store": {8: 1}, "async": {16: 1}, "tma": {0: 1}}
    assert access_bytes(launch(code=code)) == expected


ISSUE = "SYNCS.ARRIVE.TRANS64 RZ, [UR10+{0}]\nUTMALDG.2D [UR4], [UR12]\n"
WAIT = "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR10+{0}], RZ\n"
MATMUL = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24\n"
FIRST, SECOND = "0x8000", "0x8008"


@pytest.mark.parametrize(
    ("code", "places"),
    [
        (ISSUE.format(FIRST) + WAIT.format(FIRST), [0]),
        (ISSUE.format(FIRST) + MATMUL + WAIT.format(FIRST), []),
        (MATMUL + (ISSUE.format(FIRST) + WAIT.format(FIRST)) * 2, [1, 1]),
        ("".join(each.format(number) for each in (ISSUE, WAIT) for number in (FIRST, SECOND)), [0]),  # together
        (ISSUE.format(FIRST) + "UIADD3 UR10, UR10, 0x8, URZ\n" + WAIT.format(FIRST), []),  # another barrier of a ring
        ("LDGDEPBAR\nDEPBAR.LE SB0, 0x0", [0]),
        ("LDGDEPBAR\nDEPBAR.LE SB0, 0x2", []),
        (f"LBB0:\n{MATMUL}LDGDEPBAR\n@P0 BRA LBB0\nDEPBAR.LE SB0, 0x0", []),  # after the loop
        (WAIT.format(FIRST), []),
    ],
)
def test_exposed_waits(code, places):
    assert exposed_waits(launch(code=code)) == places
