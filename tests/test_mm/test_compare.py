"""A comparison that finds what is wrong, wherever it is."""

import pytest
import torch
from helpers import EXACT, image, randomize
from mmengine.config import Config
from networks import CONFIGS
from torch import nn

from mmdbb import DBB, reparameterize
from mmdbb.compare import (
    compare_networks,
    network_outputs,
    relative_error,
)
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import find_blocks
from mmdbb.stock_weights import stock_state

pytestmark = pytest.mark.usefixtures('quiet')
BATCH = image(2, 3, 64, 48)


@pytest.fixture(scope='module')
def networks():
    """Each task's network with blocks, and its stock network."""
    found = {}
    for task, text in CONFIGS.items():
        cfg = Config.fromstring(text, '.py')
        model = randomize(build_model(cfg).double())
        stock = build_model(stock_config(cfg)).double()
        stock.load_state_dict(stock_state(model, stock))
        found[task] = (model, stock)
    return found


@pytest.mark.parametrize('task', CONFIGS)
def test_equal_networks(networks, task):
    difference = compare_networks(*networks[task], [BATCH])
    assert difference.largest < EXACT
    assert len(difference.compared) >= 2


def test_nothing_is_kept_for_a_backward_pass(networks):
    model, stock = networks['classifier']
    outputs = []
    norms = [m for m in stock.modules() if isinstance(m, nn.BatchNorm2d)]
    hooks = [
        norm.register_forward_hook(lambda *args: outputs.append(args[-1]))
        for norm in norms
    ]
    compare_networks(model, stock, [BATCH])
    for hook in hooks:
        hook.remove()
    assert outputs and not any(output.requires_grad for output in outputs)


def test_what_is_compared(networks):
    def names(task):
        model, stock = networks[task]
        compared = compare_networks(model, stock, [BATCH]).compared
        blocks = set(find_blocks(model))
        assert blocks < set(compared)
        return set(compared) - blocks

    assert names('classifier') == {'features.0', 'head'}
    assert names('segmentor') == {
        'features.0',
        'features.1',
        'decode_head',
        'auxiliary_head',
    }
    assert {'features.2', 'rpn_head.0.0', 'rpn_head.1.2'} <= names('detector')


def test_an_error_that_no_image_shows_is_found():
    """Behind a ReLU that is zero everywhere."""
    model = nn.Sequential(DBB(3, 4, 3, padding=1), nn.ReLU()).double().eval()
    model[0].branches['kxk'].norm.bias.data.fill_(-1e3)
    merged = reparameterize(model)
    assert compare_networks(model, merged, [BATCH]).largest < EXACT
    merged[0].bias.data.add_(1)
    assert not model(BATCH).any() and not merged(BATCH).any()
    found = compare_networks(model, merged, [BATCH])
    assert found.output == '0' and found.largest > 1e-4


PLACES = {
    'backbone': ('classifier', 'backbone.layer2.0.conv1'),
    'backbone of a detector': ('detector', 'backbone.layer1.0.conv2'),
    'neck': ('detector', 'neck.fpn_convs.0.conv'),
    'RoI head': ('detector', 'roi_head.bbox_head.shared_convs.2.conv'),
    'head': ('segmentor', 'decode_head.bottleneck.conv'),
    'auxiliary head': ('segmentor', 'auxiliary_head.convs.0.conv'),
}


@pytest.mark.parametrize('place', PLACES)
@pytest.mark.parametrize('harm', ['flipped', 'perturbed', 'mean', 'nan'])
def test_finds_what_is_wrong(networks, place, harm):
    task, name = PLACES[place]
    model, stock = networks[task]
    conv = stock.get_submodule(name)
    before = {n: v.clone() for n, v in stock.state_dict().items()}
    try:
        with torch.no_grad():
            if harm == 'flipped':
                conv.weight[::2].neg_()
            elif harm == 'perturbed':
                conv.weight[:, 0, 0, 1] += 0.05
            elif harm == 'nan':
                conv.weight[0, 0, 0, 0] = float('nan')
            elif conv.bias is not None:
                conv.bias += 0.05
            else:
                head = name.rpartition('.')[0]
                norm = (
                    f'{head}.bn'
                    if name.endswith('.conv')
                    else f'{head}.bn{name[-1]}'
                )
                stock.get_submodule(norm).running_mean += 0.05
        difference = compare_networks(model, stock, [BATCH])
        assert not difference.largest <= 1e-4
        assert difference.output
        if place == 'RoI head':
            assert difference.output == name
    finally:
        stock.load_state_dict(before)
    assert compare_networks(model, stock, [BATCH]).largest < EXACT


def test_compares_different_computations(networks, monkeypatch):
    """A merge that is wrong in itself is found."""
    block = DBB(3, 4, 3, padding=1)
    model = randomize(nn.Sequential(block).double()).eval()
    compose = DBB._compose

    def wrong(self):
        kernel, bias = compose(self)
        return kernel.flip(-1), bias

    monkeypatch.setattr(DBB, '_compose', wrong)
    merged = reparameterize(model)
    assert compare_networks(model, merged, [BATCH]).largest > 0.01


def test_every_batch_counts(networks):
    model = nn.Sequential(DBB(3, 4, 3)).double().eval()

    class OnlyLarge(nn.Sequential):
        def forward(self, x):
            y = super().forward(x)
            return y + 1 if x.shape[-1] > 48 else y

    other = OnlyLarge(*reparameterize(model))
    assert compare_networks(model, other, [BATCH]).largest < EXACT
    large = image(1, 3, 32, 64)
    assert compare_networks(model, other, [BATCH, large]).largest > 0.1


def test_hooks_and_forwards_are_taken_back(networks):
    model, stock = networks['detector']
    compare_networks(model, stock, [BATCH])
    for block in find_blocks(model).values():
        assert not block._forward_hooks
        assert 'forward_train' not in vars(block)


def test_images_that_the_network_cannot_take(networks):
    model, stock = networks['classifier']
    wrong = image(1, 5, 8, 8)
    with pytest.raises(UserError, match=r'shape \(1, 5, 8, 8\).*image-size'):
        compare_networks(model, stock, [BATCH, wrong])
    convs = (nn.Conv2d(3, 4, 9), DBB(4, 4, 3))
    model = nn.Sequential(*convs).double().eval()
    merged = reparameterize(model)
    with pytest.raises(UserError, match=r'\(2, 3, 8, 8\): Run.*image-size'):
        compare_networks(model, merged, [image(2, 3, 8, 8)])
    # Where no size would do, blocks alone are compared.
    difference = compare_networks(model, merged, [wrong])
    assert difference.compared == ('1',) and list(difference.left_out) == [
        'network'
    ]


def test_relative_error_exact():
    expected = torch.tensor([1.0, -4.0])
    assert relative_error(expected + 1, expected) == 0.25
    assert relative_error(expected, expected) == 0
    assert relative_error(0 * expected, 0 * expected) == 0
    nan = relative_error(expected[:1], expected)
    assert nan != nan


def test_outputs_of_a_plain_module():
    outputs = network_outputs(nn.Conv2d(3, 4, 3).double(), BATCH)
    assert list(outputs) == ['output']
