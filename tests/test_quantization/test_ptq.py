"""From a checkpoint to an INT8 file: three tasks, the command, mistakes."""

import copy
import json
import multiprocessing
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip('onnxruntime')

import onnx
from everything import assert_same, everything
from helpers import deploy
from mmengine.config import Config
from onnx import TensorProto, helper, numpy_helper
from torch.nn.modules.batchnorm import _BatchNorm

import mmdbb
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.evaluation.figures import evaluate, quiet_runner
from mmdbb.mm.evaluation.images import (
    Calibration,
    calibration_images,
    check_calibration,
    pad_to,
)
from mmdbb.mm.evaluation.metric import FIGURES, Metric
from mmdbb.mm.evaluation.substitutes import TorchNetwork, running_instead
from mmdbb.mm.outputs import Source
from mmdbb.mm.quantization import ptq
from mmdbb.mm.quantization.fake import quantizers, set_quantizing_
from mmdbb.mm.quantization.network import load_network
from mmdbb.mm.quantization.onnx_static import METHODS, quantize_onnx
from mmdbb.mm.quantization.post_training import QuantizeOptions
from mmdbb.mm.quantization.ptq import quantize_checkpoint
from mmdbb.mm.quantization.qat import prepare_qat_
from mmdbb.mm.quantization.session import OnnxNetwork
from mmdbb.mm.quantization.tables import print_quantized

ROOT = Path(mmdbb.__file__).parents[1]
FEW = QuantizeOptions(calibration=Calibration(8))


@pytest.mark.parametrize(
    'task', ['classification', 'segmentation', 'detection']
)
def test_each_task(task, trained, sizes, tmp_path, quiet, capsys):
    cfg, checkpoint = trained(task)
    out = str(tmp_path / 'int8.onnx')
    result = quantize_checkpoint(
        Source(cfg, checkpoint), out, FEW, max_drop=None
    )
    assert result.image_size == sizes[task]
    names = [stage.name for stage in result.stages]
    assert names == ['trained', 'merged', 'int8']
    # Its name and unit are those that the package's evaluator gives.
    first = result.stages[0].figure
    assert FIGURES[first.name] == first.metric.unit or first.value <= 1
    # The merged network is the trained one, whoever runs it.
    points = [stage.figure.points for stage in result.stages]
    assert points[0] == pytest.approx(points[1], abs=1e-3)
    assert result.layers.quantized >= 11 and 'Conv' not in result.layers.left
    assert result.images == 8
    weights = [
        numpy_helper.to_array(i)
        for i in onnx.load(out).graph.initializer
        if i.name.endswith('weight_quantized')
    ]
    assert weights and all(w.dtype == 'int8' for w in weights)
    assert sum(w.size for w in weights) < result.stages[2].size
    OnnxNetwork(out)(torch.rand(1, 3, *sizes[task]))
    assert [p.name for p in tmp_path.iterdir()] == ['int8.onnx']
    print_quantized(result)
    assert 'INT8, ONNX' in capsys.readouterr().out


def test_evaluator_sees_what_the_file_computes(trained, quiet):
    """Zeros for logits are the first class for every image."""
    cfg, checkpoint = trained('classification')

    seen = []

    def zeros(images):
        seen.extend(images)
        return [torch.zeros(len(images), 10)]

    zeros.size = (32, 32)
    with quiet_runner(cfg) as runner:
        model = load_network(runner.model, checkpoint).train()
        model.backbone.layer1.eval()
        model.extract_feat(torch.zeros(1, 3, 32, 32))  # fills caches
        before = everything(model)
        ours = evaluate(runner).points
        first = evaluate(runner, zeros).points
        assert evaluate(runner).points == ours
        calibration_images(cfg, model, 2)
        assert_same(everything(model), before)
        assert first == 10.0 and len(seen) == 20
        assert 'forward' not in vars(runner.model.head)
        zeros.size = (64, 64)
        with running_instead(runner.model, zeros):
            with pytest.raises(UserError, match=r'evaluated by a network of'):
                runner.model.extract_feat(torch.zeros(1, 3, 32, 32))


@pytest.fixture(scope='module')
def exported(trained, tmp_path_factory):
    """A float file and images to calibrate with."""
    from helpers import export

    cfg, checkpoint = trained('classification')
    model = load_network(build_model(cfg), checkpoint)
    path = str(tmp_path_factory.mktemp('float') / 'float.onnx')
    export(model, path, image_size=(32, 32))
    return path, calibration_images(cfg, model, 16)


@pytest.mark.parametrize('method', METHODS)
@pytest.mark.parametrize('per_channel', [True, False])
def test_methods(method, per_channel, exported, tmp_path):
    path, images = exported
    out = str(tmp_path / 'int8.onnx')
    quantize_onnx(path, out, images, method, per_channel)
    (found,), (expected,) = OnnxNetwork(out)(images), OnnxNetwork(path)(images)
    error = (found - expected).abs().mean() / expected.abs().mean()
    assert 0 < error < 0.2
    scales = {
        tuple(i.dims)
        for i in onnx.load(out).graph.initializer
        if i.name.endswith('.weight_scale')
    }
    assert ((8,) in scales) == per_channel


def test_calibration_images_are_the_configs(trained, exported):
    cfg, _ = trained('classification')
    _, images = exported
    assert images.shape == (16, 3, 32, 32)
    # Normalised as in training, from black to white.
    assert images.min() == pytest.approx(-33.3 / 78.6, abs=1e-3)
    assert images.max() == pytest.approx((255 - 33.3) / 78.6, abs=0.1)
    model = torch.nn.Module()
    model.data_preprocessor = lambda data, training: dict(
        inputs=torch.stack(data['inputs']).float()
    )
    with pytest.raises(UserError, match='at least one image; got --calib 0'):
        calibration_images(cfg, model, 0)
    with pytest.raises(UserError, match="'eval'; allowed: train, val, test"):
        calibration_images(cfg, model, 1, 'eval')
    empty = copy.deepcopy(cfg)
    empty.train_dataloader = None
    with pytest.raises(UserError, match='has no train_dataloader'):
        calibration_images(empty, model, 1)


@pytest.mark.parametrize(
    'images, message',
    [
        (torch.zeros(0, 3, 4, 4), 'there are no calibration images'),
        (torch.ones(3, 3, 4, 4), 'all 3 calibration images are constant'),
        (torch.full((1, 3, 4, 4), float('nan')), 'not finite'),
    ],
)
def test_images_that_say_nothing(images, message):
    with pytest.raises(UserError, match=message):
        check_calibration(images)


def test_padding_to_the_files_size():
    padded = pad_to(torch.ones(1, 3, 2, 3), (4, 5))
    assert padded.shape == (1, 3, 4, 5) and padded.sum() == 18
    with pytest.raises(UserError, match='6 x 3 pixels does not fit'):
        pad_to(torch.ones(1, 3, 6, 3), (4, 5))


def test_a_checkpoint_trained_for_seven_bits(trained, tmp_path, quiet):
    """Its ranges and its one scale a weight are those of the file."""
    cfg, checkpoint = trained('classification')
    model = load_network(build_model(cfg), checkpoint)
    images = calibration_images(cfg, model, 8)
    prepare_qat_(model, (32, 32), per_channel=False, reduce_range=True)
    set_quantizing_(model)
    model.train()
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.eval()
    for quantizer in quantizers(model):
        quantizer.train()  # some stand in norms
    with torch.no_grad():
        model(images)
    qat, out = str(tmp_path / 'qat.pth'), str(tmp_path / 'int8.onnx')
    torch.save(dict(state_dict=model.state_dict()), qat)
    result = quantize_checkpoint(Source(cfg, qat), out, max_drop=None)
    assert result.images == 0 and result.layers.quantized >= 11
    file = onnx.load(out)
    weights = {
        i.name: numpy_helper.to_array(i)
        for i in file.graph.initializer
        if 'weight' in i.name
    }
    scales = [v for n, v in weights.items() if n.endswith('_scale')]
    assert scales and all(scale.shape == () for scale in scales)
    integers = [v for n, v in weights.items() if n.endswith('_quantized')]
    assert max(abs(v.astype(int)).max() for v in integers) == 63
    scale = model.backbone.conv1.input_quantizer.scale.item()
    written = [numpy_helper.to_array(i) for i in file.graph.initializer]
    assert any(v.shape == () and v == np.float32(scale) for v in written)
    note = {p.key: p.value for p in file.metadata_props}['mmdbb']
    note = json.loads(note)['quantization']
    assert note['method'] == 'trained' and note['per_channel'] is False


def test_the_float_network_is_timed_and_weighed(
    trained, tmp_path, quiet, monkeypatch
):
    """Not the one with quantizers, which nobody deploys."""
    cfg, checkpoint = trained('classification')
    timed = []

    def note(calls):
        timed.extend(call.func for call in calls)
        return [0.0] * len(calls)

    monkeypatch.setattr(ptq, 'interleaved_latency', note)
    model = load_network(build_model(cfg), checkpoint)
    size = sum(
        t.numel() * t.element_size() for t in model.state_dict().values()
    )
    prepare_qat_(model, (32, 32))
    set_quantizing_(model)
    for quantizer in quantizers(model):
        quantizer.train()
    model(calibration_images(cfg, model, 4))
    path = str(tmp_path / 'qat.pth')
    torch.save(dict(state_dict=model.state_dict()), path)
    result = quantize_checkpoint(
        Source(cfg, path), str(tmp_path / 'o.onnx'), evaluated=False
    )
    assert not quantizers(timed[0]._run)
    assert result.stages[0].size == size


def test_all_networks_see_the_same_padded_images(
    trained, tmp_path, quiet, monkeypatch
):
    """A detector's images are padded to the file's size for all of them."""
    cfg, checkpoint = trained('detection')
    seen = []
    for kind in (TorchNetwork, OnnxNetwork):
        call = kind.__call__

        def watched(self, images, call=call):
            seen.append(call(self, images))
            return seen[-1]

        monkeypatch.setattr(kind, '__call__', watched)
    monkeypatch.setattr(
        ptq, 'interleaved_latency', lambda calls: [0.0] * len(calls)
    )
    quantize_checkpoint(
        Source(cfg, checkpoint),
        str(tmp_path / 'o.onnx'),
        FEW,
        image_size=(128, 160),
        max_drop=None,
    )
    torch_maps, merged_maps, int8_maps = seen
    assert torch_maps[0].shape[-2:] == (32, 40)  # of 128 x 160 pixels
    for found, expected, rough in zip(torch_maps, merged_maps, int8_maps):
        assert torch.allclose(found, expected, atol=1e-4)
        assert rough.shape == expected.shape


# Mistakes


def expect(message, outputs, call):
    """One clear line, and nothing written."""
    before = set(outputs.iterdir())
    with pytest.raises(UserError, match=message) as caught:
        call()
    assert '\n' not in str(caught.value).strip()
    assert set(outputs.iterdir()) == before


def test_drop_above_the_limit(trained, tmp_path, quiet):
    cfg, checkpoint = trained('classification')
    expect(
        r'top1 falls by .* more than --max-drop -200; nothing written',
        tmp_path,
        lambda: quantize_checkpoint(
            Source(cfg, checkpoint),
            str(tmp_path / 'o.onnx'),
            FEW,
            max_drop=-200,
        ),
    )


def test_no_collapse_passes_the_guard(
    trained, exported, tmp_path, quiet, monkeypatch
):
    """Of a figure whose unit and direction nobody knows, until they are."""
    cfg, _ = trained('classification')
    values = iter((0.5, 0.2, 0.5, 0.499))
    monkeypatch.setattr(
        'mmengine.evaluator.Evaluator.evaluate',
        lambda self, size: {'val/mAP': next(values)},
    )
    monkeypatch.setattr(
        ptq, 'interleaved_latency', lambda calls: [0.0] * len(calls)
    )
    out = str(tmp_path / 'o.onnx')

    def run(metric=None):
        source = Source(cfg, exported[0])
        return quantize_checkpoint(source, out, FEW, metric=metric)

    expect(
        r'^val/mAP changes by 60.00 per cent of its value, from 0.5 to 0.2 '
        r'\(nothing says .*\), more than --max-drop 1; nothing written$',
        tmp_path,
        run,
    )
    result = run(Metric('val/mAP', 'share', False))
    assert result.drop == pytest.approx(0.1)


def test_workers_have_ended(trained, quiet):
    """Else the interpreter kills them in the end, and their folders stay."""
    cfg = copy.deepcopy(trained('classification')[0])
    cfg.test_dataloader.update(num_workers=1, persistent_workers=True)
    with quiet_runner(cfg) as runner:
        evaluate(runner)
        assert multiprocessing.active_children()
        evaluate(runner)  # with the same workers
    assert not multiprocessing.active_children()


def test_an_image_that_cannot_be_read(trained, tmp_path, quiet):
    cfg = copy.deepcopy(trained('classification')[0])
    data = tmp_path / 'data'
    shutil.copytree(cfg.test_dataloader.dataset.data_root, data)
    for split in ('train', 'val'):
        for path in (data / split).rglob('*.JPEG'):
            path.write_bytes(b'no picture')
    model = build_model(cfg)
    for part in ('train', 'test'):
        cfg[f'{part}_dataloader'].dataset.data_root = f'{data}/'
        cfg[f'{part}_dataloader'].num_workers = 1
    with pytest.raises(UserError, match='train_dataloader cannot load an im'):
        calibration_images(cfg, model, 4)
    with quiet_runner(cfg) as runner:
        loader = runner.test_loop.dataloader
        with pytest.raises(UserError, match='test_dataloader .*: Asser.*val_'):
            evaluate(runner)
        assert runner.test_loop.dataloader is loader
    assert not multiprocessing.active_children()


def test_merged_files(trained, tmp_path, quiet):
    cfg, checkpoint = trained('classification')
    stock = str(tmp_path / 'stock.pth')
    deploy(cfg, checkpoint, stock, image_size=(32, 32))
    merged = Config.fromfile(tmp_path / 'stock.py')
    out = str(tmp_path / 'int8.onnx')
    result = quantize_checkpoint(
        Source(merged, stock), out, FEW, evaluated=False
    )
    assert result.stages[0].figure is None and result.drop is None
    note = {p.key: p.value for p in onnx.load(out).metadata_props}['mmdbb']
    assert json.loads(note)['quantization']['images'] == 8
    again = str(tmp_path / 'again.onnx')
    expect(
        'quantized already: it has DequantizeLinear, QuantizeLinear',
        tmp_path,
        lambda: quantize_checkpoint(Source(merged, out), again, FEW),
    )
    expect(
        'is not merged, but its config builds a merged network',
        tmp_path,
        lambda: quantize_checkpoint(Source(merged, checkpoint), again, FEW),
    )
    expect(
        'does not fit the network of the config',
        tmp_path,
        lambda: quantize_checkpoint(Source(cfg, stock), again, FEW),
    )
    expect(
        'output exists',
        tmp_path,
        lambda: quantize_checkpoint(Source(merged, stock), out, FEW),
    )
    (tmp_path / 'text.onnx').write_text('no network')
    expect(
        'text.onnx is not an ONNX file',
        tmp_path,
        lambda: quantize_checkpoint(
            Source(merged, str(tmp_path / 'text.onnx')), again, FEW
        ),
    )


def test_float_onnx_files(trained, exported, tmp_path, quiet):
    cfg, _ = trained('classification')
    out = str(tmp_path / 'o.onnx')
    expect(
        r'takes images of \(32, 32\) pixels, got --image-size \(64, 32\)',
        tmp_path,
        lambda: quantize_checkpoint(
            Source(cfg, exported[0]), out, FEW, image_size=(64, 32)
        ),
    )
    result = quantize_checkpoint(
        Source(cfg, exported[0]), out, FEW, max_drop=None
    )
    assert [stage.name for stage in result.stages] == ['merged', 'int8']


def network_of(*nodes, weights=(), height=8):
    """A file that maps images of 8 x 8 pixels to ``y``."""
    shape = ['batch', 3, height, 8]
    graph = helper.make_graph(
        list(nodes),
        'network',
        [helper.make_tensor_value_info('images', TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info('y', TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in weights],
    )
    opsets = [helper.make_opsetid('', 18), helper.make_opsetid('mine', 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def test_operators_that_cannot_be_quantized(exported, tmp_path):
    path, images = exported
    out = str(tmp_path / 'int8.onnx')
    expect(
        'cannot quantize the operator Softplus; it can: Add, ',
        tmp_path,
        lambda: quantize_onnx(path, out, images, op_types=['Softplus']),
    )
    node = helper.make_node
    scale = ('scale', np.ones(3, np.float32))
    cases = {
        'mine.onnx': (
            network_of(node('Fancy', ['images'], ['y'], domain='mine')),
            'operator mine.Fancy, which ONNX Runtime can neither run nor',
            None,
        ),
        'exp.onnx': (
            network_of(node('Exp', ['images'], ['y'])),
            'has no operator that can be quantized',
            None,
        ),
        'norm.onnx': (
            network_of(
                node('Reshape', ['scale', 'shape'], ['s']),
                node('InstanceNormalization', ['images', 's', 's'], ['y']),
                weights=[scale, ('shape', np.array([3]))],
            ),
            'ONNX Runtime cannot quantize|nothing in .* was quantized',
            ['InstanceNormalization', 'Reshape'],
        ),
    }
    for name, (model, message, op_types) in cases.items():
        file = str(tmp_path / name)
        onnx.save(model, file)
        with pytest.raises(UserError, match=message):
            quantize_onnx(file, out, torch.rand(2, 3, 8, 8), op_types=op_types)


def test_a_file_that_takes_any_size(tmp_path):
    node = helper.make_node('Exp', ['images'], ['y'])
    path = str(tmp_path / 'any.onnx')
    onnx.save(network_of(node, height='height'), path)
    with pytest.raises(UserError, match='must take images of shape'):
        OnnxNetwork(path)
    onnx.save(network_of(node), path)
    assert OnnxNetwork(path).size == (8, 8)


def test_files_that_would_be_too_large(
    trained, exported, tmp_path, quiet, monkeypatch
):
    from helpers import export

    cfg, _ = trained('classification')
    monkeypatch.setattr('mmdbb.mm.export.formats.LARGEST_ONNX', 1000)
    monkeypatch.setattr('mmdbb.mm.quantization.merged.LARGEST_ONNX', 1000)
    expect(
        r'0.00 GB of weights in single precision, and an ONNX file holds',
        tmp_path,
        lambda: export(build_model(cfg), str(tmp_path / 'a.onnx')),
    )
    expect(
        r'float.onnx has 0.00 GB; an ONNX file holds 0.00 GB at most',
        tmp_path,
        lambda: quantize_checkpoint(
            Source(cfg, exported[0]), str(tmp_path / 'o.onnx'), FEW
        ),
    )


@pytest.mark.parametrize('package', ['onnxruntime', 'onnxscript'])
def test_a_missing_package(package, trained, tmp_path, monkeypatch):
    cfg, checkpoint = trained('classification')
    monkeypatch.setitem(sys.modules, package, None)
    expect(
        rf'needs {package} \(.*\); in the .*: .*pip install -e "\.\[quantizat',
        tmp_path,
        lambda: quantize_checkpoint(
            Source(cfg, checkpoint), str(tmp_path / 'o.onnx')
        ),
    )


def test_the_command(trained, tmp_path):
    cfg, checkpoint = trained('classification')
    tool = str(ROOT / 'tools' / 'quantize.py')

    def run(*arguments):
        command = [sys.executable, tool, cfg.filename, checkpoint]
        return subprocess.run(
            [*command, *map(str, arguments)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )

    out = tmp_path / 'new' / 'int8.onnx'
    done = run(out, '--calib', 8, '--max-drop', 100)
    assert done.returncode == 0, done.stderr
    assert 'accuracy/top1 (points)' in done.stdout and out.exists()
    other = tmp_path / 'other' / 'int8.onnx'
    failed = run(other, '--calib', 8, '--op-types', 'Softplus')
    assert failed.returncode == 2
    assert failed.stderr.splitlines()[-1].startswith(
        'quantize.py: ONNX Runtime cannot quantize the operator Softplus; '
    )
    assert not (tmp_path / 'other').exists()


def test_a_detector_of_two_stages_keeps_its_second(tmp_path, quiet):
    """The file gives features and proposals' maps, the RoI head reads both."""
    from helpers import export
    from mmdet.structures import DetDataSample
    from networks import write_config

    config = write_config(tmp_path, 'detector')
    model = build_model(Config.fromfile(config))
    path = str(tmp_path / 'detector.onnx')
    export(model, path, image_size=(64, 64), head=True)
    sample = DetDataSample(
        metainfo=dict(
            img_shape=(64, 64),
            ori_shape=(64, 64),
            batch_input_shape=(64, 64),
            pad_shape=(64, 64),
            scale_factor=(1.0, 1.0),
        )
    )
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        (expected,) = model.predict(images, [copy.deepcopy(sample)])
        with running_instead(model, OnnxNetwork(path)):
            (found,) = model.predict(images, [copy.deepcopy(sample)])
    expected, found = expected.pred_instances, found.pred_instances
    assert len(expected) == len(found) > 0
    assert torch.allclose(expected.scores, found.scores, atol=1e-4)
    assert torch.allclose(expected.bboxes, found.bboxes, atol=1e-2)
