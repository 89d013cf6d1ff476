# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Training for INT8: quantizers in a network, and the hook that does it."""

from __future__ import annotations

from typing import Dict, Optional, Tuple

from mmengine.dist import broadcast, get_world_size
from mmengine.hooks import Hook
from mmengine.model import is_model_wrapper
from mmengine.registry import HOOKS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.mm.quantization.fake import (
    WEIGHT,
    add_output_quantizer_,
    add_quantizers_,
    freeze_ranges_,
    quantizers,
    set_quantizing_,
)
from mmdbb.mm.quantization.flow import Written, layers_to_quantize


def prepare_qat_(
    model: nn.Module,
    image_size: Tuple[int, int] = (64, 64),
    averaging_constant: float = 0.01,
    per_channel: bool = True,
    reduce_range: bool = False,
) -> Dict[str, Written]:
    """Give a network quantizers, turned off.

    Every block, convolution and linear layer that an export runs through gets
    one for its input and one for its weight (a block: its equivalent kernel);
    and one for its output where something else than such a layer reads it.

    Args:
        model: A classifier, segmentor, detector, or any module that maps
            images to tensors, with blocks or without. Changed in place;
            names and parameters stay.
        image_size: Height and width in pixels of an image that it takes, to
            see what reads what.
        averaging_constant: Share of each batch in the moving average of
            activations' ranges.
        per_channel: Whether each output channel of a weight has a scale of
            its own.
        reduce_range: Whether weights use seven bits.

    Returns:
        dict: The layers by name, and what becomes of their output.

    Raises:
        ValueError: If there is nothing to quantize, or there are quantizers
            already.

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
    for name, output in written.items():
        layer = model.get_submodule(name)
        norm = output.norm and model.get_submodule(output.norm)
        add_quantizers_(
            layer, averaging_constant, per_channel, reduce_range, norm or None
        )
        # Known to the layer, for the file that is written of it.
        layer.output_holder = None
        if output.quantized:
            layer.output_holder = output.norm or name
            holder = model.get_submodule(layer.output_holder)
            add_output_quantizer_(holder, output.relu, averaging_constant)
    return written


def is_qat_state(state: dict) -> bool:
    """Whether a state dict is of a network with quantizers."""
    return any(f'.{WEIGHT}.' in name for name in state)


@HOOKS.register_module()
class QATHook(Hook):
    """Quantization-aware training, from some epoch on.

    Until then the network trains as it is. From then on its forward pass is
    that of the INT8 network, gradients pass through the rounding, and all
    batch norms keep their statistics: those inside blocks because the
    equivalent kernel is made of them, the others because they are folded.

    Args:
        begin: The epoch (or iteration) that it begins with, from 0.
        freeze: The epoch (or iteration) from which ranges of activations
            stay as they are; by default they never do.
        by_epoch: Whether these are epochs.
        image_size: See :func:`prepare_qat_`, as the next one.
        averaging_constant: As there.
        per_channel: As there.
        reduce_range: As there.

    Examples:
        In a config: ``custom_hooks = [dict(type='QATHook', begin=8)]`` with
        ``custom_imports = dict(imports=['mmdbb.quantize'])``.
    """

    # Before hooks that copy the network, as EMAHook does.
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
        """Add quantizers, before a checkpoint with theirs is loaded."""
        model = _inner(runner)
        if not quantizers(model):
            prepare_qat_(model, **self.arguments)
        self._norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
        self._quantizers = quantizers(model)

    def before_train_epoch(self, runner) -> None:
        """Turn it on."""
        if self.by_epoch:
            self._turn(runner, runner.epoch)

    def before_train_iter(self, runner, batch_idx, data_batch=None) -> None:
        """Turn it on, and keep the norms as they are."""
        if not self.by_epoch:
            self._turn(runner, runner.iter)
        count = runner.epoch if self.by_epoch else runner.iter
        if count >= self.begin:
            for norm in self._norms:
                norm.training = False
            # Some stand in norms, which hosts put into eval mode as a whole.
            for quantizer in self._quantizers:
                quantizer.training = True

    def _turn(self, runner, count: int) -> None:
        model = _inner(runner)
        if count == self.begin or (count > self.begin and not _is_on(model)):
            runner.logger.info(f'quantization-aware from {count} on')
            set_quantizing_(model)
        if self.freeze is not None and count >= self.freeze:
            freeze_ranges_(model)

    def after_train_epoch(self, runner) -> None:
        """Make the ranges of all processes those of the first."""
        self._synchronize(runner)

    def before_val(self, runner) -> None:
        """As after an epoch, where epochs are not counted."""
        self._synchronize(runner)

    def _synchronize(self, runner) -> None:
        if get_world_size() > 1:
            for quantizer in quantizers(_inner(runner)):
                for buffer in quantizer.buffers():
                    broadcast(buffer, 0)


def _is_on(model: nn.Module) -> bool:
    return any(bool(q.fake_quant_enabled[0]) for q in quantizers(model))


def _inner(runner) -> nn.Module:
    model = runner.model
    return model.module if is_model_wrapper(model) else model
