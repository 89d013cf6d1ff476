# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Read pickles as descriptions of data, without calling anything.

A pickle is a program for a stack machine, which may import and call functions.
This machine does neither. A name stays a :class:`Name`, and a call becomes a
:class:`Call`, which notes function and arguments. :mod:`mmdbb.files.values`
then makes values for the calls that it knows. So no constructor and no
``__setstate__`` ever gets arguments that a file made up.

``torch.save`` writes protocol 2; other opcodes are refused.
https://docs.python.org/3/library/pickletools.html
"""

from __future__ import annotations

import pickletools
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Tuple


class DamagedPickle(ValueError):
    """The bytes are no pickle of protocol 2, or the pickle is too long."""


class Name(NamedTuple):
    """A function or class that a pickle asks to import.

    Attributes:
        text: Module and name, such as ``collections.OrderedDict``.
    """

    text: str


class Call:
    """A call that a pickle asks for.

    Attributes:
        name: Full name of the function or class.
        arguments: Arguments of the call.
        state: Argument for ``__setstate__`` of the result; None if there is
            none.
        items: Keys and values to set in the result.
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
    """A reference to data outside of the pickle, such as a tensor's numbers.

    Attributes:
        key: The pickle's description of the data (``persistent_id``).
    """

    key: Any


class Pickled(NamedTuple):
    """The result of :func:`read_pickle`.

    Attributes:
        value: The description: numbers, text, None, lists, tuples, and
            :class:`Items`, :class:`Name`, :class:`Call`, :class:`Outside`.
        outside: All references to data outside, in the order of the file.
    """

    value: Any
    outside: List[Outside]


#: Opcode -> function that makes the value to push.
_CONSTANTS: Dict[str, Callable[[], Any]] = {
    'NONE': lambda: None,
    'NEWTRUE': lambda: True,
    'NEWFALSE': lambda: False,
    'EMPTY_TUPLE': tuple,
    'EMPTY_LIST': list,
    'EMPTY_DICT': Items,
}
#: Opcodes that push their argument.
_LITERALS = frozenset(
    ('BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT', 'BINUNICODE')
    + ('SHORT_BINSTRING', 'BINSTRING')
)
_TUPLES = {'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}


def read_pickle(file: BinaryIO, limit: int) -> Pickled:
    """Read one pickle from a file, and leave the file just behind it.

    Args:
        file: A file that is open for reading bytes.
        limit: Largest number of opcodes.

    Raises:
        DamagedPickle: If there is no whole pickle, or it exceeds the limit.
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
        # Raised by pickletools, by an empty stack, or by an unset memo.
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
                raise DamagedPickle('a call of something that is no name')
            stack.append(Call(callee.text, arguments))
        elif name == 'BUILD':
            (state,) = self._pop(1)
            if type(stack[-1]) is not Call:
                raise DamagedPickle('a state for a value that takes none')
            stack[-1].state = state
        elif name in ('SETITEM', 'SETITEMS'):
            pairs = self._pop(2) if name == 'SETITEM' else self._pop_marked()
            if len(pairs) % 2:
                raise DamagedPickle('a key without a value')
            self._items().extend(zip(pairs[::2], pairs[1::2]))
        elif name in ('APPEND', 'APPENDS'):
            values = self._pop(1) if name == 'APPEND' else self._pop_marked()
            if type(stack[-1]) is not list:
                raise DamagedPickle(
                    'values to append to something that is no list'
                )
            stack[-1].extend(values)
        elif name != 'PROTO':
            raise DamagedPickle(f'opcode {name}')

    def _items(self) -> list:
        target = self.stack[-1]
        if type(target) is Call:
            return target.items
        if type(target) is Items:
            return target
        raise DamagedPickle('items to set in something that is no dict')

    def _pop(self, count: int) -> list:
        # Values below the last mark belong to the container around it.
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
