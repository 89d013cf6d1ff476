"""The model zoo lists every config, with numbers that are up to date."""

import shutil
from pathlib import Path

import pytest
import yaml
from mmcv.cnn import is_norm
from mmengine.config import Config
from workshop.model_zoo import (
    BEGIN,
    COLLECTIONS,
    DATASETS,
    DOCS,
    METAFILE,
    REPORTED,
    Entry,
    build_empty,
    entry_of,
    read_reported,
    row_of,
    write_zoo,
    zoo_configs,
)

from mmdbb.modules import count_parameters

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.usefixtures('quiet')


@pytest.fixture(scope='module')
def models():
    meta = yaml.safe_load((ROOT / METAFILE).read_text())
    return {model['Name']: model for model in meta['Models']}


def rows(root=ROOT):
    text = (root / DOCS).read_text()
    lines = text[text.index(BEGIN) :].splitlines()
    return [line for line in lines if line.startswith('| [')]


def test_every_config_is_listed_once(models):
    names = [path.stem for path in zoo_configs(ROOT)]
    assert list(models) == names
    listed = [row.split(']')[0][len('| [') :] for row in rows()]
    assert sorted(listed) == names
    index = yaml.safe_load((ROOT / 'model-index.yml').read_text())
    assert index == dict(Import=[METAFILE])


@pytest.mark.parametrize('part', range(4))
def test_every_config_builds_with_the_parameters_listed(models, part):
    for path in zoo_configs(ROOT)[part::4]:
        model = build_empty(Config.fromfile(path))
        listed = models[path.stem]['Metadata']['Training Parameters']
        assert count_parameters(model) == listed, path.stem


def test_merged_networks_cost_what_plain_ones_do(models):
    plain, compared = {}, 0
    for name, model in models.items():
        network, block, *rest = name.replace('_rerun', '').split('_')
        if block == 'plain':
            data = model['Metadata']
            key = (network, *rest)
            plain[key] = [data['FLOPs'], data['Parameters']]
            if network.startswith('repvgg'):
                # Its norms have a weight that the merged one does without.
                built = build_empty(Config.fromfile(ROOT / model['Config']))
                plain[key][1] -= sum(
                    len(module.weight)
                    for module in built.modules()
                    if is_norm(module)
                )
    for name, model in models.items():
        network, block, *rest = name.replace('_rerun', '').split('_')
        data = model['Metadata']
        if block != 'plain':
            found = [data['FLOPs'], data['Parameters']]
            assert found == plain[(network, *rest)], name
            compared += 1
    assert compared >= 60


def test_docs_and_metafile_agree(models):
    reported = read_reported(ROOT)
    assert set(reported) <= set(models)
    for name, model in models.items():
        data = model['Metadata']
        entry = Entry(
            name,
            name.split('_')[1],
            DATASETS[name.rpartition('_')[2]],
            '',
            (data['Training Parameters'], data['Parameters']),
            data['FLOPs'],
        )
        result = reported.get(name)
        assert row_of(entry, result) in rows(), name
        assert model['In Collection'] == COLLECTIONS[entry.block]
        if result:
            assert model['Results'][0]['Metrics'] == result['metrics']
            assert model['Reported By'] == result['source']
        else:
            assert 'Results' not in model


WRITTEN = (
    'alexnet_dbb_imagenet',
    'repvgg-a0_orepa_imagenet',
    'repvgg-a0_repvgg_rerun_imagenet',
    'resnet18_dbb_imagenet',
    'resnet18_orepa_imagenet',
    'vgg16_dbb_cifar10',
)


def test_what_is_written_is_committed(tmp_path):
    configs = tmp_path / 'configs'
    shutil.copytree(ROOT / 'configs' / '_base_', configs / '_base_')
    for name in WRITTEN:
        shutil.copy(ROOT / 'configs' / f'{name}.py', configs)
    shutil.copy(ROOT / REPORTED, configs)
    (tmp_path / 'docs').mkdir()
    (tmp_path / DOCS).write_text(f'Before.\n{BEGIN}\nOld.')
    write_zoo(tmp_path)
    text = (tmp_path / DOCS).read_text()
    assert text.startswith('Before.\n') and 'Old.' not in text
    written = rows(tmp_path)
    assert len(written) == len(WRITTEN)
    assert set(written) <= set(rows())


def test_sizes_are_the_published_ones():
    # torchvision's ResNet-50 and its multiply-adds; RepVGG-A0's of mmpretrain.
    resnet = entry_of(ROOT / 'configs' / 'resnet50_dbb_imagenet.py')
    assert resnet.parameters[1] == 25_557_032
    assert round(resnet.multiplications / 1e9, 2) == 4.09
    repvgg = entry_of(ROOT / 'configs' / 'repvgg-a0_orepa_imagenet.py')
    assert repvgg.parameters[1] == 8_309_384
