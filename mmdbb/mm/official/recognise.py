# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Recognise the network in a checkpoint of the papers' repositories.

For the repositories of DBB (https://github.com/DingXiaoH/DiverseBranchBlock)
and of OREPA (https://github.com/JUGGHM/OREPA_CVPR2022); the others are in
:mod:`mmdbb.mm.official.newer`. The name of an entry
is the name of a layer (convolution and norm, or a block) followed by a rest.
The rests tell the kind of a layer; the names of the layers and the shapes of
their kernels tell the network.
"""

from __future__ import annotations

import re
from typing import Dict, List, NamedTuple, Optional, Tuple, Union

from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.files.sources import some
from mmdbb.mm.config_types import class_of, is_own
from mmdbb.mm.official.networks import NETWORKS, Network, Place
from mmdbb.mm.official.newer import NewerNetwork, newer_network
from mmdbb.official import names as official_names
from mmdbb.official.names import BlockNames, settle_entries_, translate


class Form(NamedTuple):
    """A form that a layer can have in a file.

    Attributes:
        kernel: Name of the entry that holds a kernel of the layer's size.
        sign: Name of an entry that tells the form, together with ``kernel``.
        conv: Start of the convolution's names, if the layer is one.
        block: Names in the block, if the layer is a block in training.
    """

    kernel: str
    sign: str
    conv: str = ''
    block: Optional[BlockNames] = None

    @property
    def merged(self) -> bool:
        """Whether the layer is one convolution with a bias."""
        return self.block is None and not self.norm

    @property
    def norm(self) -> bool:
        """Whether the layer's entries include a norm ``bn`` that follows."""
        return self.block.norm if self.block else self.sign == 'bn.weight'

    @property
    def block_name(self) -> Optional[str]:
        """The block's name in configs; None if the layer is no block."""
        return self.block and self.block.block


#: The blocks that the papers' networks have.
BLOCKS = [names for names in official_names.BLOCKS if names.block]
FORMS = (
    Form('conv.weight', 'bn.weight', 'conv.'),
    Form('conv.weight', 'conv.bias', 'conv.'),
    *(Form(b.kernel, b.kernel, block=b) for b in BLOCKS),
    *(
        Form(f'{b.merged}weight', f'{b.merged}weight', b.merged)
        for b in BLOCKS
    ),
)


class Layer(NamedTuple):
    """A layer of an official network.

    Attributes:
        form: The layer's form in the file.
        entries: Rests of the entries' names -> tensors.
    """

    form: Form
    entries: Dict[str, Tensor]

    @property
    def kernel_shape(self) -> Tuple[int, ...]:
        """Shape of the kernel: (out, in / groups, kH, kW)."""
        return tuple(self.entries[self.form.kernel].shape)

    def names(
        self, place: Place, network: Network, hosts: bool = True
    ) -> Dict[str, str]:
        """Rests of the entries' names -> our names, for those we know.

        Args:
            place: Names of the layer in our backbone.
            network: The family of the network.
            hosts: Whether the backbone has mmpretrain's block, if mmpretrain
                and mmdbb both have the block; otherwise it has mmdbb's.
        """
        form = self.form
        starts = [('bn.', f'{place.norm}.')] if form.norm else []
        if form.block is None:
            starts.append((form.conv, f'{place.conv}.'))
        elif hosts and form.block_name == network.host_block:
            for theirs, ours in form.block.inside:
                host = translate(ours, network.host_names)
                starts.append((theirs, f'{place.block}.{host}'))
        else:
            starts += [(t, f'{place.conv}.{o}') for t, o in form.block.inside]
        names = {rest: translate(rest, starts) for rest in self.entries}
        return {rest: ours for rest, ours in names.items() if ours}


class OfficialNetwork(NamedTuple):
    """The network in an official file.

    Attributes:
        network: The network's family.
        layers: Names of layers -> layers.
        head: ``weight`` and ``bias`` of the classifier; empty without one.
        backbone: Config of our backbone.
        block: Name of the block that the network has; None if it has none,
            or is converted.
        merged: Whether the network is converted for inference.
    """

    network: Network
    layers: Dict[str, Layer]
    head: Dict[str, Tensor]
    backbone: dict
    block: Optional[str]
    merged: bool

    @property
    def has_blocks(self) -> bool:
        """Whether the backbone has blocks of mmdbb."""
        return self.block not in (None, self.network.host_block)

    @property
    def needs_mmdbb(self) -> bool:
        """Whether the backbone is one of mmdbb's own."""
        import mmdbb.mm.backbones  # noqa: F401

        return is_own(class_of(self.backbone['type']))

    def __str__(self) -> str:
        """A description in one line, for messages."""
        cfg, name = self.backbone, self.network.name
        if 'groups' in cfg:
            name = 'ResNeXt'
        if 'stage_blocks' in cfg:
            name += f' of {"-".join(map(str, cfg["stage_blocks"]))} blocks'
        elif 'depth' in cfg:
            name += f'-{cfg["depth"]}'
        if isinstance(cfg.get('arch'), str):
            name += f'-{cfg["arch"]}'
        if 'base_channels' in cfg:
            name += f' of {cfg["base_channels"]} base channels'
        structure = 'converted' if self.merged else 'training-time'
        return f'{name}, {self.block or "no blocks"}, {structure}'


def recognise(
    state: Dict[str, Tensor], path: str
) -> Union[OfficialNetwork, NewerNetwork]:
    """Recognise architecture, block and structure by names and shapes.

    Args:
        state: Names of the official file -> tensors.
        path: Path of the file, for messages.

    Raises:
        UserError: If it is not a network of the papers, or a layer is missing
            or unknown.
    """
    newer = newer_network(state, path)
    if newer is not None:
        return newer
    state = _with_stage0(state)
    network = _network_of(state, path)
    head = {
        name.partition('.')[2]: value
        for name, value in state.items()
        if name in ('linear.weight', 'linear.bias')
    }
    layers = _layers_of(state, network, path)
    merged = {layer.form.merged for layer in layers.values()}
    blocks = {layer.form.block_name for layer in layers.values()} - {None}
    if len(merged) > 1 or len(blocks) > 1:
        raise UserError(
            f'{path} is neither a training-time nor a converted file: some '
            'of its layers are merged, or it mixes blocks; found '
            f'{sorted({layer.form.kernel for layer in layers.values()})}'
        )
    block = next(iter(blocks), None)
    try:
        shapes = {name: layer.kernel_shape for name, layer in layers.items()}
        backbone = network.backbone(shapes, block, merged.pop())
    except KeyError as error:
        raise UserError(
            f'{path} lacks layer {error.args[0]} of its {network.name}'
        ) from error
    except ValueError as error:
        raise UserError(f'{path}: {error}') from error
    is_merged = next(iter(layers.values())).form.merged
    return OfficialNetwork(network, layers, head, backbone, block, is_merged)


def _with_stage0(state: Dict[str, Tensor]) -> Dict[str, Tensor]:
    """Add 'stage0.' to names again, which old hdf5 files leave out."""
    if not any(name.startswith('stage1.') for name in state):
        return state
    return {
        name
        if re.match(r'stage\d|linear\.', name)
        else f'stage0.{name}': value
        for name, value in state.items()
    }


def _network_of(state: Dict[str, Tensor], path: str) -> Network:
    for network in NETWORKS:
        if any(network.sign.match(name) for name in state):
            return network
    raise UserError(
        f'{path} holds no network of the papers, whose names start as in '
        'stage1.0.conv1, stem.0.depthwise, stages.0.0.pwconv1.1, '
        'stages.0.blocks.0.large_kernel or stage1.0.rbr_conv; found '
        f'{some(list(state))}'
    )


def _layers_of(
    state: Dict[str, Tensor], network: Network, path: str
) -> Dict[str, Layer]:
    groups: Dict[str, Dict[str, Tensor]] = {}
    unknown: List[str] = []
    for name, value in state.items():
        match = network.layer.match(name)
        if match:
            groups.setdefault(match[1], {})[name[match.end() :]] = value
        elif name not in ('linear.weight', 'linear.bias'):
            unknown.append(name)
    layers = {}
    for name, entries in groups.items():
        form = _form_of(entries)
        if form is None:
            unknown += [f'{name}.{rest}' for rest in entries]
            continue
        settle_entries_(entries)
        layers[name] = layer = Layer(form, entries)
        known = layer.names(network.place(name), network)
        unknown += [f'{name}.{rest}' for rest in entries if rest not in known]
        if len(layer.kernel_shape) != 4 or 0 in layer.kernel_shape:
            raise UserError(
                f'{path}: {name}.{form.kernel} is no kernel: its shape is '
                f'{layer.kernel_shape}'
            )
    if unknown:
        raise UserError(
            f'{path} looks like a {network.name} of the papers, but has '
            f'entries that it does not have: {some(unknown)}'
        )
    return layers


def _form_of(entries: Dict[str, Tensor]) -> Optional[Form]:
    for form in FORMS:
        if form.kernel in entries and form.sign in entries:
            return form
    return None
