# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""RepOptimizer in a config: scaled gradients, and the file of the scales.

See :mod:`mmdbb.repopt`.
"""

from __future__ import annotations

import re
from typing import Dict, Optional

from mmengine.optim import OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import load_strictly
from mmdbb.files.sources import some
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine.optim import ReparamOptimWrapperConstructor
from mmdbb.mm.outputs import Source, writing
from mmdbb.repopt import (
    ConvScales,
    branch_scales,
    check_scales,
    load_scales,
    save_scales,
    scale_gradients_,
)

#: A scale in the files of the paper's code, of its RepOpt-VGG.
_OFFICIAL = re.compile(
    r'stage(?:0|(\d+)\.(\d+))\.scale_(conv|1x1|identity)\.weight'
)


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class RepOptimWrapperConstructor(ReparamOptimWrapperConstructor):
    """Builds an SGD that trains a plain network as one of scaled branches.

    Each step multiplies the gradients of the convolutions that have scales,
    see :func:`mmdbb.repopt.scale_gradients_`. Momentum, weight decay, mixed
    precision, gradient accumulation and clipping are the wrapper's own. The
    network is plain, so that nothing has to be merged.

    ``paramwise_cfg`` takes the rules of
    :class:`~mmdbb.mm.engine.optim.ReparamOptimWrapperConstructor`, and:

    - ``scales``: the file that ``tools/repopt.py`` wrote.

    Put ``init_cfg=dict(type='RepOpt', scales=...)`` into the model's config
    too: it starts the network as scaled branches start.

    Args:
        optim_wrapper_cfg: Config of the optimizer wrapper; its ``optimizer``
            is an SGD.
        paramwise_cfg: The file, and rules with their values.

    Raises:
        UserError: If the file is missing, or does not fit the network; or the
            optimizer is no SGD.
        ValueError: If ``scales`` is not given, or a rule is wrong.
    """

    def __init__(
        self, optim_wrapper_cfg: dict, paramwise_cfg: Optional[dict] = None
    ) -> None:
        rules = dict(paramwise_cfg or {})
        self.scales = rules.pop('scales', None)
        if not isinstance(self.scales, str):
            raise ValueError(
                'paramwise_cfg needs scales, the path of the file that '
                f'tools/repopt.py wrote; got {self.scales!r}'
            )
        super().__init__(optim_wrapper_cfg, rules)

    def __call__(self, model: nn.Module) -> OptimWrapper:
        """Build the optimizer and its wrapper for a model.

        Args:
            model: The plain model, or a distributed wrapper of it.
        """
        wrapper = super().__call__(model)
        scales = load_scales(self.scales)
        try:
            scale_gradients_(wrapper.optimizer, model, scales)
        except (TypeError, ValueError) as error:
            raise UserError(f'{self.scales}: {error}') from error
        return wrapper


def write_scales(
    source: Source, out: str, overwrite: bool = False
) -> Dict[str, ConvScales]:
    """Write the scales of a search, for the training of the plain network.

    Args:
        source: The checkpoint of the search and its config. The files of the
            paper's code for RepOpt-VGG are read too; the config is then that
            of a RepVGG, whose layers they are checked with.
        out: The file to write, ``*.pth`` or ``*.safetensors``.
        overwrite: Whether an existing file may be replaced.

    Returns:
        dict: Names of convolutions -> their scales.

    Raises:
        UserError: If an input is wrong, the network has no scales, or the
            output cannot be written.
    """
    cfg, path = source.config, source.checkpoint
    with writing(source, out, overwrite=overwrite) as drafts:
        state = source.read()['state_dict']
        model = build_model(cfg)
        scales = _official(state)
        try:
            if scales:
                check_scales(model, scales, blocks=True)
            else:
                load_strictly(model, state, path)
                scales = branch_scales(model)
        except ValueError as error:
            raise UserError(f'{path}: {error}') from error
        save_scales(scales, drafts.paths[0])
    return scales


def _official(state: Dict[str, Tensor]) -> Dict[str, ConvScales]:
    """Scales under the names of the paper's code; empty if they are not.

    Raises:
        UserError: If only some entries are scales of it.
    """
    found = {n: m for n in state if (m := _OFFICIAL.fullmatch(n))}
    if not found:
        return {}
    whole = any(name.endswith('.conv.weight') for name in state)
    strange = [n for n in state if n not in found]
    if strange and not whole:
        raise UserError(
            f'next to scales of RepOpt-VGG, {some(strange)} are none'
        )
    scales: Dict[str, Dict[str, Tensor]] = {}
    for name, match in found.items():
        stage, unit, key = match.groups()
        place = f'stage_{stage}.{unit}' if stage else 'stem'
        own = scales.setdefault(f'backbone.{place}.branch_reparam', {})
        own['kxk' if key == 'conv' else key] = state[name]
    return {name: ConvScales([*own], own) for name, own in scales.items()}
