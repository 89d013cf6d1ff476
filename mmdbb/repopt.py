# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
r"""RepOptimizer: a plain network, trained as one with branches would be.

Ding et al., "Re-parameterizing Your Optimizers rather than Architectures",
ICLR 2023 (https://arxiv.org/abs/2205.15242). A branch b of a block has a
kernel that is linear in its weight, :math:`B_b w_b`, times a constant scale
:math:`s_b` per output channel. One step of SGD on all :math:`w_b` then moves
the merged kernel W by

.. math:: \Delta W = -\eta \sum_b s_b^2 B_b B_b^T \, \partial L / \partial W

and so does a step on W itself, with its gradient multiplied in this way
(sec. 3.1, appendix A). Momentum and weight decay are linear too, so that they
agree. So the plain network is trained from the start, as the block would be,
at the cost of a plain network.

The scales are searched once, by training a small while a network with the
block ``LinearAdd``, whose scales are trained (sec. 3.2); on another, smaller
data set if you like.
"""

from __future__ import annotations

import dataclasses
import os
from typing import Any, Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.linear import (
    BranchCfg,
    LinearBranch,
    LinearBranches,
    linear_branches,
)
from mmdbb.blocks.linear_add import LinearAddConv, LinearAddKernel
from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.files.formats import SUFFIXES, content_sum, write_checkpoint
from mmdbb.files.sources import some
from mmdbb.geometry import ConvSpec
from mmdbb.gradient_map import NOTE, GradientMap, Scaling
from mmdbb.modules import unwrapped
from mmdbb.plain_conv import plain_conv
from mmdbb.reparam import find_blocks

__all__ = [
    'ConvScales',
    'branch_scales',
    'load_scales',
    'save_scales',
    'scale_gradients_',
    'start_as_branches_',
]


class ConvScales(NamedTuple):
    """The branches that a convolution is trained as, and their scales.

    Attributes:
        branches: Names or configs of linear branches.
        scales: Names of the branches -> their scales, (out,), in the same
            order. The scale of a branch without a weight (the identity) is
            its start; as in the paper its gradient is not scaled.
    """

    branches: List[BranchCfg]
    scales: Dict[str, Tensor]


def branch_scales(model: nn.Module) -> Dict[str, ConvScales]:
    """Take the scales out of a network with ``LinearAdd`` blocks.

    Args:
        model: The network after the search; unchanged.

    Returns:
        dict: Name of each block -> its scales, copied, on the CPU. A block
        under several names is listed under the first.

    Raises:
        ValueError: If the network has no such block that is not merged.

    Examples:
        >>> from mmdbb.blocks import LinearAddConv
        >>> model = nn.Sequential(LinearAddConv(4, 8, 3, padding=1))
        >>> list(branch_scales(model)['0'].scales)
        ['kxk', '1x1']
    """
    found, seen = {}, set()
    for name, block in find_blocks(unwrapped(model)).items():
        if not isinstance(block, LinearAddConv) or block.deploy:
            continue
        if block in seen:
            continue
        seen.add(block)
        generator = block.generator
        found[name] = ConvScales(
            [_plain(branch.cfg) for branch in generator.branches],
            {
                key: generator.scales[key].detach().cpu().clone()
                for key in generator.scales
            },
        )
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no LinearAdd block that is not '
            "merged; search the scales with conv_cfg=dict(type='LinearAdd')"
        )
    return found


def save_scales(
    scales: Dict[str, ConvScales], path: str, overwrite: bool = False
) -> None:
    """Write scales to a file.

    Args:
        scales: Names of convolutions -> their scales.
        path: The file, ``*.pth`` or ``*.safetensors``.
        overwrite: Whether an existing file may be replaced.

    Raises:
        TypeError: If ``scales`` is something else.
        UserError: If the file cannot be written.
        ValueError: If there are no scales.
    """
    _check_dict(scales)
    path = os.fspath(path)
    if not path.endswith(SUFFIXES):
        raise UserError(
            f'a file of scales must end in {" or ".join(SUFFIXES)}, got {path}'
        )
    state = {
        f'{n}/{k}': v for n, s in scales.items() for k, v in s.scales.items()
    }
    note = {name: list(each.branches) for name, each in scales.items()}
    with all_or_nothing(path, overwrite=overwrite) as (draft,):
        write_checkpoint(draft, state, {NOTE: note})
        load_scales(draft)  # a branch's config may hold more than data


def load_scales(path: str) -> Dict[str, ConvScales]:
    """Read scales from a file that :func:`save_scales` wrote.

    Args:
        path: The file.

    Returns:
        dict: Names of convolutions -> their scales.

    Raises:
        UserError: If it cannot be read, or is no file of scales.
    """
    path = os.fspath(path)
    loaded = read_checkpoint(path)
    note, state = loaded['meta'].get(NOTE), loaded['state_dict']
    if not isinstance(note, dict) or not note:
        raise UserError(
            f'{path} is no file of scales: tools/repopt.py writes them from '
            'the checkpoint of a search'
        )
    found = {}
    for name, branches in note.items():
        own = [n for n in state if n.rpartition('/')[0] == name]
        scales = {n.rpartition('/')[2]: state[n] for n in own}
        if not isinstance(branches, list) or len(branches) != len(scales):
            raise UserError(
                f'{path} is damaged: {name} has the branches {branches!r}, '
                f'but scales of {list(scales)}'
            )
        found[name] = ConvScales(branches, scales)
    return found


def scale_gradients_(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    scales: Dict[str, ConvScales],
) -> None:
    """Let an optimizer train a plain network as one of scaled branches.

    From now on each step of the optimizer multiplies the gradients of these
    convolutions, and leaves ``.grad`` as it was. All else is the optimizer's
    own: momentum, weight decay, groups, ``state_dict``. Gradients are clipped
    and unscaled (mixed precision) before, as in the paper's code.

    The optimizer's groups note which scales they are trained with, so that a
    state that was trained with others is refused.

    Args:
        optimizer: An SGD, with or without momentum, Nesterov's too. Other
            optimizers are not linear in the gradient.
        model: The plain network, or a wrapper of it.
        scales: Names of the network's convolutions -> their scales. Other
            convolutions are trained as ever.

    Raises:
        TypeError: If the optimizer is of another kind.
        ValueError: If the scales do not fit the network, none of their
            convolutions is trained by the optimizer, or it has scales
            already.

    Examples:
        >>> from mmdbb.blocks import LinearAddConv
        >>> search = nn.Sequential(LinearAddConv(4, 8, 3, padding=1))
        >>> scales = branch_scales(search)  # after a training
        >>> model = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1))
        >>> start_as_branches_(model, scales)
        ['0']
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> scale_gradients_(optimizer, model, scales)
    """
    if not isinstance(optimizer, torch.optim.SGD):
        raise TypeError(
            'the gradients of scaled branches add up for SGD only, whose '
            'steps are linear in the gradient; got a '
            f'{type(optimizer).__name__}'
        )
    if any(NOTE in group for group in optimizer.param_groups):
        raise ValueError('the optimizer has scales already')
    trained = {p for g in optimizer.param_groups for p in g['params']}
    maps: Dict[nn.Parameter, GradientMap] = {}
    left = []
    for name, conv, linear in _fitted(model, scales):
        weight: Any = conv.weight
        if weight not in trained:
            if weight.requires_grad:
                left.append(name)
            continue
        new = GradientMap.of(conv, linear, scales[name].scales)
        if weight in maps and not maps[weight].equals(new):
            raise ValueError(
                f'{name} shares its weight with another convolution, which '
                'has other scales'
            )
        maps[weight] = new
    if left:
        raise ValueError(
            f'the optimizer does not train {some(left)}, which have scales: '
            "build it with the network's own parameters"
        )
    if not maps:
        raise ValueError(
            'the optimizer trains none of the convolutions that have scales: '
            f'{some(list(scales))} are frozen'
        )
    Scaling(optimizer, maps, _digest(scales))


def start_as_branches_(
    model: nn.Module, scales: Dict[str, ConvScales]
) -> List[str]:
    """Give convolutions the start that their scaled branches would have.

    As in the paper's code, the kernel that a convolution has counts as the
    start of its ``kxk`` branch, and is multiplied by the scale; the weights
    of all other branches are drawn as ``nn.Conv2d`` draws its own.

    Args:
        model: The plain network at its own start, or a wrapper of it.
        scales: Names of its convolutions -> their scales.

    Returns:
        list: The names of the convolutions, which were changed.

    Raises:
        ValueError: If the scales do not fit the network.
    """
    fitted = _fitted(model, scales)
    for name, conv, _ in fitted:
        if conv.weight.is_meta:
            raise ValueError(
                f'{name} is on the meta device, where it has no values'
            )
    done = set()
    for name, conv, linear in fitted:
        if conv in done:
            continue
        done.add(conv)
        branches = LinearBranches(linear, [])
        generator = LinearAddKernel(_spec_of(conv), branches).double()
        with torch.no_grad():
            for key, value in scales[name].scales.items():
                generator.scales[key].copy_(value)
            dense = next((b.key for b in linear if b.is_dense), None)
            if dense is not None:
                generator.weights[dense].copy_(conv.weight)
            conv.weight.copy_(generator.compose())
    return [name for name, _, _ in fitted]


def check_scales(
    model: nn.Module, scales: Dict[str, ConvScales], blocks: bool = False
) -> None:
    """Raise unless scales fit a network.

    Args:
        model: The network, or a wrapper of it.
        scales: Names of its convolutions -> their scales.
        blocks: Whether ``LinearAdd`` blocks may stand for convolutions.

    Raises:
        ValueError: If they do not fit; the message names the layer.
    """
    _fitted(model, scales, blocks)


def _fitted(
    model: nn.Module, scales: Dict[str, ConvScales], blocks: bool = False
) -> List[Tuple[str, nn.Conv2d, List[LinearBranch]]]:
    """Each convolution that has scales, and its branches.

    Raises:
        ValueError: If the scales do not fit the network.
    """
    _check_dict(scales)
    model = unwrapped(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    missing = [name for name in scales if name not in modules]
    if missing:
        convs = [n for n, m in modules.items() if isinstance(m, nn.Conv2d)]
        raise ValueError(
            f'the scales are of another network: it has no {some(missing)}; '
            f'its convolutions are {some(convs) or "none"}'
        )
    found = []
    for name, own in scales.items():
        try:
            module = modules[name]
            if blocks and isinstance(module, LinearAddConv):
                module = plain_conv(module.spec, bias=False)
            found.append((name, module, _branches(module, own)))
        except (TypeError, ValueError) as error:
            raise ValueError(f'scales of {name}: {error}') from error
    return found


def _check_dict(scales: Dict[str, ConvScales]) -> None:
    if not isinstance(scales, dict) or not all(
        isinstance(own, ConvScales) for own in scales.values()
    ):
        raise TypeError(
            'scales must be a dict of names and ConvScales, as load_scales '
            f'returns it; got a {type(scales).__name__}'
        )
    if not scales:
        raise ValueError('there are no scales')


def _branches(module: nn.Module, own: ConvScales) -> List[LinearBranch]:
    if isinstance(module, ReparamConv2d):
        raise ValueError(
            f'it is a {type(module).__name__}, which has branches of its own; '
            'scaled gradients are for the plain network'
        )
    if not isinstance(module, nn.Conv2d):
        raise ValueError(f'it is a {type(module).__name__}, not an nn.Conv2d')
    if is_parametrized(module) or 'weight' not in module._parameters:
        raise ValueError('its weight is computed from other parameters')
    linear = linear_branches(
        _spec_of(module), branches=own.branches or []
    ).branches
    keys = [branch.key for branch in linear]
    if set(keys) != set(own.scales):
        raise ValueError(f'branches {keys}, but scales of {list(own.scales)}')
    for key, scale in own.scales.items():
        if not isinstance(scale, Tensor):
            raise TypeError(f'{key} must be a tensor, got {scale!r}')
        if scale.shape != (module.out_channels,):
            raise ValueError(
                f'{key} has {tuple(scale.shape)} scales, and the layer '
                f'{module.out_channels} output channels'
            )
        if not (scale.is_floating_point() and scale.isfinite().all()):
            raise ValueError(f'{key} is no finite number in every channel')
    return linear


def _spec_of(conv: nn.Conv2d) -> ConvSpec:
    names = [field.name for field in dataclasses.fields(ConvSpec)]
    given = {n: getattr(conv, n) for n in names if hasattr(conv, n)}
    return ConvSpec(**given)


def _plain(cfg: BranchCfg) -> BranchCfg:
    return cfg if isinstance(cfg, str) else dict(cfg)


def _digest(scales: Dict[str, ConvScales]) -> str:
    values = {
        f'{name}/{key}': value.double()
        for name, own in scales.items()
        for key, value in own.scales.items()
    }
    values.update(
        {
            f'{name}: {own.branches!r}': torch.empty(0)
            for name, own in scales.items()
        }
    )
    return content_sum(values)[:16]
