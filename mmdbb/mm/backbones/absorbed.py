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
from mmdbb.errors import UserError
from mmdbb.mm.config_types import type_of
from mmdbb.reparam import find_blocks, reparameterize


class BlocksForConvNorm:
    """Mixin for backbones with ``conv_cfg`` and ``norm_cfg``.

    It stands before the backbone's class, whose arguments it takes, and says
    what the network is once it is merged. ``docs/add_a_backbone.md`` shows
    how to write one.

    Args:
        args: As of the stock network, keywords too.
        block: Config of the block, :attr:`default_block` by default. Where it
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

    #: Config of the block that is built where ``block`` is not given.
    default_block = dict(type='DBB')

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
        block = self.default_block if block in (None, {}) else block
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
        self._absorb_norms()
        if deploy:
            self.switch_to_deploy()
        if hasattr(self, '_freeze_stages'):
            self._freeze_stages()

    @classmethod
    def plain_cfg(cls, cfg: dict) -> dict:
        """The config of this network once all of its blocks are merged.

        By default that is the same config without ``block`` and ``deploy``,
        for the class that stands behind this mixin: the first one there that
        is registered. Override it where the merged network is another one.

        Args:
            cfg: A config of this class, with its ``type``; unchanged.

        Returns:
            dict: A copy for a plain network. Its type has a scope, so that it
            is found from any.

        Raises:
            UserError: If no class behind the mixin is registered.

        Examples:
            >>> from mmdbb.mm.backbones import ResNetDBB
            >>> ResNetDBB.plain_cfg(dict(
            ...     type='ResNetDBB', depth=18, block=dict(type='ACB')))
            {'type': 'mmpretrain.ResNet', 'depth': 18}
        """
        behind = cls.__mro__[cls.__mro__.index(BlocksForConvNorm) + 1 :]
        types = (type_of(kind) for kind in behind)
        plain = next((name for name in types if name), None)
        if plain is None:
            raise UserError(
                f'cannot tell what {cls.__name__} is once merged: none of the '
                'classes behind BlocksForConvNorm is registered; give '
                f'{cls.__name__} a classmethod plain_cfg(cfg) that returns '
                'the config of the plain network, see docs/add_a_backbone.md'
            )
        kept = {k: v for k, v in cfg.items() if k not in ('block', 'deploy')}
        return dict(kept, type=plain)

    def train(self, mode: bool = True) -> nn.Module:
        """As the stock network, but returns the module as torch's does."""
        super().train(mode)
        return self

    def switch_to_deploy(self) -> None:
        """Replace all blocks by plain convolutions. Idempotent."""
        if find_blocks(self):
            reparameterize(self, inplace=True)

    def _absorb_norms(self) -> None:
        """Let each block that has norms take the place of the one behind."""
        pairs = list(conv_norm_pairs(self))
        for parent, conv, norm in pairs:
            if not isinstance(getattr(parent, conv), BranchSumConv2d):
                continue
            setattr(parent, norm, nn.Identity())
            if isinstance(parent, nn.Sequential):
                # There a norm is known by its class, which is gone now, but
                # where it stood is asked again when the network is merged.
                parent.conv_norm_names = tuple(
                    (c, n) for p, c, n in pairs if p is parent
                )
