"""Blocks in models of YOLO's kind: trained, copied, pickled, merged, fused.

The classes here have the structure and the names of the code of YOLOv5, v7
and v9, whose models are pickled whole and fuse themselves.
"""

import copy
import io

import pytest
import torch
from helpers import EXACT, distance, randomize
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

import mmdbb
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.reparam import find_blocks, literal_forward
from mmdbb.yolo import TrainerWithBlocks

BLOCKS = ('DBB', 'ACB', 'RepVGGConv', 'OREPARepVGG', 'OREPA')


class Conv(nn.Module):
    def __init__(self, c1, c2, k=1, s=1, act=True):
        super().__init__()
        self.conv = nn.Conv2d(c1, c2, k, s, k // 2, bias=False)
        self.bn = nn.BatchNorm2d(c2, eps=1e-3, momentum=0.03)
        self.act = nn.SiLU() if act else nn.Identity()

    def forward(self, x):
        return self.act(self.bn(self.conv(x)))

    def fuseforward(self, x):
        return self.act(self.conv(x))


class RepConv(nn.Module):
    """Its fusing reads the norms of both, and takes it that no bias is."""

    def __init__(self, c):
        super().__init__()
        self.conv1 = Conv(c, c, 3, act=False)
        self.conv2 = Conv(c, c, 1, act=False)

    def forward(self, x):
        return (self.conv1(x) + self.conv2(x)).relu()

    def fuse_repvgg_block(self):
        (w3, b3), (w1, b1) = (
            fused(each.conv, each.bn) for each in (self.conv1, self.conv2)
        )
        assert self.conv1.conv.bias is None
        self.rbr_reparam = nn.Conv2d(*w3.shape[:2], 3, padding=1)
        self.rbr_reparam.weight.data = w3 + nn.functional.pad(w1, [1] * 4)
        self.rbr_reparam.bias.data = b3 + b1
        del self.conv1, self.conv2
        self.forward = lambda x: self.rbr_reparam(x).relu()


def fused(conv, bn):
    return fuse_conv_bn_weights(
        conv.weight,
        conv.bias,
        bn.running_mean,
        bn.running_var,
        bn.eps,
        bn.weight,
        bn.bias,
    )


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            Conv(3, 8, 6, 2), Conv(8, 8, 3), RepConv(8), nn.Conv2d(8, 4, 3)
        )

    def forward(self, x):
        for layer in self.model:  # not by torch.fx: the loop asks for shapes
            x = layer(x) if x.shape[1] else x
        return x

    def fuse(self, verbose=True):
        for m in self.model.modules():
            if isinstance(m, RepConv):
                m.fuse_repvgg_block()
        for m in self.model.modules():
            if isinstance(m, Conv) and hasattr(m, 'bn'):
                m.conv.weight, bias = fused(m.conv, m.bn)
                m.conv.bias = bias
                del m.bn
                m.forward = m.fuseforward
        return self


def with_blocks(block='DBB'):
    model = Model()
    plain = copy.deepcopy(model)
    names = mmdbb.insert_blocks_(
        model, dict(type=block), example=torch.rand(1, 3, 16, 16)
    )
    assert len(names) >= 4
    return plain, randomize(model).double().eval()


def outputs(model):
    x = torch.linspace(-1, 1, 2 * 3 * 16 * 20).reshape(2, 3, 16, 20).double()
    with torch.no_grad(), literal_forward(model):
        return model(x)


@pytest.mark.parametrize('block', BLOCKS)
def test_frozen_layers_come_back_frozen(block):
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3)
    )
    model[:2].requires_grad_(False)
    expected = {n: p.requires_grad for n, p in model.named_parameters()}
    mmdbb.insert_blocks_(model, dict(type=block))
    mmdbb.merge_back_(model)
    found = {n: p.requires_grad for n, p in model.named_parameters()}
    assert found == expected


@pytest.mark.parametrize('block', BLOCKS)
def test_structure_and_function_come_back(block):
    plain, model = with_blocks(block)
    expected = outputs(model)
    names = list(find_blocks(model))
    assert mmdbb.merge_back_(model) == names
    assert not find_blocks(model)
    assert distance(outputs(model), expected) < EXACT
    # Nothing of mmdbb is left, and the original takes the weights strictly.
    modules = {type(module).__module__ for module in model.modules()}
    assert not [name for name in modules if name.startswith('mmdbb')]
    plain.double().eval().load_state_dict(model.state_dict())
    assert distance(outputs(plain), expected) < EXACT
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    assert {(norm.eps, norm.momentum) for norm in norms} == {(1e-3, 0.03)}


@pytest.mark.parametrize('block', BLOCKS)
def test_the_models_own_fuse_merges_first(block):
    _, model = with_blocks(block)
    expected = outputs(model)
    assert model.fuse(verbose=False) is model
    assert not find_blocks(model)
    assert distance(outputs(model), expected) < EXACT
    assert 'fuse' not in vars(model)  # a pickle of it needs no mmdbb


def test_a_copy_and_a_pickle_fuse_themselves():
    _, model = with_blocks()
    expected = outputs(model)
    file = io.BytesIO()
    torch.save(dict(ema=copy.deepcopy(model)), file)
    file.seek(0)
    for other in (
        copy.deepcopy(model),
        torch.load(file, weights_only=False)['ema'],
    ):
        other.fuse()
        assert not find_blocks(other)
        assert distance(outputs(other), expected) < EXACT
    assert find_blocks(model)
    assert distance(outputs(model), expected) < EXACT


def test_half_precision_rounds_and_no_more():
    """Their checkpoints hold ``model.half()``, which they read as float."""
    _, model = with_blocks()
    half = copy.deepcopy(model).half()
    expected = outputs(copy.deepcopy(half).double())
    mmdbb.merge_back_(half)
    assert {p.dtype for p in half.parameters()} == {torch.half}
    assert distance(outputs(half.double()), expected) < 5e-3


def test_biases_that_were_there_stay_there():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain = copy.deepcopy(model)
    mmdbb.insert_blocks_(model)
    randomize(model).double().eval()
    x = torch.rand(2, 3, 6, 5).double()
    with literal_forward(model):
        expected = model(x)
    mmdbb.merge_back_(model)
    assert model[0].bias is not None
    assert distance(model(x), expected) < EXACT
    plain.double().eval().load_state_dict(model.state_dict())


def test_without_a_norm_the_convolution_gets_a_bias():
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU())
    mmdbb.insert_blocks_(model)
    randomize(model).double().eval()
    x = torch.rand(2, 3, 6, 5).double()
    with literal_forward(model):
        expected = model(x)
    mmdbb.merge_back_(model)
    assert model[0].bias is not None
    assert distance(model(x), expected) < EXACT


def test_a_norm_that_stays_takes_the_bias():
    class BatchNormAct(nn.BatchNorm2d):  # timm's: a block cannot absorb it
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), BatchNormAct(4))
    plain = copy.deepcopy(model)
    x = torch.rand(2, 3, 6, 5).double()
    mmdbb.insert_blocks_(model, example=x.float())
    randomize(model).double().eval()
    with literal_forward(model):
        expected = model(x)
    mmdbb.merge_back_(model)
    assert model[0].bias is None
    assert distance(model(x), expected) < EXACT
    plain.double().eval().load_state_dict(model.state_dict())


def test_modes_and_frozen_weights_are_kept():
    _, model = with_blocks()
    model.train()
    model.model[1].eval()
    mmdbb.merge_back_(model)
    assert model.model[0].bn.training
    assert not model.model[1].bn.training


def test_only_what_was_inserted_comes_back():
    model = nn.Sequential(mmdbb.DBB(3, 4, 3), nn.Conv2d(4, 4, 3))
    mmdbb.insert_blocks_(model)
    with pytest.raises(ValueError, match='did not insert 0; merge with'):
        mmdbb.merge_back_(model)
    assert [type(layer).__name__ for layer in model] == ['DBB', 'DBB']


@pytest.mark.parametrize('absorbed', [True, False])
def test_a_part_without_its_norm_is_refused(absorbed):
    """Its norm would take the bias where the part does not run it."""
    block = dict(type='DBB' if absorbed else 'OREPA')
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    mmdbb.insert_blocks_(model, block)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='behind 0 are no part of this Seq'):
        mmdbb.merge_back_(model[:1])
    assert type(mmdbb.reparameterize(model[:1])[0]) is nn.Conv2d
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_without_blocks_it_is_refused():
    with pytest.raises(ValueError, match='has no block to merge'):
        mmdbb.merge_back_(nn.Sequential(nn.Conv2d(3, 4, 3)))


def test_a_kernel_that_is_not_finite_changes_nothing():
    _, model = with_blocks()
    blocks = find_blocks(model)
    [*blocks.values()][-1].branches['kxk'].conv.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match='cannot merge'):
        mmdbb.merge_back_(model)
    assert find_blocks(model) == blocks
    assert isinstance(model.model[0].bn, AbsorbedNorm)


def test_a_layer_named_fuse_is_no_method():
    class Other(nn.Module):
        def __init__(self):
            super().__init__()
            self.fuse = nn.Conv2d(3, 4, 3)

        def forward(self, x):
            return self.fuse(x)

    model = Other()
    assert mmdbb.insert_blocks_(model) == ['fuse']
    assert isinstance(model.fuse, mmdbb.DBB)


class DetectionTrainer:
    """What ultralytics' trainers do in this method."""

    def get_model(self, cfg=None, weights=None, verbose=True):
        model = YOLO()
        if weights is not None:
            # ultralytics takes layers of another width over as they are.
            assert not find_blocks(weights)
            model.load(weights)
        return model


class YOLO(Model):
    yaml = dict(channels=3)

    def load(self, weights):
        own, loaded = self.state_dict(), weights.state_dict()
        same = {n: v for n, v in loaded.items() if n in own}
        self.load_state_dict(same, strict=False)

    def forward(self, x):
        return super().forward(x)


class Trainer(TrainerWithBlocks, DetectionTrainer):
    pass


class ACBTrainer(TrainerWithBlocks, DetectionTrainer):
    block = dict(type='ACB')
    where = lambda name, conv: name == 'model.1.conv'  # noqa: E731


def test_a_trainer_inserts_its_blocks(capsys):
    model = ACBTrainer().get_model()
    assert capsys.readouterr().out == 'mmdbb: 1 convolutions are blocks\n'
    blocks = find_blocks(model)
    assert [*blocks] == ['model.1.conv']
    assert isinstance(blocks['model.1.conv'], mmdbb.ACB)


def test_a_trainer_starts_from_plain_weights():
    plain = randomize(YOLO()).eval()
    model = Trainer().get_model(weights=plain, verbose=False).eval()
    assert len(find_blocks(model)) == 4
    found, expected = outputs(model.double()), outputs(plain.double())
    assert distance(found, expected) < 1e-6


def test_a_trainer_goes_on_with_blocks():
    before = Trainer().get_model(verbose=False)
    before = randomize(before).eval()
    model = Trainer().get_model(weights=before, verbose=False).eval()
    assert distance(outputs(model.double()), outputs(before.double())) < EXACT


def test_a_trainer_refuses_other_blocks():
    before = Trainer().get_model(verbose=False)
    with pytest.raises(ValueError, match='is only in the checkpoint; set'):
        ACBTrainer().get_model(weights=before)
