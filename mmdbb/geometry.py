# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The geometry of a convolution: everything but its weights.

The 1x1, kx1 and 1xk branches have a small kernel that stands for a large one
with zeros around it (DBB paper, sec. 3.2, Transform VI). Both give the same
output only if the small kernel reads the pixels under its own taps. Its first
tap lies some rows and columns inside the large kernel, so the small
convolution pads less by as much, or even crops the image.

A transposed convolution spreads each pixel by its kernel instead of reading
through it. There a small kernel writes under its own taps, so its output is
padded or cropped, not its input.

All of this holds for images of one, two and three dimensions: sizes are tuples
with a number for each, pads have two.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from numbers import Integral
from typing import TYPE_CHECKING, Any, Iterable, List, Optional, Tuple, Union

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.modules.conv import _ConvNd

from mmdbb.dimensions import (
    CONV,
    CONV_TRANSPOSE,
    LayerKind,
    per_channel,
)
from mmdbb.recompute import is_compiling, is_exporting, is_transformed

PADDING_MODES = ('zeros', 'reflect', 'replicate', 'circular')

# One number for each dimension of the images: a pair for pictures.
IntPair = Tuple[int, ...]
# Pixels to add before and after the image in each dimension; a negative number
# crops. For pictures: top, bottom, left, right.
Pads = Tuple[int, ...]


def _one_form(default, shown: bool = True) -> Any:
    """A field that the constructor takes in several forms and keeps in one.

    Args:
        default: The default, in any of the forms.
        shown: Whether the field stands in the geometry's text.
    """
    return field(default=default, repr=shown)


@dataclass(frozen=True)
class ConvSpec:
    """The geometry of a convolution of torch, checked and brought to one form.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: Size of the kernel in each dimension (height and width),
            or one number for all.
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
        dims: Number of dimensions of the images: 1, 2 or 3. By default as
            many as ``kernel_size`` has numbers, and 2 if it is one number.
        transposed: Whether it is a transposed convolution, whose padding
            crops its output.
        output_padding: Pixels added to a transposed convolution's output
            after the image.

    Raises:
        TypeError: If an argument has a type that ``nn.Conv2d`` does not take.
        ValueError: If a value is out of range; the message names the
            argument.

    Examples:
        >>> spec = ConvSpec(4, 8, 3, padding='same', dilation=2)
        >>> spec.padding, spec.pads
        ((2, 2), (2, 2, 2, 2))
        >>> ConvSpec(4, 8, 3, dims=3).kernel_shape
        (8, 4, 3, 3, 3)
    """

    in_channels: int
    out_channels: int
    kernel_size: IntPair
    stride: IntPair = _one_form(1)
    padding: Union[str, IntPair] = _one_form(0)
    dilation: IntPair = _one_form(1)
    groups: int = 1
    padding_mode: str = 'zeros'
    dims: int = _one_form(None, shown=False)
    transposed: bool = field(default=False, repr=False)
    output_padding: IntPair = _one_form(0, shown=False)

    if TYPE_CHECKING:
        # The fields' types are what __post_init__ leaves in them.
        def __init__(
            self,
            in_channels: int,
            out_channels: int,
            kernel_size: Union[int, IntPair],
            stride: Union[int, IntPair] = 1,
            padding: Union[int, str, IntPair] = 0,
            dilation: Union[int, IntPair] = 1,
            groups: int = 1,
            padding_mode: str = 'zeros',
            dims: Optional[int] = None,
            transposed: bool = False,
            output_padding: Union[int, IntPair] = 0,
        ) -> None: ...

    def __post_init__(self) -> None:
        set_field = object.__setattr__
        set_field(self, 'dims', self._known_dims())
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
            ('output_padding', 0),
        ):
            value = _numbers(name, getattr(self, name), lowest, self.dims)
            set_field(self, name, value)
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
        if self.transposed:
            self._check_transposed()
        elif any(self.output_padding):
            raise ValueError(
                'output_padding is of transposed convolutions, got '
                f'output_padding={self.output_padding} for a plain one'
            )

    def __setstate__(self, state: dict) -> None:
        # Of a block that was pickled before there were other dimensions.
        vars(self).update(dict(dims=2, output_padding=(0, 0)), **state)

    def _known_dims(self) -> int:
        dims: Optional[int] = self.dims
        size: Any = self.kernel_size
        if dims is None:
            given = isinstance(size, Iterable) and not isinstance(size, str)
            return len(tuple(size)) if given else 2
        if dims not in (1, 2, 3):
            raise ValueError(f'dims must be 1, 2 or 3, got {dims!r}')
        return int(dims)

    def _check_transposed(self) -> None:
        """Raise unless torch has a transposed convolution like this."""
        if self.padding_mode != 'zeros':
            raise ValueError(
                "padding_mode of a transposed convolution must be 'zeros', "
                f'got {self.padding_mode!r}'
            )
        for extra, s, d in zip(
            self.output_padding, self.stride, self.dilation
        ):
            if extra >= max(s, d):
                raise ValueError(
                    'output_padding must be less than the stride or the '
                    f'dilation, got output_padding={self.output_padding}, '
                    f'stride={self.stride}, dilation={self.dilation}'
                )

    def _normalised_padding(self) -> Union[str, IntPair]:
        if not isinstance(self.padding, str):
            return _numbers('padding', self.padding, 0, self.dims)
        if self.transposed:
            raise ValueError(
                'padding of a transposed convolution must be numbers of '
                f'pixels, got {self.padding!r}'
            )
        none = (0,) * self.dims
        if self.padding == 'valid':
            return none
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
            if self.dims != 2:
                raise ValueError(
                    "padding='adaptive' is mmcv's Conv2dAdaptivePadding, of "
                    f'two dimensions; got dims={self.dims}'
                )
            if self.is_pointwise:
                return none
        if self.padding == 'adaptive' and self.is_strided:
            return 'adaptive'
        if self.is_strided:
            raise ValueError(
                f"padding='same' needs stride 1, got stride={self.stride}"
            )
        total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size)]
        if any(t % 2 for t in total):
            return 'same'
        return tuple(t // 2 for t in total)

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

    def for_output(self, size: IntPair, output_size: IntPair) -> ConvSpec:
        """The geometry of a transposed convolution for one size of output.

        Args:
            size: Size of the images in pixels, in each dimension.
            output_size: Size of the output, which ``output_padding`` decides.

        Raises:
            ValueError: If no ``output_padding`` gives this size.
        """
        padding: Any = self.padding  # numbers, as it is transposed
        extra = tuple(
            wanted - ((n - 1) * s - 2 * p + d * (k - 1) + 1)
            for wanted, n, s, p, d, k in zip(
                output_size,
                size,
                self.stride,
                padding,
                self.dilation,
                self.kernel_size,
            )
        )
        allowed = len(output_size) == len(size) == self.dims and all(
            0 <= e < s for e, s in zip(extra, self.stride)
        )
        if not allowed:
            raise ValueError(
                f'output_size must be a size that images of {tuple(size)} '
                f'become with stride={self.stride}, got {tuple(output_size)}'
            )
        return replace(self, output_padding=extra)

    @property
    def kind(self) -> LayerKind:
        """Which of torch's convolutions this is."""
        return LayerKind(self.dims, self.transposed)

    @property
    def pads(self) -> Pads:
        """Pixels added before and after the image, in each dimension.

        For pictures at the top, bottom, left and right. If they depend on the
        image, as in :attr:`largest_pads`. A transposed convolution crops its
        output by as many, but for the output padding.
        """
        return self.largest_pads

    @property
    def largest_pads(self) -> Pads:
        """The most pixels that any image gets at its sides."""
        if not isinstance(self.padding, str):
            return tuple(p for p in self.padding for _ in range(2))
        pads: List[int] = []
        for k, d in zip(self.kernel_size, self.dilation):
            before = d * (k - 1) // 2
            pads += [before, d * (k - 1) - before]
        return tuple(pads)

    @property
    def has_border(self) -> bool:
        """Whether images are padded with zeros before they are convolved."""
        zeros = self.padding_mode == 'zeros' and not self.transposed
        return zeros and any(self.pads)

    @property
    def is_depthwise(self) -> bool:
        """Whether each output channel reads its own input channel only."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def is_pointwise(self) -> bool:
        """Whether the kernel has a single tap."""
        return max(self.kernel_size) == 1

    @property
    def is_strided(self) -> bool:
        """Whether the convolution moves by more than one pixel."""
        return max(self.stride) > 1

    @property
    def is_dilated(self) -> bool:
        """Whether taps are more than one pixel apart."""
        return max(self.dilation) > 1

    @property
    def kernel_shape(self) -> Tuple[int, ...]:
        """Shape of the kernel: (out, in / groups, kH, kW)."""
        return (
            self.out_channels,
            self.in_channels // self.groups,
            *self.kernel_size,
        )

    @property
    def weight_shape(self) -> Tuple[int, ...]:
        """Shape of torch's weight; if transposed, (in, out / groups, ...)."""
        if not self.transposed:
            return self.kernel_shape
        return (
            self.in_channels,
            self.out_channels // self.groups,
            *self.kernel_size,
        )

    @property
    def centre(self) -> IntPair:
        """The tap (row, column) at which a 1x1 kernel stands in this one.

        That is the middle tap. An even kernel has two; of these it is the one
        that reads the pixel nearer to the output's own position. If
        transposed, it writes to the pixel nearer to the first one of those
        that an input's pixel becomes.
        """
        # Not that of a single image: one kernel serves all sizes.
        return tuple(
            min((k // 2, (k - 1) // 2), key=lambda tap: abs(tap * d - before))
            for k, d, before in zip(
                self.kernel_size, self.dilation, self.largest_pads[::2]
            )
        )

    def inner_kernel(self, size, dilation) -> Tuple[IntPair, IntPair]:
        """Check and complete a smaller kernel that a user describes.

        Args:
            size: Size of the smaller kernel in taps, in each dimension, or
                one number for all.
            dilation: How many of this kernel's taps lie between the starts of
                two of its taps, in each dimension, or one number for all.

        Returns:
            tuple: The size and the dilation, in each dimension.

        Raises:
            TypeError: If one of them is no number and not as many as there
                are dimensions.
            ValueError: If a number is smaller than 1.
        """
        return (
            _numbers('kernel_size', size, 1, self.dims),
            _numbers('dilation', dilation, 1, self.dims),
        )

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
            size: Size of the smaller kernel in each dimension: either 1, which
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
            size: Size of the smaller kernel, see :meth:`offset_of`.
            dilation: As in :meth:`inner_kernel`; 1 by default.

        Returns:
            tuple: Pixels before and after, in each dimension; a negative
            number crops. If transposed, those of the output.
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
        if self.transposed:
            pads = [-n for n in pads]
            pads[1::2] = [
                n + extra for n, extra in zip(pads[1::2], self.output_padding)
            ]
        return tuple(pads)

    @property
    def conv_args(self) -> dict:
        """Keyword arguments that build torch's convolution, but ``bias``.

        If the padding is adaptive, the convolution itself pads nothing.
        """
        args = asdict(self)
        for name in ('dims', 'transposed'):
            del args[name]
        if not self.transposed:
            del args['output_padding']
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


def pad_images(x: Tensor, pads: Pads, mode: str = 'zeros') -> Tensor:
    """Pad a batch of images, and crop it where a number is negative.

    Args:
        x: Images of shape (N, C, H, W), of any number of dimensions.
        pads: Pixels before and after the image in each dimension: at the top,
            bottom, left and right.
        mode: Padding mode, named as in ``nn.Conv2d``.

    Returns:
        Tensor: Shape (N, C, H + top + bottom, W + left + right).
    """
    grow = [max(n, 0) for n in pads]
    if any(grow):
        mode = 'constant' if mode == 'zeros' else mode
        x = F.pad(x, _for_torch(grow), mode)
    if min(pads) < 0:
        crop = [max(-n, 0) for n in pads]
        inside = (
            slice(before, size - after)
            for before, after, size in zip(
                crop[::2], crop[1::2], x.shape[-len(crop) // 2 :]
            )
        )
        place: Tuple[Any, ...] = (..., *inside)
        x = x[place]
    return x


#: The name that it has in code for pictures.
pad2d = pad_images


def _for_torch(pads: Iterable[int]) -> List[int]:
    """Order pads as ``F.pad`` takes them: the last dimension comes first."""
    pads = list(pads)
    sides = [pads[i : i + 2] for i in range(0, len(pads), 2)]
    return [n for side in reversed(sides) for n in side]


def convolve(
    x: Tensor, kernel: Tensor, bias: Optional[Tensor], spec: ConvSpec
) -> Tensor:
    """Convolve images with a kernel, in the images' precision.

    Args:
        x: Images of shape (N, in, H, W), of any number of dimensions.
        kernel: The weight, of the shape that torch's layer has: (out,
            in / groups, kH, kW), or (in, out / groups, kH, kW) if the
            geometry is transposed. Of any dtype.
        bias: The bias, shape (out,), or None. It may be more precise than the
            images and is added before the result is rounded.
        spec: Geometry of the convolution.

    Returns:
        Tensor: Shape (N, out, H', W'), with the images' dtype.
    """
    padding: Union[int, str, IntPair] = spec.padding
    x = crop_unread(x, spec, kernel)
    spec = spec.at_size(x.shape[-spec.dims :])
    if isinstance(padding, str) or spec.padding_mode != 'zeros':
        x, padding = pad_images(x, spec.pads, spec.padding_mode), 0
    geometry: Tuple[Any, ...]
    geometry = spec.stride, padding, spec.dilation, spec.groups
    run = CONV[spec.dims]
    if spec.transposed:
        run = CONV_TRANSPOSE[spec.dims]
        stride, padding, dilation, groups = geometry
        geometry = stride, padding, spec.output_padding, groups, dilation
    kernel = kernel.to(x.dtype)
    # torch.compile cannot lower a bias that is a view of another tensor.
    if bias is None or (bias.dtype == x.dtype and not is_compiling()):
        return run(x, kernel, bias, *geometry)
    y = run(x, kernel, None, *geometry)
    return add_shift(y, per_channel(bias, spec.dims))


#: oneDNN's block of channels with AVX-512; with AVX2 it is eight.
_ONEDNN_BLOCK = 16


def crop_unread(
    x: Tensor, conv: Union[ConvSpec, _ConvNd], kernel: Optional[Tensor] = None
) -> Tensor:
    """Crop pixels that a strided 1x1 convolution skips, where oneDNN fails.

    On x86 CPUs oneDNN computes the gradient of such a kernel in a workspace
    that is too small, if the channels come last, are fewer than its block,
    and the stride divides the image
    (https://github.com/uxlfoundation/oneDNN/issues/6035). Then a training
    crashes, hangs, or is silently wrong. It has another method for images
    that the stride does not divide. Without the last rows, which no tap
    reads, it takes that one.

    Args:
        x: Images of shape (N, in, H, W), of one to three dimensions.
        conv: The convolution or its geometry.
        kernel: Its weight, or None where that is not known yet.

    Returns:
        Tensor: The images, or a view of all rows but the last ones.
    """
    stride: Any = conv.stride
    if (
        max(stride) == 1
        or x.device.type != 'cpu'
        or conv.in_channels >= _ONEDNN_BLOCK
        or max(conv.kernel_size) > 1
        or any(conv.padding)
        or conv.groups > 1
        or conv.transposed
        or not torch.is_grad_enabled()
        # An export cannot prove that the output's size is the same.
        or is_exporting()
        or torch.jit.is_tracing()
    ):
        return x
    if kernel is not None and not any(map(_has_channels_last, (x, kernel))):
        return x
    first = next(i for i, step in enumerate(stride) if step > 1)
    dim, step = first - len(stride), stride[first]
    # No test whether the stride divides it, which would compile anew.
    return x.narrow(dim, 0, (x.shape[dim] - 1) // step * step + 1)


def _has_channels_last(tensor: Tensor) -> bool:
    # By strides, as torch decides: with one channel both layouts are dense.
    return tensor.stride(1) * tensor.shape[1] <= tensor.stride(-1)


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
        x: Images of shape (N, C, H, W), of any number of dimensions, not yet
            padded.
        pads: Pixels before and after in each dimension, none negative.

    Returns:
        Tensor: True on the border, shape (1, 1, H + top + bottom, W + left +
        right).
    """
    inside = torch.zeros(
        (1, 1, *x.shape[2:]), dtype=torch.bool, device=x.device
    )
    return F.pad(inside, _for_torch(pads), value=True)


def _spans(size: IntPair, dilation: Optional[IntPair]) -> IntPair:
    """How many taps a kernel reaches across, from its first to its last."""
    dilation = dilation or (1,) * len(size)
    return tuple(r * (s - 1) + 1 for s, r in zip(size, dilation))


def _is_int(value) -> bool:
    """Whether a value is an integer, Python's or numpy's, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


_WORDS = {1: 'one number', 2: 'one or two numbers', 3: 'one or three numbers'}
_MANY = {1: 'one int in a tuple', 2: 'a pair of ints', 3: 'three ints'}


def _numbers(name: str, value, lowest: int, dims: int) -> IntPair:
    """One number for each dimension, from one number or as many."""
    if _is_int(value):
        numbers = (value,) * dims
    elif isinstance(value, Iterable) and not isinstance(value, (str, dict)):
        numbers = tuple(value)
    else:
        numbers = None
    if numbers is None or not all(map(_is_int, numbers)):
        raise TypeError(
            f'{name} must be an int or {_MANY.get(dims, "ints")}, got '
            f'{value!r}'
        )
    # torch takes one number in a sequence for all directions, but a kernel
    # of one number makes an nn.Conv2d that cannot run.
    if len(numbers) == 1 and name != 'kernel_size':
        numbers *= dims
    if len(numbers) != dims or dims not in _WORDS or min(numbers) < lowest:
        raise ValueError(
            f'{name} must be {_WORDS.get(dims, "one to three numbers")} of '
            f'at least {lowest}, got {value!r}'
        )
    return tuple(map(int, numbers))
