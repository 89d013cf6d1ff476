# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The Chinese pages say what the English ones say: same code, same links.

`test_docs.py` runs the snippets of the English pages. A Chinese page holds
the same snippets, letter by letter, so they need not run twice.
"""

import re

import pytest
from test_docs import FENCE, LINK, ROOT, anchors_of, blocks_of

CHINESE = ROOT / 'docs' / 'zh_cn'
PAGES = {
    ROOT / 'README_zh-CN.md': ROOT / 'README.md',
    **{
        page: ROOT / 'docs' / page.name
        for page in sorted(CHINESE.glob('*.md'))
    },
}
#: What a reader needs from the first look to a deployed network.
NEEDED = (
    'get_started',
    'any_config',
    'plain_pytorch',
    'any_model',
    'yolo',
    'own_data',
    'deploy',
    'quantization',
    'faq',
)
HEADING = re.compile(r'^(#+) ', re.MULTILINE)
ROW = re.compile(r'^\|', re.MULTILINE)
HAN = re.compile(r'[\u4e00-\u9fff]')

for_pages = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def text_of(page):
    """A page without its code."""
    return FENCE.sub('', page.read_text(encoding='utf-8'))


def test_pages_are_there():
    assert {page.stem for page in PAGES} >= {'README_zh-CN', *NEEDED}


@for_pages
def test_code_is_that_of_the_english_page(page):
    here, there = (
        [(block.info, block.text) for block in blocks_of(each)]
        for each in (page, PAGES[page])
    )
    assert here == there


@for_pages
def test_links_are_those_of_the_english_page(page):
    chinese = {
        path.resolve(): english.resolve() for path, english in PAGES.items()
    }

    def targets(each):
        for link in LINK.findall(text_of(each)):
            if '://' in link:
                yield link
                continue
            path, _, anchor = link.partition('#')
            target = (each.parent / path).resolve() if path else each.resolve()
            assert target.exists(), link
            if anchor:
                assert anchor in anchors_of(target), link
            english = chinese.get(target, target)
            if english == itself:  # within the page, or to the other language
                continue
            translated = target in chinese.values()
            assert not (each in PAGES and translated), (
                f'{link}: link to the Chinese page'
            )
            yield str(english.relative_to(ROOT))

    itself = PAGES[page].resolve()
    here, there = (sorted(targets(each)) for each in (page, PAGES[page]))
    assert here == there


@for_pages
def test_shape_is_that_of_the_english_page(page):
    """As many sections and rows of tables, so none was forgotten."""
    for pattern in (HEADING, ROW):
        here, there = (
            pattern.findall(text_of(each)) for each in (page, PAGES[page])
        )
        assert here == there


@for_pages
def test_page_is_chinese(page):
    paragraphs = [
        part
        for part in text_of(page).split('\n\n')
        if len(part) > 60 and not part.startswith(('|', '!', '<', '$'))
    ]
    assert paragraphs
    for paragraph in paragraphs:
        assert HAN.search(paragraph), paragraph[:60]


@for_pages
def test_files_named_in_text_exist(page):
    folders = 'mmdbb|tools|configs|tests|docs|requirements'
    for path in re.findall(rf'`((?:{folders})/[\w./-]+)`', text_of(page)):
        assert (ROOT / path).exists(), path
