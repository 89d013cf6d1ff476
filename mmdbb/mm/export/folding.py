# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Fold norms into the convolutions whose outputs they alone read.

The data tells which norm follows which convolution. A layer with a forward of
its own keeps its norm, because its kernel may not be its weight.
"""

from __future__ import annotations

from typing import Dict

import torch
from torch import Tensor, nn

from mmdbb.folding import fold_norm_, is_foldable
from mmdbb.own_forward import is_plain
from mmdbb.tracing import sole_readers


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
        fold_norm_(conv, norm)
        folded[names[conv]] = names[norm]
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is norm:
                    parent._modules[name] = nn.Identity()
    return folded
