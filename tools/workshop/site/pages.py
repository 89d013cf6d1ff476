# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which page stands where in the website, and what its links become.

The pages are written for a checkout, where README.md stands above docs/. In
the website all of a language stand in one folder. A page of docs/ that no
section names gets its place under the last title, so that none is lost.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Dict, List, NamedTuple

#: Title -> pages of docs/, in the order of the menu; those not written yet
#: are passed over. Each language has titles of its own.
SECTIONS = {
    'Start': ('tour', 'get_started', 'own_data', 'faq'),
    'Blocks in a network': (
        'any_config',
        'plain_pytorch',
        'any_model',
        'yolo',
        'dimensions',
        'large_kernels',
        'choosing_blocks',
        'hosts',
        'plain_weights',
        'official_files',
        'repoptimizer',
        'modes',
    ),
    'Deploy': (
        'inference',
        'deploy',
        'deploy_formats',
        'quantization',
        'pruning',
        'report',
    ),
    'Results': ('model_zoo', 'papers', 'recipes', 'benchmarks', 'study'),
    'How it works': ('transformations', 'deviations', 'files', 'design'),
    'Take part': (
        'contributing',
        'security',
        'add_a_branch',
        'add_a_block',
        'add_a_backbone',
        'changelog',
    ),
}
REST = 'More'
CHINESE = {
    'Start': '开始使用',
    'Blocks in a network': '在网络中使用',
    'Deploy': '部署',
    'Results': '结果',
    'How it works': '原理',
    'Take part': '参与开发',
    REST: '更多',
}
#: Title -> modules whose docstrings are a page. `tests/test_site.py` compares
#: them with the public faces.
API = {
    'Blocks and models': (
        'mmdbb',
        'mmdbb.insert',
        'mmdbb.reparam',
        'mmdbb.repopt',
        'mmdbb.shares',
        'mmdbb.yolo',
    ),
    'With OpenMMLab': (
        'mmdbb.backbones',
        'mmdbb.deploy',
        'mmdbb.export',
        'mmdbb.quantize',
        'mmdbb.prune',
        'mmdbb.report',
        'mmdbb.mm.hosts',
    ),
    'Parts of your own': (
        'mmdbb.dimensions',
        'mmdbb.geometry',
        'mmdbb.transforms',
        'mmdbb.registry',
        'mmdbb.blocks',
        'mmdbb.blocks.base',
        'mmdbb.blocks.branch_sum',
        'mmdbb.blocks.build',
        'mmdbb.branches',
        'mmdbb.branches.base',
        'mmdbb.branches.norm',
        'mmdbb.kernels',
        'mmdbb.errors',
    ),
}

FENCE = re.compile(r'^```.*?^```$', re.MULTILINE | re.DOTALL)
LINK = re.compile(r'(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)')


class Language(NamedTuple):
    """A language of the docs.

    Attributes:
        code: As Sphinx names it.
        folder: Where it stands in the website.
        readme: Its README, relative to the checkout.
        docs: Its folder of pages.
    """

    code: str
    folder: str
    readme: str
    docs: str


LANGUAGES = (
    Language('en', '', 'README.md', 'docs'),
    Language('zh_CN', 'zh_cn', 'README_zh-CN.md', 'docs/zh_cn'),
)


def pages_of(root: Path, language: Language) -> Dict[Path, str]:
    """Files of the pages of a language -> their names in the website."""
    readme = root / language.readme
    if not readme.is_file():
        return {}
    found = {readme: 'index'}
    if language.code == 'en':
        for name in ('CONTRIBUTING', 'SECURITY'):
            found[root / f'{name}.md'] = name.lower()
    for path in sorted((root / language.docs).glob('*.md')):
        found[path] = path.stem
    return found


def sections_of(names: List[str], language: Language) -> Dict[str, List[str]]:
    """Titles of the menu -> names of pages; each page stands in one.

    Args:
        names: All pages of the language.
        language: Decides the titles.
    """
    left = [name for name in names if name != 'index']
    found = {}
    for title, listed in SECTIONS.items():
        found[title] = [name for name in listed if name in left]
        left = [name for name in left if name not in listed]
    found[REST] = left
    titles = CHINESE if language.code == 'zh_CN' else {}
    return {titles.get(t, t): pages for t, pages in found.items() if pages}


class Page(NamedTuple):
    """A page as the website has it.

    Attributes:
        text: Its Markdown.
        files: Files of the checkout that it shows or links to -> where they
            stand beside it.
    """

    text: str
    files: Dict[Path, str]


def page_of(root: Path, source: Path, language: Language) -> Page:
    """Read a page, with links that hold in the website.

    Links to pages lead to pages, pictures and files come along, and of a link
    to a folder the text stays.

    Args:
        root: The checkout.
        source: The page's file.
        language: Its language.
    """
    places = {
        path.resolve(): (other, name)
        for other in LANGUAGES
        for path, name in pages_of(root, other).items()
    }
    files: Dict[Path, str] = {}

    def changed(match) -> str:
        picture, text, target = match.groups()
        text = LINK.sub(changed, text)  # a badge: a picture in a link
        if '://' in target or target.startswith(('#', 'mailto:')):
            return f'{picture}[{text}]({target})'
        path, _, anchor = target.partition('#')
        path = (source.parent / path).resolve()
        if path in places:
            target = _link(*places[path], language, anchor)
            return f'[{text}]({target})'
        if not path.is_file():
            return text
        files[path] = f'files/{path.relative_to(root.resolve()).as_posix()}'
        return f'{picture}[{text}]({files[path]})'

    # Text between fences changes, fences stay.
    written = source.read_text(encoding='utf-8')
    parts, last = [], 0
    for fence in FENCE.finditer(written):
        parts += [LINK.sub(changed, written[last : fence.start()]), fence[0]]
        last = fence.end()
    parts.append(LINK.sub(changed, written[last:]))
    return Page(''.join(parts), files)


def _link(other: Language, name: str, language: Language, anchor: str) -> str:
    anchor = f'#{anchor}' if anchor else ''
    if other == language:
        return f'{name}.md{anchor}'
    # Another language is another build, of which only the address is known.
    target = Path(other.folder or '.', f'{name}.html').as_posix()
    path = os.path.relpath(target, language.folder or '.')
    return f'other:{path}{anchor}'  # a scheme of conf.py's


def toctree(title: str, names: List[str]) -> str:
    """A section of the menu, as MyST writes it."""
    listed = '\n'.join(names)
    return f'```{{toctree}}\n:hidden:\n:caption: {title}\n\n{listed}\n```\n'


def api_modules() -> List[str]:
    """Modules with a page of the API, in order; those that are there."""
    return [
        module
        for modules in API.values()
        for module in modules
        if importlib.util.find_spec(module) is not None
    ]


def api_page(module: str, seen: Dict[int, str]) -> str:
    """The reStructuredText of a module's page.

    Args:
        module: Its name; it is imported.
        seen: Ids of the objects that earlier pages describe -> their names;
            this page's are added.
    """
    found = importlib.import_module(module)
    again = []
    for name in getattr(found, '__all__', ()):
        value = getattr(found, name)
        if isinstance(value, str):
            continue
        if id(value) in seen:
            again.append(name)
        seen.setdefault(id(value), f'{module}.{name}')
    text = f'{module}\n{"=" * len(module)}\n\n.. automodule:: {module}\n'
    text += '   :members:\n'
    if again:
        text += f'   :exclude-members: {", ".join(again)}\n\n'
        names = (seen[id(getattr(found, name))] for name in again)
        listed = ', '.join(f':py:obj:`{name}`' for name in names)
        text += f'It also passes on: {listed}.\n'
    return text
