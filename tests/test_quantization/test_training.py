"""Training for INT8: the hook, inserted norms, the report of ranges."""

import copy
import math

import pytest
import torch
from helpers import EXACT, deploy, distance, export, image, randomize
from mmengine.config import Config
from networks import CLASSIFIER
from registered import each_block, name_of, sums_branches
from runs import run_config, train
from tiny_demo import tame, tiny_checkpoint
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdbb import DBB, RepVGGConv
from mmdbb.blocks import ConvBN, OREPAConv
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.compare import network_outputs
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.evaluation.norm_statistics import calibrate_norms_
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization.fake import (
    is_quantizing,
    quantizable_layers,
    remove_quantizers_,
)
from mmdbb.mm.quantization.insert_bn import (
    conv_bn_config,
    insert_bn_,
    insert_bn_checkpoint,
)
from mmdbb.mm.quantization.network import fill_network, load_network
from mmdbb.mm.quantization.qat import QATHook, prepare_qat_
from mmdbb.mm.quantization.qdq import write_qdq
from mmdbb.mm.quantization.ranges import kernel_ranges
from mmdbb.mm.quantization.tables import plot_ranges, print_ranges
from mmdbb.ranges import signal_to_noise
from mmdbb.reparam import find_blocks
from mmdbb.shares import branch_kernels

# The hook


def norms_of(model):
    return {
        f'{name}.{entry}': value.clone()
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
        for entry, value in module.named_buffers()
    }


def qat_config(folder, **arguments):
    hook = dict(type='QATHook', averaging_constant=0.5, **arguments)
    cfg = run_config(folder, scores=(1.0, 2.0, 3.0))
    cfg.custom_hooks = [hook]
    cfg.custom_imports.imports.append('mmdbb.quantize')
    cfg.default_hooks.checkpoint = dict(type='CheckpointHook', interval=1)
    return cfg


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A training of three epochs, quantization-aware from the second on."""
    folder = tmp_path_factory.mktemp('run') / 'qat'
    cfg = qat_config(folder, begin=1, freeze=2)
    train(cfg)
    return cfg, folder


def states(folder):
    return [
        torch.load(folder / f'epoch_{i}.pth', weights_only=False)['state_dict']
        for i in (1, 2, 3)
    ]


def test_it_begins_and_freezes_when_it_should(run):
    first, second, third = states(run[1])
    on = 'backbone.layer1.0.conv1.weight_quantizer.fake_quant_enabled'
    assert [int(s[on]) for s in (first, second, third)] == [0, 1, 1]
    learning = 'backbone.layer1.0.conv1.input_quantizer.observer_enabled'
    assert [int(s[learning]) for s in (first, second, third)] == [0, 1, 0]
    scale = 'backbone.layer1.0.conv1.input_quantizer.scale'
    assert first[scale] == 1 and second[scale] == third[scale] != 1
    moved = 'backbone.layer1.0.conv1.branches.kxk.conv.weight'
    assert not torch.equal(second[moved], third[moved])


def test_norms_are_frozen_from_then_on(run):
    first, second, third = states(run[1])
    names = [n for n in first if n.endswith('running_var')]
    assert len(names) > 20
    for name in names:
        assert torch.equal(first[name], second[name]), name
        assert torch.equal(second[name], third[name]), name
    assert not torch.equal(first[names[0]], torch.ones_like(first[names[0]]))


def test_such_a_checkpoint_is_loaded_with_its_quantizers(run):
    cfg, folder = run
    model = load_network(build_model(cfg), str(folder / 'epoch_3.pth'))
    layers = quantizable_layers(model)
    assert all(is_quantizing(layer) for layer in layers.values())
    x = image(2, 3, 24, 32, dtype=torch.float32)
    quantized = model(x)
    plain = load_network(build_model(cfg), str(folder / 'epoch_3.pth'))
    from mmdbb.mm.quantization.fake import set_quantizing_

    set_quantizing_(plain, False)
    assert 0 < distance(quantized, plain(x)) < 0.5


def test_a_checkpoint_from_before_has_no_ranges(run, tmp_path):
    pytest.importorskip('onnx')
    cfg, folder = run
    model = load_network(build_model(cfg), str(folder / 'epoch_1.pth'))
    path = str(tmp_path / 'float.onnx')
    float_model = copy.deepcopy(model)
    remove_quantizers_(float_model)
    export(float_model, path, image_size=(32, 32))
    with pytest.raises(UserError, match='input_quantizer has seen no data'):
        write_qdq(path, str(tmp_path / 'int8.onnx'), model)


def test_a_run_is_resumed_with_its_ranges(run, tmp_path):
    cfg, folder = run
    again = qat_config(tmp_path / 'again', begin=1, freeze=2)
    again.load_from, again.resume = str(folder / 'epoch_2.pth'), True
    train(again)
    expected = states(folder)[2]
    found = torch.load(tmp_path / 'again' / 'epoch_3.pth', weights_only=False)[
        'state_dict'
    ]
    scale = 'backbone.layer1.0.conv1.input_quantizer.scale'
    assert torch.equal(found[scale], expected[scale])
    assert found.keys() == expected.keys()


def test_the_seven_bits_of_a_checkpoint(tmp_path):
    folder = tmp_path / 'seven'
    cfg = qat_config(folder, per_channel=False, reduce_range=True)
    cfg.train_cfg.max_epochs = 1
    train(cfg)
    model = load_network(build_model(cfg), str(folder / 'epoch_1.pth'))
    quantizer = model.backbone.layer1[0].conv1.weight_quantizer
    assert not quantizer.per_channel and quantizer.quant_max == 63


def test_a_network_for_images_of_one_size_only():
    def build():
        layers = nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4 * 6 * 9, 2)
        return nn.Sequential(*layers).eval()

    trained = build()
    prepare_qat_(trained, (8, 11))
    loaded = dict(state_dict=trained.state_dict(), meta={})
    model = fill_network(build(), loaded, 'qat.pth', (8, 11))
    assert is_quantizing(model[0]) and is_quantizing(model[2])
    with pytest.raises(UserError, match='^qat.pth: mat1 and mat2 shapes'):
        fill_network(build(), loaded, 'qat.pth')


@pytest.mark.parametrize(
    'arguments', [dict(begin=-1), dict(begin=3, freeze=2)]
)
def test_bad_times(arguments):
    with pytest.raises(ValueError, match='begin must be at least 0'):
        QATHook(**arguments)


# Inserted norms


@pytest.fixture(scope='module')
def inserted(trained, tmp_path_factory):
    cfg, checkpoint = trained('classification')
    cfg = copy.deepcopy(cfg)
    cfg.update(work_dir='first', resume=True)
    out = str(tmp_path_factory.mktemp('inserted') / 'bn.pth')
    return (
        cfg,
        checkpoint,
        insert_bn_checkpoint(Source(cfg, checkpoint), out, Calibration(16)),
    )


def test_inserted_norms_change_nothing(inserted):
    cfg, checkpoint, result = inserted
    assert result.blocks == 8 and result.difference.largest < 1e-5
    new = Config.fromfile(result.config)
    assert new.load_from == result.checkpoint
    # It starts anew, and elsewhere than the training that it follows.
    assert not new.resume and 'work_dir' not in new
    network = load_network(build_model(new), result.checkpoint)
    assert {type(b) for b in find_blocks(network).values()} == {ConvBN}
    trained = load_network(build_model(cfg), checkpoint)
    x = image(2, 3, 32, 32, dtype=torch.float32)
    assert distance(network(x), trained(x)) < 1e-4
    # In training mode hardly more, because the norms know the data.
    norm = network.backbone.layer1[0].conv1.branches['kxk'].norm
    assert (norm.running_var - 1).abs().min() > 1e-3


def test_inserting_norms_replaces_no_input(trained):
    cfg, checkpoint = trained('classification')
    with pytest.raises(UserError, match='is also an input'):
        insert_bn_checkpoint(
            Source(cfg, checkpoint), checkpoint, Calibration(4), overwrite=True
        )


def test_inserted_norms_are_folded_again(inserted, tmp_path):
    _, _, result = inserted
    cfg = Config.fromfile(result.config)
    out = str(tmp_path / 'stock.pth')
    deployed = deploy(cfg, result.checkpoint, out, image_size=(32, 32))
    assert deployed.difference.largest < 1e-4


def test_what_is_merged_has_no_place_for_norms(inserted, tmp_path):
    _, _, result = inserted
    out = str(tmp_path / 'stock.pth')
    deploy(
        Config.fromfile(result.config),
        result.checkpoint,
        out,
        image_size=(32, 32),
    )
    cfg = Config.fromfile(str(tmp_path / 'stock.py'))
    with pytest.raises(UserError, match='is merged already: the network'):
        insert_bn_checkpoint(
            Source(cfg, out), str(tmp_path / 'bn.pth'), Calibration(4)
        )
    assert not (tmp_path / 'bn.pth').exists()


def test_the_same_kernels_get_norms():
    model = nn.Sequential(OREPAConv(3, 4, 3), OREPAConv(4, 4, (1, 7)))
    layer = dict(type='DBB', max_kernel_size=8, single_init=True)
    cfg = Config(dict(a=[dict(conv_cfg=layer)], b=dict(conv_cfg=None)))
    found = conv_bn_config(cfg, model)
    assert found.a[0].conv_cfg == dict(
        type='ConvBN', min_kernel_size=3, max_kernel_size=7
    )
    assert found.b.conv_cfg is None
    layer = dict(type='OREPA', min_kernel_size=5)
    found = conv_bn_config(Config(dict(conv_cfg=layer)), model).conv_cfg
    assert (found.min_kernel_size, found.max_kernel_size) == (5, 7)
    backbone = dict(type='mmpretrain.ResNetDBB', depth=18)
    assert conv_bn_config(Config(backbone), model).block.type == 'ConvBN'


@pytest.mark.parametrize('type_', [OREPAConv, 'mmengine.OREPA', 'OREPA'])
def test_a_block_is_known_however_a_config_names_it(type_):
    layer = dict(type=type_, max_kernel_size=3)
    model = OREPAConv(3, 4, 3)
    found = conv_bn_config(Config(dict(conv_cfg=layer)), model).conv_cfg
    assert found.type == 'ConvBN' and found.max_kernel_size == 3


@pytest.mark.parametrize('bias', [True, False])
def test_a_norm_behind_a_kernel_with_or_without_bias(bias):
    model = nn.Sequential(OREPAConv(3, 4, 3, bias=bias)).double().eval()
    network = nn.Sequential(ConvBN(3, 4, 3)).double().eval()
    x = image(6, 3, 8, 9)
    randomize(model)
    insert_bn_(network, model, x)
    assert distance(network(x), model(x)) < EXACT


REPVGG = dict(
    type='mmpretrain.ReparamRepVGG',
    arch=dict(
        num_blocks=[1, 1, 1, 1],
        width_factor=[0.125] * 3 + [0.0625],
        group_layer_map=None,
        se_cfg=dict(ratio=4, divisor=1),
    ),
    out_indices=(3,),
)
#: A network whose norms the blocks absorb if they have norms of their own,
#: one with squeeze-and-excitation behind them, and one with the host's norms.
NETWORKS = dict(
    resnet=lambda block: dict(block=block),
    repvgg=lambda block: dict(REPVGG, block=block, _delete_=True),
    conv_cfg=lambda block: dict(type='mmpretrain.ResNet', conv_cfg=block),
)


@pytest.mark.parametrize('network', NETWORKS)
@each_block()
def test_norms_are_inserted_behind_any_block(kind, network, quiet):
    cfg = Config.fromstring(CLASSIFIER, '.py')
    backbone = NETWORKS[network](dict(type=name_of(kind)))
    cfg.merge_from_dict(dict(model=dict(backbone=backbone)))
    if network == 'repvgg':
        cfg.model.head.in_channels = 32
    model = randomize(build_model(cfg).double())
    inserted = build_model(conv_bn_config(cfg, model)).double()
    x = image(3, 3, 64, 48)
    before = copy.deepcopy(model.state_dict())
    insert_bn_(inserted, model, x)
    assert {type(b) for b in find_blocks(inserted).values()} == {ConvBN}
    for name, expected in network_outputs(model, x).items():
        found = network_outputs(inserted, x)[name]
        assert distance(found, expected) < EXACT, name
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    # The norms know the data, so training starts from the same function.
    for block in find_blocks(inserted).values():
        block.train()
    for name, expected in network_outputs(model, x).items():
        found = network_outputs(inserted, x)[name]
        assert distance(found, expected) < 1e-8, name


def test_the_tool_inserts_norms_behind_orepa(trained, tmp_path, quiet):
    cfg = copy.deepcopy(trained('classification')[0])
    cfg.model.backbone.block = dict(type='OREPA')
    checkpoint = tiny_checkpoint(cfg, tmp_path / 'orepa.pth')
    out = str(tmp_path / 'bn.pth')
    result = insert_bn_checkpoint(Source(cfg, checkpoint), out, Calibration(8))
    assert result.blocks == 9 and result.difference.largest < 5e-5


def test_no_entry_is_lost_when_norms_are_inserted():
    model = nn.Sequential(OREPAConv(3, 4, 3), nn.BatchNorm2d(4))
    model.append(nn.Conv2d(4, 4, 1)).eval()
    x = image(2, 3, 8, 9, dtype=torch.float32)
    block = ConvBN(3, 4, 3)
    place = AbsorbedNorm(block, model[1])
    network = nn.Sequential(block, place, nn.Identity())
    with pytest.raises(ValueError, match='than the trained one: 2.bias, 2.w'):
        insert_bn_(network.eval(), model, x)
    network = nn.Sequential(block, place, model[2])
    network.append(nn.Conv2d(4, 4, 1))
    with pytest.raises(ValueError, match='than the trained one: 3.bias, 3.w'):
        insert_bn_(network.eval(), model, x)


def test_calibrated_norms_change_nothing():
    model = randomize(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    ).double()
    model.eval()
    before = copy.deepcopy(model)
    x = image(6, 3, 8, 9)
    calibrate_norms_(model, x)
    assert distance(model(x), before(x)) < EXACT
    y = model[0](x)
    assert distance(model[1].running_mean, y.mean((0, 2, 3))) < EXACT
    assert distance(model[1].running_var, y.var((0, 2, 3), False)) < EXACT


def test_norms_that_cannot_be_calibrated_stay():
    class WithMean(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) + self.running_mean.sum()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), WithMean(4))
    model.append(nn.BatchNorm2d(4, track_running_stats=False))
    model = randomize(model).double().eval()
    x = image(6, 3, 8, 9)
    before = model(x)
    calibrate_norms_(model, x)
    assert torch.equal(model(x), before)


# The report


@each_block(sums_branches)
def test_branches_add_up_to_the_kernel(kind):
    block = randomize(kind(4, 4, 3, padding=1).double()).eval()
    parts = branch_kernels(block)
    assert list(parts) == list(block.branches)
    expected = block.get_equivalent_kernel_bias().kernel
    assert distance(sum(parts.values()), expected) < EXACT


def test_ranges_exact():
    block = RepVGGConv(4, 4, 3, padding=1).double().eval()
    for branch in block.branches.values():
        if hasattr(branch, 'conv'):
            branch.conv.weight.data.fill_(0.01)
    # The identity of one channel: seven times as large as all others.
    block.branches['identity'].norm.weight.data.copy_(
        torch.tensor([1.0, 1.0, 1.0, 7.0])
    )
    (found,) = kernel_ranges(nn.Sequential(block))
    scale = 1 / math.sqrt(1 + 1e-5)
    assert found.name == '0' and found.kind == 'RepVGGConv'
    assert found.low == pytest.approx(0.01 * scale)
    assert found.high == pytest.approx(7.02 * scale)
    assert found.spread == pytest.approx(7.02 / 1.02)
    assert found.branches['identity'] > 0.95
    assert sum(found.branches.values()) == pytest.approx(1)
    assert found.outliers > 0
    assert found.snr > found.snr_per_tensor


def test_noise_exact():
    kernel = torch.tensor([[1.0, 0.5 / 127]]).reshape(1, 2, 1, 1).double()
    # Half a step is lost of the second weight, or half a step is added.
    expected = 10 * math.log10((127**2 + 0.25) / 0.25)
    assert signal_to_noise(kernel) == pytest.approx(expected, rel=1e-3)
    assert signal_to_noise(torch.zeros(2, 3)) == math.inf


def test_the_report_leaves_out_kernels_that_are_not_weights(monkeypatch):
    from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvWS2d

    said = []
    where = 'mmdbb.mm.quantization.ranges.print_log'
    monkeypatch.setattr(where, lambda text, _: said.append(text))
    model = nn.Sequential(ConvWS2d(3, 4, 3), Conv2dAdaptivePadding(4, 4, 3))
    assert [found.name for found in kernel_ranges(model)] == ['1']
    assert said == [
        'left out of the report, because their forward is their own: '
        '0 (ConvWS2d)'
    ]


def test_a_norm_behind_counts():
    from mmcv.cnn import ConvModule

    module = ConvModule(4, 6, 3, norm_cfg=dict(type='BN')).eval()
    plain = kernel_ranges(module)[0].high
    module.bn.weight.data.fill_(3.0)
    assert kernel_ranges(module)[0].high == pytest.approx(3 * plain)


def test_report_is_printed_and_drawn(tmp_path, capsys):
    pytest.importorskip('matplotlib')
    model = tame(nn.Sequential(DBB(3, 8, 3), nn.Conv2d(8, 4, 1))).eval()
    ranges = kernel_ranges(model)
    print_ranges(ranges)
    assert 'SNR' in capsys.readouterr().out
    plot_ranges(ranges, str(tmp_path / 'ranges.png'))
    assert (tmp_path / 'ranges.png').stat().st_size > 1000
    with pytest.raises(UserError, match='cannot draw'):
        plot_ranges(ranges, str(tmp_path / 'ranges.txt2'))
    with pytest.raises(UserError, match='ReLU has no block'):
        kernel_ranges(nn.ReLU())
