# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The geometry of a convolution: everything but its weights.

The 1x1, kx1 and 1xk branches have a small kernel that stands for a large one
with zeros around it (DBB paper, sec. 3.2, Transform VI). Both give the same
output only if the small kernel reads the pixels under its own taps. Its first
tap lies some rows and columns inside the large kernel, so the small
convolution pads less by as much, or even crops the image.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Iterable, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdbb.recompute import is_compiling, is_transformed

PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')

IntPair = Tuple[int, int]
# Pixels to add at each side; a negative number crops.
Pads = Tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class ConvSpec:
    """The geometry of an ``nn.Conv2d``, checked and brought to one form.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Step in pixels.
        padding: Pixels on each side, ``'same'``, ``'valid'``, or
            ``'adaptive'``: as many zeros as each image needs so that the
            output has one pixel for each ``stride`` pixels, rounded up.
            Stored as (rows, columns) where both sides of any image get
            equally many pixels; stays ``'same'`` where they do not (an even
            kernel), ``'adaptive'`` where it depends on the image (a stride).
        dilation: Distance between two neighbouring taps in pixels.
        groups: Number of groups that channels are split into.
        padding_mode: One of ``zeros``, ``reflect``, ``replicate`` and
            ``circular``.

    Raises:
        TypeError: If an argument has a type that ``nn.Conv2d`` does not take.
        ValueError: If a value is out of range; the message names the
            argument.

    Examples:
        >>> spec = ConvSpec(4, 8, 3, padding='same', dilation=2)
        >>> spec.padding, spec.pads
        ((2, 2), (2, 2, 2, 2))
    """

    in_channels: int
    out_channels: int
    kernel_size: Union[int, IntPair]
    stride: Union[int, IntPair] = 1
    padding: Union[int, str, IntPair] = 0
    dilation: Union[int, IntPair] = 1
    groups: int = 1
    padding_mode: str = 'zeros'

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        for name in ('in_channels', 'out_channels', 'groups'):
            value = getattr(self, name)
            if not _is_int(value):
                raise TypeError(f'{name} must be an int, got {value!r}')
            if value < 1:
                raise ValueError(f'{name} must be at least 1, got {value}')
            set_field(self, name, int(value))
        for name, lowest in (
            ('kernel_size', 1),
            ('stride', 1),
            ('dilation', 1),
        ):
            set_field(self, name, _pair(name, getattr(self, name), lowest))
        for name in ('in_channels', 'out_channels'):
            if getattr(self, name) % self.groups:
                raise ValueError(
                    f'{name} must be divisible by groups, got {name}='
                    f'{getattr(self, name)}, groups={self.groups}'
                )
        if self.padding_mode not in PADDING_MODES:
            raise ValueError(
                f'padding_mode must be one of {", ".join(PADDING_MODES)}, '
                f'got {self.padding_mode!r}'
            )
        set_field(self, 'padding', self._normalised_padding())

    def _normalised_padding(self) -> Union[str, IntPair]:
        if not isinstance(self.padding, str):
            return _pair('padding', self.padding, 0)
        if self.padding == 'valid':
            return (0, 0)
        if self.padding not in ('same', 'adaptive'):
            raise ValueError(
                "padding must be numbers of pixels, 'same', 'valid' or "
                f"'adaptive', got {self.padding!r}"
            )
        if self.padding == 'adaptive':
            if self.padding_mode != 'zeros':
                raise ValueError(
                    "padding='adaptive' pads with zeros, got padding_mode="
                    f'{self.padding_mode!r}'
                )
            if self.is_pointwise:
                return (0, 0)
        if self.padding == 'adaptive' and self.stride != (1, 1):
            return 'adaptive'
        if self.stride != (1, 1):
            raise ValueError(
                f"padding='same' needs stride 1, got stride={self.stride}"
            )
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        if any(t % 2 for t in total):
            return 'same'
        return (total[0] // 2, total[1] // 2)

    def at_size(self, size: IntPair) -> ConvSpec:
        """The geometry for images of one size, whose pads are known.

        Args:
            size: Height and width of the images in pixels.
        """
        if self.padding != 'adaptive':
            return self
        pads = adaptive_pads(
            size, self.kernel_size, self.stride, self.dilation
        )
        return _SizedSpec(**asdict(self), sized_pads=pads)

    @property
    def pads(self) -> Pads:
        """Pixels added at the top, bottom, left and right.

        If they depend on the image, as in :attr:`largest_pads`.
        """
        return self.largest_pads

    @property
    def largest_pads(self) -> Pads:
        """The most pixels that any image gets at its four sides."""
        if not isinstance(self.padding, str):
            high, wide = self.padding
            return (high, high, wide, wide)
        pads = []
        for k, d in zip(self.kernel_size, self.dilation):
            before = d * (k - 1) // 2
            pads += [before, d * (k - 1) - before]
        return tuple(pads)

    @property
    def has_border(self) -> bool:
        """Whether images are padded with zeros."""
        return self.padding_mode == 'zeros' and any(self.pads)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads its own input channel only."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel has a single tap."""
        return self.kernel_size == (1, 1)

    @property
    def kernel_shape(self) -> Tuple[int, int, int, int]:
        """Shape of the weight: (out, in / groups, kH, kW)."""
        return (
            self.out_channels,
            self.in_channels // self.groups,
            *self.kernel_size,
        )

    @property
    def centre(self) -> IntPair:
        """The tap (row, column) at which a 1x1 kernel stands in this one.

        That is the middle tap. An even kernel has two; of these it is the one
        that reads the pixel nearer to the output's own position.
        """
        # Not that of a single image: one kernel serves all sizes.
        top, _, left, _ = self.largest_pads
        return tuple(
            min((k // 2, (k - 1) // 2), key=lambda tap: abs(tap * d - before))
            for k, d, before in zip(
                self.kernel_size, self.dilation, (top, left)
            )
        )

    def inner_kernel(self, size, dilation) -> Tuple[IntPair, IntPair]:
        """Check and complete a smaller kernel that a user describes.

        Args:
            size: Height and width of the smaller kernel in taps, or one
                number for both.
            dilation: How many of this kernel's taps lie between the starts of
                two of its taps, rows and columns, or one number for both.

        Returns:
            tuple: The size and the dilation, in rows and columns each.

        Raises:
            TypeError: If one of them is no number and no pair.
            ValueError: If a number is smaller than 1.
        """
        return _pair('kernel_size', size, 1), _pair('dilation', dilation, 1)

    def has_room_for(self, size: IntPair, dilation: IntPair) -> bool:
        """Whether a smaller kernel fits into this one, around its middle.

        It has to end inside, and the number of taps that it spans has to be
        even or odd as this kernel's is; otherwise its middle would lie
        between two taps.

        Args:
            size: Height and width of the smaller kernel in taps.
            dilation: As in :meth:`inner_kernel`.
        """
        return all(
            span <= k and (k - span) % 2 == 0
            for span, k in zip(_spans(size, dilation), self.kernel_size)
        )

    def offset_of(
        self, size: IntPair, dilation: Optional[IntPair] = None
    ) -> IntPair:
        """Where a smaller kernel's first tap (row, column) stands in this one.

        Args:
            size: Height and width of the smaller kernel, each either 1, which
                stands at the centre, or a number for which
                :meth:`has_room_for` holds.
            dilation: As in :meth:`inner_kernel`; 1 by default.
        """
        return tuple(
            c if s == 1 < k else (k - span) // 2
            for s, span, k, c in zip(
                size, _spans(size, dilation), self.kernel_size, self.centre
            )
        )

    def pads_of(
        self, size: IntPair, dilation: Optional[IntPair] = None
    ) -> Pads:
        """Padding with which a smaller kernel reads the pixels of its taps.

        Args:
            size: Height and width of the smaller kernel, see
                :meth:`offset_of`.
            dilation: As in :meth:`inner_kernel`; 1 by default.

        Returns:
            tuple: Pixels at the top, bottom, left and right; a negative
            number crops.
        """
        pads = []
        for side, (first, span, k, d) in enumerate(
            zip(
                self.offset_of(size, dilation),
                _spans(size, dilation),
                self.kernel_size,
                self.dilation,
            )
        ):
            before, after = self.pads[2 * side : 2 * side + 2]
            pads += [before - d * first, after - d * (k - first - span)]
        return tuple(pads)

    @property
    def conv_args(self) -> dict:
        """Keyword arguments that build this ``nn.Conv2d``, but ``bias``.

        If the padding is adaptive, the convolution itself pads nothing.
        """
        args = asdict(self)
        return dict(args, padding=0) if self.padding == 'adaptive' else args


@dataclass(frozen=True)
class _SizedSpec(ConvSpec):
    """An adaptive geometry for images of one size.

    Args:
        sized_pads: Pixels at the top, bottom, left and right.
    """

    sized_pads: Pads = (0, 0, 0, 0)

    def at_size(self, size: IntPair) -> ConvSpec:
        return self

    @property
    def pads(self) -> Pads:
        return self.sized_pads


def adaptive_pads(
    size: IntPair, kernel_size: IntPair, stride: IntPair, dilation: IntPair
) -> Pads:
    """Pads with which there is an output pixel for each stride, rounded up.

    The rule of TensorFlow's ``SAME`` and of mmcv's
    ``Conv2dAdaptivePadding``: an odd pixel goes to the bottom and the right.

    Args:
        size: Height and width of the image in pixels.
        kernel_size: Height and width of the kernel in taps.
        stride: Step in pixels.
        dilation: Distance between two neighbouring taps in pixels.

    Returns:
        tuple: Pixels at the top, bottom, left and right.

    Examples:
        >>> adaptive_pads((8, 9), (3, 3), (2, 2), (1, 1))
        (0, 1, 1, 1)
    """
    pads = []
    for n, k, s, d in zip(size, kernel_size, stride, dilation):
        last = ((n + s - 1) // s - 1) * s  # where the last window begins
        total = max(last + (k - 1) * d + 1 - n, 0)
        pads += [total // 2, total - total // 2]
    return tuple(pads)


def pad2d(x: Tensor, pads: Pads, mode: str = 'zeros') -> Tensor:
    """Pad a batch of images, and crop it where a number is negative.

    Args:
        x: Images of shape (N, C, H, W).
        pads: Pixels at the top, bottom, left and right.
        mode: Padding mode, named as in ``nn.Conv2d``.

    Returns:
        Tensor: Shape (N, C, H + top + bottom, W + left + right).
    """
    top, bottom, left, right = pads
    grow = [max(n, 0) for n in (left, right, top, bottom)]
    if any(grow):
        x = F.pad(x, grow, 'constant' if mode == 'zeros' else mode)
    if min(pads) < 0:
        top, bottom, left, right = (max(-n, 0) for n in pads)
        x = x[..., top : x.shape[-2] - bottom, left : x.shape[-1] - right]
    return x


def convolve(
    x: Tensor, kernel: Tensor, bias: Optional[Tensor], spec: ConvSpec
) -> Tensor:
    """Convolve images with a kernel, in the images' precision.

    Args:
        x: Images of shape (N, in, H, W).
        kernel: The kernel, shape (out, in / groups, kH, kW), of any dtype.
        bias: The bias, shape (out,), or None. It may be more precise than the
            images and is added before the result is rounded.
        spec: Geometry of the convolution.

    Returns:
        Tensor: Shape (N, out, H', W'), with the images' dtype.
    """
    padding, spec = spec.padding, spec.at_size(x.shape[-2:])
    if isinstance(padding, str) or spec.padding_mode != 'zeros':
        x, padding = pad2d(x, spec.pads, spec.padding_mode), 0
    geometry = spec.stride, padding, spec.dilation, spec.groups
    kernel = kernel.to(x.dtype)
    # torch.compile cannot lower a bias that is a view of another tensor.
    if bias is None or (bias.dtype == x.dtype and not is_compiling()):
        return F.conv2d(x, kernel, bias, *geometry)
    y = F.conv2d(x, kernel, None, *geometry)
    return add_shift(y, bias.reshape(-1, 1, 1))


def add_shift(x: Tensor, shift: Tensor) -> Tensor:
    """Add a shift to images in place, and return them.

    Args:
        x: Images of shape (N, C, H, W). They are overwritten, so nothing else
            may read them.
        shift: What to add, of a shape that broadcasts to the images', such as
            (C, 1, 1) or (1, C, H, W). Of the images' dtype or more precise.

    Returns:
        Tensor: The sum, with the images' shape and dtype.
    """
    if shift.dtype == x.dtype:
        return x.add_(shift)
    if is_compiling() or is_transformed():
        return (x + shift).to(x.dtype)
    return _AddShift.apply(x, shift)


class _AddShift(torch.autograd.Function):
    """Sums the shift's gradient in its own precision.

    torch's addition would sum it in the images' precision, which may be half.
    """

    @staticmethod
    def forward(ctx, x, shift):
        ctx.shape, ctx.dtype = shift.shape, shift.dtype
        ctx.mark_dirty(x)
        return x.add_(shift)

    @staticmethod
    def backward(ctx, grad):
        extra = grad.dim() - len(ctx.shape)
        shape = (1,) * extra + tuple(ctx.shape)
        over = [i for i, n in enumerate(shape) if n == 1]
        total = grad.sum(over, keepdim=True, dtype=ctx.dtype)
        return grad, total.reshape(ctx.shape)


def border_mask(x: Tensor, pads: Pads) -> Tensor:
    """Mark the border that padding adds to images.

    Args:
        x: Images of shape (N, C, H, W), not yet padded.
        pads: Pixels at the top, bottom, left and right, none negative.

    Returns:
        Tensor: True on the border, shape (1, 1, H + top + bottom, W + left +
        right).
    """
    inside = torch.zeros(
        (1, 1, *x.shape[-2:]), dtype=torch.bool, device=x.device
    )
    top, bottom, left, right = pads
    return F.pad(inside, (left, right, top, bottom), value=True)


def _spans(size: IntPair, dilation: Optional[IntPair]) -> IntPair:
    """How many taps a kernel reaches across, from its first to its last."""
    dilation = dilation or (1,) * len(size)
    return tuple(r * (s - 1) + 1 for s, r in zip(size, dilation))


def _is_int(value) -> bool:
    """Whether a value is an integer, Python's or numpy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pair(name: str, value, lowest: int) -> IntPair:
    if _is_int(value):
        pair = (value, value)
    elif isinstance(value, Iterable) and not isinstance(value, (str, dict)):
        pair = tuple(value)
    else:
        pair = None
    if pair is None or not all(map(_is_int, pair)):
        raise TypeError(
            f'{name} must be an int or a pair of ints, got {value!r}'
        )
    if len(pair) == 3:
        raise ValueError(
            f'{name} must be one or two numbers, got {value!r}: blocks are '
            'two-dimensional, they stand for an nn.Conv2d, and not in a '
            'network of nn.Conv3d'
        )
    # torch takes one number in a sequence for both directions, but a kernel
    # of one number makes an nn.Conv2d that cannot run.
    if len(pair) == 1 and name != 'kernel_size':
        pair *= 2
    if len(pair) != 2 or min(pair) < lowest:
        raise ValueError(
            f'{name} must be one or two numbers of at least {lowest}, got '
            f'{value!r}'
        )
    return tuple(map(int, pair))
