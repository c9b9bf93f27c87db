"""Owns reading, without running it, the order in which a module's forward uses its children; no deepspeed.

Registration order does not tell what comes before the blocks and what after (OPT registers its final norm first), and
running a forward needs inputs, real weights and gathered partitions. The source of `forward` tells it for models on
the meta device and under ZeRO-3 as well.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from types import FunctionType

from torch import nn


def uses_after(module: nn.Module, child: str) -> dict[str, bool]:
    """Tell of every attribute that `module.forward` uses whether it comes after `child`.

    Args:
        module: a module with a Python forward.
        child: name of a direct child that forward runs, or of a module list that it runs through.

    Returns:
        For each child or parameter that forward uses, `True` when its first use comes after `child` has run. What is
        used before, or while a loop runs through `child`, is `False`. Empty when the source cannot be read or does
        not use `child`.
    """
    reader = _Reader(module)
    reader.read(type(module), "forward")
    end = reader.end_of(child)
    if end is None:
        return {}
    return {name: reader.first_use(name) >= end for name in {event.name for event in reader.events} - {child}}


def loops_over(module: nn.Module, child: str) -> bool:
    """Whether `module.forward` has a loop that takes one block of the module list `child` after the other."""
    reader = _Reader(module)
    reader.read(type(module), "forward")
    return child in reader.loops_over


@dataclass(frozen=True, slots=True)
class _Event:
    """One use of `self.<name>`, in evaluation order; `loops` are the for-loops around it, outermost first."""

    name: str
    is_call: bool
    loops: tuple[int, ...]


@lru_cache(maxsize=1024)
def _parse(function: FunctionType) -> ast.FunctionDef | None:
    """Return the syntax tree of a function; `None` when it has no readable Python source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError, SyntaxError):
        return None
    return next((node for node in tree.body if isinstance(node, ast.FunctionDef)), None)


class _Reader(ast.NodeVisitor):
    """Walks a method of one module and the methods it calls on itself, and records which attributes it uses."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.own = set(module._modules) | set(module._parameters)
        self.events: list[_Event] = []
        self.loop_ends: list[int] = []
        self.loops_over: dict[str, int] = {}
        self._open_loops: tuple[int, ...] = ()
        self._self = "self"
        self._owner: type = type(module)
        self._aliases: dict[str, str] = {}
        self._reading: list[FunctionType] = []

    def first_use(self, name: str) -> int:
        """Return the position of the first call of `name`, or of its first mention when it is never called."""
        uses = [i for i, event in enumerate(self.events) if event.name == name]
        return next((i for i in uses if self.events[i].is_call), uses[0])

    def end_of(self, child: str) -> int | None:
        """Return the position after which `child` has run: the end of the outermost loop around it, if any."""
        if child in self.loops_over:
            return self.loop_ends[self.loops_over[child]]
        if not any(event.name == child for event in self.events):
            return None
        position = self.first_use(child)
        loops = self.events[position].loops
        return self.loop_ends[loops[0]] if loops else position

    def read(self, owner: type, method: str) -> None:
        """Record what `method`, looked up from class `owner` on, does; unreadable and torch's own code is skipped."""
        for base in owner.__mro__[owner.__mro__.index(owner) :]:
            if method in vars(base):
                function = _function_of(vars(base)[method])
                break
        else:
            return
        if function is None or function in self._reading or base is nn.Module:
            return
        tree = _parse(function)
        if tree is None or not tree.args.args:
            return
        saved = self._self, self._owner, self._aliases
        self._self, self._owner, self._aliases = tree.args.args[0].arg, base, {}
        self._reading.append(function)
        for statement in tree.body:
            self.visit(statement)
        self._reading.pop()
        self._self, self._owner, self._aliases = saved

    def visit_Call(self, node: ast.Call) -> None:
        """Arguments are evaluated before the call, so their uses come first."""
        for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
            self.visit(argument)
        called = self._attribute(node.func)
        if called in self.own:
            self._record(called, is_call=True)
        elif isinstance(node.func, ast.Attribute) and _is_super(node.func.value):
            mro = type(self.module).__mro__
            following = mro[mro.index(self._owner) + 1 :]
            base = next((base for base in following if node.func.attr in vars(base)), None)
            if base is not None:
                self.read(base, node.func.attr)
        elif isinstance(node.func, ast.Attribute) and self._is_self(node.func.value):
            self.read(type(self.module), node.func.attr)
        elif self._is_self(node.func):
            self.read(type(self.module), "forward")
        else:
            name = self._getattr_name(node)
            if name in self.own:
                self._record(name, is_call=False)
            elif not isinstance(node.func, ast.Name):
                self.visit(node.func)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Record `self.x`; a property is read like a method."""
        name = self._attribute(node)
        if name in self.own:
            self._record(name, is_call=False)
        elif self._is_self(node.value):
            if isinstance(inspect.getattr_static(type(self.module), node.attr, None), property):
                self.read(type(self.module), node.attr)
        else:
            self.visit(node.value)

    def visit_Name(self, node: ast.Name) -> None:
        """Record the use of a local name that stands for `self.x`."""
        if node.id in self._aliases and isinstance(node.ctx, ast.Load):
            self._record(self._aliases[node.id], is_call=False)

    def visit_Assign(self, node: ast.Assign) -> None:
        """Follow `layers = self.layers`, which is no use yet."""
        name = self._attribute(node.value)
        if name not in self.own:
            self.visit(node.value)
        for target in node.targets:
            if not isinstance(target, ast.Name):
                self.visit(target)
            elif name in self.own:
                self._aliases[target.id] = name
            else:
                self._aliases.pop(target.id, None)

    def visit_For(self, node: ast.For) -> None:
        """Record a loop; everything in its body belongs to what it runs through."""
        first = len(self.events)
        self.visit(node.iter)
        loop = len(self.loop_ends)
        self.loop_ends.append(first)
        outermost = self._open_loops[0] if self._open_loops else loop
        for event in self.events[first:]:
            self.loops_over.setdefault(event.name, outermost)
        self._open_loops = (*self._open_loops, loop)
        for statement in (*node.body, *node.orelse):
            self.visit(statement)
        self._open_loops = self._open_loops[:-1]
        self.loop_ends[loop] = len(self.events)

    def _record(self, name: str, *, is_call: bool) -> None:
        self.events.append(_Event(name, is_call, self._open_loops))

    def _is_self(self, node: ast.expr) -> bool:
        return isinstance(node, ast.Name) and node.id == self._self

    def _attribute(self, node: ast.expr) -> str | None:
        """Return x of `self.x`, `self.x.y`, `self.x[i]`, `getattr(self, ...)` or a local name for one of these."""
        while isinstance(node, (ast.Attribute, ast.Subscript)):
            if isinstance(node, ast.Attribute) and self._is_self(node.value):
                return node.attr
            node = node.value
        if isinstance(node, ast.Name):
            return self._aliases.get(node.id)
        return self._getattr_name(node)

    def _getattr_name(self, node: ast.expr) -> str | None:
        """Return the name that `getattr(self, "x")` or `getattr(self, self.some_text)` asks for."""
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr"):
            return None
        if len(node.args) < 2 or not self._is_self(node.args[0]):
            return None
        wanted = node.args[1]
        if isinstance(wanted, ast.Constant):
            return str(wanted.value)
        if isinstance(wanted, ast.Attribute) and self._is_self(wanted.value):
            value = getattr(self.module, wanted.attr, None)
            return value if isinstance(value, str) else None
        return None


def _is_super(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "super"


def _function_of(attribute: object) -> FunctionType | None:
    """Return the plain function under decorators, properties and static wrappers."""
    if isinstance(attribute, property):
        attribute = attribute.fget
    if isinstance(attribute, (classmethod, staticmethod)):
        return None
    if not callable(attribute):
        return None
    function: Callable[..., object] = inspect.unwrap(attribute)
    return function if isinstance(function, FunctionType) else None
