"""The benchmark measures what it says, on networks made small by images."""

import json
import subprocess
import sys
from argparse import ArgumentTypeError
from pathlib import Path

import pytest
import torch
from arguments import at_least_one
from helpers import distance, randomize, run_tool
from workshop import benchmark
from workshop.benchmark import papers

from mmdbb import DBB
from mmdbb.kernels import ComposedKernel

TOOL = Path(__file__).resolve().parents[1] / 'tools/benchmark.py'


@pytest.mark.parametrize('phase', benchmark.PHASES)
def test_phases(phase):
    rows = benchmark.run_phase(
        phase, 'resnet18', 'DBB', torch.randn(2, 3, 32, 32), repeats=1
    )
    variants = {row.variant: row for row in rows}
    expected = dict(
        deploy={'plain', 'merged', 'fused'},
        merge={'group by group', 'default'},
    ).get(phase, {'plain', 'literal', 'default'})
    assert set(variants) == expected
    for row in rows:
        assert 0 < row.time.fastest <= row.time.median <= row.time.slowest
        assert (row.kept_mb is not None) == (phase in ('train', 'frozen'))
    if phase == 'train':
        kept = {name: row.kept_mb for name, row in variants.items()}
        assert kept['plain'] < min(kept['default'], kept['literal'])
        assert all(row.peak_mb > 0 for row in rows)


@pytest.mark.parametrize('network', ['resnet18', 'repvgg-a0'])
def test_the_papers_way_is_the_same_function(network):
    block = 'OREPA' if network == 'resnet18' else 'OREPARepVGG'
    torch.manual_seed(0)
    model = benchmark.NETWORKS[network][1](dict(type=block)).double()
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    expected = model(x)[0]
    composed = []
    with benchmark.papers_way(model):
        found = model(x)[0]
        for module in model.modules():
            if isinstance(module, ComposedKernel):
                composed.append('compose' in vars(module))
    assert sum(composed) >= 16
    assert distance(found, expected) < 1e-9
    assert not any('compose' in vars(m) for m in model.modules())


def test_the_papers_merge_is_the_same():
    torch.manual_seed(0)
    block = randomize(DBB(8, 8, 3, groups=4).double())
    expected = block.get_equivalent_kernel_bias()
    for found, want in zip(papers.merged_block(block), expected):
        assert distance(found, want) < 1e-12


def test_composing_bound():
    """A ResNet-18's kernels cost alike whatever the images are."""
    images = torch.randn(1, 3, 64, 64)
    one = benchmark.composing_bound('resnet18', 'OREPA', images)
    images = torch.randn(2, 3, 64, 64)
    two = benchmark.composing_bound('resnet18', 'OREPA', images)
    assert one > 2 and abs((one - 1) / (two - 1) - 2) < 1e-6
    assert benchmark.composing_bound('resnet18', 'DBB', images) == 1


@pytest.mark.parametrize('block', ['DBB', 'OREPA'])
def test_growth(block, monkeypatch):
    monkeypatch.setattr(
        sys.modules['workshop.benchmark.growth'], 'AXES', dict(width=(8, 16))
    )
    monkeypatch.setattr(
        sys.modules['workshop.benchmark.growth'],
        'BASE',
        dict(batch=2, width=8, resolution=6),
    )
    points = list(benchmark.growth(block, torch.device('cpu'), 1))
    assert {(p.value, p.variant) for p in points} == {
        (width, variant)
        for width in (8, 16)
        for variant in ('plain', 'literal', 'default')
    }


def test_kept_megabytes_exact():
    x = torch.zeros(1000, 250, requires_grad=True)
    assert benchmark.kept_megabytes(lambda: x.exp().exp()) == 2
    y = x.exp()
    # Both factors are kept, and share one storage.
    assert benchmark.kept_megabytes(lambda: y * y) == 1


def test_imports():
    run = subprocess.run(
        [sys.executable, '-W', 'ignore', TOOL, '--import', '--repeats', '1'],
        capture_output=True,
        text=True,
        check=True,
    )
    assert 'without hosts' in run.stdout
    assert 'beyond it' in run.stdout


def test_large_kernels(capsys):
    options = ('--kernels', 3, 7, '--block', 'LargeKernelConv')
    more = ('--batch', 1, '--repeats', 1)
    assert run_tool('benchmark', *options, *more) == 0
    printed = capsys.readouterr().out
    for word in ('3x3', '7x7', 'plain', 'literal', 'default'):
        assert word in printed


def test_command(tmp_path):
    out = tmp_path / 'rows.json'
    command = [sys.executable, '-W', 'ignore', TOOL, '--network', 'mobilenet']
    options = ['--phase', 'eval', '--batch', '1', '--repeats', '1']
    options += ['--image-size', '32', '32', '--out', str(out)]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, check=True
    )
    assert 'literal' in done.stdout
    report = json.loads(out.read_text())
    assert [row['variant'] for row in report['rows']] == [
        'plain',
        'literal',
        'default',
    ]
    forced = subprocess.run([*command, *options, '--force'])
    assert forced.returncode == 0
    wrong = subprocess.run(
        [*command, '--block', 'Conv2d'], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and 'allowed are' in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1


@pytest.mark.parametrize('text', ['0', '-1', 'many', '1.5'])
def test_numbers_of_things(text):
    with pytest.raises(ArgumentTypeError, match='whole number from 1 on'):
        at_least_one(text)
    assert at_least_one('3') == 3
