"""This module checks what is read from machine code, on listings whose loops and loads are plain to see. It does not
know the kernels.
"""

from __future__ import annotations

import pytest
from octavo.kernels.aot.sass import describe, find_loops, parse, summary
from octavo.kernels.aot.targets import GPUS

RESOURCES = "Function k:\n  REG:96 STACK:8 SHARED:0 LOCAL:0 CONSTANT[0]:560"


def listing(*lines: str) -> str:
    """Return lines as nvdisasm prints them: "label:" or "opcode operands"."""
    return "\n".join(line if line.endswith(":") else f"        /*{16 * i:04x}*/                   {line} ;"
                     for i, line in enumerate(lines))  # fmt: skip


def fill(count: int, opcode: str = "IMAD") -> list[str]:
    return [f"{opcode} R1, R2, R3, R4"] * count


TWO_LOOPS = listing(
    ".text.kernel:",
    "S2R R0, SR_TID.X",
    ".L_x_0:",  # a persistent loop around both
    "@P0 LDG.E.128 R4, desc[UR4][R2.64]",
    ".L_x_1:",
    *fill(12),
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "LDGSTS.E.BYPASS.LTC128B.128 [R5], desc[UR4][R2.64]",
    "@!P1 BRA `(.L_x_1)",
    ".L_x_2:",
    *fill(20),
    "HGMMA.64x64x16.F32.BF16 R24, gdesc[UR8], R24",
    "LDG.E.U16 R4, desc[UR4][R2.64]",
    "BRA.U UP0, `(.L_x_2)",
    "STG.E.64 desc[UR4][R2.64], R4",
    "STL [R1], R4",
    "@P2 BRA `(.L_x_0)",
    "EXIT",
    ".L_x_9:",
    "BRA `(.L_x_9)",
    *fill(9, "NOP"),
)


def test_the_loops_with_matrix_products_are_found_the_shorter_first() -> None:
    found = describe(TWO_LOOPS, RESOURCES)
    assert [loop["instructions"] for loop in found["loops"]] == [15, 23]
    assert [loop["mma"] for loop in found["loops"]] == [{"HGMMA": 1}, {"HGMMA": 1}]
    assert found["loops"][0]["async_loads"] == {"128": 1}
    assert found["loops"][0]["mix"] == {"global memory": 1, "integer and moves": 12, "matrix": 1, "other": 1}
    assert found["loops"][1]["loads"] == {"narrow": 1}


def test_the_whole_kernel_is_counted_without_what_fills_its_end() -> None:
    found = describe(TWO_LOOPS, RESOURCES)
    assert (found["regs"], found["stack_bytes"], found["spills"]) == (96, 8, 1)
    assert found["loads"] == {"128": 1, "narrow": 1}
    assert found["stores"] == {"64": 1}
    assert found["instructions"] == 1 + 1 + 15 + 23 + 3 + 1 + 1


def test_without_matrix_products_the_longest_innermost_loop_is_the_main_one() -> None:
    code = parse(
        listing(".L_a:", *fill(9), "@P0 BRA `(.L_a)", ".L_b:", *fill(30), "@P0 BRA `(.L_b)", *fill(50), "EXIT")
    )
    assert [len(loop) for loop in find_loops(code)] == [31, 10]


def test_a_branch_back_from_code_moved_out_of_line_is_no_loop() -> None:
    """A wait whose slow path lies behind the kernel's end jumps back to where it left."""
    code = parse(
        listing(
            ".L_loop:", *fill(10), "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R4], R5", "@!P0 BRA `(.L_slow)", ".L_on:",
            "UTCHMMA gdesc[UR4], gdesc[UR6], tmem[UR8], idesc[UR9]", *fill(5), "@P1 BRA `(.L_loop)", "EXIT", ".L_slow:",
            *fill(12), "BRA `(.L_on)",
        )
    )  # fmt: skip
    (loop,) = find_loops(code)
    assert len(loop) == 10 + 2 + 1 + 5 + 1 + 13
    assert summary(loop)["mma"] == {"UTCHMMA": 1}


def test_a_kernel_without_a_loop_has_none() -> None:
    assert find_loops(parse(listing(*fill(40), "EXIT", ".L_x:", "BRA `(.L_x)"))) == []


@pytest.mark.parametrize(
    ("target", "regs", "shared_bytes", "num_warps", "expected"),
    [
        ("sm_90", 168, 39_168, 4, 3),  # 65,536 / (168 · 128)
        ("sm_90", 169, 0, 4, 2),  # 169 registers are handed out as 176
        ("sm_90", 32, 98_304, 8, 2),  # 233,472 / (98,304 + 1,024)
        ("sm_80", 32, 98_304, 8, 1),
        ("sm_90", 16, 0, 8, 8),  # 64 warps
        ("sm_89", 16, 0, 8, 6),  # 48 warps
        ("sm_100", 16, 0, 1, 32),
    ],
)
def test_ctas_per_sm(target: str, regs: int, shared_bytes: int, num_warps: int, expected: int) -> None:
    assert GPUS[target].ctas_per_sm(regs, shared_bytes, num_warps) == expected
