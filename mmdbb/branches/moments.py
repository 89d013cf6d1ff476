# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""Statistics of a batch, and of what a 1x1 convolution makes of it.

With :math:`\mu` and :math:`\Sigma` the mean and covariance of a batch's
pixels x, those of z = P x are :math:`P \mu` and
:math:`\mathrm{diag}(P \Sigma P^T)`: known before z is computed. One
covariance serves all 1x1 convolutions of a block.

*Digits.* Where the rows of P take differences of channels that are nearly
equal, z is smaller than what it is computed from, by a factor
:math:`\kappa = \sum_i |P_i| \sigma_i / \sigma_z`. Rounding then costs z itself
:math:`\kappa \epsilon`, but a variance from :math:`\Sigma`
:math:`\kappa^2 \epsilon`. So :math:`\Sigma` is taken in double precision.

*Devices.* Few GPUs have a fast double precision. There, and of half-precision
images, the statistics are those of z itself, which is computed, measured and
dropped; but for depthwise blocks on a CPU, whose covariances are variances.

*Processes.* With SyncBN counts, means and covariances are summed over the
processes in one all-reduce, in double precision.
"""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple, Union

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.recompute import again, is_compiling, without_autocast

# How many numbers are held in the wider precision at once; they should fit
# into a core's cache.
_AT_ONCE = 1 << 18


class BatchStats(NamedTuple):
    """Statistics of a batch's pixels, channel by channel.

    Attributes:
        mean: Shape (channels,).
        var: Biased, shape (channels,).
        count: Pixels in the batch, over all processes that share it.
    """

    mean: Tensor
    var: Tensor
    count: Union[int, Tensor]


class Moments(NamedTuple):
    """Mean and covariance of a batch's pixels, group by group.

    Attributes:
        mean: Shape (groups, c) for c channels a group.
        cov: Shape (groups, c, c), biased.
        count: Pixels in the batch, over all processes that share it.
    """

    mean: Tensor
    cov: Tensor
    count: Union[int, Tensor]

    def through(self, kernel: Tensor) -> BatchStats:
        """Statistics after a 1x1 kernel.

        Args:
            kernel: Shape (out, c, 1, 1).
        """
        rows = self._rows(kernel)
        var = (torch.matmul(rows, self.cov) * rows).sum(-1)
        var = var.reshape(-1).clamp_min(0)
        return BatchStats(self.mean_through(kernel), var, self.count)

    def mean_through(self, kernel: Tensor) -> Tensor:
        """The mean (out,) after a 1x1 kernel (out, c, 1, 1)."""
        mean = torch.matmul(self._rows(kernel), self.mean[..., None])
        return mean.reshape(-1)

    def _rows(self, kernel: Tensor) -> Tensor:
        groups, inner = self.mean.shape
        return kernel.to(self.cov.dtype).reshape(groups, -1, inner)


class Maps(NamedTuple):
    """The images themselves, for statistics of maps that are not kept.

    Attributes:
        x: Shape (N, C, H, W).
        groups: Groups of the kernels.
        norm: A norm that says over which processes.
    """

    x: Tensor
    groups: int
    norm: Optional[_BatchNorm]

    def through(self, kernel: Tensor) -> BatchStats:
        """See :meth:`Moments.through`."""

        def statistics(x: Tensor, kernel: Tensor) -> Tensor:
            z = F.conv2d(x, kernel.to(x.dtype), groups=self.groups)
            z = z.to(near_dtype(x.dtype))
            var, mean = torch.var_mean(z, (0, 2, 3), correction=0)
            return torch.stack([mean, var])

        with without_autocast(self.x.device):
            mean, var = again(statistics, self.x, kernel)
        found = Moments(mean[:, None], var[:, None, None], pixels_of(self.x))
        found = _over_processes(found, self.norm)
        return BatchStats(found.mean[:, 0], found.cov[:, 0, 0], found.count)


def moments_of(
    x: Tensor, groups: int, norm: Optional[_BatchNorm] = None
) -> Moments:
    """Mean and covariance of a batch's pixels, differentiable twice.

    Args:
        x: Images of shape (N, C, H, W).
        groups: Channels are taken in this many groups.
        norm: A norm that says over which processes; by default this one.
    """
    with without_autocast(x.device):
        found = Moments(*_MomentsOf.apply(x, groups), pixels_of(x))
        return _over_processes(found, norm)


def stats_of(x: Tensor, norm: Optional[_BatchNorm] = None) -> BatchStats:
    """Statistics of a batch's pixels, differentiable twice.

    Args:
        x: Images of shape (N, C, H, W).
        norm: A norm that says over which processes; by default this one.
    """
    found = moments_of(x, x.shape[1], norm)
    return BatchStats(found.mean[:, 0], found.cov[:, 0, 0], found.count)


def pixels_of(x: Tensor) -> int:
    """Pixels in a batch, over all its images."""
    return x.shape[0] * x.shape[2] * x.shape[3]


def near_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64: what a norm computes in."""
    return torch.promote_types(dtype, torch.float32)


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32 for half precision, float64 for what is wider."""
    half = dtype in (torch.float16, torch.bfloat16)
    return torch.float32 if half else torch.float64


# -------------------------------------------------------------- one process


class _MomentsOf(torch.autograd.Function):
    """Keeps its input alone; backward is one 1x1 convolution."""

    @staticmethod
    def forward(ctx, x, groups):
        wide, count = wide_dtype(x.dtype), max(pixels_of(x), 1)
        # Centred first: a difference of large squares would lose digits. In
        # float32, which is faster; what this rounds is taken off below.
        near = near_dtype(x.dtype)
        centre = x.mean((0, 2, 3), dtype=near).reshape(-1, 1, 1)
        rest, cov = 0, 0
        for images in _in_parts(x):
            pixels = _in_rows((images - centre).to(wide), groups)
            rest = rest + pixels.sum((0, -1))
            product = torch.matmul(pixels, pixels.transpose(-1, -2))
            cov = cov + product.sum(0)
        rest = rest / count
        cov = cov / count - rest[..., None] * rest[..., None, :]
        mean = centre.to(wide).reshape(groups, -1) + rest
        ctx.save_for_backward(x, mean)
        ctx.groups = groups
        return mean, cov

    @staticmethod
    def backward(ctx, grad_mean, grad_cov):
        x, mean = ctx.saved_tensors
        count = max(pixels_of(x), 1)
        # d cov = (x - mean) (dx)^T + its transpose, over the pixels.
        kernel = (grad_cov + grad_cov.transpose(-1, -2)) / count
        kernel = kernel.reshape(x.shape[1], -1, 1, 1).to(x.dtype)
        near = near_dtype(x.dtype)
        pixels = (x - mean.to(near).reshape(-1, 1, 1)).to(x.dtype)
        shift = (grad_mean / count).to(x.dtype).reshape(-1, 1, 1)
        with without_autocast(x.device):
            if kernel.shape[1] == 1:  # a channel each
                return pixels * kernel[:, 0] + shift, None
            # Not as the convolution's bias, which torch.compile cannot lower.
            return F.conv2d(pixels, kernel, groups=ctx.groups) + shift, None


def _in_parts(x: Tensor) -> Tuple[Tensor, ...]:
    if is_compiling() or x.device.type != 'cpu' or not x.numel():
        return (x,)
    size = max(1, _AT_ONCE // x[0].numel())
    # As few as that gives, and of one size as near as can be.
    return x.chunk(-(-x.shape[0] // size))


def _in_rows(x: Tensor, groups: int) -> Tensor:
    """From (n, C, h, w) to (m, groups, C / groups, pixels)."""
    many, channels, height, width = x.shape
    area, inner = height * width, channels // groups
    if not x.is_contiguous():  # channels last: no copy needed
        rows = x.permute(0, 2, 3, 1).reshape(1, many * area, groups, inner)
        return rows.permute(0, 2, 3, 1)
    if area >= inner:
        return x.reshape(many, groups, inner, area)
    # One product, not one a small image.
    return x.transpose(0, 1).reshape(1, groups, inner, many * area)


# ----------------------------------------------------------- many processes


def synchronizes(norm: Optional[nn.Module]) -> bool:
    """Whether a norm shares its batch with other processes now."""
    return (
        isinstance(norm, nn.SyncBatchNorm)
        and norm.training
        and dist.is_available()
        and dist.is_initialized()
        and dist.get_world_size(norm.process_group) > 1
    )


class _Sum(torch.autograd.Function):
    """The sum over processes; torch's own is deprecated."""

    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        x = x.clone()
        dist.all_reduce(x, group=group)
        return x

    @staticmethod
    def backward(ctx, grad):
        return _Sum.apply(grad, ctx.group), None


def _over_processes(moments: Moments, norm: Optional[_BatchNorm]) -> Moments:
    """Sum moments over the processes of a norm, differentiably."""
    if not synchronizes(norm):
        return moments
    mean, cov = moments.mean.double(), moments.cov.double()
    second = cov + mean[..., None] * mean[..., None, :]
    sums = torch.cat(
        [
            mean.new_ones(1),
            mean.reshape(-1),
            second.reshape(-1),
        ]
    )
    sums = _Sum.apply(sums * moments.count, norm.process_group)
    count = sums[0].detach()
    mean_, second_ = (sums[1:] / count).split([mean.numel(), cov.numel()])
    mean_, second_ = mean_.reshape(mean.shape), second_.reshape(cov.shape)
    cov_ = second_ - mean_[..., None] * mean_[..., None, :]
    wide = moments.cov.dtype
    return Moments(mean_.to(wide), cov_.to(wide), count)
