# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What composes a kernel at every forward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmdbb.geometry import ConvSpec
from mmdbb.modules import is_watched, tensors_of
from mmdbb.recompute import again, is_transformed, without_autocast


class ComposedKernel(nn.Module):
    """Base: calling it composes the kernel, (out, in / groups, kH, kW).

    Args:
        spec: Geometry of the convolution.
    """

    # Whether composing computes more than it is worth to keep.
    _composes_again = True

    def __init__(self, spec: ConvSpec) -> None:
        super().__init__()
        self.spec = spec

    def forward(self) -> Tensor:
        """The kernel, differentiable, in the parameters' own precision.

        What composing computes on the way is computed again in the backward
        pass; the parameters alone are kept.
        """
        # Under autocast only the convolution that reads it is in half.
        with without_autocast(next(tensors_of(self)).device):
            if (
                is_transformed()
                or is_watched(self)
                or not self._composes_again
            ):
                return self.compose()
            return again(lambda kernel: kernel.compose(), module=self)

    def compose(self) -> Tensor:
        """The kernel."""
        raise NotImplementedError

    def forward_branches(self, x: Tensor) -> Tensor:
        """The branches' own convolutions on images, summed: a reference.

        It computes what one convolution with :meth:`compose`'s kernel does,
        in another way, for tests and for verification.

        Args:
            x: Images of shape (N, in, H, W).

        Returns:
            Tensor: Shape (N, out, H', W').
        """
        raise NotImplementedError

    @torch.no_grad()
    def init_gamma(self, value: float) -> None:
        """Set all scales of the branches."""
        self.scale.fill_(value)

    @torch.no_grad()
    def single_init(self) -> None:
        """Start as the original kernel alone: scales 1, 0, 0, ..."""
        self.init_gamma(0.0)
        self.scale[0].fill_(1.0)

    def _kernel(self, *shape: int, a: float = 0.0) -> nn.Parameter:
        kernel = nn.Parameter(torch.empty(*shape))
        nn.init.kaiming_uniform_(kernel, a=a)
        return kernel


def check_internal_channels(internal_channels: int, spec: ConvSpec) -> None:
    """Check the width between a 1x1 and a KxK kernel.

    Raises:
        ValueError: If it is not a positive multiple of the groups.
    """
    if (
        not isinstance(internal_channels, int)
        or isinstance(internal_channels, bool)
        or internal_channels < 1
        or internal_channels % spec.groups
    ):
        raise ValueError(
            'internal_channels must be a positive multiple of groups='
            f'{spec.groups}, got {internal_channels!r}'
        )
