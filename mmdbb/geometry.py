# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What a convolution is, apart from its weights.

A smaller kernel inside a larger one (the 1x1, kx1 and 1xk branches, "multi-
scale padding" in the DBB paper, sec. 3.2, Transform VI) is the same
convolution as the large one if it reads the same pixels: it starts later by
the offset of its first tap, so it pads less, or even crops.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from numbers import Integral
from typing import Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdbb.recompute import is_compiling, is_transformed

PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')

IntPair = Tuple[int, int]
# Pixels to add at each side; negative ones are cropped.
Pads = Tuple[int, int, int, int]  # top, bottom, left, right


@dataclass(frozen=True)
class ConvSpec:
    """The geometry of an ``nn.Conv2d``, normalised once.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Height and width of the kernel, or one number for both.
        stride: Step in pixels.
        padding: Pixels on each side, ``'same'`` or ``'valid'``. Stored as a
            pair wherever a pair says it; ``'same'`` stays where the two sides
            differ (an even kernel).
        dilation: Distance of two taps in pixels.
        groups: Number of groups.
        padding_mode: One of ``zeros``, ``reflect``, ``replicate`` and
            ``circular``.

    Raises:
        TypeError: If a value is not of the kind ``nn.Conv2d`` takes.
        ValueError: If a value is out of range; the message names it.

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
        if self.padding != 'same':
            raise ValueError(
                "padding must be numbers of pixels, 'same' or 'valid', got "
                f'{self.padding!r}'
            )
        if self.stride != (1, 1):
            raise ValueError(
                f"padding='same' needs stride 1, got stride={self.stride}"
            )
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        if any(t % 2 for t in total):
            return 'same'
        return (total[0] // 2, total[1] // 2)

    @property
    def pads(self) -> Pads:
        """Pixels added at the top, bottom, left and right."""
        if self.padding != 'same':
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
        """Whether each channel is filtered by itself, once."""
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
        """The tap (row, column) that a 1x1 kernel takes.

        The middle one; of the two middle taps of an even kernel the one that
        lies nearer to the output's own pixel.
        """
        top, _, left, _ = self.pads
        return tuple(
            min((k // 2, (k - 1) // 2), key=lambda tap: abs(tap * d - before))
            for k, d, before in zip(
                self.kernel_size, self.dilation, (top, left)
            )
        )

    def offset_of(self, size: IntPair) -> IntPair:
        """First tap (row, column) of a kernel of ``size`` inside this one.

        Each side is either 1 (then it sits at the centre) or full.
        """
        return tuple(
            0 if s == k else c
            for s, k, c in zip(size, self.kernel_size, self.centre)
        )

    def pads_of(self, size: IntPair) -> Pads:
        """Pads with which a kernel of ``size`` reads what its taps read.

        Negative numbers are pixels to crop.
        """
        pads = []
        for side, (first, s, k, d) in enumerate(
            zip(self.offset_of(size), size, self.kernel_size, self.dilation)
        ):
            before, after = self.pads[2 * side : 2 * side + 2]
            pads += [before - d * first, after - d * (k - first - s)]
        return tuple(pads)

    @property
    def conv_args(self) -> dict:
        """Keyword arguments of ``nn.Conv2d``, without ``bias``."""
        return asdict(self)


def pad2d(x: Tensor, pads: Pads, mode: str = 'zeros') -> Tensor:
    """Pad an image batch, or crop it where a number is negative.

    Args:
        x: Images of shape (N, C, H, W).
        pads: Pixels at the top, bottom, left and right.
        mode: A padding mode of ``nn.Conv2d``.

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
    """Convolve with a kernel of the spec's own size.

    Args:
        x: Images of shape (N, in, H, W).
        kernel: Shape (out, in / groups, kH, kW), of any precision.
        bias: Shape (out,), in the images' precision or better, or None.
        spec: The geometry.

    Returns:
        Tensor: Shape (N, out, H', W'), in the images' precision.
    """
    padding = spec.padding
    if padding == 'same' or spec.padding_mode != 'zeros':
        x, padding = pad2d(x, spec.pads, spec.padding_mode), 0
    geometry = spec.stride, padding, spec.dilation, spec.groups
    kernel = kernel.to(x.dtype)
    # torch.compile cannot lower a bias that is a view of something.
    if bias is None or (bias.dtype == x.dtype and not is_compiling()):
        return F.conv2d(x, kernel, bias, *geometry)
    y = F.conv2d(x, kernel, None, *geometry)
    return add_shift(y, bias.reshape(-1, 1, 1))


def add_shift(x: Tensor, shift: Tensor) -> Tensor:
    """Add constants to images, in the images' own memory.

    Args:
        x: Images of shape (N, C, H, W) that nothing else reads.
        shift: In the images' precision or better, of a shape such as
            (C, 1, 1) or (1, C, H, W).

    Returns:
        Tensor: Of the images' shape and dtype.
    """
    if shift.dtype == x.dtype:
        return x.add_(shift)
    if is_compiling() or is_transformed():
        return (x + shift).to(x.dtype)
    return _AddShift.apply(x, shift)


class _AddShift(torch.autograd.Function):
    """Sums gradients in the shift's precision; torch rounds them to half."""

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
    """Where padding will stand: a bool of shape (1, 1, H', W')."""
    inside = torch.zeros(
        (1, 1, *x.shape[-2:]), dtype=torch.bool, device=x.device
    )
    top, bottom, left, right = pads
    return F.pad(inside, (left, right, top, bottom), value=True)


def _is_int(value) -> bool:
    """Whether a value counts something; numpy's integers do."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def _pair(name: str, value, lowest: int) -> IntPair:
    pair = (value, value) if _is_int(value) else value
    if not isinstance(pair, (tuple, list)) or not all(map(_is_int, pair)):
        raise TypeError(
            f'{name} must be an int or a pair of ints, got {value!r}'
        )
    if len(pair) != 2 or min(pair) < lowest:
        raise ValueError(
            f'{name} must be one or two numbers of at least {lowest}, got '
            f'{value!r}'
        )
    return tuple(map(int, pair))
