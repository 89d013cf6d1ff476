# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The places where OpenMMLab's packages plug in, if they are installed.

The blocks need torch only. If mmengine and mmcv are installed, these decide a
few things: which norm a config names, how ``init_cfg`` is applied, where log
messages go. Each is an attribute of :data:`PORTS`. The defaults work without
the packages; :mod:`mmdbb.mm.registration` replaces them by functions of the
packages.
"""

from __future__ import annotations

import logging
from types import FrameType
from typing import Callable, Dict, NamedTuple, Optional

from torch import Tensor, nn

from mmdbb.errors import UserError


def _log(message: str, level: int = logging.INFO) -> None:
    logging.getLogger('mmdbb').log(level, message)


def _initialize(module: nn.Module, init_cfg) -> None:
    raise UserError(
        f'init_cfg={init_cfg!r} of a {type(module).__name__} is a rule of '
        'mmengine, which is not installed; initialise the block after it is '
        'built, or install mmengine and mmcv'
    )


def _read_address(address: str) -> dict:
    raise UserError(
        f'{address} is an address, which mmengine reads, and mmengine is not '
        'installed; give the path of a file, or a state dict'
    )


def _no_data_samples(images: Tensor) -> None:
    """Without mmengine there are none."""


class ReplacedLayer(NamedTuple):
    """What the config of a block replaces in a network of a host.

    Attributes:
        owner: Name of the host's class that was given the block's config.
        type: Type of the layer that this class has by default.
        spectral: Whether the block would stand in a module that normalises
            the weight of its convolution.
    """

    owner: str = ''
    type: str = 'Conv2d'
    spectral: bool = False


class Ports:
    """Functions that OpenMMLab's packages provide, and their defaults.

    Attributes:
        find_layer: Looks up a type from a config in OpenMMLab's registry;
            returns the class or function, or None.
        initialize: Applies ``init_cfg`` to a module.
        is_host_rule: Tells whether a function given to ``Module.apply`` is an
            initialisation rule of an OpenMMLab package.
        refuse_fusion: Gets a block and the frame of a caller that asks for
            the block's children; raises if the caller is mmcv's
            ``fuse_conv_bn``, which would fuse the norm behind the block into
            a convolution before it.
        builder_of: Gets a block's class and the frame of whoever calls it.
            If that is mmcv's ``build_conv_layer``, which got the class as the
            type of a layer's config, returns the function that builds from
            such a config; else None.
        replaced_layer: Gets a block's class. While an OpenMMLab package
            builds a network, returns what the block's config replaces there.
        class_of_layer: The class of a convolution; torch's own for a subclass
            of a package's that computes the same.
        log: Writes a message to the log.
        read_address: Reads a checkpoint from an address such as
            ``torchvision://resnet50``.
        data_samples: Makes what the packages' networks read beside a batch of
            images (N, C, H, W) of equal sizes: a list of N data samples; None
            without mmengine.
        start_plain: Computes the entries with which a block equals a plain
            convolution, and the norm behind it; :mod:`mmdbb.plain.blocks`,
            which stands above the blocks, plugs it in.
        run_network: Runs a network on a random image, whatever its inputs
            are, and returns its outputs; None without mmengine.
        history: Builds mmengine's ``HistoryBuffer`` from its largest length,
            its values and their counts; None without mmengine.
        classes: Full names -> classes of mmengine whose methods are pickled
            in checkpoints.
    """

    def __init__(self) -> None:
        self.find_layer: Callable[[str], Optional[object]] = lambda name: None
        self.initialize: Callable[..., None] = _initialize
        self.is_host_rule: Callable[[Callable], bool] = lambda rule: False
        self.refuse_fusion: Callable[[nn.Module, FrameType], None] = (
            lambda block, caller: None
        )
        self.builder_of: Callable[[type, FrameType], Optional[Callable]] = (
            lambda block, caller: None
        )
        self.replaced_layer: Callable[[type], ReplacedLayer] = lambda block: (
            ReplacedLayer()
        )
        self.class_of_layer: Callable[[nn.Module], type] = type
        self.log: Callable[..., None] = _log
        self.read_address: Callable[[str], dict] = _read_address
        self.data_samples: Callable[[Tensor], Optional[list]] = (
            _no_data_samples
        )
        # None until the blocks are imported, and nobody calls it before.
        self.start_plain: Callable[..., Dict[str, Tensor]]
        self.start_plain = None  # type: ignore[assignment]
        self.run_network: Optional[Callable[[nn.Module], object]] = None
        self.history: Optional[Callable] = None
        self.classes: Dict[str, type] = {}


PORTS = Ports()
