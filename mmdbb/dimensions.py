# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""torch's layers and functions by the number of dimensions of their images.

An image has one dimension (a sound, the time of a pose), two (a picture) or
three (a video, a volume). torch has a class for each. All that is written
about geometry and algebra in this package holds for any number of them, and
asks here for the class or the function of torch.
"""

from __future__ import annotations

from typing import Any, Callable, Dict, NamedTuple, Optional, Tuple, Type

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd


class LayerKind(NamedTuple):
    """What a convolution is, apart from its numbers.

    Attributes:
        dims: Number of dimensions of the images: 1, 2 or 3.
        transposed: Whether it is a transposed convolution.
    """

    dims: int = 2
    transposed: bool = False

    @property
    def name(self) -> str:
        """Name of torch's class, such as ``nn.Conv3d``."""
        return f'nn.{CONV_TYPES[self].__name__}'


#: The kind of ``nn.Conv2d``.
CONV2D = LayerKind()
#: Kind -> torch's class, a _ConvNd with a constructor unlike its base's.
CONV_TYPES: Dict[LayerKind, Any] = {
    LayerKind(1): nn.Conv1d,
    LayerKind(2): nn.Conv2d,
    LayerKind(3): nn.Conv3d,
    LayerKind(1, True): nn.ConvTranspose1d,
    LayerKind(2, True): nn.ConvTranspose2d,
    LayerKind(3, True): nn.ConvTranspose3d,
}
#: All of torch's convolutions, for ``isinstance``.
CONVS: Tuple[Type[_ConvNd], ...] = tuple(CONV_TYPES.values())
#: Names of what each of them has in its ``__dict__``. On the device ``meta``
#: no random numbers are drawn for the weight.
ATTRIBUTES = frozenset(vars(nn.Conv2d(1, 1, 1, device='meta')))
#: Those that read their input through a kernel, for ``isinstance``.
FORWARD_CONVS: Tuple[Type[_ConvNd], ...] = CONVS[:3]
#: Those that spread their input by a kernel, for ``isinstance``.
TRANSPOSED_CONVS: Tuple[Type[_ConvNd], ...] = CONVS[3:]
#: Number of dimensions -> torch's batch norm.
NORM_TYPES: Dict[int, Type[_BatchNorm]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}

#: Number of dimensions -> torch's functions.
CONV: Dict[int, Callable[..., Tensor]] = {
    1: F.conv1d,
    2: F.conv2d,
    3: F.conv3d,
}
CONV_TRANSPOSE: Dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
AVG_POOL: Dict[int, Callable[..., Tensor]] = {
    1: F.avg_pool1d,
    2: F.avg_pool2d,
    3: F.avg_pool3d,
}


def per_channel(values: Tensor, dims: int) -> Tensor:
    """Shape one value a channel so that it broadcasts over images.

    Args:
        values: Shape (channels,).
        dims: Number of dimensions of the images.

    Returns:
        Tensor: Shape (channels, 1, ...), with ``dims`` ones.
    """
    return values.reshape(-1, *[1] * dims)


def kind_of(layer: nn.Module) -> Optional[LayerKind]:
    """The kind of one of torch's convolutions; None for other layers.

    Args:
        layer: An instance of one of :data:`CONVS`, or of a subclass.
    """
    for kind, conv_type in CONV_TYPES.items():
        if isinstance(layer, conv_type):
            return kind
    return None


#: What a class may have of its own without computing anything else.
_HARMLESS = {
    '__init__',
    '__module__',
    '__doc__',
    '__qualname__',
    '__annotations__',
    '__firstlineno__',
    '__static_attributes__',
}


def is_torchs_conv(layer: nn.Module) -> bool:
    """Whether a layer computes one of torch's convolutions and has no more.

    That is an instance of one of :data:`CONVS`, or of a subclass that has
    another constructor and static methods only, as torchvision's
    ``Conv3DSimple`` of its video ResNets.

    Args:
        layer: Any layer.

    Examples:
        >>> class Wide(nn.Conv2d):
        ...     def __init__(self, channels):
        ...         super().__init__(channels, channels, 3)
        >>> is_torchs_conv(Wide(4)), is_torchs_conv(nn.Linear(4, 4))
        (True, False)
    """
    kind, own = kind_of(layer), type(layer)
    if kind is None or own in CONVS:
        return kind is not None
    torchs = CONV_TYPES[kind]
    for cls in own.__mro__:
        if cls in torchs.__mro__:
            continue
        for name, value in vars(cls).items():
            if name in _HARMLESS:
                continue
            if not isinstance(value, staticmethod) or hasattr(torchs, name):
                return False
    return (
        vars(layer).keys() == ATTRIBUTES
        and vars(layer)['_parameters'].keys() == {'weight', 'bias'}
        and not vars(layer)['_buffers']
        and not vars(layer)['_modules']
    )
