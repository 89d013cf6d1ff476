# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""``weight`` and ``bias`` of a block, which a host reads as an nn.Conv2d's.

They are computed from the block's parameters at each reading, and gradients
flow back. Nothing is stored: they are in no state dict, and whoever writes
into them would lose the values, so such writes are refused. Functions that
initialise weights pass a block by: it has its own start.

Where a network is to initialise its layers, :func:`settable` lets it write
values for the whole convolution, which its caller makes the block start as.

Reading raises an AttributeError where the two would not be the layer. Then
``hasattr`` is False, so code that looks for weights to initialise, to
optimise or to fuse leaves the block alone.
"""

from __future__ import annotations

import contextlib
import math
import sys
from typing import TYPE_CHECKING, Any, Dict, Iterable, Iterator, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.modules import tensors_of
from mmdbb.recompute import is_compiling, is_transformed

if TYPE_CHECKING:
    from mmdbb.blocks.base import ReparamConv2d

MERGE_FIRST = 'merge first: mmdbb.reparameterize(model)'


_SETTABLE = '_settable'


@contextlib.contextmanager
def settable(
    blocks: Iterable[ReparamConv2d],
) -> Iterator[Dict[ReparamConv2d, Dict[str, Any]]]:
    """Within the context, whoever writes into a block's weight is heard.

    The weight and bias that are read are tensors full of NaN, which belong to
    nothing; what is not NaN in the end was written.

    Args:
        blocks: Blocks whose parameters have values.

    Yields:
        dict: Block -> ``'weight'`` and ``'bias'``, None without a bias.
    """
    written: Dict[ReparamConv2d, Dict[str, Any]] = {}
    for block in blocks:
        like = next(tensors_of(block))
        shapes = dict(weight=block.spec.weight_shape)
        if block._wants_bias:
            shapes['bias'] = (block.out_channels,)
        empty = {n: like.new_full(s, math.nan) for n, s in shapes.items()}
        written[block] = dict(dict(bias=None), **empty)
        vars(block)[_SETTABLE] = written[block]
    try:
        yield written
    finally:
        for block in written:
            del vars(block)[_SETTABLE]


def is_settable(block: ReparamConv2d) -> bool:
    """Whether a block is within :func:`settable` now."""
    return _SETTABLE in vars(block)


class Equivalent(Tensor):
    """A kernel or bias that was computed from a block's parameters.

    It is read-only, and so are views of it. All else that is computed from
    it is an ordinary tensor.
    """

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if _writes(function, args, kwargs):
            if _initialises(function):
                return args[0]
            raise ValueError(
                "a block's weight and bias are computed from its branches "
                'and cannot be changed: set the parameters of the branches, '
                f'or {MERGE_FIRST}'
            )
        with torch._C.DisableTorchFunctionSubclass():
            result = function(*args, **kwargs)
            source = args[0] if args else None
            if (
                isinstance(result, Tensor)
                and isinstance(source, cls)
                and not isinstance(result, cls)
                and _storage(result) == _storage(source)
            ):
                result = result.as_subclass(cls)
        return result


def equivalent(block: ReparamConv2d, name: str) -> Optional[Tensor]:
    """The ``weight`` or ``bias`` of the convolution that a block equals.

    Args:
        block: A ``ReparamConv2d``.
        name: ``'weight'`` or ``'bias'``.

    Returns:
        Tensor: The weight (out, in / groups, kH, kW) or bias (out,),
        differentiable. The bias is None where the convolution has none.

    Raises:
        AttributeError: If there is no such convolution, or its weight and
            bias together would not be what the block computes.
    """
    written = vars(block).get(_SETTABLE)
    if written is not None:
        return written[name]
    modules = vars(block).get('_modules', {})
    if not is_compiling():
        _refuse_weight_norm(block)
    if 'reparam_conv' in modules:
        return getattr(modules['reparam_conv'], name)
    kind = type(block).__name__
    if next(tensors_of(block), None) is None:
        raise AttributeError(f'this {kind} is not built yet: it has no {name}')
    own, shifted = block.own_bias, block._has_shift
    if name == 'bias' and not block._wants_bias:
        return None
    if any(_uses_batch(module) for module in block.modules()):
        raise AttributeError(
            f'a {kind} in training mode has no {name}: its norms use the '
            'statistics of each batch, so what it computes is no single '
            f'convolution. Take OREPA, which is one, or {MERGE_FIRST}'
        )
    if shifted and not block._wants_bias:
        raise AttributeError(
            f'this {kind} has no weight to read: it was built with '
            'bias=False, but its norms add a bias, and whoever reads the '
            f'weight alone would lose it. {MERGE_FIRST.capitalize()}, or '
            'take both from get_equivalent_kernel_bias()'
        )
    if shifted and own is not None:
        raise AttributeError(
            f'this {kind} has no weight to read: its norms add a bias to '
            f'its parameter of that name. {MERGE_FIRST.capitalize()}'
        )
    merged = block.get_equivalent_kernel_bias()
    found = merged.kernel if name == 'weight' else merged.bias
    if is_compiling() or is_transformed():
        return found
    return found.as_subclass(Equivalent)


def _refuse_weight_norm(block: nn.Module) -> None:
    """Raise if torch's function reads the weight, to put two in its place.

    It would go on to a KeyError, or leave the two without effect.
    """
    caller = sys._getframe(3).f_globals.get('__name__')
    if caller == torch.nn.utils.weight_norm.__module__:
        raise ValueError(
            f'weight_norm takes a parameter, but the weight of a '
            f'{type(block).__name__} is computed from its branches: apply it '
            f'to other layers, or {MERGE_FIRST}'
        )


def _uses_batch(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.training


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata


def _writes(function, args: tuple, kwargs: dict) -> bool:
    """Whether a function of torch writes into an equivalent tensor."""
    if isinstance(kwargs.get('out'), Equivalent):
        return True
    if not args or not isinstance(args[0], Equivalent):
        return False
    name = getattr(function, '__name__', '')
    if name.startswith('__'):
        in_place = name[2:3] == 'i' and name not in ('__invert__', '__index__')
        return in_place or name in ('__set__', '__setitem__', '__delete__')
    return name.endswith('_')


def _initialises(function) -> bool:
    """Whether a write comes from a module of initialisation.

    Those are ``torch.nn.init``, and ``weight_init`` of mmengine and of timm.
    """
    callers = [getattr(function, '__module__', None) or '']
    # The caller of the function, and the caller's caller.
    for depth in (2, 3):
        callers.append(sys._getframe(depth).f_globals.get('__name__', ''))
    return any(name.endswith(('.init', '.weight_init')) for name in callers)
