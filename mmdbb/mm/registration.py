# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What ``import mmdbb`` tells mmengine and mmcv, and what it hears of them."""

from __future__ import annotations

from types import FrameType
from typing import Callable, Optional

import mmcv.cnn  # noqa: F401  (registers the norms)
from mmengine.registry import MODELS

from mmdbb.blocks.build import layer_of
from mmdbb.mm import (
    host_internals,
    upsample,  # noqa: F401
)
from mmdbb.mm.data_flow import run_on_image
from mmdbb.mm.deploy.images import data_samples
from mmdbb.mm.engine import (  # noqa: F401
    blocks_hook,
    branch_shares_hook,
    data_check,
    layer_decay,
    optim,
    reparam_hook,
    repeatable,
    repopt,
    whole_checkpoints,
)
from mmdbb.mm.host_loading import read_address, read_as_data
from mmdbb.mm.starts import (  # noqa: F401
    backbone,
    official,
    plain,
    torch_default,
)
from mmdbb.mm.starts import repopt as repopt_start  # noqa: F401
from mmdbb.mm.stock import by_name  # noqa: F401
from mmdbb.mm.stock.config import named_block
from mmdbb.ports import PORTS, ReplacedLayer
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


def _builder_of(block: type, caller: FrameType) -> Optional[Callable]:
    """The function that builds a block from ``conv_cfg``, if mmcv asks."""
    is_layer = host_internals.builds_conv_layer(caller)
    return layer_of(block) if is_layer else None


def _replaced_layer(block: type) -> ReplacedLayer:
    """What the config of a block replaces in the network being built."""
    return host_internals.replaced_layer(
        lambda layer: named_block(layer) is block
    )


PORTS.builder_of = _builder_of
PORTS.replaced_layer = _replaced_layer
PORTS.find_layer = _find_layer
PORTS.read_address = read_address
PORTS.data_samples = data_samples
PORTS.run_network = run_on_image
host_internals.plug_in(PORTS)
BLOCKS.follow(_register_layer)
host_internals.cure_config_bases()
read_as_data()
