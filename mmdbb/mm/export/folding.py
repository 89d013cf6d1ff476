# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fold norms into the convolutions whose outputs they alone read.

The data tells which norm follows which convolution. A layer with a forward of
its own keeps its norm, because its kernel may not be its weight.
"""

from __future__ import annotations

import copy
from typing import Dict

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.branches.base import zero_bias
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.modules import is_known
from mmdbb.own_forward import is_plain
from mmdbb.tracing import sole_readers
from mmdbb.transforms import KernelBias, fuse_conv_bn


@torch.no_grad()
def fold_norms_(model: nn.Module, images: Tensor) -> Dict[str, str]:
    """Fold norms into the convolutions before them, in place.

    Args:
        model: A merged network in eval mode, which maps images to tensors.
        images: Normalised images (N, C, H, W) to run it on.

    Returns:
        dict: Names of the convolutions -> names of the norms that were folded
        into them; each became an ``nn.Identity``.
    """
    names = {module: name for name, module in model.named_modules()}
    folded = {}
    for conv, norm in sole_readers(model, images).items():
        if not is_foldable(norm) or not is_plain(conv):
            continue
        bias = zero_bias(conv.weight) if conv.bias is None else conv.bias
        exact = KernelBias(conv.weight.double(), bias.double())
        norm_64 = copy.deepcopy(norm).double()
        fused = fuse_conv_bn(exact, norm_scale_shift(norm_64))
        dtype = conv.weight.dtype
        conv.weight = nn.Parameter(fused.kernel.to(dtype))
        conv.bias = nn.Parameter(fused.bias.to(dtype))
        folded[names[conv]] = names[norm]
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is norm:
                    parent._modules[name] = nn.Identity()
    return folded


def is_foldable(norm: object) -> bool:
    """Whether a norm is one scale and one shift for each channel.

    Args:
        norm: The module that reads a convolution's output, or None.
    """
    return (
        isinstance(norm, _BatchNorm)
        and is_known(norm)
        and norm.running_mean is not None
    )
