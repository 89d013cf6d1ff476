# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""MobileOne's block with the names and arguments of the paper's code.

It serves models in plain PyTorch that were written for the paper's repository
(https://github.com/apple/ml-mobileone): change the import and keep the rest.
State dicts of the original class load as they are.
"""

from __future__ import annotations

from mmdbb.blocks.mobileone import MobileOneConv
from mmdbb.official import names
from mmdbb.official.blocks import SEOfficialBlock


class MobileOneBlock(SEOfficialBlock):
    """``MobileOneBlock`` of the paper's code: block, SE, ReLU.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Step in pixels.
        padding: Pixels on each side.
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        inference_mode: Whether to build the merged convolution, not the
            branches.
        use_se: Whether squeeze-and-excitation follows the block. Merging
            leaves it in place.
        num_conv_branches: Number of parallel convolutions.

    Examples:
        >>> import torch
        >>> block = MobileOneBlock(4, 4, 3, padding=1).eval()
        >>> x = torch.rand(1, 4, 6, 5)
        >>> before = block(x)
        >>> block.reparameterize()
        >>> torch.allclose(before, block(x), atol=1e-5)
        True
    """

    names = (
        *names.MOBILEONE.within('block.'),
        ('se.reduce.', 'se.down.'),
        ('se.expand.', 'se.up.'),
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        inference_mode: bool = False,
        use_se: bool = False,
        num_conv_branches: int = 1,
    ) -> None:
        block = MobileOneConv(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            num_conv_branches=num_conv_branches,
            deploy=inference_mode,
        )
        super().__init__(block, use_se)

    def reparameterize(self) -> None:
        """``switch_to_deploy`` by the name of the paper's code."""
        self.switch_to_deploy()
