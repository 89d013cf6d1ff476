"""The docs' website: every page has its place, every link leads somewhere."""

from pathlib import Path

import pytest
from test_public import PUBLIC
from workshop.site import pages

ROOT = Path(__file__).resolve().parents[1]
ENGLISH, CHINESE = pages.LANGUAGES


@pytest.mark.parametrize('language', pages.LANGUAGES, ids=lambda x: x.code)
def test_menu_lists_every_page_once(language):
    names = list(pages.pages_of(ROOT, language).values())
    if not names:
        pytest.skip('no README in this language')
    sections = pages.sections_of(names, language)
    listed = [name for listed in sections.values() for name in listed]
    assert sorted(listed) == sorted(set(names) - {'index'})
    assert all(sections.values())


def test_pages_that_no_section_names_come_last():
    sections = pages.sections_of(['index', 'new', 'faq'], ENGLISH)
    assert sections == {'Start': ['faq'], pages.REST: ['new']}


def test_english_pages_have_a_section():
    names = list(pages.pages_of(ROOT, ENGLISH).values())
    rest = pages.sections_of(names, ENGLISH).get(pages.REST, [])
    assert not rest, (
        f'name {rest} in SECTIONS of tools/workshop/site/pages.py, where a '
        'reader would look for them'
    )


def test_api_has_every_public_module():
    listed = pages.api_modules()
    assert len(listed) == len(set(listed))
    assert set(listed) == {'mmdbb', *PUBLIC}, 'see API in site/pages.py'


def small_checkout(folder):
    """Two pages in each language, a picture, a file, a folder."""
    files = {
        'README.md': 'see [faq](docs/faq.md#why) and '
        '[code](configs/a.py), [all](configs), [zh](README_zh-CN.md)\n'
        '![block](docs/figures/b.svg)\n'
        '[![badge](https://x.invalid/b)](LICENSE) [web](https://y.invalid)\n'
        '```python\nx = [1](docs/faq.md)\n```\n',
        'docs/faq.md': '# Why\n[back](../README.md), [here](#why), '
        '[zh](zh_cn/faq.md)\n',
        'docs/figures/b.svg': '<svg/>',
        'docs/zh_cn/faq.md': '[en](../faq.md#why) '
        '[首页](../../README_zh-CN.md)',
        'README_zh-CN.md': '[faq](docs/zh_cn/faq.md)',
        'configs/a.py': '',
        'LICENSE': '',
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding='utf-8')
    return folder


def test_links_of_a_readme(tmp_path):
    root = small_checkout(tmp_path)
    page = pages.page_of(root, root / 'README.md', ENGLISH)
    assert page.text.splitlines() == [
        'see [faq](faq.md#why) and [code](files/configs/a.py), all, '
        '[zh](other:zh_cn/index.html)',
        '![block](files/docs/figures/b.svg)',
        '[![badge](https://x.invalid/b)](files/LICENSE) '
        '[web](https://y.invalid)',
        '```python',
        'x = [1](docs/faq.md)',
        '```',
    ]
    assert set(page.files) == {
        root / 'configs/a.py',
        root / 'docs/figures/b.svg',
        root / 'LICENSE',
    }


def test_links_between_languages(tmp_path):
    root = small_checkout(tmp_path)
    page = pages.page_of(root, root / 'docs/zh_cn/faq.md', CHINESE)
    assert page.text == '[en](other:../faq.html#why) [首页](index.md)'
    page = pages.page_of(root, root / 'docs/faq.md', ENGLISH)
    assert page.text.splitlines()[1] == (
        '[back](index.md), [here](#why), [zh](other:zh_cn/faq.html)'
    )


def test_api_describes_an_object_once():
    seen = {}
    first = pages.api_page('mmdbb', seen)
    again = pages.api_page('mmdbb.reparam', seen)
    assert ':exclude-members:' not in first
    assert ':exclude-members: reparameterize' in again
    assert ':py:obj:`mmdbb.reparameterize`' in again
    assert 'find_blocks' not in again  # described here
