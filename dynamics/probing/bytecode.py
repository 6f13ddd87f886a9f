"""What a function's code names, sets and changes, read from its bytecode, as its source may be absent."""

from __future__ import annotations

import dis
import functools
import re
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import islice
from types import CodeType
from typing import Any, NamedTuple

_NAMED_BY: dict[str, tuple[str, ...]] = {
    "LOAD_GLOBAL": ("variables",),
    "LOAD_NAME": ("variables",),
    "STORE_GLOBAL": ("variables", "sets_variables"),
    "LOAD_ATTR": ("attributes",),
    "LOAD_METHOD": ("attributes",),
    "LOAD_SUPER_ATTR": ("attributes",),
    "STORE_ATTR": ("attributes",),
    "STORE_DEREF": ("sets_cells",),
}
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD")
_REACHES = (*_LOADS, "BINARY_SUBSCR", "BINARY_SLICE")
_ABOVE = {"STORE_ATTR": 0, "STORE_SUBSCR": 1, "STORE_SLICE": 2}  # values that lie on the changed one, such as the key
_OF_LISTS = {"append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort"}  # methods that change one
_OF_DEQUES = {"appendleft", "extendleft", "popleft", "rotate"}
_OF_DICTIONARIES = {"move_to_end", "popitem", "setdefault", "update"}
_OF_SETS = {"add", "discard", "difference_update", "intersection_update", "symmetric_difference_update"}
_OF_ARRAYS = {"fill", "itemset", "partition", "put"}
_OF_CONTAINERS = _OF_LISTS | _OF_DEQUES | _OF_DICTIONARIES | _OF_SETS | _OF_ARRAYS
_OF_ENTRIES = ("get", "setdefault")  # methods that return one
_JUMPS = frozenset((*dis.hasjrel, *dis.hasjabs))
_GOES_NOT_ON = ("JUMP_FORWARD", "JUMP_BACKWARD", "RETURN", "RAISE", "RERAISE")


class Names(NamedTuple):
    """What a function's code names: global variables, and attributes of any object; and which of these it sets.

    ``sets_own`` are attributes of its first argument, which is a method's object, ``sets_attributes`` those of others,
    ``sets_cells`` variables of the functions around it. ``changes`` are the names of what it may change in place: by
    setting entries or attributes, by ``+=`` and its kin, or by a method of containers or one of tensors whose name ends
    in an underscore; also where a local variable stands for it. ``changes_inside`` are the names of containers whose
    entries it may so change. It may still change what it hands to another function, or computes from it.
    """

    variables: frozenset[str]
    attributes: frozenset[str]
    sets_variables: frozenset[str]
    sets_own: frozenset[str]
    sets_attributes: frozenset[str]
    sets_cells: frozenset[str]
    changes: frozenset[str]
    changes_inside: frozenset[str]


class _Named(NamedTuple):
    """Names by which a value was reached: of itself, or of what it may be the same as; and of containers of it."""

    itself: frozenset[str] = frozenset()
    around: frozenset[str] = frozenset()

    def __or__(self, other: Any) -> _Named:
        return _Named(self.itself | other.itself, self.around | other.around)

    @property
    def entry(self) -> _Named:
        """The names of an entry of the value."""
        return _Named(frozenset(), self.itself | self.around)


class _Instruction(NamedTuple):
    """An instruction, as it is called in all versions of Python.

    ``depth`` is the number of values on the stack before it, up to a constant; ``target`` the offset that it may jump
    to, or -1.
    """

    operation: str
    name: Any
    depth: int
    offset: int
    target: int


def names_in(code: CodeType) -> Names:
    """The names in a function's code, and in that of the functions and comprehensions inside it."""
    return _names_in(code, code.co_varnames[0] if code.co_argcount else None)


@functools.lru_cache(maxsize=4096)
def _names_in(code: CodeType, own: str | None) -> Names:
    """``own`` is the name of the method's object."""
    names: dict[str, set[str]] = {name: set() for name in Names._fields}
    body = _Code(code)

    def changes(found: _Named) -> None:
        names["changes"] |= found.itself
        names["changes_inside"] |= found.around

    for position, one in enumerate(body.instructions):
        for name in _NAMED_BY.get(one.operation, ()):
            names[name].add(one.name)
        if one.operation == "STORE_FAST":
            body.set_local(position)
        changed = body.changed(position)
        changes(body.named(changed))
        if one.operation == "STORE_ATTR":
            is_own = [(load.operation, load.name) for load in changed] in ([("LOAD_FAST", own)], [("LOAD_DEREF", own)])
            names["sets_own" if is_own else "sets_attributes"].add(one.name)
    for inner in (one for one in code.co_consts if isinstance(one, CodeType)):
        found = _names_in(inner, own if own in inner.co_freevars else None)
        for name in names:
            names[name] |= getattr(found, name)
        for name in found.changes.intersection(code.co_cellvars):
            changes(body.stands_for[name])
        for name in found.changes_inside.intersection(code.co_cellvars):
            changes(body.stands_for[name].entry)
    names["sets_cells"] &= set(code.co_freevars)  # the others are its own
    for kind in ("changes", "changes_inside"):
        names[kind] -= set(code.co_cellvars) - names["attributes"]
    names["changes"] |= names["sets_variables"] | names["sets_own"] | names["sets_attributes"] | names["sets_cells"]
    return Names(**{name: frozenset(found) for name, found in names.items()})


def _changes(method: str) -> bool:
    return method in _OF_CONTAINERS or method[-1:] == "_" != method[-2:-1]


def _instructions(code: CodeType) -> Iterator[_Instruction]:
    """The instructions; those of several local variables one by one, and all loads of one by the same name."""
    depth, reached = 0, dict[int, int]()
    for one in dis.get_instructions(code):
        depth = reached.get(one.offset, depth)
        target = one.argval if one.opcode in _JUMPS else -1
        local = "FAST|DEREF" if one.argval in code.co_cellvars else "FAST"
        if fast := re.findall(f"(LOAD|STORE)_(?:{local})", one.opname):
            for kind, name in zip(fast, one.argval if len(fast) > 1 else [one.argval], strict=True):
                yield _Instruction(f"{kind}_FAST", name, depth, one.offset, -1)
                depth += 1 if kind == "LOAD" else -1
            continue
        name = one.argrepr if one.opname == "BINARY_OP" else one.argval
        yield _Instruction(one.opname, name, depth, one.offset, target)
        if target > one.offset:
            reached[target] = depth + dis.stack_effect(one.opcode, one.arg, jump=True)
        if not one.opname.startswith(_GOES_NOT_ON):
            depth += dis.stack_effect(one.opcode, one.arg, jump=False)


class _Code:
    """The instructions of a function, and those of them that computed an operand of another.

    Attributes:
        instructions: the instructions.
        stands_for: what local variables may stand for, as far as :meth:`set_local` was told.
    """

    def __init__(self, code: CodeType) -> None:
        self.instructions = list(_instructions(code))
        self.stands_for: defaultdict[str, _Named] = defaultdict(_Named)
        self._jumps = [number for number, one in enumerate(self.instructions) if one.target > one.offset]

    def named(self, values: list[_Instruction]) -> _Named:
        """The names by which these instructions reach a value."""
        found = _Named()
        for one in values:
            if one.operation == "LOAD_FAST":
                found |= self.stands_for[one.name]
            elif one.operation in _LOADS:
                found |= _Named(frozenset([one.name]))
            elif one.operation == "BINARY_SUBSCR" or one[:2] == ("BINARY_OP", "[]"):
                found = found.entry
        return found

    def set_local(self, position: int) -> None:
        """Note what the local variable may stand for that is set at a position."""
        values, are_around = self.source(position)
        found = self.named(values)
        self.stands_for[self.instructions[position].name] |= found.entry if are_around else found

    def changed(self, position: int) -> list[_Instruction]:
        """What reached the value that the instruction at a position changes in place; nothing if it changes none."""
        one, before = self.instructions[position], self.instructions[position - 1]
        augmented = int(before.operation == "SWAP")  # its value was computed last
        if one.operation in ("STORE_ATTR", "STORE_SUBSCR", "STORE_SLICE"):
            return self.operand(position, _ABOVE[one.operation] + augmented)
        if one.operation == "DELETE_SUBSCR" or (one.operation == "BINARY_OP" and str(one.name).endswith("=")):
            return self.operand(position, 1)
        if one.operation in ("LOAD_ATTR", "LOAD_METHOD") and _changes(one.name):
            return self.operand(position, 0)
        return []

    def operand(self, position: int, above: int) -> list[_Instruction]:
        """What computed an operand of the instruction at a position: the one with so many others ``above`` it."""
        slot = self.instructions[position].depth - 1 - above
        stop = self._start(position, slot + 1) if above else position
        return self.instructions[self._start(stop, slot) : stop]

    def source(self, position: int) -> tuple[list[_Instruction], bool]:
        """What reached the value that a local variable is set to there, and whether the value is an entry of that.

        Nothing if the value was computed.
        """
        while self.instructions[position - 1].operation in ("COPY", "STORE_FAST"):  # it is given several names
            position -= 1
        last = self.instructions[position - 1]
        if last.operation == "UNPACK_SEQUENCE":
            return self.source(position - 1)[0], True
        if last.operation == "FOR_ITER":
            before = (one for one in reversed(range(position)) if self.instructions[one].operation == "GET_ITER")
            return [one for iterated in islice(before, 1) for one in self.operand(iterated, 0)], True
        value = self.operand(position, 0)
        if last.operation in _REACHES or last[:2] == ("BINARY_OP", "[]"):
            return value, False
        if [one.operation for one in value].count("CALL") == 1 and any(one.name in _OF_ENTRIES for one in value):
            return value, True
        return [], False

    def _start(self, stop: int, slot: int) -> int:
        """Where the computation of what lies in a slot of the stack begins, of all branches that lead to it."""
        start, last = stop, self.instructions[stop].offset
        while True:
            start = next((one for one in reversed(range(start)) if self.instructions[one].depth <= slot), 0)
            first, earlier = self.instructions[start].offset, self._jumps[: bisect_left(self._jumps, start)]
            branches = (one for one in earlier if first < self.instructions[one].target <= last)
            if (branch := next(branches, None)) is None:
                return start
            start = branch
