# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a module holds besides its code: tensors, and hooks that act on it."""

from __future__ import annotations

import contextlib
from typing import Iterator, Tuple, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

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


@contextlib.contextmanager
def cast(
    module: nn.Module, device: Union[str, torch.device], dtype: torch.dtype
) -> Iterator[None]:
    """Within the context, a module computes with copies in another dtype.

    Copying the module itself, with all that Python keeps of it, takes longer
    than composing a kernel. Gradients reach the originals.
    """
    before = [
        (tensors, dict(tensors))
        for each in module.modules()
        for tensors in (each._parameters, each._buffers)
    ]
    try:
        for tensors, originals in before:
            for name, tensor in originals.items():
                if tensor is not None and tensor.is_floating_point():
                    tensors[name] = tensor.to(device, dtype)
        yield
    finally:
        for tensors, originals in before:
            tensors.update(originals)


@contextlib.contextmanager
def fresh_weights(module: nn.Module) -> Iterator[None]:
    """Within the context, a module has the weights that forward would use.

    ``torch.nn.utils.prune``, ``weight_norm`` and ``spectral_norm`` compute a
    weight in a hook before each forward pass; what stands there meanwhile is
    of the values before the last step of the optimizer.

    Args:
        module: A block. Hooks on itself stay with it and are not looked at.

    Raises:
        ValueError: If another hook, or a ``forward`` put in place of a
            submodule's own, may change what the submodule computes.
    """
    stale = []
    try:
        for name, each in module.named_modules():
            if each is module:
                continue
            _refuse_changes(name, each)
            for hook in each._forward_pre_hooks.values():
                attribute, weight = _weight_of(hook, each)
                stale.append((each, attribute, vars(each).get(attribute)))
                vars(each)[attribute] = weight
        yield
    finally:
        for each, attribute, weight in reversed(stale):
            vars(each)[attribute] = weight


def _weight_of(hook, module: nn.Module) -> Tuple[str, Tensor]:
    if isinstance(hook, BasePruningMethod):
        return hook._tensor_name, hook.apply_mask(module)
    if isinstance(hook, WeightNorm):
        return hook.name, hook.compute_weight(module)
    weight = hook.compute_weight(module, do_power_iteration=False)
    return hook.name, weight


def _refuse_changes(name: str, module: nn.Module) -> None:
    known = (BasePruningMethod, WeightNorm, SpectralNorm)
    others = [
        hook
        for hooks in (module._forward_hooks, module._forward_pre_hooks)
        for hook in hooks.values()
        if not isinstance(hook, known)
    ]
    if 'forward' in vars(module):
        others.append(vars(module)['forward'])
    elif isinstance(module, nn.Conv2d) and (
        type(module).forward is not nn.Conv2d.forward
    ):
        others.append(type(module).forward)
    if others:
        raise ValueError(
            f'{name} has a hook, or a forward of its own, which may change '
            f'what it computes, and a merged convolution has no place for '
            f'it: {others[0]!r}; remove it first. Allowed: the hooks of '
            'torch.nn.utils.prune, weight_norm and spectral_norm'
        )
