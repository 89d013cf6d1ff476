# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Small questions about any module: its tensors, hooks, mode and outputs."""

from __future__ import annotations

import contextlib
import functools
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Iterator,
    List,
    Set,
    Tuple,
    TypeVar,
    Union,
)

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from mmdbb.dimensions import CONVS
from mmdbb.scale_norm import ScaleNorm

_Module = TypeVar('_Module', bound=nn.Module)

#: The forward methods of torch's own convolutions and norms, and of the norm
#: in blocks without shift. A layer with one of these computes what its weights
#: say; a subclass may override it.
KNOWN_FORWARDS = (
    *(conv.forward for conv in CONVS),
    _BatchNorm.forward,
    nn.SyncBatchNorm.forward,
    ScaleNorm.forward,
)

#: Layers that normalise their input. Some more are known by their class's
#: name only, see :func:`is_frozen_norm`.
_NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)

# Every kind of hook that torch calls when a module's forward runs.
_HOOKS = (
    '_forward_hooks',
    '_forward_pre_hooks',
    '_backward_hooks',
    '_backward_pre_hooks',
)


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """All tensors that a module computes with.

    These are parameters, buffers, and tensors that are plain attributes. Hooks
    that compute a weight (``weight_norm``) store it as an attribute, and
    ``nn.DataParallel``'s replicas hold all of their weights so.
    """
    for each in module.modules():
        attributes = vars(each)
        for tensors in (each._parameters, each._buffers, attributes):
            for tensor in tensors.values():
                if isinstance(tensor, Tensor):
                    yield tensor


def count_parameters(model: nn.Module) -> int:
    """How many numbers the parameters of a model hold."""
    return sum(parameter.numel() for parameter in model.parameters())


def named_values(
    name: str, value: Any, separator: str = '.', unwrap: bool = False
) -> Iterator[Tuple[str, Any]]:
    """All values inside nested tuples, lists and dicts, with flat names.

    Args:
        name: Name of the whole.
        value: What a model returned: a tensor, or containers of tensors.
        separator: Stands between a container's name and the key or position
            of an item in it.
        unwrap: Whether the only item of a tuple takes the tuple's name,
            because many networks return their one output as a tuple.

    Yields:
        tuple: A name, and a value that is no container.

    Examples:
        >>> list(named_values('out', (1, {'a': 2})))
        [('out.0', 1), ('out.1.a', 2)]
    """
    items: Iterable[Tuple[Any, Any]]
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        yield name, value
        return
    single = unwrap and isinstance(value, tuple) and len(value) == 1
    for key, item in items:
        inner = name if single else f'{name}{separator}{key}'
        yield from named_values(inner, item, separator, unwrap)


@contextlib.contextmanager
def in_eval_mode(*models: nn.Module) -> Iterator[None]:
    """Put models into eval mode, and each module back into its own on exit.

    Sets ``training`` instead of calling ``eval()`` and ``train()``, which
    models override: a frozen backbone of OpenMMLab puts its norms into eval
    mode again in ``train()``, whatever mode they were in before.

    Args:
        models: The models. All of their modules are switched.
    """
    modes = {m: m.training for model in models for m in model.modules()}
    try:
        for module in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def sync_norms_in_any_precision(*models: nn.Module) -> Iterator[None]:
    """Within the context, sync norms of other packages run in float64 too.

    mmdet3d's ``NaiveSyncBatchNorm2d``, for one, asserts float32. In eval mode
    such a norm shares nothing with other processes. So where it refuses its
    input, torch's class that it derives from computes instead, provided that
    in float32 both compute the same.

    Args:
        models: The models, in eval mode.
    """
    changed = []
    for module in (each for model in models for each in model.modules()):
        own = vars(module)
        bases = [c for c in type(module).__mro__ if c in _BATCH_NORMS]
        # Only the name tells, because packages share no class of such norms.
        named = 'Sync' in type(module).__name__
        if not (named and bases) or module.training or 'forward' in own:
            continue
        if type(module).forward not in KNOWN_FORWARDS:
            own['forward'] = functools.partial(_or_base, module, bases[0])
            changed.append(own)
    try:
        yield
    finally:
        for own in changed:
            own.pop('forward', None)


_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _or_base(norm: Any, base: Any, x: Tensor, *args: Any) -> Tensor:
    """A norm's own forward, or that of a base where it refuses its input."""
    try:
        return type(norm).forward(norm, x, *args)
    except (AssertionError, RuntimeError):
        single = cast(norm, None, torch.float32)
        expected = type(norm).forward(single, x.float(), *args)
        if not torch.allclose(base.forward(single, x.float()), expected):
            raise
        return base.forward(norm, x)


@contextlib.contextmanager
def modules_that_run(model: nn.Module) -> Iterator[Set[nn.Module]]:
    """Within the context, collect the modules that run.

    Args:
        model: The model to watch.
    """
    ran: Set[nn.Module] = set()
    hooks = [
        module.register_forward_pre_hook(lambda m, _: ran.add(m))
        for module in model.modules()
    ]
    try:
        yield ran
    finally:
        for hook in hooks:
            hook.remove()


def is_norm(module: object) -> bool:
    """Whether a module is a norm, of whatever kind."""
    return isinstance(module, _NORMS) or is_frozen_norm(module)


def is_frozen_norm(module: object) -> bool:
    """Whether a module is a ``FrozenBatchNorm2d``.

    torchvision, detectron2 and DETR have a class of this name each: a batch
    norm of buffers only, which no common base class tells.
    """
    named = any(c.__name__ == 'FrozenBatchNorm2d' for c in type(module).mro())
    return named and getattr(module, 'running_mean', None) is not None


def takes_bias(norm: object) -> bool:
    """Whether a norm subtracts a running mean, so that a bias folds into it.

    In eval mode ``mean -= bias`` then does the same as adding the bias to the
    norm's input.
    """
    tracks = isinstance(norm, _NormBase) and norm.running_mean is not None
    return tracks or is_frozen_norm(norm)


def drops_bias(norm: object) -> bool:
    """Whether a norm subtracts the mean of its own input, channel by channel.

    What was added to a channel of the input is then gone from the output.
    """
    return isinstance(norm, _NormBase) and norm.running_mean is None


def names_of(model: nn.Module) -> Dict[nn.Module, List[str]]:
    """All modules of a model, each with all names under which it stands."""
    names: Dict[nn.Module, List[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def is_replica(module: nn.Module) -> bool:
    """Whether ``nn.DataParallel`` made this copy of a module for one batch."""
    return getattr(module, '_is_replica', False)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks, which see or change its inputs or outputs.

    Hooks inside it do not count, see :func:`is_watched`.
    """
    return any(getattr(module, kind) for kind in _HOOKS)


def is_watched(module: nn.Module) -> bool:
    """Whether anything sees or changes what happens inside a module.

    That is a hook on one of its submodules, a ``forward`` that was assigned to
    a submodule, or a parametrization anywhere. A parametrization counts
    because reading its weight may have an effect: each read of a weight with
    a spectral norm takes a step of the power iteration.
    """
    return is_parametrized(module) or any(
        has_hooks(each) or 'forward' in vars(each) or is_parametrized(each)
        for each in module.modules()
        if each is not module
    )


def shadow(
    module: _Module, change: Callable[[nn.Module, str, Tensor], Tensor]
) -> _Module:
    """Make a module of the same structure that computes with other tensors.

    Only the dicts that hold tensors and children are new. ``copy.deepcopy``
    would take longer than composing a kernel does, and other threads would
    see tensors that were put into the module itself.

    Args:
        module: The module; unchanged.
        change: Gets a submodule, the name of a tensor in it and the tensor;
            returns the tensor that takes its place.

    Returns:
        nn.Module: The twin, of the same class. It shares all else with
        ``module``, so use it at once and do not keep it.
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
    module: _Module,
    device: Union[str, torch.device, None],
    dtype: torch.dtype,
) -> _Module:
    """Make a module that computes with copies of another dtype.

    Gradients flow through the copies to the original tensors.

    Args:
        module: The module; unchanged.
        device: Device of the copies; None for that of the originals.
        dtype: Precision of the copies. Integers keep theirs.

    Returns:
        nn.Module: The twin, see :func:`shadow`.
    """

    def convert(owner: nn.Module, name: str, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        return tensor.to(device, dtype)

    return shadow(module, convert)


def is_known(layer: nn.Module) -> bool:
    """Whether a layer has the forward of torch's own convolution or norm."""
    return type(layer).forward in KNOWN_FORWARDS


@contextlib.contextmanager
def fresh_weights(module: nn.Module, refuse: bool = True) -> Iterator[None]:
    """Within the context, a module has the weights of its next forward pass.

    ``torch.nn.utils.prune``, ``weight_norm`` and ``spectral_norm`` compute a
    weight in a hook before each forward pass. Between two passes the weight
    is stale: it was computed before the optimizer's last step.

    Args:
        module: A block. Hooks on the block itself are not looked at.
        refuse: Whether to raise if something else may change the output of a
            submodule.

    Raises:
        ValueError: If another hook, or a ``forward`` that was assigned to a
            submodule, may change the submodule's output.
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


def why_not_merged(block: nn.Module) -> str:
    """Why a block cannot be merged as it stands; empty if it can.

    Args:
        block: A block, or any module.
    """
    try:
        for name, each in block.named_modules():
            if each is not block:
                _refuse_changes(name, each)
    except ValueError as error:
        return str(error)
    return ''


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
    elif isinstance(module, (*CONVS, _BatchNorm)) and not is_known(module):
        others.append(type(module).forward)
    if others:
        raise ValueError(
            f'{name} has a hook, or a forward of its own, which may change '
            f'what it computes, and a merged convolution has no place for '
            f'it: {others[0]!r}; remove it first. Allowed: the hooks of '
            'torch.nn.utils.prune, weight_norm and spectral_norm'
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """Take a network out of its wrappers for several GPUs or augmentation.

    Args:
        model: The network, or a module that holds it as ``module``; what
            ``torch.compile`` made of either, too.
    """
    model = uncompiled(model)
    inner = getattr(model, 'module', None)
    while isinstance(inner, nn.Module):
        model = uncompiled(inner)
        inner = getattr(model, 'module', None)
    return model


def uncompiled(model: nn.Module) -> nn.Module:
    """The network that ``torch.compile`` wrapped; itself if it is not so.

    Args:
        model: The network; both have the same parameters.
    """
    inner = vars(model).get('_modules', {}).get('_orig_mod')
    return model if inner is None else inner


@torch.no_grad()
def reset_children_(module: nn.Module) -> None:
    """Reset all layers inside a module, in the order they were built in.

    Args:
        module: The module, whose own tensors stay.
    """
    children: Iterator[Any] = module.children()
    for child in children:
        if hasattr(child, 'reset_parameters'):
            child.reset_parameters()
        else:
            reset_children_(child)


def memory_format_of(module: nn.Module) -> torch.memory_format:
    """The layout of a module's kernels: channels last, or contiguous.

    Args:
        module: A block or a convolution.
    """
    for tensor in tensors_of(module):
        last = _CHANNELS_LAST.get(tensor.dim())
        if last is not None and not tensor.is_contiguous():
            return (
                last
                if tensor.is_contiguous(memory_format=last)
                else (torch.contiguous_format)
            )
    return torch.contiguous_format


#: Dimensions of a kernel -> its layout with channels last.
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def in_layout(kernel: Tensor, layout: torch.memory_format) -> Tensor:
    """A computed kernel with the strides that a parameter would have.

    A 1x1 kernel has both layouts at once. Then torch chooses the layout of a
    convolution's output by the kernel's strides, and these must not depend on
    how the kernel was computed: ``y.view(...)`` works in one layout only.

    Args:
        kernel: The kernel.
        layout: What :func:`memory_format_of` returned.
    """
    kernel = kernel.contiguous(memory_format=layout)
    if layout is torch.contiguous_format:
        return kernel.flatten().view(kernel.shape)
    return kernel


def to_layout_(module: nn.Module, layout: torch.memory_format) -> None:
    """Give the kernels of a module a layout, in place.

    Args:
        module: A block or a convolution.
        layout: What :func:`memory_format_of` returned.
    """
    for tensor in tensors_of(module):
        if layout is _CHANNELS_LAST.get(tensor.dim()):
            tensor.data = tensor.data.contiguous(memory_format=layout)


def small_size(layer: nn.Module) -> List[int]:
    """Size of a small image on which a layer shows what it does.

    Its output has pixels with and without a border.

    Args:
        layer: A convolution of torch or a block.

    Returns:
        list: Pixels in each dimension, such as height and width.
    """
    of: Any = layer
    return [
        2 * d * k + s
        for d, k, s in zip(of.dilation, of.kernel_size, of.stride)
    ]
