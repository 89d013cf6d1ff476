"""Tests of the tests: what is registered wrongly fails, what is right passes.

Each runs pytest as a developer would who has just registered a part: a
plugin registers it before the tests are collected.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent

#: A block that no other one is, as in docs/add_a_block.md.
RIGHT = """
from mmdbb.blocks import BranchSumConv2d
from mmdbb.blocks.build import register_conv_layer


@register_conv_layer('CrossConv')
class CrossConv(BranchSumConv2d):
    '''KxK, Kx1, 1xK, 1x1 and, where the shapes agree, the identity.'''

    preset = ('identity', '1x1', '1xk', 'kx1', 'kxk')
"""
WRONG = """
from mmpretrain.models import ResNet
from mmpretrain.registry import MODELS

from mmdbb.blocks import DBB
from mmdbb.blocks.build import register_conv_layer
from mmdbb.branches import KxK
from mmdbb.registry import BRANCHES
from mmdbb.transforms import KernelBias


@register_conv_layer('TwiceConv')
class TwiceConv(DBB):
    '''Composes twice its kernel.'''

    def _compose(self, *args, **kwargs):
        kernel, bias = super()._compose(*args, **kwargs)
        return KernelBias(2 * kernel, bias)


@BRANCHES.register_module(name='shifted')
class Shifted(KxK):
    '''Its kernel is one pixel off.'''

    def equivalent_kernel_bias(self):
        kernel, bias = super().equivalent_kernel_bias()
        return KernelBias(kernel.roll(1, -1), bias)


@MODELS.register_module()
class RowlessResNet(ResNet):
    '''A backbone that nobody has given small arguments.'''

    __module__ = 'mmdbb.mm.backbones.rowless'
"""
#: Writes which tests there are, and how each ended.
REPORT = """

def pytest_collection_modifyitems(items):
    with open(LOG, 'a') as file:
        for item in items:
            file.write(f'collected {item.nodeid}\\n')


def pytest_runtest_logreport(report):
    if report.when == 'call':
        with open(LOG, 'a') as file:
            file.write(f'{report.outcome} {report.nodeid}\\n')
"""


def run_pytest(folder, part, *arguments):
    """Run pytest where a part is registered; what it reported, by outcome."""
    folder.mkdir()
    log = folder / 'log.txt'
    text = f'{part}\n\nLOG = {str(log)!r}\n{REPORT}'
    (folder / 'plugin_of_tests.py').write_text(text)
    paths = [str(folder), os.environ.get('PYTHONPATH', '')]
    run = subprocess.run(
        [sys.executable, '-m', 'pytest', '-p', 'plugin_of_tests', '-q']
        + ['-W', 'ignore', '-p', 'no:cacheprovider', '-p', 'no:xdist']
        + list(arguments),
        capture_output=True,
        text=True,
        cwd=HERE.parent,
        env=dict(
            os.environ,
            PYTHONPATH=os.pathsep.join(filter(None, paths)),
            MMDBB_ONLY_SEE='',
        ),
    )
    found = dict(collected=[], passed=[], failed=[], text=run.stdout)
    assert log.is_file(), run.stdout + run.stderr
    for line in log.read_text().splitlines():
        outcome, _, name = line.partition(' ')
        found.setdefault(outcome, []).append(name)
    return found


def functions(names, parameter):
    """The tests that have this parameter, without it."""
    found = (re.fullmatch(r'(.*?)\[(.*)\]', name) for name in names)
    return {
        match[1]
        for match in found
        if match and parameter in re.split(r'-(?=[A-Za-z])', match[2])
    }


@pytest.fixture(scope='module')
def wrong(tmp_path_factory):
    """All wrong parts, and the tests that should see them, in one process."""
    tests = 'tests/test_{}'
    return run_pytest(
        tmp_path_factory.mktemp('wrong') / 'plugin',
        WRONG,
        tests.format('blocks/test_properties.py'),
        tests.format('blocks/test_registered.py'),
        tests.format('branches/test_branches.py'),
        tests.format('backbones/test_registered.py'),
        '-k',
        'has_a_row or (TwiceConv and merged) or '
        '(shifted and (merged_convolution or border))',
    )


def outcomes(report, function):
    """How the cases of a test ended: a set of outcomes."""
    return {
        outcome
        for outcome in ('passed', 'failed')
        for name in report[outcome]
        if name.rpartition('::')[2].partition('[')[0] == function
    }


@pytest.mark.parametrize(
    'function',
    [
        'test_block_is_its_merged_convolution',
        'test_inserted_and_merged_into_the_model_again',
        'test_merged_nothing_of_ours_is_left',
        'test_the_stock_network_takes_what_was_merged',
    ],
)
def test_a_block_that_composes_twice_its_kernel_fails(wrong, function):
    assert outcomes(wrong, function) == {'failed'}


@pytest.mark.parametrize('function', ['test_branch_is_its_merged_convolution'])
def test_a_branch_whose_kernel_is_off_its_centre_fails(wrong, function):
    assert outcomes(wrong, function) == {'failed'}
    # 3x3 kernels of all groups, with and without a border.
    assert outcomes(wrong, 'test_border_and_groups') == {'failed'}


def test_a_backbone_without_a_row_fails_and_says_where(wrong):
    assert outcomes(wrong, 'test_every_backbone_has_a_row') == {'failed'}
    message = (
        'no test builds RowlessResNet: add a row to SMALL in '
        'tests/test_backbones/cases.py'
    )
    assert message in wrong['text']


def test_a_right_block_passes_and_is_in_every_test(tmp_path):
    found = run_pytest(
        tmp_path / 'plugin',
        RIGHT,
        'tests/test_blocks',
        'tests/test_backbones/test_repvgg.py',
        'tests/test_plain/test_weights.py',
        '-k',
        'CrossConv and (test_properties or test_registered or test_build'
        ' or test_merged_is_equal) and not float32 and not mmseg',
    )
    assert found['passed'] and not found['failed'], found['text']
    # As many tests as another sum of branches has that none of them names.
    collected = found['collected']
    new = functions(collected, 'CrossConv')
    assert functions(collected, 'ConvBN') <= new
    count = sum('CrossConv' in name for name in collected)
    assert len(new) >= 40 and count > 300
