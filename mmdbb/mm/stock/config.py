# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Turn the config of a network with blocks into the stock network's config.

The stock network is the one that the OpenMMLab package itself builds: without
blocks in ``conv_cfg``, and without a backbone of mmdbb unless the package has
no such network. Each backbone with blocks gives the config of its merged form
by ``plain_cfg`` (:class:`~mmdbb.mm.backbones.absorbed.BlocksForConvNorm`), so
no backbone is named here.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any, Iterator, List, Optional, Set, Tuple, Type

from mmengine import registry as registries
from mmengine.config import Config
from mmengine.registry import (
    HOOKS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    WEIGHT_INITIALIZERS,
    Registry,
)
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.build import ADAPTIVE_TYPES, LAYER_KINDS, kind_of_block
from mmdbb.dimensions import CONV2D, CONV_TYPES, LayerKind
from mmdbb.mm.config_types import (
    class_of,
    dicts_of,
    is_own,
    is_within,
    module_of,
    registered,
    rewrite,
    type_of,
)
from mmdbb.mm.host_internals import default_conv_type
from mmdbb.mm.hosts import HOSTS
from mmdbb.registry import BLOCKS

#: Arguments of ``nn.Conv2d`` that the config of a block may have.
CONV_KEYS = ('padding_mode', 'bias')
#: Argument of the hosts' classes that holds the config of an upsample layer,
#: and what of a block's config there is ``nn.ConvTranspose2d``'s.
UPSAMPLE_KEY = 'upsample_cfg'
UPSAMPLE_KEYS = tuple(inspect.signature(nn.ConvTranspose2d).parameters)
#: Kinds of layers -> their types in configs.
TYPES = {
    CONV2D: 'Conv2d',
    **{kind: name for name, kind in reversed(LAYER_KINDS.items())},
}

#: Packages whose classes configs can name without ``custom_imports``.
PACKAGES = (*HOSTS, 'torch', 'torchvision')
#: Arguments by which classes of other packages build their merged form.
DEPLOYED = ('deploy', 'small_kernel_merged')


def stock_config(cfg: Config) -> Config:
    """The config of the stock network, for use without mmdbb.

    Args:
        cfg: Any config of an OpenMMLab package, with its ``custom_imports``
            already imported. A type that no registry knows stays as it is.

    Returns:
        Config: A copy without mmdbb's layers, backbones, optimizer rules,
        hooks and imports, and without a checkpoint to start from. If the
        plain network is mmdbb's own, the copy imports ``mmdbb.backbones``.
        If it replaces a backbone from elsewhere, the import of that backbone
        is dropped, unless the rest of the config needs that import too.

    Raises:
        UserError: If a backbone does not give the config of its merged form.
    """
    fields = without_own_starts(cfg.to_dict())
    merged: Set[Any] = set()

    def without_blocks(node: dict, scope: Optional[str]) -> dict:
        kind = class_of(node.get('type'), scope)
        block = named_block(node.get('conv_cfg'), scope)
        if block:
            plain = _plain_layer(node['conv_cfg'], block, kind)
            node['conv_cfg'] = plain
            if plain is None and kind is None and 'type' in node:
                # A part that a network builds by itself, such as a pathway of
                # SlowFast; its default is not known, and need not be None.
                del node['conv_cfg']
        block = named_block(node.get(UPSAMPLE_KEY), scope)
        if block:
            kind_there = kind_of_block(block)._replace(transposed=True)
            node[UPSAMPLE_KEY] = _torchs_layer(node[UPSAMPLE_KEY], kind_there)
        if hasattr(kind, 'plain_cfg'):
            merged.add(kind)
            return kind.plain_cfg(node)
        if 'conv_cfg' not in node and isinstance(kind, type):
            if default_conv_type(kind) in BLOCKS:
                node['conv_cfg'] = dict(type='Conv2d')
        if kind is None and 'type' in node:
            return node  # what nobody knows may mean anything
        return {k: _without_layers(v, scope) for k, v in node.items()}

    scope = fields.get('default_scope')
    fields = rewrite(fields, without_blocks, scope)
    _drop_own_rules(fields, scope)
    _drop_own_hooks(fields, scope)
    imports, names = imports_of(fields)
    fields.pop('custom_imports', None)
    names = [name for name in names if not is_within(name, 'mmdbb')]
    kept = _without_merged(
        names, {module_of(kind) for kind in merged}, _modules_of(fields)
    )
    if _needs_own_network(fields, scope):
        kept.append('mmdbb.backbones')
    if kept:
        fields['custom_imports'] = dict(imports, imports=kept)
    fields.update(load_from=None, resume=False)
    return Config(fields)


def deployed_config(cfg: Config) -> Config:
    """A config whose networks build their own blocks merged.

    Args:
        cfg: The config of a network with re-parameterizable blocks of its
            package, such as mmpretrain's RepVGG.

    Returns:
        Config: A copy in which every class that has an argument for it
        (:data:`DEPLOYED`) builds its merged form.
    """

    def deploy(node: dict, scope: Optional[str]) -> dict:
        kind = class_of(node.get('type'), scope)
        if isinstance(kind, type):
            names = inspect.signature(kind.__init__).parameters
            node.update({name: True for name in DEPLOYED if name in names})
        return node

    fields = cfg.to_dict()
    return Config(rewrite(fields, deploy, fields.get('default_scope')))


def imports_of(fields: dict) -> Tuple[dict, List[str]]:
    """A config's ``custom_imports``, and the list of names in it.

    Args:
        fields: The config's fields. Without ``custom_imports`` the result is
            a dict that imports nothing.
    """
    imports = fields.get('custom_imports') or dict(
        imports=[], allow_failed_imports=False
    )
    names = imports['imports']
    return imports, [names] if isinstance(names, str) else list(names)


def named_block(
    layer: Any, scope: Optional[str] = None
) -> Optional[Type[ReparamConv2d]]:
    """The block that a layer's config names, None if it names none.

    Args:
        layer: The layer's value in the config, of any type.
        scope: The registry scope that applies there.
    """
    if not isinstance(layer, dict):
        return None
    kind = class_of(layer.get('type'), scope)
    kind = getattr(kind, 'block', kind)
    if isinstance(kind, type) and issubclass(kind, ReparamConv2d):
        return kind
    return None


def _plain_layer(
    layer: dict, block: Type[ReparamConv2d], owner: Any
) -> Optional[dict]:
    """The config of the plain convolution in the place of a block.

    Args:
        layer: The block's config.
        block: The block that it names.
        owner: The class, or function, that takes it as ``conv_cfg``.

    Returns:
        dict: With those keys of the block that are torch's layer's; None,
        the usual default, where that means the same.
    """
    keys = {k: layer[k] for k in CONV_KEYS if k in layer}
    default = default_conv_type(owner) if isinstance(owner, type) else None
    if layer.get('adaptive_padding', default in ADAPTIVE_TYPES):
        return dict(type=ADAPTIVE_TYPES[0], **keys)
    kind = kind_of_block(block)
    if kind == CONV2D:  # it takes the form that the network needs
        kind = LAYER_KINDS.get(default, kind)
    plain = dict(type=TYPES[kind], **keys)
    return plain if keys or default or plain['type'] != 'Conv2d' else None


def _without_layers(value: Any, scope: Optional[str]) -> Any:
    """A value of a config, in which blocks are plain convolutions.

    Some classes take the config of a layer by another key than ``conv_cfg``.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_without_layers(item, scope) for item in value)
    block = named_block(value, scope)
    if block is None:
        return value
    return _torchs_layer(value, kind_of_block(block))


def _torchs_layer(layer: dict, kind: LayerKind) -> dict:
    """The config of torch's layer in the place of a block.

    Args:
        layer: The block's config.
        kind: The layer's.
    """
    allowed = inspect.signature(CONV_TYPES[kind]).parameters
    keys = {k: layer[k] for k in allowed if k in layer}
    return dict(type=TYPES[kind], **keys)


def without_own_starts(fields: dict) -> dict:
    """A config's fields without mmdbb's initialisation rules.

    Args:
        fields: The config's fields, with ``default_scope`` if they have any.
    """

    def change(node: dict, scope: Optional[str]) -> dict:
        rules = node.get('init_cfg')
        if isinstance(rules, (list, tuple)):
            rules = [rule for rule in rules if not _is_own_start(rule, scope)]
            node['init_cfg'] = rules or None
        elif _is_own_start(rules, scope):
            node['init_cfg'] = None
        return node

    return rewrite(fields, change, fields.get('default_scope'))


def _is_own_start(rule: Any, scope: Optional[str]) -> bool:
    """Whether an entry of ``init_cfg`` is a rule of mmdbb's.

    A merged network does without it, as its weights come from training.
    """
    return isinstance(rule, dict) and is_own(
        class_of(rule.get('type'), scope, WEIGHT_INITIALIZERS)
    )


def _drop_own_rules(fields: dict, scope: Optional[str]) -> None:
    """Remove mmdbb's optimizer rules, in place."""
    rules = fields.get('optim_wrapper') or {}
    constructor = rules.get('constructor')
    if is_own(class_of(constructor, scope, OPTIM_WRAPPER_CONSTRUCTORS)):
        del rules['constructor']
        rules.pop('paramwise_cfg', None)


def _drop_own_hooks(fields: dict, scope: Optional[str]) -> None:
    """Remove mmdbb's hooks, in place.

    A hook of mmdbb that subclasses a hook of another package takes the same
    arguments, so the other package's hook replaces it.
    """
    hooks = [_plain_hook(h, scope) for h in fields.get('custom_hooks') or ()]
    fields.pop('custom_hooks', None)
    hooks = [hook for hook in hooks if hook is not None]
    if hooks:
        fields['custom_hooks'] = hooks
    hooks = fields.get('default_hooks') or {}
    for name, hook in list(hooks.items()):
        if hook is None:
            continue
        hooks[name] = _plain_hook(hook, scope)
        if hooks[name] is None:
            del hooks[name]


def _plain_hook(hook: Any, scope: Optional[str]) -> Any:
    """The hook's config for use without mmdbb; None to drop the hook."""
    if not isinstance(hook, dict):
        return hook
    kind = class_of(hook.get('type'), scope, HOOKS)
    if not is_own(kind):
        return hook
    bases = [base for base in kind.__mro__ if not is_own(base)]
    types = [name for name in (type_of(b, HOOKS) for b in bases) if name]
    return dict(hook, type=types[0]) if types else None


def _needs_own_network(fields: dict, scope: Optional[str]) -> bool:
    """Whether the config names a class that mmdbb defines."""
    kinds = [class_of(n.get('type'), s) for n, s in dicts_of(fields, scope)]
    return any(isinstance(kind, type) and is_own(kind) for kind in kinds)


def _modules_of(fields: dict) -> Set[str]:
    """Modules that define the classes and functions a config may name."""
    roots = [r for r in vars(registries).values() if isinstance(r, Registry)]
    found = set()
    for node, _ in dicts_of(fields):
        for value in _flat(list(node.values())):
            kinds = [value]
            if isinstance(value, str):
                # The full name of a class, which needs no registry.
                module, _, name = value.rpartition('.')
                kinds = [getattr(sys.modules.get(module), name, None)]
                kinds += [registered(value, None, root) for root in roots]
            found.update(module_of(kind) for kind in kinds if callable(kind))
    return found


def _flat(values: Any) -> Iterator[Any]:
    """The items of lists and tuples, nested to any depth."""
    for value in values:
        if isinstance(value, (list, tuple)):
            yield from _flat(value)
        else:
            yield value


def _without_merged(
    names: List[str], merged: Set[str], used: Set[str]
) -> List[str]:
    """Imports that are still needed.

    Args:
        names: The modules that the config imports.
        merged: Modules that define the backbones with blocks, which plain
            backbones have replaced.
        used: Modules that define everything else the config names.

    Returns:
        list: ``names`` without the imports that only brought such backbones.
        All of ``names`` if the config uses a module that no import explains.
    """

    def brings(name: str, modules: Set[str]) -> bool:
        return any(is_within(module, name) for module in modules)

    kept = [n for n in names if not brings(n, merged) or brings(n, used)]
    # A module that no kept import covers may have been imported by one of the
    # dropped modules, so then nothing is dropped.
    known = (*PACKAGES, 'mmdbb', *kept)
    others = [m for m in used if not any(is_within(m, k) for k in known)]
    return names if others else kept
