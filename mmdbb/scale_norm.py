# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""A batch norm that scales and does not shift, so that merging adds no bias.

With a batch of pixels x of one channel it computes

.. math:: y = \gamma x / \sqrt{E[x^2] + \epsilon}

A batch norm divides by the root of :math:`E[(x - E[x])^2]` after it subtracted
the mean, and adds :math:`\beta`. Here nothing is subtracted and nothing is
added, so a zero stays zero: the border behind the norm is zero, and a sum of
such branches is a convolution without a bias. Dividing by the standard
deviation without subtracting the mean would leave outputs of any size where
the mean is large; the root mean square bounds them. Zhang and Sennrich, "Root
Mean Square Layer Normalization", NeurIPS 2019
(https://arxiv.org/abs/1910.07467), drop the mean in the same way; their
average runs over channels, this one over the batch.
"""

from __future__ import annotations

from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class ScaleNorm(_BatchNorm):
    """A batch norm without mean and bias, see the module's docstring.

    The classes below are each a ``BatchNorm1d``, ``2d`` or ``3d`` too, so that
    trainers freeze, average and decay them like one. ``running_var`` is the
    running mean square. ``running_mean`` is always zero and not in the state
    dict, so that weights of a norm with a shift do not load by mistake.

    Args:
        num_features: Number of channels.
        eps: Added to the mean square.
        momentum: Share of a batch in the running mean square; None averages
            over all batches.
        affine: Whether there is a weight (gamma).

    Shape:
        - Input and output: (N, num_features, H, W), of as many dimensions as
          the batch norm takes.
    """

    #: Whether the mean square is shared with other processes. They share it
    #: where the norm runs inside a block.
    synchronized = False
    #: The processes that share it; None for all.
    process_group: Optional[Any] = None

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: Optional[float] = 0.1,
        affine: bool = True,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine)
        self.register_parameter('bias', None)
        zero = self.running_mean
        self.register_buffer('running_mean', zero, persistent=False)

    @classmethod
    def like(cls, norm: _BatchNorm, dims: int = 2) -> ScaleNorm:
        """Build one with the settings of a batch norm.

        Args:
            norm: The batch norm. If it is a SyncBN, the result shares its
                mean square with the same processes.
            dims: Number of dimensions of the images.
        """
        new = SCALE_NORMS[dims](
            norm.num_features, norm.eps, norm.momentum, norm.affine
        )
        if norm.affine:
            new.weight.requires_grad_(norm.weight.requires_grad)
        new.synchronize_like(norm)
        return new

    def synchronize_like(self, norm: Optional[nn.Module]) -> None:
        """Share the mean square with the processes of another norm.

        Args:
            norm: A SyncBN of torch or of mmcv; any other norm changes nothing.
        """
        if not is_sync_norm(norm):
            return
        self.synchronized = True
        group = getattr(norm, 'group', None)  # mmcv's name for it
        self.process_group = getattr(norm, 'process_group', group)

    def reset_parameters(self) -> None:
        """Set weights to one, and forget the running mean square."""
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        """Divide by the root mean square, of the batch or in eval mode so far.

        Args:
            x: Images of shape (N, num_features, H, W), of as many dimensions
                as the batch norm takes.
        """
        if not self.training:
            return super().forward(x)  # whose mean is zero
        self._check_input_dim(x)
        near = torch.promote_types(x.dtype, torch.float32)
        over = (0, *range(2, x.dim()))
        # Unlike x.square() in float32 this keeps no copy of half images.
        root = torch.linalg.vector_norm(x, dim=over, dtype=near)
        square = root.square() / max(x.numel() // self.num_features, 1)
        self.update_(square)
        scale = (square + self.eps).rsqrt()
        if self.weight is not None:
            scale = scale * self.weight.to(near)
        return (x * scale.reshape(-1, *[1] * (x.dim() - 2))).to(x.dtype)

    @torch.no_grad()
    def update_(self, square: Tensor) -> None:
        """Move the running mean square towards that of a batch.

        Args:
            square: Mean square of each channel, shape (num_features,).
        """
        own: Any = self  # it always has running statistics
        own.num_batches_tracked.add_(1)
        momentum = self.momentum
        if momentum is None:  # cumulative average
            momentum = 1 / own.num_batches_tracked.item()
        own.running_var.lerp_(square.to(own.running_var.dtype), momentum)


class ScaleNorm1d(ScaleNorm, nn.BatchNorm1d):
    """A :class:`ScaleNorm` for images (N, C, L)."""


class ScaleNorm2d(ScaleNorm, nn.BatchNorm2d):
    """A :class:`ScaleNorm` for images (N, C, H, W).

    Examples:
        >>> norm = ScaleNorm2d(2)
        >>> norm(torch.full((1, 2, 3, 3), 5.0)).mean().round().item()
        1.0
    """


class ScaleNorm3d(ScaleNorm, nn.BatchNorm3d):
    """A :class:`ScaleNorm` for images (N, C, T, H, W)."""


#: Number of dimensions of the images -> the norm.
SCALE_NORMS = {1: ScaleNorm1d, 2: ScaleNorm2d, 3: ScaleNorm3d}


def is_sync_norm(norm: Optional[nn.Module]) -> bool:
    """Whether a norm is torch's SyncBN, or mmcv's, which subclasses nothing.

    Args:
        norm: The norm.
    """
    return type(norm).__name__ == 'SyncBatchNorm' or isinstance(
        norm, nn.SyncBatchNorm
    )
