# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' optimizer rules, where mmengine's ``paramwise_cfg`` cannot.

mmengine lets one rule win for each parameter, and none of its own reaches the
bias of a norm or a norm inside a depthwise block. The rules here are those of
``sgd_optimizer`` in the training code of DBB, RepVGG and OREPA.
"""

from __future__ import annotations

from typing import Dict, Iterable, Iterator, List, Optional, Set, Tuple

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.branches.identity import Identity
from mmdbb.conv_norms import conv_norm_pairs

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
#: What stands before the first stage of a backbone that does not say it by
#: ``stem_names``: the names that OpenMMLab's packages have for it.
STEM_NAMES = ('conv1', 'bn1', 'stem')
#: Rules that multiply, and what each is for.
FACTORS = {
    'bias_lr_mult': 'bias',
    'bias_decay_mult': 'bias',
    'norm_decay_mult': 'norm',
    'identity_decay_mult': 'identity branch with a norm',
    'depthwise_decay_mult': 'depthwise convolution',
    'stem_lr_mult': f'stem, which is one of {STEM_NAMES} of model.backbone, '
    'or what its class says by stem_names',
}
RULES = (*FACTORS, 'custom_l2', 'custom_keys')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ReparamOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer by the papers' rules.

    What applies to a parameter is multiplied, so that a bias in the stem has
    both learning rates' factors. Parameters with the same values make one
    group. ``paramwise_cfg`` takes:

    - ``bias_lr_mult``, ``bias_decay_mult``: for every bias, those of norms
      too.
    - ``norm_decay_mult``: for weight and bias of norms.
    - ``identity_decay_mult``: in place of the latter, for the weight of the
      norm that is an identity branch.
    - ``depthwise_decay_mult``: for depthwise convolutions, plain or blocks,
      all that is in them, and the norms behind them.
    - ``stem_lr_mult``: for what stands before the backbone's first stage:
      the parts that its class names in ``stem_names``, by default
      ``('conv1', 'bn1', 'stem')``.
    - ``custom_l2``: whether to add RepVGG's own penalty to the loss (half of
      the weight decay times :meth:`RepVGGConv.get_custom_L2
      <mmdbb.blocks.repvgg.RepVGGConv.get_custom_L2>`), in place of weight
      decay in those blocks; an identity branch keeps its own.
    - ``custom_keys``: parts of names -> ``lr_mult``, ``decay_mult``; of
      several that match, the longest.

    Args:
        optim_wrapper_cfg: Config of the wrapper, with its ``optimizer``.
        paramwise_cfg: The rules.

    Raises:
        ValueError: If there is a rule of another name, or one finds no
            parameter that is trained: none of that kind, all of them frozen,
            or another rule in its place.

    Examples:
        >>> from mmengine.optim import build_optim_wrapper
        >>> cfg = dict(
        ...     optimizer=dict(type='SGD', lr=0.1, weight_decay=1e-4),
        ...     constructor='ReparamOptimWrapperConstructor',
        ...     paramwise_cfg=dict(bias_lr_mult=2.0))
        >>> wrapper = build_optim_wrapper(nn.Conv2d(3, 8, 3), cfg)
        >>> [group['lr'] for group in wrapper.optimizer.param_groups]
        [0.1, 0.2]
    """

    def _validate_cfg(self) -> None:
        super()._validate_cfg()
        unknown = sorted(set(self.paramwise_cfg) - set(RULES))
        if unknown:
            raise ValueError(
                f'paramwise_cfg has unknown rules {unknown}; allowed: '
                f'{list(RULES)}'
            )
        if self.base_lr is None or self.base_wd is None:
            raise ValueError(
                'the optimizer needs lr and weight_decay, which the rules '
                f'multiply, got {self.optimizer_cfg}'
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper for a model."""
        model = getattr(model, 'module', model)
        if not self.paramwise_cfg.get('custom_l2'):
            return super().__call__(model)
        blocks = list(custom_l2_blocks(model).values())
        if not blocks:
            raise ValueError(
                'custom_l2 is for blocks with get_custom_L2, such as '
                'RepVGGConv; the model has none that is trained'
            )
        kind = self.optim_wrapper_cfg.get('type', 'OptimWrapper')
        kind = OPTIM_WRAPPERS.get(kind) if isinstance(kind, str) else kind
        self.optim_wrapper_cfg['type'] = type(
            f'CustomL2{kind.__name__}', (CustomL2, kind), {}
        )
        wrapper = super().__call__(model)
        wrapper.set_custom_l2(blocks, self.base_wd)
        return wrapper

    def add_params(
        self,
        params: List[dict],
        module: nn.Module,
        prefix: str = '',
        is_dcn_module: Optional[bool] = None,
    ) -> None:
        """Add groups of a model's parameters; mmengine's hook for rules.

        Args:
            params: The groups; changed in place.
            module: The model.
            prefix: Not used, as the model is walked at once.
            is_dcn_module: Not used.
        """
        found = _Parameters(module)
        groups: Dict[Tuple[float, float], dict] = {}
        used: Set[str] = set()
        for name, parameter in module.named_parameters():
            if not parameter.requires_grad:
                continue
            lr, decay = self._factors(name, found, used)
            values = (self.base_lr * lr, self.base_wd * decay)
            if values not in groups:
                groups[values] = dict(
                    params=[], lr=values[0], weight_decay=values[1]
                )
            groups[values]['params'].append(parameter)
        self._refuse_idle_rules(used)
        for group in groups.values():
            print_log(
                f'lr={group["lr"]:g}, weight_decay={group["weight_decay"]:g}: '
                f'{len(group["params"])} parameters',
                logger='current',
            )
        params.extend(groups.values())

    def _factors(
        self, name: str, found: _Parameters, used: Set[str]
    ) -> Tuple[float, float]:
        """What multiplies learning rate and weight decay of a parameter.

        Args:
            name: The parameter's.
            found: Which parameters the rules are for.
            used: Gets the names of the rules and keys that apply.
        """
        cfg = self.paramwise_cfg
        is_bias = name.rpartition('.')[2] == 'bias'
        is_identity = name in found.identity and 'identity_decay_mult' in cfg
        applies = dict(
            bias_lr_mult=is_bias,
            bias_decay_mult=is_bias,
            norm_decay_mult=name in found.norms and not is_identity,
            identity_decay_mult=is_identity,
            depthwise_decay_mult=name in found.depthwise,
            stem_lr_mult=name in found.stem,
        )
        factors = dict(lr=1.0, decay=1.0)
        for rule in FACTORS:
            if rule in cfg and applies[rule]:
                used.add(rule)
                factors[rule.split('_')[1]] *= cfg[rule]
        if cfg.get('custom_l2') and name in found.custom_l2:
            factors['decay'] = 0.0
        keys = [k for k in cfg.get('custom_keys', {}) if k in name]
        if keys:
            key = max(keys, key=len)
            used.add(key)
            for factor in factors:
                factors[factor] *= cfg['custom_keys'][key].get(
                    f'{factor}_mult', 1
                )
        return factors['lr'], factors['decay']

    def _refuse_idle_rules(self, used: Iterable[str]) -> None:
        """Raise if a rule has changed nothing.

        Args:
            used: The rules and the keys of ``custom_keys`` that applied.
        """
        for rule, kind in FACTORS.items():
            if rule in self.paramwise_cfg and rule not in used:
                raise ValueError(
                    f'{rule} finds nothing to change: the model has no {kind}'
                    ', or none that is trained'
                )
        keys = self.paramwise_cfg.get('custom_keys', {})
        idle = sorted(set(keys) - set(used))
        if idle:
            raise ValueError(
                f'custom_keys {idle} find nothing to change: no parameter '
                'that is trained has such a name, or a longer key fits it'
            )


class CustomL2:
    """Mixin for optimizer wrappers: adds RepVGG's penalty to each loss.

    RepVGG's code, ``train.py`` with ``--custwd``. The gradients come from
    the same backward pass as the loss's, so accumulation, mixed precision
    and distributed training are the wrapper's.
    """

    def set_custom_l2(
        self, blocks: List[ReparamConv2d], weight_decay: float
    ) -> None:
        """Say which blocks are penalised, and how much."""
        self.custom_l2_blocks = blocks
        self.custom_l2_decay = weight_decay

    def update_params(self, loss: Tensor, *args, **kwargs) -> None:
        """As the wrapper's own, of the loss and half the decay times L2."""
        squares = sum(block.get_custom_L2() for block in self.custom_l2_blocks)
        penalty = 0.5 * self.custom_l2_decay * squares
        super().update_params(loss + penalty, *args, **kwargs)


def custom_l2_blocks(model: nn.Module) -> Dict[str, ReparamConv2d]:
    """Names -> blocks that are trained and have ``get_custom_L2``."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ReparamConv2d)
        and hasattr(module, 'get_custom_L2')
        and not module.deploy
        and any(p.requires_grad for p in module.parameters())
    }


class _Parameters:
    """Which parameters of a model the rules are for, by name."""

    def __init__(self, model: nn.Module) -> None:
        self.norms: Set[str] = set()
        self.identity: Set[str] = set()
        self.depthwise: Set[str] = set()
        self.custom_l2: Set[str] = set()
        backbone = getattr(model, 'backbone', None)
        stem = getattr(backbone, 'stem_names', STEM_NAMES)
        self.stem = {
            name
            for name, _ in model.named_parameters()
            if name.startswith(tuple(f'backbone.{part}.' for part in stem))
        }
        for name, module in model.named_modules():
            if isinstance(module, NORMS):
                self.norms.update(_names(module, name))
            if isinstance(module, Identity):
                weight = f'{name}.norm.weight'
                self.identity.update({weight} & set(_names(module, name)))
            if _is_depthwise(module):
                self.depthwise.update(_names(module, name))
        for parent, conv, norm in conv_norm_pairs(model):
            if _is_depthwise(getattr(parent, conv)):
                behind = {id(p) for p in getattr(parent, norm).parameters()}
                self.depthwise.update(
                    n for n, p in model.named_parameters() if id(p) in behind
                )
        for name, block in custom_l2_blocks(model).items():
            self.custom_l2.update(set(_names(block, name)) - self.identity)


def _names(module: nn.Module, prefix: str) -> Iterator[str]:
    for name, _ in module.named_parameters():
        yield f'{prefix}.{name}' if prefix else name


def _is_depthwise(module: nn.Module) -> bool:
    return (
        isinstance(module, (nn.Conv2d, ReparamConv2d))
        and module.groups == module.in_channels > 1
    )
