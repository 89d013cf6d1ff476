# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pickles read as descriptions of data: nothing in them is called.

A pickle is a program for a stack machine that may call what it names. Here
it is run on a machine without callables: a name stays a :class:`Name`, a call
becomes a :class:`Call` that says what was to be called on what, and whoever
reads it makes values of those calls that it knows. So no constructor and no
``__setstate__`` ever sees what a file made up.

What ``torch.save`` writes is protocol 2; other opcodes are refused.
https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO, Dict, List, NamedTuple, Tuple


class DamagedPickle(ValueError):
    """The bytes are no pickle of protocol 2, or one of too many values."""


class Name(NamedTuple):
    """What a pickle would import.

    Attributes:
        text: Module and name, as in ``collections.OrderedDict``.
    """

    text: str


class Call:
    """What a pickle would call.

    Attributes:
        name: What is called.
        arguments: On what.
        state: What would be given to ``__setstate__``; None if nothing.
        items: What would be set by ``[key] = value``.
    """

    __slots__ = ('arguments', 'items', 'name', 'state')

    def __init__(self, name: str, arguments: tuple) -> None:
        self.name = name
        self.arguments = arguments
        self.state: Any = None
        self.items: List[Tuple[Any, Any]] = []


class Items(list):
    """The items of a dict, (key, value), in the order of the file."""


class Outside(NamedTuple):
    """What stands outside of the pickle.

    Attributes:
        key: How the pickle refers to it.
    """

    key: Any


class Pickled(NamedTuple):
    """What :func:`read_pickle` read.

    Attributes:
        value: Numbers, text, None, lists, tuples, and :class:`Items`,
            :class:`Name`, :class:`Call` and :class:`Outside`.
        outside: What of it stands outside, in the order of the file.
    """

    value: Any
    outside: List[Outside]


#: Opcode -> the value that it pushes, made anew each time.
_CONSTANTS = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple,
    'EMPTY_LIST': list,
    'EMPTY_DICT': Items,
}
#: Those that push their argument.
_LITERALS = frozenset(
    ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE')
    + ('SHORT_BINSTRING', 'BINSTRING')
)
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def read_pickle(file: BinaryIO, limit: int) -> Pickled:
    """Read one pickle from a file, which then stands behind it.

    Args:
        file: Open for reading bytes.
        limit: How many steps the pickle may take.

    Raises:
        DamagedPickle: If it is none, or longer than the limit.
    """
    machine = _Machine()
    steps = 0
    try:
        for opcode, argument, _ in pickletools.genops(file):
            steps += 1
            if steps > limit:
                raise DamagedPickle(f'a pickle of more than {limit} steps')
            if opcode.name == 'STOP':
                return machine.result()
            machine.step(opcode.name, argument)
    except DamagedPickle:
        raise
    except (ValueError, IndexError, KeyError) as error:
        # Of pickletools, of a stack that is empty, of a memo that is not set.
        raise DamagedPickle(f'no whole pickle: {error}') from error
    raise DamagedPickle('no whole pickle')  # genops ends by STOP


class _Machine:
    def __init__(self) -> None:
        self.stack: List[Any] = []
        self.marks: List[int] = []
        self.memo: Dict[int, Any] = {}
        self.outside: List[Outside] = []

    def result(self) -> Pickled:
        if len(self.stack) != 1:
            raise DamagedPickle('a pickle that leaves values behind')
        return Pickled(self.stack.pop(), self.outside)

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _LITERALS:
            stack.append(argument)
        elif name in ('BINPUT', 'LONG_BINPUT'):
            self.memo[argument] = stack[-1]
        elif name in ('BINGET', 'LONG_BINGET'):
            stack.append(self.memo[argument])
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in _TUPLES:
            stack.append(tuple(self._pop(_TUPLES[name])))
        elif name == 'MARK':
            self.marks.append(len(stack))
        elif name == 'TUPLE':
            stack.append(tuple(self._pop_marked()))
        elif name == 'GLOBAL':
            stack.append(Name(argument.replace(' ', '.', 1)))
        elif name == 'BINPERSID':
            stack.append(Outside(*self._pop(1)))
            self.outside.append(stack[-1])
        elif name in ('REDUCE', 'NEWOBJ'):
            callee, arguments = self._pop(2)
            if type(callee) is not Name or type(arguments) is not tuple:
                raise DamagedPickle('a call of what is no name')
            stack.append(Call(callee.text, arguments))
        elif name == 'BUILD':
            (state,) = self._pop(1)
            if type(stack[-1]) is not Call:
                raise DamagedPickle('a state for what has none')
            stack[-1].state = state
        elif name in ('SETITEM', 'SETITEMS'):
            pairs = self._pop(2) if name == 'SETITEM' else self._pop_marked()
            if len(pairs) % 2:
                raise DamagedPickle('a key without a value')
            self._items().extend(zip(pairs[::2], pairs[1::2]))
        elif name in ('APPEND', 'APPENDS'):
            values = self._pop(1) if name == 'APPEND' else self._pop_marked()
            if type(stack[-1]) is not list:
                raise DamagedPickle('values for what is no list')
            stack[-1].extend(values)
        elif name != 'PROTO':
            raise DamagedPickle(f'opcode {name}')

    def _items(self) -> list:
        target = self.stack[-1]
        if type(target) is Call:
            return target.items
        if type(target) is Items:
            return target
        raise DamagedPickle('items for what is no dict')

    def _pop(self, count: int) -> list:
        # Values below the last mark belong to what it will end.
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < count:
            raise DamagedPickle('a stack that is empty')
        values = self.stack[-count:]
        del self.stack[-count:]
        return values

    def _pop_marked(self) -> list:
        mark = self.marks.pop()
        values = self.stack[mark:]
        del self.stack[mark:]
        return values
