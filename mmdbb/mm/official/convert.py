# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Convert checkpoints of the papers' repositories into mmpretrain's form.

Here are read all files that the repositories of DBB, OREPA, UniRepLKNet,
RepLKNet and MobileOne write: of training-time and of converted networks, as
``.pth``, ``.pth.tar``, or in the old form ``.hdf5`` with a data set for each
parameter.
"""

from __future__ import annotations

from typing import Dict, NamedTuple, Optional, Union

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb.errors import UserError
from mmdbb.files.checkpoints import in_mmengine_form, load_strictly
from mmdbb.files.hdf5 import is_hdf5, read_hdf5
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.hosts import require
from mmdbb.mm.official.newer import NewerNetwork
from mmdbb.mm.official.recognise import OfficialNetwork, recognise
from mmdbb.mm.outputs import Contents, Source, output_paths, writing
from mmdbb.mm.structure import Structure
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import norm_that_adds

AnyNetwork = Union[OfficialNetwork, NewerNetwork]

#: The validation pipeline of the papers' code (val_preprocess in utils.py),
#: which reads and resizes images with PIL.
TEST_PIPELINE = (
    dict(
        type='LoadImageFromFile',
        imdecode_backend='pillow',
        color_type='color_ignore_orientation',
    ),
    dict(type='ResizeEdge', scale=256, edge='short', backend='pillow'),
    dict(type='CenterCrop', crop_size=224),
    dict(type='PackInputs'),
)


class ConvertedOfficial(NamedTuple):
    """The files that :func:`convert_official` wrote.

    Attributes:
        checkpoint: Path of the weights.
        config: Path of the config.
        network: The network in the source.
        entries: Number of entries read from the source.
    """

    checkpoint: str
    config: str
    network: AnyNetwork
    entries: int


def convert_official(
    source: str,
    out: str,
    overwrite: bool = False,
    unsafe: Optional[bool] = None,
) -> ConvertedOfficial:
    """Convert an official checkpoint to mmpretrain's names, with a config.

    A training-time network keeps its blocks; a converted one becomes the
    stock network. The written files are read again before they appear.

    Args:
        source: Path of the official file.
        out: Path of the checkpoint to write, ``*.pth`` or ``*.safetensors``;
            its config is written beside it as ``*.py``.
        overwrite: Whether existing outputs may be replaced.
        unsafe: Whether code in the file may run. False and None forbid it;
            with False the error message names the option that allows it,
            with None the caller has no such option.

    Returns:
        ConvertedOfficial: The paths, and the network that was recognised.

    Raises:
        UserError: If the file cannot be read, holds no network of the papers,
            lacks entries or has unknown ones, or an output cannot be written.
    """
    checkpoint, config = output_paths(out)
    origin = Source(None, source, unsafe=unsafe)
    with writing(origin, checkpoint, config, overwrite=overwrite) as drafts:
        loaded = _read(origin)
        state = loaded['state_dict']
        network = recognise(state, source)
        if len(network.head) != 2 or network.head['weight'].dim() != 2:
            raise UserError(
                f'{source} has no classifier: linear.weight and linear.bias, '
                'or head.weight and head.bias'
            )
        require('mmpretrain')
        import mmdbb.mm.backbones  # noqa: F401

        cfg = classifier_config(network)
        model = build_model(cfg)
        weights = {
            f'backbone.{name}': value
            for name, value in backbone_state(network, model.backbone).items()
        }
        weights.update(
            {f'head.fc.{name}': value for name, value in network.head.items()}
        )
        load_strictly(model, weights, f'{source} ({network})')
        plain = network.block is None
        drafts.write(
            Contents(
                cfg=cfg,
                state=model.state_dict(),
                structure=Structure.STOCK if plain else Structure.TRAIN,
                weights=loaded['weights'],
                notes=dict(official=str(network)),
            )
        )
    return ConvertedOfficial(
        checkpoint=checkpoint,
        config=config,
        network=network,
        entries=len(state),
    )


def read_official(
    path: str, unsafe: Optional[bool] = None
) -> Dict[str, Tensor]:
    """Read the weights of an official file, names -> tensors.

    Args:
        path: Path of a file that ``torch.save`` wrote (a bare state dict, or
            one under ``state_dict``), or of a ``.hdf5`` file. Names lose
            ``module.`` at their start, and only there.
        unsafe: Whether code in the file may run. False and None forbid it;
            with False the error message names the option that allows it,
            with None the caller has no such option.

    Raises:
        UserError: If it cannot be read, or holds numbers that are not
            floating-point or not finite.
    """
    return _read(Source(None, path, unsafe=unsafe))['state_dict']


def _read(source: Source) -> dict:
    """Read an official file into the form that :meth:`Source.read` gives."""
    path = source.checkpoint
    if is_hdf5(path):
        loaded = in_mmengine_form(read_hdf5(path), path)
    else:
        loaded = source.read()
    for name, value in loaded['state_dict'].items():
        if name.endswith('num_batches_tracked'):
            continue
        if not value.is_floating_point():
            raise UserError(
                f'{path} has an entry that is not floating-point: {name} is '
                f'{str(value.dtype).rpartition(".")[2]}'
            )
    return loaded


def backbone_state(
    network: AnyNetwork, backbone: nn.Module
) -> Dict[str, Tensor]:
    """Weights for a backbone under its own names.

    A converted layer stores its bias in the convolution; here it moves into
    the batch norm that follows. If the backbone has a norm after a block, but
    the file has none, that norm gets values with which it changes nothing.

    Args:
        network: The network in an official file.
        backbone: The backbone that the weights are for; unchanged. Its
            entries tell where a bias goes.

    Returns:
        dict: Names -> tensors, for all entries of the file. It is not checked
        that they fit the backbone.
    """
    if isinstance(network, NewerNetwork):
        return network.state_for(backbone)
    modules = dict(backbone.named_modules())
    expected = backbone.state_dict()
    hosts = not find_blocks(backbone)
    state = {}
    for name, layer in network.layers.items():
        place = network.network.place(name)
        names = layer.names(place, network.network, hosts)
        state.update(
            {ours: layer.entries[rest] for rest, ours in names.items()}
        )
        norm = modules.get(place.norm)
        bias = f'{place.conv}.bias'
        if (
            layer.form.norm
            or bias in expected
            or not isinstance(norm, _BatchNorm)
        ):
            continue
        shift = state.pop(bias, None)
        if shift is None:
            shift = torch.zeros(layer.kernel_shape[0])
        state.update(norm_that_adds(shift, norm, place.norm))
    for name, value in expected.items():
        # torch before 0.4.1 did not count batches, so old files lack this.
        if name.endswith('num_batches_tracked'):
            state.setdefault(name, torch.zeros_like(value))
    return state


def load_official_backbone_(backbone: nn.Module, path: str) -> None:
    """Load an official file into a backbone, in place, without classifier.

    Args:
        backbone: For a training-time file, a backbone of mmdbb with the same
            block; for RepVGG's own block mmpretrain's RepVGG fits too. For a
            converted file, a plain ResNet of any OpenMMLab package, a plain
            MobileNet-V1 or a merged RepVGG.
        path: Path of the official file.

    Raises:
        UserError: If the file cannot be read or does not fit the backbone.
    """
    network = recognise(read_official(path), path)
    has_blocks = bool(find_blocks(backbone))
    # Both mmpretrain and mmdbb have RepVGG's own block, so both kinds fit.
    own_block = (
        isinstance(network, OfficialNetwork)
        and network.block
        and network.block == network.network.host_block
    )
    if has_blocks != network.has_blocks and not own_block:
        fits = network.backbone['type']
        raise UserError(
            f'{path} ({network}) fits a backbone such as {fits}, got a '
            f'{type(backbone).__name__} {"with" if has_blocks else "without"} '
            'blocks; docs/official_files.md says how to turn one into the '
            'other'
        )
    load_strictly(
        backbone, backbone_state(network, backbone), f'{path} ({network})'
    )


def classifier_config(network: AnyNetwork) -> Config:
    """Config of an image classifier in mmpretrain.

    For a classifier of 1000 classes (ImageNet's) the config also tests the
    network as the papers do.

    Args:
        network: The network in an official file, with its classifier.
    """
    classes, channels = network.head['weight'].shape
    cfg = dict(
        default_scope='mmpretrain',
        model=dict(
            type='ImageClassifier',
            # ImageNet's statistics of RGB pixels, from the papers' utils.py.
            data_preprocessor=dict(
                type='ClsDataPreprocessor',
                num_classes=classes,
                mean=[123.675, 116.28, 103.53],
                std=[58.395, 57.12, 57.375],
                to_rgb=True,
            ),
            backbone=network.backbone,
            neck=dict(type='GlobalAveragePooling'),
            head=dict(
                type='LinearClsHead',
                num_classes=classes,
                in_channels=channels,
                loss=dict(type='CrossEntropyLoss', loss_weight=1.0),
                topk=(1, 5) if classes >= 5 else (1,),
            ),
        ),
    )
    if classes == 1000:
        cfg.update(
            test_dataloader=dict(
                batch_size=32,
                num_workers=5,
                dataset=dict(
                    type='ImageNet',
                    data_root='data/imagenet',
                    split='val',
                    pipeline=tests_of(network),
                ),
                sampler=dict(type='DefaultSampler', shuffle=False),
            ),
            test_evaluator=dict(type='Accuracy', topk=(1, 5)),
            test_cfg=dict(),
        )
    if 'UniRepLKNet' in network.backbone['type']:  # which pools by itself
        del cfg['model']['neck']
    if network.needs_mmdbb:
        cfg['custom_imports'] = dict(
            imports=['mmdbb.backbones'], allow_failed_imports=False
        )
    return Config(cfg)


def tests_of(network: AnyNetwork) -> list:
    """The pipeline by which the paper's code tests a network.

    Args:
        network: The network in an official file.
    """
    load, resize, *others = TEST_PIPELINE
    if isinstance(network, NewerNetwork):
        resize = dict(resize, interpolation=network.interpolation)
    return [load, resize, *others]
