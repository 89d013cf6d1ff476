# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""DBB, ACB and RepVGG with the names and arguments of the papers' code.

They serve models in plain PyTorch that were written for the papers'
repositories (DiverseBranchBlock, ACNet, RepVGG): change the import and keep
the rest. State dicts of the original classes, of all their revisions, load as
they are.
"""

from __future__ import annotations

from typing import Any, Optional

import torch.nn.functional as F
from torch import Tensor, nn

from mmdbb.blocks.acb import ACB
from mmdbb.blocks.base import ReparamConv2d, refuse_merged
from mmdbb.blocks.dbb import DBB
from mmdbb.blocks.repvgg import RepVGGConv
from mmdbb.geometry import ConvSpec
from mmdbb.official import names
from mmdbb.official.names import Names, settle_entries_, translate
from mmdbb.transforms import KernelBias


class OfficialBlock(nn.Module):
    """Base: a block and the nonlinearity behind it, as in the papers' code.

    Args:
        block: The block.
        nonlinear: Module that follows the block; nothing if None.
    """

    #: Start of a name in the paper's code -> start of the name here.
    names: Names = ()
    #: Attributes whose types torch.jit.script does not know.
    __jit_ignored_attributes__ = ['names']

    def __init__(
        self, block: ReparamConv2d, nonlinear: Optional[nn.Module] = None
    ) -> None:
        super().__init__()
        # So that entries of a merged block have the same names, whether it
        # was built merged or merged later.
        self.block: Any = block.reparam_conv if block.deploy else block
        self.nonlinear = nn.Identity() if nonlinear is None else nonlinear

    @property
    def deploy(self) -> bool:
        """Whether the block is merged."""
        return getattr(self.block, 'deploy', True)

    def forward(self, x: Tensor) -> Tensor:
        """Run block and nonlinearity: (N, in, H, W) to (N, out, H', W')."""
        return self.nonlinear(self.block(x))

    def get_equivalent_kernel_bias(self) -> KernelBias:
        """Merge the block into kernel (out, in / groups, kH, kW) and bias."""
        if isinstance(self.block, nn.Conv2d):
            conv: Any = self.block  # with a bias, if it was a block
            return KernelBias(conv.weight, conv.bias)
        return self.block.get_equivalent_kernel_bias()

    def switch_to_deploy(self) -> None:
        """Replace the block by a plain ``nn.Conv2d``. Idempotent."""
        if isinstance(self.block, ReparamConv2d):
            self.block = self.block.to_conv()

    def init_gamma(self, gamma_value: float) -> None:
        """Set the gamma of each branch: its last norm's weight, or its scale.

        Args:
            gamma_value: The value of each gamma.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'gammas to initialise')
        self.block.init_gamma(gamma_value)

    def single_init(self) -> None:
        """Give the original branch gamma 1, and all other branches 0.

        Raises:
            ValueError: If the block is merged.
        """
        self.init_gamma(0.0)
        dense = self.block.branches[self.block.dense_branch]
        nn.init.ones_(dense.last_norm.weight)

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        settle_entries_(state_dict, prefix)
        for key in [k for k in state_dict if k.startswith(prefix)]:
            name = translate(key[len(prefix) :], self.names)
            if name is not None:
                state_dict[prefix + name] = state_dict.pop(key)
        super()._load_from_state_dict(state_dict, prefix, *args)


class DiverseBranchBlock(OfficialBlock):
    """``DiverseBranchBlock`` of the DBB paper's code, for any geometry.

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
        nonlinear: Module that follows the block.
        single_init: Whether the original branch starts with gamma 1 and all
            other branches with 0.

    Examples:
        >>> import torch
        >>> block = DiverseBranchBlock(4, 8, 3, padding=1).eval()
        >>> x = torch.rand(1, 4, 6, 5)
        >>> before = block(x)
        >>> block.switch_to_deploy()
        >>> torch.allclose(before, block(x), atol=1e-5)
        True
    """

    names = names.DBB.within('block.')

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
    ) -> None:
        branches = None
        if internal_channels_1x1_3x3 is not None:
            spec = ConvSpec(
                in_channels, out_channels, kernel_size, groups=groups
            )
            branches = [
                dict(type=n, internal_channels=internal_channels_1x1_3x3)
                if n == '1x1_kxk'
                else n
                for n in DBB.preset_for(spec)
            ]
        block = DBB(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            branches=branches,
            deploy=deploy,
            single_init=single_init,
        )
        super().__init__(block, nonlinear)


class ACBlock(OfficialBlock):
    """``ACBlock`` of the ACNet and DBB papers' code.

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
        use_affine: Whether the norms have a weight and a bias.
        reduce_gamma: Whether all gammas start at one third.
        gamma_init: Start value of all gammas.
        nonlinear: Module that follows the block.
        single_init: Whether the square branch starts with gamma 1 and the
            others with 0.
    """

    names = names.ACB.within('block.')

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
        use_affine: bool = True,
        reduce_gamma: bool = False,
        gamma_init: Optional[float] = None,
        nonlinear: Optional[nn.Module] = None,
        single_init: bool = False,
    ) -> None:
        block = ACB(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            deploy=deploy,
            norm_cfg=dict(type='BN', affine=use_affine),
            reduce_gamma=reduce_gamma,
            gamma_init=gamma_init,
            single_init=single_init,
        )
        super().__init__(block, nonlinear)


class SEOfficialBlock(OfficialBlock):
    """A block of a paper's code that SE and ReLU may follow.

    Args:
        block: The block.
        use_se: Whether squeeze-and-excitation follows the block. Merging
            leaves it in place.
    """

    def __init__(self, block: ReparamConv2d, use_se: bool) -> None:
        super().__init__(block, nn.ReLU())
        channels = block.out_channels
        self.se = (
            SEBlock(channels, channels // 16) if use_se else nn.Identity()
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinear(self.se(self.block(x)))


class RepVGGBlock(SEOfficialBlock):
    """``RepVGGBlock`` of the RepVGG paper's code: block, SE, ReLU.

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
    """

    names = names.REPVGG.within('block.')
    block_type = RepVGGConv

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
    ) -> None:
        block = self.block_type(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            padding_mode=padding_mode,
            deploy=deploy,
        )
        super().__init__(block, use_se)

    def get_custom_L2(self) -> Tensor:
        """Compute the penalty that replaces weight decay in the paper's code.

        See :meth:`RepVGGConv.get_custom_L2`.

        Raises:
            ValueError: If the block is merged.
        """
        refuse_merged(self, 'custom L2')
        return self.block.get_custom_L2()


class SEBlock(nn.Module):
    """Squeeze-and-excitation as in the RepVGG paper's code.

    Hu et al., "Squeeze-and-Excitation Networks", CVPR 2018
    (https://arxiv.org/abs/1709.01507).

    Args:
        input_channels: Number of channels, in and out.
        internal_neurons: Number of channels between the two layers.
    """

    def __init__(self, input_channels: int, internal_neurons: int) -> None:
        super().__init__()
        self.down = nn.Conv2d(input_channels, internal_neurons, 1)
        self.up = nn.Conv2d(internal_neurons, input_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Scale each channel of images (N, C, H, W) by a gate in 0..1.

        The gate is computed from the channels' means over the image.
        """
        gate = F.adaptive_avg_pool2d(x, 1)
        gate = self.up(F.relu(self.down(gate)))
        return x * gate.sigmoid()
