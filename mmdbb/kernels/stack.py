# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's form for large kernels: a stack of 3x3 kernels.

The deep stem of the OREPA paper (CVPR 2022, sec. 4.1) and of its code.
"""

from __future__ import annotations

import math
from typing import Any, Iterable, Tuple

from torch import Tensor, nn

from mmdbb.dimensions import CONV
from mmdbb.geometry import ConvSpec, pad_images
from mmdbb.kernels.base import ComposedKernel, empty_kernel
from mmdbb.kernels.kxk import KxKKernel
from mmdbb.transforms import compose_stack


class StackedKernel(ComposedKernel):
    """A stack of 3x3 kernels: the form for odd square kernels from 7x7 on.

    Args:
        spec: Geometry of the convolution. The kernel must be square, with an
            odd side of at least 5 taps.
        composed: Whether the 3x3 kernels are composed too, each a
            :class:`KxKKernel`. With False each is a parameter, as in
            ``OREPA_LargeConvBase`` of the paper's code.
        flip: Whether to flip the kernels when composing, which makes the
            composed kernel equal the stack of convolutions. The paper's code
            does not flip, so its checkpoints need False.

    Raises:
        TypeError: If ``flip`` is not a bool.
        ValueError: If the kernel cannot be a stack of 3x3 kernels.
    """

    _composes_again = False  # each layer does so by itself

    def __init__(
        self, spec: ConvSpec, composed: bool = True, flip: bool = False
    ) -> None:
        super().__init__(spec)
        check_flip(flip)
        self.flip = flip
        if not self.serves(spec.kernel_size):
            raise ValueError(
                'a stack of 3x3 kernels is square with an odd side of at '
                f'least 5, got kernel_size={spec.kernel_size}'
            )
        layers = (spec.kernel_size[0] - 1) // 2
        inside, layer_list = spec.in_channels, []
        for _ in range(layers):
            layer = ConvSpec(
                inside,
                spec.out_channels,
                3,
                padding=1,
                groups=spec.groups,
                dims=spec.dims,
            )
            layer_list.append(
                KxKKernel(layer) if composed else PlainKernel(layer)
            )
            inside = spec.out_channels
        self.layers = nn.ModuleList(layer_list)

    @staticmethod
    def serves(kernel_size: Tuple[int, ...]) -> bool:
        """Whether a stack of 3x3 kernels has this size.

        Args:
            kernel_size: Size in taps, in each dimension.
        """
        side = kernel_size[0]
        return {*kernel_size} == {side} and side % 2 == 1 and side >= 5

    def compose(self) -> Tensor:
        """Compose the kernel, (out, in / groups, k, k)."""
        first, *others = (layer() for layer in self.layers)
        kernel = first
        for other in others:
            kernel = compose_stack(
                kernel, other, self.spec.groups, flip=self.flip
            )
        return kernel

    def forward_branches(self, x: Tensor) -> Tensor:
        """See :meth:`ComposedKernel.forward_branches`."""
        spec = self.spec
        x = pad_images(x, spec.pads, spec.padding_mode)
        for i, layer in enumerate(self.layers):
            kernel = layer()
            if i and not self.flip:
                kernel = kernel.flip(*range(2, kernel.dim()))
            last = i == len(self.layers) - 1
            x = CONV[spec.dims](
                x,
                kernel,
                stride=spec.stride if last else 1,
                dilation=spec.dilation,
                groups=spec.groups,
            )
        return x

    def init_gamma(self, value: float) -> None:
        """Set the scales of all branches, in all layers, to one value."""
        layers: Iterable[Any] = self.layers
        for layer in layers:
            layer.init_gamma(value)

    def single_init(self) -> None:
        """In each layer, give the original kernel scale 1 and others 0."""
        layers: Iterable[Any] = self.layers
        for layer in layers:
            layer.single_init()


class PlainKernel(ComposedKernel):
    """A layer of a stack whose kernel is a parameter, not composed.

    Args:
        spec: Geometry of the convolution.
    """

    _composes_again = False

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__(spec)
        self.weight = empty_kernel(*spec.kernel_shape)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the parameter as an ``nn.Conv2d`` draws its kernel."""
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def compose(self) -> Tensor:
        """Return the parameter, (out, in / groups, kH, kW)."""
        return self.weight

    def init_gamma(self, value: float) -> None:
        """Do nothing: a plain kernel has no scales."""

    def single_init(self) -> None:
        """Do nothing: there is no branch but the original kernel."""


def check_flip(flip: bool) -> None:
    """Raise a TypeError if ``flip`` is neither True nor False."""
    if not isinstance(flip, bool):
        raise TypeError(f'flip must be True or False, got {flip!r}')
