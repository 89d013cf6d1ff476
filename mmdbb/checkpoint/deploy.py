# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to the files of the stock network, proven."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config
from torch import nn

from mmdbb.checkpoint.export import Exported, export_network
from mmdbb.checkpoint.export_formats import file_format
from mmdbb.checkpoint.files import (
    all_or_nothing,
    read_checkpoint,
)
from mmdbb.checkpoint.formats import SUFFIXES, write_checkpoint
from mmdbb.checkpoint.load import load_deployed
from mmdbb.checkpoint.merge import merge_checkpoint
from mmdbb.checkpoint.verify import Difference, input_batches, prove_equal
from mmdbb.errors import UserError


class Deployed(NamedTuple):
    """What :func:`deploy_checkpoint` wrote.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config of the stock network.
        blocks: How many blocks were merged.
        parameters: Numbers of parameters before and after.
        difference: How far the two networks are apart.
        tolerance: How far they might have been.
        structure: ``stock``, ``fused`` or ``partial``.
        left: How many blocks were left as they are.
        weights: Which weights were taken from the source.
    """

    checkpoint: str
    config: str
    blocks: int
    parameters: Tuple[int, int]
    difference: Difference
    tolerance: float
    structure: str
    left: int
    weights: str


def deploy_checkpoint(
    cfg: Config,
    checkpoint: str,
    out: str,
    fuse: bool = False,
    images: Sequence[str] = (),
    image_size: Tuple[int, int] = (224, 224),
    tolerance: Optional[float] = None,
    overwrite: bool = False,
    seed: int = 0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    ema: Optional[bool] = None,
    unsafe: bool = False,
) -> Deployed:
    """Write the stock network of a trained checkpoint, and prove it equal.

    Nothing is written unless the written files, read again, give the same
    outputs as the network with its branches.

    Args:
        cfg: Config that the checkpoint was trained with.
        checkpoint: Path of the trained checkpoint.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``; its config is written beside it as ``*.py``.
        fuse: Whether to fold the norms into the convolutions too.
        images: Paths of images to compare on, besides random ones.
        image_size: Height and width in pixels to compare at.
        tolerance: Largest difference allowed, relative to the largest
            magnitude of an output; by default 1e-4, and what rounding needs
            where the weights are of half precision.
        overwrite: Whether existing outputs may be replaced.
        seed: For the random images.
        only: As of :func:`~mmdbb.checkpoint.merge.merge_checkpoint`, as are
            the following. What is written then keeps the other blocks, and
            needs mmdbb.
        skip: Patterns for blocks to leave.
        dtype: What kernels and norms are composed in.
        ema: Whether to take averaged weights.
        unsafe: Whether to run what code the checkpoint holds.

    Raises:
        UserError: If an input is wrong, or the networks differ.
    """
    outputs = output_paths(out)
    refuse_inputs(outputs, checkpoint, cfg.filename)
    merged = merge_checkpoint(
        cfg, checkpoint, fuse, only, skip, dtype, ema, unsafe
    )
    if tolerance is None:
        tolerance = merged.tolerance
    trained, network, new_cfg, meta, structure, names, left, taken = merged
    parameters = (_count(trained), _count(network))
    with all_or_nothing(*outputs, overwrite=overwrite) as drafts:
        new_cfg.dump(drafts[1])
        write_checkpoint(drafts[0], network.state_dict(), meta)
        # In memory are the trained network and one merged at a time.
        del merged, network
        written = load_deployed(drafts[1], drafts[0])
        difference = prove_equal(
            trained, written, images, image_size, tolerance, seed
        )
        del written
        meta['mmdbb'].update(max_error=difference.largest, tolerance=tolerance)
        state = read_checkpoint(drafts[0])['state_dict']
        write_checkpoint(drafts[0], state, meta)
    return Deployed(
        *outputs,
        len(names),
        parameters,
        difference,
        tolerance,
        structure,
        left,
        taken,
    )


def export_checkpoint(
    cfg: Config,
    checkpoint: str,
    out: str,
    format: str,
    head: bool = False,
    images: Sequence[str] = (),
    image_size: Tuple[int, int] = (224, 224),
    tolerance: Optional[float] = None,
    overwrite: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    ema: Optional[bool] = None,
    unsafe: bool = False,
) -> Exported:
    """Write a trained checkpoint's network for a runtime, and prove it.

    Args:
        cfg: As of :func:`deploy_checkpoint`, as are those not named here.
        checkpoint: Path of the trained checkpoint.
        out: The file to write, of the format's suffix.
        format: ``onnx``, ``torchscript`` or ``torch.export``.
        head: Whether a detector's dense head is exported too.
        images: Paths of images to compare on.
        image_size: Height and width in pixels that the network will take.
        tolerance: Largest difference allowed.
        overwrite: Whether an existing output may be replaced.
        seed: For the random images.
        dtype: What kernels and norms are composed in.
        ema: Whether to take averaged weights.
        unsafe: Whether to run what code the checkpoint holds.

    Raises:
        UserError: If an input is wrong, a package is missing, or the file
            differs from the network.
    """
    file_format(format, out)  # before the work
    refuse_inputs([out], checkpoint, cfg.filename)
    merged = merge_checkpoint(
        cfg, checkpoint, fuse=True, dtype=dtype, ema=ema, unsafe=unsafe
    )
    own = merged.meta['mmdbb']
    trained = merged.trained.float()
    return export_network(
        merged.network,
        out,
        format,
        image_size,
        head,
        fold_norms=False,  # they are
        images=input_batches(trained, images, image_size, seed),
        tolerance=merged.tolerance if tolerance is None else tolerance,
        overwrite=overwrite,
        seed=seed,
        reference=trained,
        notes={key: own[key] for key in ('weights', 'source_sha256')},
    )


def output_paths(out: str) -> Tuple[str, str]:
    """The checkpoint and the config beside it.

    Raises:
        UserError: If ``out`` has no suffix of a checkpoint.
    """
    suffix = next((s for s in SUFFIXES if out.endswith(s)), None)
    if suffix is None:
        raise UserError(
            f'the output must end in {" or ".join(SUFFIXES)}, got {out}'
        )
    return out, out[: -len(suffix)] + '.py'


def refuse_inputs(outputs: Sequence[str], *inputs: Optional[str]) -> None:
    """Raise if a file would be written over one that is read.

    Args:
        outputs: Paths to write.
        inputs: Paths to read; None for what came from no file.

    Raises:
        UserError: It names the path.
    """
    for path in outputs:
        for source in inputs:
            if source and Path(path).resolve() == Path(source).resolve():
                raise UserError(f'output {path} is also an input')


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())
