"""What a function's code names, sets and changes: as its syntax tree has it, in all versions of Python."""

from __future__ import annotations

import argparse
import ast
import inspect
import logging
import subprocess
import symtable
import tarfile
from collections import OrderedDict, deque
from collections.abc import Iterator
from types import CodeType, MappingProxyType, ModuleType

import numpy as np
import pytest
import torch

from dynamics.probing import passing
from dynamics.probing.bytecode import _changes, names_in
from dynamics.record import store

STATE = {"rows": [0], "step": 0}
MEAN = torch.zeros(2)


class Holder:
    """Whose code the tests read."""

    def __init__(self) -> None:
        self.memory, self.keys, self.fallback, self.step = [torch.zeros(2)], [0], [torch.zeros(2)], 0


def alias(holder: Holder) -> None:
    memory = holder.memory
    memory.append(1)


def entry_alias(holder: Holder) -> None:
    memory = holder.memory[0]
    memory.add_(1)


def alias_in_place(holder: Holder) -> None:
    memory = holder.memory[0]
    memory += 1


def loop(holder: Holder) -> None:
    for row in holder.memory:
        row.mul_(2)


def two_names(holder: Holder) -> None:
    memory = rows = holder.memory
    rows.append(1)
    holder.step = len(memory)


def in_an_expression(holder: Holder) -> None:
    if memory := holder.memory:
        memory.append(1)


def unpacked(holder: Holder) -> None:
    first, second = holder.memory
    second.add_(first)


def numbered(holder: Holder) -> None:
    for number, row in enumerate(holder.memory):
        row.mul_(number)


def by_key(holder: Holder) -> None:
    rows = STATE.get("rows", [])
    rows.append(1)
    STATE.setdefault(holder.step, []).append(2)


def inside(holder: Holder) -> None:
    rows = holder.memory
    _ = [rows.append(row) for row in range(2)]


def far_key(holder: Holder) -> None:
    holder.memory[sum(int(one) + 1 for one in (1, 2, 3)) % 2 * 3] = torch.ones(2)


def branches(holder: Holder, which: bool) -> None:
    (holder.memory if which else holder.fallback).append(torch.ones(2))


def either(holder: Holder) -> None:
    (holder.memory or holder.fallback).append(torch.ones(2))


def key_of_branches(holder: Holder, which: bool) -> None:
    holder.memory[0 if which else 1] += 1


def deleted(holder: Holder) -> None:
    del holder.memory[0]


def sliced(holder: Holder) -> None:
    holder.memory[0:1] = []


def sliced_in_place(holder: Holder, stop: int) -> None:
    holder.memory[0:stop] += [1]


def of_a_global() -> None:
    STATE["rows"].extend([1])


def data_of_a_global() -> None:
    MEAN.data += 1


def computed(holder: Holder) -> None:
    row = holder.memory[0] * 2
    row.add_(1)
    row += holder.keys[0]
    new = list(holder.memory)
    new.append(row)


def read(holder: Holder) -> int:
    return holder.memory[holder.keys[0]] + STATE["step"]


CHANGED = {
    alias: "memory",
    two_names: "memory",
    in_an_expression: "memory",
    alias_in_place: "(memory)",
    entry_alias: "(memory)",
    unpacked: "(memory)",
    loop: "(memory)",
    numbered: "(memory) (enumerate)",
    by_key: "STATE setdefault step (STATE) (get)",
    inside: "memory",
    far_key: "memory",
    branches: "memory fallback",
    either: "memory fallback",
    key_of_branches: "memory",
    deleted: "memory",
    sliced: "memory",
    sliced_in_place: "memory",
    of_a_global: "(STATE)",
    data_of_a_global: "MEAN",
    computed: "",
    read: "",
}


@pytest.mark.parametrize("function", CHANGED, ids=lambda function: function.__name__)
def test_what_is_changed_is_named_and_nothing_else(function: object) -> None:
    """In brackets: that of which only entries are."""
    names = names_in(function.__code__)
    attributes = names.sets_attributes | names.sets_own
    found = [*(names.changes - attributes), *(f"({name})" for name in names.changes_inside)]
    assert sorted(found) == sorted(CHANGED[function].split())


class Owner:
    def set_own(self, other: Owner) -> None:
        self.value, other.another = 1, 2
        self.count += 1 and 2
        other.count_of_other += 1

    def set_inside(self) -> None:
        def inner(self_of_inner: Owner) -> None:
            self.value = self_of_inner.another = 1

        inner(self)


@pytest.mark.parametrize(
    ("method", "own", "others"),
    [(Owner.set_own, {"value", "count"}, {"another", "count_of_other"}), (Owner.set_inside, {"value"}, {"another"})],
)
def test_attributes_of_the_methods_object_are_told_from_others(method: object, own: set, others: set) -> None:
    names = names_in(method.__code__)
    assert names.sets_own == own
    assert names.sets_attributes == others


def test_variables_of_the_functions_around_are_told_from_its_own() -> None:
    count = 0

    def inner() -> list:
        nonlocal count
        own = []
        count += 1
        return [own.append(row) for row in range(count)]

    assert names_in(inner.__code__).sets_cells == {"count"}
    inner()


@pytest.mark.parametrize("kind", [list, deque, dict, OrderedDict, set, np.ndarray])
def test_methods_that_change_a_container_are_known(kind: type) -> None:
    frozen = {list: tuple, deque: tuple, dict: MappingProxyType, OrderedDict: MappingProxyType, set: frozenset}
    own = {name for name in vars(kind).keys() - vars(frozen.get(kind, object)).keys() if not name.startswith("_")}
    if kind is np.ndarray:
        own &= {"fill", "itemset", "partition", "put", "sort"}  # most of its methods return another one
    assert not {name for name in own - {"copy", "fromkeys", "maxlen"} if not _changes(name)}


MODULES = [argparse, inspect, logging, subprocess, tarfile, torch.nn.modules.module, passing, store]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_it_is_what_the_syntax_tree_has(module: ModuleType) -> None:
    source = inspect.getsource(module)
    tree, table = ast.parse(source), symtable.symtable(source, "it", "exec")
    codes = dict(_codes(compile(source, "it", "exec", dont_inherit=True)))
    variables = dict(_variables(table))
    functions = [one for one in ast.walk(tree) if isinstance(one, ast.FunctionDef)]
    compared = 0
    for function in functions:
        place = min([function.lineno, *(one.lineno for one in function.decorator_list)]), function.name
        names = names_in(codes[place])
        parts = [one for statement in function.body for one in ast.walk(statement)]
        sets = [one for one in parts if isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store)]
        assert names.sets_own | names.sets_attributes == {one.attr for one in sets}
        first = [one.arg for one in (*function.args.posonlyargs, *function.args.args)][:1]
        if not any(isinstance(one, ast.FunctionDef | ast.Lambda | ast.ClassDef) for one in parts):
            own = {one.attr for one in sets if isinstance(one.value, ast.Name) and [one.value.id] == first}
            assert names.sets_own == own
        known = variables[function.lineno, function.name]
        changed = [one for one in map(_changed, parts) if one is not None]
        expected = set().union(*(_names(one, known) for one in changed if not _branches(one)))
        compared += len(expected)
        found = names.changes | names.changes_inside
        assert found >= expected
        owners = [one.value for one in sets]
        several = [one for one in (*changed, *owners, *map(_stands_for, parts)) if one is not None]
        every = set().union(*(_names(one, None) for one in several))
        assert found <= every | {one.attr for one in sets} | known | set(codes[place].co_freevars)
    assert compared


def _codes(code: CodeType) -> Iterator[tuple[tuple[int, str], CodeType]]:
    for one in code.co_consts:
        if isinstance(one, CodeType):
            yield (one.co_firstlineno, one.co_name), one
            yield from _codes(one)


def _variables(table: symtable.SymbolTable) -> Iterator[tuple[tuple[int, str], set[str]]]:
    """Of each function by its line and name: the global variables that it names."""
    for one in table.get_children():
        yield (one.get_lineno(), one.get_name()), {name.get_name() for name in one.get_symbols() if name.is_global()}
        yield from _variables(one)


def _changed(node: ast.AST) -> ast.expr | None:
    """The expression whose value a part of a statement changes in place."""
    if isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        return node.value
    if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load) and _changes(node.attr):
        return node.value
    return node.target if isinstance(node, ast.AugAssign) and isinstance(node.target, ast.Name) else None


def _stands_for(node: ast.AST) -> ast.expr | None:
    """What a local variable is set to."""
    return getattr(node, "iter", None) or (node.value if isinstance(node, ast.Assign | ast.AnnAssign) else None)


def _branches(node: ast.expr) -> bool:
    return any(isinstance(one, ast.IfExp | ast.BoolOp | ast.Compare | ast.NamedExpr) for one in ast.walk(node))


def _names(node: ast.expr, variables: set[str] | None) -> set[str]:
    parts = list(ast.walk(node))
    named = {one.id for one in parts if isinstance(one, ast.Name) and (variables is None or one.id in variables)}
    return named | {one.attr for one in parts if isinstance(one, ast.Attribute)}
