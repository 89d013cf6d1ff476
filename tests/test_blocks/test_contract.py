"""To a host a block is an nn.Conv2d: what it reads, traces and resets."""

import copy
import io

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmengine.model import constant_init, kaiming_init, normal_init
from mmengine.model.efficient_conv_bn_eval import (
    turn_on_efficient_conv_bn_eval,
)
from registered import each_block, has_norms, is_composed
from torch import fx, nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.models.resnet import BasicBlock, ResNet

from mmdbb import insert_blocks_
from mmdbb.blocks import DBB, OREPAConv
from mmdbb.reparam import find_blocks, reparameterize

KINDS = each_block()
NORMED = each_block(has_norms)
COMPOSED = each_block(is_composed)


def build(kind, **arguments):
    block = kind(4, 6, 3, padding=1, groups=2, **arguments)
    return randomize(block.double()).eval()


# The weight and the bias


@KINDS
def test_weight_and_bias_are_the_layers(kind):
    block, x = build(kind), image(2, 4, 5, 6)
    with torch.no_grad():
        expected = block.forward_branches(x)
        found = nn.functional.conv2d(
            x, block.weight, block.bias, padding=1, groups=2
        )
    assert distance(found, expected) < EXACT
    assert block.weight.shape == (6, 2, 3, 3)
    # What is computed from them is an ordinary tensor.
    assert type(block.weight * 2) is type(block.bias.sum()) is torch.Tensor
    for name in ('weight', 'bias'):
        assert name not in dict(block.named_buffers())
    assert 'weight' not in block.state_dict()


@KINDS
def test_gradients_of_the_weight_reach_the_branches(kind):
    block = build(kind)
    block.weight.square().sum().backward()
    found = {n: p.grad for n, p in block.named_parameters()}
    block.zero_grad()
    block.get_equivalent_kernel_bias().kernel.square().sum().backward()
    assert any(grad is not None for grad in found.values())
    for name, parameter in block.named_parameters():
        grad = parameter.grad
        assert (grad is None) == (found[name] is None)
        assert grad is None or torch.equal(grad, found[name])


@NORMED
def test_no_weight_where_norms_read_the_batch(kind):
    block = build(kind).train()
    for name in ('weight', 'bias'):
        assert not hasattr(block, name)
        with pytest.raises(AttributeError, match='training mode.*merge first'):
            getattr(block, name)
    for module in block.modules():  # frozen, as norm_eval does
        module.training = not isinstance(module, nn.BatchNorm2d)
    assert hasattr(block, 'weight')


@NORMED
def test_no_weight_that_lacks_the_shift(kind):
    block = build(kind, bias=False)
    assert block.bias is None
    with pytest.raises(AttributeError, match='built with bias=False'):
        block.weight.sum()
    merged = reparameterize(block)
    assert merged.bias is not None  # so the weight alone was not the layer


@COMPOSED
@pytest.mark.parametrize('bias', [True, False])
def test_a_composed_kernel_is_read_in_training_too(kind, bias):
    block, x = build(kind, bias=bias).train(), image(2, 4, 5, 6)
    found = nn.functional.conv2d(
        x, block.weight, block.bias, padding=1, groups=2
    )
    assert distance(found, block.forward_branches(x)) < EXACT
    assert (block.bias is None) is not bias
    assert not bias or isinstance(block.bias, nn.Parameter)


@KINDS
def test_a_merged_block_has_real_parameters(kind):
    block = build(kind)
    kernel = block.weight.clone()
    conv = block.fuse()
    assert block.deploy and conv is block.reparam_conv
    assert block.weight is conv.weight and block.bias is conv.bias
    assert distance(block.weight, kernel) < EXACT


@KINDS
def test_other_names_of_the_field_merge_too(kind):
    block, x = build(kind), image(2, 4, 5, 6)
    expected = block.forward_branches(x)
    block.convert_to_deploy()
    assert block.deploy and distance(block(x), expected) < EXACT


@pytest.mark.parametrize(
    'write',
    [
        lambda w: w.data.copy_(torch.ones_like(w)),
        lambda w: setattr(w, 'data', torch.ones(6, 2, 3, 3)),
        lambda w: w.detach().mul_(2),
        lambda w: w.view(-1)[:3].fill_(0),
        lambda w: w.__setitem__(0, 1.0),
        lambda w: w.__imul__(2),
        lambda w: torch.add(w, 1, out=w),
        lambda w: w.requires_grad_(False),
    ],
)
def test_writing_into_the_weight_is_refused(write):
    """Newer ultralytics fuses a norm by `conv.weight.data = ...`."""
    block = build(DBB)
    with torch.no_grad(), pytest.raises(ValueError, match='merge first'):
        write(block.weight)
    with torch.no_grad():  # other tensors may take its values
        torch.zeros(6, 2, 3, 3).copy_(block.weight)
        block.weight.clone().mul_(2)
    for name in ('weight', 'bias'):
        with pytest.raises(ValueError, match=f'{name} of a DBB is computed'):
            setattr(block, name, nn.Parameter(torch.ones(6)))
    with pytest.raises(ValueError, match='weight of a DBB is computed'):
        block.weight = torch.ones(6, 2, 3, 3)


@pytest.mark.parametrize('mode', [True, False])
@pytest.mark.parametrize(
    'initialise',
    [
        lambda block: constant_init(block, 3.0),
        lambda block: kaiming_init(block),
        lambda block: normal_init(block, std=0.1, bias=0.0),
        lambda block: (
            nn.init.kaiming_normal_(getattr(block, 'weight', None))
            if hasattr(block, 'weight')
            else None
        ),
        lambda block: (
            nn.init.xavier_uniform_(getattr(block, 'weight', None))
            if hasattr(block, 'weight')
            else None
        ),
    ],
)
@KINDS
def test_initialising_a_block_passes_it_by(kind, initialise, mode):
    block = build(kind, bias=False).train(mode)
    before = copy.deepcopy(block.state_dict())
    initialise(block)
    for name, value in block.state_dict().items():
        assert torch.equal(value, before[name])


def test_fusing_a_norm_that_a_block_absorbed_says_so():
    """As timm's and ultralytics' functions do, which read both."""
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.BatchNorm2d(4))
    insert_blocks_(net)
    for module in (net.eval(), copy.deepcopy(net)):
        assert not hasattr(module[1], 'weight')
        with pytest.raises(AttributeError, match='part of a DBB.*merge first'):
            module[0].weight / module[1].running_var


def test_optimizers_that_look_for_weights_find_the_parameters():
    """As those of YOLOv5 and v7, which group parameters by layer."""
    net = nn.Sequential(DBB(4, 4, 3), OREPAConv(4, 4, 3), nn.Conv2d(4, 4, 1))
    for mode in (True, False):
        net.train(mode)
        found = []
        for module in net.modules():
            for name in ('weight', 'bias'):
                value = getattr(module, name, None)
                if isinstance(value, nn.Parameter):
                    found.append(value)
        theirs = {id(p) for m in net for p in m.parameters(recurse=False)}
        assert theirs <= {id(p) for p in found}
        assert {id(p) for p in found} <= {id(p) for p in net.parameters()}


@KINDS
def test_copies_and_files_are_not_disturbed(kind):
    block, x = build(kind), image(2, 4, 5, 6)
    expected = block(x)
    assert block.weight is not None
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    for twin in (copy.copy(block), copy.deepcopy(block), loaded):
        assert torch.equal(twin(x), expected)
        assert torch.equal(twin.weight, block.weight)
    with pytest.raises(AttributeError, match='no attribute .nothing.'):
        block.nothing  # noqa: B018


# Starts


@KINDS
def test_device_and_dtype_are_conv2ds(kind):
    block = kind(4, 6, 3, device='meta', dtype=torch.float64)
    tensors = [*block.parameters(), *block.buffers()]
    assert all(t.is_meta for t in tensors)
    assert {t.dtype for t in tensors if t.is_floating_point()} == {
        torch.float64
    }
    merged = kind(4, 6, 3, deploy=True, device='meta', dtype=torch.float16)
    assert merged.weight.is_meta and merged.weight.dtype == torch.float16


@pytest.mark.parametrize('size', [1, 3, 7])
@pytest.mark.parametrize('deploy', [True, False])
@KINDS
def test_reset_parameters_is_the_start(kind, deploy, size):
    arguments = dict(kernel_size=size, groups=2, deploy=deploy)
    torch.manual_seed(3)
    expected = kind(4, 6, **arguments).state_dict()
    block = kind(4, 6, **arguments, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for tensor in block.state_dict().values():
            tensor.fill_(7)
    torch.manual_seed(3)
    block.reset_parameters()
    for name, value in block.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_reset_parameters_keeps_the_gammas():
    gammas = [
        lambda block: [b.last_norm.weight for b in block.branches.values()],
        lambda block: [block.generator.scale],
    ]
    for block, of in zip((DBB, OREPAConv), gammas):
        block = nn.Sequential(block(4, 4, 3, single_init=True))
        before = [gamma.clone() for gamma in of(block[0])]
        randomize(block)
        block.apply(
            lambda module: (
                module.reset_parameters()
                if hasattr(module, 'reset_parameters')
                else None
            )
        )
        assert all(map(torch.equal, of(block[0]), before))
    rules = [dict(type='Constant', layer='Conv2d', val=0.5)]
    block = DBB(4, 4, 3, init_cfg=rules)
    block.reset_parameters()
    assert (block.branches['kxk'].conv.weight == 0.5).all()


@pytest.mark.parametrize('size', [1, 3])
@KINDS
def test_merging_keeps_the_memory_format(kind, size):
    last = torch.channels_last
    block = kind(4, 6, size).to(memory_format=last)
    if size == 1:  # both layouts at once: neither was asked for
        assert reparameterize(block).weight.is_contiguous()
        return
    assert reparameterize(block).weight.is_contiguous(memory_format=last)
    block.switch_to_deploy()
    assert block.weight.is_contiguous(memory_format=last)
    assert reparameterize(block).weight.is_contiguous(memory_format=last)
    assert reparameterize(kind(4, 6, size)).weight.is_contiguous()


@pytest.mark.parametrize('layout', [torch.channels_last, None])
@pytest.mark.parametrize(
    'mode', ['training', 'autocast', 'frozen norms', 'evaluation']
)
@pytest.mark.parametrize(
    'channels, groups, size',
    [(8, 1, 1), (8, 1, 3), (8, 8, 3), (1, 1, 3), (8, 2, 5)],
)
@KINDS
def test_the_output_has_the_layout_of_a_convolutions(
    kind, channels, groups, size, mode, layout
):
    """So that y.view() works or fails as it does without blocks."""
    layout = layout or torch.contiguous_format
    arguments = (channels, 8, size, 1, size // 2, 1, groups)
    block = kind(*arguments).train(mode != 'evaluation')
    if mode == 'frozen norms':
        for norm in block.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()
    block = block.to(memory_format=layout)
    conv = nn.Conv2d(*arguments).to(memory_format=layout)
    for side in (6, 40):
        x = torch.rand(2, channels, side, side).to(memory_format=layout)
        with torch.autocast('cpu', torch.bfloat16, mode == 'autocast'):
            assert block(x).stride() == conv(x).stride()
            with torch.no_grad():
                assert block(x).stride() == conv(x).stride()


def test_inserting_keeps_the_memory_format():
    for layout in (torch.channels_last, torch.contiguous_format):
        net = nn.Sequential(nn.Conv2d(4, 4, 3)).to(memory_format=layout)
        insert_blocks_(net)
        merged = reparameterize(net)[0].weight
        assert merged.is_contiguous(memory_format=layout)


# Traces


@pytest.mark.parametrize('mode', [True, False])
@KINDS
def test_a_block_is_a_leaf_of_a_trace(kind, mode):
    net = nn.Sequential(kind(4, 6, 3), nn.ReLU(), kind(6, 6, 3))
    net = randomize(net.double()).train(mode)
    twin = copy.deepcopy(net)
    traced = fx.symbolic_trace(twin)
    assert list(find_blocks(traced)) == ['0', '2']
    x = image(2, 4, 9, 8)
    assert torch.equal(traced(x), net(x))
    for name, value in net.state_dict().items():
        assert torch.equal(traced.state_dict()[name], value)
    merged = reparameterize(traced.eval())
    assert distance(merged(x), net.eval()(x)) < EXACT
    assert torch.equal(fx.symbolic_trace(merged)(x), merged(x))


@pytest.mark.parametrize('mode', [True, False])
def test_a_convolution_inside_takes_no_bias(mode):
    """No kernel would have it, so eval mode and the merge would be wrong."""
    block = DBB(4, 4, 3).train(mode)
    block.branches['kxk'].conv.bias = nn.Parameter(torch.ones(4))
    for use in (block, lambda x: reparameterize(block)):
        with pytest.raises(ValueError, match='or it was given a bias'):
            use(torch.rand(1, 4, 5, 5))


def test_a_block_alone_is_no_trace():
    with pytest.raises(TypeError, match='trace a module that holds it'):
        fx.symbolic_trace(DBB(4, 4, 3))


@KINDS
def test_torchscript_compiles_what_is_merged(kind):
    net = nn.Sequential(kind(4, 6, 3), nn.ReLU(), kind(6, 6, 3))
    net = randomize(net.double()).eval()
    x = image(2, 4, 9, 8)
    expected = net(x)
    merged = torch.jit.script(reparameterize(net))
    assert distance(merged(x), expected) < EXACT
    for _ in range(2):  # as it is, then merged in place
        names = list(net.state_dict())
        with pytest.raises(ValueError, match=f'no block, got {kind.__name__}'):
            torch.jit.script(net)
        assert list(net.state_dict()) == names and len(find_blocks(net)) == 2
        for block in find_blocks(net).values():
            block.switch_to_deploy()
    merged = torch.jit.script(reparameterize(net))
    assert distance(merged(x), expected) < EXACT


def test_torchvision_extracts_features_of_blocks():
    net = ResNet(BasicBlock, [1, 1, 1, 1])
    for name in ('conv1', 'conv2'):
        setattr(net.layer1[0], name, DBB(64, 64, 3, padding=1))
    net.eval()
    names = ['layer1.0.conv1', 'layer1']
    extract = create_feature_extractor(copy.deepcopy(net), names)
    x = image(1, 3, 32, 32, dtype=torch.float32)
    found = extract(x)
    assert list(found) == names and len(find_blocks(extract)) == 2
    y = net.maxpool(net.relu(net.bn1(net.conv1(x))))
    assert torch.equal(found['layer1.0.conv1'], net.layer1[0].conv1(y))
    assert torch.equal(found['layer1'], net.layer1(y))


@pytest.mark.parametrize('kind', [DBB, OREPAConv])
def test_mmengines_efficient_eval_leaves_blocks(kind):
    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.bn1 = kind(4, 4, 3), nn.BatchNorm2d(4)
            self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn2(self.conv2(self.bn1(self.conv1(x))))

    net = randomize(nn.Sequential(Layer()).double()).eval()
    x = image(2, 4, 9, 8)
    expected = net(x)
    turn_on_efficient_conv_bn_eval(net, ['0'])
    assert distance(net(x), expected) < EXACT
