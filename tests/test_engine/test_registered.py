"""Every hook, start and constructor of mmdbb: named, run, and left again."""

import copy
import importlib
import inspect
import json
import lzma
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import (
    HOOKS,
    MODELS,
    OPTIM_WRAPPER_CONSTRUCTORS,
    WEIGHT_INITIALIZERS,
)
from registered import registered_here, registries
from runs import run_config, train

import mmdbb
from mmdbb.blocks.build import registered_blocks
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.stock.config import stock_config
from mmdbb.repopt import branch_scales, save_scales

pytestmark = pytest.mark.usefixtures('quiet')

# What no face of the package imports is found too, and fails below.
for _info in pkgutil.walk_packages(mmdbb.__path__, 'mmdbb.'):
    if '.mim' not in _info.name:
        importlib.import_module(_info.name)

PARTS = {
    name: kind
    for registry in (HOOKS, WEIGHT_INITIALIZERS, OPTIM_WRAPPER_CONSTRUCTORS)
    for name, kind in registered_here(registry).items()
}
OFFICIAL = Path(__file__).resolve().parents[1] / 'data' / 'official'


def of_the_network(cfg, folder):
    """A checkpoint of what is trained."""
    return checkpoint_of(cfg, folder)


def of_the_stock_network(cfg, folder):
    return checkpoint_of(stock_config(cfg), folder)


def checkpoint_of(cfg, folder):
    path = str(folder / 'start.pth')
    torch.save(dict(state_dict=build_model(cfg).state_dict()), path)
    return path


def of_the_papers(cfg, folder):
    """A file of the DBB paper's code, and the backbone that it is of."""
    cfg.model.backbone = dict(
        type='MobileNetV1DBB', channels=(4, 4, 4, 8, 16, 32)
    )
    cfg.model.head.in_channels = 32
    name = 'mobilenet_dbb_train.pth.tar'
    path = folder / name
    path.write_bytes(lzma.open(OFFICIAL / f'{name}.xz').read())
    return str(path)


def rate_of_unireplknet(cfg, folder):
    """A rate, and a backbone that knows its layers."""
    sizes = ((3,), (7,), (3,), (3,))
    cfg.model.backbone = dict(
        type='UniRepLKNet',
        arch=dict(channels=(4, 4, 8, 8), kernel_sizes=sizes),
        gap_before_final_norm=False,
    )
    cfg.model.head.in_channels = 8
    return 0.8


def of_a_search(cfg, folder):
    """A file of scales, and the plain network that they are of."""
    cfg.model = stock_config(cfg).model
    search = copy.deepcopy(cfg)
    search.model.backbone.conv_cfg = dict(type='LinearAdd')
    path = str(folder / 'scales.pth')
    save_scales(branch_scales(build_model(search)), path)
    return path


#: Name -> arguments; those that are functions are told config and folder.
ROWS = {
    'BackbonePretrained': dict(checkpoint=of_the_network),
    'BlocksHook': dict(),
    'BranchSharesHook': dict(interval=1),
    'DataCheckHook': dict(),
    'KernelPenaltyHook': dict(weight=1e-4),
    'LayerDecayOptimWrapperConstructor': dict(decay_rate=rate_of_unireplknet),
    'OfficialPretrained': dict(checkpoint=of_the_papers),
    'PlainPretrained': dict(
        checkpoint=of_the_stock_network, prefix='backbone.'
    ),
    'QATHook': dict(image_size=(24, 32)),
    'ReparamHook': dict(image_size=(24, 32)),
    'ReparamOptimWrapperConstructor': dict(bias_lr_mult=2.0),
    'RepOpt': dict(scales=of_a_search),
    'RepOptimWrapperConstructor': dict(scales=of_a_search),
    'RepeatableHook': dict(),
    'TorchDefault': dict(),
    'WholeCheckpointHook': dict(interval=1),
}
EACH = pytest.mark.parametrize('name', sorted(set(PARTS) & set(ROWS)))


def test_every_part_has_a_row():
    missing = sorted(set(PARTS) - set(ROWS))
    assert not missing, (
        f'no test runs {", ".join(missing)}: add a row to ROWS in '
        'tests/test_engine/test_registered.py'
    )
    assert not set(ROWS) - set(PARTS)


def test_nothing_else_is_registered():
    """Whatever is new there needs a test as those here."""
    found = {
        name for name, value in registries().items() if registered_here(value)
    }
    tested = {'HOOKS', 'OPTIM_WRAPPER_CONSTRUCTORS', 'WEIGHT_INITIALIZERS'}
    assert found == tested | {'MODELS'}
    # Classes there are backbones, see test_backbones/test_registered.py.
    functions = {
        name
        for name, part in registered_here(MODELS).items()
        if not inspect.isclass(part)
    }
    layers = set(registered_blocks(None))
    # Tested in test_mm/test_partial.py and test_mm/test_by_name.py.
    assert functions == layers | {'PartlyMerged', 'WithBlocks'}


KNOWN = """
import importlib, json, os, sys
from mmengine.registry import (
    HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, WEIGHT_INITIALIZERS)

def say(face):
    importlib.import_module(face)
    parts = HOOKS, OPTIM_WRAPPER_CONSTRUCTORS, WEIGHT_INITIALIZERS
    names = [name for part in parts for name in part.module_dict]
    print(json.dumps({face: names}), flush=True)

say('mmdbb')
for face in sys.argv[1:]:
    child = os.fork()  # each from what `import mmdbb` alone has imported
    if not child:
        say(face)
        os._exit(0)
    os.waitpid(child, 0)
"""


def faces_of(name):
    """What a part's docstring says to import, beside ``mmdbb``."""
    doc = ' '.join(PARTS[name].__doc__.split())
    return re.findall(r"imports=\['(mmdbb[\w.]*)'\]", doc)


@pytest.fixture(scope='module')
def known():
    """Face -> names that a process knows that has imported no more."""
    faces = sorted({face for name in PARTS for face in faces_of(name)})
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', KNOWN, *faces],
        capture_output=True,
        text=True,
        cwd=Path(mmdbb.__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    found = {}
    for line in run.stdout.splitlines():
        found.update(json.loads(line))
    return found


@EACH
def test_is_documented_and_found_by_its_name(name, known):
    """After ``import mmdbb``, or after what its docstring imports."""
    assert PARTS[name].__doc__
    if name in known['mmdbb']:
        return
    faces = faces_of(name)
    assert faces, f'the docstring of {name} does not say what to import'
    for face in faces:
        assert name in known[face], face


def config_with(name, folder):
    """The config of a training of one epoch with this part."""
    cfg = run_config(folder / 'run', (1.0,))
    arguments = {
        key: value(cfg, folder) if callable(value) else value
        for key, value in ROWS[name].items()
    }
    part = dict(type=name, **arguments)
    if name in HOOKS.module_dict:
        if issubclass(PARTS[name], CheckpointHook):
            cfg.default_hooks.checkpoint.update(part)
        else:
            cfg.custom_hooks = [part]
    elif name in WEIGHT_INITIALIZERS.module_dict:
        whole = name == 'RepOpt'  # its file has names of the whole model
        place = cfg.model if whole else cfg.model.backbone
        place.init_cfg = part
    else:
        cfg.optim_wrapper.constructor = name
        cfg.optim_wrapper.paramwise_cfg = arguments
        cfg.optim_wrapper.optimizer.weight_decay = 1e-4
    return cfg


@EACH
def test_runs_an_epoch(name, tmp_path):
    runner = train(config_with(name, tmp_path))
    assert runner.epoch == 1
    for key, value in runner.model.state_dict().items():
        assert value.isfinite().all(), key
    assert any(isinstance(hook, PARTS[name]) for hook in runner.hooks) is (
        name in HOOKS.module_dict
    )


@EACH
def test_is_not_in_the_stock_config(name, tmp_path):
    """What the stock packages do not know is left out, or replaced."""
    cfg = config_with(name, tmp_path)
    assert f"'{name}'" in cfg.pretty_text
    stock = stock_config(cfg)
    assert name not in stock.pretty_text
    kept = stock.get('default_hooks', {}).get('checkpoint', {})
    assert kept.get('type') == 'CheckpointHook'
    assert kept.get('save_best') == 'good'
    if name in OPTIM_WRAPPER_CONSTRUCTORS.module_dict:
        assert 'paramwise_cfg' not in stock.optim_wrapper
        assert stock.optim_wrapper.optimizer == cfg.optim_wrapper.optimizer
