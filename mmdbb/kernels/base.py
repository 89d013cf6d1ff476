# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The base class of composed kernels."""

from __future__ import annotations

from numbers import Integral
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mmdbb.geometry import ConvSpec
from mmdbb.modules import (
    in_layout,
    is_watched,
    memory_format_of,
    reset_children_,
    tensors_of,
)
from mmdbb.recompute import again, is_transformed, without_autocast


class ComposedKernel(nn.Module):
    """Base of all composed kernels. Calling one composes its kernel.

    Args:
        spec: Geometry of the convolution.
    """

    if TYPE_CHECKING:
        scale: nn.Parameter  # of all but stacks, a row for each branch

    # Whether the backward pass composes again, which saves the memory of the
    # intermediate results.
    _composes_again = True

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self) -> Tensor:
        """Compose the kernel, in the precision of the parameters.

        Autograd keeps the parameters only; the backward pass computes
        intermediate results again.

        Returns:
            Tensor: Shape (out, in / groups, kH, kW), differentiable.
        """
        # Under autocast only the convolution with this kernel runs in half.
        with without_autocast(next(tensors_of(self)).device):
            if (
                is_transformed()
                or is_watched(self)
                or not self._composes_again
            ):
                kernel = self.compose()
            else:
                kernel = again(lambda kernel: kernel.compose(), module=self)
            return in_layout(kernel, memory_format_of(self))

    def compose(self) -> Tensor:
        """Compose the kernel, (out, in / groups, kH, kW)."""
        raise NotImplementedError

    def forward_branches(self, x: Tensor) -> Tensor:
        """Run each branch's own convolutions on images, and sum the outputs.

        The result equals one convolution with the composed kernel, but no
        kernel is composed. Tests and verification compare the two.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        raise NotImplementedError

    @torch.no_grad()
    def init_gamma(self, value: float) -> None:
        """Set the scales of all branches to one value."""
        self.scale.fill_(value)

    @torch.no_grad()
    def single_init(self) -> None:
        """Give the original kernel scale 1, and all other branches 0."""
        self.init_gamma(0.0)
        self.scale[0].fill_(1.0)

    def reset_parameters(self) -> None:
        """Give all tensors their start values, constants too."""
        reset_children_(self)


def empty_kernel(*shape: int) -> nn.Parameter:
    """A parameter without values, for ``reset_parameters`` to fill.

    Args:
        shape: Its shape, (out, in / groups, kH, kW).
    """
    return nn.Parameter(torch.empty(*shape))


def check_internal_channels(internal_channels: int, spec: ConvSpec) -> None:
    """Check the number of channels between a 1x1 and a KxK kernel.

    Args:
        internal_channels: The number to check.
        spec: Geometry of the convolution.

    Raises:
        ValueError: If it is not a positive multiple of the groups.
    """
    if (
        not isinstance(internal_channels, Integral)
        or isinstance(internal_channels, bool)
        or internal_channels < 1
        or internal_channels % spec.groups
    ):
        raise ValueError(
            'internal_channels must be a positive multiple of groups='
            f'{spec.groups}, got {internal_channels!r}'
        )
