"""The figures of a report, against other ways to compute them."""

import copy
import math

import pytest
import torch
from helpers import randomize
from registered import each_block, is_composed, sums_several
from test_report.cases import small_network, some_images
from torch import nn

from mmdbb import (
    DBB,
    OREPAConv,
    QARepVGGConv,
    RepVGGConv,
    insert_blocks_,
    reparameterize,
)
from mmdbb.errors import UserError
from mmdbb.reparam import literal_forward
from mmdbb.report import ReportOptions, findings, network_report
from mmdbb.shares import branch_kernels

#: Outputs are measured in float32.
CLOSE = dict(rel=2e-3, abs=1e-5)


def change(found, expected):
    """Root mean square of the change, divided by that of the values."""
    found, expected = found.double(), expected.double()
    return ((found - expected).norm() / expected.norm()).item()


def silenced(network, name, branch):
    """A copy of the network in which a branch's output is zero."""
    network = copy.deepcopy(network)
    block = network.get_submodule(name)
    if is_composed(type(block)):
        row = list(branch_kernels(block)).index(branch)
        block.generator.scale.data[row] = 0
    else:
        block.branches[branch].register_forward_hook(
            lambda module, args, output: torch.zeros_like(output)
        )
    return network


def literally(network, images):
    with torch.no_grad(), literal_forward(network):
        return network(images)


@pytest.fixture(scope='module')
def measured():
    """The report on the small network."""
    return network_report(small_network(), some_images())


def check_lost(network, images, report=None):
    """Each branch's loss equals that of the literal sum without it."""
    report = report or network_report(network, images)
    expected = literally(network, images)
    for layer in report.layers:
        for branch, figures in layer.branches.items():
            without = silenced(network, layer.name, branch)
            lost = change(literally(without, images), expected)
            assert figures.lost.network == pytest.approx(lost, **CLOSE)
    return report


@each_block(sums_several)
def test_what_is_lost_without_a_branch(kind):
    block = randomize(kind(4, 4, (3, 3), padding=1)).eval()
    head = nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 3))
    images = torch.randn(2, 4, 9, 7)
    report = check_lost(nn.Sequential(block, head), images)
    (layer,) = report.layers
    assert list(layer.branches) == list(block.branches)
    # Of the layer itself.
    whole = nn.Sequential(block)
    for branch, figures in layer.branches.items():
        without = literally(silenced(whole, '0', branch), images)
        lost = change(without, literally(whole, images))
        assert figures.lost.layer == pytest.approx(lost, **CLOSE)


def test_what_is_lost_in_a_network(measured):
    report = check_lost(small_network(), some_images(), measured)
    assert [x.name for x in report.layers] == ['0', '3', '5', '7']
    assert report.images == 3


def test_what_is_lost_without_a_kind(measured):
    network, images, report = small_network(), some_images(), measured
    expected, without = literally(network, images), network
    for layer in report.layers:
        if '1x1' in layer.branches:
            without = silenced(without, layer.name, '1x1')
    lost = change(literally(without, images), expected)
    assert report.kinds['1x1'].network == pytest.approx(lost, **CLOSE)
    assert report.kinds['1x1'].layers == 3
    parts = [
        x.branches['1x1'].projection
        for x in report.layers
        if '1x1' in x.branches
    ]
    assert report.kinds['1x1'].projection == pytest.approx(sum(parts) / 3)
    assert report.kinds['1x1'].weakest[0] == min(parts)


def test_evaluation_without_each_kind():
    network, images = small_network(), some_images()
    seen = []

    def score(merged):
        assert not merged.training
        assert not any(isinstance(m, DBB) for m in merged.modules())
        seen.append(merged(images).detach().sum().item())
        return seen[-1]

    asked = ReportOptions(evaluate=score, metric='sum', drop=False)
    report = network_report(network, images, asked)
    assert report.metric == 'sum' and report.score == seen[0]
    assert seen[0] == pytest.approx(network(images).sum().item(), rel=1e-4)
    assert [k.metric for k in report.kinds.values()] == seen[1:]
    assert len(set(seen)) == len(seen)  # each branch counts
    assert all(k.network is None for k in report.kinds.values())


def test_lengths_angles_and_gammas_by_hand():
    """Two 1x1 convolutions: vectors (3, 0) and (3, 4), gammas by hand."""
    branches = [dict(type='kxk', norm=False)] * 2
    block = DBB(2, 1, 1, bias=False, branches=branches, norm_cfg=None)
    for name, values in dict(kxk=(3.0, 0.0), kxk_2=(3.0, 4.0)).items():
        weight = block.branches[name].conv.weight
        weight.data.copy_(torch.tensor(values).reshape(1, 2, 1, 1))
    (layer,) = network_report(block).layers
    first, second = layer.branches['kxk'], layer.branches['kxk_2']
    assert first.angle == pytest.approx(math.degrees(math.atan2(4, 6)))
    degrees = math.degrees(math.acos(9 / 15))
    assert first.angles == {'kxk_2': pytest.approx(degrees)}
    assert first.share == pytest.approx(3 / math.sqrt(52))
    assert first.gammas is None and second.lost is None
    assert layer.taps.tolist() == [[5.0]] and layer.filters.shape[0] == 1
    assert layer.shape == (1, 2, 1, 1)


def test_gammas_and_scales():
    block = RepVGGConv(4, 4, 3, padding=1)
    values = torch.tensor([-3.0, 0.5, 1.0, 2.0])
    block.branches['1x1'].norm.weight.data.copy_(values)
    (layer,) = network_report(block).layers
    gammas = layer.branches['1x1'].gammas
    assert gammas == ('gamma', 0.5, 1.0, 3.0)
    orepa = OREPAConv(4, 4, 3, padding=1)
    orepa.generator.scale.data[1] = values
    (layer,) = network_report(orepa).layers
    assert list(layer.branches)[1] == '1x1_avg'
    assert layer.branches['1x1_avg'].gammas == ('scale', 0.5, 1.0, 3.0)


def test_sizes_and_operations_by_hand():
    block = RepVGGConv(4, 6, 3, padding=1, bias=False)
    report = network_report(block, torch.randn(2, 4, 5, 7))
    (layer,) = report.layers
    dense, single = 6 * 4 * 9, 6 * 4
    assert layer.before.parameters == dense + single + 2 * 2 * 6
    assert layer.after.parameters == dense + 6
    assert layer.before.flops == 2 * 5 * 7 * (dense + single)
    assert layer.after.flops == 2 * 5 * 7 * dense
    assert report.before == layer.before and report.after == layer.after
    # A layer that runs several times counts each time.
    twice = nn.ModuleList([RepVGGConv(4, 4, 3, padding=1)] * 2)
    twice = nn.Sequential(*twice)
    report = network_report(twice, torch.randn(1, 4, 5, 7))
    assert len(report.layers) == 1
    assert report.layers[0].after.flops == 2 * 2 * 5 * 7 * 4 * 4 * 9
    lost = report.layers[0].branches['identity'].lost
    assert 0 < lost.layer and 0 < lost.network


def test_ranges_have_the_norm_behind_folded_in(measured):
    network, report = small_network(), measured
    folded = {x.name: x.folded for x in report.layers}
    assert folded == {'0': '1', '3': '4', '5': '', '7': ''}
    merged = reparameterize(network)
    norm = merged[1]
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = merged[0].weight * scale.reshape(-1, 1, 1, 1)
    found = report.layers[0].range
    assert found.low == pytest.approx(kernel.min().item(), rel=1e-5)
    assert found.high == pytest.approx(kernel.max().item(), rel=1e-5)
    sizes = kernel.abs().flatten(1).amax(1)
    spread = (sizes.max() / sizes.median()).item()
    assert found.spread == pytest.approx(spread, rel=1e-5)


def test_the_merge_is_proven(measured):
    report = measured
    proof = report.proof
    assert proof.equal and not proof.refused and proof.tolerance == 1e-9
    assert max(proof.outputs.values()) < 1e-12
    assert {*proof.layers} == {'0', '3', '5', '7'}
    assert 0 < proof.single < 1e-4
    assert all(0 <= x.difference < 1e-12 for x in report.layers)


def test_a_wrong_merge_is_not_proven(monkeypatch):
    compose = DBB._compose

    def wrong(self, without=()):
        kernel, bias = compose(self, without)
        return type(compose(self))(kernel.flip(-1), bias)

    monkeypatch.setattr(DBB, '_compose', wrong)
    asked = ReportOptions(drop=False)
    report = network_report(small_network(), some_images(), asked)
    assert not report.proof.equal
    assert 'differs by' in report.proof.refused
    worst = {x.name: x.difference for x in report.layers}
    assert worst['0'] > 1e-3 > worst['3']
    (first, *_) = findings(report)
    assert first.kind == 'warning' and 'not proven' in first.text


def test_without_images_layers_are_measured_by_themselves():
    report = network_report(small_network())
    assert report.images == 0 and report.proof.equal
    assert not report.proof.outputs and len(report.proof.layers) == 4
    assert report.before.flops is None
    for layer in report.layers:
        assert all(b.lost is None for b in layer.branches.values())


@pytest.mark.parametrize('mode', ['train', 'double', 'stack', 'bfloat16'])
def test_models_of_all_kinds(mode):
    network = small_network()
    if mode == 'stack':
        network[3] = OREPAConv(8, 8, 7, stride=2, padding=3, bias=False)
    network = getattr(network, mode, network.eval)()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    modes = [m.training for m in network.modules()]
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    asked = ReportOptions(drop=False)
    report = network_report(network, some_images(), asked)
    assert torch.rand(1) == expected
    assert report.proof.equal
    assert [m.training for m in network.modules()] == modes
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]) and value.dtype == (
            before[name].dtype
        )
    if mode == 'stack':
        assert list(report.layers[1].branches) == ['kernel']
        assert report.layers[1].branches['kernel'].gammas is None


def test_a_compiled_model():
    network = small_network()
    compiled = torch.compile(network)
    found = network_report(compiled)  # compiles nothing
    assert [x.name for x in found.layers] == ['0', '3', '5', '7']
    assert found.title == 'Sequential'


def test_refusals():
    network = small_network()
    with pytest.raises(TypeError, match='model must be a torch.nn.Module'):
        network_report('net.pth')
    with pytest.raises(TypeError, match='images must be a tensor'):
        network_report(network, [some_images()])
    with pytest.raises(ValueError, match='images must have images, got shap'):
        network_report(network, some_images()[:0])
    with pytest.raises(ValueError, match='no block of mmdbb to report on'):
        network_report(reparameterize(network))
    with pytest.raises(UserError, match='cannot be run on images of shape'):
        network_report(network, torch.randn(2, 3, 1, 1))
    network[0].branches['kxk'].conv.weight.data[0, 0, 0, 0] = math.nan
    with pytest.raises(ValueError, match='not finite'):
        network_report(network, some_images())


def test_a_network_that_is_not_run_on_its_own():
    """One with parts that take more than images."""

    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = QARepVGGConv(3, 4, 3, padding=1)

        def forward(self, first, second):
            return self.conv(first) + second

    report = network_report(Odd(), some_images())
    assert report.proof.equal and 'network' in report.proof.left_out
    assert report.images == 0
    (said,) = [f.text for f in findings(report) if '`network`' in f.text]
    assert 'layer by layer only: the network cannot be run' in said
    assert report.layers[0].branches['kxk'].lost is None
    assert report.before.flops is None


def test_what_stands_out():
    network = small_network()
    report = network_report(network)
    assert report.images == 0
    texts = ' '.join(f.text for f in findings(report))
    assert 'supplies most of the merged kernels' in texts
    assert 'dead' not in texts and 'at risk' not in texts
    assert 'No layer stands out in INT8' in texts

    network[0].branches['1x1'].norm.weight.data.fill_(1e-5)
    report = network_report(network)
    *others, last = report.layers
    noisy = last._replace(range=last.range._replace(snr=21.5))
    report = report._replace(layers=[*others, noisy])
    warnings = [f.text for f in findings(report) if f.kind == 'warning']
    assert warnings == [
        '1 branch is dead, all factors below 0.001: `1x1` of `0`.',
        '1 layer is at risk in INT8, with a signal-to-noise ratio of weights '
        'down to 21.5 dB: `7`.',
    ]


def test_kernels_of_zeros_are_named():
    network = small_network()
    for parameter in network[7].parameters():
        parameter.data.zero_()
    found = findings(network_report(network))
    assert [f.text for f in found if 'a merged kernel of zeros' in f.text] == [
        '1 layer has a merged kernel of zeros, which gives the same for all '
        'images: `7`.'
    ]
    assert any('No layer stands out in INT8' in f.text for f in found)
    for parameter in network.parameters():
        parameter.data.zero_()
    found = findings(network_report(network))
    assert not any('INT8' in f.text for f in found)


@pytest.mark.parametrize('channels', [(3, 8), (4, 4)])
def test_what_is_lost_in_a_transposed_layer(channels):
    torch.manual_seed(0)
    network = nn.Sequential(nn.ConvTranspose2d(*channels, 4, 2, 1))
    insert_blocks_(network)
    randomize(network)
    network.eval()
    check_lost(network, torch.randn(2, channels[0], 7, 6))
