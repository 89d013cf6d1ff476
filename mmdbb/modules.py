# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a module holds besides its code: tensors, and hooks that act on it."""

from __future__ import annotations

import contextlib
from typing import Callable, Iterator, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

#: What convolutions and norms compute, if a subclass does not override it.
KNOWN_FORWARDS = (
    nn.Conv2d.forward,
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
)

# Every kind of hook that torch calls when a module's forward runs.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that a module computes with.

    Parameters and buffers; and tensors that are plain attributes, as hooks
    leave them that compute a weight, and as in ``nn.DataParallel``'s
    replicas, which have no parameters.
    """
    for each in module.modules():
        attributes = vars(each)
        for tensors in (each._parameters, each._buffers, attributes):
            for tensor in tensors.values():
                if isinstance(tensor, Tensor):
                    yield tensor


def is_replica(module: nn.Module) -> bool:
    """Whether this is one of ``nn.DataParallel``'s copies for one batch."""
    return getattr(module, '_is_replica', False)


def has_hooks(module: nn.Module) -> bool:
    """Whether a hook sees or changes what a module's forward pass does."""
    return any(getattr(module, kind) for kind in _HOOKS)


def is_watched(module: nn.Module) -> bool:
    """Whether anything sees or changes what happens inside a module.

    A hook on one of its submodules, a ``forward`` that was put in place of a
    submodule's own, or a parametrization anywhere: that of a spectral norm
    takes a step whenever the weight is read.
    """
    return is_parametrized(module) or any(
        has_hooks(each) or 'forward' in vars(each) or is_parametrized(each)
        for each in module.modules()
        if each is not module
    )


def shadow(
    module: nn.Module, change: Callable[[nn.Module, str, Tensor], Tensor]
) -> nn.Module:
    """A module of the same structure that computes with other tensors.

    Only the dicts that hold tensors and children are new: copying a module,
    with all that Python keeps of it, takes longer than composing a kernel,
    and putting other tensors into the module itself would be seen by other
    threads.

    Args:
        module: The module; unchanged.
        change: From a submodule of it, the name of a tensor there and the
            tensor to what takes its place.

    Returns:
        nn.Module: Of the same class; not to be kept.
    """
    twin = module.__class__.__new__(module.__class__)
    attributes = dict(vars(module))
    for name, value in attributes.items():
        if isinstance(value, Tensor):
            attributes[name] = change(module, name, value)
    for kind in ('_parameters', '_buffers'):
        attributes[kind] = {
            name: None if value is None else change(module, name, value)
            for name, value in attributes[kind].items()
        }
    attributes['_modules'] = {
        name: None if child is None else shadow(child, change)
        for name, child in module._modules.items()
    }
    vars(twin).update(attributes)
    return twin


def cast(
    module: nn.Module,
    device: Union[str, torch.device, None],
    dtype: torch.dtype,
) -> nn.Module:
    """A module that computes with copies in another dtype.

    Gradients reach the originals. See :func:`shadow`.
    """

    def convert(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(device, dtype)

    return shadow(module, convert)


def is_known(layer: nn.Module) -> bool:
    """Whether a layer computes what its weights say, and nothing else."""
    return type(layer).forward in KNOWN_FORWARDS


@contextlib.contextmanager
def fresh_weights(module: nn.Module, refuse: bool = True) -> Iterator[None]:
    """Within the context, a module has the weights that forward would use.

    ``torch.nn.utils.prune``, ``weight_norm`` and ``spectral_norm`` compute a
    weight in a hook before each forward pass; what stands there meanwhile is
    of the values before the last step of the optimizer.

    Args:
        module: A block. Other hooks on itself stay with it.
        refuse: Whether to look for what may change a submodule's output.

    Raises:
        ValueError: If another hook, or a ``forward`` put in place of a
            submodule's own, may change what the submodule computes.
    """
    stale = []
    try:
        for name, each in module.named_modules():
            if refuse and each is not module:
                _refuse_changes(name, each)
            for hook in each._forward_pre_hooks.values():
                if not computes_weight(hook):
                    continue
                attribute, weight = _weight_of(hook, each)
                stale.append((each, attribute, vars(each).get(attribute)))
                vars(each)[attribute] = weight
        yield
    finally:
        for each, attribute, weight in reversed(stale):
            vars(each)[attribute] = weight


def computes_weight(hook) -> bool:
    """Whether a forward pre-hook computes a weight of its module."""
    return isinstance(hook, (BasePruningMethod, WeightNorm, SpectralNorm))


def _weight_of(hook, module: nn.Module) -> Tuple[str, Tensor]:
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name, hook.apply_mask(module)
    if isinstance(hook, WeightNorm):
        return hook.name, hook.compute_weight(module)
    weight = hook.compute_weight(module, do_power_iteration=False)
    return hook.name, weight


def _refuse_changes(name: str, module: nn.Module) -> None:
    others = [
        hook
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
        if not computes_weight(hook)
    ]
    if 'forward' in vars(module):
        others.append(vars(module)['forward'])
    elif isinstance(module, (nn.Conv2d, _BatchNorm)) and not is_known(module):
        others.append(type(module).forward)
    if others:
        raise ValueError(
            f'{name} has a hook, or a forward of its own, which may change '
            f'what it computes, and a merged convolution has no place for '
            f'it: {others[0]!r}; remove it first. Allowed: the hooks of '
            'torch.nn.utils.prune, weight_norm and spectral_norm'
        )
