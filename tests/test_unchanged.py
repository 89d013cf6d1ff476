"""A function that leaves a model as it was leaves everything as it was.

All that a call could change is written down before and after it: classes,
modes, hooks and attributes of modules, values, gradients and what requires
them, random numbers, and the settings of the process. A new function that
promises to change nothing gets a line in ``CALLS``.
"""

import copy
import os
import random
import tempfile

import numpy as np
import pytest
import torch
from everything import assert_same, everything
from helpers import image, randomize
from mmengine.config import Config
from networks import CLASSIFIER
from torch import nn

import mmdbb
from mmdbb.compare import compare_networks
from mmdbb.insert import merge_into_
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine.random_numbers import random_numbers_kept
from mmdbb.mm.evaluation.norm_statistics import channel_statistics
from mmdbb.mm.evaluation.substitutes import TorchNetwork, running_instead
from mmdbb.mm.export.network import export_network
from mmdbb.mm.outputs import Proof
from mmdbb.mm.pruning.penalty import filter_lengths, kernel_penalty
from mmdbb.mm.pruning.structure import cost_of, prune_
from mmdbb.mm.quantization.fake import remove_quantizers_
from mmdbb.mm.quantization.flow import layers_to_quantize
from mmdbb.mm.quantization.insert_bn import conv_bn_config, insert_bn_
from mmdbb.mm.quantization.qat import prepare_qat_
from mmdbb.mm.quantization.ranges import kernel_ranges
from mmdbb.tracing import sole_readers

SIZE = (64, 48)


def classifier(block='DBB'):
    """A network in eval mode, but for what is odd in it."""
    cfg = Config.fromstring(CLASSIFIER, '.py')
    cfg.model.backbone.block = dict(type=block)
    model = randomize(build_model(cfg))
    model.head(model.extract_feat(images()))[0, 0].backward()
    # A part that is frozen, a gradient that is missing, a hook of the user's.
    model.backbone.layer1.requires_grad_(False)
    model.head.fc.bias.grad = None
    model.backbone.layer2.register_forward_hook(seen)
    model.backbone.relu.train()
    model.train_cfg = None
    return cfg, model


def seen(*args):
    """A hook that does nothing."""


def images(count=2):
    return image(count, 3, *SIZE, dtype=torch.float32)


def deploy_in_place(cfg, model):
    with pytest.raises(ValueError):
        broken = next(m for m in model.modules() if hasattr(m, 'branches'))
        weight = next(broken.parameters())
        before = weight.data.clone()
        weight.data.fill_(float('nan'))
        try:
            mmdbb.reparameterize(model, inplace=True)
        finally:
            weight.data.copy_(before)


def export(cfg, model):
    with tempfile.TemporaryDirectory() as folder:
        out, proof = os.path.join(folder, 'out.pt'), Proof(image_size=SIZE)
        export_network(model, out, 'torchscript', proof=proof)


def substitute(cfg, model):
    with running_instead(model, TorchNetwork(model, SIZE)):
        model(images(), mode='predict')


def insert_norms(cfg, model):
    with random_numbers_kept():
        network = build_model(conv_bn_config(cfg, model))
    insert_bn_(network, model, images())


def prune_nothing(cfg, model):
    """A refusal comes after the network was traced."""
    plain = mmdbb.reparameterize(model)
    plain.head.fc.bias.requires_grad_(False)
    before = everything(plain)
    with pytest.raises(mmdbb.errors.UserError, match='no filter was removed'):
        prune_(plain, 0.5, SIZE, round_to=64)
    assert_same(everything(plain), before)


def quantizers_and_back(cfg, model):
    prepare_qat_(model, SIZE)
    remove_quantizers_(model)


CALLS = {
    'reparameterize': lambda cfg, model: mmdbb.reparameterize(model),
    'reparameterize in place, refused': deploy_in_place,
    'compare_networks': lambda cfg, model: compare_networks(
        model, mmdbb.reparameterize(model), [images()]
    ),
    'sole_readers': lambda cfg, model: sole_readers(model, images()),
    'merge_into_': lambda cfg, model: merge_into_(
        copy.deepcopy(mmdbb.reparameterize(model)), model, images()
    ),
    'export_network': export,
    'channel_statistics': lambda cfg, model: channel_statistics(
        model, dict(layer=model.backbone.layer1), images()
    ),
    'running_instead': substitute,
    'cost_of': lambda cfg, model: cost_of(model, SIZE),
    'prune_, refused': prune_nothing,
    'layers_to_quantize': lambda cfg, model: layers_to_quantize(model, SIZE),
    'kernel_ranges': lambda cfg, model: kernel_ranges(model),
    'prepare_qat_, then remove_quantizers_': quantizers_and_back,
    'insert_bn_': insert_norms,
    'kernel_penalty': lambda cfg, model: kernel_penalty(model),
    'filter_lengths': lambda cfg, model: filter_lengths(model),
    'to_conv': lambda cfg, model: model.backbone.layer1[0].conv1.to_conv(),
}


@pytest.mark.parametrize('call', CALLS)
def test_everything_is_as_it_was(call, quiet):
    if 'prune' in call:
        pytest.importorskip('torch_pruning')
    cfg, model = classifier('OREPA' if call == 'insert_bn_' else 'DBB')
    # What imports packages at its first call does so before.
    CALLS[call](cfg, copy.deepcopy(model))
    before = everything(model)
    CALLS[call](cfg, model)
    assert_same(everything(model), before)


@pytest.mark.parametrize(
    'change',
    [
        lambda m: m.backbone.layer1.requires_grad_(True),
        lambda m: m.backbone.layer2[0].train(),
        lambda m: m.backbone.layer1.register_forward_pre_hook(seen),
        lambda m: vars(m.backbone).pop('frozen_stages'),
        lambda m: vars(m.backbone).update(depth=1),
        lambda m: m.backbone.bn1.running_mean.add_(1e-6),
        lambda m: m.zero_grad(),
        lambda m: torch.rand(1),
        lambda m: random.random(),
        lambda m: np.random.rand(),
        lambda m: setattr(m.backbone, 'conv1', nn.Conv2d(3, 8, 7)),
    ],
)
def test_the_test_of_everything_bites(change, quiet):
    _, model = classifier()
    before = everything(model)
    change(model)
    with pytest.raises(AssertionError):
        assert_same(everything(model), before)
