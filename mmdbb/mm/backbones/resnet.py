# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmpretrain's ResNets with a block for each convolution and its norm.

With DBB these are the networks of the DBB paper (CVPR 2021, sec. 4.1): every
3x3 convolution with its norm is a block; the stem and the 1x1 convolutions
stay plain. With OREPA they are the networks of the OREPA paper (CVPR 2022,
sec. 4.1): every convolution but the shortcuts of ResNet-18 and 34 is a block,
and all norms stay.
"""

from __future__ import annotations

from typing import Optional, Sequence

from mmpretrain.models import (
    ResNet,
    ResNetV1c,
    ResNetV1d,
    ResNeXt,
)
from mmpretrain.registry import MODELS
from torch import nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.conv_norms import conv_norm_pairs
from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.config_types import type_of


class ContractedDilation:
    """Mixin for mmpretrain's ResNets: dilate them as mmseg does.

    mmpretrain's ResNets dilate all residual blocks of a stage alike.

    Args:
        args: Positional arguments of the stock network, which also gets all
            other keywords.
        contract_dilation: Whether the first residual block of a stage has
            half of the stage's dilation, as in mmseg.
    """

    def __init__(
        self, *args, contract_dilation: bool = False, **kwargs
    ) -> None:
        self.contract_dilation = contract_dilation
        super().__init__(*args, **kwargs)

    def make_res_layer(self, **kwargs) -> nn.Sequential:
        """Build a stage; see mmpretrain's ``ResLayer`` for the arguments."""
        dilation, count = kwargs['dilation'], kwargs['num_blocks']
        if not self.contract_dilation or dilation == 1:
            return super().make_res_layer(**kwargs)
        rates = kwargs.pop('drop_path_rate')
        first = dict(
            num_blocks=1, dilation=dilation // 2, drop_path_rate=rates[:1]
        )
        stage = super().make_res_layer(**kwargs | first)
        if count > 1:
            others = dict(
                num_blocks=count - 1,
                in_channels=kwargs['out_channels'],
                stride=1,
                drop_path_rate=rates[1:],
            )
            stage.extend(super().make_res_layer(**kwargs | others))
        return stage


class StageBlocks:
    """Mixin for mmpretrain's ResNets: any number of residual blocks a stage.

    Args:
        depth: Depth of the stock network. With ``stage_blocks`` it chooses
            only the kind of residual blocks: those of two convolutions below
            50, those of three from 50 on.
        args: Other positional arguments of the stock network, which also
            gets all other keywords.
        stage_blocks: Number of residual blocks of each stage; by default the
            numbers of ``depth``.

    Raises:
        ValueError: If ``stage_blocks`` is not one number for each stage.
    """

    def __init__(
        self,
        depth: int,
        *args,
        stage_blocks: Optional[Sequence[int]] = None,
        **kwargs,
    ) -> None:
        if stage_blocks is not None:
            if len(stage_blocks) != kwargs.get('num_stages', 4) or any(
                not isinstance(n, int) or n < 1 for n in stage_blocks
            ):
                raise ValueError(
                    'stage_blocks must give each stage a number of residual '
                    f'blocks from 1 on, got {stage_blocks}'
                )
            block = self.arch_settings[depth][0]
            self.arch_settings = {depth: (block, tuple(stage_blocks))}
        super().__init__(depth, *args, **kwargs)


@MODELS.register_module()
class PlainResNet(StageBlocks, ContractedDilation, ResNet):
    """ResNet of any ``stage_blocks``, which mmpretrain does not have."""


@MODELS.register_module()
class PlainResNeXt(StageBlocks, ContractedDilation, ResNeXt):
    """ResNeXt of any ``stage_blocks``, which mmpretrain does not have."""


class ResNetBlocks(BlocksForConvNorm):
    """Mixin for mmpretrain's ResNets, see :class:`BlocksForConvNorm`.

    They merge into mmpretrain's ResNets; with ``stage_blocks`` into
    :attr:`any_stage_blocks`, with ``contract_dilation`` into mmseg's ResNets.

    Args:
        depth: Depth of the stock network, such as 18 or 50.
        zero_init_residual: Whether each residual block starts as the
            identity. False by default, as in the paper's code.
        block: Config of the block, :attr:`default_block` by default.
        kwargs: Keywords of the stock network, and ``norm_cfg`` and ``deploy``
            of :class:`BlocksForConvNorm`.

    Raises:
        ValueError: If the stock network does not come in that depth.
    """

    #: Plain network that takes ``stage_blocks``; None if the class does not.
    any_stage_blocks: Optional[type] = None

    def __init__(
        self,
        depth: int,
        zero_init_residual: bool = False,
        block: Optional[dict] = None,
        **kwargs,
    ) -> None:
        if depth not in self.arch_settings:
            raise ValueError(
                f'depth must be one of {list(self.arch_settings)}, got '
                f'{depth!r}'
            )
        block = self.default_block if block is None else block
        if depth < 50 and isinstance(block, dict):
            # Their only 1x1 convolutions are shortcuts, and both papers leave
            # these plain.
            block = dict(min_kernel_size=2) | block
        super().__init__(
            depth=depth,
            zero_init_residual=zero_init_residual,
            block=block,
            **kwargs,
        )

    @classmethod
    def plain_cfg(cls, cfg: dict) -> dict:
        """The config of the merged network; the class says which it is.

        Args:
            cfg: A config of this class, with its ``type``; unchanged.
        """
        plain = super().plain_cfg(cfg)
        if plain.get('stage_blocks') is not None and cls.any_stage_blocks:
            return dict(plain, type=type_of(cls.any_stage_blocks))
        plain.pop('stage_blocks', None)
        if not plain.get('contract_dilation'):
            plain.pop('contract_dilation', None)
            return plain
        # mmpretrain's ResNets have no contract_dilation, mmseg's do. Those
        # have another name for the width, other defaults, and no drop path,
        # which matters in training only.
        plain['type'] = f'mmseg.{plain["type"].rpartition(".")[2]}'
        plain.setdefault('out_indices', (3,))
        plain.pop('drop_path_rate', None)
        if issubclass(cls, ResNeXt):
            plain.setdefault('groups', 32)
            plain['base_width'] = plain.pop('width_per_group', 4)
        return plain

    def init_weights(self) -> None:
        """Initialise as the stock network does.

        With ``zero_init_residual`` the gammas of the block that ends a
        residual block become zero, unless the weights are pretrained.
        """
        super().init_weights()
        pretrained = (
            isinstance(self.init_cfg, dict)
            and self.init_cfg['type'] == 'Pretrained'
        )
        if not self.zero_init_residual or pretrained:
            return
        for parent, conv, _ in conv_norm_pairs(self):
            last = getattr(parent, conv)
            ends_residual = conv == 'conv2' and not hasattr(parent, 'conv3')
            has_gammas = isinstance(last, BranchSumConv2d) and not last.deploy
            if has_gammas and ends_residual:
                last.init_gamma(0.0)


@MODELS.register_module()
class ResNetDBB(ResNetBlocks, StageBlocks, ContractedDilation, ResNet):
    """ResNet with blocks.

    See :class:`ResNetBlocks`, :class:`StageBlocks` and
    :class:`ContractedDilation`.

    Examples:
        >>> import torch
        >>> model = ResNetDBB(18, base_channels=8, stem_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 64, 2, 2])
    """

    any_stage_blocks = PlainResNet


@MODELS.register_module()
class ResNetV1cDBB(ResNetBlocks, ContractedDilation, ResNetV1c):
    """ResNetV1c (deep stem) with blocks, see :class:`ResNetDBB`."""


@MODELS.register_module()
class ResNetV1dDBB(ResNetBlocks, ResNetV1d):
    """ResNetV1d (deep stem, pooled shortcuts) with blocks.

    See :class:`ResNetBlocks`.
    """


@MODELS.register_module()
class ResNeXtDBB(ResNetBlocks, StageBlocks, ContractedDilation, ResNeXt):
    """ResNeXt with blocks, see :class:`ResNetDBB`."""

    any_stage_blocks = PlainResNeXt
