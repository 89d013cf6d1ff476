"""The demo in plain PyTorch, and how demos go on where they were cut."""

import pytest
import torch
from workshop.demo import plain_torch, started
from workshop.demo.plain_torch import run_torch_demo

from mmdbb.errors import UserError


@pytest.fixture
def few_digits(monkeypatch):
    """Forty random images in place of the digits."""

    def digits(seed):
        random = torch.Generator().manual_seed(seed)
        images = torch.rand(40, 1, 28, 28, generator=random)
        labels = torch.arange(10).repeat(4)
        return dict(train=(images, labels), val=(images[:20], labels[:20]))

    monkeypatch.setattr(plain_torch, 'digits', digits)
    monkeypatch.setattr(plain_torch, 'BATCH', 20)


def test_cut_demo_ends_as_an_uncut_one(
    few_digits, tmp_path, monkeypatch, capfd
):
    whole = run_torch_demo(str(tmp_path / 'whole'), epochs=3)
    assert whole['trained'] == whole['deployed']
    capfd.readouterr()

    def cut(data, seed, epoch):
        if epoch == 2:
            raise KeyboardInterrupt
        return batches(data, seed, epoch)

    batches = plain_torch.batches
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(plain_torch, 'batches', cut)
        run_torch_demo(str(tmp_path / 'cut'), epochs=3)
    run_torch_demo(str(tmp_path / 'cut'), epochs=3)
    said = capfd.readouterr().out
    assert 'on from epoch 2 of 3' in said
    assert said.count('epoch 1 of 3') == 1
    one, other = (
        torch.load(tmp_path / name / plain_torch.MERGED)
        for name in ('whole', 'cut')
    )
    assert list(one) == list(plain_torch.SmallNet().state_dict())
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_merged_network_that_differs_is_an_error(
    few_digits, tmp_path, monkeypatch
):
    def wrong(plain, model):
        return plain

    monkeypatch.setattr(plain_torch, 'merge_into_', wrong)
    with pytest.raises(SystemExit, match='computes something else'):
        run_torch_demo(str(tmp_path), epochs=1)


def test_torch_demo_names_no_host():
    text = ''
    for module in (plain_torch, started):
        text += open(module.__file__).read()
    for name in ('mmengine', 'mmcv', 'mmdbb.mm'):
        assert f'import {name}' not in text
        assert f'from {name}' not in text


def test_other_settings_start_anew(tmp_path):
    work = started.claim(tmp_path / 'work')
    what = dict(seed=0)
    assert not started.goes_on(work, what, 'epoch_*.pth')
    assert not started.goes_on(work, what, 'epoch_*.pth')  # nothing yet
    (work / 'epoch_1.pth').touch()
    (work / 'last_checkpoint').touch()
    assert started.goes_on(work, what, 'epoch_*.pth')
    assert not started.goes_on(work, dict(seed=1), 'epoch_*.pth')
    assert not list(work.glob('epoch_*')), 'of another training'
    assert not (work / 'last_checkpoint').exists()
    (work / started.STARTED).write_text('{')
    assert not started.goes_on(work, dict(seed=1), 'epoch_*.pth')


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / 'work').touch()
    with pytest.raises(UserError, match='is not a folder'):
        started.claim(tmp_path / 'work')


def test_each_epoch_has_an_order_of_its_own(few_digits):
    data = plain_torch.digits(0)['train']
    one, again, other = (
        torch.cat([images for images, _ in plain_torch.batches(data, 0, n)])
        for n in (0, 0, 1)
    )
    assert torch.equal(one, again) and not torch.equal(one, other)
    assert one.shape == other.shape == data[0].shape
