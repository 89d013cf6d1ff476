"""The optimizer's rules are the papers' code's, name by name."""

import copy

import pytest
import torch
from helpers import image
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, build_optim_wrapper
from torch import nn

from mmdbb.blocks import DBB, RepVGGConv
from mmdbb.mm.backbones import MobileNetV1, MobileNetV1DBB, ReparamRepVGG
from mmdbb.reparam import find_blocks

TINY = dict(
    num_blocks=(2, 1, 1, 1),
    width_factor=(0.125, 0.125, 0.0625, 0.0625),
    group_layer_map=None,
    se_cfg=None,
)
LR, DECAY = 0.1, 1e-3
DBB_RULES = dict(bias_lr_mult=2.0, depthwise_decay_mult=0.0)
OREPA_RULES = dict(bias_lr_mult=2.0, bias_decay_mult=0.0, norm_decay_mult=0.0)
REPVGG_RULES = dict(
    bias_decay_mult=0.0,
    norm_decay_mult=0.0,
    identity_decay_mult=1.0,
    custom_l2=True,
)


class Classifier(BaseModel):
    """A backbone and a linear layer, trained on random labels."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.linear = nn.LazyLinear(3)
        self.linear(backbone.eval()(torch.rand(2, 3, 32, 32))[-1].mean((2, 3)))

    def forward(self, inputs, data_samples=None, mode='loss'):
        scores = self.linear(self.backbone(inputs)[-1].mean((2, 3)))
        return dict(loss=scores.square().mean())


def build(model, rules, optimizer=None, **options):
    return build_optim_wrapper(
        model,
        dict(
            optimizer=dict(type='SGD', lr=LR, weight_decay=DECAY)
            if optimizer is None
            else optimizer,
            constructor='ReparamOptimWrapperConstructor',
            paramwise_cfg=rules,
            **options,
        ),
    )


def values_of_trained(model, wrapper):
    """Names of what is trained -> (learning rate, weight decay)."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for group in wrapper.optimizer.param_groups:
        for parameter in group['params']:
            name = names[id(parameter)]
            assert name not in found
            found[name] = (group['lr'], group['weight_decay'])
    return found


def values_of(model, wrapper):
    """The same, where all parameters are trained."""
    found = values_of_trained(model, wrapper)
    assert set(found) == {name for name, _ in model.named_parameters()}
    return found


@pytest.mark.parametrize('cls', [MobileNetV1, MobileNetV1DBB])
def test_dbb(cls):
    model = Classifier(cls(base_channels=2))
    wrapper = build(model, DBB_RULES)
    expected = {
        # 'bias' in key; 'depth' in key
        name: (
            2 * LR if 'bias' in name else LR,
            0 if 'depth' in name else DECAY,
        )
        for name, _ in model.named_parameters()
    }
    assert values_of(model, wrapper) == expected
    assert (
        len(wrapper.optimizer.param_groups) == len(set(expected.values())) == 4
    )
    assert ('backbone.layer1.0.depthwise_conv.bn.weight' in expected) == (
        cls is MobileNetV1
    )


def test_grouped_is_not_depthwise():
    model = nn.Sequential(nn.Conv2d(4, 8, 3, groups=2), nn.Conv2d(1, 1, 3))
    with pytest.raises(ValueError, match='no depthwise convolution'):
        build(model, DBB_RULES)
    model.append(nn.Conv2d(4, 4, 3, groups=4))
    found = values_of(model, build(model, DBB_RULES))
    for name, (_, decay) in found.items():
        assert decay == (0 if name.startswith('2.') else DECAY)


def repvgg_names(key):
    """Our names in the words of the code's rules."""
    return key.replace('norm.', 'bn.').replace('identity.bn', 'rbr_identity')


def test_orepa():
    model = Classifier(ReparamRepVGG(TINY))
    wrapper = build(model, dict(OREPA_RULES, identity_decay_mult=1.0))
    expected = {}
    for name, _ in model.named_parameters():
        key = repvgg_names(name)
        free = 'bias' in key or 'bn' in key
        lr = 2 * LR if 'bias' in key else LR
        expected[name] = (lr, 0 if free else DECAY)
    assert values_of(model, wrapper) == expected
    identities = [n for n in expected if 'identity.norm.weight' in n]
    assert identities and all(expected[n][1] == DECAY for n in identities)
    # The text: no decay on norms, whichever.
    found = values_of(model, build(model, OREPA_RULES))
    assert all(found[n][1] == 0 for n in identities)


def test_repvgg_custom_l2_takes_the_place_of_decay():
    model = Classifier(ReparamRepVGG(TINY))
    found = values_of(model, build(model, REPVGG_RULES))
    decayed = {name for name, (_, decay) in found.items() if decay}
    assert decayed == {
        'linear.weight',
        'backbone.stage_1.1.branch_reparam.branches.identity.norm.weight',
    }


@pytest.mark.parametrize('accumulative_counts', [1, 2])
def test_repvgg_custom_l2_is_in_the_step(accumulative_counts):
    model = Classifier(ReparamRepVGG(TINY)).double()
    reference = copy.deepcopy(model)
    wrapper = build(
        model, REPVGG_RULES, accumulative_counts=accumulative_counts
    )
    assert isinstance(wrapper, OptimWrapper)
    wrapper.initialize_count_status(model, 0, accumulative_counts)
    batches = [image(4, 3, 32, 32, seed=i) for i in range(2)]
    model.train()
    for x in batches[:accumulative_counts]:
        model.train_step(dict(inputs=x), wrapper)

    # The paper's loop, written out.
    reference.train()
    for x in batches[:accumulative_counts]:
        loss = reference(x)['loss']
        for module in reference.modules():
            if isinstance(module, RepVGGConv):
                loss = loss + DECAY * 0.5 * module.get_custom_L2()
        (loss / accumulative_counts).backward()
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            decays = 'identity.norm.weight' in name or name == 'linear.weight'
            step = parameter.grad + decays * DECAY * parameter
            parameter -= LR * step
    expected = reference.state_dict()
    for name, value in model.state_dict().items():
        assert torch.allclose(value, expected[name], rtol=1e-12), name


class Doubling(OptimWrapper):
    """A wrapper with a backward pass of its own, as mixed precision has."""

    def backward(self, loss):
        super().backward(2 * loss)


def test_custom_l2_keeps_the_wrapper():
    single = Classifier(ReparamRepVGG(TINY)).double().eval()
    double = copy.deepcopy(single)
    x = image(4, 3, 32, 32)
    wrapper = build(double, REPVGG_RULES, type=Doubling)
    assert isinstance(wrapper, Doubling)
    double.train_step(dict(inputs=x), wrapper)
    single.train_step(dict(inputs=x), build(single, REPVGG_RULES))
    before = copy.deepcopy(single)
    name = 'backbone.stem.branch_reparam.branches.kxk.conv.weight'
    start = 2 * before.get_parameter(name) - double.get_parameter(name)
    # Twice the step from the same start, which neither is decayed from.
    one, two = (m.get_parameter(name) - start for m in (single, double))
    assert torch.allclose(two, 2 * one, rtol=1e-9)


def test_custom_l2_leaves_frozen_and_merged_blocks_alone():
    model = Classifier(ReparamRepVGG(TINY, frozen_stages=1))
    blocks = list(find_blocks(model).values())
    blocks[-1].switch_to_deploy()
    rules = dict(REPVGG_RULES)
    with pytest.raises(ValueError, match='no identity branch'):
        build(model, rules)  # the only one is frozen
    del rules['identity_decay_mult']
    wrapper = build(model, rules)
    assert wrapper.custom_l2_blocks == blocks[3:-1]


def test_stem_and_custom_keys_multiply():
    rules = dict(
        bias_lr_mult=2.0,
        stem_lr_mult=0.5,
        custom_keys={
            'linear': dict(lr_mult=3.0),
            'linear.bias': dict(lr_mult=5.0, decay_mult=0.0),
        },
    )
    model = Classifier(MobileNetV1(base_channels=2))
    found = values_of(model, build(model, rules))
    assert found['backbone.conv1.conv.weight'] == (0.5 * LR, DECAY)
    assert found['backbone.conv1.bn.bias'] == (0.5 * 2 * LR, DECAY)
    assert found['backbone.layer1.0.pointwise_conv.bn.bias'][0] == 2 * LR
    assert found['linear.weight'] == (3 * LR, DECAY)
    assert found['linear.bias'] == (5 * 2 * LR, 0)


def test_frozen_parameters_stay_out():
    model = Classifier(MobileNetV1(base_channels=2, frozen_stages=0))
    wrapper = build(model, DBB_RULES)
    frozen = {id(p) for p in model.backbone.conv1.parameters()}
    for group in wrapper.optimizer.param_groups:
        assert not frozen & {id(p) for p in group['params']}


def test_without_rules_all_are_equal():
    model = nn.Conv2d(3, 4, 3)
    wrapper = build(model, None)
    assert len(wrapper.optimizer.param_groups) == 1


@pytest.mark.parametrize(
    'rules, message',
    [
        (dict(bias_lr_mul=2), r"unknown rules \['bias_lr_mul'\]; allowed"),
        (dict(custom_l2=True), 'the model has none'),
        (dict(stem_lr_mult=0.1), 'stem_lr_mult finds .* model has no stem'),
        (dict(depthwise_decay_mult=0), 'depthwise_decay_mult finds nothing'),
        (dict(identity_decay_mult=1), 'identity_decay_mult finds nothing'),
        (
            dict(custom_keys=dict(kxk=dict(), head=dict(lr_mult=2))),
            r"custom_keys \['head'\] find nothing",
        ),
        (
            dict(custom_keys=dict(norm=dict(), kxk=dict(), branches=dict())),
            r"custom_keys \['kxk', 'norm'\] find nothing",  # longer: branches
        ),
    ],
)
def test_wrong_rules(rules, message):
    with pytest.raises(ValueError, match=message):
        build(DBB(3, 4, 3), rules)


#: Rules -> the parts of the model below that they are for.
FOR = dict(
    bias_lr_mult='bias',
    bias_decay_mult='bias',
    norm_decay_mult='bn',
    depthwise_decay_mult='depthwise_conv',
    stem_lr_mult='backbone.conv1.',
    custom_keys='pointwise',
)


@pytest.mark.parametrize('rule', FOR)
def test_rules_count_what_is_trained(rule):
    model = Classifier(MobileNetV1(base_channels=2))
    rules = {rule: 0.5}
    if rule == 'custom_keys':
        rules = dict(custom_keys={FOR[rule]: dict(lr_mult=0.5)})
    named = {n: p for n, p in model.named_parameters() if FOR[rule] in n}
    assert named
    last = named.popitem()
    for parameter in named.values():
        parameter.requires_grad_(False)
    found = values_of_trained(model, build(model, rules))
    changed = [n for n, values in found.items() if values != (LR, DECAY)]
    assert changed == [last[0]]
    last[1].requires_grad_(False)
    with pytest.raises(ValueError, match='nothing to change'):
        build(model, rules)


def test_identities_that_are_frozen_are_none():
    model = Classifier(ReparamRepVGG(TINY))
    build(model, dict(identity_decay_mult=1.0))
    for name, parameter in model.named_parameters():
        if 'identity' in name:
            parameter.requires_grad_(False)
    with pytest.raises(ValueError, match='no identity branch with a norm'):
        build(model, dict(identity_decay_mult=1.0))


def test_needs_a_weight_decay():
    with pytest.raises(ValueError, match='needs lr and weight_decay'):
        build(DBB(3, 4, 3), DBB_RULES, dict(type='SGD', lr=0.1))
