# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge a trained checkpoint, and write the network for a runtime."""

from __future__ import annotations

import os
from typing import Optional

import torch

from mmdbb.mm.deploy.merge import MergeOptions, merge_checkpoint
from mmdbb.mm.export.formats import file_format
from mmdbb.mm.export.network import (
    Exported,
    ExportOptions,
    Head,
    check_head,
    write_network,
)
from mmdbb.mm.outputs import Proof, Source, writing


def export_checkpoint(
    source: Source,
    out: str,
    format: str,
    head: Head = False,
    dtype: torch.dtype = torch.float64,
    proof: Optional[Proof] = None,
    overwrite: bool = False,
    also_own: Optional[bool] = None,
) -> Exported:
    """Write a trained checkpoint's merged network for a runtime.

    The file appears only if it gives the outputs of the trained network.

    Args:
        source: The trained checkpoint and its config.
        out: Path of the file to write, with the suffix of the format.
        format: ``onnx``, ``torchscript`` or ``torch.export``.
        head: How much of a detector's head to export besides backbone and
            neck: False for nothing, True for the raw maps of the dense head,
            ``'boxes'`` for the boxes in the end (ONNX only).
        dtype: Precision in which kernels and norms are composed,
            ``torch.float64`` or ``torch.float32``.
        proof: Images to compare the file with the network on, the tolerance,
            and the size of the images that the file takes.
        overwrite: Whether an existing output may be replaced.
        also_own: Whether to merge blocks of other packages too; see
            :class:`~mmdbb.mm.deploy.merge.MergeOptions`.

    Raises:
        UserError: If an input is wrong, a package is missing, or the file
            differs from the network.
    """
    out, proof = os.fspath(out), proof or Proof()
    file_format(format, out)  # refuses before the work starts
    check_head(head, format)
    with writing(
        source, out, inputs=proof.paths, overwrite=overwrite
    ) as drafts:
        merged = merge_checkpoint(
            source, MergeOptions(fuse=True, dtype=dtype, also_own=also_own)
        )
        trained, contents = merged.trained.float(), merged.contents
        result = write_network(
            merged.network,
            drafts.paths[0],
            # Norms are folded already.
            ExportOptions(format=format, head=head, fold_norms=False),
            proof._replace(images=proof.batches(trained)),
            reference=trained,
            notes=source.notes(contents.structure, contents.weights),
        )
    return result._replace(path=out)
