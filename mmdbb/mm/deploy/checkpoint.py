# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merge a trained checkpoint into the stock network's files, and prove them.

The proof compares the written network with the one that was trained.
"""

from __future__ import annotations

from typing import List, NamedTuple, Optional, Tuple

import torch
from torch import nn

from mmdbb.compare import Difference
from mmdbb.files.checkpoints import compare_with_torch
from mmdbb.mm.deploy.merge import (
    MergeOptions,
    merge_checkpoint,
    trained_network,
)
from mmdbb.mm.outputs import Proof, Source, output_paths, writing
from mmdbb.mm.structure import Structure
from mmdbb.modules import count_parameters
from mmdbb.proof import own_rounding, prove_equal
from mmdbb.untouched import prove_untouched


class Deployed(NamedTuple):
    """The files that :func:`deploy_checkpoint` wrote, and their proof.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config of the written network.
        blocks: Number of blocks that were merged.
        parameters: Numbers of parameters before and after merging.
        difference: Difference between the outputs of the two networks, and
            what could not be compared.
        tolerance: Largest difference that was allowed.
        structure: ``STOCK``, ``FUSED`` or ``PARTIAL``.
        left: Number of blocks that were not merged.
        weights: The source's weights that were taken (such as the averaged
            ones), in words.
        rounding: How far the written network in float32 is from itself in
            float64, relative to an output's largest magnitude; None if it
            cannot be run.
        own: Names of blocks of other packages that were merged too.
        own_left: Whether such blocks are left.
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
    rounding: Optional[float]
    own: List[str]
    own_left: bool


def deploy_checkpoint(
    source: Source,
    out: str,
    options: Optional[MergeOptions] = None,
    proof: Optional[Proof] = None,
    overwrite: bool = False,
) -> Deployed:
    """Write the stock network of a trained checkpoint, and prove it equal.

    The files appear only if the network that their config builds gives the
    same outputs as the network with its branches. For that comparison the
    source is read a second time, unless ``source.unsafe`` allows it to run
    code, which then runs only once.

    Args:
        source: The trained checkpoint and its config.
        out: Path of the checkpoint to write, ``*.pth`` or
            ``*.safetensors``; its config is written beside it as ``*.py``.
        options: Which blocks to merge, and how. By default all are merged,
            and norms stay. If blocks are left, loading the files needs mmdbb.
        proof: Images to compare the two networks on, and the tolerance.
        overwrite: Whether existing outputs may be replaced.

    Raises:
        UserError: If an input is wrong, an output cannot be written, or the
            networks differ.
    """
    options, proof = options or MergeOptions(), proof or Proof()
    checkpoint, config = output_paths(out)
    with writing(
        source, checkpoint, config, inputs=proof.paths, overwrite=overwrite
    ) as drafts:
        merged = merge_checkpoint(source, options)
        parameters = (
            count_parameters(merged.trained),
            count_parameters(merged.network),
        )
        # Reading again would run the code of an unsafe file a second time.
        trained = merged.trained if source.unsafe else None
        merged = merged._replace(trained=None, network=None)
        contents = merged.contents
        network = drafts.network(contents)
        if trained is None:
            trained = _trained_again(source)
        batches = proof.batches(trained)
        difference = prove_equal(
            trained,
            network,
            batches,
            proof.tolerance,
            exact=options.dtype is torch.float64,
            own=merged.own,
            norms=merged.norms,
        )
        prove_untouched(trained, network, merged.norms, merged.own)
        del trained
        rounding = own_rounding(network, batches[0])
        del network
        drafts.write(
            contents.noting(
                max_error=difference.largest,
                tolerance=difference.tolerance,
                not_compared=dict(difference.left_out),
                own_rounding=rounding,
            )
        )
    return Deployed(
        checkpoint=checkpoint,
        config=config,
        blocks=len(merged.merged),
        parameters=parameters,
        difference=difference,
        tolerance=difference.tolerance,
        structure=contents.structure,
        left=merged.left,
        weights=contents.weights,
        rounding=rounding,
        own=merged.own,
        own_left=merged.own_left,
    )


def _trained_again(source: Source) -> nn.Module:
    """Read the source a second time, and build the trained network of it."""
    state = source.read()['state_dict']
    compare_with_torch(state, source.checkpoint, source.ema)
    return trained_network(source.cfg, state, source.checkpoint)
