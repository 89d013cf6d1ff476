"""OREPA as a layer of configs, and the papers' classes around it."""

import copy

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from mmcv.cnn import ConvModule, build_conv_layer
from registered import (
    each_block,
    each_paper,
    has_custom_l2,
    has_usual_arguments,
    size_of,
    takes,
)
from torch import nn

from mmdbb import (
    OREPA,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPAConv,
    OREPARepVGG,
    RepVGGBlock,
    RepVGGBlock_OREPA,
    RepVGGConv,
)
from mmdbb.kernels import KxKKernel, PointwiseKernel, StackedKernel
from mmdbb.transforms import KernelBias

FORMS = {
    1: PointwiseKernel,
    (1, 1): PointwiseKernel,
    2: KxKKernel,
    3: KxKKernel,
    (1, 7): KxKKernel,
    5: KxKKernel,
    7: StackedKernel,
    8: KxKKernel,
    9: StackedKernel,
    (7, 9): KxKKernel,
}


@pytest.mark.parametrize('size', FORMS)
def test_the_form_follows_from_the_size(size):
    block = build_conv_layer(dict(type='OREPA'), 4, 6, size, bias=False)
    assert type(block) is OREPAConv
    assert type(block.generator) is FORMS[size]
    assert block.generator().shape == nn.Conv2d(4, 6, size).weight.shape


def test_no_norm_inside_and_the_hosts_norm_follows():
    layer = ConvModule(
        4, 6, 3, conv_cfg=dict(type='OREPA'), norm_cfg=dict(type='BN')
    )
    assert type(layer.conv) is OREPAConv
    norms = [m for m in layer.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms == [layer.norm]
    assert layer.conv.bias is None


def test_options_of_the_config():
    cfg = dict(type='OREPA', internal_channels=8, single_init=True)
    block = build_conv_layer(cfg, 4, 6, 3)
    assert block.generator.inner1.shape == (8, 4, 1, 1)
    assert distance(block.generator(), block.generator.origin) < 1e-6
    assert build_conv_layer(dict(type='OREPA', flip=True), 4, 6, 7)
    for size in (1, 3, 7):
        cfg = dict(type='OREPA', flip='no')
        with pytest.raises(TypeError, match="flip must be .*, got 'no'"):
            build_conv_layer(cfg, 4, 6, size)
    with pytest.raises(TypeError, match='flip must be True or False, got 1'):
        OREPA_LargeConv(4, 6, 7, flip=1)
    with pytest.raises(TypeError, match='unknown keys .*branches'):
        build_conv_layer(dict(type='OREPA', branches=['kxk']), 4, 6, 3)
    plain = dict(type='OREPA', max_kernel_size=3)
    assert type(build_conv_layer(plain, 4, 6, 7)) is nn.Conv2d


@pytest.mark.parametrize('bias', [True, False])
def test_bias(bias):
    block = OREPAConv(4, 6, 3, bias=bias).double().eval()
    if bias:
        nn.init.normal_(block.bias)
    x = image(2, 4, 7, 8)
    expected = block.forward_branches(x)
    assert distance(block(x), expected) < EXACT
    conv = block.to_conv()
    assert distance(conv(x), expected) < EXACT
    plain = nn.Conv2d(4, 6, 3, bias=bias)
    assert list(conv.state_dict()) == list(plain.state_dict())
    assert repr(conv) == repr(plain)
    before = block.get_equivalent_kernel_bias()
    block.switch_to_deploy()
    assert distance(block(x), expected) < EXACT
    after = block.get_equivalent_kernel_bias()
    assert distance(after.kernel, before.kernel) < EXACT
    assert torch.equal(after.bias, before.bias)
    built = OREPAConv(4, 6, 3, bias=bias, deploy=True).double()
    built.load_state_dict(block.state_dict())
    assert torch.equal(built(x), block(x))
    assert repr(block.to_conv()) == repr(plain)
    # What others have added since, as when folding a norm, is kept.
    block.reparam_conv.bias = nn.Parameter(torch.ones(6).double())
    assert distance(block.to_conv()(x), block(x)) < EXACT


@torch.no_grad()
def test_the_kept_kernel_follows_its_parameters():
    block = OREPAConv(4, 6, 3).double().eval()
    x = image(2, 4, 7, 8)
    block(x)
    kept = block._cached_kernel
    block(x)
    assert block._cached_kernel is kept
    for name, value in block.state_dict().items():
        value.data.add_(0.5)
        assert distance(block(x), block.forward_branches(x)) < EXACT, name
    assert copy.deepcopy(block)._cached_kernel is None


# The papers' classes


def build(kind, **kwargs):
    size = size_of(kind)
    block = kind(4, 6, size, padding=size // 2, **kwargs)
    return randomize(block.double()).eval()


@each_paper(has_usual_arguments, argument='kind')
@pytest.mark.parametrize('groups', [1, 2])
def test_merging_folds_the_norm(kind, groups):
    """The paper's code crashes on groups of the large form."""
    block = build(kind, groups=groups)
    x = image(2, 4, 9, 11)
    expected = block(x)
    kernel, bias = block.get_equivalent_kernel_bias()
    assert kernel.requires_grad and bias.requires_grad
    block.switch_to_deploy()
    block.switch_to_deploy()  # on which the paper's code crashes
    assert distance(block(x), expected) < EXACT
    assert distance(block.block.weight, kernel) < EXACT
    assert not any(isinstance(m, nn.BatchNorm2d) for m in block.modules())
    assert sum(p.numel() for p in block.parameters()) == (
        kernel.numel() + bias.numel()
    )


@each_paper(has_usual_arguments, argument='kind')
def test_built_merged_it_loads_what_was_merged(kind):
    block = build(kind)
    block.switch_to_deploy()
    fresh = build(kind, deploy=True)
    fresh.load_state_dict(block.state_dict())
    x = image(2, 4, 9, 11)
    assert torch.equal(fresh(x), block(x))


def test_weight_only():
    block = OREPA(4, 6, 3, weight_only=True)
    assert block.bn is None
    assert torch.equal(block(), block.weight_gen())
    block.switch_to_deploy()
    built = OREPA(4, 6, 3, weight_only=True, deploy=True)
    assert list(built.state_dict()) == list(block.state_dict())
    with pytest.raises(ValueError, match='OREPA is merged: .* no kernel to'):
        block.weight_gen()


def test_kernel_size_of_the_1x1_form():
    with pytest.raises(ValueError, match='must be 1, got 3'):
        OREPA_1x1(4, 6, 3)


def test_large_forms_take_odd_squares():
    with pytest.raises(ValueError, match='odd side'):
        OREPA_LargeConv(4, 6, 6)


@each_paper(takes('nonlinear'), argument='kind')
@pytest.mark.parametrize('deploy', [True, False])
def test_nonlinear(kind, deploy):
    """As in the paper's code None is none, by default RepVGG's is a ReLU."""
    own = nn.Hardtanh()
    assert build(kind, deploy=deploy, nonlinear=own).nonlinear is own
    none = build(kind, deploy=deploy, nonlinear=None)
    assert type(none.nonlinear) is nn.Identity
    assert none(image(2, 4, 9, 11)).min() < 0
    one, other = (build(kind, deploy=deploy).nonlinear for _ in range(2))
    is_repvgg = kind is RepVGGBlock_OREPA
    assert type(one) is (nn.ReLU if is_repvgg else nn.Identity)
    assert one is not other


# RepVGG


def custom_l2_of_the_paper(block, kernel, channels=slice(None)):
    """RepVGG paper's code: block.get_custom_L2(), for 3x3 kernels."""

    def scale(norm):
        std = (norm.running_var + norm.eps).sqrt()
        return (norm.weight / std).reshape(-1, 1, 1, 1).detach()[channels]

    branches = block.branches
    dense = branches[block.dense_branch]
    t3, t1 = scale(dense.norm), scale(branches['1x1'].norm)
    kernel, pointwise = (
        k[channels] for k in (kernel, branches['1x1'].conv.weight)
    )
    centre = kernel[:, :, 1:2, 1:2]
    circle = (kernel**2).sum() - (centre**2).sum()
    equivalent = centre * t3 + pointwise * t1
    return (equivalent**2 / (t3**2 + t1**2)).sum() + circle


@each_block(has_custom_l2)
def test_custom_l2(kind):
    block = randomize(kind(4, 6, 3, padding=1).double())
    dense = block.branches[block.dense_branch]
    kernel = dense.generator() if kind is OREPARepVGG else dense.conv.weight
    expected = custom_l2_of_the_paper(block, kernel)
    assert distance(block.get_custom_L2(), expected) < EXACT
    block.get_custom_L2().backward()
    assert block.branches['1x1'].conv.weight.grad.abs().max() > 0
    assert dense.norm.weight.grad is None


@each_block(has_custom_l2)
def test_custom_l2_counts_no_centre_where_both_gammas_are_zero(kind):
    """As zero_init_residual leaves the last block of each residual path."""
    block = randomize(kind(4, 6, 3, padding=1).double())
    dense = block.branches[block.dense_branch]
    for norm in (dense.norm, block.branches['1x1'].norm):
        norm.weight.data[2:4] = 0
    kernel = dense.generator() if kind is OREPARepVGG else dense.conv.weight
    expected = custom_l2_of_the_paper(block, kernel, channels=[0, 1, 4, 5])
    outer = kernel[2:4].square().sum() - kernel[2:4, :, 1, 1].square().sum()
    found = block.get_custom_L2()
    assert distance(found, expected + outer) < EXACT
    found.backward()
    gradients = [p.grad for p in block.parameters() if p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    grad = block.branches['1x1'].conv.weight.grad
    assert not grad[2:4].any() and grad[[0, 1, 4, 5]].abs().min() > 0


def test_custom_l2_of_the_papers_classes():
    for kind in (RepVGGBlock, RepVGGBlock_OREPA):
        block = kind(4, 6, 3, padding=1)
        expected = block.block.get_custom_L2()
        assert torch.equal(block.get_custom_L2(), expected)


def test_custom_l2_says_what_it_needs():
    with pytest.raises(ValueError, match="the branch 'kxk', got .*'1x1'"):
        RepVGGConv(4, 6, 3, branches=['1x1']).get_custom_L2()
    with pytest.raises(ValueError, match='merged'):
        RepVGGConv(4, 6, 3, deploy=True).get_custom_L2()
    with pytest.raises(ValueError, match='RepVGGBlock is merged'):
        RepVGGBlock(4, 6, 3, deploy=True).get_custom_L2()


def test_a_shift_is_not_lost():
    class Shifted(OREPAConv):
        def get_equivalent_kernel_bias(self):
            kernel, bias = super().get_equivalent_kernel_bias()
            return KernelBias(kernel, bias + 1)

    assert Shifted(4, 4, 3, bias=True).to_conv().bias.any()
    with pytest.raises(ValueError, match='Shifted composes a bias, but says'):
        Shifted(4, 4, 3, bias=False).to_conv()
