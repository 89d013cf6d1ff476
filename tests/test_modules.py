"""Questions about any module: its mode, its outputs, its size."""

import pytest
import torch
from torch import nn

from mmdbb.modules import count_parameters, in_eval_mode, named_values


class Frozen(nn.Sequential):
    """Keeps its norm in eval mode, as OpenMMLab's frozen backbones do."""

    def train(self, mode=True):
        super().train(mode)
        self[1].eval()
        return self


def test_eval_mode_is_restored_module_by_module():
    frozen = Frozen(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)).train()
    frozen[1].training = True  # train() would not give this back
    other = nn.Sequential(nn.Dropout()).eval()
    other[0].train()
    modules = [*frozen.modules(), *other.modules()]
    before = [module.training for module in modules]
    with pytest.raises(RuntimeError), in_eval_mode(frozen, other):
        assert not any(module.training for module in modules)
        raise RuntimeError
    assert [module.training for module in modules] == before


def test_names_of_nested_values():
    outputs = {'a': [1, (2, 3)], 'b': (4,)}
    assert dict(named_values('x', outputs)) == {
        'x.a.0': 1,
        'x.a.1.0': 2,
        'x.a.1.1': 3,
        'x.b.0': 4,
    }
    flat = dict(named_values('x', outputs, separator='_', unwrap=True))
    assert list(flat) == ['x_a_0', 'x_a_1_0', 'x_a_1_1', 'x_b']


def test_shared_parameters_count_once():
    layer = nn.Linear(2, 3)
    model = nn.Sequential(layer, nn.Tanh(), layer)
    model.register_buffer('constant', torch.ones(7))
    assert count_parameters(model) == 9
