# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The six transformations of the Diverse Branch Block paper, sec. 3.2.

Ding et al., "Diverse Branch Block: Building a Convolution as an
Inception-like Unit", CVPR 2021 (https://arxiv.org/abs/2103.13425).

Pure functions on kernels and biases: differentiable, in any floating dtype
and on any device. All of mmdbb's algebra stands here and nowhere else.

=====  =========================================  =====================
I      a convolution followed by a BN             :func:`fuse_conv_bn`
II     the sum of branches                        :func:`add_branches`
III    a 1x1 followed by a KxK                    :func:`fuse_1x1_kxk`
IV     the concatenation of branches              :func:`concat_branches`
V      average pooling                            :func:`avg_pool_kernel`
VI     a small kernel as a large one              :func:`pad_kernel`
=====  =========================================  =====================
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Tuple

import torch
from torch import Tensor

# How many input channels share a product where kernels are composed.
_AT_ONCE = 4


class KernelBias(NamedTuple):
    """A convolution's weights.

    Attributes:
        kernel: Shape (out, in / groups, kH, kW).
        bias: Shape (out,).
    """

    kernel: Tensor
    bias: Tensor


class ScaleShift(NamedTuple):
    """A norm with frozen statistics: ``y = x * scale + shift``.

    Attributes:
        scale: Shape (channels,).
        shift: Shape (channels,).
    """

    scale: Tensor
    shift: Tensor


def bn_scale_shift(
    mean: Tensor,
    var: Tensor,
    weight: Optional[Tensor],
    bias: Optional[Tensor],
    eps: float,
) -> ScaleShift:
    """A batch norm in eval mode as one scale and shift a channel.

    Args:
        mean: Running mean, shape (channels,).
        var: Running variance, shape (channels,).
        weight: Gamma, shape (channels,); None means 1.
        bias: Beta, shape (channels,); None means 0.
        eps: Added to the variance.

    Returns:
        ScaleShift: Both of shape (channels,). The shift is also what the norm
        makes of a zero, hence of a zero-padded border.
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = weight * scale
    shift = -mean * scale
    if bias is not None:
        shift = bias + shift
    return ScaleShift(scale, shift)


def fuse_conv_bn(conv: KernelBias, norm: ScaleShift) -> KernelBias:
    """Transform I (eq. 2): a convolution followed by a norm.

    Args:
        conv: Kernel (out, in / groups, kH, kW) and bias (out,).
        norm: The norm's scale and shift, both (out,).

    Returns:
        KernelBias: Of the same shapes.

    Examples:
        >>> conv = KernelBias(torch.ones(1, 1, 1, 1), torch.ones(1))
        >>> norm = bn_scale_shift(
        ...     torch.ones(1), torch.full((1,), 4.), None, None, 0.)
        >>> fuse_conv_bn(conv, norm).kernel.item()
        0.5
    """
    kernel = conv.kernel * norm.scale.reshape(-1, 1, 1, 1)
    return KernelBias(kernel, conv.bias * norm.scale + norm.shift)


def unfuse_conv_bn(fused: KernelBias, norm: ScaleShift) -> KernelBias:
    """Transform I backwards: what gives ``fused`` when this norm follows.

    Args:
        fused: Kernel (out, in / groups, kH, kW) and bias (out,).
        norm: The norm's scale, nowhere zero, and shift, both (out,).

    Returns:
        KernelBias: Of the same shapes.
    """
    kernel = fused.kernel / norm.scale.reshape(-1, 1, 1, 1)
    return KernelBias(kernel, (fused.bias - norm.shift) / norm.scale)


def add_branches(*branches: KernelBias) -> KernelBias:
    """Transform II (eq. 4): the sum of branches of one geometry.

    Raises:
        ValueError: If there is no branch, or shapes differ (a sum would
            broadcast silently).
    """
    if not branches:
        raise ValueError('add_branches needs at least one branch')
    shapes = {tuple(branch.kernel.shape) for branch in branches}
    if len(shapes) > 1:
        raise ValueError(
            f'branches must have kernels of one shape, got {sorted(shapes)}; '
            'bring them to one size with pad_kernel'
        )
    kernel, bias = branches[0]
    for i, branch in enumerate(branches[1:]):
        # The first sum is ours to add to; kernels are large.
        add = torch.add if i == 0 else Tensor.add_
        kernel = add(kernel, branch.kernel)
        bias = add(bias, branch.bias)
    return KernelBias(kernel, bias)


def fuse_1x1_kxk(
    first: KernelBias, second: KernelBias, groups: int = 1
) -> KernelBias:
    """Transform III (eq. 5-8): a 1x1 convolution followed by a KxK one.

    The two are one convolution if the border between them is padded with
    the first one's bias, which is what a zero-padded input becomes there.

    Args:
        first: Kernel (mid, in / groups, 1, 1) and bias (mid,).
        second: Kernel (out, mid / groups, kH, kW) and bias (out,).
        groups: Groups of both.

    Returns:
        KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,).
    """
    mid = first.kernel.shape[0]
    out = second.kernel.shape[0]
    kernel2 = second.kernel.reshape(groups, out // groups, mid // groups, -1)
    bias = torch.einsum(
        'gomk,gm->go', kernel2, first.bias.reshape(groups, mid // groups)
    )
    return KernelBias(
        compose_1x1_kxk(first.kernel, second.kernel, groups),
        bias.reshape(out) + second.bias,
    )


def concat_branches(*branches: KernelBias) -> KernelBias:
    """Transform IV (eq. 9): branches side by side in the output's channels.

    Args:
        branches: Kernels (out_i, in, kH, kW) that read the same input
            channels: dense ones, or the groups of one grouped convolution in
            their order.

    Returns:
        KernelBias: Kernel (sum of out_i, in, kH, kW) and bias.
    """
    if not branches:
        raise ValueError('concat_branches needs at least one branch')
    return KernelBias(
        torch.cat([branch.kernel for branch in branches]),
        torch.cat([branch.bias for branch in branches]),
    )


def avg_pool_kernel(
    channels: int,
    kernel_size: Tuple[int, int],
    groups: int = 1,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """Transform V (eq. 10): the kernel of an average pooling.

    Args:
        channels: Channels in and out.
        kernel_size: Height and width in pixels.
        groups: Groups of the convolution that the pooling becomes.
        dtype: Of the result.
        device: Of the result.

    Returns:
        Tensor: Shape (channels, channels / groups, kH, kW).
    """
    eye = identity_kernel(channels, groups, dtype, device)
    area = kernel_size[0] * kernel_size[1]
    return (eye / area).repeat(1, 1, *kernel_size)


def identity_kernel(
    channels: int,
    groups: int = 1,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """The 1x1 kernel that changes nothing, (channels, channels/groups, 1, 1).

    Source: the DBB paper, sec. 3.3 (initialisation of the 1x1-KxK branch).
    """
    eye = torch.eye(channels // groups, dtype=dtype, device=device)
    return eye.repeat(groups, 1).reshape(channels, -1, 1, 1)


def fuse_1x1_avg(
    first: KernelBias, kernel_size: Tuple[int, int]
) -> KernelBias:
    """Transforms III and V in one: a 1x1 followed by an average pooling.

    Every tap holds the same share of the 1x1 kernel, so no product of
    kernels is needed.

    Args:
        first: Kernel (out, in / groups, 1, 1) and bias (out,).
        kernel_size: Height and width of the pooling in pixels.

    Returns:
        KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,).
    """
    area = kernel_size[0] * kernel_size[1]
    return KernelBias(
        (first.kernel / area).expand(-1, -1, *kernel_size), first.bias
    )


def pad_kernel(
    kernel: Tensor,
    kernel_size: Tuple[int, int],
    offset: Optional[Tuple[int, int]] = None,
) -> Tensor:
    """Transform VI: a small kernel as a large one, zero elsewhere.

    Args:
        kernel: Shape (out, in / groups, h, w).
        kernel_size: Height and width of the result.
        offset: Row and column of the small kernel's first tap; by default it
            stands in the middle.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).

    Raises:
        ValueError: If the small kernel does not fit there.
    """
    small = tuple(kernel.shape[-2:])
    if offset is None:
        offset = tuple((k - s) // 2 for k, s in zip(kernel_size, small))
    after = tuple(k - s - o for k, s, o in zip(kernel_size, small, offset))
    if min(*offset, *after) < 0:
        raise ValueError(
            f'a kernel of size {small} at offset {offset} does not fit in '
            f'one of size {tuple(kernel_size)}'
        )
    return torch.nn.functional.pad(
        kernel, (offset[1], after[1], offset[0], after[0])
    )


# ------------------------------------------- kernels composed online (OREPA)


def compose_1x1_kxk(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """The kernel of a 1x1 convolution followed by a KxK one, without biases.

    Source: the OREPA paper (CVPR 2022), sec. 3.3; DBB's Transform III.

    Args:
        first: Shape (mid, in / groups, 1, 1).
        second: Shape (out, mid / groups, kH, kW).
        groups: Groups of both.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).
    """
    mid, inside = first.shape[:2]
    out, _, *size = second.shape
    # One product a group, with the taps among the rows.
    rows = second.reshape(groups, out // groups, mid // groups, -1)
    taps = rows.shape[-1]
    rows = rows.transpose(2, 3).reshape(groups, -1, mid // groups)
    kernel = torch.bmm(rows, first.reshape(groups, mid // groups, inside))
    kernel = kernel.reshape(out, taps, inside).transpose(1, 2)
    # Not a view, from whose strides a convolution would take its layout.
    return kernel.contiguous().reshape(out, inside, *size)


def compose_separable(
    depthwise: Tensor, pointwise: Tensor, in_channels: int, groups: int = 1
) -> Tensor:
    """The kernel of a depthwise convolution followed by a 1x1 one.

    Source: the OREPA paper (CVPR 2022), sec. 3.3, "depthwise separable". As
    in its code, the rows of ``pointwise`` that belong to one group do not
    stand together: row ``o * groups + g`` is output o of group g.

    Args:
        depthwise: Shape (in * expansion, 1, kH, kW).
        pointwise: Shape (out, in / groups * expansion, 1, 1).
        in_channels: Channels of the input.
        groups: Groups of the result.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).
    """
    out, inside = pointwise.shape[0], in_channels // groups
    size = depthwise.shape[2:]
    taps = size[0] * size[1]
    expansion = depthwise.shape[0] // in_channels
    # Some inputs at once, because products of tiny matrices are slow.
    some = math.gcd(inside, _AT_ONCE)
    filters = _block_diagonal(depthwise.reshape(-1, some, expansion, taps))
    rows = pointwise.reshape(
        out // groups, groups, inside // some, some * expansion
    )
    rows = rows.permute(1, 2, 0, 3).reshape(
        in_channels // some, out // groups, some * expansion
    )
    kernel = torch.bmm(rows, filters).reshape(
        groups, inside // some, out // groups, some * taps
    )
    return kernel.transpose(1, 2).reshape(out, inside, *size)


def compose_stack(
    first: Tensor, second: Tensor, groups: int = 1, flip: bool = True
) -> Tensor:
    """The kernel of two convolutions of stride 1 in sequence.

    Args:
        first: Shape (mid, in / groups, kH, kW).
        second: Shape (out, mid / groups, h, w).
        groups: Groups of both.
        flip: Whether to do what a sequence does. False leaves ``second``
            unflipped, as the OREPA paper's code does; the result is then
            that of another pair of convolutions.

    Returns:
        Tensor: Shape (out, in / groups, kH + h - 1, kW + w - 1).
    """
    h, w = second.shape[2:]
    if flip:
        second = second.flip(2, 3)
    kernel = torch.nn.functional.conv2d(
        first.transpose(0, 1), second, padding=(h - 1, w - 1), groups=groups
    )
    return kernel.transpose(0, 1)


def add_patterns(
    kernel: Tensor, coefficients: Tensor, patterns: Tensor
) -> Tensor:
    """Add to a kernel, output by output, spatial patterns of its own.

    Source: the OREPA paper (CVPR 2022), sec. 3.3: the 1x1, the 1x1 followed
    by an average pooling and the frequency prior are all of this form.

    Args:
        kernel: Shape (out, in / groups, kH, kW).
        coefficients: How much of each pattern each input channel gets, shape
            (out, in / groups, patterns).
        patterns: Shape (out, patterns, kH * kW).

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).
    """
    out, inside = kernel.shape[:2]
    # Some inputs at once, because products of tiny matrices are slow.
    some = math.gcd(inside, _AT_ONCE)
    patterns = _block_diagonal(patterns[:, None].expand(-1, some, -1, -1))
    return torch.baddbmm(
        kernel.reshape(out, inside // some, -1),
        coefficients.reshape(out, inside // some, -1),
        patterns,
    ).reshape(kernel.shape)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """From (N, count, rows, columns) to (N, count rows, count columns)."""
    many, count, rows, columns = blocks.shape
    eye = torch.eye(count, dtype=blocks.dtype, device=blocks.device)
    full = blocks[:, :, :, None] * eye.reshape(1, count, 1, count, 1)
    return full.reshape(many, count * rows, count * columns)


def frequency_prior(out_channels: int, kernel_size: Tuple[int, int]) -> Tensor:
    """Patterns of the frequency prior branch: cosines of rising frequency.

    Source: the OREPA paper (CVPR 2022), sec. 3.3 and its code: the first half
    of the channels vary down the rows, the others along the columns.

    Args:
        out_channels: How many patterns.
        kernel_size: Height and width in pixels.

    Returns:
        Tensor: Shape (out_channels, kH, kW), float64.
    """
    height, width = kernel_size
    channel = torch.arange(1, out_channels + 1, dtype=torch.float64)
    channel = channel.reshape(-1, 1, 1)
    half = out_channels / 2
    row = torch.arange(height, dtype=torch.float64).reshape(-1, 1) + 0.5
    column = torch.arange(width, dtype=torch.float64) + 0.5
    down = torch.cos(torch.pi * row * channel / height)
    along = torch.cos(torch.pi * column * (channel - half) / width)
    return torch.where(
        channel - 1 < half,
        down.expand(-1, -1, width),
        along.expand(-1, height, -1),
    )
