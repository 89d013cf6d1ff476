# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The names in the papers' code: one table, for classes and for files.

For the repositories of DBB (https://github.com/DingXiaoH/DiverseBranchBlock),
ACNet (https://github.com/DingXiaoH/ACNet), RepVGG
(https://github.com/DingXiaoH/RepVGG) and OREPA
(https://github.com/JUGGHM/OREPA_CVPR2022), in all of their revisions, and for
those of UniRepLKNet (https://github.com/AILab-CVC/UniRepLKNet), RepLKNet
(https://github.com/DingXiaoH/RepLKNet-pytorch) and MobileOne
(https://github.com/apple/ml-mobileone). The papers' classes
(:mod:`mmdbb.official.blocks`) load state dicts by it, and the layers in whole
files (:mod:`mmdbb.mm.official.recognise`) are known by it.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Tuple

from torch import Tensor

from mmdbb.blocks.dilated import SMALL_KERNELS

#: Starts of names -> starts of names.
Names = Tuple[Tuple[str, str], ...]


class BlockNames(NamedTuple):
    """How the papers' code calls what is in a block.

    Attributes:
        kernel: The entry that holds a kernel of the block's whole size while
            it is trained. A block in a file is known by it.
        merged: Start of the merged convolution's names.
        inside: Starts of their names -> starts of the names in our block;
            of two revisions the newer one first.
        block: Our block's name in configs; None for a block that no network
            of the papers has.
        norm: Whether a norm ``bn`` follows the block, which is not in it.
    """

    kernel: str
    merged: str
    inside: Names
    block: Optional[str] = None
    norm: bool = False

    def within(self, prefix: str) -> Names:
        """Starts of names for a module that holds our block.

        Args:
            prefix: What its entries of the block start with, ``'block.'``.

        Returns:
            tuple: Their starts -> its own, those of the merged block last.
        """
        inside = tuple((t, prefix + ours) for t, ours in self.inside)
        return (*inside, (self.merged, prefix))


def translate(name: str, starts: Names) -> Optional[str]:
    """A name with the first start that fits replaced; None if none fits.

    Args:
        name: Of an entry.
        starts: Starts of such names -> what takes their place.

    Examples:
        >>> translate('dbb_avg.avgbn.weight', DBB.inside)
        'branches.1x1_avg.norm2.weight'
    """
    for old, new in starts:
        if name.startswith(old):
            return new + name[len(old) :]
    return None


def settle_entries_(entries: Dict[str, Tensor], prefix: str = '') -> None:
    """Give a block's entries the form that the table describes, in place.

    Most entries of any revision are known by the start of their names.
    These need more:

    - RepVGG-OREPA's code makes six rows of scales where a block has an
      identity. It never reads the last row, which is left as memory happened
      to be.
    - RepVGG's code of February 2021 (commit 656c29b) stores the merged kernel
      beside the branches that it comes from.
    - UniRepLKNet's code keeps the merged kernel under the name that the large
      kernel had. It has a bias, which the large kernel has not.

    Args:
        entries: Their names -> tensors.
        prefix: Start of the block's names.
    """
    dense = f'{prefix}rbr_dense.'
    if f'{dense}vector' in entries:
        entries[f'{dense}vector'] = entries[f'{dense}vector'][:5]
    if f'{dense}conv.weight' in entries:
        for name in ('fused_weight', 'fused_bias'):
            entries.pop(prefix + name, None)
    if f'{prefix}lk_origin.bias' in entries:
        for name in ('weight', 'bias'):
            value = entries.pop(f'{prefix}lk_origin.{name}')
            entries[f'{prefix}{DILATED.merged}{name}'] = value


#: Entries of OREPA's KxK kernels; ``{}`` is ``orepa`` or ``rbr``.
_KXK = (
    ('weight_{}_origin', 'origin'),
    ('weight_{}_avg_conv', 'avg'),
    ('weight_{}_avg_avg', 'avg_pattern'),
    ('weight_{}_pfir_conv', 'prior'),
    ('weight_{}_prior', 'prior_pattern'),
    ('weight_{}_1x1_kxk_idconv1', 'inner1'),
    ('weight_{}_1x1_kxk_conv2', 'inner2'),
    ('weight_{}_1x1', 'pointwise'),
    ('weight_{}_gconv_dw', 'depthwise'),
    ('weight_{}_gconv_pw', 'separable'),
    ('id_tensor', 'identity'),
    ('vector', 'scale'),
)

#: Largest number of MobileOne's parallel convolutions whose names are known;
#: the paper has 4 at most, its ablations 5.
_BRANCHES = 16

#: Largest stack whose names are known: kernels of 31x31.
_LAYERS = 15


def _kxk(theirs: str, ours: str, kind: str = 'orepa') -> Names:
    return tuple((theirs + t.format(kind), ours + o) for t, o in _KXK)


DBB = BlockNames(
    'dbb_origin.conv.weight',
    'dbb_reparam.',
    (
        ('dbb_origin.conv.', 'branches.kxk.conv.'),
        ('dbb_origin.bn.', 'branches.kxk.norm.'),
        ('dbb_1x1.conv.', 'branches.1x1.conv.'),
        ('dbb_1x1.bn.', 'branches.1x1.norm.'),
        ('dbb_avg.conv.', 'branches.1x1_avg.conv1.'),
        ('dbb_avg.bn.bn.', 'branches.1x1_avg.norm1.'),
        # Before 2021-04-06 (commit 8a6909a) the padded norm was one itself.
        ('dbb_avg.bn.', 'branches.1x1_avg.norm1.'),
        ('dbb_avg.avgbn.', 'branches.1x1_avg.norm2.'),
        ('dbb_1x1_kxk.idconv1.', 'branches.1x1_kxk.conv1.'),
        ('dbb_1x1_kxk.conv1.', 'branches.1x1_kxk.conv1.'),
        ('dbb_1x1_kxk.bn1.bn.', 'branches.1x1_kxk.norm1.'),
        ('dbb_1x1_kxk.bn1.', 'branches.1x1_kxk.norm1.'),
        ('dbb_1x1_kxk.conv2.', 'branches.1x1_kxk.conv2.'),
        ('dbb_1x1_kxk.bn2.', 'branches.1x1_kxk.norm2.'),
    ),
    'DBB',
)
ACB = BlockNames(
    'square_conv.weight',
    'fused_conv.',
    (
        ('square_conv.', 'branches.kxk.conv.'),
        ('square_bn.', 'branches.kxk.norm.'),
        ('ver_conv.', 'branches.kx1.conv.'),
        ('ver_bn.', 'branches.kx1.norm.'),
        ('hor_conv.', 'branches.1xk.conv.'),
        ('hor_bn.', 'branches.1xk.norm.'),
        # ACNet's code before 2019-11-09 (commit 335ac25).
        ('square_layer.', 'branches.kxk.conv.'),
        ('square_BN.', 'branches.kxk.norm.'),
        ('vertical_layer.', 'branches.kx1.conv.'),
        ('vertical_BN.', 'branches.kx1.norm.'),
        ('horizontal_layer.', 'branches.1xk.conv.'),
        ('horizontal_BN.', 'branches.1xk.norm.'),
    ),
    'ACB',
)
REPVGG = BlockNames(
    'rbr_dense.conv.weight',
    'rbr_reparam.',
    (
        ('rbr_identity.', 'branches.identity.norm.'),
        ('rbr_dense.conv.', 'branches.kxk.conv.'),
        ('rbr_dense.bn.', 'branches.kxk.norm.'),
        ('rbr_1x1.conv.', 'branches.1x1.conv.'),
        ('rbr_1x1.bn.', 'branches.1x1.norm.'),
    ),
    'RepVGGConv',
)
REPVGG_OREPA = BlockNames(
    'rbr_dense.weight_rbr_origin',
    'rbr_reparam.',
    (
        ('rbr_identity.', 'branches.identity.norm.'),
        ('rbr_dense.bn.', 'branches.orepa.norm.'),
        *_kxk('rbr_dense.', 'branches.orepa.generator.', 'rbr'),
        ('rbr_1x1.conv.', 'branches.1x1.conv.'),
        ('rbr_1x1.bn.', 'branches.1x1.norm.'),
    ),
    'OREPARepVGG',
)
OREPA = BlockNames(
    'weight_orepa_origin',
    'orepa_reparam.',
    _kxk('', 'generator.'),
    'OREPA',
    norm=True,
)
OREPA_1X1 = BlockNames(
    'weight_or1x1_origin',
    'or1x1_reparam.',
    (
        ('weight_or1x1_origin', 'generator.origin'),
        ('weight_or1x1_l2i_conv1', 'generator.inner1'),
        ('weight_or1x1_l2i_conv2', 'generator.inner2'),
        ('vector', 'generator.scale'),
    ),
    'OREPA',
    norm=True,
)
#: A stack of composed kernels, of which the first is as wide as the whole.
OREPA_LARGE = BlockNames(
    'weight0.weight_orepa_origin',
    'or_large_reparam.',
    tuple(
        pair
        for i in range(_LAYERS)
        for pair in _kxk(f'weight{i}.', f'generator.layers.{i}.')
    ),
    'OREPA',
    norm=True,
)
#: A stack of plain kernels.
OREPA_LARGE_BASE = BlockNames(
    'weight0',
    'or_large_reparam.',
    tuple(
        # Of two starts that fit, weight1 and weight10, the longer one first.
        (f'weight{i}', f'generator.layers.{i}.weight')
        for i in reversed(range(_LAYERS))
    ),
    norm=True,
)

#: Sizes and dilations of UniRepLKNet's small kernels, in all of its blocks.
_DILATED = sorted({small for row in SMALL_KERNELS.values() for small in row})


def _dilated(size: int, dilation: int) -> Names:
    """Names of one small kernel of UniRepLKNet's block."""
    branch = f'branches.kxk_k{size}' + f'_d{dilation}' * (dilation > 1)
    return (
        (f'dil_conv_k{size}_{dilation}.', f'{branch}.conv.'),
        (f'dil_bn_k{size}_{dilation}.', f'{branch}.norm.'),
    )


DILATED = BlockNames(
    'lk_origin.weight',
    'lk_merged.',  # given by settle_entries_
    (
        ('lk_origin.', 'branches.kxk.conv.'),
        ('origin_bn.', 'branches.kxk.norm.'),
        *(pair for small in _DILATED for pair in _dilated(*small)),
    ),
    'DilatedReparamConv',
)
MOBILEONE = BlockNames(
    'rbr_conv.0.conv.weight',
    'reparam_conv.',
    (
        ('rbr_skip.', 'branches.identity.norm.'),
        ('rbr_scale.conv.', 'branches.1x1.conv.'),
        ('rbr_scale.bn.', 'branches.1x1.norm.'),
        *(
            (f'rbr_conv.{i}.{theirs}.', f'branches.{branch}.{ours}.')
            for i in range(_BRANCHES)
            for branch in [f'kxk_{i + 1}' if i else 'kxk']
            for theirs, ours in (('conv', 'conv'), ('bn', 'norm'))
        ),
    ),
    'MobileOneConv',
)


def large_kernel(small_kernel: Optional[int]) -> BlockNames:
    """Names in RepLKNet's block, where ours depend on the small kernel.

    Args:
        small_kernel: Its height and width; None if there is none.
    """
    branch = f'branches.kxk_k{small_kernel}'
    small = (
        ('small_conv.conv.', f'{branch}.conv.'),
        ('small_conv.bn.', f'{branch}.norm.'),
    )
    return BlockNames(
        'lkb_origin.conv.weight',
        'lkb_reparam.',
        (
            ('lkb_origin.conv.', 'branches.kxk.conv.'),
            ('lkb_origin.bn.', 'branches.kxk.norm.'),
            *(() if small_kernel is None else small),
        ),
        'LargeKernelConv',
    )


#: Those in the networks of DBB's and OREPA's repositories.
BLOCKS = (
    DBB,
    ACB,
    REPVGG,
    REPVGG_OREPA,
    OREPA,
    OREPA_1X1,
    OREPA_LARGE,
    OREPA_LARGE_BASE,
)
