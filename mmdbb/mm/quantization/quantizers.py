# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Quantizers: they round weights and activations as the INT8 file will.

They and their observers are torch's own, with few changes (Jacob et al.,
"Quantization and Training of Neural Networks for Efficient
Integer-Arithmetic-Only Inference", CVPR 2018, sec. 3,
https://arxiv.org/abs/1712.05877).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.ao.quantization import (
    FakeQuantize,
    MinMaxObserver,
    MovingAverageMinMaxObserver,
    PerChannelMinMaxObserver,
)

#: Largest integer of a weight: with eight bits, and with seven.
LIMIT, REDUCED_LIMIT = 127, 63


class WeightQuantizer(FakeQuantize):
    """Round a kernel to int8, -127..127, with the range that it has now.

    The integers are symmetric about zero. A norm folded into the kernel later
    scales channels and may flip their signs; so it changes the signs of
    integers at most.

    Args:
        per_channel: Whether each output channel has a scale of its own.
        reduce_range: Whether to use seven bits, -63..63, because the
            eight-bit products of some processors saturate (x86 without VNNI).

    Shape:
        - Input and output: (out, in / groups, kH, kW) or (out, in)
    """

    def __init__(
        self, per_channel: bool = True, reduce_range: bool = False
    ) -> None:
        limit = REDUCED_LIMIT if reduce_range else LIMIT
        arguments = dict(quant_min=-limit, quant_max=limit, dtype=torch.qint8)
        if per_channel:
            super().__init__(
                PerChannelMinMaxObserver,
                qscheme=torch.per_channel_symmetric,
                ch_axis=0,
                **arguments,
            )
        else:
            super().__init__(
                MinMaxObserver,
                qscheme=torch.per_tensor_symmetric,
                **arguments,
            )
        self.per_channel = per_channel
        # A buffer, so that the checkpoint says which range was trained.
        self.register_buffer('limit', torch.tensor(limit))

    def forward(self, kernel: Tensor) -> Tensor:
        """Measure the kernel's range, and round the kernel with it."""
        self.activation_post_process.reset_min_max_vals()
        return super().forward(kernel)


class FiniteObserver(MovingAverageMinMaxObserver):
    """Moving average of the batches' ranges that skips what is not finite.

    Training in half precision meets batches that overflow; the loss scaler
    skips their step. One such range in the average would stay there for ever.

    Shape:
        - Input and output: any
    """

    def forward(self, x_orig: Tensor) -> Tensor:
        """Take a batch's range into the average, if it is finite."""
        if not x_orig.numel():
            return x_orig
        seen = x_orig.detach().to(self.min_val.dtype)
        pair = torch.aminmax(seen)
        finite = pair.min.isfinite() & pair.max.isfinite()
        for average, value in zip((self.min_val, self.max_val), pair):
            # No branch on values, which would wait for the GPU.
            moved = average + self.averaging_constant * (value - average)
            new = torch.where(average.isfinite(), moved, value)
            average.copy_(torch.where(finite, new, average))
        return x_orig


class ActivationQuantizer(FakeQuantize):
    """Round activations to uint8, with one scale and one zero point.

    Both come from a moving average of the batches' ranges, see
    :class:`FiniteObserver`.

    Args:
        averaging_constant: Weight of each new batch in the moving average.
        relu: Whether a ReLU follows. The range then starts at zero, so
            rounding cuts negative values off, as the ReLU does.

    Shape:
        - Input and output: any
    """

    def __init__(
        self, averaging_constant: float = 0.01, relu: bool = False
    ) -> None:
        super().__init__(
            FiniteObserver,
            quant_min=0,
            quant_max=255,
            dtype=torch.quint8,
            qscheme=torch.per_tensor_affine,
            averaging_constant=averaging_constant,
        )
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """Update the range while observing, and round if turned on."""
        if self.observing:
            seen = x.detach()
            self.activation_post_process(seen.relu() if self.relu else seen)
            scale, zero_point = self.calculate_qparams()
            self.scale.copy_(scale)
            self.zero_point.copy_(zero_point)
        if not self.fake_quant_enabled[0]:
            return x
        return torch.fake_quantize_per_tensor_affine(
            x, self.scale, self.zero_point, self.quant_min, self.quant_max
        )

    @property
    def observing(self) -> bool:
        """Whether ranges are updated: in training, until they are frozen."""
        return self.training and bool(self.observer_enabled[0])
