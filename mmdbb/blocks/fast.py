# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""The fast forward pass of a branch sum: same arithmetic, less work.

Outputs, gradients and running statistics equal those of
:meth:`BranchSumConv2d.forward_branches`. The package would be correct without
this file, only slower. :mod:`mmdbb.blocks.frozen` handles blocks whose norms
are all in eval mode. In training mode the way depends on the branch and the
batch; for each branch the first row that applies is taken:

=========  ==========================================  ====================
branch     where                                       way
=========  ==========================================  ====================
(all)      transposed convolutions                     branches one by one
(all)      small batches                               branches one by one
(all)      depthwise blocks, unless the kernel is      the whole sum is
           large (:data:`_LARGE`)                      computed again
kxk        smaller than a large depthwise kernel       ``_again_as_it_is``
1x1_kxk    many pixels for its channels                ``_collapsed``
1x1_kxk    elsewhere                                   ``_in_sequence``
1x1_avg    depthwise blocks                            ``_pooled_once``
1x1_avg    where moments are known                     ``_pooled_first``
1x1_avg    elsewhere                                   ``_avg_again``
1x1        where moments are known, and it reads       ``_scaled_before``
           every pixel
1x1        beside a collapsed 1x1_kxk, or with at      ``_again_as_it_is``
           least four times as many channels out as in
(others)   everywhere                                  their own forward
=========  ==========================================  ====================

:data:`_WAYS` is the same table in code. "Computed again" means that the
backward pass recomputes intermediate maps (:mod:`mmdbb.recompute`), so that
the forward pass need not keep them. It gets the border values of its own
forward pass, because they come from running statistics, which have moved on
by then.

*Moments.* Mean and covariance of the images give the statistics that the norm
behind a 1x1 will see, before the 1x1 is computed
(:mod:`mmdbb.branches.moments`). The norm is then a known scale a and shift c.
They are computed where a 1x1_kxk branch is collapsed, and shared by the
branches beside it.

*Collapsed.* A 1x1, a norm and a KxK become one kernel
:math:`W_2 \circ (a W_1)` on x, plus the KxK's response to a constant image: c
inside, the border value v on the border.

*Pooled first.* Pooling commutes with a 1x1. Let q be the zero-padded pooling
of x, P the 1x1 kernel and b the pooling of an image that is zero inside and
one on the border. Then the second norm reads a P q + c + (v - c) b.

*Half precision.* Under autocast, and in half-precision networks, kernels are
composed in float32; images and convolutions stay in half. Statistics come from
the 1x1's output, which is computed for them and dropped, as on GPUs. Moments
would not do: with them a gamma's gradient is a kernel's gradient minus the
mean's share, and a kernel's gradient that is rounded to half has lost the
digits of that difference.
"""

from __future__ import annotations

import math
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Type,
    TypeVar,
    Union,
)

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.frozen import frozen_forward
from mmdbb.branches.base import Branch, ConvNormBranch
from mmdbb.branches.composed import ComposedKxK
from mmdbb.branches.identity import Identity
from mmdbb.branches.kxk import KxK
from mmdbb.branches.moments import (
    Maps,
    Moments,
    moments_of,
    near_dtype,
    pixels_of,
    synchronizes,
)
from mmdbb.branches.norm import (
    batch_scale_shift,
    border_value,
    norm_then_pad,
    run_norm,
)
from mmdbb.branches.pointwise import Pointwise
from mmdbb.branches.pointwise_avg import PointwiseAvg
from mmdbb.branches.pointwise_kxk import (
    IdentityConv1x1,
    PointwiseKxK,
    mask_kernel,
)
from mmdbb.dimensions import AVG_POOL, CONV, per_channel
from mmdbb.geometry import (
    ConvSpec,
    IntPair,
    add_shift,
    border_mask,
    convolve,
    pad2d,
)
from mmdbb.kernels import ComposedKernel
from mmdbb.modules import is_known, is_replica, is_watched
from mmdbb.recompute import (
    again,
    autocast_dtype,
    is_compiling,
    is_transformed,
    without_autocast,
)
from mmdbb.transforms import compose_1x1_kxk

if TYPE_CHECKING:
    from typing import TypeGuard

    from mmdbb.blocks.branch_sum import BranchSumConv2d

_Kind = TypeVar('_Kind', bound=Branch)

# ---------------------------------------------------------------- dispatch


def fast_forward(block: BranchSumConv2d, x: Tensor) -> Tensor:
    """Compute ``block.forward_branches(x)`` in the cheapest way known.

    Args:
        block: A ``BranchSumConv2d`` that is not merged.
        x: Images of shape (N, in, H, W).

    Returns:
        Tensor: Shape (N, out, H', W').
    """
    norms = _norms_of(block)
    modes = {norm.training for norm in norms}
    if len(modes) != 1:
        return block.forward_branches(x)
    # Asked in training only: what asks for a size fixes it when exported.
    if modes == {True} and (block.transposed or _stays_literal(block, x)):
        return block.forward_branches(x)
    y, dtype = None, _conv_dtype(block, norms, x)
    if dtype is not None and _is_left_alone(block, x):
        if modes == {False}:
            y = frozen_forward(block, x, dtype)
        elif _share_statistics_alike(norms):
            y = _training_forward(block, x, dtype)
    return block.forward_branches(x) if y is None else y


def _norms_of(block: BranchSumConv2d) -> List[_BatchNorm]:
    places = [*block.branches.values(), block]
    children = [m for place in places for m in place._modules.values()]
    return [m for m in children if isinstance(m, _BatchNorm)]


def _conv_dtype(
    block: BranchSumConv2d, norms: List[_BatchNorm], x: Tensor
) -> Optional[torch.dtype]:
    """Precision of the branches' convolutions; None if dtypes do not fit."""
    of_norms = {id(p) for norm in norms for p in norm.parameters()}
    kernels = {p.dtype for p in block.parameters() if id(p) not in of_norms}
    if any(norm.running_mean is None for norm in norms):
        return None
    tracking: List[Any] = norms
    scales = {norm.running_mean.dtype for norm in tracking}
    halves = {torch.float16, torch.bfloat16, torch.float32}
    half = autocast_dtype(x.device.type)
    if half is not None and {x.dtype, *kernels, *scales} <= halves:
        return half
    if kernels <= {x.dtype} and scales <= {x.dtype, near_dtype(x.dtype)}:
        return x.dtype if x.is_floating_point() else None
    return None


def _is_left_alone(block: BranchSumConv2d, x: Tensor) -> bool:
    """Whether only known layers run inside the branches, unwatched."""
    if not is_compiling() and (torch.jit.is_tracing() or is_transformed()):
        return False
    if x.is_meta or is_replica(block) or is_watched(block):
        return False
    layers = [m for b in block.branches.values() for m in b.children()]
    own = (IdentityConv1x1, ComposedKernel)
    return all(
        is_known(layer) or isinstance(layer, own)
        for layer in (*layers, *filter(None, [block.norm]))
    )


def _share_statistics_alike(norms: List[_BatchNorm]) -> bool:
    """Whether all norms share their batch with the same processes, or none.

    Shared statistics cannot be compiled: no compiler follows an all-reduce in
    an ``autograd.Function``.
    """
    shared = {
        (synchronizes(norm), getattr(norm, 'process_group', None))
        for norm in norms
    }
    return len(shared) == 1 and not (next(iter(shared))[0] and is_compiling())


def _stays_literal(block: BranchSumConv2d, x: Tensor) -> bool:
    """Whether to run branches one by one because the batch is small.

    Batches so small that norms refuse them count, so that the norms raise
    their own error. With SyncBN no batch counts as small: all processes must
    take the same way, whatever the size of their own images.
    """
    if any(map(synchronizes, _norms_of(block))):
        return False
    pixels = pixels_of(x)
    if pixels <= 1 or _batch_pixels(block.spec, x) <= 1:
        return True
    return _is_small(block.spec, pixels)


def _is_small(spec: ConvSpec, pixels: int) -> bool:
    """Whether the fast way would cost more than it saves.

    It adds work for statistics and kernels that does not grow with the batch.
    The limits were measured with ``tools/benchmark.py --plot``.

    Args:
        spec: Geometry of the block.
        pixels: Number of pixels in the batch.
    """
    if spec.is_depthwise:
        return pixels * spec.in_channels < 25_000
    work = pixels * spec.in_channels * spec.out_channels // spec.groups
    return pixels < 350 or work < 20_000_000


def _batch_pixels(spec: ConvSpec, x: Tensor) -> int:
    """Number of pixels in the block's output, over the whole batch."""
    count, pads = x.shape[0], spec.pads
    sides = zip(x.shape[2:], pads[::2], pads[1::2])
    size = [n + before + after for n, before, after in sides]
    for n, k, d, s in zip(size, spec.kernel_size, spec.dilation, spec.stride):
        count *= (n - d * (k - 1) - 1) // s + 1
    return count


# -------------------------------------------------- norms in training mode


class _Batch(NamedTuple):
    """The batch of one forward pass, and all that the branches share.

    Attributes:
        x: The images, as the block got them.
        half: The images in the precision of the convolutions.
        stats: Statistics behind a 1x1, from moments or from maps that are not
            kept; None if no branch is collapsed.
        borders: The border value of each norm in this forward pass, by the
            ``id`` of the norm's running mean.
    """

    x: Tensor
    half: Tensor
    stats: Union[Moments, Maps, None]
    borders: Dict[int, Tensor]

    def border(self, norm: _BatchNorm, mean: Callable) -> Tensor:
        """The value on the border behind a norm, as in the first run.

        See :func:`border_value` for the arguments. A second run in the
        backward pass gets the value of the forward pass.
        """
        key = id(norm.running_mean)
        if key not in self.borders:
            self.borders[key] = border_value(norm, mean)
        return self.borders[key]


#: Taps from which on a depthwise kernel runs once and its output is kept.
#: Measured on a CPU: computed again as a whole, a step of 9x9 takes a tenth
#: longer, one of 31x31 a third, and keeps half as much.
_LARGE = 13 * 13

# Forward methods that read no state but the border, which is kept. So they
# compute the same when they are run again in the backward pass.
_KNOWN = (
    ConvNormBranch.forward,
    Identity.forward,
    ComposedKxK.forward,
    PointwiseAvg.forward,
    PointwiseKxK.forward,
)


def _training_forward(
    block: BranchSumConv2d, x: Tensor, dtype: torch.dtype
) -> Optional[Tensor]:
    borders: Dict[int, Tensor] = {}

    def branches(of_block: Any, x: Tensor) -> Tensor:
        return _training_sum(list(of_block.values()), x, dtype, borders)

    if not block.spec.is_depthwise or _is_large(block.spec):
        y = branches(block.branches, x)
    elif all(type(b).forward in _KNOWN for b in block.branches.values()):
        y = again(branches, x, module=block.branches)
    else:
        return None  # an unknown branch may read state that has changed
    if block.own_bias is not None:
        y = y + per_channel(block.own_bias.to(y.dtype), block.dims)
    return y if block.norm is None else run_norm(block.norm, y)


def _is_large(spec: ConvSpec) -> bool:
    """Whether a depthwise kernel is too large to run again."""
    taps = math.prod(spec.kernel_size)
    return spec.is_depthwise and taps >= _LARGE


def _training_sum(
    branches: List[Branch],
    x: Tensor,
    dtype: torch.dtype,
    borders: Dict[int, Tensor],
) -> Tensor:
    stats, half = None, x.to(dtype)
    collapsing = [b for b in branches if _collapses(b, half)]
    if collapsing:
        norm, spec = collapsing[0].norm1, collapsing[0].spec
        serve = _takes_moments(half, spec.is_depthwise)
        stats = (moments_of if serve else Maps)(half, spec.groups, norm)
    batch = _Batch(x, half, stats, borders)
    y: Any = None  # there is at least one branch
    for branch in branches:
        z = _training_branch(branch, batch)
        if y is None:
            y = z
            # An identity without a norm returns a view of the input, to which
            # nothing may be added in place.
            is_new = branch.last_norm is not None
        else:
            in_place = is_new and y.dtype == z.dtype
            y = y.add_(z) if in_place else y + z
            is_new = True
    return y


def _takes_moments(x: Tensor, depthwise: bool) -> bool:
    """Whether to use covariances, not maps; see :mod:`mmdbb.branches.moments`.

    Args:
        x: The images, in the precision of the convolutions.
        depthwise: Whether the block is depthwise.
    """
    if x.device.type != 'cpu':
        return False
    # The covariance of a single channel is its variance, exact enough in half.
    return depthwise or near_dtype(x.dtype) == x.dtype


def _collapses(branch: Branch, x: Tensor) -> TypeGuard[PointwiseKxK]:
    """Whether a branch is a 1x1, norm, KxK that should become one kernel.

    For each pair of an input channel and a channel in the middle, composing
    takes out x taps products, and saves the products of the 1x1, one for each
    pixel. The former count four times, because products of kernels run slower
    than convolutions.
    """
    if not _is_a(branch, PointwiseKxK):
        return False
    spec = branch.spec
    taps = math.prod(spec.kernel_size)
    work = 4 * spec.out_channels // spec.groups * taps
    # Processes that share statistics must all take the same way, whatever the
    # size of their own images. So a fixed number stands for the pixels.
    pixels = 5000 if synchronizes(branch.norm1) else pixels_of(x)
    return work <= pixels


def _is_a(branch: Branch, kind: Type[_Kind]) -> TypeGuard[_Kind]:
    """Whether a branch is of a kind, and has the forward of that kind."""
    return isinstance(branch, kind) and type(branch).forward is kind.forward


def _training_branch(branch: Branch, batch: _Batch) -> Tensor:
    """Compute one branch, in the way that :data:`_WAYS` gives for it."""
    for kind, ways in _WAYS.items():
        if _is_a(branch, kind):
            for applies, way in ways:
                if applies(branch, batch):
                    return way(branch, batch)
    return branch(batch.x if isinstance(branch, Identity) else batch.half)


def _always(branch: Branch, batch: _Batch) -> bool:
    return True


def _is_depthwise(branch: Branch, batch: _Batch) -> bool:
    return branch.spec.is_depthwise


def _is_small_in_large(branch: KxK, batch: _Batch) -> bool:
    """Whether running a depthwise kernel again costs little beside the sum."""
    return _is_large(branch.spec) and not branch.is_dense


def _has_moments(branch: Branch, batch: _Batch) -> bool:
    """Whether statistics behind a 1x1 are known before it is computed."""
    return isinstance(batch.stats, Moments)


def _collapses_here(branch: Branch, batch: _Batch) -> bool:
    """Whether a 1x1_kxk branch becomes one kernel for this batch."""
    return batch.stats is not None and _collapses(branch, batch.half)


def _scales_its_kernel(branch: Pointwise, batch: _Batch) -> bool:
    """Whether the norm of a 1x1 can be put into its kernel beforehand.

    The moments are those of all pixels of the image, so the 1x1 must read
    each of them, and nothing else.
    """
    spec = branch.spec
    return (
        branch.norm is not None
        and _has_moments(branch, batch)
        and not spec.is_depthwise
        and not spec.is_strided
        and not any(spec.pads_of((1,) * spec.dims))
    )


def _is_worth_again(branch: Pointwise, batch: _Batch) -> bool:
    """Whether to compute a 1x1 again instead of keeping its output.

    It is cheap where few channels become many; and beside a 1x1_kxk branch
    most of the sum is computed again anyway.
    """
    few = 4 * branch.spec.in_channels <= branch.spec.out_channels
    return branch.norm is not None and (few or batch.stats is not None)


def _scaled_before(branch: Pointwise, batch: _Batch) -> Tensor:
    """Put the norm into the 1x1 kernel, by statistics known beforehand."""
    x = batch.half
    moments: Any = batch.stats  # known, as is the norm
    norm: Any = branch.norm
    with without_autocast(x.device):
        weight = branch.conv.weight
        scale, shift = batch_scale_shift(norm, moments.through(weight))
        exact = _scaled(weight.to(scale.dtype), scale)
        kernel = exact.to(x.dtype)
        # The norm centres the output of the rounded kernel, not of the exact.
        shift = shift + moments.mean_through(exact - kernel)
        dims = branch.spec.dims
        z = CONV[dims](x, kernel, groups=branch.spec.groups)
        return add_shift(z, per_channel(shift, dims))


def _collapsed(branch: PointwiseKxK, batch: _Batch) -> Tensor:
    """Run 1x1, norm and KxK as one kernel; see "Collapsed" above."""
    spec, x, kernel1 = branch.spec, batch.half, branch.kernel1
    known: Any = batch.stats
    near = near_dtype(x.dtype)
    with without_autocast(x.device):
        stats = known.through(kernel1)
        scale, shift = batch_scale_shift(branch.norm1, stats)
        first = _scaled(kernel1.to(scale.dtype), scale).to(near)
        shift, kernel2 = shift.to(near), branch.conv2.weight.to(near)
        kernel = again(
            lambda one, many: compose_1x1_kxk(one, many, spec.groups),
            first,
            kernel2,
        )
        # This is the constant inside the image. On the border it differs.
        constant = mask_kernel(kernel2, shift, spec.groups)
        constant = per_channel(constant.flatten(1).sum(1), spec.dims)
        if spec.has_border:
            value = batch.border(branch.norm1, stats.mean.detach)
            constant = constant + CONV[spec.dims](
                border_mask(x, spec.pads).to(near),
                mask_kernel(kernel2, value.to(near) - shift, spec.groups),
                stride=spec.stride,
                dilation=spec.dilation,
            )
        z = add_shift(convolve(x, kernel, None, spec), constant)
    return run_norm(branch.norm2, z)


def _pooled_first(branch: PointwiseAvg, batch: _Batch) -> Tensor:
    """Pool, then run 1x1 and norm; see "Pooled first" above."""
    spec, x, weight = branch.spec, batch.half, branch.conv1.weight
    area, dims = math.prod(spec.kernel_size), spec.dims
    known: Any = batch.stats
    with without_autocast(x.device):
        stats = known.through(weight)
        scale, shift = batch_scale_shift(branch.norm1, stats)
        exact = _scaled(weight.to(scale.dtype), scale) / area
        kernel = exact.to(x.dtype)
        # As in _scaled_before.
        shift = shift + known.mean_through(exact - kernel) * area
        shift = shift.to(near_dtype(x.dtype))
        value = shift
        if spec.has_border:
            value = batch.border(branch.norm1, stats.mean.detach)

        def pooled(
            norm: _BatchNorm, x: Tensor, kernel: Tensor, shift: Tensor
        ) -> Tensor:
            q = pool_sum(x, spec)
            z = CONV[dims](q, kernel, groups=spec.groups)
            constant = per_channel(shift, dims)
            if spec.has_border:
                border = border_mask(x, spec.pads).to(shift.dtype)
                b = pool_sum(border, spec, padded=True) / area
                outside = per_channel(value, dims) - constant
                constant = constant + outside * b
            return run_norm(norm, add_shift(z, constant))

        return again(pooled, x, kernel, shift, module=branch.norm2)


def _avg_again(branch: PointwiseAvg, batch: _Batch) -> Tensor:
    """Compute the branch as it is; the backward pass computes it again."""

    def averaged(branch: PointwiseAvg, x: Tensor) -> Tensor:
        z = branch.conv1(x)
        y = norm_then_pad(branch.norm1, z, branch.spec, batch.border)
        y = pool_sum(y, branch.spec, padded=True, mean=True)
        return run_norm(branch.norm2, y)

    return again(averaged, batch.half, module=branch)


def _pooled_once(branch: PointwiseAvg, batch: _Batch) -> Tensor:
    """A depthwise branch has no 1x1: it pools, and a norm follows."""
    y = pool_sum(batch.x, branch.spec, mean=True)
    return run_norm(branch.norm2, y)


def _in_sequence(branch: PointwiseKxK, batch: _Batch) -> Tensor:
    """Run the branch layer by layer, with the border of this pass."""
    y = norm_then_pad(
        branch.norm1, branch.conv1(batch.half), branch.spec, batch.border
    )
    return run_norm(branch.norm2, branch.conv2(y))


def _again_as_it_is(branch: Branch, batch: _Batch) -> Tensor:
    """Run the branch as it is; the backward pass runs it again."""
    return again(lambda b, x: b(x), batch.half, module=branch)


# A condition, and the way to compute a branch where it holds.
_Way = Tuple[Callable[..., bool], Callable[..., Tensor]]

#: Kind of branch -> conditions and ways. The first condition that holds says
#: how a branch of this kind is computed; where none does, and for all other
#: kinds, the branch's own forward is.
_WAYS: Dict[Type[Branch], Tuple[_Way, ...]] = {
    KxK: ((_is_small_in_large, _again_as_it_is),),
    PointwiseKxK: (
        (_collapses_here, _collapsed),
        (_always, _in_sequence),
    ),
    PointwiseAvg: (
        (_is_depthwise, _pooled_once),
        (_has_moments, _pooled_first),
        (_always, _avg_again),
    ),
    Pointwise: (
        (_scales_its_kernel, _scaled_before),
        (_is_worth_again, _again_as_it_is),
    ),
}


# ----------------------------------------------------------------- helpers


def pool_sum(
    x: Tensor, spec: ConvSpec, padded: bool = False, mean: bool = False
) -> Tensor:
    """Sum or average the pixels in each window of a geometry.

    On a CPU a depthwise convolution with ones is several times faster than
    torch's own pooling, and exact in half precision too. Elsewhere torch's
    pooling reads the image once, in any precision.

    Args:
        x: Images of shape (N, C, H, W).
        spec: Geometry of the windows. Padded pixels count for the average.
        padded: Whether ``x`` is padded already.
        mean: Whether to average instead of summing.
    """
    # torch's pooling of lines cannot sum.
    if x.device.type == 'cpu' or spec.is_dilated or spec.dims == 1:
        return pool_by_convolution(x, spec, padded, mean)
    return pool_by_torch(x, spec, padded, mean)


def pool_by_convolution(
    x: Tensor, spec: ConvSpec, padded: bool, mean: bool
) -> Tensor:
    """:func:`pool_sum` as a depthwise convolution with ones."""
    padding: Union[int, str, IntPair]
    channels, padding = x.shape[1], spec.padding
    if padded:
        padding = 0
    elif isinstance(padding, str) or spec.padding_mode != 'zeros':
        x, padding = pad2d(x, spec.pads, spec.padding_mode), 0
    dtype, area = x.dtype, math.prod(spec.kernel_size)
    if mean:  # so that the result is rounded once, as torch's pooling is
        x = x.to(near_dtype(dtype))
    ones = x.new_ones(channels, 1, *spec.kernel_size)
    with without_autocast(x.device):
        y = CONV[spec.dims](
            x, ones, None, spec.stride, padding, spec.dilation, channels
        )
    return y.div_(area).to(dtype) if mean else y


def pool_by_torch(
    x: Tensor, spec: ConvSpec, padded: bool, mean: bool
) -> Tensor:
    """:func:`pool_sum` by torch's pooling, for windows without dilation."""
    if not padded:
        x = pad2d(x, spec.pads, spec.padding_mode)
    divisor = None if mean else 1
    return AVG_POOL[spec.dims](
        x, spec.kernel_size, spec.stride, divisor_override=divisor
    )


def _scaled(kernel: Tensor, scale: Tensor) -> Tensor:
    return kernel * per_channel(scale, kernel.dim() - 1)
