# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The docs say what is true: snippets run, links and commands exist.

The ```python blocks of a page run in their order in one namespace. Where a
line reads `print(...)  # text`, the text must be what it prints. A block
that no test can run is marked ```python no-run, and those are few. A block
marked ```python config is loaded as a config, and its model is built.
"""

import contextlib
import io
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import List, NamedTuple

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from torch import nn

from mmdbb.mm.deploy.load import build_model
from mmdbb.registry import BLOCKS, BRANCHES
from mmdbb.reparam import find_blocks

ROOT = Path(__file__).resolve().parent.parent
PAGES = [*sorted(ROOT.glob('*.md')), *sorted((ROOT / 'docs').glob('*.md'))]
SHELL = ('bash', 'sh', 'shell')
INFO = ('python', 'python config', 'python no-run', 'text', 'bibtex', *SHELL)

#: Pages whose snippets need a package that these tests do without -> where
#: they run instead.
ELSEWHERE = {'yolo.md': 'test_yolo/test_training.py'}

FENCE = re.compile(r'^```(.*?)\n(.*?)^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'!?\[[^\]]*\]\(([^)\s]+)\)')
PRINTED = re.compile(r'^print\(.*\)  # (.*)$', re.MULTILINE)


class Block(NamedTuple):
    info: str
    text: str
    line: int


def blocks_of(page: Path, *infos: str) -> List[Block]:
    text = page.read_text(encoding='utf-8')
    found = [
        Block(m[1].strip(), m[2], text.count('\n', 0, m.start()) + 1)
        for m in FENCE.finditer(text)
    ]
    return [block for block in found if not infos or block.info in infos]


def anchors_of(page: Path) -> set:
    """The anchors that GitHub gives a page's headings."""
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    headings = re.findall(r'^#+ (.*)$', text, re.MULTILINE)
    return {
        re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-')
        for heading in headings
    }


def for_pages(*infos: str):
    pages = [page for page in PAGES if not infos or blocks_of(page, *infos)]
    return pytest.mark.parametrize('page', pages, ids=lambda p: p.name)


@pytest.fixture
def registries():
    """What a page registers is gone after it."""
    changed = (BLOCKS, BRANCHES, MODELS)
    before = [dict(registry.module_dict) for registry in changed]
    yield
    for registry, modules in zip(changed, before):
        registry.module_dict.clear()
        registry.module_dict.update(modules)
    # The packages fill theirs when they are first asked: that has to stay.
    pages = {page.stem for page in PAGES}
    for registry in MODELS.children.values():
        for name, kind in list(registry.module_dict.items()):
            if kind.__module__ in pages:
                del registry.module_dict[name]


@for_pages('python')
@pytest.mark.usefixtures('quiet')  # mmengine logs to stdout
def test_snippets_run(page, registries, monkeypatch):
    if page.name in ELSEWHERE:
        pytest.skip(f'{ELSEWHERE[page.name]} runs them')
    monkeypatch.chdir(ROOT)
    torch.manual_seed(0)
    run_snippets(page)


def run_snippets(page):
    """Run a page's snippets, and compare what they print."""
    namespace = {'__name__': page.stem}
    for block in blocks_of(page, 'python'):
        source = '\n' * block.line + block.text  # right lines in tracebacks
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(source, str(page), 'exec'), namespace)
        expected = PRINTED.findall(block.text)
        if expected:
            assert printed.getvalue().splitlines() == expected
    return namespace


def test_pages_that_run_elsewhere_do():
    for page, file in ELSEWHERE.items():
        assert f"'{page}'" in (ROOT / 'tests' / file).read_text()


@for_pages('python config')
def test_configs_build(page, tmp_path, monkeypatch):
    # Structures matter here, random weights take long.
    monkeypatch.setattr(nn.Conv2d, 'reset_parameters', lambda self: None)
    for number, block in enumerate(blocks_of(page, 'python config')):
        file = tmp_path / f'config{number}.py'
        file.write_text(block.text)
        config = Config.fromfile(file)
        blocks = find_blocks(build_model(config))
        assert blocks, f'line {block.line}'


@for_pages()
def test_fences_are_known(page):
    for block in blocks_of(page):
        assert block.info in INFO, f'line {block.line}: {block.info!r}'


def test_few_snippets_do_not_run():
    runs = [b for page in PAGES for b in blocks_of(page, 'python')]
    not_run = [b for page in PAGES for b in blocks_of(page, 'python no-run')]
    assert len(not_run) <= len(runs) / 10
    for block in not_run:
        compile(block.text, 'no-run', 'exec')


@for_pages()
def test_links_exist(page):
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    links = [link for link in LINK.findall(text) if '://' not in link]
    for link in links:
        path, _, anchor = link.partition('#')
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors_of(target), link


@for_pages()
def test_files_named_in_text_exist(page):
    text = FENCE.sub('', page.read_text(encoding='utf-8'))
    folders = 'mmdbb|tools|configs|tests|docs|requirements'
    for path in re.findall(rf'`((?:{folders})/[\w./-]+)`', text):
        assert (ROOT / path).exists(), path


@for_pages(*SHELL)
def test_commands_exist(page):
    targets = re.findall(
        r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.MULTILINE
    )
    for block in blocks_of(page, *SHELL):
        for path in re.findall(
            r'(?<![\w/])((?:tools|configs|requirements|docs)/[\w./-]+)',
            block.text,
        ):
            assert (ROOT / path).exists(), f'line {block.line}: {path}'
        for target in re.findall(r'^make ([\w-]+)', block.text, re.MULTILINE):
            assert target in targets, f'line {block.line}: make {target}'


@pytest.mark.parametrize('name', ['deviations', 'recipes'])
def test_deviations_name_their_tests(name):
    page = ROOT / 'docs' / f'{name}.md'
    named = re.findall(r'`(test_[\w/]+\.py)::(\w+)`', page.read_text())
    assert named
    for path, name in named:
        file = ROOT / 'tests' / path
        assert file.exists(), path
        assert f'def {name}(' in file.read_text(), f'{path}::{name}'


def test_every_deviation_has_a_test():
    page = ROOT / 'docs' / 'deviations.md'
    rows = [
        row
        for row in page.read_text().splitlines()
        if row.startswith('| ') and not row.startswith('| What')
    ]
    assert rows
    for row in rows:
        assert '::' in row.split('|')[-2], row


def test_figure_is_what_its_script_draws(tmp_path):
    pytest.importorskip('matplotlib')
    script = ROOT / 'docs' / 'figures' / 'block.py'
    figure = runpy.run_path(str(script))['main'](tmp_path / 'block.svg')
    assert figure.stat().st_size < 150_000
    assert (script.parent / 'block.svg').stat().st_size < 150_000


def test_tour_prints_what_its_page_shows():
    script = ROOT / 'docs' / 'tour.py'
    run = subprocess.run(
        [sys.executable, script], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    (shown,) = blocks_of(script.with_suffix('.md'), 'text')
    found, expected = (
        re.sub(r'[\d.]+(e[-+]\d+|%)?', '#', text).split()
        for text in (run.stdout, shown.text)
    )
    assert found == expected  # numbers depend on the machine
    text = script.read_text()
    assert len(text.splitlines()) <= 120
    imported = re.findall(r'^(?:import|from) (\w+)', text, re.MULTILINE)
    assert set(imported) == {'torch', 'mmdbb'}
