"""Blocks in models that know nothing of mmdbb, and the models back again."""

import copy
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
import torchvision
from helpers import EXACT, SINGLE, blocks_of, distance, image, randomize
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, Bottleneck
from torchvision.ops import FrozenBatchNorm2d

from mmdbb import (
    DBB,
    insert_blocks_,
    load_plain_weights_,
    merge_back_,
    merge_into_,
    reparameterize,
)
from mmdbb.blocks import OREPAConv
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.errors import UserError
from mmdbb.insert import is_replaceable
from mmdbb.reparam import literal_forward
from mmdbb.tracing import norms_behind, sole_readers

MODELS = {
    'torchvision resnet': lambda: torchvision.models.ResNet(
        Bottleneck, [1, 2, 1, 1], width_per_group=8
    ),
    'torchvision mobilenet_v3': torchvision.models.mobilenet_v3_small,
    'torchvision regnet': torchvision.models.regnet_y_400mf,
    'timm resnet18': ('resnet18', dict(channels=(8, 16, 32, 64))),
    'timm resnet26d': ('resnet26d', dict(channels=(8, 16, 32, 64))),
    'timm efficientnet_b0': ('efficientnet_b0', {}),
}


def build(name):
    builder = MODELS[name]
    if isinstance(builder, tuple):
        timm = pytest.importorskip('timm')
        model = timm.create_model(builder[0], **builder[1])
    else:
        model = builder()
    return randomize(model).double().eval()


def entries(model):
    return {n: tuple(v.shape) for n, v in model.state_dict().items()}


def kernels_of(model, smallest, largest):
    return [
        n
        for n, m in model.named_modules()
        if isinstance(m, nn.Conv2d)
        and smallest <= max(m.kernel_size) <= largest
    ]


# By name and by class; every block: test_blocks/test_registered.py.
@pytest.mark.parametrize('block', ['OREPA', OREPAConv, 'OREPARepVGG'])
def test_composed_kernels_there_and_back(block):
    plain = build('timm resnet18')
    model = copy.deepcopy(plain)
    names = insert_blocks_(model, dict(type=block))
    # Of OREPA the 1x1 kernels too; the stem would be a stack of kernels.
    repvgg = block == 'OREPARepVGG'
    assert names == kernels_of(plain, 2 if repvgg else 1, 6)
    assert isinstance(model.layer1[0].bn1, AbsorbedNorm) == repvgg
    x = image(1, 3, 48, 40)
    with torch.no_grad():
        with literal_forward(model):
            assert distance(model(x), plain(x)) < EXACT
        randomize(model, 1)
        with literal_forward(model):
            expected = model(x)
        before = entries(plain)
        merge_into_(plain, model)
        assert entries(plain) == before
        assert distance(plain(x), expected) < EXACT


@pytest.mark.parametrize('key', ['bias', 'in_channels', 'padding', 'dtype'])
def test_the_convolution_gives_its_own_arguments(key):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())
    with pytest.raises(TypeError, match=rf"block has \['{key}'\]"):
        insert_blocks_(model, {'type': 'DBB', key: 1})
    assert type(model[0]) is nn.Conv2d


def test_composed_kernels_without_a_bias_need_no_norm():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU())
    model = copy.deepcopy(plain)
    insert_blocks_(model, dict(type='OREPA'))
    randomize(model)
    x = torch.rand(2, 3, 8, 7)
    assert distance(plain(x), model(x)) > 0.01
    merge_into_(plain, model)
    assert distance(plain(x), model(x)) < SINGLE


@pytest.mark.parametrize('watched', [False, True])
@pytest.mark.parametrize('name', MODELS)
def test_there_and_back(name, watched):
    plain = build(name)
    model = copy.deepcopy(plain)
    x = image(1, 3, 48, 40)
    example = x if watched else None
    names = insert_blocks_(model, example=example)
    assert names == kernels_of(plain, 2, 6)
    with torch.no_grad():
        with literal_forward(model):
            assert distance(model(x), plain(x)) < EXACT
        # Something to merge, then what no norm's start can hide.
        randomize(model, 1)
        with literal_forward(model):
            expected = model(x)
        merged = reparameterize(model)
        assert distance(merged(x), expected) < EXACT
        assert not blocks_of(merged)
        assert all(type(merged.get_submodule(n)) is nn.Conv2d for n in names)
        before = entries(plain)
        types = [type(m) for m in plain.modules()]
        assert merge_into_(plain, model, example) is plain
        assert entries(plain) == before
        assert [type(m) for m in plain.modules()] == types
        assert distance(plain(x), expected) < EXACT


@pytest.mark.parametrize('name', ['torchvision resnet', 'timm resnet26d'])
def test_another_start_after_inserting(name):
    """Names that are not OpenMMLab's, by both ways of loading."""
    plain, other = build(name), randomize(build(name), 5).eval()
    insert_blocks_(plain)
    x = image(1, 3, 48, 40)
    for load in (
        load_plain_weights_,
        lambda model, state: model.load_state_dict(state, strict=True),
    ):
        model = copy.deepcopy(plain)
        load(model, other.state_dict())
        with torch.no_grad(), literal_forward(model):
            assert distance(model(x), other(x)) < EXACT


def test_convolutions_with_biases_there_and_back():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    plain.append(nn.Conv2d(4, 4, 3))
    randomize(plain).double().eval()
    model = copy.deepcopy(plain)
    assert insert_blocks_(model) == ['0', '2']
    randomize(model, 1)
    x = image(1, 3, 9, 8)
    assert distance(merge_into_(plain, model)(x), model(x)) < EXACT


def test_every_branch_learns():
    model = build('torchvision mobilenet_v3')
    names = insert_blocks_(model)
    model.train()
    x = image(4, 3, 64, 64)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    before = copy.deepcopy(model.state_dict())
    F.cross_entropy(model(x), torch.tensor([1, 5, 7, 9])).backward()
    optimizer.step()
    for name in names:
        for branch in model.get_submodule(name).branches.values():
            assert (branch.last_norm.weight.grad != 0).any()
            for parameter in branch.parameters():
                if parameter.dim() == 4:
                    assert parameter.grad.abs().max() > 0
    changed = [
        n for n, v in model.named_parameters() if (v != before[n]).any()
    ]
    assert sum('branches' in n for n in changed) > 8 * len(names)


class Misleading(nn.Module):
    """Attributes in an order that is not that of the data."""

    def __init__(self):
        super().__init__()
        self.norm2 = nn.BatchNorm2d(4)
        self.conv1 = nn.Conv2d(3, 4, 3, bias=False)
        self.norm_of_nothing = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, bias=False)
        self.norm1 = nn.BatchNorm2d(4)

    def forward(self, x, unused=None):
        if unused is not None:
            return unused
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class TwoReaders(Misleading):
    """The output of conv1 is read by a norm and by a sum."""

    def forward(self, x):
        y = self.conv1(x)
        return self.norm2(self.conv2(F.relu(self.norm1(y) + y)))


class Returned(Misleading):
    """The output of conv2 is also what the caller gets."""

    def forward(self, x):
        y = self.conv2(self.norm1(self.conv1(x)))
        return dict(before=[y], after=self.norm2(y))


class SharedPair(Misleading):
    """A convolution and its norm, used twice."""

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        for _ in range(2):
            y = self.norm2(self.conv2(F.relu(y)))
        return y


class SharedConv(Misleading):
    """A convolution used twice, before two norms."""

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        y = self.norm2(self.conv2(y))
        return self.norm_of_nothing(self.conv2(y))


class SharedNorm(Misleading):
    """Two convolutions before one norm."""

    def forward(self, x):
        return self.norm1(self.conv2(self.norm1(self.conv1(x))))


class Untraceable(Misleading):
    """What it does depends on the data."""

    def forward(self, x):
        y = self.norm1(self.conv1(x))
        return self.norm2(self.conv2(y)) if y.mean() > -100 else y


def tensors(outputs):
    if isinstance(outputs, torch.Tensor):
        return [outputs]
    parts = outputs.values() if isinstance(outputs, dict) else outputs
    return [t for part in parts for t in tensors(part)]


@pytest.mark.parametrize('watched', [False, True])
@pytest.mark.parametrize(
    ('model_type', 'absorbed'),
    [
        (Misleading, ['norm2', 'norm1']),
        (TwoReaders, ['norm2']),
        (Returned, ['norm1']),
        (SharedPair, ['norm2', 'norm1']),
        (SharedConv, ['norm1']),
        (SharedNorm, []),
        (Untraceable, ['norm2', 'norm1']),
    ],
)
def test_follows_the_data(model_type, absorbed, watched):
    torch.manual_seed(0)
    model = randomize(model_type()).double().eval()
    plain = copy.deepcopy(model)
    x = image(2, 3, 9, 8)
    if not watched and model_type is Untraceable:
        with pytest.raises(ValueError, match='give an input to run it on'):
            insert_blocks_(model)
        return
    names = insert_blocks_(model, example=x if watched else None)
    assert names == ['conv1', 'conv2']
    gone = [n for n, m in model.named_modules() if isinstance(m, AbsorbedNorm)]
    assert gone == absorbed
    with literal_forward(model):
        for found, expected in zip(tensors(model(x)), tensors(plain(x))):
            assert distance(found, expected) < EXACT
    reparameterize(model, inplace=True)
    for found, expected in zip(tensors(model(x)), tensors(plain(x))):
        assert distance(found, expected) < EXACT


class TwoByTwo(Misleading):
    """A convolution runs twice and so does a norm, only once together."""

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm2(self.norm_of_nothing(self.conv2(y)))


class OnceThroughRelu(Misleading):
    """A convolution and a norm run twice, once with something between."""

    def forward(self, x):
        y = self.norm2(self.conv2(self.norm1(self.conv1(x))))
        return self.norm2(F.relu(self.conv2(y)))


@pytest.mark.parametrize('model_type', [TwoByTwo, OnceThroughRelu])
@pytest.mark.parametrize('watched', [False, True])
def test_as_many_calls_are_not_the_same_calls(watched, model_type):
    model = randomize(model_type()).double().eval()
    plain, x = copy.deepcopy(model), image(2, 3, 9, 8)
    example = x if watched else None
    readers = {model.conv1: model.norm1, model.conv2: None}
    assert sole_readers(model, example) == readers
    insert_blocks_(model, example=example)
    assert distance(model(x), plain(x)) < EXACT


@pytest.mark.parametrize('watched', [False, True])
def test_a_bias_goes_into_each_of_several_norms(watched):
    plain = randomize(SharedConv()).double().eval()
    model, x = copy.deepcopy(plain), image(2, 3, 9, 8)
    example = x if watched else None
    norms = norms_behind(plain, example)
    assert norms == {
        plain.conv1: (plain.norm1,),
        plain.conv2: (plain.norm2, plain.norm_of_nothing),
    }
    insert_blocks_(model, example=example)
    randomize(model, 1)
    expected = model(x)
    assert distance(plain(x), expected) > 1e-3
    assert distance(merge_into_(plain, model, example)(x), expected) < EXACT


@pytest.mark.parametrize('model_type', [SharedNorm, TwoByTwo])
def test_a_norm_of_others_takes_no_bias(model_type):
    plain = randomize(model_type()).double().eval()
    model = copy.deepcopy(plain)
    insert_blocks_(model)
    randomize(model, 1)
    with pytest.raises(
        UserError, match='no norm alone reads its output .a norm that reads so'
    ):
        merge_into_(plain, model)


class Looks(Misleading):
    """Asks for a shape, which tells nothing of the values."""

    def forward(self, x):
        y = self.conv1(x)
        height, width = y.shape[-2:]
        count = y.size(0)
        y = self.norm1(y)
        return self.norm2(self.conv2(y)).reshape(count, -1, height - 2)


@pytest.mark.parametrize('watched', [False, True])
def test_a_shape_is_no_reader(watched):
    model = Looks()
    readers = sole_readers(model, torch.rand(1, 3, 9, 9) if watched else None)
    assert readers == {model.conv1: model.norm1, model.conv2: model.norm2}


@pytest.mark.parametrize('watched', [False, True])
def test_frozen_norms_stay_and_take_the_bias(watched):
    def norm(channels):
        norm = FrozenBatchNorm2d(channels, eps=0.1)
        for buffer in norm.buffers():
            nn.init.uniform_(buffer, 0.3, 2)
        return norm

    plain = torchvision.models.ResNet(
        BasicBlock, [1, 1, 1, 1], norm_layer=norm
    )
    plain.layer3, plain.layer4, plain.fc = (nn.Identity() for _ in range(3))
    plain.double().eval()
    model, x = copy.deepcopy(plain), image(1, 3, 32, 24)
    example = x if watched else None
    insert_blocks_(model, example=example)
    with torch.no_grad():
        assert distance(model(x), plain(x)) < EXACT
        randomize(model, 1)
        expected = model(x)
        merge_into_(plain, model, example)
        assert distance(plain(x), expected) < EXACT
    assert type(model.layer1[0].bn1) is FrozenBatchNorm2d


@pytest.mark.parametrize('example', ['tuple', 'keywords'])
def test_examples_are_arguments(example):
    class Two(Misleading):
        def forward(self, x, y):
            return super().forward(x + y)

    x = torch.rand(1, 3, 8, 8)
    given = (x, x) if example == 'tuple' else dict(x=x, y=x)
    model = Two()
    assert insert_blocks_(model, example=given) == ['conv1', 'conv2']


def test_a_conv_that_stands_in_two_places():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    model = nn.Sequential(
        OrderedDict(a=conv, relu=nn.ReLU(), b=conv, c=nn.Conv2d(3, 3, 3))
    ).double()
    plain = copy.deepcopy(model)
    assert insert_blocks_(model) == ['a', 'c']
    assert model.a is model.b and isinstance(model.a, DBB)
    x = image(2, 3, 8, 7)
    assert distance(model.eval()(x), plain(x)) < EXACT


def test_where_and_the_blocks_config():
    def where(name, conv):
        asked.append((name, type(conv)))
        return name == 'conv2'

    asked = []
    model = Misleading()
    block = dict(type='ACB', norm_cfg=dict(type='BN', momentum=0.3))
    assert insert_blocks_(model, block, where) == ['conv2']
    assert asked == [('conv1', nn.Conv2d), ('conv2', nn.Conv2d)]
    assert type(model.conv1) is nn.Conv2d
    assert type(model.norm1) is nn.BatchNorm2d
    assert list(model.conv2.branches) == ['kxk', 'kx1', '1xk']
    assert model.conv2.branches['kxk'].norm.momentum == 0.3

    model = Misleading()
    with pytest.raises(ValueError, match=r'none of its 2 plain conv'):
        insert_blocks_(model, dict(type='DBB', min_kernel_size=4))
    pointwise = nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1))
    assert insert_blocks_(pointwise, where=lambda n, c: n == '1') == ['1']
    with pytest.raises(TypeError, match="where must be .* got 'layer'"):
        insert_blocks_(Misleading(), where='layer')


def test_takes_over_what_the_modules_were():
    model = Misleading().to(torch.float64)
    model.norm2.eps, model.norm2.momentum = 1e-3, 0.01
    model.conv1.requires_grad_(False)
    model.conv2.eval()
    model.norm1 = nn.SyncBatchNorm(4).double()
    insert_blocks_(model)
    for branch in model.conv2.branches.values():
        assert branch.last_norm.eps == 1e-3
        assert branch.last_norm.momentum == 0.01
    assert isinstance(model.conv1.branches['kxk'].last_norm, nn.SyncBatchNorm)
    assert all(p.dtype == torch.float64 for p in model.parameters())
    assert not any(p.requires_grad for p in model.conv1.parameters())
    assert all(p.requires_grad for p in model.conv2.parameters())
    assert not any(m.training for m in model.conv2.modules())
    assert model.training and all(m.training for m in model.conv1.modules())


def test_a_layer_may_be_called_by_its_arguments_name():
    class Called(Misleading):
        def forward(self, x):
            return self.conv2(input=self.norm1(input=self.conv1(input=x)))

    model = Called().double().eval()
    expected = model(image(2, 3, 9, 9))
    assert 'conv1' in insert_blocks_(model)
    assert distance(model(image(2, 3, 9, 9)), expected) < EXACT


def test_a_compiled_model_is_merged_and_loaded_as_the_model():
    plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    model = copy.deepcopy(plain)
    insert_blocks_(model)
    compiled = torch.compile(randomize(model), backend='eager')
    x = image(2, 3, 9, 9).float()
    merged = merge_into_(copy.deepcopy(plain), compiled).eval()
    assert distance(merged(x), model.eval()(x)) < 1e-5
    load_plain_weights_(compiled, randomize(plain).state_dict())
    assert distance(model.eval()(x), plain.eval()(x)) < 1e-5


def test_looking_changes_nothing():
    model = randomize(Misleading().train())
    model.norm1.eval()
    before = copy.deepcopy(model.state_dict())
    modes = [m.training for m in model.modules()]
    for example in (None, torch.rand(2, 3, 8, 8)):
        readers = sole_readers(model, example)
        assert readers == {
            model.conv1: model.norm1,
            model.conv2: model.norm2,
        }
    assert modes == [m.training for m in model.modules()]
    assert not any(m._forward_hooks for m in model.modules())
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


class NormAct(nn.BatchNorm2d):
    """As timm has it: a norm that does more."""

    def forward(self, x):
        return F.relu(super().forward(x))


@pytest.mark.parametrize(
    'norm',
    [
        NormAct(8),
        nn.GroupNorm(2, 8),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.InstanceNorm2d(8),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_other_norms_stay(norm):
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), norm)
    model = randomize(model).double().eval()
    plain = copy.deepcopy(model)
    x = image(2, 3, 8, 7)
    insert_blocks_(model)
    assert type(model[1]) is type(norm)
    assert distance(model(x), plain(x)) < EXACT


def test_norms_and_convs_with_hooks_stay():
    model = Misleading()
    model.conv1.register_forward_hook(lambda *_: None)
    model.norm2.register_forward_pre_hook(lambda *_: None)
    assert insert_blocks_(model) == ['conv2']
    assert type(model.norm2) is nn.BatchNorm2d
    parametrized = Misleading()
    nn.utils.parametrizations.weight_norm(parametrized.conv1)
    assert insert_blocks_(parametrized) == ['conv2']


@pytest.mark.parametrize('watched', [False, True])
def test_a_second_time_there_is_nothing_to_replace(watched):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1))
    assert insert_blocks_(model) == ['0']
    example = torch.rand(1, 3, 9, 8) if watched else None
    before = entries(model)
    for where, rule in (
        (
            None,
            r'the default rule \(kernels of 2 to 6 taps that DBB can start '
            r'as; where= gives another\)',
        ),
        (lambda *_: False, r'where\(\)'),
    ):
        with pytest.raises(
            ValueError,
            match=f'{rule} chose none of its 1 plain convolutions inside; it '
            'has blocks already: 0$',
        ):
            insert_blocks_(model, where=where, example=example)
    assert entries(model) == before
    # What is inside a block is not asked for either.
    everything = insert_blocks_(model, where=lambda *_: True, example=example)
    assert everything == ['1']


@pytest.mark.parametrize(
    ('model', 'block', 'error', 'message'),
    [
        (nn.Linear(3, 3), None, ValueError, 'no plain convolution inside'),
        (nn.Conv2d(3, 3, 3), None, ValueError, 'no plain convolution inside'),
        (Misleading(), dict(type='Conv2d'), ValueError, "'DBB'"),
        (Misleading(), dict(type='No'), ValueError, "'DBB'"),
        (Misleading(), dict(type='DBB', size=3), TypeError, 'size'),
        (Misleading().to('meta'), None, ValueError, 'conv1: .* no values'),
        (Misleading(), 'DBB', TypeError, r"dict\(type='DBB'\), got 'DBB'"),
        (
            Misleading(),
            dict(type='DBB', branches=['1x1']),
            ValueError,
            "conv1: the block has no 'kxk'",
        ),
    ],
)
def test_refuses(model, block, error, message):
    before = [type(m) for m in model.modules()]
    with pytest.raises(error, match=message):
        insert_blocks_(model, block)
    assert [type(m) for m in model.modules()] == before


def test_another_network_is_named():
    model = Misleading()
    insert_blocks_(model)
    randomize(model)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Linear(4, 4))
    with pytest.raises(UserError) as error:
        merge_into_(other, model, torch.rand(1, 3, 8, 8))
    assert str(error.value) == (
        'the model was not made of this network: 0.weight, 0.bias, 1.weight '
        'and 1 more only in the plain one, norm_of_nothing.weight, '
        'norm_of_nothing.bias, norm_of_nothing.running_mean and 4 more only '
        'in the one with blocks'
    )


def test_a_bias_without_a_place_is_refused():
    plain = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.ReLU())
    model = copy.deepcopy(plain)
    insert_blocks_(model)
    randomize(model)
    with pytest.raises(UserError, match='bias of the merged 0 has no place'):
        merge_into_(plain, model)
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    with pytest.raises(UserError, match='of another shape'):
        merge_into_(other, model)


# Layers that something else reads or holds


class TiedDecoder(Misleading):
    """A decoder that shares the weights of its encoder."""

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu()
        y = self.norm2(self.conv2(y)).relu()
        return F.conv_transpose2d(y, self.conv2.weight)


class TiedConvs(Misleading):
    def __init__(self):
        super().__init__()
        self.conv3 = nn.Conv2d(4, 4, 3, bias=False)
        self.conv3.weight = self.conv2.weight

    def forward(self, x):
        return self.conv3(super().forward(x))


class HeldConv(Misleading):
    """Calls a convolution by a list, which no other layer can enter."""

    def __init__(self):
        super().__init__()
        self.layers = dict(second=[self.conv2])

    def forward(self, x):
        conv2 = self.layers['second'][0]
        return self.norm2(conv2(self.norm1(self.conv1(x))))


@pytest.mark.parametrize('model_type', [TiedDecoder, TiedConvs, HeldConv])
@pytest.mark.parametrize('watched', [False, True])
def test_convolutions_that_others_read_or_hold_stay(model_type, watched):
    plain = randomize(model_type()).double().eval()
    model, x = copy.deepcopy(plain), image(2, 3, 12, 11)
    example = x if watched else None
    assert insert_blocks_(model, example=example) == ['conv1']
    assert distance(model(x), plain(x)) < EXACT
    randomize(model, 1)
    expected = model(x)
    assert distance(merge_into_(plain, model, example)(x), expected) < EXACT
    merge_back_(model)
    assert distance(model(x), expected) < EXACT


class ReadNorm(Misleading):
    def forward(self, x):
        y = super().forward(x)
        return y * self.norm2.weight.reshape(-1, 1, 1)


class HeldNorm(Misleading):
    def __init__(self):
        super().__init__()
        self.last = [self.norm2]

    def forward(self, x):
        y = self.conv2(self.norm1(self.conv1(x)))
        return self.last[0](y)


@pytest.mark.parametrize('model_type', [ReadNorm, HeldNorm])
@pytest.mark.parametrize('watched', [False, True])
def test_norms_that_others_read_or_hold_are_not_absorbed(model_type, watched):
    plain = randomize(model_type()).double().eval()
    model, x = copy.deepcopy(plain), image(2, 3, 12, 11)
    insert_blocks_(model, example=x if watched else None)
    assert type(model.norm1) is AbsorbedNorm
    assert type(model.norm2) is nn.BatchNorm2d
    assert distance(model(x), plain(x)) < EXACT
    randomize(model, 1)
    expected = model(x)
    merge_back_(model)
    assert distance(model(x), expected) < EXACT


def test_norms_without_weights_there_and_back():
    plain = Misleading()
    plain.norm2 = nn.BatchNorm2d(4, affine=False)
    plain = randomize(plain).double().eval()
    model, x = copy.deepcopy(plain), image(2, 3, 12, 11)
    insert_blocks_(model)
    assert type(model.norm2) is AbsorbedNorm
    randomize(model, 1)
    model.load_state_dict(plain.state_dict())
    assert distance(model(x), plain(x)) < EXACT
    randomize(model, 1)
    expected = model(x)
    back = copy.deepcopy(model)
    merge_back_(back)
    merge_into_(plain, model)
    for merged in (back, plain):
        assert distance(merged(x), expected) < EXACT
    assert back.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize(
    'trace',
    [
        fx.symbolic_trace,
        lambda model: create_feature_extractor(model, {'norm2': 'y'}),
    ],
)
def test_a_traced_model_keeps_the_places_of_norms(trace):
    """Else a norm that comes back would not be called, nor loaded."""

    def run(model):
        y = model.eval()(x)
        return y['y'] if isinstance(y, dict) else y

    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
    layers += [nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4)]
    names = ['conv1', 'norm1', 'relu', 'conv2', 'norm2']
    plain = nn.Sequential(OrderedDict(zip(names, layers)))
    plain = randomize(plain).double().eval()
    model, x = copy.deepcopy(plain), image(2, 3, 12, 11)
    insert_blocks_(model)
    traced = trace(model)
    traced.load_state_dict(plain.state_dict())
    assert distance(run(traced), plain(x)) < EXACT
    expected = run(randomize(traced, 1))
    assert distance(run(reparameterize(traced)), expected) < EXACT
    merge_back_(traced)
    assert distance(run(traced), expected) < EXACT
    assert traced.state_dict().keys() == plain.state_dict().keys() | {
        'conv1.bias'
    }


class Conv3DSimple(nn.Conv3d):
    """As torchvision's video ResNets have it."""

    def __init__(self, channels):
        super().__init__(channels, channels, 3, padding=1, bias=False)

    @staticmethod
    def get_downsample_stride(stride):
        return stride, stride, stride


class Doubled(Conv3DSimple):
    def _conv_forward(self, *args):
        return 2 * super()._conv_forward(*args)


class Gated(Conv3DSimple):
    def __init__(self, channels):
        super().__init__(channels)
        self.gate = True


def test_subclasses_with_another_constructor_only_become_blocks():
    model = nn.Sequential(Conv3DSimple(4), nn.BatchNorm3d(4), Doubled(4))
    model = randomize(model.append(Gated(4))).double().eval()
    x, plain = image(2, 4, 4, 5, 6), copy.deepcopy(model)
    expected = model(x)
    assert insert_blocks_(model) == ['0']
    assert distance(model(x), expected) < EXACT
    assert distance(merge_into_(plain, model)(x), expected) < EXACT
    assert type(plain[0]) is Conv3DSimple


def test_where_is_a_function():
    with pytest.raises(TypeError, match="where must be .*; got 'layer4'"):
        insert_blocks_(nn.Sequential(nn.Conv2d(3, 4, 3)), where='layer4')


def test_a_layer_that_the_model_wrote_into_stays():
    """ultralytics' models look up by `f` which output a layer reads."""
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3))
    model[1].f = -1
    assert insert_blocks_(model) == ['0']
    assert type(model[1]) is nn.Conv2d and model[1].f == -1


def test_looking_at_a_layer_draws_no_random_numbers():
    class Wide(nn.Conv2d):
        def __init__(self):
            super().__init__(3, 4, 3)

    layer = Wide()
    before = torch.get_rng_state()
    assert is_replaceable(layer)
    assert torch.equal(torch.get_rng_state(), before)
