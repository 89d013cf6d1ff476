"""Layers that compute as in eight bits, and the file that really does."""

import copy
import functools
import io
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import distance, export, image, sums_saturate
from mmcv.cnn.bricks import Conv2dAdaptivePadding, ConvAWS2d, ConvWS2d
from mmengine.config import Config
from networks import CONFIGS, SIZE
from registered import each_block
from tiny_demo import tame
from torch import nn

from mmdbb import DBB
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.export.modules import export_module
from mmdbb.mm.quantization.fake import (
    add_quantizers_,
    freeze_ranges_,
    own_layers,
    quantizers,
    remove_quantizers_,
    set_quantizing_,
)
from mmdbb.mm.quantization.flow import layers_to_quantize
from mmdbb.mm.quantization.qat import prepare_qat_
from mmdbb.mm.quantization.qdq import weight_scales, write_qdq
from mmdbb.mm.quantization.quantizers import (
    ActivationQuantizer,
    WeightQuantizer,
)
from mmdbb.mm.quantization.session import OnnxNetwork
from mmdbb.own_forward import is_plain

needs_whole_sums = pytest.mark.skipif(
    sums_saturate(), reason='eight-bit sums saturate on x86 without VNNI'
)


def learn_ranges(model, batches=2, size=SIZE):
    """Turn quantizers on and show them data, norms as they are."""
    set_quantizing_(model)
    for quantizer in quantizers(model):
        quantizer.train()
    call = as_function(model)
    with torch.no_grad():
        for seed in range(batches):
            call(image(4, 3, *size, seed=seed, dtype=torch.float32))
    return model.eval()


def as_function(model):
    detects = hasattr(model, 'bbox_head') or hasattr(model, 'rpn_head')
    return export_module(model, head=detects)


def by_hand(x, low, high, steps=255):
    """Affine quantization to so many steps, zero among them."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / steps
    zero = round(-low / scale)
    return ((x / scale).round() + zero).clamp(0, steps).sub(zero) * scale


# One layer


@each_block()
def test_the_equivalent_kernel_is_quantized(kind):
    block = tame(kind(4, 6, 3, padding=1)).train()
    names = list(block.state_dict())
    x = image(2, 4, 5, 6, dtype=torch.float32)
    kernel, bias = block.get_equivalent_kernel_bias()
    add_quantizers_(block, 1.0)
    assert isinstance(block, kind)
    set_quantizing_(block)
    found = block(x)
    scale = kernel.abs().amax((1, 2, 3), keepdim=True) / 127
    kernel = (kernel / scale).round() * scale
    x = by_hand(x, x.min().item(), x.max().item())
    expected = F.conv2d(x, kernel, bias, padding=1)
    assert distance(found, expected) < 1e-5
    found.square().sum().backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad is not None, name
    kept = [n for n in block.state_dict() if '_quantizer' not in n]
    assert kept == names


def test_rounding_passes_gradients():
    block, twin = (tame(DBB(4, 6, 3, padding=1)).eval() for _ in range(2))
    twin.load_state_dict(block.state_dict())
    add_quantizers_(block)
    set_quantizing_(block)
    block.train()
    x = image(2, 4, 5, 6, dtype=torch.float32)
    weight = image(2, 6, 5, 6, seed=1, dtype=torch.float32)
    (block(x) * weight).sum().backward()
    (twin(x) * weight).sum().backward()
    found = block.branches['kxk'].conv.weight.grad
    expected = twin.branches['kxk'].conv.weight.grad
    assert 0 < distance(found, expected) < 0.05


@pytest.mark.parametrize(
    'layer',
    [
        nn.Conv2d(4, 6, 3, padding=1, padding_mode='reflect'),
        nn.Conv2d(4, 6, 3, groups=2, bias=False),
        nn.Linear(6, 3),
    ],
    ids=['reflect', 'groups', 'linear'],
)
def test_plain_layers(layer):
    layer = copy.deepcopy(layer)
    x = image(2, 4, 5, 6, dtype=torch.float32)
    plain = layer(x)
    add_quantizers_(layer)
    assert torch.equal(layer(x), plain)  # nothing is turned on
    set_quantizing_(layer)
    layer.train()
    assert 0 < distance(layer(x), plain) < 0.05


def test_weights_are_quantized_as_they_are_now():
    quantizer = WeightQuantizer()
    quantizer(torch.full((2, 1, 1, 1), 9.0))
    kernel = torch.tensor([[1.0, 0.5], [-0.2, 0.1]]).reshape(2, 2, 1, 1)
    quantizer(kernel)
    assert torch.allclose(quantizer.scale, torch.tensor([1.0, 0.2]) / 127)
    assert not quantizer.zero_point.any()
    seven = WeightQuantizer(per_channel=False, reduce_range=True)
    seven(kernel)
    assert seven.scale.item() == pytest.approx(1 / 63)


def test_a_relu_behind_needs_no_room_below_zero():
    quantizer = ActivationQuantizer(relu=True)
    y = quantizer(torch.tensor([-3.0, 0.5, 1.0]))
    assert y.tolist() == pytest.approx([0, 0.5, 1], abs=0.01)
    assert quantizer.zero_point.item() == 0
    assert quantizer.scale.item() == pytest.approx(1 / 255)


def test_ranges_are_learned_in_training_until_frozen():
    quantizer = ActivationQuantizer(averaging_constant=0.5)
    quantizer(torch.tensor([0.0, 1.0]))
    quantizer(torch.tensor([0.0, 3.0]))
    assert quantizer.scale.item() == pytest.approx(2 / 255)
    quantizer.eval()(torch.tensor([0.0, 9.0]))
    freeze_ranges_(quantizer.train())
    quantizer(torch.tensor([0.0, 9.0]))
    assert quantizer.scale.item() == pytest.approx(2 / 255)


@pytest.mark.parametrize('first', [True, False])
@pytest.mark.parametrize('bad', [math.nan, math.inf, -math.inf])
def test_a_batch_that_overflows_does_not_count(bad, first):
    """Under AMP its step is skipped; its range must not stay for ever."""
    batches = [torch.tensor([-1.0, 2.0]), torch.tensor([0.5, 4.0])]
    quantizer, expected = ActivationQuantizer(0.5), ActivationQuantizer(0.5)
    for batch in batches:
        expected(batch)
    batches.insert(0 if first else 1, torch.tensor([bad, 1.0]))
    for batch in batches:
        quantizer(batch)
    assert quantizer.scale == expected.scale == pytest.approx(3.25 / 255)
    assert quantizer.zero_point == expected.zero_point == 20


@pytest.mark.parametrize('per_channel', [True, False])
def test_a_norm_behind_is_thought_of_as_folded(per_channel):
    """Quantizing before the norm is quantizing what the file will hold."""
    conv, norm = nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6)
    model = tame(nn.Sequential(conv, norm)).eval()
    norm.weight.data[1] *= -1
    prepare_qat_(model, (8, 8), per_channel=per_channel)
    learn_ranges_of = image(2, 4, 8, 8, dtype=torch.float32)
    set_quantizing_(model)
    model[0].input_quantizer.train()(learn_ranges_of)
    model.eval()
    found = model(learn_ranges_of)
    scale = norm.weight / (norm.running_var + norm.eps).sqrt()
    kernel = conv.weight * scale.reshape(-1, 1, 1, 1)
    kernel = WeightQuantizer(per_channel)(kernel)
    shift = norm.bias - norm.running_mean * scale
    x = model[0].input_quantizer(learn_ranges_of)
    assert distance(found, F.conv2d(x, kernel, shift)) < 1e-5


# Layers with a forward of their own


class Twice(nn.Conv2d):
    """Changes the result."""

    def forward(self, x):
        return 2 * super().forward(x)


class InPlace(nn.Conv2d):
    """Changes the result where it stands."""

    def forward(self, x):
        return super().forward(x).mul_(2)


class Centered(nn.Conv2d):
    """Changes the kernel, further inside."""

    def _conv_forward(self, x, weight, bias):
        weight = weight - weight.mean((1, 2, 3), keepdim=True)
        return super()._conv_forward(x, weight, bias)


class Padding(nn.Conv2d):
    """Changes its input only."""

    def forward(self, x):
        return super().forward(F.pad(2 * x, (1, 0, 2, 1)))


class Passing(nn.Linear):
    """Does what its class does."""

    def forward(self, x):
        return F.linear(input=x, weight=self.weight, bias=self.bias)


PLAIN = [
    nn.Conv2d,
    Padding,
    functools.partial(Conv2dAdaptivePadding, stride=2),
    functools.partial(nn.Conv2d, padding=1, padding_mode='reflect'),
]
OWN = [Twice, InPlace, Centered, ConvWS2d, ConvAWS2d]


@needs_whole_sums
@pytest.mark.parametrize('kind', PLAIN + OWN, ids=str)
def test_training_and_file_are_one_function(kind, tmp_path):
    """Whatever a layer's forward does, and close to the float network's."""
    pytest.importorskip('onnxruntime')
    model = nn.Sequential(kind(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    model = tame(model.append(nn.Conv2d(8, 4, 1))).eval()
    x = image(2, 3, *SIZE, dtype=torch.float32)
    written, expected = prepare_qat_(model, SIZE), model(x)
    assert list(written) == (['0', '3'] if kind in PLAIN else ['3'])
    assert list(own_layers(model)) == ([] if kind in PLAIN else ['0'])
    assert torch.equal(model(x), expected)  # nothing is turned on
    learn_ranges(model)
    found = model(x)
    assert 1e-4 < distance(found, expected) < 0.05
    plain = copy.deepcopy(model)
    remove_quantizers_(plain)
    assert torch.equal(plain(x), expected)
    if kind in (nn.Conv2d, InPlace, Centered, ConvWS2d):
        return  # the files of the others will do
    path, out = str(tmp_path / 'float.onnx'), str(tmp_path / 'int8.onnx')
    export(plain, path, image_size=SIZE)
    assert write_qdq(path, out, model).quantized == len(written)
    (integers,) = OnnxNetwork(out)(x)
    # A number on the edge between two steps rounds either way.
    lost = (found - expected).abs().mean()
    assert (integers - found).abs().mean() < 0.2 * lost


@needs_whole_sums
def test_the_runtime_leaves_in_float_what_training_left(tmp_path):
    """Also between two layers in integers, where it quantizes weights."""
    pytest.importorskip('onnxruntime')
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), Twice(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1)
    ).eval()
    with torch.no_grad():
        model[1].weight[0, 0, 0, 0] = 20  # rounding would erase the others
    prepare_qat_(model, SIZE)
    learn_ranges(model)
    x = image(2, 3, *SIZE, dtype=torch.float32)
    found, plain = model(x), copy.deepcopy(model)
    remove_quantizers_(plain)
    path, out = str(tmp_path / 'float.onnx'), str(tmp_path / 'int8.onnx')
    export(plain, path, image_size=SIZE)
    assert write_qdq(path, out, model).quantized == 2
    (integers,) = OnnxNetwork(out)(x)
    lost = (found - plain(x)).abs().mean()
    assert (integers - found).abs().mean() < 0.2 * lost


def test_what_is_left_in_float_is_named(monkeypatch):
    said = []
    monkeypatch.setattr(
        'mmdbb.mm.quantization.qat.print_log',
        lambda text, _: said.append(text),
    )
    model = nn.Sequential(Twice(3, 4, 3), nn.Conv2d(4, 4, 1))
    prepare_qat_(model, (8, 8))
    assert said == [
        'left in float, because their forward is their own: 0 (Twice)'
    ]
    with pytest.raises(ValueError, match='Sequential has no block, convol'):
        prepare_qat_(nn.Sequential(Twice(3, 4, 3)), (8, 8))


@pytest.mark.parametrize(
    'change',
    [
        lambda m: nn.utils.parametrizations.weight_norm(m[0]),
        lambda m: nn.utils.prune.random_unstructured(m[0], 'weight', 0.5),
        lambda m: setattr(m[0], 'forward', m[0].forward),
    ],
    ids=['parametrized', 'masked', 'forward of the object'],
)
def test_a_weight_that_is_computed_is_left_in_float(change, quiet):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    change(model)
    assert list(prepare_qat_(model, (8, 8))) == ['1']


def test_a_block_with_a_forward_of_its_own_is_left_in_float(quiet):
    class Doubled(DBB):
        def forward(self, x):
            return 2 * super().forward(x)

    model = nn.Sequential(Doubled(3, 4, 3), nn.Conv2d(4, 4, 1)).eval()
    assert list(prepare_qat_(model, (8, 8))) == ['1']


def test_probing_a_layer_changes_nothing():
    class Counting(nn.Conv2d):
        calls = 0

        def forward(self, x):
            self.calls += 1
            torch.rand(1)
            return super().forward(x)

    layer = Counting(3, 4, 3)
    state = torch.get_rng_state()
    assert is_plain(layer)
    assert layer.calls == 0 and layer.training
    assert torch.equal(torch.get_rng_state(), state)
    assert is_plain(Passing(3, 4).to('meta'))
    assert not is_plain(Twice(3, 4, 3).to('meta'))


def test_a_norm_with_a_forward_of_its_own_is_not_folded():
    class NormAndReLU(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x).relu()

    model = nn.Sequential(nn.Conv2d(3, 4, 3), NormAndReLU(4)).eval()
    # The norm is an operation like others, so what it reads is quantized; not
    # through a ReLU, which comes after it.
    assert layers_to_quantize(model, (8, 8))['0'] == (None, True, False)


def test_a_norm_of_two_convolutions_is_not_folded():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)
            self.norm = nn.BatchNorm2d(4)

        def forward(self, x):
            return self.norm(self.a(x)).relu() + self.norm(self.b(x)).relu()

    found = layers_to_quantize(Shared().eval(), (8, 8))
    assert found == dict.fromkeys('ab', (None, True, False))


class Tokens(nn.Module):
    """Linear layers on three dimensions, which exports transpose."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.first = nn.Linear(8, 6)
        self.twin = nn.Linear(6, 6, bias=False)
        self.last = nn.Linear(6, 5)

    def forward(self, x):
        y = self.first(self.embed(x).flatten(2).transpose(1, 2))
        y = y + self.twin(y.relu())
        return self.last(y.mean(1))


@pytest.mark.parametrize('arguments', [{}, dict(per_channel=False)], ids=str)
def test_products_of_matrices_are_written_as_they_were_trained(
    arguments, tmp_path
):
    pytest.importorskip('onnxruntime')
    model = Tokens().eval()
    written = prepare_qat_(model, SIZE, **arguments)
    assert written['twin'].quantized and written['first'].quantized
    learn_ranges(model)
    plain = copy.deepcopy(model)
    remove_quantizers_(plain)
    path, out = str(tmp_path / 'float.onnx'), str(tmp_path / 'int8.onnx')
    export(plain, path, image_size=SIZE)
    layers = write_qdq(path, out, model)
    assert layers.quantized == 4 and 'MatMul' not in layers.left
    x = image(2, 3, *SIZE, seed=5, dtype=torch.float32)
    with torch.no_grad():
        expected, real = model(x), plain(x)
    (found,) = OnnxNetwork(out, optimize=False)(x)
    assert distance(found, expected) < 0.2 * distance(real, expected)


def test_a_layer_that_the_file_lacks_is_not_left_in_float(tmp_path):
    pytest.importorskip('onnxruntime')
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 1)).eval()
    other = nn.Sequential(copy.deepcopy(model[0]))
    path = str(tmp_path / 'float.onnx')
    export(other, path, image_size=(8, 8))
    prepare_qat_(model, (8, 8))
    learn_ranges(model, size=(8, 8))
    with pytest.raises(UserError, match='no node for layers .*INT8: 1; in'):
        write_qdq(path, str(tmp_path / 'int8.onnx'), model)


def test_a_shared_layer_is_found_under_each_of_its_names(tmp_path):
    pytest.importorskip('onnxruntime')

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 3, 1)
            self.b = nn.ModuleList([self.a])

        def forward(self, x):
            return self.b[0](x).relu()

    model = Shared().eval()
    assert list(prepare_qat_(model, SIZE)) == ['a']
    learn_ranges(model)
    plain = copy.deepcopy(model)
    remove_quantizers_(plain)
    path, out = str(tmp_path / 'float.onnx'), str(tmp_path / 'int8.onnx')
    export(plain, path, image_size=SIZE)
    assert write_qdq(path, out, model).quantized == 1


# Networks


def build(task, tmp_path):
    """A network whose norms know its activations, as after a training."""
    path = tmp_path / 'config.py'
    path.write_text(CONFIGS[task])
    torch.manual_seed(0)
    model = build_model(Config.fromfile(path))
    model.init_weights()
    call = as_function(model.train())
    with torch.no_grad():
        for seed in range(30):
            call(image(4, 3, *SIZE, seed=seed, dtype=torch.float32))
    return model.eval()


def test_where_outputs_are_quantized(tmp_path, quiet):
    found = layers_to_quantize(build('classifier', tmp_path))
    quantized = {name for name, output in found.items() if output.quantized}
    # What sums read; the stem's goes to the first shortcut.
    assert quantized == {
        'backbone.conv1',
        'backbone.layer1.0.conv2',
        'backbone.layer1.1.conv2',
        'backbone.layer2.0.conv2',
        'backbone.layer2.0.downsample.0',
        'backbone.layer2.1.conv2',
    }
    assert found['backbone.conv1'] == ('backbone.bn1', True, True)
    assert not found['backbone.layer1.0.conv2'].relu
    assert found['backbone.layer2.0.downsample.0'].norm is not None
    assert 'head.fc' in found


def test_a_network_of_convolutions_that_pad_by_themselves(quiet):
    """EfficientNet has an attribute ``in_channels``: not that of images."""
    from mmpretrain.models.backbones import EfficientNet

    conv_cfg = dict(type='Conv2dAdaptivePadding')
    model = EfficientNet('b0', conv_cfg=conv_cfg)
    model.eval()
    written = layers_to_quantize(model, (32, 32))
    assert len(written) > 80 and not own_layers(model)


def test_what_no_export_runs_through_is_left(tmp_path, quiet):
    found = layers_to_quantize(build('segmentor', tmp_path))
    assert 'decode_head.conv_seg' in found
    assert not [name for name in found if name.startswith('auxiliary_head')]


@needs_whole_sums
@pytest.mark.parametrize('task', ['classifier', 'segmentor', 'detector'])
def test_integers_agree_with_fake_quantization(task, tmp_path, quiet):
    pytest.importorskip('onnxruntime')
    model = build(task, tmp_path)
    names = list(model.state_dict())
    types = [type(m) for m in model.modules()]
    prepare_qat_(model)
    learn_ranges(model)
    plain = copy.deepcopy(model)
    remove_quantizers_(plain)
    assert list(plain.state_dict()) == names
    assert [type(m) for m in plain.modules()] == types
    path, out = str(tmp_path / 'float.onnx'), str(tmp_path / 'int8.onnx')
    export(plain, path, image_size=SIZE, head=task == 'detector')
    layers = write_qdq(path, out, model)
    assert layers.quantized >= 11 and 'Conv' not in layers.left
    x = image(4, 3, *SIZE, seed=5, dtype=torch.float32)
    with torch.no_grad():
        fake, real = as_function(model)(x), as_function(plain)(x)
    integers = OnnxNetwork(out)(x)
    for a, b, c in zip(integers, fake, real):
        # A number on the edge rounds either way and moves others with it;
        # that stays well below what quantization itself changes.
        assert (a - b).abs().mean() < 0.6 * (a - c).abs().mean()
        assert (a - b).abs().mean() < 0.05 * c.abs().mean()
    with pytest.raises(UserError, match='quantized already: it has Deq'):
        write_qdq(out, path, model)


@pytest.mark.parametrize('arguments', [{}, dict(per_channel=False)], ids=str)
def test_integers_agree_to_the_step(arguments, tmp_path):
    """In two layers no rounding has far to travel."""
    pytest.importorskip('onnxruntime')
    model = tame(
        nn.Sequential(
            DBB(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1, groups=2)
        )
    )
    prepare_qat_(model, SIZE, reduce_range=True, **arguments)
    learn_ranges(model)
    plain = copy.deepcopy(model)
    remove_quantizers_(plain)
    path, out = str(tmp_path / 'float.onnx'), str(tmp_path / 'int8.onnx')
    export(plain, path, image_size=SIZE)
    write_qdq(path, out, model)
    x = image(2, 3, *SIZE, seed=5, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
    for optimize in (True, False):
        (found,) = OnnxNetwork(out, optimize=optimize)(x)
        error = (found - expected).abs()
        step = model[2].input_quantizer.scale.item()
        assert (error > 0.01 * step).double().mean() < 0.01
        assert error.max() < 4 * step * plain[2].weight.abs().max()


def test_bias_beside_a_vanishing_kernel_fits():
    weight = np.array([[[[1e-9]]], [[[2.0]]]], np.float32)
    bias = np.array([3.0, 1.0], np.float32)
    scales = weight_scales(weight, bias, 0.1, 127)
    assert np.all(np.abs(bias / (scales * 0.1)) < 2**31 - 1)
    assert scales[1] == np.float32(2 / 127)
    assert weight_scales(weight, bias, 0.1, 127, axis=None).shape == ()


@pytest.mark.parametrize('axis', [0, None])
def test_a_scale_is_raised_where_the_bias_would_not_fit(axis):
    weight = np.array([[[[1e-9]]], [[[-1e-8]]]], np.float32)
    bias = np.array([3.0, -5.0], np.float32)
    source, largest = 1e-3, 2**31 - 1
    alone = weight_scales(weight, None, source, 127, axis)
    # Without the rule no 32 bits would do, which is what it is there for.
    assert np.all(np.abs(bias / (alone.astype(float) * source)) > largest)
    scales = weight_scales(weight, bias, source, 127, axis)
    assert scales.shape == alone.shape and scales.dtype == np.float32
    integers = np.rint(bias / (scales.astype(float) * source))
    assert np.all(np.abs(integers) < 0.75 * largest)
    assert np.abs(integers).max() > 0.25 * largest
    # A bias that fits leaves the scale alone, whatever its sign.
    small = weight_scales(weight, np.float32(1e-9) * bias, source, 127, axis)
    assert np.array_equal(small, alone)


def test_ranges_that_were_never_learned(tmp_path):
    pytest.importorskip('onnxruntime')
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    path = str(tmp_path / 'float.onnx')
    export(model, path, image_size=(8, 8))
    prepare_qat_(model, (8, 8))
    with pytest.raises(UserError, match='0.input_quantizer has seen no data'):
        write_qdq(path, str(tmp_path / 'int8.onnx'), model)


def test_nothing_to_quantize():
    with pytest.raises(ValueError, match='ReLU has no block, convolution'):
        prepare_qat_(nn.ReLU())
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    prepare_qat_(model, (8, 8))
    with pytest.raises(ValueError, match='has quantizers already'):
        prepare_qat_(model, (8, 8))


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize('duplicate', [copy.deepcopy, pickled])
def test_copies_have_quantizers_of_their_own(duplicate, tmp_path, quiet):
    model = build('classifier', tmp_path)
    types = [type(m) for m in model.modules()]
    prepare_qat_(model)
    learn_ranges(model)
    other = duplicate(model)
    norm = other.backbone.bn1
    assert other.backbone.conv1.folded_norm == (norm,)
    x = image(2, 3, *SIZE, dtype=torch.float32)
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(other(x), expected)
        for parameter in model.parameters():
            parameter.zero_()
        assert torch.equal(other(x), expected)
    remove_quantizers_(other)
    assert [type(m) for m in other.modules()] == types
