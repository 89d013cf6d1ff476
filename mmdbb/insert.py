# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Insert blocks into any PyTorch model, and merge them back into it."""

from __future__ import annotations

import contextlib
import inspect
from typing import (
    TYPE_CHECKING,
    Any,
    Callable,
    Dict,
    List,
    Optional,
    Set,
    Tuple,
    Type,
)

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.branch_sum import BranchSumConv2d
from mmdbb.blocks.build import (
    block_of,
    form_of,
    kind_of_block,
    refuse_unknown_keys,
)
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.dimensions import (
    ATTRIBUTES,
    CONV2D,
    CONV_TYPES,
    CONVS,
    NORM_TYPES,
    LayerKind,
    is_torchs_conv,
    kind_of,
)
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly
from mmdbb.files.sources import some
from mmdbb.found_norms import norms_shown
from mmdbb.merge_back import Replaced, merge_before_fuse_
from mmdbb.modules import (
    has_hooks,
    memory_format_of,
    to_layout_,
    uncompiled,
)
from mmdbb.plain.blocks import BRANCH_SCALE, copy_entries_, plain_start
from mmdbb.plain.branch_sums import NormValues
from mmdbb.ports import PORTS
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import stock_state
from mmdbb.tracing import outside_blocks, own_readers
from mmdbb.transforms import KernelBias

if TYPE_CHECKING:
    from typing import TypeGuard

__all__ = ['insert_blocks_', 'merge_into_']

#: Arguments of a block that the convolution gives which it replaces.
_OF_CONV = {
    *inspect.signature(nn.Conv2d).parameters,
    'output_padding',
    'adaptive_padding',
}

Where = Callable[[str, nn.Module], bool]

# Norms that a block can absorb. A subclass may compute more (timm has norms
# with an activation inside), so it stays behind the block.
_ABSORBED = (*NORM_TYPES.values(), nn.SyncBatchNorm)


def insert_blocks_(
    model: nn.Module,
    block: Optional[dict] = None,
    where: Optional[Where] = None,
    example: Any = None,
    branch_scale: float = BRANCH_SCALE,
) -> List[str]:
    """Replace convolutions of a model by blocks, in place.

    The outputs of the model in eval mode stay the same. If a batch norm alone
    reads the output of a convolution, the block absorbs it, and
    ``AbsorbedNorm`` takes the norm's place: an ``nn.Identity`` that remembers
    the block; all other layers stay. OREPA's block has no norm of its own, so
    it absorbs none. If the model has a method ``fuse``, as YOLO's have, it
    merges the blocks first from now on.

    Convolutions of one, two and three dimensions, and transposed ones, get
    the form of the block that stands for them. Those for which the block has
    no form stay; a form such as ``DBB3d`` replaces its own kind only.

    Args:
        model: Any model, with its weights.
        block: Config of the block, ``dict(type='DBB')`` by default.
        where: Decides by name and module whether to replace a convolution
            for which the block has a form. By default those are replaced
            whose kernels are within the limits of the block (DBB: 2 to 6
            taps) and that the block can start as.
        example: Input to run the model on: a tensor, a tuple of arguments or
            a dict of keywords. Needed only where torch.fx cannot trace the
            model.
        branch_scale: Start value of the gammas of all branches but ``kxk``,
            as a share of the gamma of ``kxk``, see :mod:`mmdbb.plain.blocks`.

    Returns:
        list: Names of the convolutions that are blocks now. These stay as
        they are: convolutions that a run of the model in eval mode does not
        reach, subclasses of torch's layers that have more than another
        constructor, convolutions with hooks or with attributes that the
        model wrote, those whose weights something else reads or shares, those
        that the model holds in a plain list or dict too, and those inside
        blocks.

    Raises:
        TypeError: If ``block`` is not a dict, or has unknown keys or those
            that the convolutions give (``bias``, ``stride``, ``dtype``, ...),
            or ``where`` is no function.
        ValueError: If there is nothing to replace, ``block`` names no block
            or one that cannot start as a plain convolution, or the model
            cannot be traced. The model is then unchanged.

    Examples:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        >>> insert_blocks_(model)
        ['0']
        >>> [type(layer).__name__ for layer in model]
        ['DBB', 'AbsorbedNorm', 'ReLU']
    """
    block_type, args, sizes = _block_config(block)
    rule = 'where()'
    if where is not None and not callable(where):
        raise TypeError(
            'where must be a function of the name and the convolution, such '
            f'as lambda name, conv: name.startswith("layer"); got {where!r}'
        )
    if where is None:
        rule = (
            f'the default rule (kernels of {sizes[0]} to {sizes[1]} taps '
            f'that {block_type.__name__} can start as; where= gives another)'
        )

        def where(name: str, conv: Any) -> bool:
            size = conv.kernel_size
            fits = sizes[0] <= max(size) <= sizes[1]
            return fits and block_type.starts_plain(size)

    forms: Any = forms_of(block_type)  # whose keys are of all convolutions
    readers = own_readers(model, example)
    held = held_layers(model)
    blocks = find_blocks(model)
    inside = tuple(f'{name}.' for name in blocks)
    new: Dict[nn.Module, nn.Module] = {}
    names: List[str] = []
    candidates: List[str] = []
    others: List[str] = []
    for name, conv in model.named_modules():
        if not name or conv not in readers or not is_replaceable(conv):
            continue
        if conv in held:
            continue
        if name.startswith(inside):
            continue
        candidates.append(name)
        form = forms[kind_of(conv)]
        if form is None:
            kind: Any = kind_of(conv)
            others.append(kind.name)
        if form is None or not where(name, conv):
            continue
        norm: Any = readers[conv]
        absorbed = issubclass(block_type, BranchSumConv2d)
        absorbed = absorbed and type(norm) in _ABSORBED
        absorbed = absorbed and not has_hooks(norm) and norm not in held
        absorbed = absorbed and norm.track_running_stats
        try:
            made = _block_for(conv, norm, absorbed, form, args, branch_scale)
        except ValueError as error:
            raise ValueError(f'{name}: {error}') from error
        new[conv] = made
        place = AbsorbedNorm(made, norm) if absorbed else None
        made.replaced = Replaced.of(conv, norm, place)
        if place is not None:
            new[norm] = place
        names.append(name)
    if not names:
        has = ''
        if others:
            kinds = ', '.join(dict.fromkeys(others))
            has = f'; {block_type.__name__} has no form for {kinds}'
        if blocks:
            has += f'; it has blocks already: {some([*blocks])}'
        raise ValueError(
            f'nothing to replace in {type(model).__name__}: {rule} chose '
            f'none of its {len(candidates)} plain convolutions inside{has}'
            if candidates
            else f'{type(model).__name__} has no plain convolution inside '
            'that a run reaches, and that nothing else reads, shares or '
            f'holds{has}'
        )
    places = [
        (parent, attribute, new[child])
        for parent in model.modules()
        for attribute, child in parent._modules.items()
        if child in new
    ]
    for parent, attribute, module in places:
        setattr(parent, attribute, module)
    merge_before_fuse_(model)
    return names


def merge_into_(
    plain: nn.Module, model: nn.Module, example: Any = None
) -> nn.Module:
    """Merge a model's blocks, and load the result into the original model.

    ``reparameterize`` leaves convolutions with a bias, and ``nn.Identity``
    where a norm was. Here biases fold into the norms behind them, so the
    original structure comes back, with all of its names.

    Args:
        plain: The original model, built anew or copied before blocks were
            inserted. Its weights are overwritten.
        model: The model with blocks; unchanged.
        example: Input to run the model on: a tensor, a tuple of arguments or
            a dict of keywords. Needed only where torch.fx cannot trace the
            model.

    Returns:
        nn.Module: ``plain``, whose outputs in eval mode equal those of
        ``model``.

    Raises:
        UserError: If the two are not the same network, or a merged bias has
            no place: the convolution has none, and no batch norm alone reads
            its output.
        ValueError: If the model has no blocks, or cannot be traced.

    Examples:
        >>> model = nn.Sequential(
        ...     nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> import copy
        >>> plain = copy.deepcopy(model)
        >>> names = insert_blocks_(model)
        >>> [type(layer).__name__ for layer in merge_into_(plain, model)]
        ['Conv2d', 'BatchNorm2d']
    """
    model = uncompiled(model)
    _check_same_network(plain, model)
    state = stock_state(model, plain, norms_shown(plain, example))
    load_strictly(plain, state, 'the merged network')
    return plain


def _check_same_network(plain: nn.Module, model: nn.Module) -> None:
    """Raise unless they have the same names, but for what blocks absorbed."""
    expected = plain.state_dict()
    blocks = find_blocks(model)
    inside = tuple(f'{name}.' for name in blocks)
    own = [n for n in model.state_dict() if not n.startswith(inside)]
    own += [f'{name}.weight' for name in blocks]
    biases = [f'{name}.bias' for name in blocks]
    absorbed = tuple(
        f'{name}.'
        for name, module in model.named_modules()
        if isinstance(module, nn.Identity)
    )
    differences = {
        'the plain one': [
            name
            for name in expected
            if name not in (*own, *biases) and not name.startswith(absorbed)
        ],
        'the one with blocks': [name for name in own if name not in expected],
    }
    found = [f'{some(n)} only in {who}' for who, n in differences.items() if n]
    if found:
        raise UserError(
            f'the model was not made of this network: {", ".join(found)}'
        )


def _block_config(
    block: Optional[dict],
) -> Tuple[Type[ReparamConv2d], dict, tuple]:
    block_type: Any
    block_type, args = block_of(block)
    del args['type']
    low, high = block_type.kernel_sizes
    low = args.pop('min_kernel_size', low)
    high = args.pop('max_kernel_size', high)
    refuse_unknown_keys(block_type, args)
    given = sorted(args.keys() & _OF_CONV)
    if given:
        raise TypeError(
            f'block has {given}, but each block takes these from the '
            'convolution that it replaces: leave them out'
        )
    return block_type, args, (low, high)


def forms_of(
    block_type: Type[ReparamConv2d],
) -> Dict[LayerKind, Optional[Type[ReparamConv2d]]]:
    """The form of a block for each kind of convolution; None without one.

    Args:
        block_type: The block's class. A form such as ``DBB3d`` is one for
            its own kind only.
    """
    own = kind_of_block(block_type)
    forms: Dict[LayerKind, Optional[Type[ReparamConv2d]]]
    forms = dict.fromkeys(CONV_TYPES)
    for kind in [own] if own != CONV2D else forms:
        with contextlib.suppress(ValueError):
            forms[kind] = form_of(block_type, kind)
    return forms


def _block_for(
    conv: _ConvNd,
    norm: Optional[nn.Module],
    absorbed: bool,
    block_type: Type[ReparamConv2d],
    args: dict,
    branch_scale: float,
) -> ReparamConv2d:
    if conv.weight.is_meta:
        raise ValueError('it is on the meta device, where it has no values')
    values = None
    if isinstance(norm, _BatchNorm) and norm.track_running_stats:
        values = NormValues.of(norm)
        norm_type = 'SyncBN' if isinstance(norm, nn.SyncBatchNorm) else 'BN'
        norm_cfg = dict(type=norm_type, eps=norm.eps, momentum=norm.momentum)
        if issubclass(block_type, BranchSumConv2d):
            args = dict(dict(norm_cfg=norm_cfg), **args)
    if block_type.transposed:
        args = dict(args, output_padding=conv.output_padding)
    block = block_type(
        conv.in_channels,
        conv.out_channels,
        conv.kernel_size,
        conv.stride,
        conv.padding,
        dilation=conv.dilation,
        groups=conv.groups,
        bias=absorbed or conv.bias is not None,
        padding_mode=conv.padding_mode,
        **args,
    ).to(conv.weight)
    to_layout_(block, memory_format_of(conv))
    bias = conv.bias
    if bias is None:
        bias = conv.weight.new_zeros(conv.out_channels)
    plain = KernelBias(conv.weight, bias)
    copy_entries_(
        block, plain_start(block, plain, values, absorbed, branch_scale)
    )
    block.requires_grad_(conv.weight.requires_grad)
    return block.train(conv.training)


def held_layers(model: nn.Module) -> Set[nn.Module]:
    """Layers that a model can reach by more than its registered names.

    Whoever holds a layer in a list would go on calling it, after another took
    its name.
    """
    found = set()

    def look(value: Any, depth: int) -> None:
        if isinstance(value, nn.Module):
            found.add(value)
        elif depth and isinstance(value, (list, tuple, set, dict)):
            within = value.values() if isinstance(value, dict) else value
            for inner in list(within):
                look(inner, depth - 1)

    for module in outside_blocks(model):
        for name, value in vars(module).items():
            if name != '_modules':
                look(value, 3)
    return found


def is_replaceable(layer: nn.Module) -> TypeGuard[_ConvNd]:
    """Whether a layer is a convolution of torch that a block can stand for.

    It has no hooks, and its class computes nothing else, see
    :func:`~mmdbb.dimensions.is_torchs_conv`. Nor has the model written an
    attribute into it, as ultralytics' models do into those layers whose
    inputs they look up by it: a block in its place would lack it.

    Args:
        layer: Any layer.
    """
    plain = PORTS.class_of_layer(layer) in CONVS or is_torchs_conv(layer)
    more = vars(layer).keys() - ATTRIBUTES
    written = any(not name.startswith('_') for name in more)
    return plain and not written and not has_hooks(layer)
