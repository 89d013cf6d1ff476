# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What ``import mmdbb`` tells mmengine and mmcv, and what it hears of them."""

from __future__ import annotations

from typing import Optional

import mmcv.cnn  # noqa: F401  (registers the norms)
from mmengine.registry import MODELS

from mmdbb.blocks.build import layer_of
from mmdbb.mm import host_internals
from mmdbb.mm.deploy.images import data_samples
from mmdbb.mm.engine import (  # noqa: F401
    optim,
    reparam_hook,
    repeatable,
    whole_checkpoints,
)
from mmdbb.mm.host_loading import read_address, read_as_data
from mmdbb.mm.starts import (  # noqa: F401
    backbone,
    official,
    plain,
    torch_default,
)
from mmdbb.ports import PORTS
from mmdbb.registry import BLOCKS


def _register_layer(name: str, block: type, force: bool) -> None:
    """Make ``conv_cfg=dict(type=name)`` build a block.

    The root registry is the one that all of OpenMMLab's packages fall back
    to; see docs/design.md.
    """
    MODELS.register_module(name=name, module=layer_of(block), force=force)


def _find_layer(name: str) -> Optional[object]:
    """The class, or the function, that a type in a config names."""
    with MODELS.switch_scope_and_registry(None) as registry:
        layer = registry.get(name)
    return getattr(layer, 'block', layer)


PORTS.find_layer = _find_layer
PORTS.read_address = read_address
PORTS.data_samples = data_samples
host_internals.plug_in(PORTS)
BLOCKS.follow(_register_layer)
host_internals.cure_config_bases()
read_as_data()
