# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The papers' optimizer rules, which mmengine's constructor cannot express.

mmengine applies only one rule of its ``paramwise_cfg`` to a parameter, and has
none for the bias of a norm or for a norm inside a depthwise block. The rules
here come from ``sgd_optimizer`` in the training code of DBB, RepVGG and OREPA.
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
from mmdbb.dimensions import CONVS

NORMS = (_NormBase, nn.GroupNorm, nn.LayerNorm)
#: The parts of a backbone before its first stage, under the names that the
#: OpenMMLab packages use. A backbone class can name others by ``stem_names``.
STEM_NAMES = ('conv1', 'bn1', 'stem')
#: Rule that multiplies -> the parameters that it is for, for messages.
FACTORS = {
    'bias_lr_mult': 'bias',
    'bias_decay_mult': 'bias',
    'norm_decay_mult': 'norm',
    'identity_decay_mult': 'identity branch with a norm',
    'depthwise_decay_mult': 'depthwise convolution',
    'stem_lr_mult': f'stem, which is one of {STEM_NAMES} of model.backbone, '
    'or one of the parts that its class lists in stem_names',
}
RULES = (*FACTORS, 'custom_l2', 'custom_keys')


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class ReparamOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Builds an optimizer by the papers' rules.

    The factors of all rules that apply to a parameter are multiplied: a bias
    in the stem gets ``bias_lr_mult`` times ``stem_lr_mult``. Parameters with
    the same learning rate and weight decay share a group. ``paramwise_cfg``
    takes:

    - ``bias_lr_mult``, ``bias_decay_mult``: for every bias, also the biases
      of norms.
    - ``norm_decay_mult``: for the weight and the bias of norms.
    - ``identity_decay_mult``: for the weight of a norm that is an identity
      branch; it replaces ``norm_decay_mult`` there.
    - ``depthwise_decay_mult``: for all parameters of depthwise convolutions,
      plain ones and blocks, and of the norms behind them.
    - ``stem_lr_mult``: for the parts before the backbone's first stage. Its
      class names them in ``stem_names``; the default is
      ``('conv1', 'bn1', 'stem')``.
    - ``custom_l2``: whether to add RepVGG's own penalty to the loss (half of
      the weight decay times :meth:`RepVGGConv.get_custom_L2
      <mmdbb.blocks.repvgg.RepVGGConv.get_custom_L2>`). The parameters of
      these blocks then get no weight decay; only the norms of identity
      branches keep it.
    - ``custom_keys``: part of a name -> ``lr_mult``, ``decay_mult``. If
      several match a parameter's name, the longest counts.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper, with its
            ``optimizer``.
        paramwise_cfg: The rules and their values.

    Raises:
        ValueError: If a rule is unknown, or changes no parameter that is
            trained: because the model has none of that kind, all of them are
            frozen, or another rule took the rule's place.

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
                'the optimizer needs lr and weight_decay, because the rules '
                f'multiply them; got {self.optimizer_cfg}'
            )

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper for a model.

        Args:
            model: The model, or a distributed wrapper of it.
        """
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
        """Group a model's parameters by learning rate and weight decay.

        mmengine calls this method while it builds the optimizer.

        Args:
            params: List that gets the groups, in place.
            module: The model.
            prefix: Not used: mmengine passes it when it recurses into
                modules, and this method handles the whole model in one call.
            is_dcn_module: Not used, for the same reason.
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
        """The factors of a parameter's learning rate and weight decay.

        Args:
            name: Name of the parameter in the model.
            found: The parameters that each rule is for.
            used: Set that gets the rules and keys which applied, in place.
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
        """Raise if a rule changed nothing: it is likely a mistake.

        Args:
            used: Names of the rules and keys of ``custom_keys`` that applied.
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
                f'custom_keys {idle} find nothing to change: they match no '
                'parameter that is trained, or only where a longer key does'
            )


class CustomL2:
    """Mixin for optimizer wrappers: adds RepVGG's penalty to each loss.

    RepVGG's ``train.py`` does this with ``--custwd``. The penalty is added
    before the backward pass, so the wrapper's gradient accumulation, mixed
    precision and distributed training work as ever.
    """

    def set_custom_l2(
        self, blocks: List[ReparamConv2d], weight_decay: float
    ) -> None:
        """Set the blocks to penalise, and the factor of their penalty.

        Args:
            blocks: The blocks, which have ``get_custom_L2``.
            weight_decay: The optimizer's weight decay; half of it multiplies
                the penalty.
        """
        self.custom_l2_blocks = blocks
        self.custom_l2_decay = weight_decay

    def update_params(self, loss: Tensor, *args, **kwargs) -> None:
        """Update the parameters by the loss plus the penalty.

        Args:
            loss: The loss, a scalar.
            args: Further arguments of the wrapper's own method.
            kwargs: Further keywords of the wrapper's own method.
        """
        squares = sum(block.get_custom_L2() for block in self.custom_l2_blocks)
        penalty = 0.5 * self.custom_l2_decay * squares
        super().update_params(loss + penalty, *args, **kwargs)


def custom_l2_blocks(model: nn.Module) -> Dict[str, ReparamConv2d]:
    """Find the blocks that are trained and have ``get_custom_L2``, by name.

    Args:
        model: The model to search.
    """
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, ReparamConv2d)
        and hasattr(module, 'get_custom_L2')
        and not module.deploy
        and any(p.requires_grad for p in module.parameters())
    }


class _Parameters:
    """The names of the parameters that each kind of rule is for."""

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
        isinstance(module, (*CONVS, ReparamConv2d))
        and module.groups == module.in_channels > 1
    )
