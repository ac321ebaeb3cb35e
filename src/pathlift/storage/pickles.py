"""Pickles as data: nothing that a pickle names is looked up, imported or called.

A pickle is a program for a small machine with a stack. Here that machine works on plain values alone: a class or function is a
`Global`, that is a name, and what would be made by one is a `Call`, that is a record of what the pickle says about it.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import IO, Any

from pathlift.errors import InputError

MOST_STEPS = 1 << 21
"""A pickle is a program of at most so many steps; that of a large checkpoint has some hundred thousand."""

LONGEST = 1024
"""Characters of the name of a module, class or function."""

DICTIONARIES = frozenset({"collections.OrderedDict", "collections.defaultdict", "collections.Counter"})
"""Classes whose objects are read as dictionaries."""

CONSTANTS: dict[str, object] = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

WRITTEN = frozenset({
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
    "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE",
    "BINUNICODE8",
})  # fmt: skip
"""Steps that push the value which is written behind them."""


@dataclass(frozen=True, slots=True)
class Global:
    """A class or function.

    Attributes:
        name: Its module and name, with a dot between them.
    """

    name: str


@dataclass(eq=False, slots=True)
class Call:
    """What a class or function would make.

    Attributes:
        function: A `Global`, or whatever the pickle would call.
        arguments: What it would be called with.
        state: What would become of its attributes.
        entries: What would be put into it by key.
        items: What would be appended to it.
    """

    function: object
    arguments: tuple[Any, ...]
    state: object = None
    entries: dict[object, object] = field(default_factory=dict)
    items: list[object] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of what would be called; empty if it has none."""
        return self.function.name if isinstance(self.function, Global) else ""


def read_pickle(stream: IO[bytes], persistent: Callable[[Any], object]) -> Any:
    """Read one pickle as data.

    Args:
        stream: Where it begins; read up to its end.
        persistent: What stands for a reference to something outside of the pickle.

    Returns:
        Numbers, texts, bytes, lists, tuples, dictionaries, `Global` and `Call`. A key that is neither a number, text or bytes
        is replaced by an object of no meaning.

    Raises:
        InputError: It is no pickle, or one of more than `MOST_STEPS` steps.
    """
    try:
        return _Machine(persistent).run(stream)
    except InputError:
        raise
    except (IndexError, KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise InputError(f"it is damaged: it holds no pickle ({str(error)[:100]}).") from error


class _Machine:
    def __init__(self, persistent: Callable[[Any], object]) -> None:
        self.persistent = persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.steps = 0

    def run(self, stream: IO[bytes]) -> Any:
        for opcode, argument, _ in pickletools.genops(stream):
            self.count(1)
            if opcode.name in WRITTEN:
                self.stack.append(argument)
            elif opcode.name in CONSTANTS:
                self.stack.append(CONSTANTS[opcode.name])
            elif opcode.name == "STOP":
                return self.stack.pop()
            elif opcode.name not in {"PROTO", "FRAME"}:
                self.step(opcode.name, argument)
        raise ValueError("it has no end")

    def count(self, steps: int) -> None:
        self.steps += steps
        if self.steps > MOST_STEPS:
            raise InputError(f"it holds a pickle of more than {MOST_STEPS:,} steps, which no file of weights does.")

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        match name:
            case "EMPTY_LIST" | "EMPTY_DICT" | "EMPTY_SET":
                stack.append({} if name == "EMPTY_DICT" else [])
            case "MARK":
                self.below.append(stack)
                self.stack = []
            case "POP" | "POP_MARK":
                if name == "POP_MARK" or not stack:
                    self.since_mark()
                else:
                    stack.pop()
            case "DUP":
                stack.append(stack[-1])
            case "PUT" | "BINPUT" | "LONG_BINPUT":
                self.memo[argument] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case "GET" | "BINGET" | "LONG_BINGET":
                stack.append(self.memo[argument])
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                stack.append(tuple(self.taken(int(name[-1]))))
            case "TUPLE" | "LIST" | "FROZENSET" | "DICT":
                self.collect(name, self.since_mark())
            case "APPEND":
                self.append(self.taken(1))
            case "APPENDS" | "ADDITEMS":
                self.append(self.since_mark())
            case "SETITEM":
                self.set_items(self.taken(2))
            case "SETITEMS":
                self.set_items(self.since_mark())
            case "PERSID":
                stack.append(self.persistent(argument))
            case "BINPERSID":
                stack.append(self.persistent(stack.pop()))
            case _:
                self.make(name, argument)

    def make(self, name: str, argument: Any) -> None:
        """Record what the pickle says about classes and functions."""
        match name:
            case "GLOBAL":
                self.stack.append(Global(argument.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                module, qualified = self.taken(2)
                if not all(isinstance(part, str) and len(part) <= LONGEST for part in (module, qualified)):
                    raise ValueError("a name that is none")
                self.stack.append(Global(f"{module}.{qualified}"))
            case "REDUCE" | "NEWOBJ":
                function, arguments = self.taken(2)
                self.call(function, arguments)
            case "NEWOBJ_EX":
                function, *arguments = self.taken(3)
                self.call(function, tuple(arguments))
            case "OBJ":
                function, *arguments = self.since_mark()
                self.call(function, tuple(arguments))
            case "INST":
                self.call(Global(argument.replace(" ", ".", 1)), tuple(self.since_mark()))
            case "BUILD":
                (state,) = self.taken(1)
                if isinstance(self.stack[-1], Call):
                    self.stack[-1].state = state
            case _:
                raise InputError(f"it holds a pickle with the step {name}, which torch.save never writes.")

    def taken(self, count: int) -> list[Any]:
        """Take so many values from the stack."""
        if len(self.stack) < count:
            raise ValueError("its stack is too short")
        taken = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return taken

    def since_mark(self) -> list[Any]:
        """Take the values that were pushed since the last mark."""
        values, self.stack = self.stack, self.below.pop()
        return values

    def collect(self, name: str, values: list[Any]) -> None:
        if name == "DICT":
            self.stack.append({})
            self.set_items(values)
        else:
            self.stack.append(tuple(values) if name == "TUPLE" else values)

    def append(self, values: list[Any]) -> None:
        target = self.stack[-1]
        (target.items if isinstance(target, Call) else target).extend(values)

    def set_items(self, values: list[Any]) -> None:
        target = self.stack[-1]
        entries = target.entries if isinstance(target, Call) else target
        if not isinstance(entries, dict) or len(values) % 2:
            raise ValueError("entries without a dictionary")
        entries.update((_key(key), value) for key, value in zip(values[::2], values[1::2], strict=True))

    def call(self, function: object, arguments: Any) -> None:
        if not isinstance(arguments, tuple):
            raise TypeError("a call without arguments")
        if isinstance(function, Global) and function.name in DICTIONARIES:
            self.stack.append({})
            pairs = arguments[0] if arguments and isinstance(arguments[0], list) else []
            self.count(len(pairs))
            self.set_items([part for key, value in pairs for part in (key, value)])
        else:
            self.stack.append(Call(function, arguments))


def _key(key: object) -> object:
    """Return a key that takes no time to be looked up: tuples within tuples can take any."""
    return key if isinstance(key, (str, int, float, bytes, Global, type(None))) else object()
