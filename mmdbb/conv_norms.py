# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pairs of a convolution and the norm behind it, by OpenMMLab's conventions.

Two things need these pairs. A block with norms of its own takes the place of
both, convolution and norm. And when a block is merged, its bias folds into the
norm that follows.
"""

from __future__ import annotations

from typing import Dict, Iterator, NamedTuple

from torch import nn


class ConvNorm(NamedTuple):
    """A convolution and the norm that alone reads its output.

    Attributes:
        parent: The module that holds both.
        conv: Attribute name of the convolution.
        norm: Attribute name of the norm.
    """

    parent: nn.Module
    conv: str
    norm: str


def conv_norm_pairs(model: nn.Module) -> Iterator[ConvNorm]:
    """Find the pairs of a model by the conventions of OpenMMLab's packages.

    The conventions are: mmcv's ``ConvModule``; residual blocks and stems of
    ResNets (``conv1`` and ``norm1_name``); neighbours in an
    ``nn.Sequential``; and the attribute ``conv_norm_names``, in which
    a module lists pairs of attributes, such as ``(('conv', 'norm'),)``.
    """
    for parent in model.modules():
        if _is_conv_module(parent):
            order = parent.order
            if (
                parent.with_norm
                and order.index('norm') == order.index('conv') + 1
            ):
                yield ConvNorm(parent, 'conv', parent.norm_name)
        elif hasattr(parent, 'conv_norm_names'):
            for conv, norm in parent.conv_norm_names:
                yield ConvNorm(parent, conv, norm)
        elif isinstance(parent, nn.Sequential):
            names = list(parent._modules)
            for first, second in zip(names, names[1:]):
                if _is_norm(parent._modules[second]):
                    yield ConvNorm(parent, first, second)
        else:
            for name in parent._modules:
                number = name[4:]
                norm = getattr(parent, f'norm{number}_name', None)
                if name.startswith('conv') and isinstance(norm, str):
                    yield ConvNorm(parent, name, norm)


def norm_names(model: nn.Module) -> Dict[str, str]:
    """Full name of a convolution -> full name of the norm behind it."""
    names = {module: name for name, module in model.named_modules()}
    pairs = {}
    for parent, conv, norm in conv_norm_pairs(model):
        prefix = f'{names[parent]}.' if names[parent] else ''
        pairs[prefix + conv] = prefix + norm
    return pairs


def _is_conv_module(module: nn.Module) -> bool:
    """Whether a module has the attributes of mmcv's ``ConvModule``."""
    names = ('conv', 'order', 'with_norm', 'norm_name')
    return all(hasattr(module, name) for name in names)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm))
