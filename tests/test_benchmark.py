"""The benchmark measures what it says, on networks made small by images."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mmdbb import benchmark

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


def test_kept_megabytes_exact():
    x = torch.zeros(1000, 250, requires_grad=True)
    assert benchmark.kept_megabytes(lambda: x.exp().exp()) == 2
    y = x.exp()
    # Both factors are kept, and share one storage.
    assert benchmark.kept_megabytes(lambda: y * y) == 1


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
    wrong = subprocess.run(
        [*command, '--block', 'Conv2d'], capture_output=True, text=True
    )
    assert wrong.returncode == 2 and 'allowed are' in wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
