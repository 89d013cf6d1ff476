# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The blocks of UniRepLKNet and RepLKNet with the names of the papers' code.

They serve models in plain PyTorch that were written for these repositories:
change the import and keep the rest. State dicts of the original classes load
as they are.

- ``DilatedReparamBlock``: Ding et al., "UniRepLKNet", CVPR 2024
  (https://github.com/AILab-CVC/UniRepLKNet)
- ``ReparamLargeKernelConv``: Ding et al., "Scaling Up Your Kernels to 31x31",
  CVPR 2022 (https://github.com/DingXiaoH/RepLKNet-pytorch)
"""

from __future__ import annotations

from typing import Any, List, Optional

from mmdbb.blocks.dilated import DilatedReparamConv
from mmdbb.blocks.large_kernel import LargeKernelConv
from mmdbb.official import names
from mmdbb.official.blocks import OfficialBlock


class DilatedReparamBlock(OfficialBlock):
    """``DilatedReparamBlock`` of UniRepLKNet's code.

    Args:
        channels: Channels of the input and of the output; the block is
            depthwise.
        kernel_size: Height and width of the large kernel, odd and at least 5.
        deploy: Whether to build the merged convolution, not the branches.
        use_sync_bn: Whether the norms are SyncBN.
        attempt_use_lk_impl: Without effect. In the paper's code it chooses a
            CUDA kernel of its own for large kernels; here torch's convolution
            runs them.

    Raises:
        ValueError: If ``kernel_size`` is even or smaller than 5.

    Examples:
        >>> import torch
        >>> block = DilatedReparamBlock(4, 7).eval()
        >>> x = torch.rand(1, 4, 9, 8)
        >>> before = block(x)
        >>> block.merge_dilated_branches()
        >>> torch.allclose(before, block(x), atol=1e-5)
        True
    """

    names = names.DILATED.within('block.')

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        deploy: bool = False,
        use_sync_bn: bool = False,
        attempt_use_lk_impl: bool = True,
    ) -> None:
        if not isinstance(kernel_size, int) or (
            kernel_size < 5 or kernel_size % 2 == 0
        ):
            raise ValueError(
                'kernel_size must be an odd number of at least 5, got '
                f'{kernel_size!r}'
            )
        block = DilatedReparamConv(
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            norm_cfg=dict(type='SyncBN' if use_sync_bn else 'BN'),
            deploy=deploy,
        )
        super().__init__(block)

    def merge_dilated_branches(self) -> None:
        """``switch_to_deploy`` by the name of the paper's code."""
        self.switch_to_deploy()


class ReparamLargeKernelConv(OfficialBlock):
    """``ReparamLargeKernelConv`` of RepLKNet's code.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the large kernel.
        stride: Step in pixels.
        groups: Number of groups that channels are split into.
        small_kernel: Height and width of the small kernel, None for none.
        small_kernel_merged: Whether to build the merged convolution, not the
            branches.

    Raises:
        ValueError: If ``small_kernel`` does not fit into ``kernel_size``
            around its middle.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        stride: int,
        groups: int,
        small_kernel: Optional[int],
        small_kernel_merged: bool = False,
    ) -> None:
        branches: List[Any] = ['kxk']
        if small_kernel is not None:
            branches.append(dict(type='kxk', kernel_size=small_kernel))
        block = LargeKernelConv(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding=kernel_size // 2,
            groups=groups,
            branches=branches,
            deploy=small_kernel_merged,
        )
        super().__init__(block)
        #: Whose end depends on the small kernel.
        self.names = names.large_kernel(small_kernel).within('block.')
        if small_kernel == kernel_size:  # a second kernel of the same size
            self.names = tuple(
                (theirs, ours.replace(f'kxk_k{kernel_size}', 'kxk_2'))
                for theirs, ours in self.names
            )

    def merge_kernel(self) -> None:
        """``switch_to_deploy`` by the name of the paper's code."""
        self.switch_to_deploy()
