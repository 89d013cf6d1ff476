# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What the study compares: blocks, their starts, and the questions."""

from __future__ import annotations

from typing import Dict, NamedTuple, Tuple

from mmdbb.blocks import DBB
from mmdbb.blocks.build import register_conv_layer, registered_blocks

PLAIN = 'plain'
#: A plain network that starts as the function that DBB's network starts as.
CONTROL = "plain, DBB's start"
#: A plain network that was trained, and is trained once more.
TRAINED_ON = 'plain, trained on'


class DBBWithIdentity(DBB):
    """DBB, and the identity where input and output have the same shape."""

    preset = (*DBB.preset, 'identity')


def register_blocks() -> None:
    """Make the study's own blocks known to configs. Idempotent."""
    name = DBBWithIdentity.__name__
    if name not in registered_blocks():
        register_conv_layer(name)(DBBWithIdentity)


class Variant(NamedTuple):
    """What stands in for a network's convolutions, and how it starts.

    Attributes:
        config: Config of the block.
        start: ``'own'``: kernels shared with plain, the rest as in the
            paper's code; ``'as DBB'``: the function that DBB's network starts
            as; ``'trained'``: the function of a trained plain network.
    """

    config: dict
    start: str = 'own'


def _dbb(*branches: str) -> Variant:
    return Variant(dict(type='DBB', branches=list(branches)))


#: Name in tables -> what it is.
BLOCKS: Dict[str, Variant] = {
    PLAIN: Variant(dict(type='Conv2d')),
    'ACB': Variant(dict(type='ACB')),
    'RepVGGConv': Variant(dict(type='RepVGGConv')),
    'DBB': Variant(dict(type='DBB')),
    'OREPA': Variant(dict(type='OREPA')),
    CONTROL: Variant(dict(type='Conv2d'), 'as DBB'),
    'DBB + identity': Variant(dict(type='DBBWithIdentity')),
    'QARepVGGConv': Variant(dict(type='QARepVGGConv')),
    'MobileOneConv': Variant(dict(type='MobileOneConv')),
    # The rows of the DBB paper's Table 4.
    'kxk, kxk': _dbb('kxk', 'kxk'),
    'kxk, 1x1': _dbb('kxk', '1x1'),
    'kxk, kxk, kxk': _dbb('kxk', 'kxk', 'kxk'),
    'kxk, 1x1, 1x1_avg': _dbb('kxk', '1x1', '1x1_avg'),
    TRAINED_ON: Variant(dict(type='Conv2d'), 'trained'),
    'DBB from plain': Variant(dict(type='DBB'), 'trained'),
    'OREPA from plain': Variant(dict(type='OREPA'), 'trained'),
}


class Part(NamedTuple):
    """A question of the study.

    Attributes:
        blocks: What is compared.
        baseline: What it is compared with.
    """

    blocks: Tuple[str, ...]
    baseline: str = PLAIN


PARTS: Dict[str, Part] = {
    'blocks': Part(
        (
            PLAIN,
            'ACB',
            'RepVGGConv',
            'DBB',
            'OREPA',
            CONTROL,
            'DBB + identity',
            'QARepVGGConv',
            'MobileOneConv',
        )
    ),
    'ablation': Part(
        (
            PLAIN,
            'kxk, kxk',
            'kxk, 1x1',
            'kxk, kxk, kxk',
            'kxk, 1x1, 1x1_avg',
            'DBB',
        )
    ),
    'int8': Part((PLAIN, 'RepVGGConv', 'QARepVGGConv', 'DBB', 'OREPA')),
    'pruning': Part((PLAIN, 'RepVGGConv', 'QARepVGGConv', 'DBB', 'OREPA')),
    'drop': Part(('DBB', 'DBB + identity'), 'DBB'),
    'transfer': Part(
        (PLAIN, TRAINED_ON, 'DBB from plain', 'OREPA from plain'), TRAINED_ON
    ),
}
