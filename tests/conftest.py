"""One setting for all tests: deterministic, and no trace left behind."""

import functools
import logging
import os

# Small tensors on many threads cost more than on one; the commands that tests
# run inherit it. Set before torch is imported.
os.environ['OMP_NUM_THREADS'] = '1'

import mmengine.config.utils
import pytest
import torch
from helpers import process_kept
from hypothesis import HealthCheck, Phase, settings
from mmengine.config import Config
from mmengine.registry import DefaultScope

# Tests of the tests want to see a failure, not the smallest that there is.
ONLY_SEE = (Phase.explicit, Phase.generate)
settings.register_profile(
    'mmdbb',
    phases=ONLY_SEE if 'MMDBB_ONLY_SEE' in os.environ else tuple(Phase),
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile('mmdbb')


@pytest.fixture(scope='session', autouse=True)
def _indices_are_read_once():
    """For each base in a host package, mmengine reads all its metafiles."""
    utils = mmengine.config.utils
    before = utils.load
    utils.load = functools.lru_cache(maxsize=None)(before)
    yield
    utils.load = before


@pytest.fixture(autouse=True)
def _isolated():
    """Each test starts from one seed, and from no default scope."""
    torch.manual_seed(0)
    instances = DefaultScope._instance_dict.copy()
    DefaultScope._instance_dict = type(instances)()
    with process_kept():
        yield
    DefaultScope._instance_dict = instances


@pytest.fixture
def quiet():
    """Silence what the host packages log while they build networks."""
    logging.disable(logging.WARNING)


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
    """From a task to its config and the path of a checkpoint."""
    pytest.importorskip('mlxtend')
    pytest.importorskip('sklearn')
    from tiny_demo import tiny_checkpoint, tiny_config

    root = tmp_path_factory.mktemp('trained')

    @functools.cache
    def make(task):
        cfg = tiny_config(task, root)
        cfg.dump(root / f'{task}.py')
        cfg = Config.fromfile(root / f'{task}.py')
        return cfg, tiny_checkpoint(cfg, root / f'{task}.pth')

    return make


@pytest.fixture(scope='session')
def sizes():
    """By task, height and width of the images in pixels."""
    from tiny_demo import TASKS

    return {task: size for task, (_, _, size) in TASKS.items()}


def pytest_collection_modifyitems(items):
    """The longest file first: it is one worker's, and would end alone."""
    items.sort(key=lambda item: 'test_demo_commands' not in item.nodeid)
