# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to the files of the stock network, proven."""

from __future__ import annotations

import os
from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from mmengine.config import Config

from mmdbb.compare import (
    SMALLEST_CHANNEL,
    TOLERANCE,
    Difference,
    prove_equal,
)
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import (
    all_or_nothing,
    compare_with_torch,
    load_strictly,
    read_checkpoint,
)
from mmdbb.files.formats import SUFFIXES, write_checkpoint
from mmdbb.mm.config_files import files_of
from mmdbb.mm.deploy.images import input_batches
from mmdbb.mm.deploy.load import load_deployed
from mmdbb.mm.deploy.merge import merge_checkpoint, trained_network
from mmdbb.mm.export.formats import file_format
from mmdbb.mm.export.network import Exported, export_network
from mmdbb.modules import count_parameters
from mmdbb.untouched import prove_rounded, prove_untouched

#: Of what a runtime computes, in single precision.
EXPORT_TOLERANCE = 1e-4


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
    tolerance: float = TOLERANCE,
    overwrite: bool = False,
    seed: int = 0,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    ema: Optional[bool] = None,
    unsafe: bool = False,
) -> Deployed:
    """Write the stock network of a trained checkpoint, and prove it equal.

    Nothing is written unless the network of the written files gives the same
    outputs as the network with its branches, which is read a second time.

    Args:
        cfg: Config that the checkpoint was trained with.
        checkpoint: Path of the trained checkpoint.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``; its config is written beside it as ``*.py``.
        fuse: Whether to fold the norms into the convolutions too.
        images: Paths of images to compare on, besides random ones.
        image_size: Height and width in pixels to compare at.
        tolerance: Largest difference allowed before rounding, relative to
            the largest magnitude of a channel.
        overwrite: Whether existing outputs may be replaced.
        seed: For the random images.
        only: As of :func:`~mmdbb.mm.deploy.merge.merge_checkpoint`, as are
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
    refuse_inputs(outputs, cfg, checkpoint, *images)
    merged = merge_checkpoint(
        cfg, checkpoint, fuse, only, skip, dtype, ema, unsafe
    )
    parameters = tuple(
        count_parameters(m) for m in (merged.trained, merged.network)
    )
    # It is read again, if that does not run the file's code again.
    trained = merged.trained if unsafe else None
    merged = merged._replace(trained=None)
    exact, meta = merged.network.state_dict(), merged.meta
    with all_or_nothing(*outputs, overwrite=overwrite) as drafts:
        merged.cfg.dump(drafts[1])
        write_checkpoint(drafts[0], merged.rounded(), meta)
        network = load_deployed(drafts[1], drafts[0])
        load_strictly(network, exact, drafts[0], keep_dtype=True)
        if trained is None:
            state = read_checkpoint(checkpoint, ema)['state_dict']
            compare_with_torch(state, checkpoint, ema)
            trained = trained_network(cfg, state, checkpoint)
            del state
        # What is composed in less has errors of the largest channel's size.
        smallest = SMALLEST_CHANNEL if dtype is torch.float64 else 1.0
        difference = prove_equal(
            trained,
            network,
            input_batches(trained, images, image_size, seed),
            tolerance,
            smallest,
        )
        prove_untouched(trained, network)
        del trained
        meta['mmdbb'].update(max_error=difference.largest, tolerance=tolerance)
        write_checkpoint(drafts[0], merged.rounded(), meta)
        written = read_checkpoint(drafts[0])['state_dict']
        prove_rounded(written, exact, merged.dtypes)
    return Deployed(
        *outputs,
        len(merged.merged),
        parameters,
        difference,
        tolerance,
        merged.structure,
        merged.left,
        merged.weights,
    )


def export_checkpoint(
    cfg: Config,
    checkpoint: str,
    out: str,
    format: str,
    head: bool = False,
    images: Sequence[str] = (),
    image_size: Tuple[int, int] = (224, 224),
    tolerance: float = EXPORT_TOLERANCE,
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
    refuse_inputs([out], cfg, checkpoint, *images)
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
        tolerance=tolerance,
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


def refuse_inputs(
    outputs: Sequence[str], cfg: Optional[Config], *inputs: str
) -> None:
    """Raise if a file would be written over one that is read.

    Args:
        outputs: Paths to write.
        cfg: The config, which may have been read from several files; None if
            there is none.
        inputs: Paths of other files that are read.

    Raises:
        UserError: It names the path.
    """
    files = files_of(cfg) if cfg is not None else ()
    read = {os.path.realpath(path) for path in (*files, *inputs)}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f'output {path} is also an input')
