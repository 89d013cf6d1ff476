# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a network with blocks to the stock network that equals it.

The stock network is what the host package itself builds: no ``conv_cfg``, no
backbone of mmdbb unless the host has no such network. Its convolutions have
no bias where a norm follows, so the merged bias folds into that norm: ``mean
-= bias``. Where the block had taken the norm's place, a norm with weight 1,
bias b, mean 0 and variance 1 - eps comes back, which adds b and changes
nothing else.
"""

from __future__ import annotations

from typing import Dict, Optional

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.checkpoint.last_init import LoadedLast
from mmdbb.errors import UserError
from mmdbb.host_norms import norm_names
from mmdbb.reparam import find_blocks, reparameterize

#: Backbones of mmdbb -> what they are once merged.
STOCK_BACKBONES = {
    'ResNetDBB': 'ResNet',
    'ResNetV1cDBB': 'ResNetV1c',
    'ResNetV1dDBB': 'ResNetV1d',
    'ResNeXtDBB': 'ResNeXt',
    'MobileNetV1DBB': 'MobileNetV1',
    'AlexNetDBB': 'PlainAlexNet',
    'VGGDBB': 'VGG',
    'ReparamRepVGG': 'RepVGG',
}

#: Plain backbones that the host packages lack: mmdbb's own.
OWN_BACKBONES = (
    'MobileNetV1',
    'PlainAlexNet',
    'PlainRepVGG',
    'PlainResNet',
    'PlainResNeXt',
)

#: Constructors of optimizers that only mmdbb knows.
OWN_CONSTRUCTORS = ('ReparamOptimWrapperConstructor',)


def stock_config(cfg: Config) -> Config:
    """The config of the stock network, for use without mmdbb.

    Args:
        cfg: Any config of the mm family.

    Returns:
        Config: A copy without mmdbb's layers, backbones, optimizer rules and
        imports, and without a checkpoint to start from. Where the plain
        network is mmdbb's own (:data:`OWN_BACKBONES`), ``mmdbb.backbones`` is
        imported.
    """
    fields = _without_blocks(without_own_starts(cfg.to_dict()))
    rules = fields.get('optim_wrapper') or {}
    if rules.get('constructor') in OWN_CONSTRUCTORS:
        del rules['constructor']
        rules.pop('paramwise_cfg', None)
    imports = fields.pop('custom_imports', None) or dict(
        imports=[], allow_failed_imports=False
    )
    names = imports['imports']
    names = [names] if isinstance(names, str) else names
    kept = [name for name in names if name.split('.')[0] != 'mmdbb']
    if _has_own_backbone(fields):
        kept.append('mmdbb.backbones')
    if kept:
        fields['custom_imports'] = dict(imports, imports=kept)
    fields.update(load_from=None, resume=False)
    return Config(fields)


def _has_own_backbone(node) -> bool:
    if isinstance(node, (list, tuple)):
        return any(_has_own_backbone(item) for item in node)
    if not isinstance(node, dict):
        return False
    name = _type_name(node.get('type')).rpartition('.')[2]
    return name in OWN_BACKBONES or _has_own_backbone(list(node.values()))


def _without_blocks(node):
    if isinstance(node, (list, tuple)):
        return type(node)(_without_blocks(item) for item in node)
    if not isinstance(node, dict):
        return node
    node = {k: _without_blocks(v) for k, v in node.items()}
    conv_cfg = node.get('conv_cfg')
    if isinstance(conv_cfg, dict) and _is_block(conv_cfg.get('type')):
        node['conv_cfg'] = None
    scope, _, name = _type_name(node.get('type')).rpartition('.')
    if name in STOCK_BACKBONES:
        stock = STOCK_BACKBONES[name]
        if node.get('stage_blocks') is None:
            node.pop('stage_blocks', None)
        else:
            stock = f'Plain{stock}'
        block = node.pop('block', None)
        node.pop('deploy', None)
        if name == 'VGGDBB' and node.get('norm_cfg') is None:
            node['norm_cfg'] = dict(type='BN', requires_grad=True)
        if name == 'ReparamRepVGG':
            stock = _merged_repvgg(node, block)
        node['type'] = f'{scope or "mmpretrain"}.{stock}'
    return node


def _merged_repvgg(node: dict, block: Optional[dict]) -> str:
    """Say what a ReparamRepVGG is once merged; sets ``deploy``."""
    from mmpretrain.models import RepVGG

    layer = (block or dict(type='RepVGGConv'))['type']
    layer = MODELS.get(layer) if isinstance(layer, str) else layer
    if not issubclass(getattr(layer, 'block', layer), BranchSumConv2d):
        return 'PlainRepVGG'  # a norm follows the block
    node['deploy'] = True
    arch = node['arch']
    arch = RepVGG.arch_settings[arch] if isinstance(arch, str) else arch
    # mmpretrain's leaves squeeze-and-excitation out once it is merged.
    return 'PlainRepVGG' if arch['se_cfg'] else 'RepVGG'


def without_own_starts(node):
    """A config's fields without what only mmdbb starts a network from."""
    if isinstance(node, (list, tuple)):
        return type(node)(without_own_starts(item) for item in node)
    if not isinstance(node, dict):
        return node
    node = {k: without_own_starts(v) for k, v in node.items()}
    init_cfg = node.get('init_cfg')
    if isinstance(init_cfg, (list, tuple)):
        rules = [rule for rule in init_cfg if not _is_own_start(rule)]
        node['init_cfg'] = rules or None
    elif _is_own_start(init_cfg):
        node['init_cfg'] = None
    return node


def _is_own_start(init_cfg) -> bool:
    """Whether only mmdbb knows this rule; the weights come from training."""
    if not isinstance(init_cfg, dict):
        return False
    rule = init_cfg.get('type')
    if not isinstance(rule, type):
        rule = WEIGHT_INITIALIZERS.get(str(rule))
    return isinstance(rule, type) and issubclass(rule, LoadedLast)


def _type_name(type_) -> str:
    return type_.__name__ if isinstance(type_, type) else str(type_ or '')


def _is_block(type_) -> bool:
    layer = MODELS.get(_type_name(type_).rpartition('.')[2])
    return hasattr(layer, 'block')


@torch.no_grad()
def stock_state(
    model: nn.Module,
    stock: nn.Module,
    pairs: Optional[Dict[str, str]] = None,
    dtype: torch.dtype = torch.float64,
) -> Dict[str, Tensor]:
    """Weights for the stock network.

    Args:
        model: The network with blocks; unchanged.
        stock: The stock network, to know what it expects.
        pairs: Names of convolutions -> names of the norms behind them; by
            default those that the OpenMMLab packages' conventions give.
        dtype: What kernels are composed in, see ``reparameterize``.

    Returns:
        dict: A state dict that ``stock`` loads strictly.

    Raises:
        UserError: If a merged bias has no place in the stock network.
        ValueError: If the model has no blocks.
    """
    merged = reparameterize(model, dtype=dtype)
    expected = stock.state_dict()
    stock_modules = dict(stock.named_modules())
    modules = dict(merged.named_modules())
    pairs = norm_names(merged) if pairs is None else pairs
    state = merged.state_dict()
    for name in find_blocks(model):
        norm_name = pairs.get(name)
        norm = stock_modules.get(norm_name)
        if f'{name}.bias' in expected:
            # A bias *and* a norm, as in VGG: one that was absorbed comes
            # back, and changes nothing.
            absorbed = isinstance(modules.get(norm_name), nn.Identity)
            if absorbed and isinstance(norm, _BatchNorm):
                nothing = torch.zeros_like(state[f'{name}.bias'])
                state.update(norm_that_adds(nothing, norm, norm_name))
            continue
        bias = state.pop(f'{name}.bias')
        if not isinstance(norm, _BatchNorm) or not norm.track_running_stats:
            if not bias.any():  # OREPA's, of a convolution without one
                continue
            raise UserError(
                f'the bias of the merged {name} has no place in the stock '
                'network: its convolution has none, and no batch norm with '
                'running statistics is known to follow'
            )
        mean = f'{norm_name}.running_mean'
        if mean in state:
            exact = state[mean].to(dtype) - bias.to(dtype)
            state[mean] = exact.to(state[mean].dtype)
        else:
            state.update(norm_that_adds(bias, norm, norm_name))
    return state


def norm_that_adds(
    bias: Tensor, norm: _BatchNorm, name: str
) -> Dict[str, Tensor]:
    """The state of a norm that in eval mode adds a bias, and nothing else.

    Args:
        bias: Shape (channels,).
        norm: The norm.
        name: Its name, which the entries get.

    Raises:
        UserError: If the norm has no weight and bias.
    """
    if not norm.affine:
        raise UserError(
            f'the stock network has no place for the bias before {name}: '
            'that norm has affine=False'
        )
    return {
        f'{name}.weight': torch.ones_like(bias),
        f'{name}.bias': bias,
        f'{name}.running_mean': torch.zeros_like(bias),
        f'{name}.running_var': torch.full_like(bias, 1 - norm.eps),
        f'{name}.num_batches_tracked': torch.zeros_like(
            norm.num_batches_tracked
        ),
    }
