# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Insert a batch norm after each merged convolution, to train before INT8.

Merging removes the norms that kept the activations in range. Ding et al.
insert new ones and continue training (RepVGG's repository, section
"Quantization", https://github.com/DingXiaoH/RepVGG). Here each block becomes
:class:`mmdbb.blocks.ConvBN`, a block with one branch: the merged kernel
without its bias, and a norm behind it. The norm's statistics are measured on
images, and its weight and bias undo the normalisation, so that the network
computes the same as before. All functions for blocks (merging, exporting,
quantization-aware training) fold this norm like any other.
"""

from __future__ import annotations

import copy
from typing import Dict, Iterable, NamedTuple, Optional, Sequence, Set, Type

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks import ConvBN
from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.build import kind_of_block, registered_blocks
from mmdbb.branches.norm import norm_scale_shift
from mmdbb.compare import Difference, compare_networks
from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.found_norms import absorbed_norms
from mmdbb.mm.config_types import class_of, rewrite
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.evaluation.norm_statistics import channel_statistics
from mmdbb.mm.outputs import Contents, Source, output_paths, writing
from mmdbb.mm.quantization.network import fill_network
from mmdbb.mm.stock.config import (
    UPSAMPLE_KEY,
    UPSAMPLE_KEYS,
    named_block,
    without_own_starts,
)
from mmdbb.mm.structure import Structure
from mmdbb.reparam import find_blocks
from mmdbb.transforms import KernelBias, fuse_conv_bn

_TOLERANCE = 1e-4


class Inserted(NamedTuple):
    """Result of :func:`insert_bn_checkpoint`.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config.
        blocks: Number of blocks that became a convolution and a norm.
        difference: Difference between the outputs of the old and the new
            network, in eval mode.
    """

    checkpoint: str
    config: str
    blocks: int
    difference: Difference


def insert_bn_checkpoint(
    source: Source,
    out: str,
    calibration: Optional[Calibration] = None,
    overwrite: bool = False,
) -> Inserted:
    """Merge each block of a checkpoint, and put a calibrated norm behind it.

    Args:
        source: The trained checkpoint, with blocks, and its config.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``. A config is written beside it as ``*.py``;
            training with that config starts from the checkpoint.
        calibration: Images that the norms' statistics are computed from.
        overwrite: Whether existing outputs may be replaced.

    Returns:
        Inserted: Paths of the files, and how far the two networks differ.

    Raises:
        UserError: If an input is wrong, or the outputs of the two networks
            differ. Nothing is written then.
    """
    cfg, calibration = source.config, calibration or Calibration()
    checkpoint, config = output_paths(out)
    with writing(source, checkpoint, config, overwrite=overwrite) as drafts:
        loaded = source.read()
        model = fill_network(build_model(cfg), loaded, source.checkpoint)
        blocks = find_blocks(model)
        if not blocks:
            raise UserError(
                f'{source.checkpoint} is merged already: the network of its '
                'config has no block to put a norm behind'
            )
        new_cfg = conv_bn_config(cfg, model)
        network = build_model(new_cfg)
        images = calibration.images(cfg, model)
        try:
            insert_bn_(network, model, images)
        except ValueError as error:
            raise UserError(f'{source.checkpoint}: {error}') from error
        # In the same work folder, the new training would replace the files
        # of the first.
        new_cfg.pop('work_dir', None)
        new_cfg.update(load_from=checkpoint, resume=False)
        contents = Contents(
            cfg=new_cfg,
            state=network.state_dict(),
            structure=Structure.TRAIN,
            weights=loaded['weights'],
            meta=loaded['meta'],
        )
        network = drafts.network(contents)
        difference = compare_networks(model, network, [images[:2]])
        if not difference.largest <= _TOLERANCE:
            raise UserError(
                f'the network with inserted norms differs by '
                f'{difference.largest:.2e} of the largest magnitude (in '
                f'{difference.output}); nothing written'
            )
        drafts.write(
            contents.noting(
                calibration_images=len(images), max_error=difference.largest
            )
        )
    return Inserted(
        checkpoint=checkpoint,
        config=config,
        blocks=len(blocks),
        difference=difference,
    )


def conv_bn_config(cfg: Config, model: nn.Module) -> Config:
    """Replace all blocks in a config by :class:`mmdbb.blocks.ConvBN`.

    Args:
        cfg: Config of a network with blocks.
        model: That network. It tells which kernels became blocks, where the
            config leaves that to a backbone.

    Returns:
        Config: A copy. The entries that say what blocks start from are
        removed, because all weights come from the checkpoint.
    """
    sizes = [max(b.kernel_size) for b in find_blocks(model).values()]

    def with_conv_bn(node: dict, scope: Optional[str]) -> dict:
        kind = class_of(node.get('type'), scope)
        default = getattr(kind, 'default_block', None)
        if default is not None and node.get('block') is None:
            node['block'] = dict(default)
        for key in ('conv_cfg', 'block', UPSAMPLE_KEY):
            block = named_block(node.get(key), scope)
            if block is not None:
                new = _conv_bn(node[key], block, sizes)
                if key == UPSAMPLE_KEY:
                    own = node[key].items()
                    new.update({k: v for k, v in own if k in UPSAMPLE_KEYS})
                node[key] = new
        return node

    fields = without_own_starts(cfg.to_dict())
    return Config(rewrite(fields, with_conv_bn, fields.get('default_scope')))


def _conv_bn(
    layer: dict, block: Type[ReparamConv2d], sizes: Sequence[int]
) -> dict:
    """Config of a ``ConvBN`` with the same norm and the same kernel sizes.

    Args:
        layer: Config of the block.
        block: Class of the block.
        sizes: Kernel sizes of all blocks of the network. A backbone may leave
            smaller or larger kernels plain for this kind of block.
    """
    smallest, largest = block.kernel_sizes
    low = layer.get('min_kernel_size', smallest)
    high = layer.get('max_kernel_size', largest)
    kinds = registered_blocks(kind_of_block(block))
    new = dict(
        type=next(n for n, kind in kinds.items() if issubclass(kind, ConvBN)),
        min_kernel_size=max(low, min(sizes)),
        max_kernel_size=min(high, max(sizes)),
    )
    if layer.get('norm_cfg'):
        new['norm_cfg'] = layer['norm_cfg']
    return new


@torch.no_grad()
def insert_bn_(network: nn.Module, model: nn.Module, images: Tensor) -> None:
    """Fill a network of ``ConvBN`` so that it computes the same as ``model``.

    Where ``network`` has no place for the norm behind a block, because
    ``ConvBN`` brings its own, that norm is folded into the kernel first.

    Args:
        network: The network of ``model``, but with a ``ConvBN`` for each
            block. Its weights are overwritten.
        model: The trained network with blocks, in eval mode; unchanged.
        images: Normalised images (N, C, H, W) to calibrate the norms with.

    Raises:
        ValueError: If a kernel is not finite, a norm has no weight, or an
            entry of one network has no counterpart in the other.
    """
    blocks = find_blocks(model)
    absorbed = _absorbed(network, model, blocks)
    _load_rest(network, model, (*blocks, *absorbed.values()))
    ends = {
        name: model.get_submodule(absorbed.get(name, name)) for name in blocks
    }
    statistics = channel_statistics(model, ends, images)
    for name, block in blocks.items():
        branch = network.get_submodule(name).branches['kxk']
        norm = branch.norm
        if not norm.affine:
            raise ValueError(
                f'the norm behind {name} needs weight and bias, but its '
                'norm_cfg says affine=False'
            )
        kernel, bias = _merged(block, ends[name])
        # No image reaches some layers (auxiliary heads); any statistics do
        # there, because weight and bias undo them.
        mean, var = statistics.get(name, (bias, torch.ones_like(bias)))
        branch.conv.weight.copy_(kernel)
        norm.running_mean.copy_(mean - bias.double())
        norm.running_var.copy_(var)
        norm.weight.copy_((norm.running_var.double() + norm.eps).sqrt())
        norm.bias.copy_(mean)


def _absorbed(
    network: nn.Module, model: nn.Module, blocks: Iterable[str]
) -> Dict[str, str]:
    """Names of blocks -> names of the norms behind them that fall away."""
    return {
        name: place
        for name, place in absorbed_norms(network).items()
        if name in blocks
        and isinstance(model.get_submodule(place), _BatchNorm)
    }


def _load_rest(
    network: nn.Module, model: nn.Module, left: Iterable[str]
) -> None:
    """Load the weights of all modules but some, and see that none is lost."""
    inside = tuple(f'{name}.' for name in left)

    def rest(names: Iterable[str]) -> Set[str]:
        return {name for name in names if not name.startswith(inside)}

    state = model.state_dict()
    kept = {name: state[name] for name in rest(state)}
    misfit = network.load_state_dict(kept, strict=False)
    lost = rest(misfit.missing_keys) | set(misfit.unexpected_keys)
    if lost:
        raise ValueError(
            'the network with inserted norms has other entries than the '
            f'trained one: {some(sorted(lost))}'
        )


def _merged(block: ReparamConv2d, end: nn.Module) -> KernelBias:
    """The kernel and bias of a block and, if it ends in one, of its norm."""
    conv, layout = block.to_conv(), block.in_torchs_layout
    bias = conv.weight.new_zeros(conv.out_channels)
    bias = bias if conv.bias is None else conv.bias
    if end is block:
        return KernelBias(conv.weight, bias)
    exact = layout(KernelBias(conv.weight.double(), bias.double()))
    norm = norm_scale_shift(copy.deepcopy(end).double())
    return layout(fuse_conv_bn(exact, norm))
