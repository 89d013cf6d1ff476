"""The sweep over the packages' configs, on one network of each kind."""

import json
import os
import re
import time
from pathlib import Path

import mmdet
import mmpretrain
import mmseg
import pytest
import torch
from mmengine.config import Config
from torch import nn
from workshop.sweep import table, training, trial, verdicts, whole
from workshop.sweep.architectures import (
    Architecture,
    Read,
    distinct,
    full_type,
    parts_of,
    read_config,
)
from workshop.sweep.networks import (
    build,
    model_config,
    narrow,
    parts_taking_blocks,
    unformatted,
)
from workshop.sweep.packages import config_files, import_package
from workshop.sweep.run import Limits, Results, run_isolated
from workshop.sweep.trial import Trial
from workshop.sweep.verdicts import Verdict, line_of, reason_of, verdict_of

import mmdbb
from mmdbb.blocks import DBB

pytestmark = pytest.mark.usefixtures('quiet')

PACKAGES = dict(mmpretrain=mmpretrain, mmdet=mmdet, mmseg=mmseg)


def path_of(package, config):
    folder = Path(PACKAGES[package].__file__).parent / '.mim' / 'configs'
    return folder / config


def row_of(package, config):
    import_package(package)
    path = path_of(package, config)
    parts = read_config(path, package).parts
    with unformatted():
        return Trial(Architecture(package, parts, config, str(path), 1)).run()


def test_a_network_that_works():
    row = row_of(
        'mmseg', 'fastscnn/fast_scnn_8xb4-160k_cityscapes-512x1024.py'
    )
    assert verdict_of(row) is Verdict.WORKS, line_of(row)
    assert row['blocks'] == dict(backbone=3, auxiliary_head=2)
    assert row['steps']['trains']['how'] == 'loss'
    assert row['steps']['merges']['merged'] == sum(row['blocks'].values())
    assert reason_of(row) == ''


def test_a_network_that_is_warned_of_and_fuses():
    config = 'vfnet/vfnet_r50_fpn_1x_coco.py'
    row = row_of('mmdet', config)
    assert verdict_of(row) is Verdict.WARNED, line_of(row)
    assert row['steps']['fuses']['ok']
    assert 'has no place in the stock network' in reason_of(row)


def test_a_network_that_gets_no_block():
    config = 'pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py'
    row = row_of('mmseg', config)
    assert row['takes'] and not row['blocks']
    assert verdict_of(row) is Verdict.REFUSED, line_of(row)
    assert row['steps']['says']['kind'] == 'refused'


def test_a_network_that_takes_none():
    config = 'vision_transformer/vit-base-p32_64xb64_in1k.py'
    row = row_of('mmpretrain', config)
    assert row['takes'] == {}
    assert verdict_of(row) is Verdict.NOT_TAKEN


def test_a_part_that_cannot_be_built_stays_plain():
    row = row_of('mmdet', 'dcn/faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py')
    assert list(row['refused']) == ['model.backbone']
    assert 'conv_cfg must be None for DCN' in row['refused']['model.backbone']
    assert 'backbone' not in row['blocks'] and row['blocks']['neck']


@pytest.fixture
def wrong_merge(monkeypatch):
    """A block whose merged kernel is wrong."""
    right = DBB.to_conv

    def wrong(self, *args, **kwargs):
        conv = right(self, *args, **kwargs)
        conv.weight.data.mul_(1.001)
        return conv

    monkeypatch.setattr(DBB, 'to_conv', wrong)


@pytest.mark.usefixtures('wrong_merge')
def test_it_sees_a_wrong_merge():
    row = row_of('mmpretrain', 'resnet/resnet18_8xb32_in1k.py')
    assert verdict_of(row) is Verdict.FAILS
    assert 'differs by' in reason_of(row)


def test_it_sees_a_wrong_start(monkeypatch):
    right = trial.load_plain_weights_

    def wrong(model, state):
        right(model, state)
        model.backbone.layer1[0].conv1.branches['kxk'].conv.weight.data *= 1.1

    monkeypatch.setattr(trial, 'load_plain_weights_', wrong)
    row = row_of('mmpretrain', 'resnet/resnet18_8xb32_in1k.py')
    assert verdict_of(row) is Verdict.FAILS
    assert 'starts: the start differs by ' in reason_of(row)


def test_it_sees_an_error_in_a_block(monkeypatch):
    forward = DBB.forward_train

    def fail(self, x):
        if x.shape[-1] > 10:  # not where the block runs by itself
            raise RuntimeError('of a test')
        return forward(self, x)

    fail.__code__ = fail.__code__.replace(co_filename='mmdbb/blocks/x.py')
    monkeypatch.setattr(DBB, 'forward_train', fail)
    row = row_of('mmpretrain', 'resnet/resnet18_8xb32_in1k.py')
    assert verdict_of(row) is Verdict.FAILS
    assert row['steps']['trains']['reason'] == 'RuntimeError: of a test'


def tiny(conv):
    return nn.Sequential(conv(3, 4, 3), nn.ReLU(), conv(4, 4, 3))


def test_a_loss_that_overflows_is_no_fault_of_a_block(monkeypatch):
    def loss(model, size, package):
        return model(torch.rand(2, 3, *size)).sum() * float('inf')

    monkeypatch.setattr(training, 'losses_of', loss)
    assert training.train(tiny(DBB), [8, 8], '') == 'features'


def test_a_block_that_overflows_is_at_fault(monkeypatch):
    forward = DBB.forward_train

    def loss(model, size, package):
        return model(torch.rand(2, 3, *size)).sum()

    class Spoils(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient / 0

    def spoils(self, x):
        return Spoils.apply(forward(self, x))

    monkeypatch.setattr(training, 'losses_of', loss)
    monkeypatch.setattr(DBB, 'forward_train', spoils)
    with pytest.raises(ValueError, match='^2 makes a gradient that is not'):
        training.train(tiny(DBB), [8, 8], '')


def test_a_block_that_gets_no_gradient_runs_by_itself(monkeypatch):
    ran = []
    model = tiny(DBB)
    monkeypatch.setattr(training, '_features', lambda m, s: m[0](X).sum())
    monkeypatch.setattr(
        training, '_input_of', lambda block: ran.append(block) or X4
    )
    assert training.train(model, [8, 8], '') == 'features'
    assert ran == [model[2]]
    monkeypatch.setattr(DBB, 'forward_train', lambda self, x: 0 * x[:, :1])
    with pytest.raises(ValueError, match='0 gets no gradient'):
        training.train(model, None, '')


X = torch.rand(2, 3, 8, 8)
X4 = torch.rand(2, 4, 8, 8, requires_grad=True)


def test_all_parts_get_blocks_and_narrow_networks_fit():
    path = path_of('mmdet', 'faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py')
    import_package('mmdet')
    cfg = model_config(Config.fromfile(path), 'mmdet')
    assert parts_taking_blocks(cfg) == {
        'model.backbone': 'ResNet',
        'model.neck': 'FPN',
        'model.roi_head.bbox_head': 'Shared2FCBBoxHead',
    }
    quarter = build(narrow(cfg))
    assert quarter.backbone.layer4[2].conv3.out_channels == 512
    assert quarter.neck.fpn_convs[0].conv.out_channels == 64
    with torch.no_grad():
        assert len(quarter.extract_feat(torch.rand(1, 3, 64, 64))) == 5


def test_configs_of_the_same_classes_are_one():
    read = [
        Read('/a/configs/x/deep.py', {'model': 'p.A'}, 101.0),
        Read('/a/configs/x/flat.py', {'model': 'p.A'}, 18.0),
        Read('/a/configs/y/other.py', {'model': 'p.B'}, 18.0),
        Read('/a/configs/y/none.py', {}, 0.0),
    ]
    found = distinct('p', read)
    assert [(a.config, a.configs) for a in found] == [
        ('x/flat.py', 2),
        ('y/other.py', 1),
    ]
    assert full_type('ResNet', 'mmdet') == 'mmdet.ResNet'
    assert full_type('mmdet.models.backbones.resnet.ResNet', 'mmseg') == (
        'mmdet.ResNet'
    )
    assert full_type(nn.Conv2d, 'mmdet') == 'torch.Conv2d'


def test_configs_are_found():
    for package in PACKAGES:
        names = [path.name for path in config_files(package)]
        assert len(names) > 500
        assert '__init__.py' not in names
        assert not [name for name in names if name.startswith('_base_')]


def hang():
    while True:
        pass


def fill():
    return len(bytearray(2**31))


def fail():
    raise KeyError('of a test')


def end():
    os._exit(3)


def test_processes_have_limits():
    tasks = {f.__name__: (f, ()) for f in (hang, fill, fail, end, os.getpid)}
    start = time.time()
    limits = Limits(jobs=2, seconds=1.0, gigabytes=1.5)
    found = dict(run_isolated(tasks, limits))
    assert time.time() - start < 60
    assert found['hang'].startswith('took more than 1 s')
    assert found['fill'] == 'MemoryError: '
    assert found['fail'] == "KeyError: 'of a test'"
    assert found['end'] == 'ended with code 3'
    assert found['getpid'] != os.getpid()


def test_a_run_goes_on_where_it_was_cut(tmp_path):
    file = tmp_path / 'rows.jsonl'
    Results(file).add(dict(key='a', steps={}))
    with file.open('a') as lines:
        lines.write('{"key": "b", "st')
    results = Results(file)
    assert list(results.rows) == ['a']
    results.add(dict(key='b', steps={}))
    assert list(Results(file).rows) == ['a', 'b']


def test_rows_name_no_folder_of_the_machine(tmp_path):
    file = tmp_path / 'rows.jsonl'
    reason = f"{tmp_path}/a.pth: no file '/x/y/_base_/b.py'\n/usr/lib/c"
    config = 'body_2d/coco/rtmpose.py'
    Results(file).add(dict(key='a', reason=reason, config=config))
    (found,) = Results(file).rows.values()
    assert found['reason'] == ".../a.pth: no file '.../b.py'\n.../c"
    assert found['config'] == config


GOOD = dict.fromkeys(('alone', 'builds', 'starts', 'merges'), dict(ok=True))
GOOD['trains'] = dict(ok=True, how='loss')


def row_with(name, said=(), blocks=16, **steps):
    return dict(
        key=f'mmdet {name}=',
        package='mmdet',
        config=f'{name}.py',
        commit='abc123',
        takes={'model.backbone': 'ResNet'},
        refused={},
        blocks=dict(backbone=blocks) if blocks else {},
        steps=dict(dict(GOOD, says=dict(ok=True, said=[*said])), **steps),
    )


def rows_of_each_kind():
    bad = dict(ok=False, reason='no | place')
    said = [f'the biases of 3 blocks {verdicts._NO_PLACE}: ...']
    left = dict(ok=True, left_out={'roi_head': 'it reads more'})
    refused = dict(ok=False, kind='refused', reason='no block')
    return {
        row['config']: row
        for row in (
            row_with('works', merges=left),
            row_with('fails', merges=bad),
            row_with('warned', said, merges=bad, fuses=dict(ok=True)),
            row_with('neither', said, merges=bad, fuses=bad),
            dict(row_with('none', blocks=0), steps=dict(GOOD, says=refused)),
        )
    }


def test_verdicts():
    found = {n: verdict_of(row) for n, row in rows_of_each_kind().items()}
    assert found == {
        'works.py': Verdict.WORKS,
        'fails.py': Verdict.FAILS,
        'warned.py': Verdict.WARNED,
        'neither.py': Verdict.FAILS,
        'none.py': Verdict.REFUSED,
    }


def test_the_page_is_written_between_its_marks(tmp_path):
    rows = tmp_path / 'rows.jsonl'
    package = dict(key='package mmdet', package='mmdet', version='3.3.0')
    package.update(files=7, architectures=6, lifted='', unread={})
    each = [package, *rows_of_each_kind().values()]
    rows.write_text(''.join(json.dumps(row) + '\n' for row in each))
    page = tmp_path / table.PAGE
    page.parent.mkdir()
    page.write_text(f'before\n\n{table.BEGIN}\nold\n{table.END}\n\nafter\n')
    table.write_page(tmp_path, rows)
    text = page.read_text()
    assert text.startswith('before') and text.endswith('after\n')
    assert 'old' not in text
    assert 'Commit: abc123 (5 architectures)' in text
    assert 'cut: 5 of 6 architectures have a result' in text
    assert '| mmdet | 7 | 6 | 5 | 5 | 64 | 1 | 1 | 1 | 2 | 0 | 0 |' in text
    assert 'Of 4 architectures that get blocks, 1 (25.0%) train' in text
    assert '1 that were warned of and deploy in another form, 50.0%' in text
    assert 'the own loss of 4, the features of 0, in 0 each block' in text
    assert '1 were refused before the training, 1 of them because' in text
    assert '- merges: no \\| place' in text
    assert '`mmdet::fails.py`' in text
    assert 'In 1 of 2 merged architectures a part could not' in text
    assert '| roi\\_head | 1: `mmdet::works.py` |' in text


def test_only_what_failed_is_tried_again(tmp_path, monkeypatch):
    rows = tmp_path / 'rows.jsonl'
    for row in rows_of_each_kind().values():
        Results(rows).add(row)
    all_of = [
        Architecture('mmdet', {name.partition('.')[0]: ''}, name, '', 1)
        for name in rows_of_each_kind()
    ]
    notes = dict(package='mmdet', version='3', files=5)
    monkeypatch.setattr(
        whole, 'find_architectures', lambda *_: (all_of, notes)
    )
    tried = []

    def sweep(wanted, results, limits, commit):
        tried.extend(a.config for a in wanted if a.key not in results.rows)
        return iter(())

    monkeypatch.setattr(whole, 'sweep', sweep)
    for again, expected in ((False, []), (True, ['fails.py', 'neither.py'])):
        list(whole.sweep_packages(['mmdet'], rows, Limits(), again=again))
        assert tried == expected


def test_unusual_layers_make_another_architecture():
    model = dict(
        type='FasterRCNN',
        backbone=dict(type='ResNet', norm_cfg=dict(type='SyncBN')),
        neck=dict(type='FPN', norm_cfg=dict(type='GN', num_groups=32)),
        roi_head=dict(type='RoIHead', conv_cfg=None),
    )
    assert dict(parts_of(model)) == {
        'model': 'FasterRCNN',
        'model.backbone': 'ResNet',
        'model.neck': 'FPN',
        'model.neck.norm_cfg': 'layer.GN',
        'model.roi_head': 'RoIHead',
    }
    model['backbone'].update(
        conv_cfg=dict(type='ConvWS'), dcn=dict(type='DCN')
    )
    layers = {k for k, v in parts_of(model) if v.startswith('layer.')}
    assert layers == {
        'model.backbone.conv_cfg',
        'model.backbone.dcn',
        'model.neck.norm_cfg',
    }


def test_the_docs_have_the_marks():
    page = Path(mmdbb.__file__).parents[1] / table.PAGE
    text = page.read_text()
    assert text.count(table.BEGIN) == text.count(table.END) == 1


def test_the_docs_say_what_the_rows_say():
    root = Path(__file__).resolve().parents[1]
    lines = (root / 'docs/figures/hosts.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    page = (root / table.PAGE).read_text(encoding='utf-8')
    # But for the heading, which names the day.
    for line in [*table._body(rows)][1:]:
        assert line in page
    tried = [row for row in rows if 'takes' in row]
    (share,) = re.findall(r'in another form, (\S+) train', page)
    (count,) = re.findall(r'Of (\d+) architectures that get blocks', page)
    for path in ('docs/any_config.md', 'docs/zh_cn/any_config.md'):
        text = (root / path).read_text(encoding='utf-8')
        assert f' {count} ' in text and share in text
    deploy = [
        verdict_of(row) in (Verdict.WORKS, Verdict.WARNED) for row in tried
    ]
    assert f'{sum(deploy) / int(count):.1%}' == share
