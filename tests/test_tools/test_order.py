"""Tools check arguments and paths before they import anything heavy."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import process_kept, run_tool

ROOT = Path(__file__).resolve().parents[2]
TOOLS = sorted(path.stem for path in (ROOT / 'tools').glob('*.py'))
#: Tools whose first arguments are files, by name -> these arguments.
OF_FILES = {
    'convert_official': ('in.pth', 'out.pth'),
    'predict': ('config.py', 'in.pth', 'image.png', 'out.png'),
    'prune': ('config.py', 'in.pth', 'out.pth'),
    'quantize': ('config.py', 'in.pth', 'out.onnx'),
    'range_report': ('config.py', 'in.pth'),
    'reparam': ('config.py', 'in.pth', 'out.pth'),
    'report': ('config.py', 'in.pth', 'out.html'),
    'test': ('config.py', 'in.pth'),
    'train': ('config.py',),
}
#: Runs all calls of stdin in one process, and prints what each came to.
RUNNER = """
import contextlib, io, json, runpy, sys
tools, *heavy = sys.argv[1:]
sys.path.insert(0, tools)
for call in json.load(sys.stdin):
    sys.argv = [call[0] + '.py', *call[1:]]
    said, code = io.StringIO(), None
    err, out = contextlib.redirect_stderr, contextlib.redirect_stdout
    try:
        with err(said), out(said):
            runpy.run_path(f'{tools}/{call[0]}.py', run_name='__main__')
    except SystemExit as end:
        code = end.code
    found = [name for name in heavy if name in sys.modules]
    print(json.dumps([call, code, found, said.getvalue()]))
"""
HEAVY = ('torch', 'numpy', 'mmengine', 'mmcv', 'mmdbb', 'workshop')


def results(calls, cwd):
    import json

    run = subprocess.run(
        [sys.executable, '-c', RUNNER, str(ROOT / 'tools'), *HEAVY],
        input=json.dumps(calls),
        capture_output=True,
        text=True,
        cwd=cwd,
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_help_and_refusals_import_nothing(tmp_path):
    """Help, no arguments, missing inputs, existing outputs, wrong endings."""
    for name in ('config.py', 'in.pth', 'image.png'):
        (tmp_path / name).write_text('')
    calls, expected = [[name, '--help'] for name in TOOLS], []
    expected += [(0, 'usage: ')] * len(calls)
    for name, files in OF_FILES.items():
        calls.append([name])
        expected.append((2, 'the following arguments are required'))
        for place, path in enumerate(files):
            if path.startswith('out'):
                continue
            missing = [*files]
            missing[place] = f'no/{path}'
            calls.append([name, *missing])
            expected.append((2, f'no such .*: no/{path}$'))
        if not files[-1].startswith('out'):
            continue
        (tmp_path / files[-1]).write_text('mine')
        calls.append([name, *files])
        expected.append((2, f'output exists: {files[-1]}; choose another'))
        calls.append([name, *files[:-1], 'out.txt'])
        expected.append((2, 'must end in .* got out.txt'))
        calls.append([name, *files[:-1], files[-2], '--force'])
        expected.append((2, f'output {files[-2]} is also an input|must end'))
    reparam = ['reparam', *OF_FILES['reparam'], '--force']
    for options, message in (
        (['--boxes'], '--boxes is not for the format stock'),
        (['--head'], '--head is not for the format stock'),
        (['--head', '--boxes'], 'not allowed with argument'),
        (['--images', 'no.png'], 'no such image: no.png'),
        (['--images', 'https://a/b.png'], 'must be files of this machine'),
    ):
        calls.append([*reparam, *options])
        expected.append((2, message))
    calls.append(['report', *OF_FILES['report'], '--force', '--images', 'no'])
    expected.append((2, 'no such image: no'))
    calls.append(['branches', 'config.py', 'in.pth', '--images', 'http://a'])
    expected.append((2, 'images must be files of this machine, got http://a'))
    predict = ['predict', *OF_FILES['predict'], '--force']
    calls.append([*predict, '--min-score', '30'])
    expected.append((2, "must be a number from 0 to 1, got '30'"))
    calls.append(['train', 'config.py', '--resume', 'no.pth'])
    expected.append((2, 'no such checkpoint to resume from: no.pth'))
    calls.append(['test', 'config.py', 'in.pth', '--out', 'a.json'])
    expected.append((2, r'ends in .pkl or .pickle; got a.json'))
    found = results(calls, tmp_path)
    assert len(found) == len(calls) == len(expected)
    for (call, code, heavy, said), (wanted, message) in zip(found, expected):
        assert (code, heavy) == (wanted, []), (call, said)
        assert re.search(message, said.strip()), (call, said)
        if wanted:
            (line,) = said.splitlines()
            assert line.startswith(f'{call[0]}.py: ')
    for path in tmp_path.glob('out*'):
        assert path.read_text() == 'mine'


def test_choices_are_those_of_the_library():
    """Tools write them down, because they import nothing."""
    import runpy

    from workshop import benchmark
    from workshop.demo.layouts import LAYOUTS
    from workshop.demo.run import TASKS
    from workshop.sweep.packages import PACKAGES
    from workshop.sweep.run import Limits

    from mmdbb.mm.evaluation.images import SPLITS
    from mmdbb.mm.export.formats import FORMATS
    from mmdbb.mm.inference.picture import ENDINGS
    from mmdbb.mm.quantization.onnx_static import METHODS

    def names(tool):
        return runpy.run_path(str(ROOT / f'tools/{tool}.py'))

    assert names('quantize')['SPLITS'] == SPLITS
    assert names('quantize')['METHODS'] == METHODS
    formats = {name: kind.suffix for name, kind in FORMATS.items()}
    assert names('reparam')['FORMATS'] == formats
    mine = names('benchmark')
    assert mine['NETWORKS'] == tuple(benchmark.NETWORKS)
    assert mine['PHASES'] == tuple(benchmark.PHASES)
    assert mine['PRECISIONS'] == tuple(benchmark.PRECISIONS)
    assert names('demo')['TASKS'] == tuple(TASKS)
    assert names('prepare_demo_data')['TASKS'] == tuple(LAYOUTS)
    assert names('sweep')['PACKAGES'] == PACKAGES
    text = (ROOT / 'tools/sweep.py').read_text()
    for value in Limits():
        assert f'default={value}' in text
    for ending in ENDINGS:
        assert f"'{ending}'" in (ROOT / 'tools/predict.py').read_text()


def test_configs_are_named_by_packages(tmp_path, capsys):
    name = 'mmpretrain::resnet/resnet18_8xb32_in1k.py'
    options = '--work-dir', tmp_path / 'work', '--cfg-options'
    data = 'train_dataloader.dataset.data_root=nowhere'
    assert run_tool('train', name, *options, data) == 2
    assert 'data_root names nowhere' in capsys.readouterr().err
    for wrong, message in {
        'mmpretrain::resnet/none.py': 'no such config: mmpretrain::resnet/n',
        'no_package::a.py': 'no such config: no_package::a.py (no_package is ',
    }.items():
        assert run_tool('train', wrong) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'train.py: {message}')


def test_tools_of_plain_torch_need_no_host(tmp_path):
    """Without mmengine, as where only torch is installed."""
    code = (
        'import sys\n'
        f'sys.path.insert(0, {str(ROOT / "tools")!r})\n'
        "sys.modules['mmengine'] = sys.modules['mmcv'] = None\n"
        'from arguments import run\n'
        'from mmdbb.errors import UserError\n'
        'def main(args):\n'
        "    raise UserError('wrong') if args else KeyboardInterrupt\n"
        "sys.argv = ['a.py']\n"
        'run(lambda: {}, main, hosts={})\n'
    )
    for given, hosts, expected in (
        (1, False, (2, 'a.py: wrong\n')),
        (1, True, (2, 'a.py: mmdbb needs mmengine ')),
    ):
        run = subprocess.run(
            [sys.executable, '-c', code.format(given, hosts)],
            capture_output=True,
            text=True,
            cwd=tmp_path,
        )
        assert run.returncode == expected[0], run.stderr
        assert run.stderr.startswith(expected[1])


@pytest.mark.parametrize('text', ['a=[1,2', 'a', '.b=1'])
def test_options_of_another_form(text, tmp_path, capsys):
    config = tmp_path / 'config.py'
    config.write_text('a = 1\n')
    assert run_tool('train', config, '--cfg-options', text) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert line.startswith('train.py: --cfg-options')


def test_what_a_tool_sets_for_its_process_ends_with_it():
    """The tests share one; a log that stays off fails others by order."""
    before = torch.get_num_threads(), logging.root.manager.disable
    with pytest.raises(SystemExit), process_kept():
        torch.set_num_threads(before[0] + 1)
        logging.disable(logging.CRITICAL)
        raise SystemExit(2)
    assert (torch.get_num_threads(), logging.root.manager.disable) == before
    assert logging.getLogger('mmdbb').isEnabledFor(logging.ERROR)
