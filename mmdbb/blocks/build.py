# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Register blocks as convolution layers, and build them from configs."""

from __future__ import annotations

import inspect
from typing import (
    Any,
    Callable,
    Dict,
    Iterable,
    Optional,
    Tuple,
    Type,
    TypeVar,
)

from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.dimensions import CONV2D, CONV_TYPES, LayerKind
from mmdbb.geometry import ConvSpec
from mmdbb.plain_conv import plain_conv
from mmdbb.ports import PORTS, ReplacedLayer
from mmdbb.registry import BLOCKS

_Block = TypeVar('_Block', bound=Type[ReparamConv2d])

#: Types of layers that are plain convolutions, and of those whose pads follow
#: from the image's size.
PLAIN_TYPES = ('Conv', 'Conv2d')
ADAPTIVE_TYPES = ('Conv2dAdaptivePadding',)
#: Types of layers of other kinds.
LAYER_KINDS = {
    'Conv1d': LayerKind(1),
    'Conv3d': LayerKind(3),
    'deconv': LayerKind(2, True),
    'deconv3d': LayerKind(3, True),
    'ConvTranspose1d': LayerKind(1, True),
    'ConvTranspose2d': LayerKind(2, True),
    'ConvTranspose3d': LayerKind(3, True),
}

_NOT_GEOMETRY = ('bias', 'device', 'dtype')
_CONV_ARGS = (
    *(
        name
        for name in inspect.signature(ConvSpec).parameters
        if name not in ('dims', 'transposed')
    ),
    *_NOT_GEOMETRY,
)


def register_conv_layer(
    name: str,
    min_kernel_size: Optional[int] = None,
    max_kernel_size: Optional[float] = None,
    force: bool = False,
) -> Callable[[_Block], _Block]:
    """Class decorator: make ``conv_cfg=dict(type=name)`` build the block.

    Args:
        name: Name of the layer in configs.
        min_kernel_size: Smallest kernel (longer side, in taps) that becomes
            a block, unless the config says otherwise; by default the class's
            own, see :attr:`ReparamConv2d.kernel_sizes`.
        max_kernel_size: Largest kernel that becomes a block, likewise.
        force: Whether to replace a block that already has the name.

    Raises:
        KeyError: If another block has the name, and ``force`` is False.
    """

    def register(block: _Block) -> _Block:
        smallest, largest = block.kernel_sizes
        block.kernel_sizes = (
            smallest if min_kernel_size is None else min_kernel_size,
            largest if max_kernel_size is None else max_kernel_size,
        )
        return BLOCKS.register_module(name, force, block)

    return register


def registered_blocks(
    kind: Optional[LayerKind] = CONV2D,
) -> Dict[str, Type[ReparamConv2d]]:
    """Names of blocks in configs -> their classes.

    Args:
        kind: The layer that the blocks stand for, ``nn.Conv2d`` by default;
            None for blocks of all kinds.
    """
    return {
        name: block
        for name, block in BLOCKS.module_dict.items()
        if kind is None or kind_of_block(block) == kind
    }


def kind_of_block(block: Type[ReparamConv2d]) -> LayerKind:
    """The layer of torch that a block stands for.

    Args:
        block: The block's class.
    """
    return LayerKind(block.dims, block.transposed)


def form_of(
    block: Type[ReparamConv2d], kind: LayerKind
) -> Type[ReparamConv2d]:
    """The form of a block for another kind of layer, such as ``DBB3d``.

    Args:
        block: The block's class, or one of its forms.
        kind: The layer of torch that the form stands for.

    Raises:
        ValueError: If no form is registered.
    """
    family = _family(block)
    forms = [family, *registered_blocks(None).values()]
    for form in forms:
        if _family(form) is family and kind_of_block(form) == kind:
            return form
    raise ValueError(
        f'{block.__name__} has no form for an {kind.name}. A subclass of '
        f'{family.__name__} with dims = {kind.dims}'
        f'{" and transposed = True" if kind.transposed else ""}, registered '
        'by register_conv_layer, would be one'
    )


def _family(block: Type[ReparamConv2d]) -> Type[ReparamConv2d]:
    """The block for pictures of which a class is a form."""
    return next(
        cls
        for cls in block.__mro__
        if issubclass(cls, ReparamConv2d) and kind_of_block(cls) == CONV2D
    )


def layer_of(block: Type[ReparamConv2d]) -> Callable[..., nn.Module]:
    """Make the function that builds a block from ``conv_cfg``.

    Args:
        block: A registered block.

    Returns:
        Callable: Takes the arguments of ``nn.Conv2d`` and of the block, and
        the limits of the kernel's size; builds the block within the limits
        and a plain convolution outside, see :func:`build_conv`. Its attribute
        ``block`` is the class.
    """
    smallest, largest = block.kernel_sizes

    def build(
        *args,
        min_kernel_size: int = smallest,
        max_kernel_size: float = largest,
        **kwargs,
    ) -> nn.Module:
        sizes = min_kernel_size, max_kernel_size
        return build_conv(block, args, kwargs, sizes)

    build.__doc__ = f'Build a {block.__name__}, see build_conv.'
    build.block = block  # type: ignore[attr-defined]  # see above
    return build


def block_of(
    config: Optional[dict], plain: bool = False
) -> Tuple[Type[nn.Module], dict]:
    """Look up the block that a config names.

    Args:
        config: Config of a block; None means ``dict(type='DBB')``. The type
            may be a class.
        plain: Whether ``Conv2d``, which is no block, is allowed too.

    Returns:
        tuple: The class, and a copy of the config. Its type is the registered
        name even if a class was given, because the limits of the kernel's
        size hold for names only.

    Raises:
        TypeError: If ``config`` is not a dict.
        ValueError: If it names no block.
    """
    if config is not None and not isinstance(config, dict):
        raise TypeError(
            f"block must be a config such as dict(type='DBB'), got {config!r}"
        )
    config = dict(config or dict(type='DBB'))
    name: Any = config.get('type')
    layer = name
    if not isinstance(name, type):
        own = BLOCKS.get(name) if name != 'Conv2d' else nn.Conv2d
        layer = own or PORTS.find_layer(str(name))
    block = getattr(layer, 'block', layer)
    kinds = (ReparamConv2d, nn.Conv2d) if plain else ReparamConv2d
    blocks = registered_blocks(None)
    if not isinstance(block, type) or not issubclass(block, kinds):
        raise ValueError(
            f'block must name a block, got type={name!r}; allowed: '
            f'{sorted(blocks)}' + (", and 'Conv2d' for none" if plain else '')
        )
    if isinstance(name, type):
        names: Dict[type, str]
        names = {known: name for name, known in blocks.items()}
        config['type'] = names.get(block, block)
    return block, config


def build_conv(
    block: Type[ReparamConv2d],
    args: tuple,
    kwargs: dict,
    kernel_sizes: Tuple[int, float],
) -> nn.Module:
    """Build a block if the kernel's size is within limits, else ``nn.Conv2d``.

    As in the DBB paper's code, 1x1 convolutions and stems with kernels from 7
    on stay plain by default.

    Args:
        block: Class of the block.
        args: Positional arguments of ``nn.Conv2d``.
        kwargs: Keyword arguments of ``nn.Conv2d`` and of the block.
        kernel_sizes: Smallest and largest kernel (longer side, in taps) that
            becomes a block: ``min_kernel_size`` and ``max_kernel_size`` of
            the layer's config.

    Raises:
        TypeError: If there are unknown keys (the message lists the allowed
            ones), or a limit is not a number.
        ValueError: If a value is not allowed.
    """
    refuse_unknown_keys(block, kwargs)
    replaced = PORTS.replaced_layer(block)
    block = _form_for(block, replaced, args, kwargs)
    kind = kind_of_block(block)
    if keeps_adaptive(block, replaced):
        kwargs = dict(dict(adaptive_padding=True), **kwargs)
    parameters = inspect.signature(CONV_TYPES[kind]).parameters
    conv_args = dict(zip(parameters, args))
    conv_args.update({k: kwargs[k] for k in _CONV_ARGS if k in kwargs})
    plain = {k: conv_args.pop(k) for k in _NOT_GEOMETRY if k in conv_args}
    if kwargs.get('adaptive_padding'):
        conv_args['padding'] = 'adaptive'
    spec = ConvSpec(**conv_args, dims=kind.dims, transposed=kind.transposed)
    low, high = kernel_sizes
    for name, size in (('min_kernel_size', low), ('max_kernel_size', high)):
        if not isinstance(size, (int, float)) or isinstance(size, bool):
            raise TypeError(f'{name} must be a number of taps, got {size!r}')
    if low <= max(spec.kernel_size) <= high:
        if replaced.spectral:
            raise ValueError(
                f'with_spectral_norm=True of {replaced.owner} normalises the '
                f'weight of its convolution, which a {block.__name__} does '
                'not hold: leave it out of conv_cfg there, or train without '
                'the spectral norm'
            )
        return block(*args, **kwargs)
    return plain_conv(spec, **dict(dict(bias=True), **plain))


def _form_for(
    block: Type[ReparamConv2d],
    replaced: ReplacedLayer,
    args: tuple,
    kwargs: dict,
) -> Type[ReparamConv2d]:
    """The form of a block that a network needs, by its kernel or its default.

    A name such as ``DBB3d`` asks for that form wherever it stands.
    """
    own = kind_of_block(block)
    if own != CONV2D:
        return block
    kind = LAYER_KINDS.get(replaced.type.rpartition('.')[2], own)
    size = kwargs.get('kernel_size', args[2] if len(args) > 2 else None)
    if isinstance(size, (tuple, list)) and len(size) in (1, 3):
        kind = LayerKind(len(size), kind.transposed)
    return form_of(block, kind)


def keeps_adaptive(
    block: Type[ReparamConv2d], replaced: ReplacedLayer
) -> bool:
    """Whether a block has to pad by the image, as the layer it replaces does.

    Args:
        block: Class of the block.
        replaced: The layer that the network has by default.

    Raises:
        ValueError: If a block cannot stand in for that layer.
    """
    kind = replaced.type.rpartition('.')[2]
    if kind in ADAPTIVE_TYPES:
        return kind_of_block(block) == CONV2D
    if kind in PLAIN_TYPES or kind in LAYER_KINDS or kind in BLOCKS:
        return False
    reason = 'a block computes a convolution of torch, and no other layer'
    raise ValueError(
        f'{replaced.owner} has convolutions of type {replaced.type!r} by '
        f'default, for which a {block.__name__} cannot stand: {reason}. '
        'Leave conv_cfg out there'
    )


def block_arguments(block: Type[ReparamConv2d]) -> Tuple[str, ...]:
    """Names of all arguments of a block's constructor.

    Those that it passes on to its base classes are included.

    Args:
        block: Class of the block.
    """
    names = []
    for cls in block.__mro__:
        if not issubclass(cls, ReparamConv2d):
            continue
        for name, p in inspect.signature(cls.__init__).parameters.items():
            named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
            if named and name != 'self' and name not in names:
                names.append(name)
    return tuple(names)


def refuse_unknown_keys(
    block: Type[ReparamConv2d], keys: Iterable[str]
) -> None:
    """Raise a TypeError if a block takes no arguments of these names.

    Args:
        block: The block's class.
        keys: Names of arguments, such as the keys of its config.
    """
    allowed = block_arguments(block)
    unknown = sorted(set(keys) - set(allowed))
    if unknown:
        raise TypeError(
            f'{block.__name__} got unknown keys {unknown}; allowed: '
            f'{[*allowed, "min_kernel_size", "max_kernel_size"]}'
        )
