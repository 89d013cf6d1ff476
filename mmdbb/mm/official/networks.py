# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The networks of the papers' repositories, and the names of their layers.

Each network tells under which names our backbone has the layers.
"""

from __future__ import annotations

import re
from typing import Callable, Dict, NamedTuple, Optional, Pattern, Tuple

#: Names of layers -> shapes (out, in / groups, kH, kW).
Shapes = Dict[str, Tuple[int, ...]]


class Place(NamedTuple):
    """The names of a layer in our backbone.

    Attributes:
        conv: Name of the convolution, or of the block.
        norm: Name of the norm that follows it.
        block: Name of mmpretrain's own block, if mmpretrain has one (RepVGG).
    """

    conv: str
    norm: str = ''
    block: str = ''


class Network(NamedTuple):
    """A family of networks.

    Attributes:
        name: Name of the family.
        sign: Matches the name of an entry that only this family has.
        layer: Matches a layer's name and the dot after it.
        place: Takes a layer's name in the file, returns its names in our
            backbone.
        backbone: Takes the shapes of the kernels, the name of the block and
            whether it is merged; returns the config of our backbone. Raises
            KeyError with the name of a layer that is missing, ValueError if
            there is no such backbone.
        host_block: The block that mmpretrain itself has for this network.
        host_names: Starts of names in our block -> in mmpretrain's.
    """

    name: str
    sign: Pattern
    layer: Pattern
    place: Callable[[str], Place]
    backbone: Callable[[Shapes, Optional[str], bool], dict]
    host_block: Optional[str] = None
    host_names: Tuple[Tuple[str, str], ...] = ()


def _resnet_place(layer: str) -> Place:
    if layer == 'stage0.conv1':
        return Place('conv1', 'bn1')
    stage, index, name = layer.split('.')
    block = f'layer{stage[len("stage") :]}.{index}'
    if name == 'shortcut':
        return Place(f'{block}.downsample.0', f'{block}.downsample.1')
    return Place(f'{block}.{name}', f'{block}.bn{name[len("conv") :]}')


def _resnet_backbone(
    shapes: Shapes, block: Optional[str], merged: bool
) -> dict:
    from mmpretrain.models import ResNet

    deep = 'stage1.0.conv3' in shapes
    counts = _stage_counts(shapes, 'conv1')
    expansion = 4 if deep else 1
    last = shapes['stage1.0.conv3' if deep else 'stage1.0.conv2'][0]
    cfg = dict(
        depth=50 if deep else 18,
        stem_channels=shapes['stage0.conv1'][0],
        base_channels=last // expansion,
    )
    for depth, (_, settings) in ResNet.arch_settings.items():
        if settings == counts and deep == (depth >= 50):
            cfg['depth'] = depth
            break
    else:
        cfg['stage_blocks'] = counts
    inside = shapes['stage1.0.conv2'][1]
    groups = shapes['stage1.0.conv1'][0] // max(inside, 1)
    name = 'ResNet'
    if groups > 1:
        name = 'ResNeXt'
        cfg.update(groups=groups, width_per_group=inside)
    for channels in ('stem_channels', 'base_channels'):
        if cfg[channels] == 64:  # the default
            del cfg[channels]
    if block:
        name += 'DBB'
        if block != 'DBB':
            cfg['block'] = dict(type=block)
    elif 'stage_blocks' in cfg:
        name = f'Plain{name}'
    return dict(type=f'mmpretrain.{name}', **cfg)


def _mobilenet_place(layer: str) -> Place:
    if layer == 'conv1':
        return Place('conv1.conv', 'conv1.bn')
    _, index, name = layer.split('.')
    stage, place = _MOBILENET_PLACES[int(index)]
    inside = f'layer{stage}.{place}.{name}_conv'
    return Place(f'{inside}.conv', f'{inside}.bn')


# Stage and index in the stage of each of the 13 separable convolutions.
_MOBILENET_PLACES = [
    (stage, place)
    for stage, count in enumerate((1, 2, 2, 6, 2), 1)
    for place in range(count)
]


def _mobilenet_backbone(
    shapes: Shapes, block: Optional[str], merged: bool
) -> dict:
    firsts = [i for i, (_, place) in enumerate(_MOBILENET_PLACES) if not place]
    channels = (
        shapes['conv1'][0],
        *(shapes[f'stem.{i}.pointwise'][0] for i in firsts),
    )
    cfg = dict(type='mmpretrain.MobileNetV1')
    if channels != tuple(channels[0] * 2**i for i in range(6)):
        cfg['channels'] = channels
    elif channels[0] != 32:  # the default
        cfg['base_channels'] = channels[0]
    if block:
        cfg['type'] += 'DBB'
        if block != 'DBB':
            cfg['block'] = dict(type=block)
    return cfg


def _repvgg_place(layer: str) -> Place:
    stage, _, index = layer.partition('.')
    number = stage[len('stage') :]
    block = 'stem' if stage == 'stage0' else f'stage_{number}.{index}'
    return Place(f'{block}.branch_reparam', f'{block}.norm', block)


def _repvgg_backbone(
    shapes: Shapes, block: Optional[str], merged: bool
) -> dict:
    from mmpretrain.models import RepVGG

    counts = _stage_counts(shapes)
    stem = shapes['stage0'][0]
    inside, groups, widths = stem, {}, []
    for stage, count in enumerate(counts, 1):
        for index in range(count):
            out, each = shapes[f'stage{stage}.{index}'][:2]
            if inside != each:
                groups[sum(counts[: stage - 1]) + index + 1] = inside // each
            inside = out
        widths.append(inside / (64 * 2 ** (stage - 1)))
    if stem > 64 * widths[0]:
        raise ValueError(
            f'the stem has {stem} channels and the first stage '
            f'{64 * widths[0]:.0f}, but mmpretrain.RepVGG allows no stem '
            'wider than its first stage'
        )
    arch = dict(
        num_blocks=list(counts),
        width_factor=widths,
        group_layer_map=groups or None,
        se_cfg=None,
        stem_channels=stem,
    )
    for name, known in RepVGG.arch_settings.items():
        stem_channels = min(
            known.get('stem_channels', 64), int(64 * known['width_factor'][0])
        )
        if dict(known, stem_channels=stem_channels) == arch:
            arch = name
            break
    if merged or block == 'RepVGGConv':
        return dict(type='mmpretrain.RepVGG', arch=arch, deploy=merged)
    if block is None:
        return dict(type='mmpretrain.PlainRepVGG', arch=arch)
    return dict(
        type='mmpretrain.ReparamRepVGG', arch=arch, block=dict(type=block)
    )


def _stage_counts(shapes: Shapes, name: str = '') -> Tuple[int, ...]:
    """Count the blocks of each stage.

    Args:
        shapes: Names of layers -> shapes of their kernels.
        name: A layer that every block has; empty if blocks are layers.

    Raises:
        KeyError: If the numbers of the blocks have a gap; with the name of
            the missing layer.
    """
    counts = []
    for stage in range(1, 5):
        pattern = re.compile(rf'stage{stage}\.(\d+)')
        matches = map(pattern.match, shapes)
        indices = {int(match[1]) for match in matches if match}
        count = max(indices, default=0) + 1
        for index in range(count):
            layer = f'stage{stage}.{index}' + (name and f'.{name}')
            if layer not in shapes:
                raise KeyError(layer)
        counts.append(count)
    return tuple(counts)


NETWORKS = (
    Network(
        'ResNet',
        re.compile(r'stage1\.0\.conv1\.'),
        re.compile(
            r'(stage0\.conv1|stage[1-4]\.\d+\.(?:shortcut|conv[123]))\.'
        ),
        _resnet_place,
        _resnet_backbone,
    ),
    Network(
        'MobileNet-V1',
        re.compile(r'stem\.\d+\.(depthwise|pointwise)\.'),
        re.compile(r'(conv1|stem\.(?:\d|1[012])\.(?:depthwise|pointwise))\.'),
        _mobilenet_place,
        _mobilenet_backbone,
    ),
    Network(
        'RepVGG',
        re.compile(r'stage1\.0\.\w+\.'),
        re.compile(r'(stage0|stage[1-4]\.\d+)\.'),
        _repvgg_place,
        _repvgg_backbone,
        'RepVGGConv',
        (
            ('branches.identity.norm.', 'branch_norm.'),
            ('branches.kxk.', 'branch_3x3.'),
            ('branches.1x1.', 'branch_1x1.'),
        ),
    ),
)
