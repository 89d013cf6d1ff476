# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Pairs of a convolution and the norm behind it, by OpenMMLab's conventions.

The ready backbones, which are known, put blocks in the place of such pairs.
For any other network names are a guess, and the data tells more:
:mod:`mmdbb.found_norms`.
"""

from __future__ import annotations

from typing import Any, Dict, Iterator, List, NamedTuple, Tuple

from torch import nn

from mmdbb.modules import is_norm, names_of


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
    parents: Iterator[Any] = model.modules()  # with attributes of any type
    for parent in parents:
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
                if is_norm(parent._modules[second]):
                    yield ConvNorm(parent, first, second)
        else:
            for name in parent._modules:
                number = name[4:]
                norm = getattr(parent, f'norm{number}_name', None)
                if name.startswith('conv') and isinstance(norm, str):
                    yield ConvNorm(parent, name, norm)


def norm_names(model: nn.Module) -> Dict[str, Tuple[str, ...]]:
    """Find the norms behind convolutions by the names of their attributes.

    Returns:
        dict: Full name of a convolution -> full names of the norms behind it:
        several if one convolution stands in several places, as detectors'
        heads share theirs among the levels, each with a norm of its own. All
        names of the convolution are listed.
    """
    names = names_of(model)
    norms: Dict[nn.Module, List[nn.Module]] = {}
    for parent, conv_name, norm_name in conv_norm_pairs(model):
        conv = getattr(parent, conv_name, None)
        norm = getattr(parent, norm_name, None)
        if conv not in names or norm not in names:
            continue
        found = norms.setdefault(conv, [])
        if norm not in found:
            found.append(norm)
    return {
        name: tuple(names[norm][0] for norm in found)
        for conv, found in norms.items()
        for name in names[conv]
    }


def _is_conv_module(module: nn.Module) -> bool:
    """Whether a module has the attributes of mmcv's ``ConvModule``."""
    names = ('conv', 'order', 'with_norm', 'norm_name')
    return all(hasattr(module, name) for name in names)
