# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Change a model's config: blocks in all of its parts, and a quarter of width.

What a network is does not change with its width, but the time to try it does.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple

import torch
from mmengine.config import Config, config
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.deploy import build_model
from mmdbb.mm.config_types import class_of

#: What the sweep puts into every part that takes it.
BLOCK = dict(type='DBB')

#: Types that no registry knows -> the class. SlowFast builds its pathways by a
#: table of its own.
_UNREGISTERED = {
    'resnet3d': 'mmaction.models.backbones.resnet3d_slowfast.ResNet3dPathway'
}
#: Keys whose numbers are divided by four, if they are multiples of 32.
_WIDTHS = re.compile(r'channels|^num_groups$|^width$')
#: The same of transformers, whose numbers of heads do not always divide them.
_EMBEDDINGS = re.compile(r'channels|^num_groups$|^width$|dims$|^num_feats$')
_SMALLEST = 32
#: How many random numbers the weights of a network are taken from.
_DRAWN = 1 << 18


def model_config(cfg: Config, package: str) -> Config:
    """A config of the network alone, without weights to start from.

    Args:
        cfg: The config as the package installs it.
        package: The package, whose types need no scope.
    """
    fields = cfg.to_dict()
    imports = dict(fields.get('custom_imports') or dict(imports=[]))
    names = imports['imports']
    names = [names] if isinstance(names, str) else list(names)
    return Config(
        dict(
            model=_without_starts(fields['model']),
            default_scope=fields.get('default_scope') or package,
            custom_imports=dict(
                imports=['mmdbb', *names], allow_failed_imports=False
            ),
        )
    )


def _without_starts(node: Any) -> Any:
    if isinstance(node, (list, tuple)):
        return type(node)(_without_starts(each) for each in node)
    if not isinstance(node, dict):
        return node
    starts = ('pretrained', 'init_cfg')
    return {
        key: None if key in starts else _without_starts(value)
        for key, value in node.items()
    }


def parts_taking_blocks(cfg: Config) -> Dict[str, str]:
    """The parts of a network whose classes take ``conv_cfg``.

    Args:
        cfg: A config from :func:`model_config`.

    Returns:
        dict: Where a part stands -> the name of its class.
    """
    found = {}
    for where, _, kind in _built(cfg.to_dict()['model'], cfg.default_scope):
        if takes(kind, 'conv_cfg'):
            found[where] = kind.__name__
    return found


def with_blocks(cfg: Config, places: List[str]) -> Config:
    """Give ``conv_cfg=dict(type='DBB')`` to parts of a network.

    Args:
        cfg: A config from :func:`model_config`; unchanged.
        places: Where the parts stand.
    """
    fields = copy.deepcopy(cfg.to_dict())
    for where, node, _ in _built(fields['model'], cfg.default_scope):
        if where in places:
            node['conv_cfg'] = dict(BLOCK)
    return Config(fields)


def narrow(cfg: Config, embeddings: bool = False) -> Config:
    """Divide the widths of a network by four, written ones and defaults.

    The result may not fit together, as where a backbone's widths are no
    numbers of its config; building and running it tells.

    Args:
        cfg: A config from :func:`model_config`; unchanged.
        embeddings: Whether to divide those of transformers too.
    """
    widths = _EMBEDDINGS if embeddings else _WIDTHS
    fields = copy.deepcopy(cfg.to_dict())
    built = list(_built(fields['model'], cfg.default_scope))
    _divide(fields['model'], widths)
    for _, node, kind in built:
        for key, default in _arguments(kind).items():
            if widths.search(key) and key not in node:
                divided = _quarter(default)
                if divided != default:
                    node[key] = divided
    return Config(fields)


def _divide(node: Any, widths: re.Pattern) -> None:
    values = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in list(values):
        if isinstance(key, str) and widths.search(key):
            node[key] = _quarter(value)
        elif isinstance(value, (dict, list)):
            _divide(value, widths)


def _quarter(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_quarter(each) for each in value)
    whole = isinstance(value, int) and not isinstance(value, bool)
    if whole and value >= _SMALLEST and value % _SMALLEST == 0:
        return value // 4
    return value


def takes(kind: type, name: str) -> bool:
    """Whether a class takes an argument, by itself or through its bases.

    Args:
        kind: The class.
        name: Name of the argument.
    """
    return name in _arguments(kind)


def _arguments(kind: type) -> Dict[str, Any]:
    """Names and defaults of what a class takes, through its bases too."""
    found: Dict[str, Any] = {}
    for base in kind.__mro__:
        if '__init__' not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()
        for parameter in parameters:
            found.setdefault(parameter.name, parameter.default)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            break
    return found


def _built(
    node: Any, scope: Optional[str], where: str = 'model'
) -> Iterator[Tuple[str, dict, type]]:
    """All modules that a config builds: place, config and class of each."""
    if isinstance(node, (list, tuple)):
        for number, each in enumerate(node):
            yield from _built(each, scope, f'{where}.{number}')
    elif isinstance(node, dict):
        scope = node.get('_scope_', scope)
        type_ = node.get('type')
        if isinstance(type_, str):
            type_ = _UNREGISTERED.get(type_, type_)
        kind = class_of(type_, scope)
        if isinstance(kind, type) and issubclass(kind, nn.Module):
            yield where, node, kind
        for key, value in node.items():
            yield from _built(value, scope, f'{where}.{key}')


@contextlib.contextmanager
def no_initial_values() -> Iterator[None]:
    """Within the context layers are built without drawing their weights.

    :func:`draw_` draws them all at once, which is much faster.
    """
    before = {name: getattr(nn.init, name) for name in _DRAWING}

    def keep(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return tensor

    for name in before:
        setattr(nn.init, name, keep)
    try:
        yield
    finally:
        for name, function in before.items():
            setattr(nn.init, name, function)


@contextlib.contextmanager
def unformatted() -> Iterator[None]:
    """Within the context mmengine writes configs in one line.

    It formats them with yapf, which takes longer than the networks do.
    """
    before = config.FormatCode
    config.FormatCode = lambda text, **_: (text, True)
    try:
        yield
    finally:
        config.FormatCode = before


_DRAWING = (
    'kaiming_normal_',
    'kaiming_uniform_',
    'normal_',
    'trunc_normal_',
    'uniform_',
    'xavier_normal_',
    'xavier_uniform_',
)


@torch.no_grad()
def draw_(model: nn.Module, seed: int = 0) -> nn.Module:
    """Draw all weights of a network, its norms' statistics too, in place.

    Norms get means and variances unlike their start, of which the values are
    zero and one: there half of the possible mistakes cannot be seen.

    Args:
        model: The network, on the CPU.
        seed: Seed of the random numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    # Drawing each number anew would take a third of a sweep's time.
    drawn = torch.randn(_DRAWN, generator=generator)

    def between(low: float, high: float) -> Callable[[torch.Tensor], None]:
        return lambda tensor: tensor.uniform_(low, high, generator=generator)

    for parameter in model.parameters():
        if parameter.dim() > 1:
            _fill_(parameter, drawn, generator)
            parameter.mul_(parameter[0].numel() ** -0.5)
        else:
            between(-0.1, 0.1)(parameter)
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            if module.affine:
                between(0.5, 1.5)(module.weight)
                between(-0.5, 0.5)(module.bias)
            if module.track_running_stats:
                between(-0.5, 0.5)(module.running_mean)
                between(0.5, 1.5)(module.running_var)
        elif isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            if module.weight is not None:
                between(0.5, 1.5)(module.weight)
    return model


def _fill_(
    tensor: torch.Tensor, values: torch.Tensor, generator: torch.Generator
) -> None:
    """Fill a tensor with values from a random place on, and around again."""
    start = torch.randint(len(values), (1,), generator=generator).item()
    flat = tensor.new_empty(tensor.numel())
    for part in flat.split(len(values)):
        first = len(values) - start
        part[:first] = values[start : start + len(part)]
        part[first:] = values[: max(0, len(part) - first)]
    tensor.copy_(flat.reshape(tensor.shape))


def build(cfg: Config) -> nn.Module:
    """Build a network in eval mode, with values drawn by :func:`draw_`.

    Args:
        cfg: A config from :func:`model_config`.

    Raises:
        UserError: If it cannot be built.
    """
    with no_initial_values():
        model = build_model(cfg)
    return draw_(model)
