# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Choose the block of each convolution of a network by the layer's name."""

from __future__ import annotations

import logging
from fnmatch import fnmatchcase
from typing import (
    Any,
    Dict,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
    Union,
)

import torch
from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import (
    ADAPTIVE_TYPES,
    block_of,
    refuse_unknown_keys,
)
from mmdbb.dimensions import CONV_TYPES, LayerKind, kind_of
from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.insert import forms_of, held_layers, is_replaceable
from mmdbb.modules import has_hooks, memory_format_of, names_of, to_layout_
from mmdbb.plain.blocks import copy_entries_, plain_start
from mmdbb.plain_conv import plain_conv
from mmdbb.ports import PORTS
from mmdbb.tracing import sharing_layers
from mmdbb.transforms import KernelBias

Patterns = Union[str, Sequence[str], None]


class _Rule(NamedTuple):
    """Which layers become what.

    Attributes:
        number: Its place in the list, from 0 on, for messages.
        block: The class; ``nn.Conv2d`` for none.
        forms: Kind of a layer -> the form of the block for it; None for none.
        args: The block's own arguments.
        sizes: Smallest and largest kernel (longer side, in taps).
        only: Shell patterns, of which one must match; empty for any name.
        skip: Shell patterns, of which none may match.
    """

    number: int
    block: Any
    forms: Dict[LayerKind, Any]  # None where the block has no form
    args: dict
    sizes: tuple
    only: List[str]
    skip: List[str]

    def takes(self, names: Sequence[str], layer: Any) -> bool:
        """Whether the rule is for a layer, which has these names."""
        low, high = self.sizes
        fits = low <= max(layer.kernel_size) <= high
        return (
            fits
            and self.forms[_kind(layer)] is not None
            and any(
                (not self.only or _matches(name, self.only))
                and not _matches(name, self.skip)
                for name in names
            )
        )


def put_blocks_(
    model: nn.Module, rules: Sequence[dict]
) -> Dict[str, Optional[str]]:
    """Put blocks into a network that was just built, layer by layer.

    The blocks start as they do under ``conv_cfg``: by their own rules and not
    as the convolutions that they replace, which is what ``insert_blocks_``
    does. The norms behind them stay. But what the network set on purpose
    stays, too: a convolution that is frozen (a fixed filter), or whose bias is
    one number other than zero (a detector's prior), starts its block; one
    whose kernel is zero stays plain, because a block with norms cannot start
    as zero. So does one that shares its weight with another layer.

    Args:
        model: The network, with random weights; changed in place.
        rules: Configs of blocks. Of each, the keys ``only`` and ``skip`` are
            shell patterns of whole names of layers, one or a list. The first
            rule that matches a convolution's name and has its size within the
            limits of its block decides; the others do not count.
            ``dict(type='Conv2d')`` is for layers that stay plain. A block
            that is there already is replaced.

    Returns:
        dict: Names of the layers that changed -> names of their blocks.

    Raises:
        TypeError: If the rules have another form, or unknown keys.
        UserError: If a pattern fits no convolution, a rule decides for none,
            or a layer cannot become such a block.

    Examples:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 7), nn.Conv2d(8, 8, 3))
        >>> put_blocks_(model, [dict(type='DBB', only='1')])
        {'1': 'DBB'}
    """
    parsed = _parsed(rules)
    layers = _layers(model)
    names = names_of(model)
    if not layers:
        raise UserError(
            f'{type(model).__name__} has no convolution inside that a block '
            'could take the place of'
        )
    _refuse_idle_patterns(parsed, [n for m in layers for n in names[m]])
    new: Dict[nn.Module, nn.Module] = {}
    used: Set[int] = set()
    changed: Dict[str, Optional[str]] = {}
    for layer in layers:
        rule = next((r for r in parsed if r.takes(names[layer], layer)), None)
        if rule is None:
            continue
        used.add(rule.number)
        if rule.block is nn.Conv2d and not isinstance(layer, ReparamConv2d):
            continue
        try:
            new[layer] = _built(rule, layer)
        except (TypeError, ValueError) as error:
            raise UserError(f'{names[layer][0]}: {error}') from error
        changed[names[layer][0]] = rule.forms[_kind(layer)].__name__
    idle = [rule for rule in parsed if rule.number not in used]
    if idle:
        raise UserError(
            f'blocks[{idle[0].number}] decides for no convolution: earlier '
            'ones take those that its patterns match, or their kernels are '
            f'not of {idle[0].sizes[0]} to {idle[0].sizes[1]} taps, or it has '
            'no form for them'
        )
    for parent in model.modules():
        for attribute, child in parent._modules.items():
            if child in new:
                parent._modules[attribute] = new[child]
    return changed


def _parsed(rules: Sequence[dict]) -> List[_Rule]:
    if not isinstance(rules, (list, tuple)) or not rules:
        raise TypeError(
            'blocks must be a list of configs such as dict(type="DBB", '
            f'only="backbone.*"), got {rules!r}'
        )
    found = []
    for number, rule in enumerate(rules):
        if not isinstance(rule, dict) or 'type' not in rule:
            raise TypeError(
                f'blocks[{number}] must be a config with a type, got {rule!r}'
            )
        rule = dict(rule)
        only, skip = (
            _patterns(f'blocks[{number}].{key}', rule.pop(key, None))
            for key in ('only', 'skip')
        )
        block: Any
        block, args = block_of(rule, plain=True)
        del args['type']
        low, high = getattr(block, 'kernel_sizes', (1, float('inf')))
        sizes = (
            args.pop('min_kernel_size', low),
            args.pop('max_kernel_size', high),
        )
        for key, size in zip(('min', 'max'), sizes):
            if not isinstance(size, (int, float)) or isinstance(size, bool):
                raise TypeError(
                    f'blocks[{number}].{key}_kernel_size must be a number of '
                    f'taps, got {size!r}'
                )
        if block is not nn.Conv2d:
            refuse_unknown_keys(block, args)
        elif args:
            raise TypeError(
                f'blocks[{number}]: Conv2d leaves a layer plain, and takes no '
                f'{sorted(args)}'
            )
        forms = CONV_TYPES if block is nn.Conv2d else forms_of(block)
        found.append(_Rule(number, block, forms, args, sizes, only, skip))
    return found


def _patterns(key: str, value: Patterns) -> List[str]:
    patterns = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(pattern, str) for pattern in patterns):
        raise TypeError(f'{key} must be shell patterns, got {value!r}')
    return patterns


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def _layers(model: nn.Module) -> List[Any]:
    """The convolutions and blocks that another block can take the place of."""
    held = held_layers(model)
    tied = sharing_layers(model)
    inside = {
        part
        for module in model.modules()
        if isinstance(module, ReparamConv2d)
        for part in module.modules()
        if part is not module
    }
    return [
        module
        for module in model.modules()
        if module is not model
        and module not in inside
        # The place of a norm that a block absorbed remembers the block.
        and (module not in held or bool(getattr(module, '_absorbed', ())))
        and not has_hooks(module)
        and module not in tied
        and not _is_zero(module)
        and (
            is_replaceable(module)
            or _is_adaptive(module)
            or (isinstance(module, ReparamConv2d) and not module.deploy)
        )
    ]


def _is_zero(layer: nn.Module) -> bool:
    """Whether a convolution starts as zero, as offsets in DCN do."""
    weight = layer._parameters.get('weight')
    return weight is not None and not weight.is_meta and not weight.any()


def _start_of(layer: Any) -> Optional[KernelBias]:
    """The convolution as which a block has to start; None if as it likes."""
    if isinstance(layer, ReparamConv2d) or layer.weight.is_meta:
        return None
    bias = layer.bias
    if layer.weight.requires_grad and not (
        bias is not None and len(bias) > 1 and is_prior(bias)
    ):
        return None
    if bias is None:
        bias = layer.weight.new_zeros(layer.out_channels)
    return KernelBias(layer.weight, bias)


def is_prior(bias: torch.Tensor) -> bool:
    """Whether a bias is one number other than zero, so set on purpose.

    Args:
        bias: The bias, of shape (channels,).
    """
    return bool((bias == bias[0]).all()) and bool(bias[0] != 0)


def _kind(layer: nn.Module) -> LayerKind:
    if isinstance(layer, ReparamConv2d):
        return layer.spec.kind
    kind: Any = kind_of(layer)  # not None, as the layer is a convolution
    return kind


def _is_adaptive(module: nn.Module) -> bool:
    return type(module).__name__ in ADAPTIVE_TYPES


def _refuse_idle_patterns(rules: Sequence[_Rule], names: List[str]) -> None:
    for rule in rules:
        for key in ('only', 'skip'):
            for pattern in getattr(rule, key):
                if not any(fnmatchcase(name, pattern) for name in names):
                    raise UserError(
                        f'blocks[{rule.number}].{key}: {pattern!r} fits no '
                        f'convolution; they are {some(names, 5)}'
                    )


def _built(rule: _Rule, layer: Any) -> nn.Module:
    """Build the block that a rule puts into a layer's place."""
    absorbed: tuple = getattr(layer, '_absorbed', ())
    form = rule.forms[_kind(layer)]
    if absorbed and not issubclass(rule.block, BranchSumConv2d):
        raise ValueError(
            f'the {type(layer).__name__} there does what the norm behind it '
            f'did, and a {rule.block.__name__} has no norm to do so; use the '
            "package's own backbone in place of the one with blocks"
        )
    spec: Any
    if isinstance(layer, ReparamConv2d):
        spec, bias = layer.spec, layer._wants_bias
        adaptive = layer.adaptive_padding
    else:
        spec, bias = None, layer.bias is not None
        adaptive = _is_adaptive(layer)
    if rule.block is nn.Conv2d:
        new: Any = plain_conv(spec, bias=bias)
    else:
        args = dict(rule.args)
        if adaptive:
            args.setdefault('adaptive_padding', True)
        if absorbed:  # the norm that it does the work of is its backbone's
            first = next(iter(layer.branches.values()))
            args.setdefault('norm_cfg', first.norm_cfg)
        if form.transposed:
            args['output_padding'] = layer.output_padding
        new = form(
            layer.in_channels,
            layer.out_channels,
            layer.kernel_size,
            layer.stride,
            layer.padding,
            dilation=layer.dilation,
            groups=layer.groups,
            bias=bias,
            padding_mode=layer.padding_mode,
            **args,
        )
    tensors = list(layer.parameters())
    floating = next(t for t in tensors if t.is_floating_point())
    new.to(floating.device, floating.dtype)
    to_layout_(new, memory_format_of(layer))
    if not any(tensor.requires_grad for tensor in tensors):
        new.requires_grad_(False)
    for place in absorbed:
        place.belong_to(new)
    start = _start_of(layer)
    if start is not None and isinstance(new, ReparamConv2d):
        _start_as_(new, start, layer)
    return new.train(layer.training)


def _start_as_(block: ReparamConv2d, start: KernelBias, layer: Any) -> None:
    try:
        copy_entries_(block, plain_start(block, start))
    except ValueError as error:
        # Frozen stages get weights later, which the block then refuses.
        PORTS.log(
            f'a {type(block).__name__} takes the place of {layer}, whose '
            f'start it cannot have: {error}',
            logging.WARNING,
        )
