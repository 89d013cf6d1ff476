# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""mmseg's upsample module of a U-Net, with a block for its convolution.

mmseg's ``DeconvModule`` builds its transposed convolution itself, so no config
of a layer reaches that convolution.
"""

from __future__ import annotations

from typing import Optional

from mmcv.cnn import (
    build_activation_layer,
    build_norm_layer,
    build_upsample_layer,
)
from mmengine.registry import MODELS
from torch import Tensor, nn
from torch.utils import checkpoint


@MODELS.register_module()
class BlockDeconvModule(nn.Module):
    """mmseg's ``DeconvModule`` with a block: upsample, norm, activation.

    Its entries have the names of that class, which takes its place in the
    stock config.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        with_cp: Whether to compute the module again in the backward pass.
        norm_cfg: Config of the norm behind the block.
        act_cfg: Config of the activation.
        kernel_size: Size of the kernel in taps.
        scale_factor: How many times larger the output is.
        block: Config of the block, ``dict(type='DBB')`` by default.

    Raises:
        ValueError: If the kernel is smaller than ``scale_factor``, or one of
            them is odd and the other even.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        with_cp: bool = False,
        norm_cfg: Optional[dict] = None,
        act_cfg: Optional[dict] = None,
        *,
        kernel_size: int = 4,
        scale_factor: int = 2,
        block: Optional[dict] = None,
    ) -> None:
        super().__init__()
        crop = kernel_size - scale_factor
        if crop < 0 or crop % 2:
            raise ValueError(
                'kernel_size must be scale_factor or larger by an even '
                f'number, got kernel_size={kernel_size}, scale_factor='
                f'{scale_factor}'
            )
        self.with_cp = with_cp
        upsample = build_upsample_layer(
            block or dict(type='DBB'),
            in_channels,
            out_channels,
            kernel_size,
            stride=scale_factor,
            padding=crop // 2,
        )
        _, norm = build_norm_layer(norm_cfg or dict(type='BN'), out_channels)
        activation = build_activation_layer(act_cfg or dict(type='ReLU'))
        # mmseg's name, which its checkpoints have.
        self.deconv_upsamping = nn.Sequential(upsample, norm, activation)

    @classmethod
    def plain_cfg(cls, cfg: dict) -> dict:
        """The config of the same module without a block.

        Args:
            cfg: The module's config.
        """
        plain = {k: v for k, v in cfg.items() if k != 'block'}
        return dict(plain, type='mmseg.DeconvModule')

    def forward(self, x: Tensor) -> Tensor:
        """Upsample images.

        Args:
            x: Images of shape (N, in_channels, H, W).

        Returns:
            Tensor: Shape (N, out_channels, H * scale, W * scale).
        """
        if self.with_cp and x.requires_grad:
            return checkpoint.checkpoint(
                self.deconv_upsamping, x, use_reentrant=False
            )
        return self.deconv_upsamping(x)
