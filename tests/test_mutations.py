"""The table of mutations fits the code, and its runner tells survivors."""

import ast
import functools
import textwrap
from pathlib import Path

import pytest
from mutations import ROOT, TABLE, Mutation, broken, run_all

#: Where a wrong line makes wrong numbers.
LOWER_STOREY = (
    'geometry',
    'transforms',
    'kernels',
    'branches',
    'blocks',
    'tracing',
    'reparam',
    'insert',
    'recompute',
    'modules',
)


@functools.cache
def names_in(path):
    return {
        node.name
        for node in ast.parse((ROOT / path).read_text()).body
        if isinstance(node, ast.FunctionDef)
    }


@pytest.mark.parametrize('row', TABLE, ids=lambda r: f'{r.path}: {r.breaks}')
def test_the_table_fits_the_code(row):
    before = ast.parse((ROOT / row.path).read_text())
    after = ast.parse(broken(row))
    assert ast.dump(after) != ast.dump(before), 'it breaks nothing'
    for name in row.tests:
        path, _, test = name.partition('::')
        assert (ROOT / path).exists(), name
        assert not test or test.partition('[')[0] in names_in(path), name


def test_the_table_reaches_all_that_computes():
    assert len(set(TABLE)) == len(TABLE) > 30
    reached = {Path(row.path).with_suffix('').parts[1] for row in TABLE}
    assert set(LOWER_STOREY) <= reached


def test_the_runner_tells_what_survives(tmp_path, capsys):
    root = tmp_path / 'project'
    (root / 'tiny').mkdir(parents=True)
    (root / 'tests').mkdir()
    source = 'def half(x):\n    return abs(x) / 2\n'
    (root / 'tiny' / '__init__.py').write_text(source)
    (root / 'tests' / 'test_tiny.py').write_text(
        textwrap.dedent("""\
            from tiny import half


            def test_half():
                assert half(4) == 2


            def test_nothing():
                assert half(0) == 0
            """)
    )

    def row(text, replacement):
        tests = ('tests/test_tiny.py::test_half',)
        return Mutation('tiny/__init__.py', text, replacement, 'half', tests)

    found = {
        'killed: ': row('/ 2', '/ 3'),
        'SURVIVED: ': row('abs(x)', 'x'),
        "tiny/__init__.py: 'x' stands there 2 times": row('x', 'y'),
        'no test ran: exit code ': row('return abs', 'return return abs'),
    }
    assert run_all(tuple(found.values()), root, 'tiny') == 3
    printed = capsys.readouterr().out
    for verdict in found:
        assert printed.count(f'\n{verdict}') + printed.startswith(verdict) == 1
    assert printed.endswith('1 of 4 killed\n')
    assert (root / 'tiny' / '__init__.py').read_text() == source
    # A test that fails anyway kills nothing.
    (root / 'tests' / 'test_tiny.py').write_text('def test_half(): assert 0')
    assert run_all((row('/ 2', '/ 3'),), root, 'tiny') == 1
    assert 'fails without any mutation' in capsys.readouterr().out
