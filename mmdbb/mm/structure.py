# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The structure of the network in a file, which mmdbb notes in the file.

The config cannot tell it: it does not know folded norms or pruned filters.
"""

from __future__ import annotations

import enum
from typing import Optional

from mmdbb.files.formats import OWN


class Structure(str, enum.Enum):
    """How the network in a file differs from the one that was trained."""

    #: Not at all: it still has all of its blocks, and can be trained on.
    TRAIN = 'train'
    #: All blocks are merged: the network that the OpenMMLab package builds.
    STOCK = 'stock'
    #: ``STOCK`` with norms folded into the convolutions before them.
    FUSED = 'fused'
    #: Some blocks are merged; building the network needs mmdbb.
    PARTIAL = 'partial'
    #: ``STOCK`` with fewer filters than the config says.
    PRUNED = 'pruned'


def written_structure(checkpoint: dict) -> Optional[Structure]:
    """The structure that mmdbb noted in a checkpoint.

    Args:
        checkpoint: Content of the checkpoint, read by
            :func:`mmdbb.files.checkpoints.read_checkpoint`.

    Returns:
        Structure: The structure; None if the file notes no known one, such as
        a file of another program.
    """
    own = checkpoint['meta'].get(OWN)
    noted = own.get('structure') if isinstance(own, dict) else None
    # A damaged file may note anything, arrays too.
    if not isinstance(noted, str):
        return None
    return next((s for s in Structure if s.value == noted), None)
