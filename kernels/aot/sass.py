"""This module holds what can be read from a kernel's machine code: registers, loops, matrix instructions, how wide its
loads are. It does not know what the kernel computes.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from typing import Any, Final, NamedTuple

__all__ = ["Instruction", "describe", "find_loops", "parse", "read_cubin"]

MIN_LOOP_INSTRUCTIONS: Final = 8
"""Shorter loops wait for a barrier, or for nothing, as the one after a kernel's end."""

_INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(@!?U?P\w+\s+)?([A-Z][\w.]*)([^;]*);")
_LABEL = re.compile(r"^\s*(\.L_[\w]+|\.text\.[^:]+):")
_TARGET = re.compile(r"`\((\.L_\w+)\)")
_PREDICATE = re.compile(r"\bU?P\d")
_RESOURCES = re.compile(r"REG:(\d+)\s+STACK:(\d+)")
_MMA = re.compile(r"([HQIDB]G?|UTC[A-Z]*)MMA$")
_ACCESSES: Final = {"LDG": "loads", "STG": "stores", "LDGSTS": "async_loads"}
_WIDTHS: Final = {"256": "256", "128": "128", "64": "64"} | dict.fromkeys(("U16", "S16", "U8", "S8"), "narrow")
_MIX: Final = {
    "matrix": ("HMMA", "HGMMA", "IMMA", "QMMA", "QGMMA", "IGMMA", "UTC", "WARPGROUP"),
    "global memory": ("LDG", "STG", "UTMA", "UBLKCP", "ATOM", "RED", "DEPBAR"),
    "shared memory": ("LDS", "STS", "LDTM", "STTM"),
    "special functions": ("MUFU",),
    "float": ("F", "HADD", "HMUL", "HFMA", "HMNMX", "DADD", "DMUL", "DFMA"),
    "exchange and barriers": ("SHFL", "BAR", "SYNCS", "WARPSYNC", "REDUX", "VOTE", "MATCH", "ELECT"),
    "integer and moves": (
        *("I", "LEA", "LOP", "SHF", "SEL", "PRMT", "PLOP", "P2R", "R2P", "VI", "MOV", "S2", "CS2R", "R2UR"),
        *("UI", "ULEA", "ULOP", "USHF", "USEL", "UPRMT", "UMOV"),
    ),
}
"""Kind -> beginnings of opcodes; the first that fits, so that LDGSTS is global memory."""


class Instruction(NamedTuple):
    """One machine instruction: the labels that name it as a branch target, and the label it branches to."""

    opcode: str
    labels: tuple[str, ...] = ()
    target: str | None = None
    conditional: bool = False

    @property
    def name(self) -> str:
        """The opcode without its modifiers."""
        return self.opcode.partition(".")[0]

    @property
    def kind(self) -> str:
        """What it spends issue slots on."""
        return next((kind for kind, starts in _MIX.items() if self.name.startswith(starts)), "other")


def parse(sass: str) -> list[Instruction]:
    """Return the instructions of `nvdisasm -c`'s text."""
    found: list[Instruction] = []
    labels: list[str] = []
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels.append(label[1])
        elif match := _INSTRUCTION.match(line):
            predicate, opcode, operands = match.groups()
            if opcode == "NOP":  # what fills the end of a kernel
                continue
            target = _TARGET.search(operands) if opcode.startswith(("BRA", "UBRA")) else None
            conditional = bool(predicate) or bool(target and _PREDICATE.search(operands[: target.start()]))
            found.append(Instruction(opcode, tuple(labels), target[1] if target else None, conditional))
            labels = []
    return found


def _flow(code: list[Instruction]) -> tuple[list[range], list[list[int]]]:
    """Return the basic blocks and the successors of each."""
    at = {label: i for i, instruction in enumerate(code) for label in instruction.labels}
    leaves = [instruction.target is not None or instruction.name in ("EXIT", "RET") for instruction in code]
    starts = sorted({0, *at.values()} | {i + 1 for i, leaving in enumerate(leaves[:-1]) if leaving})
    blocks = [range(start, stop) for start, stop in zip(starts, [*starts[1:], len(code)], strict=True)]
    number = {block.start: i for i, block in enumerate(blocks)}
    successors: list[list[int]] = []
    for i, block in enumerate(blocks):
        last = code[block[-1]]
        falls_through = last.conditional or not leaves[block[-1]]
        successors.append([i + 1] if falls_through and i + 1 < len(blocks) else [])
        if last.target in at:
            successors[-1].append(number[at[last.target]])
    return blocks, successors


def _back_edges(successors: list[list[int]]) -> list[tuple[int, int]]:
    """Return the edges that close a loop: to a block that the search is still below."""
    found, visited, below = [], {0}, [(0, iter(successors[0]))]
    while below:
        block, rest = below[-1]
        following = next(rest, None)
        if following is None:
            below.pop()
        elif following not in visited:
            visited.add(following)
            below.append((following, iter(successors[following])))
        elif any(following == other for other, _ in below):
            found.append((block, following))
    return found


def find_loops(code: list[Instruction]) -> list[list[Instruction]]:
    """Return the loops that do the work, the main one first.

    They are the innermost of the loops with matrix instructions, the one with the most first, of equal ones the
    shortest (the one without masks); where there are none, of all loops, the longest first.
    """
    if not code:
        return []
    blocks, successors = _flow(code)
    loops: dict[int, set[int]] = {}  # by header
    for tail, header in _back_edges(successors):
        body, waiting = loops.setdefault(header, {header}), [tail]
        while waiting:
            block = waiting.pop()
            if block not in body:
                body.add(block)
                waiting += [other for other, following in enumerate(successors) if block in following]
    bodies = [(body, [code[i] for block in sorted(body) for i in blocks[block]]) for body in loops.values()]
    bodies = [(body, loop) for body, loop in bodies if len(loop) >= MIN_LOOP_INSTRUCTIONS]
    with_mma = [(body, loop) for body, loop in bodies if _num_mma(loop)]
    candidates = with_mma or bodies
    inner = [loop for body, loop in candidates if not any(other < body for other, _ in candidates)]
    return sorted(inner, key=lambda loop: (-_num_mma(loop), len(loop) if with_mma else -len(loop)))


def _num_mma(code: list[Instruction]) -> int:
    return sum(1 for instruction in code if _MMA.match(instruction.name))


def _width(instruction: Instruction) -> str:
    return next((_WIDTHS[part] for part in instruction.opcode.split(".")[1:] if part in _WIDTHS), "32")


def summary(code: list[Instruction]) -> dict[str, Any]:
    """Return how many instructions there are, by kind, and what they load, store and multiply."""
    counts: dict[str, Counter[str]] = {name: Counter() for name in ("mma", "loads", "stores", "async_loads", "mix")}
    for instruction in code:
        name = instruction.name
        counts["mix"][instruction.kind] += 1
        if _MMA.match(name):
            counts["mma"][name] += 1
        elif name in _ACCESSES:
            counts[_ACCESSES[name]][_width(instruction)] += 1
        elif name in ("UTMALDG", "UBLKCP"):
            counts["async_loads"]["bulk"] += 1
    return {"instructions": len(code), **{name: dict(sorted(counter.items())) for name, counter in counts.items()}}


def describe(sass: str, resources: str) -> dict[str, Any]:
    """Return what `nvdisasm -c` and `cuobjdump -res-usage` tell of a kernel.

    `spills` counts instructions that access local memory; `loops` are summaries, the main loop first.
    """
    code = parse(sass)
    usage = _RESOURCES.search(resources)
    if usage is None:
        raise ValueError(f"cuobjdump says nothing of registers: {resources!r}")
    return {
        "regs": int(usage[1]),
        "stack_bytes": int(usage[2]),
        "spills": sum(1 for instruction in code if instruction.name in ("LDL", "STL")),
        **summary(code),
        "loops": [summary(loop) for loop in find_loops(code)],
    }


def read_cubin(cubin: bytes) -> dict[str, Any]:
    """Return `describe` of a compiled kernel, by the tools that Triton brings along."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        sass, resources = (
            subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout
            for command in ((knobs.nvidia.nvdisasm.path, "-c"), (knobs.nvidia.cuobjdump.path, "-res-usage"))
        )
    return describe(sass, resources)
