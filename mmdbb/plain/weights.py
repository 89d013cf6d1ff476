# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Load a plain network's weights into a network with blocks.

Each block starts as the plain convolution in whose place it stands; if it has
absorbed the norm, as convolution and norm (:mod:`mmdbb.plain.blocks`). All
other layers load their entries as they are.
"""

from __future__ import annotations

import itertools
import logging
import os
import re
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Union

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.offers import NORM_ENTRIES, AbsorbedNorm
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.files.sources import some, with_versions_of
from mmdbb.found_norms import absorbed_norms, find_norms
from mmdbb.modules import is_frozen_norm, is_norm, uncompiled
from mmdbb.plain.blocks import BRANCH_SCALE, copy_entries_, plain_start
from mmdbb.plain.branch_sums import NormValues
from mmdbb.ports import PORTS
from mmdbb.reparam import find_blocks, holds_blocks
from mmdbb.stock_weights import stem_in_sequence
from mmdbb.transforms import KernelBias

State = Dict[str, Tensor]
Rename = Callable[[str], str]


class PlainLoaded(NamedTuple):
    """What :func:`load_plain_weights_` did.

    Attributes:
        blocks: Names of the blocks that start as plain convolutions.
        missing: Names outside of blocks that the weights do not have.
        unexpected: Names in the weights for which the network has no place.
        mismatched: Names outside of blocks whose shapes differ. These are not
            loaded.
    """

    blocks: List[str]
    missing: List[str]
    unexpected: List[str]
    mismatched: List[str]


@torch.no_grad()
def load_plain_weights_(
    model: nn.Module,
    weights: Union[str, os.PathLike, State],
    prefix: Optional[str] = None,
    branch_scale: float = BRANCH_SCALE,
) -> PlainLoaded:
    """Load a plain network's weights into a network with blocks, in place.

    In eval mode the network then computes the same as the plain one. If a
    block cannot be filled, nothing is changed.

    Args:
        model: A network with blocks, or a part of one, such as its backbone.
        weights: A state dict, or the path of a checkpoint. With mmengine also
            an address, such as ``torchvision://resnet50`` or
            ``open-mmlab://resnet50_v1c``. Names may be those of torchvision
            or of OpenMMLab's packages, with or without ``backbone.``.
        prefix: Load only entries whose names begin with this, for example
            ``'backbone.'``, and leave it out.
        branch_scale: Start value of the gammas of all branches but ``kxk``,
            as a share of the gamma of ``kxk``, see :mod:`mmdbb.plain.blocks`.

    Returns:
        PlainLoaded: What was loaded and what was not. Missing, unexpected
        and misshapen entries outside of blocks are logged, as in mmengine.

    Raises:
        UserError: If the checkpoint cannot be read, the model has no blocks,
            or a block finds no weights or does not fit them.

    Examples:
        >>> from mmdbb import DBB
        >>> model = nn.Sequential(DBB(3, 8, 3)).eval()
        >>> plain = nn.Sequential(nn.Conv2d(3, 8, 3)).eval()
        >>> loaded = load_plain_weights_(model, plain.state_dict())
        >>> x = torch.rand(1, 3, 6, 5)
        >>> torch.allclose(model(x), plain(x), atol=1e-5)
        True
    """
    source = _source_of(weights)
    model = uncompiled(model)
    blocks = find_blocks(model)
    if not blocks:
        raise UserError(
            f'{type(model).__name__} has no blocks; a plain network loads '
            "plain weights by init_cfg of type 'Pretrained'"
        )
    state = state_under(weights, prefix)
    if holds_blocks(state, model):
        raise UserError(
            f'{source} is of a network with blocks, not of a plain one; load '
            "it by init_cfg of type 'Pretrained'"
        )
    places = _Places(model, blocks)
    state = _fitting_names(state, places.expected)
    starts, complaints = {}, []
    forgotten = places.forgotten(state)
    if forgotten:
        raise UserError(
            f'{source} has norms where the network has an nn.Identity: '
            f'{some(forgotten)}. Which block absorbed them is not known; '
            'insert_blocks_ and the backbones of mmdbb leave an AbsorbedNorm '
            'there, which tells'
        )
    for name, block in blocks.items():
        if block in starts:
            continue
        try:
            starts[block] = places.start_of(name, state, branch_scale)
        except ValueError as error:
            complaints.append(f'{name or "the block"}: {error}')
    if complaints:
        raise UserError(
            f'{source} does not fit the network; {some(complaints)}. If it '
            'has weights of one part of the network only, load it into that '
            'part, e.g. model.backbone'
        )

    plain = {n: v for n, v in places.outside.items() if n in state}
    mismatched = [n for n, v in plain.items() if v.shape != state[n].shape]
    loaded = PlainLoaded(
        list(blocks),
        [
            name
            for name in places.outside
            if name not in state and not name.endswith('num_batches_tracked')
        ],
        [name for name in state if name not in places.expected],
        mismatched,
    )
    for block, entries in starts.items():
        copy_entries_(block, entries)
    for name, value in plain.items():
        if name not in mismatched:
            value.copy_(state[name])
    _log(loaded, source)
    return loaded


class _Places:
    """Where a plain network's entries belong in a network with blocks.

    Args:
        model: The network with blocks.
        blocks: Its blocks by name.
    """

    def __init__(
        self, model: nn.Module, blocks: Dict[str, ReparamConv2d]
    ) -> None:
        modules = dict(model.named_modules(remove_duplicate=False))
        self.blocks = blocks
        absorbed = absorbed_norms(model)
        behind = {
            conv: norms[0]
            for conv, norms in find_norms(model).pairs.items()
            if conv in blocks and len(norms) == 1
        }
        self.norms = {
            conv: (norm, modules[norm])
            for conv, norm in {**behind, **absorbed}.items()
        }
        inside = tuple(f'{name}.' if name else '' for name in blocks)
        #: Entries outside of blocks, which are loaded as they are.
        self.outside = {
            name: value
            for name, value in model.state_dict().items()
            if not name.startswith(inside)
        }
        self.expected = set(self.outside)
        for name in blocks:
            self.expected.update(_under(name, ('weight', 'bias')))
            norm, module = self.norms.get(name, (None, None))
            if isinstance(module, nn.Identity):
                self.expected.update(_under(norm, NORM_ENTRIES))
        #: Places where there may have been a norm that nobody remembers.
        self.empty = [
            name
            for name, module in modules.items()
            if isinstance(module, nn.Identity)
            and not isinstance(module, AbsorbedNorm)
            and name not in {norm for norm, _ in self.norms.values()}
        ]

    def forgotten(self, state: State) -> List[str]:
        """Norms in the weights for which the network has no more than a place.

        One of the blocks may have absorbed them, or none.
        """
        return [n for n in self.empty if f'{n}.running_mean' in state]

    def start_of(self, name: str, state: State, branch_scale: float) -> State:
        """Compute the entries that a block starts with.

        Raises:
            ValueError: If the weights lack an entry or do not fit the block.
        """
        block = self.blocks[name]
        kernel: Any
        bias: Any
        kernel, bias = (state.get(n) for n in _under(name, ('weight', 'bias')))
        norm, module = self.norms.get(name, (None, None))
        absorbed = isinstance(module, nn.Identity)
        missing = []
        if kernel is None:
            missing = _under(name, ('weight',))
        elif kernel.dim() != block.dims + 2:
            raise ValueError(
                f'the plain kernel has shape {tuple(kernel.shape)}'
            )
        elif bias is None:
            if block._wants_bias and not absorbed:
                missing = _under(name, ('bias',))
            bias = kernel.new_zeros(block.out_channels)
        values = None
        if absorbed or _is_tracking(module):
            mean, var, weight, shift, count = (
                state.get(n) for n in _under(norm, NORM_ENTRIES)
            )
            if mean is not None and var is not None:
                # No file holds the eps of the plain network's norms.
                eps: Any = getattr(module, 'eps', None)
                if eps is None:
                    # Of the norms in a config, all have the same.
                    norms = (m for m in block.modules() if is_norm(m))
                    eps = next((norm.eps for norm in norms), 0.0)
                values = NormValues(mean, var, weight, shift, eps, count)
            elif absorbed and getattr(module, 'returns', True):
                missing += _under(norm, ('running_mean', 'running_var'))
        if missing:
            raise ValueError(f'missing: {some(missing)}')
        if values is not None:
            channels = (block.out_channels,)
            for entry, value in zip(NORM_ENTRIES[:4], values[:4]):
                if value is not None and tuple(value.shape) != channels:
                    raise ValueError(
                        f'{norm}.{entry} has shape {tuple(value.shape)}, the '
                        f'block needs {channels}'
                    )
        return plain_start(
            block, KernelBias(kernel, bias), values, absorbed, branch_scale
        )


def _under(name: Optional[str], entries) -> List[str]:
    return [f'{name}.{entry}' if name else entry for entry in entries]


def _is_tracking(norm: Optional[nn.Module]) -> bool:
    tracks = isinstance(norm, _BatchNorm) and norm.track_running_stats
    return tracks or is_frozen_norm(norm)


def _source_of(weights: Union[str, os.PathLike, State]) -> str:
    """The path or address of weights, or words for a state dict."""
    if isinstance(weights, dict):
        return 'the state dict'
    if isinstance(weights, (str, os.PathLike)):
        return os.fspath(weights)
    raise TypeError(
        'weights must be a path, an address or a state dict, got a '
        f'{type(weights).__name__}'
    )


def state_under(
    weights: Union[str, os.PathLike, State], prefix: Optional[str]
) -> State:
    """Read weights, and keep those whose names begin with a prefix.

    Args:
        weights: Path or address of a checkpoint, or its state dict.
        prefix: The prefix, which is left out of the names; None for all
            weights.

    Raises:
        UserError: If the weights cannot be read, or no name has the prefix.
    """
    source = _source_of(weights)
    state = weights if isinstance(weights, dict) else _read(source)
    if not isinstance(state, dict) or not all(
        isinstance(value, Tensor) for value in state.values()
    ):
        raise UserError(f'{source} is no state dict: not all are tensors')
    start = prefix or ''
    start += '.' if start and not start.endswith('.') else ''

    def renamed(name: str) -> Optional[str]:
        name = re.sub(r'^module(\.|$)', '', name)
        within = f'{name}.'.startswith(start)
        return name[len(start) :] if within else None

    found: Dict[Any, Tensor]
    found = {renamed(name): value for name, value in state.items()}
    found.pop(None, None)
    if start and not found:
        raise UserError(f'{source} has nothing under {start}')
    return with_versions_of(state, found, renamed)


def _read(path: str) -> State:
    if '://' not in path:
        return read_checkpoint(os.path.expanduser(path))['state_dict']
    checkpoint = PORTS.read_address(path)
    return checkpoint.get('state_dict', checkpoint)


def _fitting_names(state: State, expected: set) -> State:
    """Rename entries so that most of them have names of the network.

    Args:
        state: The plain network's entries.
        expected: Names that the network with blocks looks for.
    """
    best = max(
        (
            {stem(place(name)): value for name, value in state.items()}
            for place, stem in itertools.product(_BACKBONES, _STEMS)
        ),
        key=lambda renamed: len(expected.intersection(renamed)),
    )
    return best


def _same(name: str) -> str:
    return name


def _bare(name: str) -> str:
    return re.sub(r'^backbone\.', '', name)


def _in_classifier(name: str) -> str:
    return (
        re.sub(r'^fc\.', 'head.fc.', name)
        if name[:3] == 'fc.'
        else (f'backbone.{name}')
    )


def _stem_in_modules(name: str) -> str:
    """Translate a deep stem's name in mmdet and mmseg into mmpretrain's."""
    match = re.fullmatch(r'((?:.*\.)?)stem\.([013467])\.(\w+)', name)
    if not match:
        return name
    number, is_norm = divmod(int(match[2]), 3)
    layer = 'bn' if is_norm else 'conv'
    return f'{match[1]}stem.{number}.{layer}.{match[3]}'


_BACKBONES: List[Rename] = [_same, _bare, _in_classifier]
_STEMS: List[Rename] = [_same, _stem_in_modules, stem_in_sequence]


def _log(loaded: PlainLoaded, source: str) -> None:
    PORTS.log(
        f'{len(loaded.blocks)} blocks start as the plain convolutions of '
        f'{source}'
    )
    for what, names in (
        ('missing in', loaded.missing),
        ('unexpected in', loaded.unexpected),
        ('of another shape in', loaded.mismatched),
    ):
        if names:
            PORTS.log(f'{what} {source}: {", ".join(names)}', logging.WARNING)
