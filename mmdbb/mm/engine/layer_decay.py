# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Learning rates that decay from layer to layer, for a detector's backbone.

UniRepLKNet's code trains detectors so
(https://github.com/AILab-CVC/UniRepLKNet, ``detection/mmcv_custom``), by the
rule of ConvNeXt. mmdet has that rule too, but for classes whose name contains
``ConvNeXt`` only; mmpretrain's is for classifiers.
"""

from __future__ import annotations

from typing import Dict, List, Optional

from mmengine.optim import DefaultOptimWrapperConstructor
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import nn

from mmdbb.errors import UserError


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer whose rates decay towards the images.

    The rate of a parameter is the base rate times ``decay_rate`` to the power
    of the number of layers behind its own. The backbone's class says which
    layer a parameter is in (``get_layer_depth``, as mmpretrain's ConvNeXt and
    :class:`~mmdbb.mm.backbones.UniRepLKNet` have it); necks and heads have
    the base rate. Biases and parameters of one dimension have no weight
    decay. ``paramwise_cfg`` takes one key:

    - ``decay_rate``: the factor from a layer to the one before it.

    Raises:
        UserError: If ``paramwise_cfg`` has other keys or no rate between 0
            and 1, or the model has no backbone that knows its layers.

    Examples:
        >>> optim_wrapper = dict(
        ...     type='OptimWrapper',
        ...     constructor='LayerDecayOptimWrapperConstructor',
        ...     paramwise_cfg=dict(decay_rate=0.8),
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ... )
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None
    ) -> None:
        super().__init__(optim_wrapper_cfg, paramwise_cfg)
        rate = self.paramwise_cfg.get('decay_rate')
        is_rate = isinstance(rate, (int, float)) and 0 < rate <= 1
        if set(self.paramwise_cfg) != {'decay_rate'} or not is_rate:
            raise UserError(
                'paramwise_cfg of LayerDecayOptimWrapperConstructor must be '
                'dict(decay_rate=...), a number greater than 0 and at most 1, '
                f'got {dict(self.paramwise_cfg)}'
            )

    def add_params(
        self, params: List[dict], module: nn.Module, **kwargs
    ) -> None:
        """Put all parameters of a model into groups.

        Args:
            params: The list of groups, filled in place.
            module: The model, with its ``backbone``.
            kwargs: Nothing that is read; mmengine's own method takes more.
        """
        rate = self.paramwise_cfg['decay_rate']
        backbone = getattr(module, 'backbone', None)
        if not hasattr(backbone, 'get_layer_depth'):
            raise UserError(
                'LayerDecayOptimWrapperConstructor needs a model whose '
                'backbone has the method get_layer_depth, got '
                f'{type(module).__name__} with {type(backbone).__name__}'
            )
        groups: Dict[tuple, dict] = {}
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            depth, count = backbone.get_layer_depth(name, 'backbone.')
            scale = rate ** (count - depth - 1)
            spared = parameter.ndim <= 1 or name.endswith('.bias')
            group = groups.setdefault(
                (scale, spared), dict(params=[], lr=self.base_lr * scale)
            )
            if self.base_wd is not None:
                group['weight_decay'] = 0.0 if spared else self.base_wd
            group['params'].append(parameter)
        params.extend(groups.values())
