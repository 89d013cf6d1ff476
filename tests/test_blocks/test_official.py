"""The papers' class names, in a plain PyTorch model."""

import inspect

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from registered import each_paper, has_usual_arguments, size_of
from torch import nn

from mmdbb import (
    OREPA,
    ACBlock,
    DilatedReparamBlock,
    DiverseBranchBlock,
    MobileOneBlock,
    OREPA_1x1,
    OREPA_LargeConv,
    OREPA_LargeConvBase,
    ReparamLargeKernelConv,
    RepVGGBlock,
    RepVGGBlock_OREPA,
    official,
)
from mmdbb.blocks import ReparamConv2d
from mmdbb.official.names import BLOCKS, DILATED, MOBILEONE, large_kernel
from mmdbb.reparam import reparameterize

#: Those that are built as a DBB is; test_official_newer.py has the others.
EACH = each_paper(has_usual_arguments)

#: Those of the papers' code, so by hand.
SIGNATURES = {
    DiverseBranchBlock: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        'dilation=1, groups=1, internal_channels_1x1_3x3=None, deploy=False, '
        'nonlinear=None, single_init=False'
    ),
    ACBlock: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        "dilation=1, groups=1, padding_mode='zeros', deploy=False, "
        'use_affine=True, reduce_gamma=False, gamma_init=None, '
        'nonlinear=None, single_init=False'
    ),
    RepVGGBlock: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        "dilation=1, groups=1, padding_mode='zeros', deploy=False, "
        'use_se=False'
    ),
    OREPA: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        'dilation=1, groups=1, internal_channels_1x1_3x3=None, deploy=False, '
        'nonlinear=None, single_init=False, weight_only=False, '
        'init_hyper_para=1.0, init_hyper_gamma=1.0'
    ),
    OREPA_1x1: (
        'in_channels, out_channels, kernel_size=1, stride=1, padding=0, '
        'dilation=1, groups=1, deploy=False, nonlinear=None, '
        'single_init=False'
    ),
    OREPA_LargeConvBase: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        'dilation=1, groups=1, deploy=False, nonlinear=None, flip=False'
    ),
    OREPA_LargeConv: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        'dilation=1, groups=1, deploy=False, nonlinear=None, flip=False'
    ),
    RepVGGBlock_OREPA: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        "dilation=1, groups=1, padding_mode='zeros', deploy=False, "
        'use_se=False, nonlinear=ReLU()'
    ),
    # Their ``deploy`` has no default.
    DilatedReparamBlock: (
        'channels, kernel_size, deploy=False, use_sync_bn=False, '
        'attempt_use_lk_impl=True'
    ),
    ReparamLargeKernelConv: (
        'in_channels, out_channels, kernel_size, stride, groups, '
        'small_kernel, small_kernel_merged=False'
    ),
    MobileOneBlock: (
        'in_channels, out_channels, kernel_size, stride=1, padding=0, '
        'dilation=1, groups=1, inference_mode=False, use_se=False, '
        'num_conv_branches=1'
    ),
}


class Net(nn.Module):
    """A model of a user's own, written against the papers' code."""

    def __init__(self, block):
        super().__init__()
        size = size_of(block)
        half = size // 2
        self.stem = nn.Conv2d(3, 8, 1)
        self.stages = nn.Sequential(
            block(8, 8, size, padding=half, groups=2),
            nn.ReLU(),
            block(8, 16, kernel_size=size, stride=2, padding=half),
        )
        self.last = block(16, 16, size, 1, 0)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.last(self.stages(self.stem(x)))
        return self.head(x.mean((2, 3)))


def small(block, **options):
    size = size_of(block)
    return block(4, 4, size, padding=size // 2, **options)


@each_paper()
def test_arguments(block):
    assert block in SIGNATURES, 'give SIGNATURES that of the paper'
    parameters = inspect.signature(block).parameters.values()
    found = ', '.join(
        p.name if p.default is p.empty else f'{p.name}={p.default!r}'
        for p in parameters
    )
    assert found == SIGNATURES[block]


@EACH
def test_the_loop_of_the_papers(block):
    model = randomize(Net(block).double()).eval()
    x = image(2, 3, 15, 17)
    expected = model(x)
    parameters = sum(p.numel() for p in model.parameters())
    for m in model.modules():
        if hasattr(m, 'switch_to_deploy'):
            m.switch_to_deploy()
    assert distance(model(x), expected) < EXACT
    assert not any(isinstance(m, ReparamConv2d) for m in model.modules())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    # A stack of plain 3x3 kernels has fewer numbers than its 7x7 kernel.
    if block is not OREPA_LargeConvBase:
        assert sum(p.numel() for p in model.parameters()) < parameters
    assert model.last.deploy
    for m in model.modules():  # twice is once
        if hasattr(m, 'switch_to_deploy'):
            m.switch_to_deploy()
    assert distance(model(x), expected) < EXACT


@EACH
def test_torchscript_compiles_what_is_merged(block):
    model = randomize(Net(block).double()).eval()
    x = image(2, 3, 15, 17)
    expected = model(x)
    with pytest.raises(ValueError, match='give it mmdbb.reparameterize'):
        torch.jit.script(model)
    scripted = torch.jit.script(reparameterize(model))
    assert distance(scripted(x), expected) < EXACT
    built = block(4, 4, size_of(block), deploy=True).double()
    x = image(2, 4, 9, 9)
    assert distance(torch.jit.script(built)(x), built(x)) < EXACT


def test_a_call_without_images_says_so():
    block = OREPA(4, 4, 3)
    with pytest.raises(ValueError, match='x must be images'):
        block()
    weight_only = OREPA(4, 4, 3, weight_only=True)
    assert weight_only().shape == (4, 4, 3, 3)


@EACH
def test_deploy_loads_the_merged_state(block):
    trained = randomize(small(block).double()).eval()
    x = image(2, 4, 5, 6)
    expected = trained(x)
    trained.switch_to_deploy()
    fresh = small(block, deploy=True).double()
    state = trained.state_dict()
    theirs = next(name for name, ours in block.names if ours == 'block.')
    official = {k.replace('block.', theirs): v for k, v in state.items()}
    for weights in (state, official):
        # Merged in place, or built merged: either way one convolution.
        fresh.switch_to_deploy()
        fresh.load_state_dict(weights)
        assert distance(fresh(x), expected) < EXACT
    built = small(block, deploy=True).double()
    built.load_state_dict(official)
    assert distance(built(x), expected) < EXACT


@EACH
def test_equivalent_kernel(block):
    official = randomize(small(block).double())
    before = official.get_equivalent_kernel_bias()
    official.switch_to_deploy()
    after = official.get_equivalent_kernel_bias()
    assert distance(after.kernel, before.kernel) < EXACT
    assert distance(after.bias, before.bias) < EXACT


@EACH
def test_state_dict_round_trip(block):
    one = randomize(small(block))
    two = small(block)
    two.load_state_dict(one.state_dict())
    x = image(2, 4, 5, 6, dtype=torch.float32)
    assert torch.equal(one.eval()(x), two.eval()(x))


@EACH
@pytest.mark.parametrize('prefix', ['', 'stages.2.'])
def test_official_names_load_at_any_depth(block, prefix):
    model = Net(block) if prefix else block(8, 16, size_of(block), 2, 1)
    found = model.get_submodule(prefix[:-1]) if prefix else model
    theirs = {}
    for name, value in found.state_dict().items():
        start, ours = next(
            (n for n in block.names if name.startswith(n[1])), ('', '')
        )
        name = f'{prefix}{start}{name[len(ours) :]}'
        theirs[name] = torch.full_like(value, 3)
    missing, unexpected = model.load_state_dict(theirs, strict=False)
    assert not unexpected
    assert not [name for name in missing if name.startswith(prefix)]
    assert all((v == 3).all() for v in found.state_dict().values())


#: Names of older revisions of the papers' code, as they differ from today's.
OLDER = {
    DiverseBranchBlock: (
        ('dbb_avg.bn.bn.', 'dbb_avg.bn.'),
        ('dbb_1x1_kxk.bn1.bn.', 'dbb_1x1_kxk.bn1.'),
    ),
    ACBlock: (
        ('square_conv.', 'square_layer.'),
        ('square_bn.', 'square_BN.'),
        ('ver_conv.', 'vertical_layer.'),
        ('ver_bn.', 'vertical_BN.'),
        ('hor_conv.', 'horizontal_layer.'),
        ('hor_bn.', 'horizontal_BN.'),
    ),
}


def official_state(block, module):
    """The state of a class of ours under today's names of the papers."""
    found = {}
    for name, value in module.state_dict().items():
        theirs, ours = next(n for n in block.names if name.startswith(n[1]))
        found[theirs + name[len(ours) :]] = value
    return found


@pytest.mark.parametrize('prefix', ['', 'stages.2.'])
@pytest.mark.parametrize('block', OLDER)
def test_names_of_older_revisions_load(block, prefix):
    source = randomize(block(4, 8, 3, 2, 1))
    older = {}
    for name, value in official_state(block, source).items():
        for new, old in OLDER[block]:
            if name.startswith(new):
                name = old + name[len(new) :]
                break
        older[prefix + name] = value
    assert any(old in name for _, old in OLDER[block] for name in older)
    found = block(4, 8, 3, 2, 1)
    model = found
    for name in reversed(prefix.split('.')[:-1]):
        model = nn.ModuleDict({name: model})
    model.load_state_dict(older)
    for name, value in source.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_merged_kernels_beside_the_branches_are_left_out():
    """As RepVGG's code of February 2021 saves them."""
    source, found = randomize(RepVGGBlock(4, 4, 3)), RepVGGBlock(4, 4, 3)
    state = official_state(RepVGGBlock, source)
    kernel, bias = source.get_equivalent_kernel_bias()
    found.load_state_dict(dict(state, fused_weight=kernel, fused_bias=bias))
    for name, value in source.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


# What each class has of its own


@pytest.mark.parametrize('block', [DiverseBranchBlock, ACBlock])
def test_nonlinear_follows(block):
    module = randomize(
        block(4, 4, 3, padding=1, nonlinear=nn.Hardtanh(-1, 0.5)).double()
    ).eval()
    x = image(2, 4, 5, 6)
    y = module(x)
    assert y.max() == 0.5 and y.min() == -1
    module.switch_to_deploy()
    assert distance(module(x), y) < EXACT


@pytest.mark.parametrize('block', [DiverseBranchBlock, ACBlock])
def test_single_init(block):
    module = block(4, 8, 3, single_init=True)
    for name, branch in module.block.branches.items():
        expected = 1.0 if name == 'kxk' else 0.0
        assert branch.last_norm.weight.unique().tolist() == [expected]


def test_init_gamma_and_single_init_methods():
    module = DiverseBranchBlock(4, 8, 3)
    module.init_gamma(0.5)
    gammas = [b.last_norm.weight for b in module.block.branches.values()]
    assert all((g == 0.5).all() for g in gammas)


@pytest.mark.parametrize(
    'block, dense', [(RepVGGBlock, 'kxk'), (RepVGGBlock_OREPA, 'orepa')]
)
def test_single_init_leaves_the_dense_branch(block, dense):
    module = block(4, 4, 3)
    module.single_init()
    weights = {
        n: b.last_norm.weight.unique().item()
        for n, b in module.block.branches.items()
    }
    assert weights == {'identity': 0, dense: 1, '1x1': 0}


@pytest.mark.parametrize('built', [True, False])
@pytest.mark.parametrize('name', ['init_gamma', 'single_init'])
@EACH
def test_merged_there_is_nothing_to_initialise(block, name, built):
    module = small(block, deploy=built)
    module.switch_to_deploy()
    arguments = [0.5] if name == 'init_gamma' else []
    weight = module.block.weight.clone()
    message = f'{block.__name__} is merged: it has no gammas to initialise'
    with pytest.raises(ValueError, match=message):
        getattr(module, name)(*arguments)
    assert torch.equal(module.block.weight, weight)


def test_internal_channels():
    module = DiverseBranchBlock(4, 8, 3, internal_channels_1x1_3x3=10)
    assert module.block.branches['1x1_kxk'].conv2.in_channels == 10
    names = list(module.block.branches)
    assert names == list(DiverseBranchBlock(4, 8, 3).block.branches)
    depthwise = DiverseBranchBlock(
        4, 4, 3, groups=4, internal_channels_1x1_3x3=4
    )
    assert '1x1' not in depthwise.block.branches


def test_acb_options():
    module = ACBlock(4, 8, 3, reduce_gamma=True)
    gammas = [b.last_norm.weight for b in module.block.branches.values()]
    third = torch.tensor(1 / 3)
    assert all((g == third).all() for g in gammas)
    module = ACBlock(4, 8, 3, gamma_init=0.1)
    assert (module.block.branches['kx1'].norm.weight == 0.1).all()
    module = ACBlock(4, 8, 3, use_affine=False)
    assert not any(b.norm.affine for b in module.block.branches.values())
    module = ACBlock(4, 8, 3, padding=1, padding_mode='circular')
    assert module.block.spec.padding_mode == 'circular'


@pytest.mark.parametrize('use_se', [True, False])
def test_repvgg_se_stays(use_se):
    module = randomize(
        RepVGGBlock(32, 32, 3, padding=1, use_se=use_se).double()
    ).eval()
    x = image(2, 32, 5, 6)
    y = module(x)
    assert y.min() >= 0
    module.switch_to_deploy()
    assert distance(module(x), y) < EXACT
    assert isinstance(module.se, nn.Identity) is not use_se


def test_any_geometry_where_the_papers_code_fails():
    for arguments in (
        dict(kernel_size=2, padding=1),
        dict(kernel_size=3, padding=0),
        dict(kernel_size=(1, 3), padding=(0, 2), dilation=2),
    ):
        module = DiverseBranchBlock(4, 6, **arguments)
        module = randomize(module.double()).eval()
        x = image(2, 4, 7, 8)
        y = module(x)
        module.switch_to_deploy()
        assert distance(module(x), y) < EXACT


def test_all_classes_read_their_names_from_one_table():
    classes = {getattr(official, name) for name in official.__all__}
    # MobileOne's have those of its SE too, RepLKNet's depend on the block.
    assert MobileOneBlock.names[:-2] == MOBILEONE.within('block.')
    block = ReparamLargeKernelConv(4, 4, 9, 1, 1, small_kernel=3)
    assert block.names == large_kernel(3).within('block.')
    classes -= {MobileOneBlock, ReparamLargeKernelConv}
    table = [names.within('block.') for names in (*BLOCKS, DILATED)]
    assert sorted(block.names for block in classes) == sorted(table)
