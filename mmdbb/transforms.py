# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The six transformations of the Diverse Branch Block paper, sec. 3.2.

Ding et al., "Diverse Branch Block: Building a Convolution as an
Inception-like Unit", CVPR 2021 (https://arxiv.org/abs/2103.13425).

Pure functions on kernels and biases. They are differentiable and keep dtype
and device. All algebra of mmdbb stands here and nowhere else. No function
mixes the taps of a kernel but where it says so, so all of them hold for
kernels of one, two and three dimensions; (kH, kW) stands for any of these. The
last row is UniRepLKNet's (CVPR 2024).

=====  =========================================  =====================
I      a convolution followed by a BN             :func:`fuse_conv_bn`
II     the sum of branches                        :func:`add_branches`
III    a 1x1 followed by a KxK                    :func:`fuse_1x1_kxk`
IV     the concatenation of branches              :func:`concat_branches`
V      average pooling                            :func:`avg_pool_kernel`
VI     a small kernel as a large one              :func:`pad_kernel`
(VI)   a dilated kernel as one without dilation   :func:`dilate_kernel`
=====  =========================================  =====================
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from mmdbb.dimensions import CONV

# How many input channels go into one matrix product when kernels are composed.
# A product for each channel would be of tiny matrices, which is slow.
_AT_ONCE = 4


class KernelBias(NamedTuple):
    """The kernel and bias of a convolution.

    Attributes:
        kernel: Shape (out, in / groups, kH, kW).
        bias: Shape (out,).
    """

    kernel: Tensor
    bias: Tensor


class ScaleShift(NamedTuple):
    """A norm with given statistics as the function ``x * scale + shift``.

    Attributes:
        scale: Factor for each channel, shape (channels,).
        shift: Added to each channel, shape (channels,).
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
    """Write a batch norm in eval mode as one scale and shift per channel.

    Args:
        mean: Running mean, shape (channels,).
        var: Running variance, shape (channels,).
        weight: Gamma, shape (channels,); None means 1.
        bias: Beta, shape (channels,); None means 0.
        eps: Added to the variance.

    Returns:
        ScaleShift: Both of shape (channels,). The shift is also the norm's
        output for a zero, and so for a zero-padded border.
    """
    scale = (var + eps).rsqrt()
    if weight is not None:
        scale = weight * scale
    shift = -mean * scale
    if bias is not None:
        shift = bias + shift
    return ScaleShift(scale, shift)


def fuse_conv_bn(conv: KernelBias, norm: ScaleShift) -> KernelBias:
    """Transform I (eq. 2): fuse a norm into the convolution before it.

    Args:
        conv: The convolution: kernel (out, in / groups, kH, kW) and bias
            (out,).
        norm: The norm's scale and shift, both (out,).

    Returns:
        KernelBias: The fused convolution, of the same shapes.

    Examples:
        >>> conv = KernelBias(torch.ones(1, 1, 1, 1), torch.ones(1))
        >>> norm = bn_scale_shift(
        ...     torch.ones(1), torch.full((1,), 4.), None, None, 0.)
        >>> fuse_conv_bn(conv, norm).kernel.item()
        0.5
    """
    kernel = conv.kernel * _per_output(norm.scale, conv.kernel)
    return KernelBias(kernel, conv.bias * norm.scale + norm.shift)


def unfuse_conv_bn(fused: KernelBias, norm: ScaleShift) -> KernelBias:
    """Transform I backwards: take a norm out of a fused convolution.

    Args:
        fused: The fused convolution: kernel (out, in / groups, kH, kW) and
            bias (out,).
        norm: The norm's scale, nowhere zero, and shift, both (out,).

    Returns:
        KernelBias: The convolution that gives ``fused`` when this norm
        follows it, of the same shapes.
    """
    kernel = fused.kernel / _per_output(norm.scale, fused.kernel)
    return KernelBias(kernel, (fused.bias - norm.shift) / norm.scale)


def _per_output(values: Tensor, kernel: Tensor) -> Tensor:
    """Shape one value for each output so that it broadcasts over a kernel."""
    return values.reshape(-1, *[1] * (kernel.dim() - 1))


def add_branches(*branches: KernelBias) -> KernelBias:
    """Transform II (eq. 4): add up branches of one geometry.

    Args:
        branches: Kernels (out, in / groups, kH, kW) of one shape, and biases
            (out,).

    Returns:
        KernelBias: The sum, of the same shapes.

    Raises:
        ValueError: If there is no branch, or shapes differ: torch would
            broadcast them without a word.
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
        # The first sum is a new tensor; the others are added in place, because
        # kernels are large.
        add = torch.add if i == 0 else Tensor.add_
        kernel = add(kernel, branch.kernel)
        bias = add(bias, branch.bias)
    return KernelBias(kernel, bias)


def fuse_1x1_kxk(
    first: KernelBias, second: KernelBias, groups: int = 1
) -> KernelBias:
    """Transform III (eq. 5-8): fuse a 1x1 and the KxK that follows it.

    The two equal one convolution if the border between them is padded with
    the bias of the 1x1: that is its output for a zero-padded input.

    Args:
        first: The 1x1: kernel (mid, in / groups, 1, 1) and bias (mid,).
        second: The KxK: kernel (out, mid / groups, kH, kW) and bias (out,).
        groups: Number of groups, the same in both.

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
    """Transform IV (eq. 9): concatenate branches along the output channels.

    Args:
        branches: Kernels (out_i, in, kH, kW) and biases (out_i,): dense
            convolutions of one input, or the groups of a grouped convolution
            in their order.

    Returns:
        KernelBias: Kernel (sum of out_i, in, kH, kW) and bias (sum of out_i,).

    Raises:
        ValueError: If there is no branch.
    """
    if not branches:
        raise ValueError('concat_branches needs at least one branch')
    return KernelBias(
        torch.cat([branch.kernel for branch in branches]),
        torch.cat([branch.bias for branch in branches]),
    )


def avg_pool_kernel(
    channels: int,
    kernel_size: Tuple[int, ...],
    groups: int = 1,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
) -> Tensor:
    """Transform V (eq. 10): write average pooling as a kernel.

    Args:
        channels: Number of channels, which pooling does not change.
        kernel_size: Height and width of the pooling window in pixels, of any
            number of dimensions.
        groups: Number of groups of the convolution that pools.
        dtype: Precision of the kernel.
        device: Device of the kernel.

    Returns:
        Tensor: Shape (channels, channels / groups, kH, kW).
    """
    dims = len(kernel_size)
    eye = identity_kernel(channels, groups, dtype, device, dims)
    return (eye / math.prod(kernel_size)).repeat(1, 1, *kernel_size)


def identity_kernel(
    channels: int,
    groups: int = 1,
    dtype: Optional[torch.dtype] = None,
    device: Optional[torch.device] = None,
    dims: int = 2,
) -> Tensor:
    """Make the 1x1 kernel that returns its input.

    Source: the DBB paper, sec. 3.3 (initialisation of the 1x1-KxK branch).

    Args:
        channels: Number of channels.
        groups: Number of groups of the convolution.
        dtype: Precision of the kernel.
        device: Device of the kernel.
        dims: Number of dimensions of the images.

    Returns:
        Tensor: Shape (channels, channels / groups, 1, 1).
    """
    eye = torch.eye(channels // groups, dtype=dtype, device=device)
    return eye.repeat(groups, 1).reshape(channels, -1, *[1] * dims)


def fuse_1x1_avg(
    first: KernelBias, kernel_size: Tuple[int, ...]
) -> KernelBias:
    """Transforms III and V in one: fuse a 1x1 and the pooling behind it.

    Every tap holds the same share of the 1x1 kernel, so no product of
    kernels is needed.

    Args:
        first: The 1x1: kernel (out, in / groups, 1, 1) and bias (out,).
        kernel_size: Height and width of the pooling window in pixels.

    Returns:
        KernelBias: Kernel (out, in / groups, kH, kW) and bias (out,).
    """
    area = math.prod(kernel_size)
    return KernelBias(
        (first.kernel / area).expand(-1, -1, *kernel_size), first.bias
    )


def pad_kernel(
    kernel: Tensor,
    kernel_size: Tuple[int, ...],
    offset: Optional[Tuple[int, ...]] = None,
) -> Tensor:
    """Transform VI: put a small kernel into a large one of zeros.

    Args:
        kernel: The small kernel, shape (out, in / groups, h, w).
        kernel_size: Height and width of the large kernel in taps.
        offset: Row and column in the large kernel at which the small one
            begins; by default the small one stands in the middle.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).

    Raises:
        ValueError: If the small kernel does not fit at this offset.
    """
    small = tuple(kernel.shape[2:])
    if offset is None:
        offset = tuple((k - s) // 2 for k, s in zip(kernel_size, small))
    after = tuple(k - s - o for k, s, o in zip(kernel_size, small, offset))
    if min(*offset, *after) < 0:
        raise ValueError(
            f'a kernel of size {small} at offset {offset} does not fit in '
            f'one of size {tuple(kernel_size)}'
        )
    # torch takes the last dimension first.
    pads = [n for side in zip(offset[::-1], after[::-1]) for n in side]
    return torch.nn.functional.pad(kernel, pads)


def swap_channels(kernel: Tensor, groups: int = 1) -> Tensor:
    """Turn a transposed convolution's weight into a kernel, and back.

    torch keeps the weight of a transposed convolution with its inputs first.
    Each tap of it is the matrix of a 1x1, so the transformations hold once
    the outputs stand first. The taps stay where they are.

    Args:
        kernel: Shape (in, out / groups, kH, kW), or (out, in / groups, kH,
            kW) on the way back.
        groups: Number of groups.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW), or (in, out / groups, kH,
        kW).

    Examples:
        >>> weight = torch.rand(4, 3, 2, 2)
        >>> swap_channels(weight, groups=2).shape
        torch.Size([6, 2, 2, 2])
        >>> torch.equal(swap_channels(swap_channels(weight, 2), 2), weight)
        True
    """
    first, second, *size = kernel.shape
    grouped = kernel.reshape(groups, first // groups, second, *size)
    return grouped.transpose(1, 2).reshape(-1, first // groups, *size)


def dilate_kernel(kernel: Tensor, dilation: Sequence[int]) -> Tensor:
    """Write a dilated kernel as a larger one, with zeros between its taps.

    Source: Ding et al., "UniRepLKNet", CVPR 2024, sec. 3.2, "Dilated Reparam
    Block" (https://arxiv.org/abs/2311.15599).

    Args:
        kernel: Shape (out, in / groups, taps...), of any number of dimensions.
        dilation: Distance between two neighbouring taps, in taps of the
            larger kernel, for each dimension.

    Returns:
        Tensor: Shape (out, in / groups, spans...), where a span is
        ``dilation * (taps - 1) + 1``.

    Raises:
        ValueError: If there is not one dilation for each dimension.

    Examples:
        >>> dilate_kernel(torch.ones(1, 1, 1, 3), (1, 2)).tolist()
        [[[[1.0, 0.0, 1.0, 0.0, 1.0]]]]
    """
    if len(dilation) != kernel.dim() - 2:
        raise ValueError(
            f'dilation must be {kernel.dim() - 2} numbers, one for each '
            f'dimension of the kernel, got {tuple(dilation)}'
        )
    for axis, step in enumerate(dilation, 2):
        if step == 1:
            continue
        # Zeros behind each tap, of which those behind the last one go again.
        span = step * (kernel.shape[axis] - 1) + 1
        behind = [0, 0] * (kernel.dim() - axis - 1) + [0, step - 1]
        kernel = torch.nn.functional.pad(kernel.unsqueeze(axis + 1), behind)
        kernel = kernel.flatten(axis, axis + 1).narrow(axis, 0, span)
    return kernel


# ------------------------------------------------- composed kernels (OREPA)


def compose_1x1_kxk(first: Tensor, second: Tensor, groups: int = 1) -> Tensor:
    """Compose the kernel of a 1x1 followed by a KxK, both without a bias.

    Source: the OREPA paper (CVPR 2022), sec. 3.3; DBB's Transform III.

    Args:
        first: The 1x1 kernel, shape (mid, in / groups, 1, 1).
        second: The KxK kernel, shape (out, mid / groups, kH, kW).
        groups: Number of groups, the same in both.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).
    """
    mid, inside = first.shape[:2]
    out, _, *size = second.shape
    # One matrix product for each group: all taps are rows of one matrix.
    rows = second.reshape(groups, out // groups, mid // groups, -1)
    taps = rows.shape[-1]
    rows = rows.transpose(2, 3).reshape(groups, -1, mid // groups)
    kernel = torch.bmm(rows, first.reshape(groups, mid // groups, inside))
    kernel = kernel.reshape(out, taps, inside).transpose(1, 2)
    # A convolution chooses its memory layout by the kernel's strides, so the
    # transposed kernel is copied into the usual order.
    return kernel.contiguous().reshape(out, inside, *size)


def compose_separable(
    depthwise: Tensor, pointwise: Tensor, in_channels: int, groups: int = 1
) -> Tensor:
    """Compose the kernel of a depthwise convolution followed by a 1x1.

    Source: the OREPA paper (CVPR 2022), sec. 3.3, "depthwise separable". The
    rows of ``pointwise`` have the order of the paper's code: row
    ``o * groups + g`` makes output o of group g, so the rows of one group do
    not stand together.

    Args:
        depthwise: Kernel of the depthwise convolution, shape (in * expansion,
            1, kH, kW).
        pointwise: The 1x1 kernel, shape (out, in / groups * expansion, 1, 1).
        in_channels: Channels of the input.
        groups: Number of groups of the composed kernel.

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).
    """
    out, inside = pointwise.shape[0], in_channels // groups
    size = depthwise.shape[2:]
    taps = math.prod(size)
    expansion = depthwise.shape[0] // in_channels
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
    """Compose the kernel of two convolutions of stride 1 in sequence.

    Args:
        first: Kernel of the first convolution, (mid, in / groups, kH, kW).
        second: Kernel of the second convolution, (out, mid / groups, h, w).
        groups: Number of groups, the same in both.
        flip: Whether to flip ``second``, which makes the composed kernel
            equal the sequence. The OREPA paper's code does not flip it; with
            False the composed kernel equals the sequence of ``first`` and the
            flipped ``second``.

    Returns:
        Tensor: Shape (out, in / groups, kH + h - 1, kW + w - 1).
    """
    size = second.shape[2:]
    if flip:
        second = second.flip(*range(2, second.dim()))
    kernel = CONV[len(size)](
        first.transpose(0, 1),
        second,
        padding=tuple(n - 1 for n in size),
        groups=groups,
    )
    return kernel.transpose(0, 1)


def add_patterns(
    kernel: Tensor, coefficients: Tensor, patterns: Tensor
) -> Tensor:
    """Add spatial patterns to a kernel, of which each output has its own.

    Source: the OREPA paper (CVPR 2022), sec. 3.3. Three of its branches have
    this form: the 1x1, the 1x1 followed by average pooling, and the 1x1
    followed by the frequency prior.

    Args:
        kernel: The kernel to add to, shape (out, in / groups, kH, kW).
        coefficients: How much of each pattern each input channel gets, shape
            (out, in / groups, patterns).
        patterns: Patterns of each output channel, shape (out, patterns,
            kH * kW).

    Returns:
        Tensor: Shape (out, in / groups, kH, kW).
    """
    out, inside = kernel.shape[:2]
    some = math.gcd(inside, _AT_ONCE)
    patterns = _block_diagonal(patterns[:, None].expand(-1, some, -1, -1))
    return torch.baddbmm(
        kernel.reshape(out, inside // some, -1),
        coefficients.reshape(out, inside // some, -1),
        patterns,
    ).reshape(kernel.shape)


def _block_diagonal(blocks: Tensor) -> Tensor:
    """Put blocks on the diagonal of one matrix, zeros elsewhere.

    Args:
        blocks: Shape (N, count, rows, columns).

    Returns:
        Tensor: Shape (N, count * rows, count * columns).
    """
    many, count, rows, columns = blocks.shape
    eye = torch.eye(count, dtype=blocks.dtype, device=blocks.device)
    full = blocks[:, :, :, None] * eye.reshape(1, count, 1, count, 1)
    return full.reshape(many, count * rows, count * columns)


def frequency_prior(out_channels: int, kernel_size: Sequence[int]) -> Tensor:
    """Make the patterns of the frequency prior: cosines of rising frequency.

    Source: the OREPA paper (CVPR 2022), sec. 3.3, and its code. Patterns of
    the first half of the channels vary from row to row, the others from
    column to column. With three dimensions it is a third of the channels for
    each, with one dimension all.

    Args:
        out_channels: Number of patterns, one for each output channel.
        kernel_size: Height and width of the patterns in taps, of any number
            of dimensions.

    Returns:
        Tensor: Shape (out_channels, kH, kW), float64.
    """
    dims = len(kernel_size)
    channel = torch.arange(1, out_channels + 1, dtype=torch.float64)
    share = out_channels / dims
    patterns = torch.zeros(out_channels, *kernel_size, dtype=torch.float64)
    for i, size in enumerate(kernel_size):
        own = channel - 1 >= i * share  # the next dimension takes the rest
        tap = torch.arange(size, dtype=torch.float64) + 0.5
        frequency = (channel - i * share)[:, None]
        cosines = torch.cos(torch.pi * tap * frequency / size)
        shape = [1] * dims
        shape[i] = size
        patterns = torch.where(
            own.reshape(-1, *[1] * dims),
            cosines.reshape(out_channels, *shape),
            patterns,
        )
    return patterns
