# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Find the norm that reads a convolution's output, by following the data.

The order in which a model registers its layers says nothing about the order
in which ``forward`` calls them. So the model is traced with torch.fx, or run
on an example while functions and layers are watched.
"""

from __future__ import annotations

import inspect
from collections import Counter, defaultdict
from typing import Any, Dict, List, Optional

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.modules import in_eval_mode

_CONVS = (nn.Conv2d, ReparamConv2d)
_NORMS = (_NormBase, nn.GroupNorm)

# Convolution -> for each call of it, the norm that reads the result; None
# unless one norm and nothing else does.
Calls = Dict[nn.Module, List[Optional[nn.Module]]]


def sole_readers(
    model: nn.Module, example: Any = None
) -> Dict[nn.Module, Optional[nn.Module]]:
    """Find the norm that alone reads a convolution's output.

    Args:
        model: Any model; unchanged. It is traced or run in eval mode.
        example: Input to run the model on: a tensor, a tuple of arguments or
            a dict of keywords. Without one, the model is traced with
            torch.fx.

    Returns:
        dict: Each convolution and each block that is called -> the norm that
        alone reads its output and reads nothing else; None where there is no
        such norm.

    Raises:
        ValueError: If the model cannot be traced, and no example is given.
    """
    with in_eval_mode(model):
        if example is None:
            calls, count = _traced(model)
        else:
            calls, count = _watched(model, example)
    readers = {}
    for conv, found in calls.items():
        reader = found[0] if len(set(found)) == 1 else None
        alone = reader is not None and count[reader] == len(found)
        readers[conv] = reader if alone else None
    return readers


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _CONVS + _NORMS) or super().is_leaf_module(
            m, module_qualified_name
        )


def _traced(model: nn.Module):
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
    calls, count = defaultdict(list), Counter()
    for node in graph.nodes:
        if node.op != 'call_module':
            continue
        module = model.get_submodule(node.target)
        count[module] += 1
        if isinstance(module, _CONVS):
            users = list(node.users)
            reader = None
            if len(users) == 1 and users[0].op == 'call_module':
                reader = model.get_submodule(users[0].target)
            calls[module].append(reader if _is_norm(reader) else None)
    return calls, count


def _watched(model: nn.Module, example: Any):
    watch = _Watch()
    hooks = []
    for module in model.modules():
        if isinstance(module, _CONVS):
            hooks.append(module.register_forward_hook(watch.after_conv))
        elif _is_norm(module):
            hooks.append(module.register_forward_pre_hook(watch.enter))
            hooks.append(module.register_forward_hook(watch.leave))
    try:
        with torch.no_grad(), watch:
            if isinstance(example, dict):
                output = model(**example)
            elif isinstance(example, (tuple, list)):
                output = model(*example)
            else:
                output = model(example)
        watch.read(output)  # the caller reads what the model returns
    finally:
        for hook in hooks:
            hook.remove()
    calls = defaultdict(list)
    for conv, _, readers in watch.outputs.values():
        reader = next(iter(readers)) if len(readers) == 1 else None
        calls[conv].append(reader)
    return calls, watch.count


class _Watch(TorchFunctionMode):
    """Notes which modules read the outputs of convolutions during a run."""

    def __init__(self) -> None:
        super().__init__()
        # By id of the output. The tensor is kept, or another could get its id.
        self.outputs = {}
        self.count = Counter()
        self._inside = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.read((args, kwargs or {}))
        return func(*args, **(kwargs or {}))

    def read(self, values: Any) -> None:
        reader = self._inside[-1] if self._inside else None
        for value in tree_flatten(values)[0]:
            if isinstance(value, Tensor) and id(value) in self.outputs:
                self.outputs[id(value)][2].add(reader)

    def after_conv(self, conv: nn.Module, _, output: Tensor) -> None:
        self.outputs[id(output)] = (conv, output, set())

    def enter(self, norm: nn.Module, _) -> None:
        self.count[norm] += 1
        self._inside.append(norm)

    def leave(self, norm: nn.Module, *_) -> None:
        self._inside.pop()


def _is_norm(module: Optional[nn.Module]) -> bool:
    return isinstance(module, _NORMS)
