# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's blocks under the names and with the arguments of the paper's code.

For models in plain PyTorch that were written against its repository
(https://github.com/JUGGHM/OREPA_CVPR2022): change the import, keep the rest.
State dicts of the originals load as they are.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Callable, Optional

import torch
from torch import Tensor, nn

from mmdbb.blocks.base import refuse_merged
from mmdbb.blocks.composed import ComposedKernelConv2d
from mmdbb.blocks.orepa import OREPARepVGG
from mmdbb.branches.base import zero_bias
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.geometry import ConvSpec
from mmdbb.kernels import (
    ComposedKernel,
    KxKKernel,
    PointwiseKernel,
    StackedKernel,
)
from mmdbb.official import names
from mmdbb.official.blocks import OfficialBlock, RepVGGBlock
from mmdbb.official.names import drop_unread_rows_
from mmdbb.transforms import KernelBias, fuse_conv_bn

#: Stands for a ReLU of each block's own; None stands for none.
_RELU = nn.ReLU()


class OfficialGenerated(OfficialBlock):
    """A composed kernel, its norm, then a nonlinearity.

    Args:
        generator: Builds what composes the kernel.
        conv_args: Arguments of ``nn.Conv2d``.
        deploy: Whether to build the merged convolution.
        nonlinear: Module that follows the norm.
        norm: Whether there is a norm.
    """

    def __init__(
        self,
        generator: Callable[[ConvSpec], ComposedKernel],
        conv_args: tuple,
        deploy: bool,
        nonlinear: Optional[nn.Module],
        norm: bool = True,
    ) -> None:
        # Merged, its bias is that of the norm.
        block = ComposedKernelConv2d(
            generator, *conv_args, bias=deploy, deploy=deploy
        )
        super().__init__(block, nonlinear)
        has_norm = norm and not deploy
        self.bn = nn.BatchNorm2d(block.out_channels) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """From (N, in, H, W) to (N, out, H', W')."""
        y = self.block(x)
        return self.nonlinear(y if self.bn is None else self.bn(y))

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """Kernel (out, in / groups, kH, kW) and bias (out,), the norm's too.

        Differentiable in the parameters, at any time.
        """
        merged = super().get_equivalent_kernel_bias()
        if self.bn is None:
            return merged
        return fuse_conv_bn(merged, norm_scale_shift(self.bn))

    def switch_to_deploy(self) -> None:
        """Put a plain ``nn.Conv2d`` in place of kernel and norm."""
        if self.deploy:
            return
        conv = self.block.to_conv()
        conv.bias = nn.Parameter(zero_bias(conv.weight))
        if self.bn is not None:
            fold_norm_(conv, self.bn)
        self.block, self.bn = conv, None

    def weight_gen(self) -> Tensor:
        """The composed kernel, (out, in / groups, kH, kW).

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'kernel to compose')
        return self.block.generator()

    def single_init(self) -> None:
        """Start as the original kernel alone.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.block.single_init()


class OREPA(OfficialGenerated):
    """``OREPA`` of the paper's code, for any geometry.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width in pixels, or one number.
        stride: Step in pixels.
        padding: Pixels on each side; need not be ``kernel_size // 2`` here.
        dilation: Distance of two taps in pixels.
        groups: Number of groups.
        internal_channels_1x1_3x3: Width inside the 1x1-KxK branch.
        deploy: Whether to build the merged convolution.
        nonlinear: Module that follows the norm.
        single_init: Whether only the original kernel starts with a scale.
        weight_only: Whether calling the block gives the composed kernel, and
            there is no norm.
        init_hyper_para: Factor on the kernels' start values.
        init_hyper_gamma: Factor on the scales' start values, squared.

    Examples:
        >>> import torch
        >>> block = OREPA(4, 8, 3, padding=1).eval()
        >>> x = torch.rand(1, 4, 6, 5)
        >>> before = block(x)
        >>> block.switch_to_deploy()
        >>> torch.allclose(before, block(x), atol=1e-5)
        True
    """

    names = names.OREPA.within('block.')

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        internal_channels_1x1_3x3: Optional[int] = None,
        deploy: bool = False,
        nonlinear: Optional[nn.Module] = None,
        single_init: bool = False,
        weight_only: bool = False,
        init_hyper_para: float = 1.0,
        init_hyper_gamma: float = 1.0,
    ) -> None:
        generator = partial(
            KxKKernel,
            internal_channels=internal_channels_1x1_3x3,
            weight_init=init_hyper_para,
            scale_init=init_hyper_gamma,
        )
        super().__init__(
            generator,
            (in_channels, out_channels, kernel_size, stride, padding)
            + (dilation, groups),
            deploy,
            nonlinear,
            norm=not weight_only,
        )
        self.weight_only = weight_only
        if single_init and not deploy:
            self.single_init()

    def forward(self, x: Optional[Tensor] = None) -> Tensor:
        """From (N, in, H, W) to (N, out, H', W'); see ``weight_only``."""
        if self.weight_only and not self.deploy:
            return self.weight_gen()
        return super().forward(x)


class OREPA_1x1(OfficialGenerated):
    """``OREPA_1x1`` of the paper's code, with groups too.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: 1.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Without effect on a single tap.
        groups: Number of groups.
        deploy: Whether to build the merged convolution.
        nonlinear: Module that follows the norm.
        single_init: Whether only the original kernel starts with a scale.

    Raises:
        ValueError: If ``kernel_size`` is not 1.
    """

    names = names.OREPA_1X1.within('block.')

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size=1,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deploy: bool = False,
        nonlinear: Optional[nn.Module] = None,
        single_init: bool = False,
    ) -> None:
        if kernel_size not in (1, (1, 1)):
            raise ValueError(f'kernel_size must be 1, got {kernel_size}')
        super().__init__(
            PointwiseKernel,
            (in_channels, out_channels, kernel_size, stride, padding)
            + (dilation, groups),
            deploy,
            nonlinear,
        )
        if single_init and not deploy:
            self.single_init()


class OREPA_LargeConvBase(OfficialGenerated):
    """``OREPA_LargeConvBase`` of the paper's code: a stack of 3x3 kernels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width in pixels: one odd number from 5 on.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Distance of two taps in pixels.
        groups: Number of groups.
        deploy: Whether to build the merged convolution.
        nonlinear: Module that follows the norm.
        flip: Whether the kernel is that of the stacked convolutions; the
            paper's code does not flip the kernels as that would need.

    Raises:
        ValueError: If the kernel is no stack of 3x3 kernels.
    """

    names = names.OREPA_LARGE_BASE.within('block.')
    generated = False

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        deploy: bool = False,
        nonlinear: Optional[nn.Module] = None,
        flip: bool = False,
    ) -> None:
        super().__init__(
            partial(StackedKernel, generated=self.generated, flip=flip),
            (in_channels, out_channels, kernel_size, stride, padding)
            + (dilation, groups),
            deploy,
            nonlinear,
        )


class OREPA_LargeConv(OREPA_LargeConvBase):
    """``OREPA_LargeConv`` of the paper's code: a stack of composed kernels.

    Arguments as :class:`OREPA_LargeConvBase`.
    """

    names = names.OREPA_LARGE.within('block.')
    generated = True


class RepVGGBlock_OREPA(RepVGGBlock):
    """``RepVGGBlock_OREPA`` of the paper's code.

    Arguments as :class:`RepVGGBlock`, and:

    Args:
        nonlinear: Module that follows, ``nn.ReLU()`` by default; nothing if
            None.
    """

    names = names.REPVGG_OREPA.within('block.')
    block_type = OREPARepVGG

    def __init__(
        self,
        in_channels,
        out_channels,
        kernel_size,
        stride=1,
        padding=0,
        dilation=1,
        groups=1,
        padding_mode: str = 'zeros',
        deploy: bool = False,
        use_se: bool = False,
        nonlinear: Optional[nn.Module] = _RELU,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode,
            deploy,
            use_se,
        )
        if nonlinear is not _RELU:
            self.nonlinear = nn.Identity() if nonlinear is None else nonlinear

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        drop_unread_rows_(state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)


@torch.no_grad()
def fold_norm_(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a norm into the convolution before it, in double precision."""
    exact = copy.deepcopy(norm).double()
    merged = KernelBias(conv.weight.double(), conv.bias.double())
    kernel, bias = fuse_conv_bn(merged, norm_scale_shift(exact))
    conv.weight.copy_(kernel)
    conv.bias.copy_(bias)
