# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The branch ``orepa``: a convolution with a composed kernel, and a norm.

Hu et al., "Online Convolutional Re-parameterization", CVPR 2022, sec. 4.2
(https://arxiv.org/abs/2204.00826): the dense branch of RepVGG's block.
"""

from __future__ import annotations

from typing import Optional

from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import Branch, fuse_kernel_norm
from mmdbb.branches.norm import run_norm
from mmdbb.geometry import ConvSpec, convolve
from mmdbb.kernels import KxKKernel
from mmdbb.registry import BRANCHES
from mmdbb.transforms import KernelBias


@BRANCHES.register_module(name='orepa')
class ComposedKxK(Branch):
    """A convolution with OREPA's composed kernel, and a norm.

    The composed kernel is the attribute ``generator``: names in checkpoints
    hold this word.

    Args:
        spec: Geometry of the block's convolution.
        norm_cfg: Config of the norm, ``dict(type='BN')`` if None.
        internal_channels: Channels between the 1x1 and the KxK of the
            kernel's branch of both. By default as many as the input has;
            twice as many with more than four groups.

    Raises:
        ValueError: If ``internal_channels`` is not a positive multiple of the
            groups.
    """

    is_dense = True

    def __init__(
        self,
        spec: ConvSpec,
        norm_cfg: Optional[dict] = None,
        internal_channels: Optional[int] = None,
    ) -> None:
        super().__init__(spec, norm_cfg)
        self.norm = self._norm(spec.out_channels)
        self.generator = KxKKernel(spec, internal_channels, with_1x1=False)

    requirement = 'a convolution that is not transposed'

    @classmethod
    def supports(cls, spec: ConvSpec) -> bool:
        return not spec.transposed

    def set_spec(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.set_spec`."""
        super().set_spec(spec)
        self.generator.spec = spec

    def take_size(self, spec: ConvSpec) -> None:
        """See :meth:`Branch.take_size`."""
        super().take_size(spec)
        self.generator.spec = spec

    @property
    def last_norm(self) -> _BatchNorm:
        return self.norm

    @property
    def kernel(self) -> Tensor:
        """Shape (out, in / groups, kH, kW), composed anew each time."""
        return self.generator()

    def forward(self, x: Tensor) -> Tensor:
        y = convolve(x, self.kernel, None, self.spec)
        return run_norm(self.norm, y)

    def equivalent_kernel_bias(self) -> KernelBias:
        return fuse_kernel_norm(self.kernel, self.norm)
