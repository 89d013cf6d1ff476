# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Make the values of a checkpoint from the descriptions in its pickle.

Only these are ever made: tensors, numbers and arrays of numbers, containers,
mmengine's ``HistoryBuffer`` with its own four statistics, and the two
functions that its ``OneCycleLR`` keeps. Each maker checks that the description
has the form in which torch, numpy or mmengine pickle such a value. Anything
else is refused, and the error names it.
"""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from typing import Any, Callable, Dict, List, NamedTuple, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from mmdbb.files.pickled import Call, Items, Name, Outside
from mmdbb.ports import PORTS

#: Statistics that HistoryBuffer registers by itself.
STATISTICS = ('min', 'max', 'current', 'mean')
#: Name of a storage class of torch -> dtype of its numbers.
STORAGES = {
    'DoubleStorage': torch.float64,
    'FloatStorage': torch.float32,
    'HalfStorage': torch.float16,
    'BFloat16Storage': torch.bfloat16,
    'LongStorage': torch.int64,
    'IntStorage': torch.int32,
    'ShortStorage': torch.int16,
    'CharStorage': torch.int8,
    'ByteStorage': torch.uint8,
    'BoolStorage': torch.bool,
    'ComplexDoubleStorage': torch.complex128,
    'ComplexFloatStorage': torch.complex64,
    # Storages of quantized tensors, which are read but not made into tensors.
    'QInt32Storage': torch.int32,
    'QInt8Storage': torch.int8,
    'QUInt8Storage': torch.uint8,
    'QUInt4x2Storage': torch.uint8,
    'QUInt2x4Storage': torch.uint8,
}
#: Dtypes that a tensor may have. Others pack several numbers into a byte, or
#: stand for numbers that are stored elsewhere, and few operations take them.
DTYPES = {
    getattr(torch, name)
    for name in (
        'float64 float32 float16 bfloat16 float8_e4m3fn float8_e4m3fnuz '
        'float8_e5m2 float8_e5m2fnuz float8_e8m0fnu complex128 complex64 '
        'complex32 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool'
    ).split()
    if hasattr(torch, name)  # an older torch lacks some
}
#: numpy's codes of plain numbers, without the byte order.
NUMBERS = ('f2 f4 f8 i1 i2 i4 i8 u1 u2 u4 u8 b1').split()
_HISTORY_BUFFER = 'mmengine.logging.history_buffer.HistoryBuffer'
#: Class -> names of its functions that may stand in a checkpoint: statistics
#: of a HistoryBuffer, and the annealing function that each OneCycleLR keeps.
_FUNCTIONS = {
    _HISTORY_BUFFER: STATISTICS,
    'mmengine.optim.scheduler.param_scheduler.OneCycleParamScheduler': (
        '_annealing_cos',
        '_annealing_linear',
    ),
}
#: Largest number of keys in a file that are integers of more than 64 bits, and
#: that are tuples; and the greatest length of such a tuple. A file could
#: choose these keys so that all have one hash, which makes dicts very slow.
ODD_KEYS = {int: 512, tuple: 4096}
LONGEST_KEY = 8
#: Greatest depth to which containers may be nested.
DEPTH = 64
_SIZE = 2**63
#: Start of a name in another version of Python or numpy -> start of it here.
_RENAMED = {
    '__builtin__.': 'builtins.',
    'numpy.core.': 'numpy._core.',
}


class History(NamedTuple):
    """Stands for mmengine's ``HistoryBuffer`` if mmengine is missing.

    Attributes:
        max_length: Largest number of values that it keeps.
        values: The logged values, shape (n,).
        counts: Number of samples of which each value is the mean, shape (n,).
    """

    max_length: int
    values: np.ndarray
    counts: np.ndarray


class Function(NamedTuple):
    """Stands for a function of mmengine if mmengine is missing.

    Attributes:
        owner: Full name of the class that defines it.
        name: Name of the function.
    """

    owner: str
    name: str


class NotAllowed(ValueError):
    """The file asks for a function or class that is not in the list."""


class DamagedValue(ValueError):
    """The file describes a value that cannot exist."""


class Unread(NamedTuple):
    """Stands for a tensor of a kind that is not read, such as a sparse one.

    Attributes:
        what: The kind, for messages.
    """

    what: str


class Budget:
    """Bounds how much memory the values of a file may take.

    Args:
        values: Largest number of values: numbers, texts and containers.
        size: Largest number of bytes in tensors, arrays and byte strings.
    """

    def __init__(self, values: int, size: int) -> None:
        self.values = values
        self.size = self.allowed = size

    def take(self, size: int) -> None:
        """Count one more value.

        Args:
            size: Its bytes.

        Raises:
            DamagedValue: If the budget is exceeded.
        """
        self.values -= 1
        self.size -= size
        if self.values < 0 or self.size < 0:
            raise DamagedValue('it claims to hold too much for its size')


class Values:
    """Makes values from the descriptions in a pickle.

    Args:
        storage: Reads a storage, given its dtype, its key in the file and its
            number of values; returns a tensor of one dimension.
        budget: Bounds the memory that values may take.
    """

    def __init__(
        self,
        storage: Callable[[torch.dtype, str, int], Tensor],
        budget: Budget,
    ) -> None:
        self._storage = storage
        self._budget = budget
        self._depth = 0
        #: Tensors by the ``id`` of their call, so that entries which share a
        #: tensor share it again. The call is kept too, or another object
        #: could get its id.
        self._tensors: Dict[int, Tuple[Call, Tensor]] = {}
        self._keys = dict(ODD_KEYS)

    def make(self, said: Any) -> Any:
        """Make the value that a description stands for.

        Args:
            said: The description, see :class:`Pickled`.

        Raises:
            NotAllowed: If it asks for anything that is not in the list.
            DamagedValue: If the value cannot exist, or exceeds the budget.
        """
        if self._depth > DEPTH:
            raise DamagedValue(
                f'containers in each other, or in themselves, {DEPTH} deep'
            )
        self._depth += 1
        try:
            return self._make(said)
        finally:
            self._depth -= 1

    def _make(self, said: Any) -> Any:
        kind = type(said)
        if kind is Call:
            return self._call(said)
        if kind is Name:
            return _named(said)
        if kind is Outside:
            return self._outside(said)
        self._budget.take(0)
        if kind is Items:
            return self._dict(said)
        if kind in (list, tuple):
            return kind([self.make(item) for item in said])
        return said

    def _dict(self, items: List[tuple], kind: type = dict) -> dict:
        made = kind()
        for key, value in items:
            made[self._key(key)] = self.make(value)
        return made

    def _key(self, said: Any) -> Any:
        key = self.make(said)
        kind = type(key)
        if _is_spread(key):
            return key
        plain = kind is int or (
            kind is tuple
            and len(key) <= LONGEST_KEY
            and all(type(k) is int or _is_spread(k) for k in key)
        )
        # Such keys could all have the same hash; see ODD_KEYS.
        if plain and self._keys[kind]:
            self._keys[kind] -= 1
            return key
        raise DamagedValue(f'a key of type {kind.__name__}')

    def _call(self, call: Call) -> Any:
        name = _common(call.name)
        maker = _MAKERS.get(name)
        if maker is None:
            if name in _UNREAD:
                return _UNREAD[name](call)
            raise NotAllowed(call.name)
        if id(call) in self._tensors:
            made = self._tensors[id(call)][1]
            # It counts each time, because checks look at each entry.
            self._budget.take(made.numel() * made.element_size())
            return made
        try:
            made = maker(self, call, *call.arguments)
        except (NotAllowed, DamagedValue):
            raise
        except (TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise DamagedValue(f'{name} of another form') from error
        if isinstance(made, Tensor):
            self._tensors[id(call)] = call, made
        return made

    # Containers and text

    def _ordered(self, call: Call, items: Any = ()) -> OrderedDict:
        # Python 2 pickled the items as an argument, a list of pairs.
        pairs = [(key, value) for key, value in [*items, *call.items]]
        self._budget.take(0)
        made: Any = self._dict(pairs, OrderedDict)
        state = call.state
        if type(state) is Items:
            # Versions of layers, by which torch recognises old entries.
            versions = self._dict(state).get('_metadata')
            if isinstance(versions, dict):
                made._metadata = {
                    layer: dict(version=noted['version'])
                    for layer, noted in versions.items()
                    if type(layer) is str
                    and isinstance(noted, dict)
                    and type(noted.get('version')) is int
                }
        return made

    def _counter(self, call: Call, items: Any = ()) -> Counter:
        self._budget.take(0)
        return Counter(self._dict([*items, *call.items]))

    def _set(self, call: Call, items: Any = ()) -> set:
        self._budget.take(0)
        return {self._key(item) for item in _of(list, items)}

    def _encoded(self, call: Call, text: Any, encoding: Any) -> bytes:
        if type(text) is not str or encoding != 'latin1':
            raise DamagedValue('bytes of another form')
        self._budget.take(len(text))
        return text.encode('latin1')

    def _bytes(self, call: Call) -> bytes:  # empty; see _encoded for others
        return b''

    def _bytearray(self, call: Call, *content: Any) -> bytearray:
        return bytearray().join(_of(bytes, self.make(c)) for c in content)

    def _complex(self, call: Call, real: Any, imaginary: Any) -> complex:
        self._budget.take(0)
        return complex(_of(float, real), _of(float, imaginary))

    def _torch_size(self, call: Call, size: Any) -> torch.Size:
        return torch.Size(_sizes(size))

    def _device(
        self, call: Call, kind: Any, index: Any = None
    ) -> torch.device:
        # Only the name of a device: reading puts nothing on it.
        where = '' if index is None else f':{_of(int, index)}'
        return torch.device(f'{_of(str, kind)}{where}')

    # Tensors

    def _outside(self, said: Outside) -> Tensor:
        key = said.key
        if type(key) is not tuple or len(key) < 5 or key[0] != 'storage':
            raise DamagedValue('a storage of another form')
        dtype = storage_dtype(key[1])
        self._budget.take(0)
        return self._storage(dtype, _of(str, key[2]), _of(int, key[4]))

    def _tensor(
        self,
        call: Call,
        said: Any,
        offset: Any,
        size: Any,
        stride: Any,
        *rest: Any,
    ) -> Union[Tensor, Unread]:
        flat = self._outside(_of(Outside, said))
        # Of the other arguments only the last one changes values.
        return self._flagged(
            self._strided(flat, offset, size, stride), *rest[2:]
        )

    def _tensor_3(
        self,
        call: Call,
        said: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any,
        hooks: Any,
        dtype: Any,
        *rest: Any,
    ) -> Union[Tensor, Unread]:
        dtype = _dtype(_of(Name, dtype))
        flat = self._outside(_of(Outside, said))
        if flat.dtype is not torch.uint8:
            raise DamagedValue('numbers of another type than their storage')
        if dtype not in DTYPES:
            return Unread(f'of type {str(dtype).rpartition(".")[2]}')
        return self._flagged(
            self._strided(flat.view(dtype), offset, size, stride), *rest
        )

    def _flagged(
        self, value: Union[Tensor, Unread], flags: Any = None, *rest: Any
    ) -> Union[Tensor, Unread]:
        """Conjugate or negate a tensor that was saved as such a view."""
        if rest or flags is None or isinstance(value, Unread):
            if rest:
                raise DamagedValue('a tensor of another form')
            return value
        for flag, on in _of(Items, flags):
            if flag not in ('conj', 'neg') or type(on) is not bool:
                raise DamagedValue('a tensor of another form')
            if on:
                self._budget.take(value.numel() * value.element_size())
                if flag == 'neg':
                    value = value.neg()
                elif value.is_complex():
                    value = value.conj_physical()
                else:
                    raise DamagedValue('a conjugated tensor of real numbers')
        return value

    def _strided(
        self, flat: Tensor, offset: Any, size: Any, stride: Any
    ) -> Union[Tensor, Unread]:
        size, stride = _sizes(size), _sizes(stride)
        start = _of(int, offset)
        if len(size) != len(stride) or start < 0:
            raise DamagedValue('a tensor of another form')
        count = math.prod(size)
        last = start + sum((n - 1) * step for n, step in zip(size, stride))
        if count and last >= flat.numel():
            raise DamagedValue('a tensor that is larger than its storage')
        # With strides of zero, few bytes can claim to be many numbers. They
        # take memory once something computes with them.
        if count * flat.element_size() > self._budget.allowed:
            return Unread(f'larger than the file ({count:.0e} numbers)')
        self._budget.take(count * flat.element_size())
        if not count:
            return flat.new_empty(size)
        return flat.as_strided(size, stride, start)

    def _parameter(
        self, call: Call, said: Any, requires_grad: Any = True, *rest: Any
    ) -> Any:
        value = self.make(said)
        if isinstance(value, Unread):
            return value
        value = _of(Tensor, value).detach()
        learned = value.is_floating_point() or value.is_complex()
        return torch.nn.Parameter(value, requires_grad is True and learned)

    def _of_type(
        self, call: Call, function: Any, kind: Any, arguments: Any, state: Any
    ) -> Any:
        """Make a tensor that has attributes; the attributes are left out."""
        if _of(Name, kind).text not in _TENSORS:
            raise NotAllowed(kind.text)
        name = _of(Name, function).text
        rebuild = _REBUILDERS.get(_common(name))
        if rebuild is None:
            raise NotAllowed(name)
        # With this same call: tensors are kept by the id of their call, and a
        # new call, once it is gone, would leave its id to another one.
        return rebuild(self, call, *_of(tuple, arguments))

    # numpy

    def _array(
        self, call: Call, kind: Any, shape: Any, code: Any
    ) -> np.ndarray:
        plain = type(kind) is Name and kind.text == 'numpy.ndarray'
        if not plain or shape != (0,):
            raise DamagedValue('an array of another form')
        version, size, dtype, by_column, content = _of(tuple, call.state)
        if version != 1 or type(by_column) is not bool:
            raise DamagedValue('an array of another form')
        size, dtype = _sizes(size), self._number_type(dtype)
        raw = _of(bytes, self.make(content))
        if math.prod(size) * dtype.itemsize != len(raw):
            raise DamagedValue('an array of another size than its numbers')
        order: Any = 'F' if by_column else 'C'
        array = np.frombuffer(raw, dtype).reshape(size, order=order)
        return array.astype(dtype.newbyteorder('='))

    def _scalar(self, call: Call, dtype: Any, content: Any) -> np.generic:
        dtype = self._number_type(dtype)
        raw = _of(bytes, self.make(content))
        if len(raw) != dtype.itemsize:
            raise DamagedValue('a number of another size')
        return np.frombuffer(raw, dtype).astype(dtype.newbyteorder('='))[0]

    def _number_type(self, said: Any) -> np.dtype:
        if type(said) is not Call or said.name != 'numpy.dtype':
            raise DamagedValue('numbers without a type')
        code, state = said.arguments[:1], said.state
        if said.arguments[1:] not in ((False, True), (0, 1)):
            raise DamagedValue('a type of numbers of another form')
        if code[0] not in NUMBERS:
            raise NotAllowed(f'numpy.dtype {code[0]!r}')
        if (
            type(state) is not tuple
            or len(state) != 8
            or state[1] not in ('<', '>', '|', '=')
            or state[2:5] != (None, None, None)
            or state[5:] != (-1, -1, 0)
        ):
            raise DamagedValue('a type of numbers of another form')
        return np.dtype(state[1] + code[0])

    # mmengine

    def _history(self, call: Call, *arguments: Any) -> Any:
        state = self.make(_of(Items, call.state))
        methods = state.pop('statistics_methods', {})
        for name, method in _of(dict, methods).items():
            if name not in STATISTICS or method != _function_of(
                _HISTORY_BUFFER, name
            ):
                raise NotAllowed(
                    f'a HistoryBuffer whose {name!r} is another function'
                )
        fields = ('max_length', '_log_history', '_count_history')
        if arguments or set(state) != set(fields):
            raise DamagedValue('a HistoryBuffer of another form')
        length, logs, counts = (state[field] for field in fields)
        logs, counts = _of(np.ndarray, logs), _of(np.ndarray, counts)
        if logs.ndim != 1 or logs.shape != counts.shape:
            raise DamagedValue('a HistoryBuffer of another form')
        return (PORTS.history or History)(_of(int, length), logs, counts)

    def _function(self, call: Call, owner: Any, name: Any) -> Any:
        if type(owner) is Name and type(name) is str:
            if name in _FUNCTIONS.get(owner.text, ()):
                return _function_of(owner.text, name)
        raise NotAllowed(f'attribute {name!r} of {_short(owner)}')


def _function_of(owner: str, name: str) -> Union[Function, Callable]:
    """Return a function of mmengine, or a :class:`Function` in its place."""
    kind = PORTS.classes.get(owner)
    return Function(owner, name) if kind is None else getattr(kind, name)


_REBUILDERS = {
    'torch._utils._rebuild_tensor': Values._tensor,
    'torch._utils._rebuild_tensor_v2': Values._tensor,
    'torch._utils._rebuild_tensor_v3': Values._tensor_3,
}
#: Full name in a pickle -> method that makes the value. No other name may be
#: called.
_MAKERS: Dict[str, Callable] = {
    **_REBUILDERS,
    'torch._utils._rebuild_parameter': Values._parameter,
    'torch._utils._rebuild_parameter_with_state': Values._parameter,
    'torch.nn.parameter.Parameter': Values._parameter,
    'torch._tensor._rebuild_from_type_v2': Values._of_type,
    'torch.Size': Values._torch_size,
    'torch.device': Values._device,
    'collections.OrderedDict': Values._ordered,
    'collections.Counter': Values._counter,
    'builtins.set': Values._set,
    'builtins.complex': Values._complex,
    'builtins.bytes': Values._bytes,
    'builtins.bytearray': Values._bytearray,
    '_codecs.encode': Values._encoded,
    'numpy._core.multiarray._reconstruct': Values._array,
    'numpy._core.multiarray.scalar': Values._scalar,
    _HISTORY_BUFFER: Values._history,
    'builtins.getattr': Values._function,
}
_TENSORS = ('torch.Tensor', 'torch.nn.parameter.Parameter')
#: Full name in a pickle, for kinds of tensors that are not read -> function
#: that makes their :class:`Unread`.
_UNREAD: Dict[str, Callable[[Call], Unread]] = {
    'torch._utils._rebuild_qtensor': lambda call: Unread(_quantized(call)),
    'torch._utils._rebuild_sparse_tensor': lambda call: Unread('sparse'),
    'torch._utils._rebuild_nested_tensor': lambda call: Unread('nested'),
    'torch._utils._rebuild_meta_tensor_no_storage': lambda call: Unread(
        'without values (meta)'
    ),
}


def storage_dtype(said: Any) -> torch.dtype:
    """The dtype of a storage's numbers.

    Args:
        said: The storage's class, as a pickle names it.

    Raises:
        NotAllowed: If it is no storage class that is known.
    """
    name = _of(Name, said).text
    if name == 'torch.storage.UntypedStorage':
        return torch.uint8
    dtype = STORAGES.get(name.rpartition('.')[2])
    if not name.startswith('torch.') or dtype is None:
        raise NotAllowed(name)
    return dtype


def _is_spread(key: Any) -> bool:
    """Whether a file cannot choose many keys of this kind with one hash."""
    if type(key) is int:
        return -_SIZE <= key < _SIZE
    return type(key) in (str, bytes, float, bool, type(None))


def _common(name: str) -> str:
    for old, new in _RENAMED.items():
        if name.startswith(old):
            return new + name[len(old) :]
    return name


def _named(said: Name) -> Any:
    """The value of a name that is not called: a dtype or a memory layout."""
    try:
        return _dtype(said)
    except NotAllowed:
        if said.text in ('torch.strided', 'torch.contiguous_format'):
            return getattr(torch, said.text[len('torch.') :])
        raise


def _dtype(said: Name) -> torch.dtype:
    module, _, name = said.text.partition('.')
    found = getattr(torch, name, None) if module == 'torch' else None
    if not isinstance(found, torch.dtype):
        raise NotAllowed(said.text)
    return found


def _quantized(call: Call) -> str:
    said = next(iter(call.arguments), None)
    key: Tuple[Any, ...] = said.key if type(said) is Outside else ()
    name = key[1].text if len(key) > 1 and type(key[1]) is Name else ''
    kind = name.rpartition('.')[2].replace('Storage', '').lower()
    return f'quantized ({kind})' if kind.startswith('q') else 'quantized'


def _sizes(said: Any) -> tuple:
    if type(said) is Call and said.name == 'torch.Size':
        said = said.arguments[0] if len(said.arguments) == 1 else None
    if (
        type(said) is not tuple
        or len(said) > DEPTH
        or not all(type(n) is int and 0 <= n < _SIZE for n in said)
        or math.prod(n for n in said if n) >= _SIZE
    ):
        raise DamagedValue('a shape that is none')
    return said


def _of(kind: type, value: Any) -> Any:
    """Return a value if its type is exactly ``kind``, or raise.

    Only tensors may be of a subclass, such as ``Parameter``.
    """
    if type(value) is kind or (kind is Tensor and isinstance(value, Tensor)):
        return value
    raise DamagedValue(f'{_short(value)} in the place of a {kind.__name__}')


def _short(said: Any) -> str:
    if type(said) is Name:
        return said.text
    if type(said) is Call:
        return f'{said.name}(...)'
    return f'a {type(said).__name__}'
