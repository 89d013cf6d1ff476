# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Build the website with Sphinx, a language after the other."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Dict, List

from mmdbb.errors import UserError
from workshop.site.pages import (
    API,
    LANGUAGES,
    Language,
    api_modules,
    api_page,
    page_of,
    pages_of,
    sections_of,
    toctree,
)


def build_site(root: Path, out: Path) -> List[str]:
    """Build the docs of a checkout; any warning is an error.

    Args:
        root: The checkout.
        out: The website's folder; it is replaced.

    Returns:
        list: The languages built.

    Raises:
        UserError: The folder holds something else, or Sphinx complains.
    """
    if (
        out.exists()
        and any(out.iterdir())
        and not (out / 'genindex.html').exists()
    ):
        raise UserError(f'{out} holds other files than a website')
    shutil.rmtree(out, ignore_errors=True)
    built = []
    for language in LANGUAGES:
        if not pages_of(root, language):
            continue
        with tempfile.TemporaryDirectory() as folder:
            write_sources(root, Path(folder), language)
            run_sphinx(Path(folder), out / language.folder, language)
        built.append(language.code)
    return built


def write_sources(root: Path, folder: Path, language: Language) -> None:
    """Write what Sphinx reads: pages with the website's links, and the API."""
    pages = pages_of(root, language)
    for source, name in pages.items():
        page = page_of(root, source, language)
        text = page.text
        if name == 'index':
            sections = sections_of(list(pages.values()), language)
            menus = [toctree(*section) for section in sections.items()]
            if language.code == 'en':
                there = api_modules()
                for title, modules in API.items():
                    names = [f'api/{m}' for m in modules if m in there]
                    menus.append(toctree(f'API: {title}', names))
            text = '\n'.join([text, *menus])
        (folder / f'{name}.md').write_text(text, encoding='utf-8')
        for path, place in page.files.items():
            target = folder / place
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    if language.code == 'en':
        (folder / 'api').mkdir()
        seen: Dict[int, str] = {}
        for module in api_modules():
            text = api_page(module, seen)
            (folder / 'api' / f'{module}.rst').write_text(text)


def run_sphinx(source: Path, out: Path, language: Language) -> None:
    """Run Sphinx; its warnings end it."""
    command = [sys.executable, '-W', 'ignore', '-m', 'sphinx', '-b', 'html']
    command += ['-q', '-W', '--keep-going', '-j', '1']
    command += ['-c', str(Path(__file__).parent)]
    command += ['-D', f'language={language.code}']
    with tempfile.TemporaryDirectory() as doctrees:
        done = subprocess.run(
            [*command, '-d', doctrees, str(source), str(out)]
        )
    if done.returncode:
        raise UserError(f'Sphinx complains of the docs in {language.code}')
