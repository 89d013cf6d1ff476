# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Blocks in place of each convolution and its norm, for any backbone.

In the papers' networks a DBB stands for convolution *and* norm, so the norm
that the host would build behind it gives way to ``nn.Identity``.
"""

from __future__ import annotations

from typing import Optional

from torch import nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.blocks.build import block_of
from mmdbb.conv_norms import conv_norm_pairs
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
        ValueError: If ``block`` is not a block of mmdbb, or is a class that
            is not registered.
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
        norm_cfg = norm_cfg or dict(type='BN', requires_grad=True)
        block_type, block = block_of(block, plain=True)
        if block['type'] is block_type and block_type is not nn.Conv2d:
            raise ValueError(
                f'{block_type.__name__} has no name in configs, which a '
                'backbone builds its blocks by: register_conv_layer gives it '
                'one'
            )
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
