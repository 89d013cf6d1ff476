# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Train for INT8: put quantizers into a network, and a hook to use them."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.mm.quantization.fake import (
    WEIGHT,
    add_output_quantizer_,
    add_quantizers_,
    freeze_ranges_,
    own_layers,
    quantizers,
    set_quantizing_,
)
from mmdbb.mm.quantization.flow import Written, layers_to_quantize
from mmdbb.modules import unwrapped
from mmdbb.own_forward import own_forwards


def prepare_qat_(
    model: nn.Module,
    image_size: Tuple[int, int] = (64, 64),
    averaging_constant: float = 0.01,
    per_channel: bool = True,
    reduce_range: bool = False,
) -> Dict[str, Written]:
    """Give a network quantizers, turned off.

    Every block, convolution and linear layer that an export runs through gets
    a quantizer for its input and one for its weight (blocks: for the
    equivalent kernel). It gets one for its output too if anything but such
    layers reads the output, such as a sum. Layers that convolve with another
    kernel than their weight, such as ``ConvWS2d``, stay in float; the log
    names them.

    Args:
        model: A classifier, segmentor, detector, or any module that maps
            images to tensors, with blocks or without. Changed in place;
            names and parameters stay.
        image_size: Height and width in pixels of an image that the network
            takes; it runs on one to find out who reads each output.
        averaging_constant: Weight of each new batch in the moving average of
            the activations' ranges.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
        reduce_range: Whether weights use seven bits, for x86 processors
            without VNNI.

    Returns:
        dict: Names of the layers -> what follows each.

    Raises:
        ValueError: If the network has no layer to quantize, or has
            quantizers already.

    Examples:
        >>> import torch
        >>> from mmdbb import DBB
        >>> from mmdbb.mm.quantization.fake import set_quantizing_
        >>> model = nn.Sequential(DBB(3, 8, 3), nn.ReLU())
        >>> sorted(prepare_qat_(model, image_size=(8, 8)))
        ['0']
        >>> set_quantizing_(model)
        >>> y = model(torch.rand(2, 3, 8, 8))
        >>> int(model[0].input_quantizer.zero_point)
        0
    """
    if quantizers(model):
        raise ValueError('the network has quantizers already')
    written = layers_to_quantize(model, image_size)
    if not written:
        raise ValueError(
            f'{type(model).__name__} has no block, convolution or linear '
            'layer to quantize'
        )
    left = own_layers(model)
    if left:
        print_log(f'left in float, {own_forwards(left)}', 'current')
    for name, output in written.items():
        layer = model.get_submodule(name)
        norm = output.norm and model.get_submodule(output.norm)
        add_quantizers_(
            layer, averaging_constant, per_channel, reduce_range, norm or None
        )
        # ``write_qdq`` looks up here who quantizes the layer's output.
        layer.output_holder = None
        if output.quantized:
            layer.output_holder = output.norm or name
            holder = model.get_submodule(layer.output_holder)
            add_output_quantizer_(holder, output.relu, averaging_constant)
    return written


def is_qat_state(state: dict) -> bool:
    """Whether a state dict comes from a network with quantizers."""
    return any(f'.{WEIGHT}.' in name for name in state)


@HOOKS.register_module()
class QATHook(Hook):
    """Turns on quantization-aware training at a given epoch.

    Before that epoch the network trains in floating point. From then on its
    forward pass rounds as the INT8 network will, and gradients pass through
    the rounding. The running statistics of all batch norms stay fixed: they
    are part of the equivalent kernels or will be folded into kernels.

    Args:
        begin: First epoch (or iteration) that quantizes, counted from 0.
        freeze: First epoch (or iteration) in which the ranges of activations
            no longer change; by default they always follow the data.
        by_epoch: Whether ``begin`` and ``freeze`` count epochs; if not, they
            count iterations.
        image_size: Height and width in pixels of an image that the network
            takes; it runs on one to find out where quantizers must go.
        averaging_constant: Weight of each new batch in the moving average of
            the activations' ranges.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
        reduce_range: Whether weights use seven bits, for x86 processors
            without VNNI.

    Raises:
        ValueError: If ``begin`` is negative, or ``freeze`` is less than
            ``begin``.

    Examples:
        In a config: ``custom_hooks = [dict(type='QATHook', begin=8)]`` with
        ``custom_imports = dict(imports=['mmdbb.quantize'])``.
    """

    # Runs before hooks that copy the network (EMAHook), so that the copies
    # have quantizers too.
    priority = 'VERY_HIGH'

    def __init__(
        self,
        begin: int = 0,
        freeze: Optional[int] = None,
        by_epoch: bool = True,
        image_size: Tuple[int, int] = (64, 64),
        averaging_constant: float = 0.01,
        per_channel: bool = True,
        reduce_range: bool = False,
    ) -> None:
        if begin < 0 or (freeze is not None and freeze < begin):
            raise ValueError(
                f'begin must be at least 0 and freeze at least begin; got '
                f'begin={begin}, freeze={freeze}'
            )
        self.begin, self.freeze = begin, freeze
        self.by_epoch = by_epoch
        self.arguments = dict(
            image_size=tuple(image_size),
            averaging_constant=averaging_constant,
            per_channel=per_channel,
            reduce_range=reduce_range,
        )
        self._norms = self._quantizers = ()

    def before_run(self, runner) -> None:
        """Add quantizers, before the runner loads a checkpoint with them."""
        model = unwrapped(runner.model)
        if not quantizers(model):
            prepare_qat_(model, **self.arguments)
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._quantizers = quantizers(model)

    def before_train_epoch(self, runner) -> None:
        """Turn quantizers on, or freeze ranges, if this is the epoch."""
        if self.by_epoch:
            self._turn(runner, runner.epoch)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Turn quantizers on if this is the iteration, and fix the norms."""
        if not self.by_epoch:
            self._turn(runner, runner.iter)
        count = runner.epoch if self.by_epoch else runner.iter
        if count >= self.begin:
            for norm in self._norms:
                norm.training = False
            # Some quantizers are submodules of norms, and hosts put norms
            # into eval mode with all that is inside.
            for quantizer in self._quantizers:
                quantizer.training = True

    def _turn(self, runner, count: int) -> None:
        model = unwrapped(runner.model)
        if count == self.begin or (count > self.begin and not _is_on(model)):
            runner.logger.info(f'quantization-aware from {count} on')
            set_quantizing_(model)
        if self.freeze is not None and count >= self.freeze:
            freeze_ranges_(model)

    def after_train_epoch(self, runner) -> None:
        """Copy the ranges of the first process to all others."""
        self._synchronize(runner)

    def before_val(self, runner) -> None:
        """Copy the ranges here too: training by iterations has no epochs."""
        self._synchronize(runner)

    def _synchronize(self, runner) -> None:
        if get_world_size() > 1:
            for quantizer in quantizers(unwrapped(runner.model)):
                for buffer in quantizer.buffers():
                    broadcast(buffer, 0)


def _is_on(model: nn.Module) -> bool:
    return any(bool(q.fake_quant_enabled[0]) for q in quantizers(model))
