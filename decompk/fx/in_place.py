"""What a function's bytecode changes in place: dicts, lists and objects, and the attributes that it finds them by."""

from __future__ import annotations

import dis
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from types import CodeType

_FILLS = {
    *(
        "append",
        "appendleft",
        "extend",
        "extendleft",
        "insert",
        "pop",
        "popleft",
        "popitem",
        "remove",
        "clear",
        "update",
    ),
    *("setdefault", "add", "discard", "move_to_end", "rotate", "sort", "reverse", "put", "__setitem__", "__delitem__"),
}
_LOOKS_UP = {"get", "setdefault", "pop", "popleft", "popitem", "values", "items", "keys", "__getitem__"}
_NOTHING = ("RESUME", "NOP", "CACHE", "EXTENDED_ARG", "PRECALL", "KW_NAMES", "COPY_FREE_VARS", "MAKE_CELL", "GET_ITER")
_NO_RESULT = ("POP_", "STORE_", "DELETE_", "RETURN_", "RAISE", "RERAISE", "JUMP", "END_", "SETUP_", "CHECK_")

Chain = tuple[str, ...]  # a variable and the attributes looked up behind it: x.a["b"].c is ("x", "a", "c")


@dataclass(frozen=True)
class Change:
    """Something that is changed in place: the variable it is reached from, and the attributes on the way.

    how: by a "method" of containers, as an "item", x[…] = …, an "attribute", or by an "operator", x += ….
    is_argument: whether it is itself an argument of the function.
    """

    root: str
    names: Chain
    how: str
    is_argument: bool


@functools.lru_cache(4096)
def changed_in_place(function: CodeType, self_name: str) -> tuple[Change, ...]:
    """Every change that the code and those nested in it make to what an attribute, an argument or a global holds."""
    found: list[tuple[Chain, str]] = []
    aliases: dict[str, set[Chain]] = {}
    arguments: set[str] = set()
    queue = [function]
    for code in queue:
        queue += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
        arguments |= {*code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]} - {self_name}
        found += _followed(code, aliases)
    return tuple(
        Change(chain[0], chain[1:], how, len(chain) == 1 and chain[0] in arguments)
        for first, how in found
        for chain in _resolved(first, aliases)
    )


def _resolved(chain: Chain, aliases: dict[str, set[Chain]]) -> Iterator[Chain]:
    """The chains that `chain` may stand for, its variable replaced by what was assigned to it."""
    queue, seen = [chain], {chain}
    for one in queue:
        yield one
        longer = {(*other, *one[1:]) for other in aliases.get(one[0], ()) if len(other) + len(one) < 8} - seen
        seen |= longer
        queue += longer


def _followed(code: CodeType, aliases: dict[str, set[Chain]]) -> Iterator[tuple[Chain, str]]:
    """(what is changed, how), followed on the stack from one instruction to the next.

    The code is read straight through, as if no branch was taken: only what one expression leaves there matters.
    """
    stack: list[Chain | None] = []

    def pop(count: int = 1) -> list[Chain | None]:
        stack[:0] = [None] * (count - len(stack))
        popped = stack[len(stack) - count :]
        del stack[len(stack) - count :]
        return popped

    def bind(name: str, value: Chain | None) -> None:
        if value is not None and value != (name,):
            aliases.setdefault(name, set()).add(value)

    for instruction in dis.get_instructions(code):
        op, argument, value = instruction.opname, instruction.arg, instruction.argval
        if op in _NOTHING:
            continue
        if op.startswith("STORE_FAST") or op in ("STORE_DEREF", "STORE_NAME", "STORE_GLOBAL"):
            names = value if isinstance(value, tuple) else (value,)
            bind(names[0], pop()[0])
            if op == "STORE_FAST_LOAD_FAST":
                stack.append((names[1],))
            elif len(names) > 1:
                bind(names[1], pop()[0])
        elif op.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_NAME", "LOAD_GLOBAL", "LOAD_CLASSDEREF")):
            names = value if isinstance(value, tuple) else (value,)
            stack += [(name,) for name in names for _ in range(_effect(instruction) if len(names) == 1 else 1)]
        elif op in ("LOAD_ATTR", "LOAD_METHOD"):
            (owner,) = pop()
            if owner is not None and value in _FILLS:
                yield owner, "method"
            elif owner is not None and value[-1:] == "_" != value[-2:-1]:  # a tensor's add_ and the like
                yield owner, "operator"
            stack += [(*(owner or ("?",)), value)] + [owner] * _effect(instruction)
        elif op in ("STORE_ATTR", "DELETE_ATTR"):
            owner = pop(1 if op == "DELETE_ATTR" else 2)[-1]
            if owner is not None:
                yield owner, "attribute"
        elif op in ("STORE_SUBSCR", "DELETE_SUBSCR", "STORE_SLICE"):
            parts = pop({"STORE_SUBSCR": 3, "DELETE_SUBSCR": 2, "STORE_SLICE": 4}[op])
            container = parts[0 if op == "DELETE_SUBSCR" else 1]
            if container is not None:
                yield container, "item"
        elif op == "BINARY_SUBSCR" or (op == "BINARY_OP" and instruction.argrepr == "[]"):
            stack.append(pop(2)[0])
        elif op == "BINARY_SLICE":
            stack.append(pop(3)[0])
        elif op == "FOR_ITER":
            stack.append(stack[-1] if stack else None)
        elif op.startswith("INPLACE_") or (op == "BINARY_OP" and instruction.argrepr.endswith("=")):
            target = pop(2)[0]
            if target is not None:
                yield target, "operator"
            stack.append(target)
        elif op in ("COPY", "DUP_TOP"):
            depth = argument if op == "COPY" else 1
            stack.append(stack[-depth] if depth <= len(stack) else None)
        elif op == "DUP_TOP_TWO":
            stack += pop(2) * 2
        elif op in ("SWAP", "ROT_TWO"):
            parts = pop(argument if op == "SWAP" else 2)
            stack += [parts[-1], *parts[1:-1], parts[0]]
        elif op.startswith("ROT_"):
            parts = pop({"ROT_THREE": 3, "ROT_FOUR": 4}.get(op, argument))
            stack += [parts[-1], *parts[:-1]]
        elif op.startswith("CALL"):
            counts = {"CALL": (argument or 0) + 2, "CALL_KW": (argument or 0) + 3}
            stack.append(_called(pop(counts.get(op, 1 - _effect(instruction)))))
        else:
            effect = _effect(instruction)
            if op.startswith(_NO_RESULT):
                pop(max(0, -effect))
            else:
                pop(max(0, 1 - effect))
                stack += [None] * max(1, effect)


def _called(parts: list[Chain | None]) -> Chain | None:
    """What a call gives, of the callee and its arguments: an element of a container, or an object's attributes."""
    callee = next((part for part in parts[:2] if part is not None), None)
    if callee is None:
        return None
    if callee in (("vars",), ("getattr",)):
        owner = next((part for part in parts if part is not None and part != callee), None)
        return owner and (*owner, "__dict__")
    return callee[:-1] if len(callee) > 2 and callee[-1] in _LOOKS_UP else None


def _effect(instruction: dis.Instruction) -> int:
    """By how much an instruction lengthens the stack where it does not jump."""
    try:
        return dis.stack_effect(instruction.opcode, instruction.arg, jump=False)
    except ValueError:  # an opcode without argument
        return dis.stack_effect(instruction.opcode, None, jump=False)
