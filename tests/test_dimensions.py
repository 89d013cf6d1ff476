"""One algebra for lines, pictures and volumes: numbers, and models of all."""

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import distance, image, randomize
from torch import nn

from mmdbb import (
    DBB,
    insert_blocks_,
    load_plain_weights_,
    merge_back_,
    merge_into_,
    reparameterize,
)
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.dimensions import CONV_TYPES, LayerKind, kind_of
from mmdbb.errors import UserError
from mmdbb.geometry import ConvSpec, pad_images
from mmdbb.reparam import find_blocks, literal_forward
from mmdbb.tracing import sole_readers
from mmdbb.transforms import (
    compose_stack,
    frequency_prior,
    pad_kernel,
    swap_channels,
)

EXACT = 1e-12


# Geometry


def test_dims_follow_from_the_kernel():
    assert ConvSpec(4, 8, 3).dims == 2
    assert ConvSpec(4, 8, (1, 3, 3)).dims == 3
    assert ConvSpec(4, 8, [3]).kernel_size == (3,)
    spec = ConvSpec(4, 8, 3, 2, 'valid', dims=3, groups=2)
    assert spec.stride == (2, 2, 2) and spec.padding == (0, 0, 0)
    assert spec.kernel_shape == (8, 2, 3, 3, 3) == spec.weight_shape
    assert spec.kind == LayerKind(3) and spec.kind.name == 'nn.Conv3d'
    assert ConvSpec(1, 1, 4, padding='same', dims=1).pads == (1, 2)
    assert ConvSpec(1, 1, (1, 3, 5), padding='same').padding == (0, 1, 2)
    assert ConvSpec(1, 1, (3, 1, 1)).pads_of((1,) * 3) == (-1, -1, 0, 0, 0, 0)
    for kind, conv_type in CONV_TYPES.items():
        spec = ConvSpec(4, 8, 3, dims=kind.dims, transposed=kind.transposed)
        conv = conv_type(**spec.conv_args)
        assert conv.weight.shape == spec.weight_shape
        assert kind_of(conv) == kind
    assert kind_of(nn.Linear(1, 1)) is None


def test_transposed_geometry_exact():
    def spec(kernel, stride, padding, extra=0, **options):
        return ConvSpec(
            4,
            8,
            kernel,
            stride,
            padding,
            transposed=True,
            output_padding=extra,
            **options,
        )

    # The tap that writes to the pixel's own place, times the stride.
    assert spec(4, 2, 1).centre == (1, 1)
    assert spec(2, 2, 0).centre == (0, 0)
    assert spec(3, 2, 1, 1).centre == (1, 1)
    # What a single tap's output lacks of the block's, before and after.
    assert spec(4, 2, 1).pads_of((1, 1)) == (0, 1, 0, 1)
    assert spec(2, 2, 0).pads_of((1, 1)) == (0, 1, 0, 1)
    assert spec(3, 2, 1, 1).pads_of((1, 1)) == (0, 1, 0, 1)
    assert spec(5, 1, 3).pads_of((1, 1)) == (-1, -1, -1, -1)
    assert spec(3, 2, 1).for_output((5, 5), (9, 10)).output_padding == (0, 1)
    assert not spec(3, 2, 1).has_border
    assert spec(3, 2, 1, groups=2).weight_shape == (4, 4, 3, 3)


def test_pad_images_pads_and_crops():
    x = image(2, 3, 4, 5, 6)
    found = pad_images(x, (1, 0, -1, 2, 0, -3))
    assert torch.equal(found, F.pad(x, (0, -3, -1, 2, 1, 0)))
    line = image(2, 3, 5)
    assert torch.equal(pad_images(line, (1, -2)), F.pad(line, (1, -2)))
    found = pad_images(line, (2, 1), 'circular')
    assert torch.equal(
        found, torch.cat([line[..., 3:], line, line[..., :1]], -1)
    )


# Algebra


@pytest.mark.parametrize('groups', [1, 2])
def test_a_swapped_kernel_reads_what_a_transposed_one_writes(groups):
    """A transposed convolution is the plain one of the flipped kernel."""
    weight, x = image(4, 3, 3, 2), image(2, 4, 5, 6)
    expected = F.conv_transpose2d(x, weight, groups=groups)
    kernel = swap_channels(weight, groups).flip(2, 3)
    assert kernel.shape == (3 * groups, 4 // groups, 3, 2)
    found = F.conv2d(x, kernel, padding=(2, 1), groups=groups)
    assert distance(found, expected) < EXACT
    assert torch.equal(
        swap_channels(swap_channels(weight, groups), groups), weight
    )


def test_a_stack_of_volumes_is_one_kernel():
    first, second = image(4, 2, 3, 3, 3), image(6, 2, 3, 3, 3, seed=1)
    x = image(2, 4, 7, 6, 5)
    expected = F.conv3d(F.conv3d(x, first, groups=2), second, groups=2)
    kernel = compose_stack(first, second, groups=2)
    assert distance(F.conv3d(x, kernel, groups=2), expected) < EXACT


def test_small_kernels_of_all_dimensions_stand_in_the_middle():
    for dims in (1, 2, 3):
        one = torch.ones(1, 1, *[1] * dims)
        found = pad_kernel(one, (3, 4, 5)[:dims])
        assert found.nonzero().tolist() == [[0, 0, 1, 1, 2][: 2 + dims]]


def test_the_prior_of_volumes_varies_along_each_dimension():
    prior = frequency_prior(6, (2, 3, 4))
    assert prior.shape == (6, 2, 3, 4)
    for channel in range(6):
        own = channel // 2
        for other in {0, 1, 2} - {own}:
            assert prior[channel].diff(dim=other).abs().max() == 0
        tap = torch.arange((2, 3, 4)[own], dtype=torch.float64) + 0.5
        wave = torch.cos(torch.pi * tap * (channel % 2 + 1) / len(tap))
        index = [0, 0, 0]
        index[own] = slice(None)
        assert torch.allclose(prior[channel][tuple(index)], wave)
    tap = torch.arange(5, dtype=torch.float64) + 0.5
    wave = torch.cos(torch.pi * tap * 3 / 5)
    assert torch.allclose(frequency_prior(3, (5,))[2], wave)


# Models


class Mixed(nn.Module):
    """A volume, seen as pictures, upsampled, and read line by line."""

    def __init__(self):
        super().__init__()
        self.volume = nn.Conv3d(2, 4, (3, 3, 1), padding=(1, 1, 0), bias=False)
        self.norm3 = nn.BatchNorm3d(4)
        self.up = nn.ConvTranspose2d(4, 6, 4, 2, 1, groups=2, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.flat = nn.Conv2d(6, 4, 3)
        self.line = nn.Conv1d(4, 4, 4, bias=True)
        self.norm1 = nn.BatchNorm1d(4)
        self.last = nn.ConvTranspose1d(4, 3, 3, stride=2, output_padding=1)

    def forward(self, x):
        y = self.norm3(self.volume(x)).relu()[:, :, 0]
        y = self.flat(self.norm2(self.up(y)).relu())
        return self.last(self.norm1(self.line(y[:, :, 0])).relu())


def mixed():
    model = randomize(Mixed()).double().eval()
    return model, image(2, 2, 3, 5, 6)


CONVS = ['volume', 'up', 'flat', 'line', 'last']


def test_blocks_of_each_kind_there_and_back():
    model, x = mixed()
    plain, entries = copy.deepcopy(model), model.state_dict().keys()
    expected = model(x)
    assert insert_blocks_(model) == CONVS
    assert [type(b).__name__ for b in find_blocks(model).values()] == [
        'DBB3d',
        'DBBTranspose2d',
        'DBB',
        'DBB1d',
        'DBBTranspose1d',
    ]
    for name in ('norm1', 'norm2', 'norm3'):
        assert isinstance(getattr(model, name), AbsorbedNorm)
    with literal_forward(model):
        assert distance(model(x), expected) < EXACT
    model.train()
    model(x).sum().backward()
    randomize(model, 1).eval()
    with literal_forward(model), torch.no_grad():
        trained = model(x)
    assert distance(trained, expected) > 0.1
    merged = reparameterize(model)
    assert {type(m) for m in merged.children()} == {
        nn.Conv3d,
        nn.ConvTranspose2d,
        nn.Conv2d,
        nn.Conv1d,
        nn.ConvTranspose1d,
        nn.Identity,
    }
    assert distance(merged(x), trained) < EXACT
    merge_into_(plain, model)
    assert distance(plain(x), trained) < EXACT
    merge_back_(model)
    assert distance(model(x), trained) < EXACT
    assert model.state_dict().keys() == entries
    assert model.up.bias is None and type(model.norm1) is nn.BatchNorm1d


def test_plain_weights_of_each_kind():
    plain, x = mixed()
    model = copy.deepcopy(plain)
    insert_blocks_(model)
    randomize(model, 1)
    other = copy.deepcopy(model)
    load_plain_weights_(model, plain.state_dict())
    other.load_state_dict(plain.state_dict())
    for each in (model, other):
        with literal_forward(each):
            assert distance(each(x), plain(x)) < EXACT


def test_a_form_replaces_its_own_kind_only():
    model, x = mixed()
    y = model(x)
    assert insert_blocks_(model, dict(type='DBBTranspose2d')) == ['up']
    assert insert_blocks_(model, dict(type='ACB')) == ['volume', 'flat']
    assert insert_blocks_(model, dict(type='RepVGGConv1d')) == ['line']
    assert distance(model(x), y) < EXACT
    with pytest.raises(ValueError, match='ACB has no form for nn.ConvTransp'):
        insert_blocks_(model, dict(type='ACB'))


def test_norms_of_each_kind_are_found_in_the_data():
    model, x = mixed()
    for readers in (sole_readers(model), sole_readers(model, x)):
        found = {readers[getattr(model, name)] for name in CONVS}
        assert found == {model.norm1, model.norm2, model.norm3, None}


def test_an_offered_kernel_of_other_dimensions_is_refused():
    model = nn.Sequential(nn.Conv3d(4, 4, 3))
    insert_blocks_(model)
    flat = nn.Sequential(nn.Conv2d(4, 4, 3)).state_dict()
    with pytest.raises(RuntimeError, match='size mismatch for 0.weight'):
        model.load_state_dict(flat)
    with pytest.raises(UserError, match='the plain kernel has shape'):
        load_plain_weights_(model, flat)


def test_a_form_of_ones_own():
    from mmengine.registry import MODELS

    from mmdbb.blocks.build import form_of, register_conv_layer
    from mmdbb.registry import BLOCKS

    class Own(DBB):
        pass

    with pytest.raises(ValueError, match='Own has no form for an nn.Conv3d. '):
        form_of(Own, LayerKind(3))
    try:

        @register_conv_layer('Own3d')
        class Own3d(Own):
            dims = 3

        assert form_of(Own, LayerKind(3)) is Own3d
        assert form_of(Own3d, LayerKind(2)) is Own
        assert form_of(DBB, LayerKind(3)) is not Own3d
        model = nn.Sequential(nn.Conv3d(2, 2, 3))
        assert insert_blocks_(model, dict(type='Own3d')) == ['0']
        assert type(model[0]) is Own3d
    finally:
        del BLOCKS.module_dict['Own3d']
        MODELS.module_dict.pop('Own3d', None)
