# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Drop the branches of a trained checkpoint that add little, and prove it.

What they add is folded into the ``kxk`` branches, so that the network computes
the same in eval mode; see :mod:`mmdbb.drop_branches`. Training goes on from
the files that are written, with fewer branches.
"""

from __future__ import annotations

import copy
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

from mmdbb.compare import Difference
from mmdbb.drop_branches import drop_branches_, weak_branches
from mmdbb.errors import UserError
from mmdbb.mm.deploy.merge import trained_network
from mmdbb.mm.outputs import Contents, Proof, Source, output_paths, writing
from mmdbb.mm.stock.by_name import without_branches
from mmdbb.mm.structure import Structure
from mmdbb.modules import count_parameters
from mmdbb.proof import prove_equal
from mmdbb.shares import BlockShares, model_shares


class BranchesDropped(NamedTuple):
    """The files that :func:`drop_branches_checkpoint` wrote.

    Attributes:
        checkpoint: Path of the weights, to load or to train on from.
        config: Path of the config of the network with fewer branches.
        dropped: Names of blocks -> the branches that were dropped.
        shares: Names of blocks -> the shares of all their branches, before.
        parameters: Numbers of parameters before and after.
        difference: Difference between the outputs of the two networks, and
            what could not be compared.
        weights: The source's weights that were taken (such as the averaged
            ones), in words.
    """

    checkpoint: str
    config: str
    dropped: Dict[str, List[str]]
    shares: Dict[str, BlockShares]
    parameters: Tuple[int, int]
    difference: Difference
    weights: str


def branch_report(source: Source) -> Dict[str, BlockShares]:
    """Measure what each branch of a trained checkpoint adds.

    Args:
        source: The trained checkpoint and its config.

    Returns:
        dict: Names of blocks -> the shares of their branches.

    Raises:
        UserError: If an input is wrong, or the network has no blocks.
    """
    state = source.read()['state_dict']
    trained = trained_network(source.config, state, source.checkpoint)
    try:
        return model_shares(trained)
    except ValueError as error:
        raise UserError(f'{source.checkpoint}: {error}') from error


def drop_branches_checkpoint(
    source: Source,
    out: str,
    threshold: float = 0.05,
    proof: Optional[Proof] = None,
    overwrite: bool = False,
) -> BranchesDropped:
    """Write a checkpoint and a config without the branches that add little.

    The files appear only if the network without these branches gives the same
    outputs in eval mode as the trained one.

    Args:
        source: The trained checkpoint and its config.
        out: Path of the checkpoint to write, ``*.pth`` or ``*.safetensors``;
            its config is written beside it as ``*.py``.
        threshold: Largest share of a branch to drop, see
            :class:`~mmdbb.shares.BranchShare`.
        proof: Images to compare the two networks on, and the tolerance.
        overwrite: Whether existing outputs may be replaced.

    Raises:
        UserError: If an input is wrong, no branch is as weak as that, an
            output cannot be written, or the networks differ.
    """
    proof = proof or Proof()
    checkpoint, config = output_paths(out)
    with writing(
        source, checkpoint, config, inputs=proof.paths, overwrite=overwrite
    ) as drafts:
        loaded = source.read()
        trained = trained_network(
            source.config, loaded['state_dict'], source.checkpoint
        )
        dtypes = {n: t.dtype for n, t in trained.state_dict().items()}
        trained = trained.double()
        try:
            shares = model_shares(trained)
            dropped = weak_branches(trained, threshold)
        except ValueError as error:
            raise UserError(f'{source.checkpoint}: {error}') from error
        if not dropped:
            raise UserError(
                f'no branch that could be folded into a kxk branch has a '
                f'share of {threshold} or less of its merged kernel'
            )
        fewer = copy.deepcopy(trained)
        drop_branches_(fewer, dropped)
        contents = Contents(
            cfg=without_branches(source.config, dropped),
            state=fewer.state_dict(),
            structure=Structure.TRAIN,
            weights=loaded['weights'],
            dtypes=dtypes,
            meta=loaded['meta'],
            notes=dict(dropped_branches=dropped, threshold=threshold),
        )
        parameters = count_parameters(trained), count_parameters(fewer)
        network = drafts.network(contents)
        difference = prove_equal(
            trained, network, proof.batches(trained), proof.tolerance
        )
        drafts.write(contents.noting(max_error=difference.largest))
    return BranchesDropped(
        checkpoint=checkpoint,
        config=config,
        dropped=dropped,
        shares=shares,
        parameters=parameters,
        difference=difference,
        weights=loaded['weights'],
    )


def table(shares: Dict[str, BlockShares]) -> Iterator[str]:
    """Lines of a table: block, branch, share, projection, largest cosine.

    Args:
        shares: Names of blocks -> the shares of their branches.
    """
    width = max(map(len, [*shares, 'block']))
    yield f'{"block":{width}}  branch      share  projection  closest'
    for name, block in shares.items():
        for key, branch in block.branches.items():
            others = branch.cosines
            closest = max(others, key=lambda k: abs(others[k]), default='')
            angle = f'{closest} {others[closest]:+.2f}' if closest else ''
            yield (
                f'{name:{width}}  {key:10}  {branch.share:5.3f}  '
                f'{branch.projection:+10.3f}  {angle}'
            ).rstrip()
