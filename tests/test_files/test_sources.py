"""Which weights are taken from what a training run leaves behind."""

import pytest
import torch
from helpers import deploy, distance, image
from mmengine.config import Config
from runs import run_config, train
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mmdbb import load_deployed
from mmdbb.errors import UserError
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.files.sources import choose_weights, without_prefixes
from mmdbb.mm.deploy.load import build_model

pytestmark = pytest.mark.usefixtures('quiet')
ONE, TWO = dict(w=torch.ones(1)), dict(w=torch.full((1,), 2.0))


def wrapped(state, prefix='module.', **more):
    return dict({f'{prefix}{k}': v for k, v in state.items()}, **more)


def steps():
    return dict(steps=torch.tensor(3))


# Content -> the averaged and the trained weights, and which are the default
CONTENTS = {
    'mmengine with EMA': (
        dict(state_dict=ONE, ema_state_dict=wrapped(TWO, **steps())),
        ('state_dict', 1),
        ('ema_state_dict', 2),
    ),
    "another's ema_state_dict": (
        dict(state_dict=ONE, ema_state_dict=TWO),
        ('ema_state_dict', 2),
        ('state_dict', 1),
    ),
    'timm': (
        dict(arch='x', state_dict=ONE, state_dict_ema=TWO, optimizer={}),
        ('state_dict_ema', 2),
        ('state_dict', 1),
    ),
    'timm of several GPUs': (
        dict(state_dict=wrapped(ONE), state_dict_ema=wrapped(TWO)),
        ('state_dict_ema', 2),
        ('state_dict', 1),
    ),
    "torchvision's recipes": (
        dict(
            model=ONE,
            model_ema=wrapped(
                TWO, 'module.module.', n_averaged=torch.tensor(9)
            ),
        ),
        ('model_ema', 2),
        ('model', 1),
    ),
    'averaged only': (
        dict(model_ema=ONE, meta=dict(a=1)),
        ('model_ema', 1),
        None,
    ),
    'bare, averaged': (
        wrapped(ONE, n_averaged=torch.tensor(9)),
        ('', 1),
        None,
    ),
}


@pytest.mark.parametrize('case', CONTENTS)
def test_kinds(case):
    content, averaged, trained = CONTENTS[case]
    for ema, kind, expected in (
        (True, 'averaged', averaged),
        (None, 'averaged', averaged),
        (False, 'trained', trained),
    ):
        if expected is None:
            with pytest.raises(UserError, match='--no-ema asks for; it hold'):
                choose_weights(content, 'a.pth', ema)
            continue
        found = choose_weights(content, 'a.pth', ema)
        assert (found.kind, found.key) == (kind, expected[0])
        assert {k: v.item() for k, v in found.state.items()} == {
            'w': expected[1]
        }
        assert str(found).startswith(f'the {kind} ones')


@pytest.mark.parametrize(
    'content, text',
    [
        (ONE, 'the only ones'),
        (dict(state_dict=ONE, meta={}), 'the only ones, state_dict'),
        (dict(model=wrapped(ONE), epoch=3), 'the only ones, model'),
    ],
)
def test_the_only_weights(content, text):
    for ema in (None, False):
        found = choose_weights(content, 'a.pth', ema)
        assert str(found) == text and list(found.state) == ['w']
    message = (
        'a.pth has no averaged weights, which --ema asks for; it holds: '
        + ', '.join(content)
    )
    with pytest.raises(UserError, match=message):
        choose_weights(content, 'a.pth', True)


def test_averages_of_torch_are_told_from_others():
    averaged = AveragedModel(nn.Linear(2, 3))
    found = choose_weights(averaged.state_dict(), 'a.pth')
    assert found.kind == 'averaged'
    assert list(found.state) == ['weight', 'bias']
    # A parameter may have a counter's name.
    state = dict(steps=torch.ones(1), w=torch.ones(1))
    assert choose_weights(state, 'a.pth').state is state


@pytest.mark.parametrize(
    'prefix',
    ['module.', '_orig_mod.', 'module._orig_mod.', '_orig_mod.module.'],
)
def test_prefixes_of_wrappers(prefix):
    names = ['conv.weight', 'a.module.b', 'x._orig_mod.y']
    state = {name: torch.ones(1) for name in names}
    assert list(without_prefixes(wrapped(state, prefix))) == names
    # If one has none, it is no wrapper's.
    some = dict(wrapped(state, prefix), last=torch.ones(1))
    assert without_prefixes(some) == some


def test_compiled_and_distributed(tmp_path):
    compiled = torch.compile(nn.Linear(2, 3))
    torch.save(nn.DataParallel(compiled).state_dict(), tmp_path / 'a.pth')
    found = read_checkpoint(str(tmp_path / 'a.pth'))
    assert list(found['state_dict']) == ['weight', 'bias']


@pytest.mark.parametrize(
    'content',
    [
        dict(model_delta=ONE, meta={}),
        dict(state_dict={}, weight_delta=ONE),
    ],
)
def test_differences_to_other_weights(content):
    with pytest.raises(UserError, match='holds differences to other weights'):
        choose_weights(content, 'a.pth')


# Runs of mmengine, as they are


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    """A run with EMA: its folder, its config, its averaged model."""
    folder = tmp_path_factory.mktemp('ema') / 'run'
    cfg = run_config(folder, (2.0, 1.0))
    runner = train(cfg)
    cfg.dump(folder / 'config.py')
    (hook,) = (h for h in runner.hooks if type(h).__name__ == 'EMAHook')
    return folder, hook.ema_model.module.eval(), runner.model.eval()


def deployed(run, name, out, **options):
    folder = run[0]
    return deploy(
        Config.fromfile(folder / 'config.py'),
        str(folder / name),
        str(out),
        image_size=(32, 24),
        **options,
    )


X = image(2, 3, 32, 24, dtype=torch.float32)


@pytest.mark.parametrize('ema', [None, True, False])
def test_last_checkpoint_with_ema(run, tmp_path, ema):
    _, averaged, trained = run
    result = deployed(run, 'epoch_2.pth', tmp_path / 'a.pth', ema=ema)
    expected, other = averaged, trained
    if ema is False:
        expected, other = trained, averaged
    model = load_deployed(result.config, result.checkpoint)
    assert distance(model(X), expected(X)) < 1e-5
    assert distance(model(X), other(X)) > 1e-3
    kind = 'trained' if ema is False else 'averaged'
    key = 'ema_state_dict' if ema is False else 'state_dict'
    assert result.weights == f'the {kind} ones, {key}'
    loaded = torch.load(result.checkpoint, weights_only=True)
    assert loaded.keys() == {'state_dict', 'meta'}
    assert loaded['meta']['mmdbb']['weights'] == result.weights
    # What mmengine notes stays.
    assert (
        loaded['meta']['epoch'] == 2 and 'mmengine_version' in loaded['meta']
    )


def test_best_checkpoint(run, tmp_path):
    result = deployed(run, 'best_good_epoch_1.pth', tmp_path / 'a.pth')
    best = torch.load(run[0] / 'best_good_epoch_1.pth', weights_only=False)
    model = build_model(Config.fromfile(run[0] / 'config.py'))
    model.load_state_dict(best['state_dict'])
    found = load_deployed(result.config, result.checkpoint)
    assert distance(found(X), model(X)) < 1e-5


def test_without_the_optimizer_it_is_smaller(run, tmp_path):
    result = deployed(run, 'epoch_2.pth', tmp_path / 'a.pth')
    source = torch.load(run[0] / 'epoch_2.pth', weights_only=False)
    assert {'optimizer', 'param_schedulers', 'message_hub'} <= source.keys()
    before = (run[0] / 'epoch_2.pth').stat().st_size
    with open(result.checkpoint, 'rb') as file:
        assert len(file.read()) < before / 4


def test_ema_that_is_not_there(run, tmp_path):
    source = torch.load(run[0] / 'epoch_2.pth', weights_only=False)
    del source['ema_state_dict']
    torch.save(source, tmp_path / 'plain.pth')
    with pytest.raises(UserError, match='has no averaged weights, .* it hol'):
        deployed(run, tmp_path / 'plain.pth', tmp_path / 'a.pth', ema=True)
    assert not (tmp_path / 'a.pth').exists()
