# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The networks of UniRepLKNet's, RepLKNet's and MobileOne's repositories.

Their files (https://github.com/AILab-CVC/UniRepLKNet,
https://github.com/DingXiaoH/RepLKNet-pytorch and
https://github.com/apple/ml-mobileone), of training-time and of converted
networks. mmpretrain has the last two networks, with blocks of its own, and
:class:`mmdbb.mm.backbones.UniRepLKNet` is the first. Here the entries get
their names, and the shapes tell the architecture.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, List, NamedTuple, Optional, Pattern

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.errors import UserError
from mmdbb.official.names import DILATED, settle_entries_, translate
from mmdbb.stock_weights import norm_that_adds

State = Dict[str, Tensor]


class NewerNetwork(NamedTuple):
    """The network in a file of one of these repositories.

    Attributes:
        name: Name of the family and, if it has one, of the architecture.
        entries: Our names -> tensors, without the classifier.
        head: ``weight`` and ``bias`` of the classifier; empty without one.
        backbone: Config of the backbone that the weights fit.
        block: Name of the block that the network has; None if the file is
            converted.
        interpolation: How the paper's code resizes images for a test.
    """

    name: str
    entries: State
    head: State
    backbone: dict
    block: Optional[str]
    interpolation: str

    @property
    def merged(self) -> bool:
        """Whether the network is converted for inference."""
        return self.block is None

    @property
    def needs_mmdbb(self) -> bool:
        """Whether the backbone is one of mmdbb's own."""
        return self.backbone['type'].endswith('UniRepLKNet')

    @property
    def has_blocks(self) -> bool:
        """Whether the backbone has blocks of mmdbb."""
        return self.needs_mmdbb and not self.merged

    def __str__(self) -> str:
        """A description in one line, for messages."""
        structure = 'converted' if self.merged else 'training-time'
        return f'{self.name}, {self.block or "no blocks"}, {structure}'

    def state_for(self, backbone: nn.Module) -> State:
        """The weights under the names of a backbone.

        A convolution whose norm was folded into it gives its bias back to
        that norm. Norms of outputs that the file does not have keep their
        start, as in the papers' code when it trains detectors.

        Args:
            backbone: The backbone that they are for; unchanged.
        """
        state, own = dict(self.entries), backbone.state_dict()
        if not getattr(backbone, 'gap_before_final_norm', True):
            # The classifier's last norm reads averages, not maps.
            state = {n: v for n, v in state.items() if n[:5] != _LAST_NORM}
        for name, norm in backbone.named_modules():
            bias = _folded(name)
            if (
                isinstance(norm, _BatchNorm)
                and bias in state
                and f'{name}.weight' not in state
            ):
                state.update(norm_that_adds(state.pop(bias), norm, name))
        for name, value in own.items():
            if name not in state and _starts_fresh(name):
                state[name] = value
            elif name not in state and self.merged and _is_neutral(name):
                ones = name.endswith('.gamma')
                state[name] = torch.full_like(value, float(ones))
        return state


#: Start of the names of UniRepLKNet's last norm, as of ``norm3`` in ours.
_LAST_NORM = 'norm3'


def _folded(norm: str) -> str:
    """Name of the bias into which the papers' code folds a norm.

    RepLKNet's ``conv`` stands beside a ``bn``. UniRepLKNet's depthwise
    convolution stands beside a ``norm``, its last linear layer two before it.
    """
    place, _, name = norm.rpartition('.')
    ours = dict(bn='conv', norm='dwconv') | {'2': '0'}
    return f'{place}.{ours.get(name, name)}.bias'


def _starts_fresh(name: str) -> bool:
    """Whether an entry is of a norm behind an output, which may be new."""
    return bool(re.match(r'norm\d\.|stages\.\d\.norm\.', name))


def _is_neutral(name: str) -> bool:
    """Whether UniRepLKNet's code folds an entry into a linear layer.

    With a one, or a zero, in its place it changes nothing.
    """
    return bool(re.fullmatch(r'stages\.\d\.\d+\.(gamma|act\.1\.beta)', name))


class Family(NamedTuple):
    """How the networks of one repository are known and read.

    Attributes:
        name: Name of the family.
        sign: Matches the name of an entry that only this family has.
        read: Takes the entries of a file and its path, and returns the
            network. Raises KeyError with the name of an entry that is
            missing.
    """

    name: str
    sign: Pattern
    read: Callable[[State, str], NewerNetwork]


def newer_network(state: State, path: str) -> Optional[NewerNetwork]:
    """Recognise a network of these repositories by names and shapes.

    Args:
        state: Names of the file -> tensors.
        path: Path of the file, for messages.

    Returns:
        NewerNetwork: The network; None if it is none of these.

    Raises:
        UserError: If it is one, but lacks a layer, or only some of its blocks
            are merged.
    """
    for family in FAMILIES:
        if any(family.sign.match(name) for name in state):
            try:
                return family.read(dict(state), path)
            except KeyError as error:
                raise UserError(
                    f'{path} lacks {error.args[0]} of its {family.name}'
                ) from error
            except (IndexError, ZeroDivisionError) as error:
                raise UserError(
                    f'{path} looks like a {family.name} of the papers, but '
                    'has kernels of other shapes'
                ) from error
    return None


def _head_of_(state: State, name: str) -> State:
    """Take the classifier out of a file's entries, in place."""
    entries = ('weight', 'bias')
    found = {entry: state.pop(f'{name}.{entry}', None) for entry in entries}
    return {entry: v for entry, v in found.items() if v is not None}


def _are_merged(blocks: List[bool], path: str) -> bool:
    """Whether a file is converted; each block says whether it is."""
    if len(set(blocks)) > 1:
        raise UserError(
            f'{path} is neither a training-time nor a converted file: '
            f'{sum(blocks)} of its {len(blocks)} blocks are merged'
        )
    return all(blocks)


def _counted(state: State, pattern: str, stages: range) -> List[int]:
    """How many layers each stage has, by a pattern of stage and number.

    Raises:
        KeyError: With the name of a stage or layer that is missing.
    """
    matches = filter(None, (re.match(pattern, name) for name in state))
    found = {(int(match[1]), int(match[2])) for match in matches}
    counts = []
    for stage in stages:
        count = sum(first == stage for first, _ in found)
        for number in range(max(count, 1)):
            if (stage, number) not in found:
                raise KeyError(f'layer {number} of stage {stage}')
        counts.append(count)
    return counts


def _name_of(arch: dict, known: Dict[str, dict]) -> Optional[str]:
    """Name of an architecture; None if it has none."""
    return next((name for name, other in known.items() if other == arch), None)


def _titled(family: str, arch: Optional[str]) -> str:
    return f'{family}-{arch.upper()}' if arch else family


# ------------------------------------------------------------- UniRepLKNet


def _unireplknet(state: State, path: str) -> NewerNetwork:
    from mmdbb.mm.backbones import UniRepLKNet

    head = _head_of_(state, 'head')
    depths = _counted(state, r'stages\.(\d)\.(\d+)\.', range(4))
    sizes, merged = [], []
    for stage, depth in enumerate(depths):
        sizes.append([])
        for unit in (f'stages.{stage}.{i}.' for i in range(depth)):
            settle_entries_(state, f'{unit}dwconv.')
            large = f'{unit}dwconv.{DILATED.kernel}'
            others = (f'{unit}dwconv.{DILATED.merged}weight', large)
            plain = f'{unit}dwconv.weight'
            kernel = next((n for n in others if n in state), plain)
            sizes[-1].append(state[kernel].shape[-1])
            merged.append(f'{unit}norm.weight' not in state)
    is_merged = _are_merged(merged, path)
    stem = ['downsample_layers.0.3', *_DOWNSAMPLING]
    arch = dict(
        channels=tuple(state[f'{layer}.weight'].shape[0] for layer in stem),
        kernel_sizes=tuple(map(tuple, sizes)),
    )
    name = _name_of(arch, UniRepLKNet.arch_settings)
    kind = 'PlainUniRepLKNet' if is_merged else 'UniRepLKNet'
    backbone = dict(type=f'mmpretrain.{kind}', arch=name or arch)
    if not is_merged and 'stages.0.0.gamma' not in state:
        backbone['layer_scale_init_value'] = 0
    return NewerNetwork(
        _titled('UniRepLKNet', name),
        {_unireplknet_name(name): value for name, value in state.items()},
        head,
        backbone,
        None if is_merged else DILATED.block,
        'bicubic',
    )


_DOWNSAMPLING = tuple(f'downsample_layers.{i}.0' for i in range(1, 4))


def _unireplknet_name(name: str) -> str:
    if name.startswith('norm.'):
        return f'{_LAST_NORM}.{name[len("norm.") :]}'
    unit, dot, inside = name.partition('.dwconv.')
    starts = (*DILATED.inside, (DILATED.merged, ''))
    ours = translate(inside, starts) if dot else None
    return name if ours is None else f'{unit}.dwconv.{ours}'


# ---------------------------------------------------------------- RepLKNet


def _replknet(state: State, path: str) -> NewerNetwork:
    from mmpretrain.models import RepLKNet

    head = _head_of_(state, 'head')
    stages = {int(n.split('.')[1]) for n in state if n.startswith('stages.')}
    stages = range(1 + max(stages))
    counts = _counted(state, r'stages\.(\d)\.blocks\.(\d+)\.', stages)
    kernels, merged, smaller = {}, [], set()
    for stage, count in enumerate(counts):
        for i in range(0, count, 2):  # between them are feed-forward layers
            block = f'stages.{stage}.blocks.{i}.large_kernel.'
            merged.append(f'{block}lkb_reparam.weight' in state)
            kind = 'lkb_reparam' if merged[-1] else 'lkb_origin.conv'
            kernels[stage] = state[f'{block}{kind}.weight'].shape
            small = state.get(f'{block}small_conv.conv.weight')
            smaller.add(None if small is None else small.shape[-1])
    is_merged = _are_merged(merged, path)
    first = [state[f'stages.{s}.blocks.0.pw1.conv.weight'] for s in stages]
    inside = state['stages.0.blocks.1.pw1.conv.weight'].shape[0]
    channels = [kernel.shape[1] for kernel in first]
    arch = dict(
        large_kernel_sizes=[kernels[stage][-1] for stage in stages],
        layers=[count // 2 for count in counts],
        channels=channels,
        small_kernel=smaller.pop(),
        dw_ratio=first[0].shape[0] / channels[0],
    )
    known = RepLKNet.arch_settings
    if is_merged:  # then the small kernels are gone
        arch['small_kernel'] = None
        known = {n: dict(a, small_kernel=None) for n, a in known.items()}
    name = _name_of(arch, known)
    backbone = dict(
        type='mmpretrain.RepLKNet',
        arch=name or arch,
        out_indices=(stages[-1],),
        small_kernel_merged=is_merged,
    )
    if inside != 4 * channels[0]:
        backbone['ffn_ratio'] = inside / channels[0]
    # mmpretrain has the classifier's norm among the last stage's.
    last = f'stages.{stages[-1]}.norm.'
    return NewerNetwork(
        _titled('RepLKNet', name),
        {re.sub(r'^norm\.', last, n): value for n, value in state.items()},
        head,
        backbone,
        None if is_merged else 'ReparamLargeKernelConv',
        'bicubic',
    )


# --------------------------------------------------------------- MobileOne

#: Names in a block of MobileOne's code -> in mmpretrain's.
_MOBILEONE = (
    (r'rbr_skip\.', 'branch_norm.'),
    (r'rbr_scale\.conv\.', 'branch_scale.conv.'),
    (r'rbr_scale\.bn\.', 'branch_scale.norm.'),
    (r'rbr_conv\.(\d+)\.conv\.', r'branch_conv_list.\1.conv.'),
    (r'rbr_conv\.(\d+)\.bn\.', r'branch_conv_list.\1.norm.'),
    (r'reparam_conv\.', 'branch_reparam.'),
    (r'se\.reduce\.', 'se.conv1.conv.'),
    (r'se\.expand\.', 'se.conv2.conv.'),
)
#: Channels of its stages at a width of one.
_WIDTHS = (64, 128, 256, 512)


def _mobileone(state: State, path: str) -> NewerNetwork:
    from mmpretrain.models import MobileOne

    head = _head_of_(state, 'linear')
    counts = _counted(state, r'stage(\d)\.(\d+)\.', range(1, 5))
    merged, arch = ['stage0.reparam_conv.weight' in state], {}
    for stage, (count, base) in enumerate(zip(counts, _WIDTHS), 1):
        blocks = [f'stage{stage}.{i}.' for i in range(count)]
        merged += [f'{block}reparam_conv.weight' in state for block in blocks]
        kind = 'reparam_conv' if merged[-1] else 'rbr_conv.0.conv'
        width = state[f'{blocks[-1]}{kind}.weight'].shape[0] / base
        pattern = rf'stage{stage}\.0\.rbr_conv\.(\d+)\.conv'
        branches = sum(bool(re.match(pattern, name)) for name in state)
        squeezed = sum(f'{b}se.reduce.weight' in state for b in blocks)
        for key, value in (
            ('num_blocks', count // 2),  # a depthwise and a pointwise each
            ('width_factor', width),
            ('num_conv_branches', branches),
            ('num_se_blocks', squeezed // 2),
        ):
            arch.setdefault(key, []).append(value)
    is_merged = _are_merged(merged, path)
    known = MobileOne.arch_zoo
    if is_merged:  # then the branches are gone
        ones = dict(num_conv_branches=[1] * 4)
        arch, known = arch | ones, {n: a | ones for n, a in known.items()}
    name = _name_of(arch, known)
    return NewerNetwork(
        _titled('MobileOne', name),
        {_mobileone_name(name): value for name, value in state.items()},
        head,
        dict(type='mmpretrain.MobileOne', arch=name or arch, deploy=is_merged),
        None if is_merged else 'MobileOneBlock',
        'bilinear',
    )


def _mobileone_name(name: str) -> str:
    block = re.match(r'stage\d\.(\d+\.)?', name)
    if not block:
        return name
    inside = name[block.end() :]
    for theirs, ours in _MOBILEONE:
        inside, count = re.subn(f'^{theirs}', ours, inside)
        if count:
            break
    return block[0] + inside


FAMILIES = (
    Family(
        'UniRepLKNet', re.compile(r'stages\.0\.0\.pwconv1\.1\.'), _unireplknet
    ),
    Family(
        'RepLKNet', re.compile(r'stages\.0\.blocks\.0\.large_k'), _replknet
    ),
    Family(
        'MobileOne',
        re.compile(r'stage[01]\.(0\.)?(rbr_conv|rbr_scale|reparam_conv)\.'),
        _mobileone,
    ),
)
