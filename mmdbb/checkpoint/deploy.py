# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to the files of the stock network, proven."""

from __future__ import annotations

import copy
import hashlib
from pathlib import Path
from typing import List, NamedTuple, Optional, Sequence, Tuple

import mmcv
import numpy as np
import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn

from mmdbb.checkpoint.files import (
    all_or_nothing,
    load_strictly,
    read_checkpoint,
    some,
)
from mmdbb.checkpoint.stock import stock_config, stock_state
from mmdbb.checkpoint.verify import Difference, compare_networks
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks
from mmdbb.version import __version__


class Deployed(NamedTuple):
    """What :func:`deploy_checkpoint` wrote.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config of the stock network.
        blocks: How many blocks were merged.
        parameters: Numbers of parameters before and after.
        difference: How far the two networks are apart.
    """

    checkpoint: str
    config: str
    blocks: int
    parameters: Tuple[int, int]
    difference: Difference


def build_model(cfg: Config) -> nn.Module:
    """Build a config's model in eval mode, with random weights.

    Raises:
        UserError: If the config has no model, or it cannot be built.
    """
    if cfg.get('model') is None:
        raise UserError('the config has no model')
    init_default_scope(cfg.get('default_scope', 'mmengine'))
    try:
        # Building must not change what the config says.
        model = MODELS.build(copy.deepcopy(cfg.model))
    except (KeyError, TypeError, ValueError, ImportError) as error:
        raise UserError(
            f'cannot build the model of the config: {error}'
        ) from error
    model.train(False)
    return model


def load_deployed(config: str, checkpoint: str) -> nn.Module:
    """Build a network that ``tools/reparam.py`` wrote, fused or not.

    Args:
        config: The config beside the checkpoint.
        checkpoint: The checkpoint.

    Returns:
        nn.Module: In eval mode, on the CPU.

    Raises:
        UserError: If the two do not fit each other.
    """
    loaded = read_checkpoint(checkpoint)
    model = build_model(Config.fromfile(config))
    if is_fused(loaded):
        model = fuse_conv_bn(model)
    load_strictly(model, loaded['state_dict'], checkpoint)
    return model


def is_fused(checkpoint: dict) -> bool:
    """Whether a checkpoint is of a network whose norms are folded too."""
    return _structure(checkpoint) == 'fused'


def _structure(checkpoint: dict) -> Optional[str]:
    """What :func:`deploy_checkpoint` noted: ``stock``, ``fused`` or None."""
    own = (checkpoint.get('meta') or {}).get('mmdbb') or {}
    return own.get('structure')


def deploy_checkpoint(
    cfg: Config,
    checkpoint: str,
    out: str,
    fuse: bool = False,
    images: Sequence[str] = (),
    image_size: Tuple[int, int] = (224, 224),
    tolerance: float = 1e-4,
    overwrite: bool = False,
    seed: int = 0,
) -> Deployed:
    """Write the stock network of a trained checkpoint, and prove it equal.

    Nothing is written unless the written files, read again, give the same
    outputs as the network with its branches.

    Args:
        cfg: Config that the checkpoint was trained with.
        checkpoint: Path of the trained checkpoint.
        out: Path of the checkpoint to write, ``*.pth``; its config is
            written beside it as ``*.py``.
        fuse: Whether to fold the norms into the convolutions too.
        images: Paths of images to compare on, besides random ones.
        image_size: Height and width in pixels to compare at.
        tolerance: Largest difference allowed, relative to the largest
            magnitude of an output.
        overwrite: Whether existing outputs may be replaced.
        seed: For the random images.

    Raises:
        UserError: If an input is wrong, or the networks differ.
    """
    outputs = output_paths(out)
    for path in outputs:
        for source in (checkpoint, cfg.filename):
            if source and Path(path).resolve() == Path(source).resolve():
                raise UserError(f'output {path} is also an input')
    loaded = read_checkpoint(checkpoint)
    _refuse_merged(loaded, checkpoint)
    model = build_model(cfg)
    blocks = find_blocks(model)
    if not blocks:
        raise UserError(
            'the network of the config has no block to merge: no conv_cfg '
            'and no backbone of mmdbb'
        )
    state = loaded['state_dict']
    if not any('.branches.' in name for name in state):
        raise UserError(
            f'{checkpoint} is merged already, or is of a plain network: none '
            f'of its entries is of a branch, where {some(list(blocks))} '
            'should have some'
        )
    load_strictly(model, state, checkpoint)

    stock_cfg = stock_config(cfg)
    stock = build_model(stock_cfg)
    try:
        stock_weights = stock_state(model, stock)
    except ValueError as error:
        raise UserError(f'{checkpoint}: {error}') from error
    load_strictly(stock, stock_weights, 'the merged network')
    if fuse:
        stock = fuse_conv_bn(stock)

    meta = _meta(loaded['meta'], stock_cfg, checkpoint, fuse)
    batches = _batches(model, images, image_size, seed)
    with all_or_nothing(*outputs, overwrite=overwrite) as drafts:
        stock_cfg.dump(drafts[1])
        torch.save(dict(state_dict=stock.state_dict(), meta=meta), drafts[0])
        written = load_deployed(drafts[1], drafts[0])
        difference = compare_networks(model, written, batches)
        if not difference.largest <= tolerance:
            raise UserError(
                f'the merged network differs by {difference.largest:.2e} of '
                f'the largest magnitude, more than the tolerance '
                f'{tolerance:.0e} (in {difference.output}); nothing written'
            )
        meta['mmdbb'].update(max_error=difference.largest, tolerance=tolerance)
        torch.save(dict(state_dict=stock.state_dict(), meta=meta), drafts[0])
    return Deployed(
        outputs[0],
        outputs[1],
        len(blocks),
        (_count(model), _count(stock)),
        difference,
    )


def output_paths(out: str) -> Tuple[str, str]:
    """The checkpoint and the config beside it.

    Raises:
        UserError: If ``out`` does not end in ``.pth``.
    """
    if not out.endswith('.pth'):
        raise UserError(f'the output must end in .pth, got {out}')
    return out, out[: -len('.pth')] + '.py'


def _refuse_merged(loaded: dict, path: str) -> None:
    structure = _structure(loaded)
    if structure in ('stock', 'fused'):
        raise UserError(f'{path} is merged already (structure: {structure})')


def _meta(meta: dict, stock_cfg: Config, checkpoint: str, fuse: bool) -> dict:
    kept = {k: v for k, v in meta.items() if k != 'cfg'}
    return dict(
        kept,
        cfg=stock_cfg.pretty_text,
        mmdbb=dict(
            version=__version__,
            structure='fused' if fuse else 'stock',
            source_sha256=hashlib.sha256(
                Path(checkpoint).read_bytes()
            ).hexdigest(),
        ),
    )


def _batches(
    model: nn.Module,
    images: Sequence[str],
    size: Tuple[int, int],
    seed: int,
) -> List[Tensor]:
    """Random and given images, as the model's preprocessor leaves them."""
    generator = np.random.default_rng(seed)
    batches = [
        [
            generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            for _ in range(2)
        ]
    ]
    for path in images:
        try:
            image = mmcv.imread(path)
        except (FileNotFoundError, OSError) as error:
            raise UserError(f'cannot read image {path}: {error}') from error
        if image is None:
            raise UserError(f'not an image: {path}')
        batches.append([mmcv.imresize(image, size[::-1])])
    return [_preprocessed(model, batch) for batch in batches]


def _preprocessed(model: nn.Module, images: List[np.ndarray]) -> Tensor:
    tensors = [
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        for image in images
    ]
    preprocessor = getattr(model, 'data_preprocessor', None)
    if preprocessor is None:
        return torch.stack(tensors).float() / 255
    return preprocessor(dict(inputs=tensors))['inputs']


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
