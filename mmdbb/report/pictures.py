# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Small pictures of kernels, as PNG data inside the page.

Colours are opaque where weights are large and transparent where they are
small, so that the same picture is right on a light page and on a dark one.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from html import escape
from typing import List, Tuple

import torch
from torch import Tensor

#: Pixels on the screen of the longer side of a kernel.
SIDE = 76
_MAGNITUDE = (16, 148, 158)
_NEGATIVE, _POSITIVE = (37, 99, 235), (217, 70, 40)


def kernel_picture(taps: Tensor, largest: float, name: str) -> str:
    """Draw a kernel's mean magnitude at each tap.

    Args:
        taps: Magnitudes, (kH, kW), (k,) or (kD, kH, kW).
        largest: The magnitude that is drawn opaque.
        name: What the kernel is, for the text that stands for the picture.
    """
    plane = _plane(taps.float())
    alpha = (plane / (largest or 1)).clamp(0, 1)
    colour = torch.tensor(_MAGNITUDE).expand(*plane.shape, 3)
    pixels = torch.cat([colour.float(), 255 * alpha[..., None]], -1)
    text = f'Mean magnitude of {name} at each tap: {_in_words(taps)}'
    return _image(pixels, _size(plane, SIDE), text)


def filters_picture(filters: Tensor, name: str) -> str:
    """Draw filters side by side, each at its strongest input channel.

    Args:
        filters: Shape (count, channels, kH, kW).
        name: What they are, for the text that stands for the picture.
    """
    planes = [_plane(_strongest(each)) for each in filters]
    columns = min(len(planes), 16 if len(planes) > 8 else 8)
    height, width = (side + 1 for side in planes[0].shape)
    rows = math.ceil(len(planes) / columns)
    pixels = torch.zeros(rows * height - 1, columns * width - 1, 4)
    for i, plane in enumerate(planes):
        top, left = i // columns * height, i % columns * width
        place = pixels[top : top + height - 1, left : left + width - 1]
        place[..., :3] = torch.where(
            (plane < 0)[..., None],
            torch.tensor(_NEGATIVE).float(),
            torch.tensor(_POSITIVE).float(),
        )
        largest = plane.abs().max().clamp_min(1e-30)
        place[..., 3] = 255 * plane.abs() / largest
    text = f'{len(planes)} filters of {name}'
    scale = max(1, min(7, 620 // pixels.shape[1]))
    size = (pixels.shape[0] * scale, pixels.shape[1] * scale)
    return _image(pixels, size, text)


def channels_picture(channels: List[float]) -> str:
    """Draw the largest weights of all channels as a falling line (SVG).

    Args:
        channels: The largest magnitude in each output channel.
    """
    values = sorted(channels, reverse=True)
    # A wide layer has more channels than the line has pixels.
    step = max(1, len(values) // 240)
    values = values[::step]
    top = values[0] or 1
    last = max(len(values) - 1, 1)
    points = ' '.join(
        f'{240 * i / last:.1f},{50 - 48 * value / top:.1f}'
        for i, value in enumerate(values)
    )
    text = (
        f'Largest weight of each channel, from {values[0]:.3g} down to '
        f'{values[-1]:.3g}'
    )
    return (
        f'<svg class="line" viewBox="0 0 240 52" role="img" '
        f'aria-label="{escape(text)}" preserveAspectRatio="none">'
        f'<polygon points="0,50 {points} 240,50"/>'
        f'<polyline points="{points}"/></svg>'
    )


def png(pixels: Tensor) -> bytes:
    """Encode an image as PNG.

    Args:
        pixels: Red, green, blue and opacity, 0 to 255, shape (H, W, 4).
    """
    height, width = pixels.shape[:2]
    rows = pixels.round().clamp(0, 255).to(torch.uint8).flatten(1)
    # Each row starts with its filter: none.
    rows = torch.cat([rows.new_zeros(height, 1), rows], 1)
    header = struct.pack('>2I5B', width, height, 8, 6, 0, 0, 0)
    data = zlib.compress(rows.contiguous().numpy().tobytes(), 9)
    chunks = ((b'IHDR', header), (b'IDAT', data), (b'IEND', b''))
    return b'\x89PNG\r\n\x1a\n' + b''.join(
        struct.pack('>I', len(content))
        + kind
        + content
        + struct.pack('>I', zlib.crc32(kind + content))
        for kind, content in chunks
    )


def _image(pixels: Tensor, size: Tuple[int, int], text: str) -> str:
    data = base64.b64encode(png(pixels)).decode()
    return (
        f'<img alt="{escape(text)}" width="{size[1]}" height="{size[0]}" '
        f'src="data:image/png;base64,{data}">'
    )


def _plane(taps: Tensor) -> Tensor:
    """A kernel of 1, 2 or 3 dimensions as a picture; slices side by side."""
    if taps.dim() == 1:
        return taps[None]
    if taps.dim() == 3:
        gap = taps.new_zeros(taps.shape[1], 1)
        slices = [piece for each in taps for piece in (each, gap)]
        return torch.cat(slices[:-1], 1)
    return taps


def _strongest(kernel: Tensor) -> Tensor:
    """A filter's kernel on the input channel that it weighs most."""
    sizes = kernel.flatten(1).square().sum(1)
    return kernel[sizes.argmax()]


def _size(plane: Tensor, side: int) -> Tuple[int, int]:
    height, width = plane.shape
    scale = side / max(height, width)
    return round(height * scale), round(width * scale)


def _in_words(taps: Tensor) -> str:
    if taps.numel() <= 9:
        return ' '.join(f'{value:.2g}' for value in taps.flatten().tolist())
    return f'{taps.min().item():.2g} to {taps.max().item():.2g}'
