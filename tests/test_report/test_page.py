"""The page: well-formed, of one file, safe, and quick with many layers."""

import io
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from test_report.cases import small_network, some_images

from mmdbb import DBB
from mmdbb.errors import UserError
from mmdbb.report import (
    ReportOptions,
    network_report,
    page,
    write_report,
)
from mmdbb.report.pictures import filters_picture, kernel_picture, png

#: Elements that are never closed.
VOID = ('meta', 'img', 'input', 'wbr', 'br', 'link')


class Reader(HTMLParser):
    """Reads a page, and raises if an element is not closed in order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.texts = [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f'not closed: {self.open}'

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names), f'{tag}: {names}'
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ('script', 'style'):
            self.texts.append(data)

    def all(self, tag):
        return [attrs for name, attrs in self.elements if name == tag]


@pytest.fixture(scope='module')
def report():
    score = ReportOptions(
        title='Tiny & <small>',
        facts={'Config': 'a<b>.py'},
        evaluate=lambda network: 98.25,
        metric='accuracy (%)',
    )
    return network_report(small_network(), some_images(), score)


@pytest.fixture(scope='module')
def read(report):
    return Reader(page(report))


def test_names_are_escaped(read):
    text = ' '.join(read.texts)
    assert 'Tiny & <small>' in text and 'a<b>.py' in text
    assert not read.all('small') and not read.all('b>.py')


def test_nothing_is_fetched(report, read):
    text = page(report)
    assert not re.search(r'https?://|url\(|@import|srcset', text)
    assert not read.all('link')
    for attrs in (a for _, a in read.elements):
        assert 'src' not in attrs or attrs['src'].startswith('data:image/png')
        assert attrs.get('href', '#').startswith('#')
        assert not [name for name in attrs if name.startswith('on')]
    (policy,) = [m['content'] for m in read.all('meta') if 'http-equiv' in m]
    assert policy.startswith("default-src 'none'")


def test_links_lead_to_places(read):
    places = [a['id'] for _, a in read.elements if 'id' in a]
    assert len(places) == len(set(places))
    links = {a['href'][1:] for a in read.all('a')}
    assert links <= {*places}
    assert {f'layer-{i}' for i in (1, 2, 3, 4)} <= links


def test_it_can_be_heard(read):
    assert read.all('html')[0]['lang'] == 'en'
    pictures = read.all('img')
    assert len(pictures) > 20 and all(p['alt'] for p in pictures)
    labels = {label['for'] for label in read.all('label')}
    assert {field['id'] for field in read.all('input')} <= labels
    assert len(read.all('caption')) == len(read.all('table')) > 5
    assert all(head.get('scope') for head in read.all('th'))
    for tag, attrs in read.elements:
        if attrs.get('role') in ('img', 'region'):
            assert attrs['aria-label'], tag
    levels = [int(t[1]) for t, _ in read.elements if re.match(r'h\d$', t)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(levels, levels[1:]))


def test_figures_are_in_the_page(report, read):
    text = ' '.join(' '.join(read.texts).split())
    for expected in (
        '✓ proven',
        'accuracy (%)',
        '98.25',
        '3×3, 3→8',
        '3×5, 4→4',
        'stride 2',
        '2 groups',
        'Outputs are those on 3 images.',
    ):
        assert expected in text, expected
    branch = report.layers[0].branches['1x1']
    assert f'{100 * branch.projection:.1f} %' in text
    assert f'{100 * branch.lost.network:.2f} %' in text
    rows = [a for t, a in read.elements if t == 'tr' and 'data-layer' in a]
    assert [row['data-layer'] for row in rows] == ['0', '3', '5', '7']


def test_a_page_without_images_or_score():
    text = page(network_report(DBB(3, 4, 3)))
    read = Reader(text)
    shown = ' '.join(' '.join(read.texts).split())
    assert 'The network was not run on images.' in shown
    assert 'without it' not in shown.partition('What the words mean')[0]
    assert 'nan' not in shown.lower()


def test_a_kernel_of_zeros():
    """As a residual's last block starts where gammas start at zero."""
    network = small_network()
    network[0].init_gamma(0.0)
    found = network_report(network, some_images())
    (zeros, *others) = found.layers
    assert all(b.angle is None for b in zeros.branches.values())
    assert 0 < found.kinds['kxk'].projection < 1  # of the other layers
    shown = ' '.join(Reader(page(found)).texts).lower()
    assert 'nan' not in shown and 'dead' in shown
    alone = network_report(network[0])
    assert 'nan' not in ' '.join(Reader(page(alone)).texts).lower()


def test_a_hundred_layers(report):
    layers = [
        layer._replace(name=f'backbone.layer{i}.{layer.name}')
        for i in range(25)
        for layer in report.layers
    ]
    start = time.process_time()
    text = page(report._replace(layers=layers))
    assert time.process_time() - start < 3
    assert len(text) < 2_000_000
    assert len(Reader(text).all('details')) == 100


def test_hostile_names(report):
    name = '"><script>alert(1)</script>'
    (layer, *_) = report.layers
    branches = {name: layer.branches['kxk']}
    layers = [layer._replace(name=name, kind=name, branches=branches)]
    kinds = {name: report.kinds['kxk']._replace(weakest=(0.1, name))}
    proof = report.proof._replace(outputs={name: 0.0}, left_out={name: name})
    text = page(
        report._replace(
            title=name,
            facts={name: name},
            layers=layers,
            kinds=kinds,
            proof=proof,
            metric=name,
        )
    )
    assert len(Reader(text).all('script')) == 1
    assert '<script>alert' not in text


def pixels_of(picture):
    import base64

    data = re.search(r'base64,([^"]*)"', picture)[1]
    return np.array(Image.open(io.BytesIO(base64.b64decode(data))))


def test_pictures_have_the_kernels_pixels():
    pixels = torch.arange(2 * 3 * 4.0).reshape(2, 3, 4)
    found = np.array(Image.open(io.BytesIO(png(pixels))))
    assert (found == pixels.numpy()).all()
    taps = torch.tensor([[0.0, 1.0, 2.0], [4.0, 2.0, 0.0]])
    picture = kernel_picture(taps, 4.0, 'a "kernel"')
    found = pixels_of(picture)
    assert found[..., 3].tolist() == [[0, 64, 128], [255, 128, 0]]
    assert 'alt="Mean magnitude of a &quot;kernel&quot;' in picture
    assert 'width="76" height="51"' in picture


def test_filters_are_shown_at_their_strongest_channel():
    filters = torch.zeros(2, 3, 2, 2)
    filters[0, 1] = torch.tensor([[1.0, -2.0], [0.0, 4.0]])
    filters[0, 0, 0, 0] = 1.0
    filters[1, 2, 1, 1] = -1.0
    found = pixels_of(filters_picture(filters, 'x'))
    assert found.shape == (2, 17 if found.shape[1] == 17 else 5, 4)
    first, second = found[:2, :2], found[:2, 3:5]
    assert first[..., 3].tolist() == [[64, 128], [0, 255]]
    assert second[..., 3].tolist() == [[0, 0], [0, 255]]
    red, blue = first[1, 1, :3], first[0, 1, :3]
    assert red[0] > red[2] and blue[2] > blue[0]
    assert (second[1, 1, :3] == blue).all()


@pytest.mark.parametrize('shape', [(5,), (2, 3, 3), (31, 31)])
def test_kernels_of_other_dimensions(shape):
    found = pixels_of(kernel_picture(torch.rand(*shape), 1.0, 'a kernel'))
    height = 1 if len(shape) == 1 else shape[-2]
    assert found.shape[0] == height
    found = pixels_of(filters_picture(torch.randn(3, 2, *shape), 'filters'))
    assert found.shape[0] == height


def test_files(tmp_path):
    network, path = small_network()[:3], tmp_path / 'new' / 'report.html'
    with pytest.raises(ValueError, match="path must end in .html, got '.*'"):
        write_report(network, tmp_path / 'report.pdf')
    report = write_report(network, path)
    assert path.read_text(encoding='utf-8') == page(report)
    with pytest.raises(UserError, match='output exists'):
        write_report(network, path)
    with pytest.raises(ValueError, match='images must have images'):
        write_report(network, path, some_images()[:0], overwrite=True)
    assert path.read_text(encoding='utf-8') == page(report)
    write_report(network, path, some_images(), overwrite=True)
    assert path.read_text(encoding='utf-8') != page(report)
    assert [p.name for p in path.parent.iterdir()] == ['report.html']
