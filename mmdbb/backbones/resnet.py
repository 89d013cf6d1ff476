# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmpretrain's ResNets with a block for each convolution and its norm.

With DBB these are the networks of the DBB paper (CVPR 2021, sec. 4.1): every
3x3 convolution with its norm is a block; the stem and the 1x1 convolutions
stay plain.
"""

from __future__ import annotations

from typing import Optional

from mmengine.registry import MODELS as ROOT
from torch import nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.host_norms import conv_norm_pairs
from mmdbb.hosts import require
from mmdbb.reparam import find_blocks, reparameterize

require('mmpretrain')

from mmpretrain.models import (  # noqa: E402
    ResNet,
    ResNetV1c,
    ResNetV1d,
    ResNeXt,
)
from mmpretrain.registry import MODELS  # noqa: E402


class BlocksForConvNorm:
    """Mixin for mmpretrain's ResNets: blocks in place of conv and norm.

    Args:
        args: As of the stock network, keywords too.
        block: Config of the block, ``dict(type='DBB')`` by default. Where it
            sums branches that have norms, ``nn.Identity`` stands in place of
            the norm behind it; else (OREPA) the host's norm stays.
        norm_cfg: Config of all norms, those inside blocks too unless
            ``block`` has its own.
        zero_init_residual: Whether each residual block starts as the
            identity. False by default, as in the paper's code.
        deploy: Whether to build the merged network, to load merged weights.

    Raises:
        TypeError: If ``conv_cfg`` is given; ``block`` takes its place.
        ValueError: If ``block`` is not a block of mmdbb.
    """

    def __init__(
        self,
        *args,
        block: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        zero_init_residual: bool = False,
        deploy: bool = False,
        **kwargs,
    ) -> None:
        if kwargs.pop('conv_cfg', None) is not None:
            raise TypeError(
                f"{type(self).__name__} takes block=dict(type='DBB'), not "
                'conv_cfg; for conv_cfg use the stock backbone'
            )
        block = dict(block or dict(type='DBB'))
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)
        if issubclass(_block_type(block), BranchSumConv2d):
            block.setdefault('norm_cfg', norm_cfg)
        super().__init__(
            *args,
            conv_cfg=block,
            norm_cfg=norm_cfg,
            zero_init_residual=zero_init_residual,
            **kwargs,
        )
        for parent, conv, norm in list(conv_norm_pairs(self)):
            if isinstance(getattr(parent, conv), BranchSumConv2d):
                setattr(parent, norm, nn.Identity())
        if deploy:
            self.switch_to_deploy()
        self._freeze_stages()

    def train(self, mode: bool = True) -> nn.Module:
        """As the stock network, but returns the module as torch's does."""
        super().train(mode)
        return self

    def init_weights(self) -> None:
        """As the stock network; see ``zero_init_residual``."""
        super().init_weights()
        pretrained = (
            isinstance(self.init_cfg, dict)
            and self.init_cfg['type'] == 'Pretrained'
        )
        if not self.zero_init_residual or pretrained:
            return
        for parent, conv, norm in conv_norm_pairs(self):
            last = getattr(parent, conv)
            ends_residual = conv == 'conv2' and not hasattr(parent, 'conv3')
            if isinstance(last, BranchSumConv2d) and ends_residual:
                last.init_gamma(0.0)

    def switch_to_deploy(self) -> None:
        """Replace all blocks by plain convolutions. Idempotent."""
        if find_blocks(self):
            reparameterize(self, inplace=True)


def _block_type(block: dict) -> type:
    name = block.get('type')
    layer = name if isinstance(name, type) else ROOT.get(str(name))
    block_type = getattr(layer, 'block', layer)
    if not isinstance(block_type, type) or not hasattr(
        block_type, 'switch_to_deploy'
    ):
        blocks = sorted(
            n for n, m in ROOT.module_dict.items() if hasattr(m, 'block')
        )
        raise ValueError(
            f'block must name a block, got type={name!r}; allowed: {blocks}'
        )
    return block_type


@MODELS.register_module()
class ResNetDBB(BlocksForConvNorm, ResNet):
    """ResNet with blocks, see :class:`BlocksForConvNorm`.

    Examples:
        >>> import torch
        >>> model = ResNetDBB(18, base_channels=8, stem_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 64, 2, 2])
    """


@MODELS.register_module()
class ResNetV1cDBB(BlocksForConvNorm, ResNetV1c):
    """ResNetV1c (deep stem) with blocks, see :class:`BlocksForConvNorm`."""


@MODELS.register_module()
class ResNetV1dDBB(BlocksForConvNorm, ResNetV1d):
    """ResNetV1d (deep stem, pooled shortcuts) with blocks."""


@MODELS.register_module()
class ResNeXtDBB(BlocksForConvNorm, ResNeXt):
    """ResNeXt with blocks, see :class:`BlocksForConvNorm`."""
