# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The blocks' forms for lines, volumes and videos, and transposed ones.

A block for pictures (``nn.Conv2d``) and its forms differ in torch's layers
only; geometry and algebra are written once. A form is named in configs like
torch's layers: ``DBB1d``, ``DBB3d``, ``DBBTranspose2d``. The bare name stands
for whichever form the network needs there.

There is no ``ACB1d``: along a line the kernel of the one direction is the
block's own. OREPA has no transposed form: its paper composes kernels that
read, and nobody has trained others.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Union

from mmdbb.blocks.acb import ACB
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer
from mmdbb.blocks.conv_bn import ConvBN
from mmdbb.blocks.dbb import DBB
from mmdbb.blocks.dilated import DilatedReparamConv
from mmdbb.blocks.large_kernel import LargeKernelConv
from mmdbb.blocks.mobileone import MobileOneConv
from mmdbb.blocks.orepa import OREPAConv, OREPARepVGG
from mmdbb.blocks.qarepvgg import QARepVGGConv
from mmdbb.blocks.repvgg import RepVGGConv
from mmdbb.geometry import IntPair


@register_conv_layer('DBB1d')
class DBB1d(DBB):
    """:class:`DBB` in place of an ``nn.Conv1d``, with its arguments.

    Examples:
        >>> import torch
        >>> conv = DBB1d(4, 8, 3, padding=1)
        >>> conv(torch.rand(2, 4, 9)).shape
        torch.Size([2, 8, 9])
    """

    dims = 1


@register_conv_layer('DBB3d')
class DBB3d(DBB):
    """:class:`DBB` in place of an ``nn.Conv3d``, with its arguments.

    Examples:
        >>> import torch
        >>> conv = DBB3d(4, 8, (1, 3, 3), padding=(0, 1, 1))
        >>> conv(torch.rand(2, 4, 3, 5, 6)).shape
        torch.Size([2, 8, 3, 5, 6])
    """

    dims = 3


@register_conv_layer('ACB3d')
class ACB3d(ACB):
    """:class:`ACB` in place of an ``nn.Conv3d``: one kernel a direction."""

    dims = 3
    preset = ('kxk', 'kx1x1', '1xkx1', '1x1xk')


@register_conv_layer('RepVGGConv1d')
class RepVGGConv1d(RepVGGConv):
    """:class:`RepVGGConv` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('RepVGGConv3d')
class RepVGGConv3d(RepVGGConv):
    """:class:`RepVGGConv` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('QARepVGGConv1d')
class QARepVGGConv1d(QARepVGGConv):
    """:class:`QARepVGGConv` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('QARepVGGConv3d')
class QARepVGGConv3d(QARepVGGConv):
    """:class:`QARepVGGConv` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('ConvBN1d')
class ConvBN1d(ConvBN):
    """:class:`ConvBN` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('ConvBN3d')
class ConvBN3d(ConvBN):
    """:class:`ConvBN` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('OREPA1d', min_kernel_size=1, max_kernel_size=math.inf)
class OREPAConv1d(OREPAConv):
    """:class:`OREPAConv` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('OREPA3d', min_kernel_size=1, max_kernel_size=math.inf)
class OREPAConv3d(OREPAConv):
    """:class:`OREPAConv` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('OREPARepVGG1d')
class OREPARepVGG1d(OREPARepVGG):
    """:class:`OREPARepVGG` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('OREPARepVGG3d')
class OREPARepVGG3d(OREPARepVGG):
    """:class:`OREPARepVGG` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('MobileOneConv1d')
class MobileOneConv1d(MobileOneConv):
    """:class:`MobileOneConv` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('MobileOneConv3d')
class MobileOneConv3d(MobileOneConv):
    """:class:`MobileOneConv` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('LargeKernelConv1d')
class LargeKernelConv1d(LargeKernelConv):
    """:class:`LargeKernelConv` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('LargeKernelConv3d')
class LargeKernelConv3d(LargeKernelConv):
    """:class:`LargeKernelConv` in place of an ``nn.Conv3d``."""

    dims = 3


@register_conv_layer('DilatedReparamConv1d')
class DilatedReparamConv1d(DilatedReparamConv):
    """:class:`DilatedReparamConv` in place of an ``nn.Conv1d``."""

    dims = 1


@register_conv_layer('DilatedReparamConv3d')
class DilatedReparamConv3d(DilatedReparamConv):
    """:class:`DilatedReparamConv` in place of an ``nn.Conv3d``."""

    dims = 3


if TYPE_CHECKING:
    _Block = BranchSumConv2d
else:
    _Block = object


class _Transposed(_Block):
    """The order of arguments is that of ``nn.ConvTranspose2d``."""

    transposed = True

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Union[int, IntPair],
        stride: Union[int, IntPair] = 1,
        padding: Union[int, IntPair] = 0,
        output_padding: Union[int, IntPair] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: Union[int, IntPair] = 1,
        padding_mode: str = 'zeros',
        **kwargs,
    ) -> None:
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias,
            padding_mode,
            output_padding=output_padding,
            **kwargs,
        )


#: Pooling reads; nothing that a transposed convolution computes is like it.
_TRANSPOSED_DBB = ('kxk', '1x1', '1x1_kxk')


@register_conv_layer('DBBTranspose1d')
class DBBTranspose1d(_Transposed, DBB):
    """:class:`DBB` in place of an ``nn.ConvTranspose1d``."""

    dims = 1
    preset = _TRANSPOSED_DBB


@register_conv_layer('DBBTranspose2d')
class DBBTranspose2d(_Transposed, DBB):
    """:class:`DBB` in place of an ``nn.ConvTranspose2d``.

    The sum of a KxK, a 1x1 and a 1x1-KxK branch. The first norm of the last
    one only scales, see :mod:`mmdbb.branches.pointwise_kxk`.

    Args:
        args: Positional arguments of ``nn.ConvTranspose2d``: channels, kernel
            size, stride, padding, output padding, groups, bias, dilation.
        kwargs: The same as keywords, and those of :class:`BranchSumConv2d`:
            the list of branches, their norms and start values.

    Examples:
        >>> import torch
        >>> conv = DBBTranspose2d(4, 8, 4, stride=2, padding=1)
        >>> conv(torch.rand(2, 4, 5, 6)).shape
        torch.Size([2, 8, 10, 12])
    """

    preset = _TRANSPOSED_DBB


@register_conv_layer('DBBTranspose3d')
class DBBTranspose3d(_Transposed, DBB):
    """:class:`DBB` in place of an ``nn.ConvTranspose3d``."""

    dims = 3
    preset = _TRANSPOSED_DBB


@register_conv_layer('ConvBNTranspose1d')
class ConvBNTranspose1d(_Transposed, ConvBN):
    """:class:`ConvBN` in place of an ``nn.ConvTranspose1d``."""

    dims = 1


@register_conv_layer('ConvBNTranspose2d')
class ConvBNTranspose2d(_Transposed, ConvBN):
    """:class:`ConvBN` in place of an ``nn.ConvTranspose2d``."""


@register_conv_layer('ConvBNTranspose3d')
class ConvBNTranspose3d(_Transposed, ConvBN):
    """:class:`ConvBN` in place of an ``nn.ConvTranspose3d``."""

    dims = 3
