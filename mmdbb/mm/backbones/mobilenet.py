# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""MobileNet-V1, which mmpretrain does not have, plain and with blocks.

Howard et al., "MobileNets: Efficient Convolutional Neural Networks for Mobile
Vision Applications", 2017 (https://arxiv.org/abs/1704.04861), tab. 1.

With DBB it is the network of the DBB paper (CVPR 2021, sec. 4.1) and of its
code: the stem and every depthwise 3x3 convolution with its norm are blocks.
Blocks of depthwise convolutions have twice as many channels inside. Pointwise
convolutions stay plain.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, Union

from mmcv.cnn import ConvModule, DepthwiseSeparableConvModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.backbones.base import StagedBackbone, check_stages


@MODELS.register_module()
class MobileNetV1(StagedBackbone):
    """MobileNet-V1: a stem and five stages of separable convolutions.

    Args:
        base_channels: Channels of the stem; stages 1 to 5 have 2, 4, 8, 16
            and 32 times as many.
        channels: Channels of the stem and of each stage, six numbers, in
            place of ``base_channels``.
        in_channels: Channels of the images.
        out_indices: Which outputs to return: 0 is the stem's, at half the
            image's height and width; 1 to 5 are the stages', of which all
            but the first halve height and width once more.
        frozen_stages: Last part that is not trained: -1 freezes nothing, 0
            the stem, and i from 1 to 5 the stem and the first i stages.
        conv_cfg: Config of the convolutions, plain by default.
        norm_cfg: Config of the norms, ``dict(type='BN')`` by default.
        act_cfg: Config of the activations, ``dict(type='ReLU')`` by default.
        norm_eval: Whether norms stay in eval mode while training.
        init_cfg: mmengine's initialisation rules.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: a tuple of tensors (N, channels[i], H', W'), one for each i
          in ``out_indices``

    Raises:
        TypeError: If ``channels`` or ``out_indices`` is no list of ints.
        ValueError: If ``channels``, ``out_indices`` or ``frozen_stages`` is
            out of range; the message says what is allowed.

    Examples:
        >>> import torch
        >>> model = MobileNetV1(base_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 256, 2, 2])
    """

    #: Stages 1 to 5: number of separable convolutions, stride of the first.
    arch_settings = ((1, 1), (2, 2), (2, 2), (6, 2), (2, 2))

    def __init__(
        self,
        base_channels: int = 32,
        channels: Optional[Sequence[int]] = None,
        in_channels: int = 3,
        out_indices: Sequence[int] = (5,),
        frozen_stages: int = -1,
        conv_cfg: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        act_cfg: Optional[dict] = None,
        norm_eval: bool = False,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        if channels is None:
            channels = [base_channels * 2**i for i in range(6)]
        check_stages(
            6,
            channels,
            out_indices,
            frozen_stages,
            'six positive numbers, of the stem and of five stages',
        )
        super().__init__(out_indices, frozen_stages, norm_eval, init_cfg)
        self.channels = tuple(channels)
        layer_args = dict(
            padding=1,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg or dict(type='BN'),
            act_cfg=act_cfg or dict(type='ReLU'),
        )
        inside = self.channels[0]
        self.conv1 = ConvModule(in_channels, inside, 3, stride=2, **layer_args)
        for i, (count, stride) in enumerate(self.arch_settings, 1):
            layers = []
            for j in range(count):
                layers.append(
                    DepthwiseSeparableConvModule(
                        inside,
                        self.channels[i],
                        3,
                        stride=1 if j else stride,
                        **layer_args,
                    )
                )
                inside = self.channels[i]
            self.add_module(f'layer{i}', nn.Sequential(*layers))
        self._freeze_stages()

    @property
    def stages(self) -> Tuple[nn.Module, ...]:
        """The stem and the five stages."""
        return (
            self.conv1,
            *(getattr(self, f'layer{i}') for i in range(1, 6)),
        )

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.out_indices:
                outputs.append(x)
        return tuple(outputs)


@MODELS.register_module()
class MobileNetV1DBB(BlocksForConvNorm, MobileNetV1):
    """MobileNet-V1 with blocks, see :class:`BlocksForConvNorm`.

    Merged, it is :class:`MobileNetV1`.

    Examples:
        >>> import torch
        >>> model = MobileNetV1DBB(base_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 256, 2, 2])
    """
