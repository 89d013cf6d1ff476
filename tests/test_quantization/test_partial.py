"""Networks of which some layers stay in float: which, how, and how few."""

import copy
import json
import math

import pytest
import torch

pytest.importorskip('onnxruntime')

import onnx
from helpers import distance, export, run_tool, sums_saturate
from mmcv.cnn import ConvWS2d
from mmengine.runner import Runner
from onnx import TensorProto
from torch import nn

from mmdbb.blocks import DBB
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.evaluation.images import Calibration
from mmdbb.mm.evaluation.metric import Figure, Metric
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization import ptq
from mmdbb.mm.quantization.flow import layers_to_quantize
from mmdbb.mm.quantization.network import load_network
from mmdbb.mm.quantization.onnx_layers import matching, name_nodes_
from mmdbb.mm.quantization.onnx_static import layers_in, quantize_onnx
from mmdbb.mm.quantization.partial import fewest_in_float
from mmdbb.mm.quantization.post_training import QuantizeOptions
from mmdbb.mm.quantization.ptq import quantize_checkpoint
from mmdbb.mm.quantization.qat import prepare_qat_
from mmdbb.mm.quantization.sensitivity import report_sensitivity
from mmdbb.mm.quantization.session import OnnxNetwork

# Which layers
needs_whole_sums = pytest.mark.skipif(
    sums_saturate(), reason='eight-bit sums saturate on x86 without VNNI'
)


class Mixed(nn.Module):
    """Layers of all kinds, one that runs twice, and two of equal weights."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(DBB(3, 8, 3, padding=1), nn.ReLU())
        self.twice = nn.Conv2d(8, 8, 3, padding=1)
        self.scaled = ConvWS2d(8, 8, 3, padding=1)
        self.up = nn.ConvTranspose2d(8, 8, 2, 2)
        self.first = nn.Linear(8, 8)
        self.second = nn.Linear(8, 8)
        self.second.load_state_dict(self.first.state_dict())
        self.last = nn.Linear(8, 4)

    def forward(self, x):
        x = self.stem(x)
        x = x + self.twice(x)
        x = self.twice(x).relu() + self.scaled(x)
        x = self.up(x).flatten(2).transpose(1, 2)
        x = self.second(self.first(x).relu())
        x = x @ x.transpose(1, 2) @ x
        return self.last(x.mean(1))


NAMES = ['stem.0', 'twice', 'scaled', 'up', 'first', 'second', 'last']


@pytest.fixture(scope='module')
def mixed(tmp_path_factory):
    """The path of its file, and images."""
    torch.manual_seed(0)
    path = str(tmp_path_factory.mktemp('mixed') / 'float.onnx')
    export(Mixed().eval(), path, image_size=(8, 8))
    return path, torch.randn(8, 3, 8, 8)


def by_operator(path):
    """The nodes with weights in order, each with what its weight is made of.

    The order is that of `Mixed.forward`; `twice` stands there two times.
    """
    graph = onnx.load(path).graph
    dequantized = {
        name
        for node in graph.node
        if node.op_type == 'DequantizeLinear'
        for name in node.output
    }
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    nodes = [
        node
        for node in graph.node
        if node.op_type in ('Conv', 'ConvTranspose', 'Gemm')
        or (node.op_type == 'MatMul' and 'matmul' not in node.name)
    ]
    order = ('stem.0', 'twice', 'twice', *NAMES[2:])
    assert len(nodes) == len(order)
    return [
        (name, kinds.get(node.input[1]), node.input[1] in dequantized)
        for name, node in zip(order, nodes)
    ]


def test_layers_are_named_as_modules(mixed):
    assert sorted(layers_in(mixed[0])) == sorted(NAMES)
    assert sorted(layers_in(mixed[0], ['Conv', 'Add'])) == sorted(NAMES[:3])


def test_a_networks_layers_are_named_as_in_the_report(
    trained, sizes, tmp_path, quiet
):
    """Also those that a detector runs once for each level."""
    cfg, checkpoint = trained('detection')
    model = load_network(build_model(cfg), checkpoint)
    path, size = str(tmp_path / 'float.onnx'), sizes['detection']
    export(model, path, image_size=size, head=True)
    assert sorted(layers_in(path)) == sorted(layers_to_quantize(model, size))


@pytest.mark.parametrize('per_channel', [True, False])
@pytest.mark.parametrize(
    'kept', [['twice', 'first'], ['stem.0', 'scaled', 'second'], NAMES[:-1]]
)
def test_kept_layers_are_float_in_the_file(kept, per_channel, mixed, tmp_path):
    path, images = mixed
    out = str(tmp_path / 'int8.onnx')
    quantize_onnx(path, out, images, per_channel=per_channel, kept=kept)
    for name, kind, rounded in by_operator(out):
        assert rounded == (name not in kept), name
        assert kind == (TensorProto.FLOAT if name in kept else None), name


@needs_whole_sums
def test_runtimes_compute_kept_layers_in_float(bad, tmp_path):
    """ONNX Runtime quantizes weights by itself, when it loads a file.

    It does so between dequantized input and quantized output. Unless it may
    change the file it computes each node as it stands there.
    """
    torch.manual_seed(0)
    images, out = torch.randn(8, 3, 32, 32), str(tmp_path / 'int8.onnx')
    quantize_onnx(bad[1], out, images, per_channel=False, kept=['bad'])
    (found,) = OnnxNetwork(out)(images)
    (expected,) = OnnxNetwork(bad[1])(images)
    (literal,) = OnnxNetwork(out, optimize=False)(images)
    assert distance(found, literal) < 0.02 and distance(found, expected) < 0.1


def test_only_what_computes_in_integers_rounds(mixed, tmp_path):
    """No node rounds numbers between layers that are kept."""
    path, images = mixed
    out = str(tmp_path / 'int8.onnx')
    quantize_onnx(path, out, images, kept=NAMES[:-1])
    nodes = onnx.load(out).graph.node
    rounding = [n for n in nodes if n.op_type == 'QuantizeLinear']
    last = next(n for n in nodes if n.op_type == 'Gemm')
    before = {n.output[0]: n for n in nodes}
    source = before[before[last.input[0]].input[0]]
    assert source in rounding and len(rounding) <= 2  # its input and output


def test_all_layers_kept_is_the_float_file(mixed, tmp_path):
    path, images = mixed
    out = tmp_path / 'float.onnx'
    layers = quantize_onnx(path, str(out), images, kept=NAMES)
    assert not layers.quantized
    (found,), (expected,) = (
        OnnxNetwork(str(out))(images),
        OnnxNetwork(path)(images),
    )
    assert found.equal(expected)


def test_nodes_without_names_are_told_apart(mixed, tmp_path):
    """As in files that other programs wrote; then their weights tell."""
    path, images = mixed
    model = onnx.load(path)
    for node in model.graph.node:
        node.name = ''
        del node.metadata_props[:]
    bare, out = str(tmp_path / 'bare.onnx'), str(tmp_path / 'int8.onnx')
    onnx.save(model, bare)
    name_nodes_(model)
    names = [node.name for node in model.graph.node]
    assert len(set(names)) == len(names)
    quantize_onnx(bare, out, images, kept=['twice'])
    floats = [n for n, kind, _ in by_operator_kinds(out) if kind]
    assert floats == ['network.twice.weight'] * 2


def by_operator_kinds(path):
    graph = onnx.load(path).graph
    kinds = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return [
        (node.input[1], kinds.get(node.input[1]), node.op_type)
        for node in graph.node
        if node.op_type == 'Conv'
    ]


def test_patterns():
    names = ['stem', 'stage_1.0', 'stage_1.1', 'stage_10.0', 'head.fc']
    assert matching(names, ['stage_1']) == ['stage_1.0', 'stage_1.1']
    assert matching(names, ['head', 's*m']) == ['stem', 'head.fc']
    assert matching(names, ['*.0']) == ['stage_1.0', 'stage_10.0']
    assert matching(names, []) == []
    with pytest.raises(
        UserError, match=r'--keep-float sta matches no .*: stem, .*, head\.fc$'
    ):
        matching(names, ['stem', 'sta'])


# How few


@pytest.mark.parametrize('needed', range(12))
def test_the_fewest_layers_are_found(needed):
    names = [f'layer{i}' for i in range(11)]

    def trial(kept):
        assert kept == names[: len(kept)]
        return 0.0 if len(kept) >= needed else 1.0

    trials = fewest_in_float(lambda: names, trial, 0.5)
    if needed > len(names):
        assert trials[-1] == (names, 1.0)
    else:
        assert trials[-1] == (names[:needed], 0.0)
    counts = [len(each.kept) for each in trials]
    assert len(set(counts)) == len(counts) <= 6


def test_no_order_is_asked_for_in_vain():
    trials = fewest_in_float(None, lambda kept: 0.5, 0.5)
    assert trials == [([], 0.5)]


def test_a_figure_that_is_no_number_meets_no_budget():
    trials = fewest_in_float(lambda: ['a'], lambda kept: math.nan, 100)
    assert [trial.kept for trial in trials] == [[], ['a']]


# With data and evaluator


class Bad(nn.Module):
    """A network with one layer that eight bits with one scale destroy.

    One weight of `bad` is a thousand times larger than the others, but reads
    numbers a thousand times smaller.
    """

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, 2, 1)
        self.bad = nn.Conv2d(8, 8, 3, 1, 1)
        self.last = nn.Conv2d(8, 8, 3, 1, 1)
        self.fc = nn.Linear(512, 10)
        with torch.no_grad():
            self.stem.weight[0] /= 1000
            self.stem.bias[0] /= 1000
            self.bad.weight[0, 0] = 1000 * self.bad.weight[1, 1]
            self.last.weight[:, 0] = 0

    def features(self, x):
        x = self.bad(self.stem(x).relu()).relu()
        x = self.last(x).relu()
        return nn.functional.avg_pool2d(x, 2).flatten(1)

    def forward(self, x):
        return self.fc(self.features(x))


@pytest.fixture(scope='module')
def bad(trained, tmp_path_factory):
    """A config, and a network in a file that is right for all its images."""
    cfg, _ = trained('classification')
    cfg = copy.deepcopy(cfg)
    cfg.test_dataloader.dataset.split = 'train'
    torch.manual_seed(0)
    model, preprocess = Bad().eval(), build_model(cfg).data_preprocessor
    batches = [
        preprocess(data)
        for data in Runner.build_dataloader(cfg.test_dataloader)
    ]
    images = torch.cat([batch['inputs'] for batch in batches])
    labels = [s.gt_label for batch in batches for s in batch['data_samples']]
    labels = torch.cat(labels)
    with torch.no_grad():
        features = model.features(images).double()
        ones = torch.ones(len(features), 1)
        inputs = torch.cat([features, ones], 1)
        right = nn.functional.one_hot(labels, 10).double()
        weights = torch.linalg.pinv(inputs, rtol=1e-2) @ right
        model.fc.weight.copy_(weights[:-1].T)
        model.fc.bias.copy_(weights[-1])
        assert (model(images).argmax(1) == labels).all()
    path = str(tmp_path_factory.mktemp('bad') / 'float.onnx')
    export(model, path, image_size=(32, 32))
    return cfg, path


BAD = QuantizeOptions(Calibration(16), per_channel=False)


@needs_whole_sums
def test_the_bad_layer_is_the_most_sensitive(bad, tmp_path, quiet):
    out = tmp_path / 'layers.json'
    report = report_sensitivity(Source(*bad), str(out), BAD)
    assert report.images == 16  # no more were there to calibrate with
    assert [layer.name for layer in report.layers][0] == 'bad'
    assert {layer.name for layer in report.layers} == set(layers_in(bad[1]))
    errors = [layer.error for layer in report.layers]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.2 > 5 * errors[1]
    written = json.loads(out.read_text())
    assert written['layers'][0] == dict(name='bad', error=errors[0])
    assert written['images'] == 16 and written['per_channel'] is False
    # The scale of a channel of its own saves it.
    fine = report_sensitivity(
        Source(*bad), str(out), BAD._replace(per_channel=True), overwrite=True
    )
    assert fine.layers[0].error < 0.1


def test_an_error_is_what_runtimes_compute(bad, tmp_path, quiet):
    """The error of a layer is that of the file with this layer rounded."""
    out, int8 = str(tmp_path / 'layers.json'), str(tmp_path / 'int8.onnx')
    options = BAD._replace(keep_float=['stem', 'last', 'fc'], probes=4)
    report = report_sensitivity(Source(*bad), out, options)
    ((name, error),) = report.layers
    images = BAD.calibration.images(bad[0], build_model(bad[0]), (32, 32))
    quantize_onnx(
        bad[1], int8, images, per_channel=False, kept=options.keep_float
    )
    (found,), (expected,) = (
        OnnxNetwork(path)(images[:4]) for path in (int8, bad[1])
    )
    by_hand = (found - expected).square().mean() / expected.square().mean()
    assert name == 'bad' and report.images == 4
    assert error == pytest.approx(by_hand.sqrt().item(), rel=1e-4)


def test_the_budget_keeps_the_bad_layer_only(bad, tmp_path, quiet):
    out = str(tmp_path / 'int8.onnx')
    source = Source(*bad)
    with pytest.raises(UserError, match='falls by .* more than --max-drop 5'):
        quantize_checkpoint(source, out, BAD, max_drop=5)
    options = BAD._replace(budget=5)
    result = quantize_checkpoint(source, out, options, max_drop=5)
    assert result.kept == ['bad'] and result.drop <= 5
    assert result.trials[0].kept == [] and result.trials[0].drop > 5
    assert result.trials[-1] == (['bad'], result.drop)
    model = onnx.load(out)
    floats = [
        tensor.name
        for tensor in model.graph.initializer
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) == 4
    ]
    assert floats == ['network.bad.weight']
    notes = {p.key: p.value for p in model.metadata_props}['mmdbb']
    notes = json.loads(notes)['quantization']
    assert notes['kept_float'] == ['bad']
    # What is kept by name is not counted.
    named = options._replace(keep_float=['bad', 'fc'])
    result = quantize_checkpoint(
        source, out, named, max_drop=5, overwrite=True
    )
    assert result.kept == ['bad', 'fc']
    assert [trial.kept for trial in result.trials] == [[]]


def test_all_layers_in_float_are_the_network(bad, tmp_path, quiet):
    out = str(tmp_path / 'float.onnx')
    options = BAD._replace(keep_float=['*'])
    result = quantize_checkpoint(Source(*bad), out, options, max_drop=0)
    assert result.drop == 0 and not result.layers.quantized
    images = torch.randn(4, 3, 32, 32)
    (found,), (expected,) = (
        OnnxNetwork(out)(images),
        OnnxNetwork(bad[1])(images),
    )
    assert distance(found, expected) == 0


# Mistakes


def test_a_budget_that_nothing_meets(bad, tmp_path, quiet, monkeypatch):
    metric = Metric('accuracy/top1', 'points', False)
    values = iter((90.0, 10.0, 20.0))
    monkeypatch.setattr(
        ptq, 'evaluate', lambda *args: Figure(metric, next(values))
    )
    with pytest.raises(UserError, match=r'even with .* from 90 to 20, more'):
        quantize_checkpoint(
            Source(*bad),
            str(tmp_path / 'o.onnx'),
            BAD._replace(budget=1, probes=1),
        )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    'changes, arguments, message',
    [
        (dict(budget=2), {}, '--budget 2 allows more than --max-drop 1'),
        (
            dict(budget=1),
            dict(evaluated=False),
            '--budget needs the evaluation: omit --no-test',
        ),
        (
            dict(keep_float=['backbone']),
            {},
            'backbone matches no layer; the layers: stem, bad, last, fc$',
        ),
    ],
)
def test_mistakes(changes, arguments, message, bad, tmp_path, quiet):
    with pytest.raises(UserError, match=message):
        quantize_checkpoint(
            Source(*bad),
            str(tmp_path / 'o.onnx'),
            BAD._replace(**changes),
            **arguments,
        )
    assert not list(tmp_path.iterdir())


def test_networks_trained_for_int8_are_refused(trained, tmp_path, quiet):
    """Their layers and ranges were chosen when they were trained."""
    cfg, checkpoint = trained('classification')
    model = load_network(build_model(cfg), checkpoint)
    prepare_qat_(model, (32, 32))
    path = str(tmp_path / 'qat.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    source, out = Source(cfg, path), str(tmp_path / 'out')
    options = BAD._replace(keep_float=['head'])
    with pytest.raises(UserError, match=r'qat\.pth was trained for INT8'):
        quantize_checkpoint(source, f'{out}.onnx', options)
    with pytest.raises(UserError, match=r'qat\.pth was trained for INT8'):
        report_sensitivity(source, out)
    assert [each.name for each in tmp_path.iterdir()] == ['qat.pth']


# The command


def test_the_command(bad, tmp_path, quiet, capfd):
    cfg, path = bad
    config = tmp_path / 'config.py'
    cfg.dump(config)
    report, out = tmp_path / 'layers.json', tmp_path / 'int8.onnx'
    few = ('--calib', 16, '--per-tensor')

    def run(*options):
        code = run_tool('quantize', config, path, out, *few, *options)
        return code, capfd.readouterr()

    code, said = run('--keep-float', 'heads', '--no-test')
    assert code == 2 and len(said.err.strip().splitlines()) == 1
    assert 'quantize.py: --keep-float heads matches no layer' in said.err
    assert not out.exists()
    code, said = run(
        *('--sensitivity', report, '--sensitivity-images', 4),
        *('--budget', 5, '--max-drop', 5, '--keep-float', 'last'),
    )
    assert code == 0, said.err
    assert 'error of the outputs' in said.out
    assert 'on 4 images' in ' '.join(said.out.split())
    layers = json.loads(report.read_text())['layers']
    assert [layer['name'] for layer in layers][0] == 'bad'
    assert 'last' not in [layer['name'] for layer in layers]
    assert 'left in float: last, bad\n' in said.out and out.exists()
