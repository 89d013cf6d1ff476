# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmpretrain's VGG with a block for each convolution and its norm.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image
Recognition", ICLR 2015 (https://arxiv.org/abs/1409.1556). With DBB or ACB and
a head of one hidden layer, it is the VGG-16 that the papers train on CIFAR
(ACNet, ICCV 2019, sec. 4.1; `base_model/vgg.py` in its code).
"""

from __future__ import annotations

from mmpretrain.models import VGG
from mmpretrain.registry import MODELS

from mmdbb.mm.backbones.absorbed import BlocksForConvNorm


@MODELS.register_module()
class VGGDBB(BlocksForConvNorm, VGG):
    """VGG with blocks and norms, see :class:`BlocksForConvNorm`.

    Merged, it is mmpretrain's VGG with ``norm_cfg=dict(type='BN')``.

    Examples:
        >>> import torch
        >>> model = VGGDBB(11, block=dict(type='ACB')).eval()
        >>> model(torch.rand(1, 3, 32, 32))[0].shape
        torch.Size([1, 512, 1, 1])
    """

    @classmethod
    def plain_cfg(cls, cfg: dict) -> dict:
        """The config of the merged network, mmpretrain's VGG with norms.

        mmpretrain's VGG has norms only if ``norm_cfg`` asks for them.

        Args:
            cfg: A config of this class, with its ``type``; unchanged.
        """
        plain = super().plain_cfg(cfg)
        if plain.get('norm_cfg') is None:
            plain['norm_cfg'] = dict(type='BN', requires_grad=True)
        return plain
