# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The study's networks: one class, one start, one difference.

All networks of one name are of one class, from the same ready backbone. A
seed decides every kernel that a plain network has. In a network with blocks
the branch of the full kernel size starts as that very kernel, bit by bit;
what a block has besides starts as in its paper's code.
"""

from __future__ import annotations

import math
from typing import Callable, Dict, Optional

import torch
from torch import Tensor, nn

from mmdbb.blocks import BranchSumConv2d
from mmdbb.conv_norms import norm_names
from mmdbb.errors import UserError
from mmdbb.kernels import KxKKernel, PointwiseKernel, StackedKernel
from mmdbb.mm.backbones import MobileNetV1DBB, ReparamRepVGG, ResNetDBB
from mmdbb.plain.weights import load_plain_weights_
from mmdbb.reparam import find_blocks, reparameterize
from workshop.study.variants import BLOCKS, PLAIN, register_blocks

#: The papers' code starts OREPA's original kernels with uniform distributions
#: that are this many times as wide as torch's.
_OREPA_WIDTHS = {KxKKernel: math.sqrt(6), PointwiseKernel: math.sqrt(3)}


class Classifier(nn.Module):
    """A backbone, the mean over its map, and a linear layer.

    Args:
        backbone: Its last output is classified.
        channels: Channels of that output.
    """

    def __init__(self, backbone: nn.Module, channels: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(channels, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (N, 1, H, W) to scores (N, 10)."""
        return self.fc(self.backbone(x)[-1].mean((2, 3)))


def _resnet18(block: dict, width: int) -> Classifier:
    """ResNet-18 for small images: a 3x3 stem, and no pooling."""
    backbone = ResNetDBB(
        18,
        block=block,
        stem_channels=width,
        base_channels=width,
        init_cfg=dict(type='TorchDefault'),
    )
    backbone.conv1 = nn.Conv2d(1, width, 3, 2, padding=1, bias=False)
    backbone.bn1 = nn.BatchNorm2d(width)
    backbone.maxpool = nn.Identity()
    return Classifier(backbone, 8 * width)


def _mobilenet(block: dict, width: int) -> Classifier:
    """MobileNet-V1 without its last stage, at whose end no map is left."""
    backbone = MobileNetV1DBB(
        base_channels=width,
        in_channels=1,
        block=block,
        out_indices=(4,),
        init_cfg=dict(type='TorchDefault'),
    )
    del backbone.layer5
    backbone.layer5 = nn.Identity()
    return Classifier(backbone, 16 * width)


def _repvgg(block: dict, width: int) -> Classifier:
    """A plain stack of 3x3 convolutions, as RepVGG is once merged."""
    backbone = ReparamRepVGG(
        dict(
            num_blocks=[1, 2, 2, 1],
            width_factor=[1, 1, 1, 1],
            group_layer_map=None,
            se_cfg=None,
        ),
        in_channels=1,
        base_channels=width,
        strides=(1, 2, 2, 1),
        block=block,
        init_cfg=dict(type='TorchDefault'),
    )
    return Classifier(backbone, 8 * width)


#: Name -> how a network is built from a block's config and a width.
NETWORKS: Dict[str, Callable[[dict, int], Classifier]] = {
    'ResNet-18': _resnet18,
    'MobileNet-V1': _mobilenet,
    'RepVGG': _repvgg,
}


def check_names(networks=(), blocks=()) -> None:
    """Raise a UserError if a network or a block is unknown."""
    for what, names, known in (
        ('networks', networks, NETWORKS),
        ('blocks', blocks, BLOCKS),
    ):
        unknown = sorted(set(names) - set(known))
        if unknown:
            raise UserError(f'unknown {what} {unknown}; allowed: {[*known]}')


def start(
    network: str,
    block: str,
    width: int,
    seed: int,
    images: Tensor,
    trained: Optional[Callable[[], nn.Module]] = None,
) -> Classifier:
    """Build a network as it is before it is trained.

    Args:
        network: One of :data:`NETWORKS`.
        block: One of :data:`BLOCKS`.
        width: Channels of the first stage.
        seed: Of the weights.
        images: Training images (N, 1, H, W), for the one start that depends
            on them, ``'as DBB'``.
        trained: Gives a trained plain network, for ``'trained'`` starts.
    """
    config, kind = BLOCKS[block]
    if kind == 'as DBB':
        return _as_started(network, 'DBB', width, seed, images)
    model = start_with(network, config, width, seed)
    if kind == 'trained':
        state = trained().state_dict()
        if find_blocks(model):
            load_plain_weights_(model, state)
        else:
            model.load_state_dict(state)
    return model


def start_with(network: str, block: dict, width: int, seed: int) -> Classifier:
    """Build a network that starts from shared kernels, see :func:`start`.

    Args:
        network: One of :data:`NETWORKS`.
        block: Config of the block.
        width: Channels of the first stage.
        seed: Of the weights.
    """
    model = _built(network, block, width, seed)
    if find_blocks(model):
        plain = _built(network, BLOCKS[PLAIN].config, width, seed)
        take_dense_kernels_(model, plain)
    return model


def _built(network: str, block: dict, width: int, seed: int) -> Classifier:
    register_blocks()
    # The seed decides what blocks draw; TorchDefault draws all other layers
    # by the seed and their names.
    torch.manual_seed(seed)
    model = NETWORKS[network](dict(block), width)
    model.backbone.init_weights()
    # These two are outside of the backbone's rule, or were put in later.
    torch.manual_seed(seed)
    model.fc.reset_parameters()
    if network == 'ResNet-18':
        model.backbone.conv1.reset_parameters()
    return model


@torch.no_grad()
def take_dense_kernels_(model: nn.Module, plain: nn.Module) -> None:
    """Give blocks the kernels of a plain network, in place.

    The branch of the full kernel size takes the kernel; OREPA's original
    kernel takes it at the width of its own distribution. OREPA's stack of
    3x3 kernels, its form for 7x7, holds no such kernel and keeps its own.

    Args:
        model: A network with blocks.
        plain: The plain network, of the same names.
    """
    layers = dict(plain.named_modules())
    for name, block in find_blocks(model).items():
        kernel = layers[name].weight
        if isinstance(block, BranchSumConv2d):
            block.branches[block.dense_branch].conv.weight.copy_(kernel)
        elif not isinstance(block.generator, StackedKernel):
            width = _OREPA_WIDTHS[type(block.generator)]
            block.generator.origin.copy_(width * kernel)


@torch.no_grad()
def _as_started(
    network: str, block: str, width: int, seed: int, images: Tensor
) -> Classifier:
    """A plain network that is the function another network starts as.

    Each norm gets the deviation and the mean of the merged convolution's
    output as weight and bias, so it gives back what it was given.
    """
    other = start_with(network, BLOCKS[block].config, width, seed)
    blocks = find_blocks(other)
    for module in other.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    other.train()(images)
    merged = reparameterize(other.eval())
    plain = start_with(network, BLOCKS[PLAIN].config, width, seed)
    layers, norms = dict(plain.named_modules()), norm_names(plain)
    convs = dict(merged.named_modules())
    seen = {}
    handles = [
        convs[name].register_forward_hook(
            # A copy, because the activation behind may work in place.
            lambda conv, _, y, name=name: seen.update({name: y.clone()})
        )
        for name in blocks
    ]
    merged(images)
    for handle in handles:
        handle.remove()
    for name in blocks:
        norm = layers[norms[name][0]]
        var, mean = torch.var_mean(seen[name], (0, 2, 3), correction=0)
        layers[name].weight.copy_(convs[name].weight)
        norm.weight.copy_((var + norm.eps).sqrt())
        norm.bias.copy_(mean)
        norm.running_mean.copy_(mean - convs[name].bias)
        norm.running_var.copy_(var)
    for name, module in merged.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            layers[name].load_state_dict(module.state_dict())
    return plain
