"""Which way code goes at a branch whose other side leads to nothing but a raise: it checks what it is given."""

from __future__ import annotations

import dis
import functools
import re
from types import CodeType

_SILENT = ("CACHE", "EXTENDED_ARG", "NOP", "NOT_TAKEN")
_ONE_WAY = ("JUMP_FORWARD", "JUMP_BACKWARD", "JUMP_ABSOLUTE", "JUMP_BACKWARD_NO_INTERRUPT")


@functools.lru_cache(4096)
def goes_on_with(code: CodeType, offset: int) -> bool | None:
    """The truth asked for at `offset` with which the code goes on, where it only raises with the other; else None."""
    instructions = [i for i in dis.get_instructions(code) if i.opname not in _SILENT or i.offset == offset]
    at = next(n for n, i in enumerate(instructions) if i.offset == offset)
    asks = instructions[at]  # the jump itself, or, from Python 3.13 on, what is in front of it
    jump = instructions[at + (asks.opname == "TO_BOOL" or asks.argrepr.startswith("bool("))]
    kind = re.search(r"JUMP.*_IF_(TRUE|FALSE)", jump.opname)
    if kind is None:
        return None
    jumped, further = (_only_raises(instructions, start) for start in (jump.argval, jump.offset + 1))
    if jumped == further:
        return None
    return (kind[1] == "TRUE") == further


def _only_raises(instructions: list[dis.Instruction], start: int) -> bool:
    """Whether all ways from the offset `start` on end in a raise."""
    raises, seen, queue = False, set(), [start]
    for offset in queue:
        at = next(n for n, i in enumerate(instructions) if i.offset >= offset)
        if at in seen:
            continue
        seen.add(at)
        instruction = instructions[at]
        name, jumps = instruction.opname, instruction.opcode in (*dis.hasjrel, *dis.hasjabs)
        if name.startswith(("RETURN_", "YIELD_")):
            return False
        if name in ("RAISE_VARARGS", "RERAISE"):
            raises = True
            continue
        queue += [instruction.argval] if jumps else []
        queue += [] if name in _ONE_WAY else [instruction.offset + 1]
    return raises
