"""The study on Fashion-MNIST, with few images and few channels."""

import json
import struct

import pytest
import torch
from helpers import run_tool
from workshop.fashion.images import augmented, read_fashion_mnist
from workshop.fashion.study import read_results
from workshop.fashion.training import BLOCKS, start

from mmdbb.errors import UserError

pytestmark = pytest.mark.usefixtures('quiet')
IMAGES = dict(train=96, t10k=30)


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    """Files of the data set's own form, with noise in them."""
    folder = tmp_path_factory.mktemp('fashion')
    generator = torch.Generator().manual_seed(0)
    for split, count in IMAGES.items():
        labels = torch.arange(count) % 10
        images = torch.randint(
            0, 200, (count, 28, 28), generator=generator, dtype=torch.uint8
        )
        images[:, :9] += 5 * labels[:, None, None].to(torch.uint8)
        for name, values in (('images', images), ('labels', labels)):
            shape = values.shape
            head = struct.pack(f'>HBB{len(shape)}I', 0, 8, len(shape), *shape)
            path = folder / f'{split}-{name}-idx{len(shape)}-ubyte'
            path.write_bytes(head + bytes(values.flatten().tolist()))
    return folder


def test_shared_layers_start_equal():
    """Those that no block replaces: stem, shortcuts, head."""
    networks = {block: start(block, 3, 4) for block in BLOCKS}
    plain = networks['plain'].state_dict()
    for block in ('DBB', 'OREPA'):
        state = networks[block].state_dict()
        for name in ('backbone.conv1', 'backbone.layer2.0.downsample.0', 'fc'):
            entry = f'{name}.weight'
            assert torch.equal(state[entry], plain[entry]), name
    other = start('plain', 4, 4).state_dict()
    assert not torch.equal(other['fc.weight'], plain['fc.weight'])


def test_images_are_shifted_and_mirrored():
    image = torch.arange(28.0 * 28).reshape(1, 1, 28, 28) + 1
    batch = image.expand(400, -1, -1, -1)
    found = augmented(batch, torch.Generator().manual_seed(0))
    seen = set()
    for each in found[:, 0]:
        middle = each[14, 13:15] - 1
        step = middle[1] - middle[0]
        assert abs(step) == 1
        row, column = divmod(int(middle[0]), 28)
        column = column if step == 1 else 27 - column
        seen.add((int(step), row - 14, column - 13))
    assert len(seen) == 2 * 5 * 5


def test_the_search_sees_no_test_image(data_root):
    data = read_fashion_mnist(str(data_root))
    search = data.for_search()
    assert [len(part.labels) for part in data] == [*IMAGES.values()]
    assert [len(part.labels) for part in search] == [88, 8]
    both = torch.cat([part.images for part in search])
    assert torch.equal(
        both.flatten(1).sum(1).sort()[0],
        data.train.images.flatten(1).sum(1).sort()[0],
    )


def test_study(data_root, tmp_path, capfd):
    out = tmp_path / 'fashion.json'
    arguments = [
        '--out', out, '--data-root', data_root, '--width', 2,
        '--batch', 32, '--epochs', 1, '--search-epochs', 1,
        '--rates', 0.1, 0.2, '--precision', 'float32',
        '--blocks', 'plain', 'OREPA',
    ]  # fmt: skip
    assert run_tool('study_fashion', *arguments, '--seeds', 1) == 0
    assert 'OREPA, seed 0' in capfd.readouterr().out
    first = read_results(out)
    assert len(first) == 2 * 2 + 2
    assert run_tool('study_fashion', *arguments, '--seeds', 2) == 0
    said = capfd.readouterr().out
    assert 'seed 0' not in said and 'seed 1' in said
    results = read_results(out)
    assert results[:6] == first and len(results) == 8
    for result in results:
        assert result.top1 == result.merged_top1
        assert result.seconds > 0
    best = {r.block: r.recipe.lr for r in results if not r.searched}
    for block, rate in best.items():
        searched = [r for r in results if r.searched and r.block == block]
        assert max(searched, key=lambda r: r.top1).recipe.lr == rate


def test_another_file_is_not_taken_up(tmp_path):
    out = tmp_path / 'other.json'
    out.write_text(json.dumps(dict(results=[dict(block='plain')])))
    with pytest.raises(UserError, match='no results of this study'):
        read_results(out)
