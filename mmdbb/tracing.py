# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Find the norms that read a convolution's output, by following the data.

The order in which a model registers its layers says nothing about the order
in which ``forward`` calls them. So the model is traced with torch.fx, or run
on an example while functions and layers are watched.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from typing import (
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Set,
    Tuple,
    Type,
)

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.dimensions import CONVS
from mmdbb.modules import in_eval_mode, is_norm

_CONVS: Tuple[Type[nn.Module], ...] = (*CONVS, ReparamConv2d)
#: Attributes and methods of a tensor that tell nothing of its values.
_LOOKS = frozenset(
    'shape size dim ndim numel dtype device layout stride is_contiguous '
    'is_cuda is_floating_point requires_grad is_meta'.split()
)

Norms = Tuple[nn.Module, ...]


class _Seen(NamedTuple):
    """What was seen of a model's data flow.

    Attributes:
        readers: Convolution -> for each call of it, the norm that alone reads
            the result; None where there is none.
        reads: How often each norm was called.
        taken: Modules whose parameters or buffers something else reads, as a
            decoder does that shares the weights of a convolution.
    """

    readers: Dict[nn.Module, List[Optional[nn.Module]]]
    reads: Dict[nn.Module, int]
    taken: Set[nn.Module]

    def norms(self) -> Dict[nn.Module, Norms]:
        """Each convolution -> the norms behind it, see `norms_behind`."""
        found: Dict[nn.Module, Norms] = {}
        for conv, readers in self.readers.items():
            norms: Tuple[Any, ...] = tuple(dict.fromkeys(readers))
            read = [n for n in norms if n is not None]
            alone = sum(self.reads[n] for n in read) == len(readers)
            found[conv] = norms if alone and None not in norms else ()
        return found


def sole_readers(
    model: nn.Module, example: Any = None
) -> Dict[nn.Module, Optional[nn.Module]]:
    """Find the one norm that alone reads a convolution's output.

    Args:
        model: Any model; unchanged. It is traced or run in eval mode.
        example: Input to run the model on: a tensor, a tuple of arguments or
            a dict of keywords. Without one, the model is traced with
            torch.fx.

    Returns:
        dict: Each convolution and each block that is called -> the norm that
        alone reads its output, at every call, and reads nothing else; None
        where there is no such norm.

    Raises:
        ValueError: If the model cannot be traced, and no example is given.
    """
    return _the_only(norms_behind(model, example))


def own_readers(
    model: nn.Module, example: Any = None
) -> Dict[nn.Module, Optional[nn.Module]]:
    """Like :func:`sole_readers`, of layers whose tensors only they read.

    A layer that is replaced takes its tensors along. So convolutions are left
    out whose weights something else reads or shares, and None stands for such
    norms.

    Args:
        model: As there.
        example: As there.
    """
    seen = _seen(model, example)
    taken = seen.taken | sharing_layers(model)
    return {
        conv: None if norm in taken else norm
        for conv, norm in _the_only(seen.norms()).items()
        if conv not in taken
    }


def _the_only(
    norms: Dict[nn.Module, Norms],
) -> Dict[nn.Module, Optional[nn.Module]]:
    return {
        conv: found[0] if len(found) == 1 else None
        for conv, found in norms.items()
    }


def sharing_layers(model: nn.Module) -> Set[nn.Module]:
    """Layers that share a parameter or a buffer with another one.

    Args:
        model: Any model; the insides of its blocks do not count.
    """
    owners = _owners(model).values()
    return {layer for found in owners if len(found) > 1 for layer in found}


def _owners(model: nn.Module) -> Dict[int, Set[nn.Module]]:
    """Ids of tensors -> the modules that hold them, those in blocks apart."""
    owners = defaultdict(set)
    for module in outside_blocks(model):
        for tensors in (module._parameters, module._buffers):
            for tensor in tensors.values():
                if tensor is not None:
                    owners[id(tensor)].add(module)
    return owners


def norms_behind(
    model: nn.Module, example: Any = None
) -> Dict[nn.Module, Norms]:
    """Find the norms that alone read a convolution's output.

    They are several where the convolution is called more than once, as a
    detector's head that shares it among the levels does, with a norm of its
    own for each level.

    Args:
        model: Any model; unchanged. It is traced or run in eval mode.
        example: Input to run the model on: a tensor, a tuple of arguments or
            a dict of keywords. Without one, the model is traced with
            torch.fx.

    Returns:
        dict: Each convolution and each block that is called -> the norms that
        alone read its outputs, and read nothing else; none if the output of
        one call has another reader.

    Raises:
        ValueError: If the model cannot be traced, and no example is given.
    """
    return _seen(model, example).norms()


def _seen(model: nn.Module, example: Any) -> _Seen:
    if example is None:
        with in_eval_mode(model):
            return _traced(model)

    def run() -> Any:
        if isinstance(example, dict):
            return model(**example)
        if isinstance(example, (tuple, list)):
            return model(*example)
        return model(example)

    return _watched(model, run)


def norms_in_run(
    model: nn.Module, run: Callable[[], Any]
) -> Dict[nn.Module, Norms]:
    """Find the norms behind convolutions while something runs the model.

    Args:
        model: Any model; unchanged. It runs in eval mode.
        run: Runs the model, or parts of it, and returns the outputs. A part
            that raises does not count, even if ``run`` catches the error.

    Returns:
        dict: As from :func:`norms_behind`, of the convolutions that ran.
    """
    return _watched(model, run).norms()


def _watched(model: nn.Module, run: Callable[[], Any]) -> _Seen:
    watch = _Watch(_owners(model))
    hooks = []
    for module in outside_blocks(model):
        hooks.append(module.register_forward_pre_hook(watch.enter))
        hooks.append(
            module.register_forward_hook(watch.leave, always_call=True)
        )
    try:
        with in_eval_mode(model), torch.no_grad(), watch:
            watch.read(run())  # the caller reads what the model returns
    finally:
        for hook in hooks:
            hook.remove()
    return watch.seen()


class _Tracer(fx.Tracer):
    sees_through_places = True  # of absorbed norms

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, nn.Identity):
            return False  # who reads its output reads its input
        known = isinstance(m, _CONVS) or is_norm(m)
        return known or super().is_leaf_module(m, module_qualified_name)


def _traced(model: nn.Module) -> _Seen:
    parameters = inspect.signature(model.forward).parameters.values()
    # torch.fx would treat an optional argument as a tensor that is given.
    defaults = {
        p.name: p.default
        for p in parameters
        if p.default is not p.empty and p.kind is not p.KEYWORD_ONLY
    }
    try:
        graph = _Tracer().trace(model, defaults or None)
    except Exception as error:  # a forward may fail on a proxy in any way
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise ValueError(
            f'{type(model).__name__} cannot be traced by torch.fx ({reason});'
            ' give an input to run it on: example=torch.rand(...)'
        ) from error
    readers: Dict[nn.Module, List[Optional[nn.Module]]] = defaultdict(list)
    reads: Dict[nn.Module, int] = Counter()
    owners, taken = _owners(model), set()
    for node in graph.nodes:
        if node.op == 'get_attr' and not all(map(_looks, node.users)):
            taken |= owners.get(id(_attribute(model, node.target)), set())
        if node.op != 'call_module':
            continue
        module = model.get_submodule(node.target)
        reads[module] += 1
        if isinstance(module, _CONVS):
            users = [user for user in node.users if not _looks(user)]
            reader = None
            if len(users) == 1 and users[0].op == 'call_module':
                reader = model.get_submodule(users[0].target)
            readers[module].append(reader if is_norm(reader) else None)
    return _Seen(readers, reads, taken)


def _attribute(model: nn.Module, name: str) -> Any:
    value: Any = model
    for part in name.split('.'):
        value = getattr(value, part, None)
    return value


def _looks(node: fx.Node) -> bool:
    """Whether a node of a graph asks for a tensor's shape, type or place."""
    if node.op == 'call_method':
        return node.target in _LOOKS
    return node.target is getattr and node.args[1] in _LOOKS


class _Frame:
    """One call of a module."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.failed = False


class _Output(NamedTuple):
    """What a call of a convolution gave.

    Attributes:
        conv: The convolution.
        value: The output. It is kept, or another tensor could get its id.
        frames: The calls within which the convolution was called.
        readers: The norms that read the output; None for anything else.
    """

    conv: nn.Module
    value: Tensor
    frames: Tuple[_Frame, ...]
    readers: Set[Optional[nn.Module]]


class _Watch(TorchFunctionMode):
    """Notes which modules read the outputs of convolutions during a run.

    Args:
        owners: Ids of tensors -> the modules that hold them.
    """

    def __init__(self, owners: Dict[int, Set[nn.Module]]) -> None:
        super().__init__()
        self.owners = owners
        self.taken: Set[nn.Module] = set()
        self.outputs: Dict[int, _Output] = {}  # by id of the output
        self.reads: Dict[nn.Module, int] = Counter()
        self._frames: List[_Frame] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if _name_of(func) not in _LOOKS:
            self.read((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def read(self, values: Any) -> None:
        within = [f.module for f in self._frames if is_norm(f.module)]
        reader = within[-1] if within else None
        inside = self._frames[-1].module if self._frames else None
        for value in tree_flatten(values)[0]:
            owners = self.owners.get(id(value), ())
            if owners and inside not in owners:
                self.taken |= owners
            if isinstance(value, Tensor) and id(value) in self.outputs:
                self.outputs[id(value)].readers.add(reader)

    def enter(self, module: nn.Module, _) -> None:
        self._frames.append(_Frame(module))
        if is_norm(module):
            self.reads[module] += 1

    def leave(self, module: nn.Module, _, output: Any) -> None:
        if not self._frames or self._frames[-1].module is not module:
            return  # another hook raised before this one was entered
        frame = self._frames.pop()
        frame.failed = output is None  # torch's sign of an error
        if isinstance(module, _CONVS) and isinstance(output, Tensor):
            self.outputs[id(output)] = _Output(
                module, output, tuple(self._frames), set()
            )

    def seen(self) -> _Seen:
        readers = defaultdict(list)
        for conv, _, frames, found in self.outputs.values():
            if any(frame.failed for frame in frames):
                continue  # who else reads it is not known
            readers[conv].append(found.pop() if len(found) == 1 else None)
        return _Seen(readers, self.reads, self.taken)


def _name_of(func: Callable) -> str:
    """Name of a function of torch; of a getter, that of its attribute."""
    name = getattr(func, '__name__', '')
    if name == '__get__':
        return getattr(getattr(func, '__self__', None), '__name__', '')
    return name


def outside_blocks(model: nn.Module) -> List[nn.Module]:
    """All modules but those inside of blocks, each once."""
    found, waiting = {}, [model]
    while waiting:
        module = waiting.pop()
        if module not in found:
            found[module] = True
            if not isinstance(module, ReparamConv2d):
                waiting.extend(module.children())
    return list(found)
