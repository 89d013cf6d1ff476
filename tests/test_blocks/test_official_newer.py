"""The classes of UniRepLKNet, RepLKNet and MobileOne, for plain PyTorch.

Their numbers are in test_reference.py.
"""

import pytest
import torch
from helpers import EXACT, distance, image, randomize
from torch import nn

from mmdbb import (
    DilatedReparamBlock,
    MobileOneBlock,
    ReparamLargeKernelConv,
)
from mmdbb.blocks import ReparamConv2d
from mmdbb.blocks.dilated import SMALL_KERNELS


def dilated(**options):
    return DilatedReparamBlock(4, 7, **options)


def large(small_kernel=3, **options):
    return ReparamLargeKernelConv(4, 6, 9, 2, 2, small_kernel, **options)


def mobileone(**options):
    return MobileOneBlock(
        32, 32, 3, padding=1, use_se=True, num_conv_branches=3, **options
    )


#: What builds the block, its argument for a merged one, and the method that
#: merges, both by the paper's names.
CASES = dict(
    dilated=(dilated, 'deploy', 'merge_dilated_branches'),
    large=(large, 'small_kernel_merged', 'merge_kernel'),
    mobileone=(mobileone, 'inference_mode', 'reparameterize'),
)
EACH = pytest.mark.parametrize(
    'build, merged, method', CASES.values(), ids=CASES
)


def theirs(block):
    """The state of a block of ours under the names of the paper's code."""
    found = {}
    for name, value in block.state_dict().items():
        start, ours = next(n for n in block.names if name.startswith(n[1]))
        # What the merged large kernel is called there.
        start = start.replace('lk_merged.', 'lk_origin.')
        found[start + name[len(ours) :]] = value
    return found


def image_of(block):
    channels = 32 if isinstance(block, MobileOneBlock) else 4
    return image(2, channels, 11, 12)


@EACH
@pytest.mark.parametrize('prefix', ['', 'stages.2.'])
def test_names_of_the_paper_load(build, merged, method, prefix):
    source = randomize(build().double())
    for before in (True, False):
        block = build(**{merged: not before}).double()
        model = block
        for name in reversed(prefix.split('.')[:-1]):
            model = nn.ModuleDict({name: model})
        model.load_state_dict(
            {prefix + name: value for name, value in theirs(source).items()}
        )
        for name, value in source.state_dict().items():
            assert torch.equal(block.state_dict()[name], value), name
        getattr(source, method)()


@EACH
def test_merges_by_the_method_of_the_paper(build, merged, method):
    block = randomize(build().double()).eval()
    x = image_of(block)
    expected = block(x)
    kernel, bias = block.get_equivalent_kernel_bias()
    for _ in range(2):  # twice is once
        getattr(block, method)()
    assert distance(block(x), expected) < EXACT
    assert block.deploy
    assert distance(block.block.weight, kernel) < EXACT
    assert distance(block.block.bias, bias) < EXACT
    assert distance(torch.jit.script(block)(x), expected) < EXACT
    kinds = (ReparamConv2d, nn.BatchNorm2d)
    assert not any(isinstance(m, kinds) for m in block.modules())


def test_the_papers_sizes():
    """The table of UniRepLKNet's code, by hand."""
    assert SMALL_KERNELS == {
        5: ((3, 1), (3, 2)),
        7: ((5, 1), (3, 2), (3, 3)),
        9: ((5, 1), (5, 2), (3, 3), (3, 4)),
        11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
        13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
        15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
        17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
    }
    for size, small in SMALL_KERNELS.items():
        block = DilatedReparamBlock(2, size)
        convs = [m for m in block.modules() if isinstance(m, nn.Conv2d)]
        found = [(c.kernel_size[0], c.dilation[0]) for c in convs]
        assert found == [(size, 1), *small]
        # Each keeps the size of the image by itself.
        assert all(
            2 * c.padding[0] == d * (k - 1) for c, (k, d) in zip(convs, found)
        )


@pytest.mark.parametrize('size', [3, 6, '7', 4.0])
def test_sizes_without_a_middle_are_refused(size):
    with pytest.raises(ValueError, match='an odd number of at least 5, got'):
        DilatedReparamBlock(4, size)


def test_sync_bn():
    block = DilatedReparamBlock(4, 5, use_sync_bn=True)
    norms = [b.norm for b in block.block.branches.values()]
    assert all(isinstance(norm, nn.SyncBatchNorm) for norm in norms)


def test_no_small_kernel_or_one_of_the_same_size():
    assert list(large(None).block.branches) == ['kxk']
    twice = randomize(large(9).double())
    names = theirs(twice)
    assert 'small_conv.conv.weight' in names and len(names) == 12
    other = large(9).double()
    other.load_state_dict(names)
    for name, value in twice.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name
    with pytest.raises(ValueError, match=r'kxk \(kernel_size=11\)'):
        large(11)


def test_se_is_the_papers():
    """A sixteenth of the channels inside, a ReLU, then gates."""
    block = mobileone().double().eval()
    se = block.se
    assert se.down.out_channels == 2
    x = image(2, 32, 5, 6)
    y = block.block(x)
    gate = se.up(se.down(y.mean((2, 3), keepdim=True)).relu()).sigmoid()
    assert distance(block(x), (y * gate).relu()) < EXACT
