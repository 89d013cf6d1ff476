# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""RepVGG of any block, and its plain form.

Ding et al., "RepVGG: Making VGG-style ConvNets Great Again", CVPR 2021, sec. 4
(https://arxiv.org/abs/2101.03697). Widths, depths and groups come from
mmpretrain's RepVGG, which has the paper's. mmpretrain's knows the paper's
block only, and loses its squeeze-and-excitation layers when it is merged.
"""

from __future__ import annotations

from typing import Optional, Tuple, Union

import torch.utils.checkpoint
from mmcv.cnn import (
    build_activation_layer,
    build_conv_layer,
    build_norm_layer,
)
from mmengine.model import BaseModule, Sequential
from mmpretrain.models import RepVGG
from mmpretrain.models.utils import SELayer
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.blocks.build import block_of
from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.config_types import type_of


class RepVGGUnit(BaseModule):
    """A 3x3 convolution, its norm, squeeze-and-excitation, activation.

    The convolution has the name of mmpretrain's merged one,
    ``branch_reparam``, so that a merged network has the entries of the stock
    network.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        stride: Stride of the convolution in pixels.
        dilation: Distance between neighbouring taps in pixels; the padding
            on each side is as large.
        groups: Number of groups of the convolution.
        se_cfg: Arguments of mmpretrain's ``SELayer``, None for no such layer.
        conv_cfg: Config of the convolution.
        norm_cfg: Config of the norm; None for a convolution with bias.
        act_cfg: Config of the activation.
        with_cp: Whether to save memory by computing the unit a second time
            in the backward pass.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        se_cfg: Optional[dict] = None,
        conv_cfg: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        act_cfg: Optional[dict] = None,
        with_cp: bool = False,
    ) -> None:
        super().__init__()
        self.branch_reparam = build_conv_layer(
            conv_cfg,
            in_channels,
            out_channels,
            3,
            stride=stride,
            padding=dilation,
            dilation=dilation,
            groups=groups,
            bias=norm_cfg is None,
        )
        self.norm = nn.Identity()
        if norm_cfg is not None:
            self.norm = build_norm_layer(norm_cfg, out_channels)[1]
        self.se_layer = nn.Identity()
        if se_cfg is not None:
            self.se_layer = SELayer(out_channels, **se_cfg)
        self.act = build_activation_layer(act_cfg or dict(type='ReLU'))
        self.with_cp = with_cp

    @property
    def conv_norm_names(self) -> Tuple[Tuple[str, str], ...]:
        """The convolution and its norm, for ``conv_norm_pairs``.

        Empty if a block absorbed the norm. It does not come back then: the
        merged convolution has a bias, as in the stock network.
        """
        if isinstance(self.norm, nn.Identity):
            return ()
        return (('branch_reparam', 'norm'),)

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, in_channels, H, W) to (N, out_channels, H', W')."""
        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(
                self._forward, x, use_reentrant=False
            )
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        return self.act(self.se_layer(self.norm(self.branch_reparam(x))))


@MODELS.register_module()
class PlainRepVGG(RepVGG):
    """RepVGG of plain convolutions and norms, which mmpretrain does not have.

    Args:
        arch: Name (``'A0'`` to ``'D2se'``) or config of the architecture, a
            dict in the form of mmpretrain's ``RepVGG.arch_settings``.
        args: Other positional arguments of mmpretrain's RepVGG.
        deploy: Whether convolutions have a bias in place of a norm. Without
            squeeze-and-excitation this equals mmpretrain's merged RepVGG.
        kwargs: Keywords of mmpretrain's RepVGG.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: a tuple of tensors, one for each stage in ``out_indices``;
          the stem and each stage halve height and width

    Examples:
        >>> import torch
        >>> model = PlainRepVGG('A0', base_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 160, 2, 2])
    """

    def __init__(
        self,
        arch: Union[str, dict],
        *args,
        deploy: bool = False,
        **kwargs,
    ) -> None:
        super().__init__(arch, *args, deploy=deploy, **kwargs)
        stem = self.stem
        self.stem = self._unit(stem.in_channels, stem.out_channels, stride=2)

    def _unit(self, in_channels: int, out_channels: int, **kwargs):
        return RepVGGUnit(
            in_channels,
            out_channels,
            se_cfg=self.arch['se_cfg'],
            conv_cfg=self.conv_cfg,
            norm_cfg=None if self.deploy else self.norm_cfg,
            act_cfg=self.act_cfg,
            with_cp=self.with_cp,
            **kwargs,
        )

    def _make_stage(
        self,
        in_channels: int,
        out_channels: int,
        num_blocks: int,
        stride: int,
        dilation: int,
        next_create_block_idx: int,
        init_cfg: Union[dict, list, None],
    ) -> Tuple[Sequential, int]:
        # mmpretrain's constructor calls this for each stage; __init__
        # replaces the stem afterwards.
        units = []
        for i in range(num_blocks):
            index = next_create_block_idx + i
            units.append(
                self._unit(
                    out_channels if i else in_channels,
                    out_channels,
                    stride=1 if i else stride,
                    dilation=dilation,
                    groups=(self.arch['group_layer_map'] or {}).get(index, 1),
                )
            )
        return Sequential(*units), next_create_block_idx + num_blocks

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode as mmpretrain's RepVGG does, and return the module."""
        super().train(mode)
        return self

    def switch_to_deploy(self) -> None:
        """Do nothing: a plain network has nothing to merge."""


@MODELS.register_module()
class ReparamRepVGG(BlocksForConvNorm, PlainRepVGG):
    """RepVGG with blocks, see :class:`BlocksForConvNorm`.

    Squeeze-and-excitation follows the block, and stays when the block is
    merged. Blocks with norms of their own merge into mmpretrain's ``RepVGG``
    with ``deploy=True``, or into :class:`PlainRepVGG` with ``deploy=True`` if
    the network has squeeze-and-excitation. Other blocks (OREPA) keep the norm
    that follows and merge into :class:`PlainRepVGG`.

    Args:
        args: Positional arguments of :class:`PlainRepVGG`; the first is the
            architecture.
        kwargs: Keywords of :class:`PlainRepVGG`, and ``block``, ``norm_cfg``
            and ``deploy`` of :class:`BlocksForConvNorm`. ``block`` is
            ``dict(type='RepVGGConv')`` by default.

    Examples:
        >>> import torch
        >>> model = ReparamRepVGG('A0', base_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 160, 2, 2])
    """

    default_block = dict(type='RepVGGConv')
    norms_return = False

    @classmethod
    def plain_cfg(cls, cfg: dict) -> dict:
        """The config of the merged network; the class says which it is.

        Args:
            cfg: A config of this class, with its ``type``; unchanged.
        """
        plain = super().plain_cfg(cfg)  # of PlainRepVGG
        block, _ = block_of(cfg.get('block') or cls.default_block, plain=True)
        if not issubclass(block, BranchSumConv2d):
            return plain  # a norm follows each block
        plain['deploy'] = True
        arch = plain['arch']
        arch = RepVGG.arch_settings[arch] if isinstance(arch, str) else arch
        # mmpretrain's merged RepVGG leaves squeeze-and-excitation out.
        return plain if arch['se_cfg'] else dict(plain, type=type_of(RepVGG))
