# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From the config of a network with blocks to that of the stock network.

The stock network is what the host package itself builds: no ``conv_cfg``, no
backbone of mmdbb unless the host has no such network.
"""

from __future__ import annotations

from typing import List, Optional, Tuple

from mmengine.config import Config
from mmengine.registry import MODELS, WEIGHT_INITIALIZERS

from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import registered_blocks

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

#: Hooks of mmdbb, which have nothing to do where no block is left.
OWN_HOOKS = ('KernelPenaltyHook', 'QATHook', 'ReparamHook', 'RepeatableHook')

#: Hooks of mmdbb in a hook's place -> that hook, which takes the same
#: arguments.
HOOKS_IN_PLACE = dict(WholeCheckpointHook='CheckpointHook')


def stock_config(cfg: Config) -> Config:
    """The config of the stock network, for use without mmdbb.

    Args:
        cfg: Any config of the mm family.

    Returns:
        Config: A copy without mmdbb's layers, backbones, optimizer rules,
        hooks and imports, and without a checkpoint to start from. Where the
        plain network is mmdbb's own (:data:`OWN_BACKBONES`),
        ``mmdbb.mm.backbones`` is imported.
    """
    fields = _without_blocks(without_own_starts(cfg.to_dict()))
    rules = fields.get('optim_wrapper') or {}
    if _name_of(rules.get('constructor')) in OWN_CONSTRUCTORS:
        del rules['constructor']
        rules.pop('paramwise_cfg', None)
    hooks = fields.pop('custom_hooks', None) or []
    hooks = [hook for hook in hooks if not _is_own_hook(hook)]
    if hooks:
        fields['custom_hooks'] = hooks
    hooks = fields.get('default_hooks') or {}
    for name in [n for n, hook in hooks.items() if _is_own_hook(hook)]:
        del hooks[name]
    for hook in [*hooks.values(), *fields.get('custom_hooks', ())]:
        if isinstance(hook, dict):
            name = _name_of(hook.get('type'))
            hook['type'] = HOOKS_IN_PLACE.get(name, hook.get('type'))
    imports, names = imports_of(fields)
    fields.pop('custom_imports', None)
    kept = [name for name in names if name.split('.')[0] != 'mmdbb']
    if _has_own_backbone(fields):
        kept.append('mmdbb.backbones')
    if kept:
        fields['custom_imports'] = dict(imports, imports=kept)
    fields.update(load_from=None, resume=False)
    return Config(fields)


def imports_of(fields: dict) -> Tuple[dict, List[str]]:
    """A config's ``custom_imports``, by default none, and the names in it."""
    imports = fields.get('custom_imports') or dict(
        imports=[], allow_failed_imports=False
    )
    names = imports['imports']
    return imports, [names] if isinstance(names, str) else list(names)


def _is_own_hook(hook) -> bool:
    return isinstance(hook, dict) and _name_of(hook.get('type')) in OWN_HOOKS


def _has_own_backbone(node) -> bool:
    if isinstance(node, (list, tuple)):
        return any(_has_own_backbone(item) for item in node)
    if not isinstance(node, dict):
        return False
    name = _name_of(node.get('type'))
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
        if scope.startswith('mmdbb'):  # a class, by where it is defined
            scope = ''
        block = node.pop('block', None)
        if 'ResNe' in name:
            scope, stock = _merged_resnet(node, scope, stock)
        node.pop('deploy', None)
        if name == 'VGGDBB' and node.get('norm_cfg') is None:
            node['norm_cfg'] = dict(type='BN', requires_grad=True)
        if name == 'ReparamRepVGG':
            stock = _merged_repvgg(node, block)
        node['type'] = f'{scope or "mmpretrain"}.{stock}'
    return node


def _merged_resnet(node: dict, scope: str, stock: str) -> Tuple[str, str]:
    """Say whose network a ResNet is once merged, and which."""
    if node.get('stage_blocks') is not None:
        return scope, f'Plain{stock}'
    node.pop('stage_blocks', None)
    if not node.get('contract_dilation'):
        node.pop('contract_dilation', None)
        return scope, stock
    # mmpretrain's cannot be dilated so. mmseg's can; it names widths in its
    # own way, has other defaults, and no drop path, which only training has.
    node.setdefault('out_indices', (3,))
    node.pop('drop_path_rate', None)
    if stock == 'ResNeXt':
        node.setdefault('groups', 32)
        node['base_width'] = node.pop('width_per_group', 4)
    return 'mmseg', stock


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
    return isinstance(rule, type) and _is_own(rule)


def _is_own(kind: type) -> bool:
    """Whether a class is defined in mmdbb."""
    return kind.__module__.split('.')[0] == 'mmdbb'


def _type_name(type_) -> str:
    return type_.__name__ if isinstance(type_, type) else str(type_ or '')


def _name_of(type_) -> str:
    """A type's name without what stands before it."""
    return _type_name(type_).rpartition('.')[2]


def _is_block(type_) -> bool:
    blocks = registered_blocks()
    classes = [block.__name__ for block in blocks.values()]
    return _name_of(type_) in (*blocks, *classes)
