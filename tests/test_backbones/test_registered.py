"""What every backbone promises, for each that is registered."""

import inspect

import pytest
import torch
from helpers import EXACT, blocks_of, distance, image, randomize, tensors
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from registered import registered_here
from test_backbones.cases import SMALL
from torch.nn.modules.batchnorm import _BatchNorm

import mmdbb.mm.backbones
from mmdbb.mm.stock.config import stock_config
from mmdbb.reparam import literal_forward, reparameterize
from mmdbb.stock_weights import stock_state

pytestmark = pytest.mark.usefixtures('quiet')

#: Blocks and what merges some of them are functions there, no classes. The
#: upsample module of U-Nets is a layer, see test_mm/test_forms.py.
BACKBONES = {
    name: kind
    for name, kind in registered_here(MODELS).items()
    if inspect.isclass(kind) and kind.__module__ != 'mmdbb.mm.upsample'
}
EACH = pytest.mark.parametrize('name', sorted(set(BACKBONES) & set(SMALL)))


def test_every_backbone_has_a_row():
    missing = sorted(set(BACKBONES) - set(SMALL))
    assert not missing, (
        f'no test builds {", ".join(missing)}: add a row to SMALL in '
        'tests/test_backbones/cases.py'
    )
    gone = sorted(set(SMALL) - set(BACKBONES))
    assert not gone, f'SMALL has rows that nothing is registered for: {gone}'


def config(name, **more):
    return dict(SMALL[name].arguments, type=name, **more)


def of_all_stages(name, **more):
    return config(name, **more) | dict(out_indices=[*range(outputs(name))])


def outputs(name):
    return SMALL[name].outputs


def build(cfg):
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg)
    model.init_weights()
    return model


def stock_of(cfg):
    """The config of the backbone that this one is once merged."""
    found = stock_config(
        Config(
            dict(
                default_scope='mmpretrain',
                model=dict(type='ImageClassifier', backbone=cfg),
            )
        )
    )
    return found.model.backbone.to_dict()


def in_mode(model, training):
    """Set the mode; train() of some stock networks returns nothing."""
    model.train(training)
    return model


def images(name, batch=2, **options):
    return image(batch, 3, *SMALL[name].size, **options)


def norms(model):
    return [m for m in model.modules() if isinstance(m, _BatchNorm)]


@EACH
def test_is_documented_and_public(name):
    assert BACKBONES[name].__doc__
    public = getattr(mmdbb.mm.backbones, BACKBONES[name].__name__)
    assert public is BACKBONES[name]


@EACH
def test_out_indices_choose_outputs(name):
    """Of the sizes and with the numbers of the stock network's."""
    model = in_mode(randomize(build(of_all_stages(name)).double()), False)
    stock = build(stock_of(of_all_stages(name))).double()
    in_mode(stock, False)
    x = images(name)
    with torch.no_grad():
        every = tensors(model(x))
        assert len(every) == outputs(name)
        assert [y.shape for y in every] == [y.shape for y in stock(x)]
        sides = [y.shape[2] for y in every]
        assert sides == sorted(sides, reverse=True) and min(sides) > 1
        for index in (0, outputs(name) - 1):
            one = build(config(name) | dict(out_indices=[index])).double()
            one.load_state_dict(model.state_dict(), strict=False)
            (y,) = tensors(in_mode(one, False)(x))
            assert distance(y, every[index]) < EXACT


@EACH
def test_a_training_changes_everything(name):
    model = build(config(name))
    in_mode(model, True)
    if type(model).train.__module__.startswith('mmdbb'):
        assert model.train() is model  # mmpretrain's own returns nothing
    before = {k: v.clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    # Twice: a residual whose last gamma starts at zero learns it first.
    for seed in (0, 1):
        y = tensors(model(images(name, 4, seed=seed, dtype=torch.float32)))[-1]
        optimizer.zero_grad()
        (y * torch.randn_like(y)).sum().backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.isfinite().all(), key
        optimizer.step()
    after = model.state_dict()
    assert not [k for k, v in after.items() if torch.equal(v, before[k])]


@EACH
def test_merges_into_its_stock_network(name):
    """Blocks, merged, switched, built merged and stock: one function."""
    cfg = of_all_stages(name)
    model = in_mode(randomize(build(cfg).double()), False)
    stock = in_mode(build(stock_of(cfg)).double(), False)
    x = images(name)
    with torch.no_grad(), literal_forward(model):
        expected = tensors(model(x))

    def compare(network):
        with torch.no_grad():
            found = tensors(network(x))
        assert len(found) == len(expected)
        for y, z in zip(found, expected):
            assert distance(y, z) < EXACT
        return found

    if not blocks_of(model):  # a stock network itself
        assert type(stock) is type(model)
        stock.load_state_dict(model.state_dict())
        compare(stock)
        return
    compare(model)
    assert not blocks_of(stock)
    stock.load_state_dict(stock_state(model, stock))
    compare(stock)
    merged = reparameterize(model)
    assert not blocks_of(merged)
    found = compare(merged)
    model.switch_to_deploy()
    model.switch_to_deploy()
    assert not blocks_of(model)
    assert all(map(torch.equal, compare(model), found))
    fresh = in_mode(build(dict(cfg, deploy=True)).double(), False)
    assert not blocks_of(fresh)
    fresh.load_state_dict(model.state_dict())
    compare(fresh)


@EACH
def test_frozen_stages_are_those_of_the_stock_network(name):
    x = images(name, dtype=torch.float32)
    counts = []
    for frozen in (-1, 0, 1, 2):
        cfg = of_all_stages(name, frozen_stages=frozen)
        model = in_mode(build(cfg), True)
        for norm in norms(model):
            assert norm.training is norm.weight.requires_grad
        before = {n: b.clone() for n, b in model.named_buffers()}
        learns = [y.requires_grad for y in tensors(model(x))]
        for key, buffer in model.named_buffers():
            norm = model.get_submodule(key.rpartition('.')[0])
            moved = not torch.equal(buffer, before[key])
            if isinstance(norm, _BatchNorm):
                assert moved is norm.training, key
        stock = in_mode(build(stock_of(cfg)), True)
        assert learns == [y.requires_grad for y in tensors(stock(x))]
        assert learns == sorted(learns)  # the first ones are frozen
        counts.append(sum(p.requires_grad for p in model.parameters()))
    assert counts == sorted(counts, reverse=True)
    assert counts[0] == len(list(model.parameters())) > counts[-1]


@EACH
def test_norm_eval_reaches_every_norm(name):
    model = in_mode(build(config(name, norm_eval=True)), True)
    assert norms(model) and not any(norm.training for norm in norms(model))
