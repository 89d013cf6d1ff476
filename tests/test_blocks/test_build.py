"""Blocks as ``conv_cfg``: registration, the rule, unknown keys."""

import pytest
import torch
from helpers import image
from mmcv.cnn import ConvModule, build_conv_layer
from mmengine.registry import MODELS, DefaultScope
from registered import each_block, name_of
from torch import nn

from mmdbb.blocks import ACB, DBB
from mmdbb.blocks.build import block_arguments


@each_block(alike=True)
@pytest.mark.parametrize(
    'scope', ['mmengine', 'mmcv', 'mmpretrain', 'mmdet', 'mmseg']
)
def test_bare_name_in_every_scope(kind, scope):
    name = name_of(kind)
    size = max(3, kind.kernel_sizes[0])  # large kernels only, some of them
    with DefaultScope.overwrite_default_scope(scope):
        block = build_conv_layer(dict(type=name), 4, 8, size, padding=1)
        module = ConvModule(
            4, 8, size, conv_cfg=dict(type=name), norm_cfg=dict(type='BN')
        )
    assert type(block) is kind
    assert type(module.conv) is kind
    assert module(image(2, 4, 7, 8, dtype=torch.float32)).shape[1] == 8


@pytest.mark.parametrize('package', ['mmpretrain', 'mmdet', 'mmseg'])
def test_name_with_a_scope(package):
    block = build_conv_layer(dict(type='mmengine.DBB'), 4, 8, 3)
    assert type(block) is DBB


def test_registry_builds_what_mmcv_builds():
    cfg = dict(type='DBB', in_channels=4, out_channels=8, kernel_size=3)
    assert type(MODELS.build(cfg)) is DBB


@pytest.mark.parametrize('kernel', [1, 7, 9, (1, 1), (7, 1), (3, 7)])
def test_small_and_large_kernels_stay_plain(kernel):
    conv = build_conv_layer(
        dict(type='DBB', single_init=True), 4, 8, kernel, 2, 1, bias=False
    )
    plain = nn.Conv2d(4, 8, kernel, 2, 1, bias=False)
    assert type(conv) is nn.Conv2d
    assert repr(conv) == repr(plain)
    assert list(conv.state_dict()) == ['weight']


@pytest.mark.parametrize('kernel', [2, 3, 4, 5, 6, (1, 3), (3, 1), (2, 6)])
def test_kernels_in_between_are_blocks(kernel):
    assert type(build_conv_layer(dict(type='DBB'), 4, 8, kernel)) is DBB


def test_the_rule_is_an_argument():
    small = dict(type='DBB', min_kernel_size=1)
    assert type(build_conv_layer(small, 4, 8, 1)) is DBB
    large = dict(type='DBB', max_kernel_size=7)
    assert type(build_conv_layer(large, 4, 8, 7)) is DBB
    only5 = dict(type='DBB', min_kernel_size=5, max_kernel_size=5)
    kinds = [type(build_conv_layer(only5, 4, 8, k)) for k in (3, 5, 6)]
    assert kinds == [nn.Conv2d, DBB, nn.Conv2d]
    # Said once in the config, it is not an argument of the block.
    with pytest.raises(TypeError):
        DBB(4, 8, 3, min_kernel_size=1)


@pytest.mark.parametrize('name', ['min_kernel_size', 'max_kernel_size'])
@pytest.mark.parametrize('value', ['a', None, True, (3, 3)])
def test_the_rule_is_a_number(name, value):
    cfg = {'type': 'DBB', name: value}
    with pytest.raises(TypeError) as error:
        build_conv_layer(cfg, 4, 8, 3)
    message = f'{name} must be a number of taps, got {value!r}'
    assert str(error.value).endswith(message)


@pytest.mark.parametrize('kernel', [1, 3, 7])
@each_block()
def test_unknown_keys_are_errors_at_any_size(kind, kernel):
    cfg = dict(type=name_of(kind), brances=['kxk'], colour=1)
    with pytest.raises(TypeError) as error:
        build_conv_layer(cfg, 4, 8, kernel)
    message = str(error.value)
    expected = f"{kind.__name__} got unknown keys ['brances', 'colour']"
    assert expected in message
    for allowed in (*block_arguments(kind), 'max_kernel_size'):
        assert f"'{allowed}'" in message
    if kind in (ACB, DBB):
        for allowed in ('branches', 'gamma_init', 'norm_cfg'):
            assert f"'{allowed}'" in message
        assert ("'reduce_gamma'" in message) is (kind is ACB)


def test_block_arguments():
    names = block_arguments(ACB)
    assert names[0] == 'reduce_gamma'
    assert {'in_channels', 'kernel_size', 'branches', 'deploy'} <= set(names)
    assert 'reduce_gamma' not in block_arguments(DBB)
    assert len(names) == len(set(names))


def test_options_reach_the_block():
    cfg = dict(
        type='ACB', branches=['kxk', '1x1'], gamma_init=0.5, deploy=False
    )
    block = build_conv_layer(cfg, 4, 8, 3, dilation=2, groups=2)
    assert list(block.branches) == ['kxk', '1x1']
    assert block.spec.dilation == (2, 2) and block.spec.groups == 2


def test_deploy_in_the_config_builds_merged_blocks():
    block = build_conv_layer(dict(type='DBB', deploy=True), 4, 8, 3)
    assert block.deploy


def test_bad_geometry_is_named_at_any_size():
    with pytest.raises(ValueError, match='divisible by groups'):
        build_conv_layer(dict(type='DBB'), 4, 8, 1, groups=3)
