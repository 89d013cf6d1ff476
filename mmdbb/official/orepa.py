# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""OREPA's blocks with the names and arguments of the paper's code.

They serve models in plain PyTorch that were written for the paper's repository
(https://github.com/JUGGHM/OREPA_CVPR2022): change the import and keep the
rest. State dicts of the original classes load as they are.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Callable, Optional

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
from mmdbb.transforms import KernelBias, fuse_conv_bn

#: A default that means "a new ReLU for each block", because None means none.
_RELU = nn.ReLU()


class OfficialComposed(OfficialBlock):
    """Base: a composed kernel, a norm, then a nonlinearity.

    Args:
        build_kernel: Builds the composed kernel for a geometry.
        conv_args: Positional arguments of ``nn.Conv2d``.
        deploy: Whether to build the merged convolution, not the branches.
        nonlinear: Module that follows the norm.
        norm: Whether a norm follows the convolution.
    """

    def __init__(
        self,
        build_kernel: Callable[[ConvSpec], ComposedKernel],
        conv_args: tuple,
        deploy: bool,
        nonlinear: Optional[nn.Module],
        norm: bool = True,
    ) -> None:
        # A merged block has a bias, which holds the shift of the norm.
        block = ComposedKernelConv2d(
            build_kernel, *conv_args, bias=deploy, deploy=deploy
        )
        super().__init__(block, nonlinear)
        has_norm = norm and not deploy
        self.bn = nn.BatchNorm2d(block.out_channels) if has_norm else None

    def forward(self, x: Tensor) -> Tensor:
        """Convolve, norm, nonlinearity: (N, in, H, W) to (N, out, H', W')."""
        return self._convolve(x)

    def _convolve(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return self.nonlinear(y if self.bn is None else self.bn(y))

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """Merge kernel and norm.

        Returns:
            KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,),
            differentiable in the parameters.
        """
        merged = super().get_equivalent_kernel_bias()
        if self.bn is None:
            return merged
        return fuse_conv_bn(merged, norm_scale_shift(self.bn))

    def switch_to_deploy(self) -> None:
        """Replace kernel and norm by a plain ``nn.Conv2d``. Idempotent."""
        if self.deploy:
            return
        conv = self.block.to_conv()
        conv.bias = nn.Parameter(zero_bias(conv.weight))
        if self.bn is not None:
            fold_norm_(conv, self.bn)
        self.block, self.bn = conv, None

    def weight_gen(self) -> Tensor:
        """Compose the kernel, (out, in / groups, kH, kW).

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'kernel to compose')
        return self.block.generator()

    def single_init(self) -> None:
        """Give the original kernel scale 1, and all other branches 0.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.block.single_init()


class OREPA(OfficialComposed):
    """``OREPA`` of the paper's code, for any geometry.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Step in pixels.
        padding: Pixels on each side; need not be ``kernel_size // 2`` here.
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        internal_channels_1x1_3x3: Channels between the 1x1 and the KxK of the
            branch of both.
        deploy: Whether to build the merged convolution, not the branches.
        nonlinear: Module that follows the norm.
        single_init: Whether the original kernel starts with scale 1 and all
            other branches with 0.
        weight_only: Whether calling the block returns the composed kernel
            instead of images. There is no norm then.
        init_hyper_para: Factor by which the start values of the kernels are
            multiplied.
        init_hyper_gamma: Square of the factor by which the start values of
            the scales are multiplied.

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
        build_kernel = partial(
            KxKKernel,
            internal_channels=internal_channels_1x1_3x3,
            weight_init=init_hyper_para,
            scale_init=init_hyper_gamma,
        )
        super().__init__(
            build_kernel,
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
        """Run the block on images, or return its kernel (``weight_only``).

        Args:
            x: Images of shape (N, in, H, W). Not read with ``weight_only``.

        Returns:
            Tensor: Shape (N, out, H', W'); with ``weight_only``, until the
            block is merged, the kernel (out, in / groups, kH, kW).

        Raises:
            ValueError: If there are no images where they are needed.
        """
        # What torch.jit.script compiles is merged.
        if not torch.jit.is_scripting():
            if self.weight_only and not self.deploy:
                return self.weight_gen()
        if x is None:
            raise ValueError('x must be images, except with weight_only')
        return self._convolve(x)


class OREPA_1x1(OfficialComposed):
    """``OREPA_1x1`` of the paper's code; here it can have groups.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, which must be 1.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Has no effect, because there is a single tap.
        groups: Number of groups that channels are split into.
        deploy: Whether to build the merged convolution, not the branches.
        nonlinear: Module that follows the norm.
        single_init: Whether the original kernel starts with scale 1 and all
            other branches with 0.

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


class OREPA_LargeConvBase(OfficialComposed):
    """``OREPA_LargeConvBase`` of the paper's code: a stack of 3x3 kernels.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel: one odd number from 5 on.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        deploy: Whether to build the merged convolution, not the branches.
        nonlinear: Module that follows the norm.
        flip: Whether the composed kernel equals the sequence of the stacked
            convolutions. The paper's code does not flip the kernels as that
            needs, so its checkpoints need False.

    Raises:
        TypeError: If ``flip`` is not a bool.
        ValueError: If the kernel cannot be a stack of 3x3 kernels.
    """

    names = names.OREPA_LARGE_BASE.within('block.')
    composed = False

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
            partial(StackedKernel, composed=self.composed, flip=flip),
            (in_channels, out_channels, kernel_size, stride, padding)
            + (dilation, groups),
            deploy,
            nonlinear,
        )


class OREPA_LargeConv(OREPA_LargeConvBase):
    """``OREPA_LargeConv`` of the paper's code: a stack of composed kernels.

    Each 3x3 kernel of the stack is composed of six branches.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel: one odd number from 5 on.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        deploy: Whether to build the merged convolution, not the branches.
        nonlinear: Module that follows the norm.
        flip: Whether the composed kernel equals the sequence of the stacked
            convolutions, see :class:`OREPA_LargeConvBase`.
    """

    names = names.OREPA_LARGE.within('block.')
    composed = True


class RepVGGBlock_OREPA(RepVGGBlock):
    """``RepVGGBlock_OREPA`` of the paper's code: its dense kernel is composed.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``.
        deploy: Whether to build the merged convolution, not the branches.
        use_se: Whether squeeze-and-excitation follows the block. Merging
            leaves it in place.
        nonlinear: Module that follows the block, ``nn.ReLU()`` by default;
            nothing if None.
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


@torch.no_grad()
def fold_norm_(conv: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Fold a norm into the convolution before it, in double precision.

    Args:
        conv: The convolution, which must have a bias; changed in place.
        norm: The norm behind it; unchanged.
    """
    exact = copy.deepcopy(norm).double()
    own: Any = conv  # with a bias
    merged = KernelBias(own.weight.double(), own.bias.double())
    kernel, bias = fuse_conv_bn(merged, norm_scale_shift(exact))
    own.weight.copy_(kernel)
    own.bias.copy_(bias)
