# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Base class of mmdbb's own plain backbones: stages that can be frozen."""

from __future__ import annotations

from typing import Sequence, Tuple, Union

from mmpretrain.models.backbones.base_backbone import (
    BaseBackbone,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


class StagedBackbone(BaseBackbone):
    """A backbone that is a list of stages.

    A subclass lists them in :attr:`stages`.

    Args:
        out_indices: Indices of the stages whose outputs to return.
        frozen_stages: Last stage that is not trained, -1 for none.
        norm_eval: Whether norms stay in eval mode while training.
        init_cfg: mmengine's initialisation rules. By default convolutions
            start as Kaiming's rule says, norms with weight 1, and linear
            layers with normal values of standard deviation 0.01.
    """

    def __init__(
        self,
        out_indices: Sequence[int],
        frozen_stages: int = -1,
        norm_eval: bool = False,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = [
                dict(type='Kaiming', layer=['Conv2d']),
                dict(type='Constant', val=1, layer=['_BatchNorm']),
                dict(type='Normal', std=0.01, layer=['Linear']),
            ]
        super().__init__(init_cfg)
        self.out_indices = tuple(out_indices)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval

    @property
    def stages(self) -> Tuple[nn.Module, ...]:
        """The stages, in order."""
        raise NotImplementedError

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of all but frozen stages, which stay in eval mode.

        With ``norm_eval`` all norms stay in eval mode too.
        """
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        for stage in self.stages[: self.frozen_stages + 1]:
            stage.eval()
            stage.requires_grad_(False)


def check_stages(
    count: int,
    channels: Sequence[int],
    out_indices: Sequence[int],
    frozen_stages: int,
    what: str,
) -> None:
    """Check the arguments of a backbone that is a list of stages.

    Args:
        count: Number of stages.
        channels: Channels of the stages.
        out_indices: Indices of the stages whose outputs to return.
        frozen_stages: Last stage that is not trained, -1 for none.
        what: The allowed values of ``channels`` in words, for messages.

    Raises:
        TypeError: If ``channels`` or ``out_indices`` is no list of ints.
        ValueError: If ``channels``, ``out_indices`` or ``frozen_stages`` is
            out of range; the message says what is allowed.
    """
    last = count - 1
    which = f'some of 0 to {last}'
    for name, allowed, values in (
        ('channels', what, channels),
        ('out_indices', which, out_indices),
    ):
        if not isinstance(values, Sequence) or not all(
            isinstance(value, int) for value in values
        ):
            raise TypeError(
                f'{name} must be {allowed}, in a list, got {values!r}'
            )
    if len(channels) != count or min(channels) < 1:
        raise ValueError(f'channels must be {what}, got {channels}')
    if not out_indices or any(i not in range(count) for i in out_indices):
        raise ValueError(f'out_indices must be {which}, got {out_indices}')
    if frozen_stages not in range(-1, count):
        raise ValueError(
            f'frozen_stages must be one of -1 to {last}, got {frozen_stages}'
        )
