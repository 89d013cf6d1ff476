# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What mmdbb notes of the network in a file, because its config cannot."""

from __future__ import annotations

import enum
from typing import Optional

from mmdbb.files.formats import OWN


class Structure(str, enum.Enum):
    """How the network in a file differs from the one that was trained."""

    #: It has all of its blocks, to train on.
    TRAIN = 'train'
    #: All blocks are merged: the network that the OpenMMLab package builds.
    STOCK = 'stock'
    #: As ``STOCK``, and norms are folded into the convolutions before them.
    FUSED = 'fused'
    #: Some blocks are merged; building the network needs mmdbb.
    PARTIAL = 'partial'
    #: As ``STOCK``, with fewer filters than the config says.
    PRUNED = 'pruned'


def written_structure(checkpoint: dict) -> Optional[Structure]:
    """The structure that mmdbb noted in a checkpoint.

    Args:
        checkpoint: What :func:`mmdbb.files.checkpoints.read_checkpoint` read.

    Returns:
        Structure: None if the file notes none that is known, as the files of
        other programs do not.
    """
    own = checkpoint['meta'].get(OWN)
    noted = own.get('structure') if isinstance(own, dict) else None
    # A damaged file may note anything, arrays too.
    if not isinstance(noted, str):
        return None
    return next((s for s in Structure if s.value == noted), None)
