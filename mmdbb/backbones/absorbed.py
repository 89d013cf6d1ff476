# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Blocks in place of each convolution and its norm, for any backbone.

In the papers' networks a DBB stands for convolution *and* norm, so the norm
that the host would build behind it gives way to ``nn.Identity``.
"""

from __future__ import annotations

from typing import Dict, Optional

from mmengine.registry import MODELS as ROOT
from torch import nn

from mmdbb.blocks import BranchSumConv2d, ReparamConv2d
from mmdbb.host_norms import conv_norm_pairs
from mmdbb.reparam import find_blocks, reparameterize


class BlocksForConvNorm:
    """Mixin for backbones with ``conv_cfg`` and ``norm_cfg``.

    Args:
        args: As of the stock network, keywords too.
        block: Config of the block, ``dict(type='DBB')`` by default. Where it
            sums branches that have norms, ``nn.Identity`` stands in place of
            the norm behind it; else (OREPA) the host's norm stays. With
            ``dict(type='Conv2d')`` this is the stock network.
        norm_cfg: Config of all norms, those inside blocks too unless
            ``block`` has its own.
        deploy: Whether to build the merged network, to load merged weights.

    Raises:
        TypeError: If ``conv_cfg`` is given, whose place ``block`` takes, or
            ``block`` is not a dict.
        ValueError: If ``block`` is not a block of mmdbb.
    """

    def __init__(
        self,
        *args,
        block: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        deploy: bool = False,
        **kwargs,
    ) -> None:
        if kwargs.pop('conv_cfg', None) is not None:
            raise TypeError(
                f"{type(self).__name__} takes block=dict(type='DBB'), not "
                'conv_cfg; for conv_cfg use the stock backbone'
            )
        if block is not None and not isinstance(block, dict):
            raise TypeError(
                "block must be a config such as dict(type='DBB'), got "
                f'{block!r}'
            )
        block = dict(block or dict(type='DBB'))
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)
        block_type = _block_type(block)
        # By name it is built where the kernel's size asks for one only.
        block['type'] = _layer_names().get(block_type, block['type'])
        if block_type is nn.Conv2d:
            block = None
        elif issubclass(block_type, BranchSumConv2d):
            block.setdefault('norm_cfg', norm_cfg)
        super().__init__(*args, conv_cfg=block, norm_cfg=norm_cfg, **kwargs)
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

    def switch_to_deploy(self) -> None:
        """Replace all blocks by plain convolutions. Idempotent."""
        if find_blocks(self):
            reparameterize(self, inplace=True)


def _block_type(block: dict) -> type:
    name = block.get('type')
    layer = name if isinstance(name, type) else ROOT.get(str(name))
    block_type = getattr(layer, 'block', layer)
    is_block = isinstance(block_type, type) and issubclass(
        block_type, (ReparamConv2d, nn.Conv2d)
    )
    if not is_block:
        raise ValueError(
            f'block must name a block, got type={name!r}; allowed: '
            f"{sorted(_layer_names().values())}, and 'Conv2d' for none"
        )
    return block_type


def _layer_names() -> Dict[type, str]:
    """Classes of blocks -> the names that configs know them by."""
    return {
        layer.block: name
        for name, layer in ROOT.module_dict.items()
        if hasattr(layer, 'block')
    }
