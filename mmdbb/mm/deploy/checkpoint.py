# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""From a trained checkpoint to the files of the stock network, proven."""

from __future__ import annotations

from typing import NamedTuple, Optional, Tuple

import torch
from torch import nn

from mmdbb.compare import (
    SMALLEST_CHANNEL,
    TOLERANCE,
    Difference,
    prove_equal,
)
from mmdbb.files.checkpoints import compare_with_torch
from mmdbb.mm.deploy.merge import (
    MergeOptions,
    merge_checkpoint,
    trained_network,
)
from mmdbb.mm.outputs import Proof, Source, output_paths, writing
from mmdbb.mm.structure import Structure
from mmdbb.modules import count_parameters
from mmdbb.untouched import prove_untouched


class Deployed(NamedTuple):
    """What :func:`deploy_checkpoint` wrote.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config of the stock network.
        blocks: How many blocks were merged.
        parameters: Numbers of parameters before and after.
        difference: How far the two networks are apart.
        tolerance: How far they might have been.
        structure: ``STOCK``, ``FUSED`` or ``PARTIAL``.
        left: How many blocks were left as they are.
        weights: Which weights were taken from the source.
    """

    checkpoint: str
    config: str
    blocks: int
    parameters: Tuple[int, int]
    difference: Difference
    tolerance: float
    structure: Structure
    left: int
    weights: str


def deploy_checkpoint(
    source: Source,
    out: str,
    options: Optional[MergeOptions] = None,
    proof: Optional[Proof] = None,
    overwrite: bool = False,
) -> Deployed:
    """Write the stock network of a trained checkpoint, and prove it equal.

    Nothing is written unless the network of the written files gives the same
    outputs as the network with its branches, which is read a second time.

    Args:
        source: The trained checkpoint and its config.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``; its config is written beside it as ``*.py``.
        options: How to merge; by default everything, and norms stay. Where
            blocks are left, what is written needs mmdbb.
        proof: What to compare the two networks on.
        overwrite: Whether existing outputs may be replaced.

    Raises:
        UserError: If an input is wrong, or the networks differ.
    """
    options, proof = options or MergeOptions(), proof or Proof()
    tolerance = TOLERANCE if proof.tolerance is None else proof.tolerance
    checkpoint, config = output_paths(out)
    with writing(
        source, checkpoint, config, inputs=proof.paths, overwrite=overwrite
    ) as drafts:
        merged = merge_checkpoint(source, options)
        parameters = (
            count_parameters(merged.trained),
            count_parameters(merged.network),
        )
        # It is read again, if that does not run the file's code again.
        trained = merged.trained if source.unsafe else None
        merged = merged._replace(trained=None, network=None)
        contents = merged.contents
        network = drafts.network(contents)
        if trained is None:
            trained = _trained_again(source)
        # What is composed in less has errors of the largest channel's size.
        exact = options.dtype is torch.float64
        difference = prove_equal(
            trained,
            network,
            proof.batches(trained),
            tolerance,
            SMALLEST_CHANNEL if exact else 1.0,
        )
        prove_untouched(trained, network)
        del trained, network
        drafts.write(
            contents.noting(max_error=difference.largest, tolerance=tolerance)
        )
    return Deployed(
        checkpoint=checkpoint,
        config=config,
        blocks=len(merged.merged),
        parameters=parameters,
        difference=difference,
        tolerance=tolerance,
        structure=contents.structure,
        left=merged.left,
        weights=contents.weights,
    )


def _trained_again(source: Source) -> nn.Module:
    """The network that was trained, by a second read of its weights."""
    state = source.read()['state_dict']
    compare_with_torch(state, source.checkpoint, source.ema)
    return trained_network(source.cfg, state, source.checkpoint)
