# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""AlexNet with batch norms, plain and with blocks.

Krizhevsky, "One weird trick for parallelizing convolutional neural networks",
2014 (https://arxiv.org/abs/1404.5997), with a norm after each convolution
and 384 channels in the fourth, as in the code of the DBB paper (CVPR 2021,
sec. 4.1; `alexnet.py`). mmpretrain's AlexNet has no norms.

With DBB the 5x5 and 3x3 convolutions are blocks; the stem with its kernel of
11x11 taps stays plain.
"""

from __future__ import annotations

from typing import Optional, Sequence, Tuple, Union

from mmcv.cnn import ConvModule
from mmpretrain.registry import MODELS
from torch import Tensor, nn

from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.backbones.base import StagedBackbone, check_stages


@MODELS.register_module()
class PlainAlexNet(StagedBackbone):
    """AlexNet with batch norms: five convolutions, then a classifier.

    Args:
        num_classes: Classes of the classifier, -1 for none.
        channels: Channels of the five convolutions.
        hidden_channels: Channels of the classifier's two hidden layers.
        in_channels: Channels of the images.
        out_indices: Indices (0 to 4) of the convolutions whose outputs to
            return, each taken after its pooling. A classifier's scores come
            last. By default only the scores are returned, or the output of
            the last convolution if there is no classifier.
        frozen_stages: Last convolution that is not trained, -1 for none.
        conv_cfg: Config of the convolutions, plain by default.
        norm_cfg: Config of the norms, ``dict(type='BN')`` by default.
        act_cfg: Config of the activations, ``dict(type='ReLU')`` by default.
        norm_eval: Whether norms stay in eval mode while training.
        init_cfg: mmengine's initialisation rules.

    Shape:
        - Input: (N, in_channels, H, W), with H and W of at least 63 pixels
        - Output: a tuple of tensors (N, channels[i], H', W'), one for each i
          in ``out_indices``, and scores (N, num_classes)

    Raises:
        ValueError: If ``channels``, ``out_indices`` or ``frozen_stages`` is
            out of range; the message says what is allowed.

    Examples:
        >>> import torch
        >>> model = PlainAlexNet(10, hidden_channels=16).eval()
        >>> model(torch.rand(1, 3, 224, 224))[0].shape
        torch.Size([1, 10])
    """

    #: Kernel size in taps, stride and padding in pixels, a convolution each.
    convs = ((11, 4, 2), (5, 1, 2), (3, 1, 1), (3, 1, 1), (3, 1, 1))
    #: Indices of the convolutions that a pooling follows.
    pooled = (0, 1, 4)

    def __init__(
        self,
        num_classes: int = -1,
        channels: Sequence[int] = (64, 192, 384, 384, 256),
        hidden_channels: int = 4096,
        in_channels: int = 3,
        out_indices: Optional[Sequence[int]] = None,
        frozen_stages: int = -1,
        conv_cfg: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        act_cfg: Optional[dict] = None,
        norm_eval: bool = False,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        wanted = (4,) if out_indices is None else out_indices
        check_stages(
            5, channels, wanted, frozen_stages, 'five positive numbers'
        )
        if num_classes > 0 and out_indices is None:
            wanted = ()
        super().__init__(wanted, frozen_stages, norm_eval, init_cfg)
        self.channels = tuple(channels)
        self.num_classes = num_classes
        inside = in_channels
        for i, (size, stride, padding) in enumerate(self.convs):
            conv = ConvModule(
                inside,
                channels[i],
                size,
                stride,
                padding,
                conv_cfg=conv_cfg,
                norm_cfg=norm_cfg or dict(type='BN'),
                act_cfg=act_cfg or dict(type='ReLU'),
            )
            self.add_module(f'conv{i + 1}', conv)
            inside = channels[i]
        self.maxpool = nn.MaxPool2d(3, stride=2)
        if num_classes > 0:
            # Images of 224 pixels arrive as 6x6 maps, which it leaves alone.
            self.pool = nn.AdaptiveAvgPool2d(6)
            self.classifier = nn.Sequential(
                nn.Linear(inside * 6 * 6, hidden_channels),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(hidden_channels, hidden_channels),
                nn.ReLU(),
                nn.Dropout(0.5),
                nn.Linear(hidden_channels, num_classes),
            )

    @property
    def stages(self) -> Tuple[nn.Module, ...]:
        """The five convolutions with norm and activation."""
        return tuple(getattr(self, f'conv{i + 1}') for i in range(5))

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(x)
            if i in self.pooled:
                x = self.maxpool(x)
            if i in self.out_indices:
                outputs.append(x)
        if self.num_classes > 0:
            outputs.append(self.classifier(self.pool(x).flatten(1)))
        return tuple(outputs)


@MODELS.register_module()
class AlexNetDBB(BlocksForConvNorm, PlainAlexNet):
    """AlexNet with blocks, see :class:`BlocksForConvNorm`.

    Merged, it is :class:`PlainAlexNet`.

    Examples:
        >>> import torch
        >>> model = AlexNetDBB(channels=(4, 8, 8, 8, 4)).eval()
        >>> model(torch.rand(1, 3, 224, 224))[0].shape
        torch.Size([1, 4, 6, 6])
    """
