# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Blocks in place of each convolution and its norm, for any backbone.

In the papers' networks a DBB takes the place of convolution *and* norm. The
backbones of OpenMMLab's packages build a norm after each convolution; here
``AbsorbedNorm`` replaces those that follow a DBB.
"""

from __future__ import annotations

from typing import Optional

from torch import nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.blocks.build import block_of
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.conv_norms import conv_norm_pairs
from mmdbb.errors import UserError
from mmdbb.mm.config_types import type_of
from mmdbb.reparam import find_blocks, reparameterize


class BlocksForConvNorm:
    """Mixin for backbones with ``conv_cfg`` and ``norm_cfg``.

    List it before the backbone's class among the bases. It passes the
    backbone's own arguments on, and :meth:`plain_cfg` gives the config of the
    merged network. ``docs/add_a_backbone.md`` shows how to write such a class.

    Args:
        args: Positional arguments of the stock backbone, which also gets all
            keywords that are not listed here.
        block: Config of the block, :attr:`default_block` by default. If its
            branches have norms of their own, ``AbsorbedNorm`` replaces the
            norm that follows the block; otherwise (OREPA) that norm stays.
            ``dict(type='Conv2d')`` builds the stock network.
        norm_cfg: Config of all norms, those inside blocks too unless
            ``block`` has its own.
        deploy: Whether to build the merged network, to load merged weights.

    Raises:
        TypeError: If ``conv_cfg`` is given (``block`` takes its place), or
            ``block`` is not a dict.
        ValueError: If ``block`` is not a block of mmdbb, or is a class that
            is not registered.
    """

    #: Config of the block to build if ``block`` is not given.
    default_block = dict(type='DBB')

    #: Whether the plain network has the norms that its blocks absorb. If not,
    #: its convolutions have a bias instead.
    norms_return = True

    #: Whether the blocks do what the norms behind them did. If not, those
    #: norms stay, whatever norms the blocks have.
    absorbs_norms = True

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
                f'{block_type.__name__} has no name in configs, and a '
                'backbone builds its blocks by name: register it with '
                'register_conv_layer'
            )
        if block_type is nn.Conv2d:
            block = None
        elif issubclass(block_type, BranchSumConv2d):
            block.setdefault('norm_cfg', norm_cfg)
        super().__init__(*args, conv_cfg=block, norm_cfg=norm_cfg, **kwargs)
        if self.absorbs_norms:
            self._absorb_norms()
        if deploy:
            self.switch_to_deploy()
        if hasattr(self, '_freeze_stages'):
            self._freeze_stages()

    @classmethod
    def plain_cfg(cls, cfg: dict) -> dict:
        """The config of this network once all of its blocks are merged.

        By default this drops ``block`` and ``deploy``, and names the first
        registered class that follows this mixin in the order of the bases.
        Override it if the merged network has another type or other arguments.

        Args:
            cfg: A config of this class, with its ``type``; unchanged.

        Returns:
            dict: A copy for the plain network. Its type names the scope
            (``mmpretrain.ResNet``), so configs of every package find it.

        Raises:
            UserError: If no class that follows the mixin is registered.

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
                'classes after BlocksForConvNorm is registered; give '
                f'{cls.__name__} a classmethod plain_cfg(cfg) that returns '
                'the config of the plain network, see docs/add_a_backbone.md'
            )
        kept = {k: v for k, v in cfg.items() if k not in ('block', 'deploy')}
        return dict(kept, type=plain)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode as the stock network does, and return the module.

        OpenMMLab's backbones return None, unlike ``nn.Module.train``.
        """
        super().train(mode)
        return self

    def switch_to_deploy(self) -> None:
        """Replace all blocks by plain convolutions. Idempotent."""
        if find_blocks(self):
            reparameterize(self, inplace=True)

    def _absorb_norms(self) -> None:
        """Remove the norms that follow blocks with norms of their own."""
        for parent, conv, norm in list(conv_norm_pairs(self)):
            block = getattr(parent, conv)
            if isinstance(block, BranchSumConv2d):
                place = AbsorbedNorm(
                    block, getattr(parent, norm), self.norms_return
                )
                setattr(parent, norm, place)
