# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""UniRepLKNet, which mmpretrain does not have, with blocks and plain.

Ding et al., "UniRepLKNet: A Universal Perception Large-Kernel ConvNet for
Audio, Video, Point Cloud, Time-Series and Image Recognition", CVPR 2024
(https://arxiv.org/abs/2311.15599), sec. 3.3 and tab. 5. Depths, widths and
sizes of kernels are those of its code
(https://github.com/AILab-CVC/UniRepLKNet, ``unireplknet.py``), as are the
names of the entries outside of blocks.
"""

from __future__ import annotations

from typing import Dict, Optional, Sequence, Tuple, Union

import torch
import torch.utils.checkpoint
from mmcv.cnn import build_conv_layer, build_norm_layer
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from mmpretrain.models.backbones.base_backbone import BaseBackbone
from mmpretrain.models.utils import build_norm_layer as build_layer_norm
from mmpretrain.registry import MODELS
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.ops import Permute

from mmdbb.mm.backbones.absorbed import BlocksForConvNorm
from mmdbb.mm.backbones.base import check_stages
from mmdbb.official.blocks import SEBlock


def _every(n: int, count: int) -> Tuple[int, ...]:
    """Kernels of a deep stage: every n-th is large."""
    return tuple(3 if i % n else 13 for i in range(count))


def _arch(width: int, third: Tuple[int, ...], others: int) -> dict:
    """An architecture of the paper's code.

    Args:
        width: Channels of the first stage.
        third: Sizes of the third stage's kernels.
        others: Depth of the other stages.
    """
    large = (13,) * others
    return dict(
        channels=tuple(width * 2**i for i in range(4)),
        kernel_sizes=((3,) * others, large, third, large),
    )


class ResponseNorm(nn.Module):
    """Global response normalization of maps in channels-last order.

    Woo et al., "ConvNeXt V2", CVPR 2023 (https://arxiv.org/abs/2301.00808). As
    in UniRepLKNet's code its parameters have four dimensions, so optimizers
    that spare parameters of one dimension decay them.

    Args:
        channels: Number of channels.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, channels))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, channels))

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, H, W, C) to the same shape."""
        norm = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        response = norm / (norm.mean(dim=-1, keepdim=True) + 1e-6)
        return (self.gamma * response + 1) * x + self.beta


class UniRepLKNetUnit(BaseModule):
    """A large depthwise kernel, its norm, squeeze-and-excitation, two layers.

    Args:
        channels: Channels of input and output.
        kernel_size: Height and width of the depthwise kernel, odd.
        drop_path_rate: Probability with which an image skips the unit.
        layer_scale_init_value: Start of the factors of the unit's output; 0
            for no such factors.
        conv_cfg: Config of the depthwise convolution.
        norm_cfg: Config of the batch norms.
        with_cp: Whether to save memory by computing the unit a second time
            in the backward pass.
    """

    #: For ``conv_norm_pairs``: the norm that takes a merged block's bias.
    conv_norm_names = (('dwconv', 'norm'),)

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        drop_path_rate: float,
        layer_scale_init_value: float,
        conv_cfg: Optional[dict],
        norm_cfg: dict,
        with_cp: bool,
    ) -> None:
        super().__init__()
        inside = 4 * channels
        self.dwconv = build_conv_layer(
            conv_cfg,
            channels,
            channels,
            kernel_size,
            padding=kernel_size // 2,
            groups=channels,
            bias=False,
        )
        self.norm = build_norm_layer(norm_cfg, channels)[1]
        self.se = SEBlock(channels, channels // 4)
        self.pwconv1 = nn.Sequential(
            Permute([0, 2, 3, 1]), nn.Linear(channels, inside)
        )
        self.act = nn.Sequential(nn.GELU(), ResponseNorm(inside))
        self.pwconv2 = nn.Sequential(
            nn.Linear(inside, channels, bias=False),
            Permute([0, 3, 1, 2]),
            build_norm_layer(norm_cfg, channels)[1],
        )
        self.gamma = None
        if layer_scale_init_value:
            start = torch.full((channels,), float(layer_scale_init_value))
            self.gamma = nn.Parameter(start)
        self.drop_path = (
            DropPath(drop_path_rate) if drop_path_rate else nn.Identity()
        )
        self.with_cp = with_cp

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, channels, H, W) to the same shape."""
        if self.with_cp and x.requires_grad:
            return torch.utils.checkpoint.checkpoint(
                self._forward, x, use_reentrant=False
            )
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        if self.gamma is not None:
            y = self.gamma.reshape(-1, 1, 1) * y
        return x + self.drop_path(y)


@MODELS.register_module()
class PlainUniRepLKNet(BaseBackbone):
    """UniRepLKNet of plain convolutions: what :class:`UniRepLKNet` merges to.

    Args:
        arch: Name (``'a'``, ``'f'``, ``'p'``, ``'n'``, ``'t'``, ``'s'``,
            ``'b'``, ``'l'`` or ``'xl'``) or config of the architecture: a
            dict of ``channels`` (of the four stages) and ``kernel_sizes``
            (for each stage a list with the size of each unit's kernel).
        base_channels: Channels of the first stage, in place of those of
            ``arch``; each stage has twice as many as the one before.
        in_channels: Channels of the images.
        drop_path_rate: Probability with which an image skips the last unit;
            it grows linearly, from 0 in the first one.
        layer_scale_init_value: Start of the factors of each unit's output; 0
            for no such factors.
        out_indices: Indices of the stages (0 to 3) whose outputs to return.
        gap_before_final_norm: Whether to average each output over the image
            before its layer norm, as classifiers need it.
        frozen_stages: Last part that is not trained: -1 freezes nothing, 0
            the stem, and i from 1 to 4 the stem and the first i stages.
        with_cp: Whether to save memory by computing each unit a second time
            in the backward pass.
        conv_cfg: Config of the depthwise convolutions, plain by default.
        norm_cfg: Config of the batch norms, ``dict(type='BN')`` by default.
        norm_eval: Whether batch norms stay in eval mode while training.
        init_cfg: mmengine's initialisation rules. By default weights of
            convolutions and linear layers are drawn with a standard deviation
            of 0.02, as in the paper's code.

    Shape:
        - Input: (N, in_channels, H, W)
        - Output: a tuple of tensors (N, channels[i]), or without
          ``gap_before_final_norm`` (N, channels[i], H', W'), one for each i
          in ``out_indices``. H' and W' are a quarter of the image's in the
          first stage, and half of the former stage's in each other.

    Raises:
        TypeError: If ``arch`` is no name and no dict, or ``out_indices`` no
            list of ints.
        ValueError: If ``arch``, ``out_indices`` or ``frozen_stages`` is not
            allowed; the message says what is.

    Examples:
        >>> model = PlainUniRepLKNet('a', base_channels=8).eval()
        >>> model(torch.rand(1, 3, 64, 64))[0].shape
        torch.Size([1, 64])
    """

    #: Architectures: ``unireplknet_a`` to ``unireplknet_xl`` of the code.
    arch_settings: Dict[str, dict] = dict(
        a=_arch(40, _every(1, 6), 2),
        f=_arch(48, _every(1, 6), 2),
        p=_arch(64, _every(1, 6), 2),
        n=_arch(80, _every(1, 8), 2),
        t=_arch(80, _every(2, 18), 3),
        s=_arch(96, _every(3, 27), 3),
        b=_arch(128, _every(3, 27), 3),
        l=_arch(192, _every(3, 27), 3),
        xl=_arch(256, _every(3, 27), 3),
    )

    def __init__(
        self,
        arch: Union[str, dict] = 't',
        base_channels: Optional[int] = None,
        in_channels: int = 3,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float = 1e-6,
        out_indices: Sequence[int] = (3,),
        gap_before_final_norm: bool = True,
        frozen_stages: int = -1,
        with_cp: bool = False,
        conv_cfg: Optional[dict] = None,
        norm_cfg: Optional[dict] = None,
        norm_eval: bool = False,
        init_cfg: Union[dict, list, None] = None,
    ) -> None:
        if init_cfg is None:
            init_cfg = dict(
                type='TruncNormal', layer=['Conv2d', 'Linear'], std=0.02
            )
        super().__init__(init_cfg)
        self.channels, sizes = self._architecture(arch, base_channels)
        check_stages(
            4,
            self.channels,
            out_indices,
            -1,
            'four positive numbers',
        )
        if frozen_stages not in range(-1, 5):
            raise ValueError(
                f'frozen_stages must be one of -1 to 4, got {frozen_stages}'
            )
        self.out_indices = tuple(out_indices)
        self.gap_before_final_norm = gap_before_final_norm
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        #: Number of units of each stage.
        self.depths = tuple(map(len, sizes))
        first = self.channels[0]
        self.downsample_layers = nn.ModuleList(
            [
                nn.Sequential(
                    *_halved(in_channels, first // 2),
                    nn.GELU(),
                    *_halved(first // 2, first),
                ),
                *(
                    nn.Sequential(*_halved(*pair))
                    for pair in zip(self.channels, self.channels[1:])
                ),
            ]
        )
        rates = torch.linspace(0, drop_path_rate, sum(self.depths)).tolist()
        unit_args = dict(
            layer_scale_init_value=layer_scale_init_value,
            conv_cfg=conv_cfg,
            norm_cfg=norm_cfg or dict(type='BN'),
            with_cp=with_cp,
        )
        self.stages = nn.ModuleList(
            nn.Sequential(
                *(
                    UniRepLKNetUnit(width, size, rates.pop(0), **unit_args)
                    for size in kernels
                )
            )
            for width, kernels in zip(self.channels, sizes)
        )
        for index in self.out_indices:
            norm = _layer_norm(self.channels[index])
            self.add_module(f'norm{index}', norm)
        self._freeze_stages()

    @classmethod
    def _architecture(cls, arch, base_channels: Optional[int]) -> tuple:
        """Channels of the stages, and the kernels' sizes in each."""
        if isinstance(arch, str):
            if arch not in cls.arch_settings:
                raise ValueError(
                    f'arch must be one of {list(cls.arch_settings)} or a '
                    f'dict, got {arch!r}'
                )
            arch = cls.arch_settings[arch]
        keys = {'channels', 'kernel_sizes'}
        if not isinstance(arch, dict) or set(arch) != keys:
            raise TypeError(
                f'arch must be one of {list(cls.arch_settings)}, or a dict '
                f'with the keys {sorted(keys)}, got {arch!r}'
            )
        sizes = [tuple(stage) for stage in arch['kernel_sizes']]
        if len(sizes) != 4 or any(
            not isinstance(k, int) or k < 1 or k % 2 == 0
            for stage in sizes
            for k in stage
        ):
            raise ValueError(
                'kernel_sizes of arch must be four lists of odd numbers, got '
                f'{arch["kernel_sizes"]}'
            )
        channels = tuple(arch['channels'])
        if base_channels is not None:
            channels = tuple(base_channels * 2**i for i in range(4))
        return channels, sizes

    def forward(self, x: Tensor) -> Tuple[Tensor, ...]:
        outputs = []
        for i, stage in enumerate(self.stages):
            x = stage(self.downsample_layers[i](x))
            if i not in self.out_indices:
                continue
            norm = getattr(self, f'norm{i}')
            if self.gap_before_final_norm:
                mean = x.mean((2, 3), keepdim=True)
                outputs.append(norm(mean).flatten(1))
            else:
                outputs.append(norm(x))
        return tuple(outputs)

    def train(self, mode: bool = True) -> nn.Module:
        """Set the mode of all but frozen stages, and return the module."""
        super().train(mode)
        self._freeze_stages()
        if mode and self.norm_eval:
            for module in self.modules():
                if isinstance(module, _BatchNorm):
                    module.eval()
        return self

    def _freeze_stages(self) -> None:
        for i in range(self.frozen_stages + 1):
            frozen = [self.downsample_layers[max(i - 1, 0)]]
            if i:
                frozen.append(self.stages[i - 1])
            for module in frozen:
                module.eval()
                module.requires_grad_(False)

    def get_layer_depth(
        self, param_name: str, prefix: str = ''
    ) -> Tuple[int, int]:
        """The depth of a parameter, for rates that decay layer by layer.

        As in the paper's code, which has ConvNeXt's rule: the stem, each of
        the first two stages, and each three units of the third are a layer.

        Args:
            param_name: Name of the parameter.
            prefix: Beginning of the names of the backbone's parameters.

        Returns:
            tuple: The parameter's layer, from 0 on, and the number of layers.
        """
        last = 12 if self.depths[2] > 9 else 6
        if not param_name.startswith(prefix):
            return last + 1, last + 2
        part, *numbers = param_name[len(prefix) :].split('.')
        depth = last + 1
        if part == 'downsample_layers':
            depth = (0, 2, 3, last)[int(numbers[0])]
        elif part == 'stages':
            stage, unit = map(int, numbers[:2])
            depth = (1, 2, 3 + unit // 3, last)[stage]
        return depth, last + 2


@MODELS.register_module()
class UniRepLKNet(BlocksForConvNorm, PlainUniRepLKNet):
    """UniRepLKNet with blocks, see :class:`BlocksForConvNorm`.

    As in the paper kernels from 7x7 on are blocks by default, and the norm
    behind a block stays. Merged, it is :class:`PlainUniRepLKNet`.

    Args:
        args: Positional arguments of :class:`PlainUniRepLKNet`; the first is
            the architecture.
        kwargs: Keywords of :class:`PlainUniRepLKNet`, and ``block``,
            ``norm_cfg`` and ``deploy`` of :class:`BlocksForConvNorm`.

    Examples:
        >>> model = UniRepLKNet('a', base_channels=8).eval()
        >>> type(model.stages[1][0].dwconv).__name__
        'DilatedReparamConv'
    """

    default_block = dict(
        type='DilatedReparamConv',
        min_kernel_size=7,
        init_cfg=dict(type='TruncNormal', layer='Conv2d', std=0.02),
    )
    absorbs_norms = False


def _halved(inside: int, outside: int) -> Tuple[nn.Module, nn.Module]:
    """A convolution that halves height and width, and its norm."""
    conv = nn.Conv2d(inside, outside, 3, stride=2, padding=1)
    return conv, _layer_norm(outside)


def _layer_norm(channels: int) -> nn.Module:
    """A layer norm over the channels of maps (N, C, H, W)."""
    return build_layer_norm(dict(type='LN2d', eps=1e-6), channels)
