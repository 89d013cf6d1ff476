# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The study: equal terms for all blocks, results that are never lost."""

import json
import math
from pathlib import Path

import pytest
import torch
from mmengine.runner import Runner, set_random_seed
from mmpretrain.registry import MODELS
from workshop.demo import study

import mmdbb.mm.backbones  # noqa: F401
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks

HOME = Path(__file__).resolve().parents[2]
SMALL = study.Budget(images=2, epochs=1, batch=10)
SIZES = (40, 20)


def config(block, tiny_data, seed=0):
    folder = tiny_data / 'mnist5k'
    return study.study_config(HOME, folder, block, seed, SMALL)


@pytest.mark.parametrize('block', study.BLOCKS)
def test_blocks_differ_in_the_backbone_only(block, tiny_data):
    cfg, plain = (config(b, tiny_data).to_dict() for b in (block, 'plain'))
    backbone = MODELS.build(cfg['model'].pop('backbone'))
    found = {type(b).__name__ for b in find_blocks(backbone).values()}
    names = dict(plain=set(), OREPA={'OREPAConv'})
    assert found == names.get(block, {block})
    plain['model'].pop('backbone')
    for fields in (cfg, plain):
        fields.pop('experiment_name')
    assert cfg == plain


def start_of(model):
    """Build a model as a Runner with seed 3 does: names -> parameters."""
    set_random_seed(3)
    model = MODELS.build(model)
    model.init_weights()
    return dict(model.named_parameters())


@pytest.mark.parametrize('block', [b for b in study.BLOCKS if b != 'plain'])
@pytest.mark.usefixtures('quiet')
def test_what_blocks_and_plain_share_starts_equal(block, tiny_data):
    found, plain = (
        start_of(config(b, tiny_data).to_dict()['model'])
        for b in (block, 'plain')
    )
    shared = {n for n, p in plain.items() if n in found}
    for name in shared:
        assert torch.equal(found[name], plain[name]), name
    # Shortcuts, head, and of OREPA all norms, of others the stem.
    expected = [
        'backbone.layer2.0.downsample.0.weight',
        'backbone.layer4.0.downsample.1.weight',
        'head.fc.weight',
        'head.fc.bias',
        'backbone.bn1.weight',
        'backbone.layer1.1.bn2.weight'
        if block == 'OREPA'
        else 'backbone.conv1.weight',
    ]
    assert shared >= set(expected)
    # All else is a block's, or what the block stands for.
    blocks = find_blocks(MODELS.build(config(block, tiny_data).model)).keys()
    inside = tuple(f'{name}.' for name in blocks)
    norms = tuple(n.replace('conv', 'bn') for n in inside)
    for name in set(found) - shared:
        assert name.startswith(inside), name
    for name in set(plain) - shared:
        assert name.startswith(inside + norms), name
    # Torch's: no residual branch starts as zero, no kernel is wider.
    for name, value in plain.items():
        if value.dim() > 1:
            bound = value[0].numel() ** -0.5
            assert 0.9 * bound < value.abs().max() <= bound, name
        elif not name.startswith('head'):
            assert (value == float('weight' in name)).all(), name


@pytest.mark.usefixtures('quiet')
def test_blocks_and_plain_see_the_same_batches(tiny_data, tmp_path):
    """Same images, same order, same crops and turns."""

    def batches(block):
        cfg = config(block, tiny_data, seed=5)
        cfg.work_dir = str(tmp_path / block)
        runner = Runner.from_cfg(cfg)
        runner.model.init_weights()
        loader = runner.build_dataloader(cfg.train_dataloader, seed=5)
        return torch.cat([torch.stack(batch['inputs']) for batch in loader])

    plain = batches('plain')
    assert len(plain) == 20
    for block in ('DBB', 'OREPA'):
        assert torch.equal(batches(block), plain)


def test_a_seed_chooses_images_for_all_blocks_alike(tiny_data):
    folder = tiny_data / 'mnist5k'
    first, second = (study.chosen_images(folder, 2, s) for s in (0, 1))
    assert first != second
    # 40 images, four of each of ten classes.
    for chosen in (first, second):
        assert [place // 4 for place in chosen] == sorted([*range(10)] * 2)
        assert len(set(chosen)) == 20
    with pytest.raises(UserError, match='has 4 training images, asked for 5'):
        study.chosen_images(folder, 5, 0)


def run(
    tiny_data,
    tmp_path,
    seeds=1,
    budget=SMALL,
    blocks=('plain', 'DBB'),
    overwrite=False,
):
    out = tmp_path / 'out.json'
    results = study.run_study(
        HOME,
        out,
        budget,
        tiny_data,
        blocks,
        seeds,
        tmp_path / 'w',
        SIZES,
        overwrite,
    )
    return list(results), out


def test_a_study_is_taken_up_where_it_stopped(
    tiny_data, tmp_path, monkeypatch
):
    results, out = run(tiny_data, tmp_path)
    assert [(r.block, r.seed) for r in results] == [('plain', 0), ('DBB', 0)]
    assert all(0 <= r.top1 <= 100 for r in results)
    written = json.loads(out.read_text())
    assert written['budget'] == SMALL._asdict()
    assert len(written['results']) == 2
    trained = []
    monkeypatch.setattr(
        study, 'train_network', lambda cfg: trained.append(cfg) or 50.0
    )
    again, _ = run(tiny_data, tmp_path, seeds=2)
    assert again[:2] == results and len(trained) == 2
    assert len(json.loads(out.read_text())['results']) == 4


def test_results_of_another_budget_are_kept(tiny_data, tmp_path):
    out = tmp_path / 'out.json'
    study._write(out, SMALL, [study.Result('plain', 0, 90.0)])
    before = out.read_text()
    with pytest.raises(UserError, match='results of another budget'):
        run(tiny_data, tmp_path, budget=SMALL._replace(epochs=3))
    assert out.read_text() == before
    results = [dict(block='DBB', seed=0, top1=90.0)]
    for text in (
        'text',
        '{}',
        json.dumps(dict(budget={}, results=results)),
        json.dumps(dict(budget=SMALL._asdict(), results=[], mine=1)),
    ):
        out.write_text(text)
        with pytest.raises(UserError, match='no results of a.*pass --force'):
            run(tiny_data, tmp_path)
        assert out.read_text() == text


def test_overwriting_keeps_what_can_be_taken_up(
    tiny_data, tmp_path, monkeypatch
):
    monkeypatch.setattr(study, 'train_network', lambda cfg: 50.0)
    out = tmp_path / 'out.json'
    mine = study.Result('plain', 0, 90.0)
    study._write(out, SMALL, [mine])
    results, _ = run(tiny_data, tmp_path, overwrite=True)
    assert results == [mine, study.Result('DBB', 0, 50.0)]
    longer = SMALL._replace(epochs=3)
    results, _ = run(tiny_data, tmp_path, budget=longer, overwrite=True)
    assert [r.top1 for r in results] == [50.0, 50.0]
    assert json.loads(out.read_text())['budget'] == longer._asdict()
    out.write_text('text')
    run(tiny_data, tmp_path, overwrite=True)
    assert len(study.read_results(out, SMALL)) == 2


def test_what_cannot_be_written_shows_first(tiny_data, tmp_path, monkeypatch):
    monkeypatch.setattr(study, 'train_network', lambda cfg: 1 / 0)
    (tmp_path / 'file').write_text('mine')
    for out in (tmp_path, tmp_path / 'file' / 'out.json'):
        with pytest.raises(UserError, match='is a folder|cannot write'):
            next(study.run_study(HOME, out, SMALL, tiny_data))


@pytest.mark.parametrize(
    'change, message',
    [
        (dict(blocks=('DBB', 'ABC')), r"unknown blocks \['ABC'\]; allowed"),
        (dict(seeds=0), 'seeds must be greater than 0, got 0'),
        (dict(budget=SMALL._replace(batch=-1)), 'batch must be greater'),
    ],
)
def test_wrong_numbers(change, message, tiny_data, tmp_path):
    with pytest.raises(UserError, match=message):
        run(tiny_data, tmp_path, **change)


def results_of(**tops):
    return [
        study.Result(block, seed, top)
        for block, values in tops.items()
        for seed, top in enumerate(values)
    ]


def test_summary_exact():
    plain, dbb = study.summarize(
        results_of(plain=(90.0, 92.0, 94.0), DBB=(91.0, 94.0, 94.0))
    )
    # t of 2 degrees of freedom at 97.5 %: 4.30265; deviations 2 and 1.
    assert plain.mean == 92 and plain.gain is None
    assert plain.half == pytest.approx(4.30265 * 2 / math.sqrt(3), rel=1e-5)
    assert (dbb.mean, dbb.gain) == (93, 1)
    assert dbb.gain_half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)


def test_one_seed_says_nothing_about_the_next(tmp_path, capsys):
    results = results_of(plain=(90.0,), DBB=(91.0,))
    assert study.summarize(results)[0].half == math.inf
    study.print_study(results)
    said = capsys.readouterr().out
    assert '90.00' in said and '+1.00' in said and 'no confidence' in said
    assert 'inf' not in said and '±' not in said
    study.draw_study(results, str(tmp_path / 'study.png'))
    study.print_study(results_of(plain=(90.0, 92.0), DBB=(91.0, 93.0)))
    said = capsys.readouterr().out
    assert '± 12.71' in said and '+1.00 ± 0.00' in said and '2 seeds' in said


@pytest.mark.parametrize('name', ['study.png', 'study.svg'])
def test_the_picture(name, tmp_path):
    path = tmp_path / name
    results = results_of(plain=(90.0, 92.0), DBB=(91.0, 94.0))
    study.draw_study(results, str(path))
    before = path.read_bytes()
    study.draw_study(results, str(path))
    assert path.read_bytes() == before
    with pytest.raises(UserError, match='cannot draw'):
        study.draw_study(results, str(tmp_path / 'study.txt2'))


PAGE = HOME / 'docs' / 'study.md'


@pytest.mark.parametrize(
    'name',
    sorted(p.name for p in (PAGE.parent / 'figures').glob('study*.json')),
)
def test_the_pages_numbers_are_those_of_the_trainings(name):
    path = PAGE.parent / 'figures' / name
    budget = json.loads(path.read_text())['budget']
    results = study.read_results(path, study.Budget(**budget))
    seeds = {r.seed for r in results}
    assert {(r.block, r.seed) for r in results} == {
        (block, seed) for block in study.BLOCKS for seed in seeds
    }
    text = PAGE.read_text()
    assert f'({"figures/" + name})' in text
    for row in study.summarize(results):
        cells = f'| {row.block} | {row.mean:.2f} ± {row.half:.2f} | '
        if row.gain is not None:
            cells += f'{row.gain:+.2f} ± {row.gain_half:.2f} '
        assert f'{cells}|' in text


def test_the_pages_settings_are_the_tools():
    path = PAGE.parent / 'figures' / 'study.json'
    report = json.loads(path.read_text())
    assert report['budget'] == study.Budget()._asdict()
    results = study.read_results(path, study.Budget())
    gain = {row.block: row for row in study.summarize(results)}['DBB']
    text = f'DBB {gain.gain:+.2f} ± {gain.gain_half:.2f} points'
    assert text in (HOME / 'README.md').read_text()
    assert len(report['results']) == 8 * len(study.BLOCKS)
