# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What is known of each config: sizes computed here, results of the papers.

``tools/model_zoo.py`` writes it into `docs/model_zoo.md` and, in OpenMMLab's
form, into `configs/metafile.yml`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Optional, Tuple

import torch
import yaml
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from mmdbb import __version__
from mmdbb.mm.stock.config import stock_config
from mmdbb.modules import count_parameters
from mmdbb.reparam import find_blocks

BEGIN = '<!-- tools/model_zoo.py writes what follows -->'
DOCS = 'docs/model_zoo.md'
METAFILE = 'configs/metafile.yml'
REPORTED = 'configs/reported.yml'


class DataSet(NamedTuple):
    """A data set as model zoos name it.

    Attributes:
        name: What it is called.
        task: What is done on it.
        size: Height and width in pixels that multiplications are counted at.
    """

    name: str
    task: str
    size: Tuple[int, int]


DATASETS = {
    'imagenet': DataSet('ImageNet-1k', 'Image Classification', (224, 224)),
    'cifar10': DataSet('CIFAR-10', 'Image Classification', (32, 32)),
    'cifar100': DataSet('CIFAR-100', 'Image Classification', (32, 32)),
    'coco': DataSet('COCO', 'Object Detection', (800, 1344)),
    'cityscapes': DataSet('Cityscapes', 'Semantic Segmentation', (512, 1024)),
}
#: Block in a config's name -> its paper, which is its collection.
COLLECTIONS = {
    'dbb': 'DBB',
    'dbbconv': 'DBB',
    'acb': 'ACNet',
    'repvgg': 'RepVGG',
    'orepa': 'OREPA',
    'plain': 'Baselines',
}
#: Collection -> what its blocks are called, and the file that has them.
BLOCKS_OF = {
    'DBB': ('Diverse Branch Block', 'mmdbb/blocks/dbb.py'),
    'ACNet': ('Asymmetric Convolution Block', 'mmdbb/blocks/acb.py'),
    'RepVGG': ('RepVGG block', 'mmdbb/blocks/repvgg.py'),
    'OREPA': ('OREPA block', 'mmdbb/blocks/orepa.py'),
}
#: Collection -> number at arXiv, and title, of its paper.
PAPERS = {
    'DBB': (
        '2103.13425',
        'Diverse Branch Block: Building a Convolution as an Inception-like '
        'Unit',
    ),
    'ACNet': (
        '1908.03930',
        'ACNet: Strengthening the Kernel Skeletons for Powerful CNN via '
        'Asymmetric Convolution Blocks',
    ),
    'RepVGG': ('2101.03697', 'RepVGG: Making VGG-style ConvNets Great Again'),
    'OREPA': ('2204.00826', 'Online Convolutional Re-parameterization'),
}


class Entry(NamedTuple):
    """A row of the zoo.

    Attributes:
        name: The config's, without its ending.
        block: The block in its name.
        dataset: What it is trained on.
        recipe: Whose training it is, where that is a paper's.
        parameters: Of the whole model, in training and merged.
        multiplications: Of the merged model for one image of the data set's
            size; of the backbone alone for detection and segmentation.
        architecture: Names of the plain networks, the backbone first.
        training: How it is trained, in OpenMMLab's words: ``Training
            Techniques``, ``Training Resources``, ``Epochs`` or
            ``Iterations``, ``Batch Size``.
    """

    name: str
    block: str
    dataset: DataSet
    recipe: str
    parameters: Tuple[int, int]
    multiplications: int
    architecture: Tuple[str, ...] = ()
    training: Dict[str, object] = {}


def zoo_configs(root: Path) -> List[Path]:
    """The configs of a checkout, without bases and demos."""
    return sorted((root / 'configs').glob('*.py'))


def entry_of(path: Path) -> Entry:
    """Compute a config's row; no weights are made for it."""
    config = Config.fromfile(path)
    _, block, *_ = path.stem.split('_')
    dataset = DATASETS[path.stem.rpartition('_')[2]]
    model = build_empty(config)
    merged = build_empty(stock_config(config)) if find_blocks(model) else model
    merged.eval()
    image = torch.empty(1, 3, *dataset.size, device='meta')
    whole = dataset.task == 'Image Classification'
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        merged(image) if whole else merged.backbone(image)
    return Entry(
        path.stem,
        block,
        dataset,
        _recipe_of(config, dataset),
        (count_parameters(model), count_parameters(merged)),
        counter.get_total_flops() // 2,  # it counts additions too
        _architecture_of(stock_config(config).model, whole),
        _training_of(config),
    )


def build_empty(config: Config) -> nn.Module:
    """Build a config's model without memory for its weights."""
    scope = DefaultScope.overwrite_default_scope(config.default_scope)
    with scope, torch.device('meta'), _NumbersOnCPU():
        return MODELS.build(config.model)


class _NumbersOnCPU(TorchFunctionMode):
    """Within it ``linspace`` has values: the hosts' rates of drop path."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func is torch.linspace:
            kwargs['device'] = 'cpu'
        return func(*args, **kwargs)


def _architecture_of(model: dict, whole: bool) -> Tuple[str, ...]:
    """Names of classes: the backbone's, and that of what is around it."""
    names = [str(model['backbone']['type'])]
    names += [] if whole else [str(model['type'])]
    if 'decode_head' in model:
        names[1] = str(model['decode_head']['type'])
    return tuple(name.rpartition('.')[2] for name in names)


def _training_of(config: Config) -> Dict[str, object]:
    """How a config trains, as OpenMMLab's metafiles say it."""
    optimizer = config.optim_wrapper.optimizer
    techniques = [optimizer['type']]
    if optimizer.get('momentum'):
        techniques[0] += ' with Momentum'
    if optimizer.get('weight_decay'):
        techniques.append('Weight Decay')
    images = config.train_dataloader.batch_size
    total = config.get('auto_scale_lr', {}).get('base_batch_size')
    gpus = total // images if total else 4  # Cityscapes: 4 of 2 images
    loop = config.train_cfg
    length = (
        {'Iterations': loop['max_iters']}
        if loop.get('max_iters')
        else {'Epochs': loop['max_epochs']}
    )
    return {
        'Training Techniques': techniques,
        'Training Resources': f'{gpus} GPU{"s" * (gpus > 1)}, not trained yet',
        'Batch Size': gpus * images,
        **length,
    }


def _recipe_of(config: Config, dataset: DataSet) -> str:
    if dataset.size == (32, 32):
        return 'ACNet'
    if dataset.name != 'ImageNet-1k':
        return ''
    warms_up = isinstance(config.param_scheduler, (list, tuple))
    return 'OREPA' if warms_up else 'DBB'


def write_zoo(root: Path) -> List[str]:
    """Write the docs and the metafile of a checkout.

    Returns:
        list: Paths of the files written, relative to ``root``.
    """
    entries = [entry_of(path) for path in zoo_configs(root)]
    reported = read_reported(root)
    text = (root / DOCS).read_text(encoding='utf-8')
    head = text[: text.index(BEGIN) + len(BEGIN)]
    tables = '\n'.join(_tables(entries, reported))
    (root / DOCS).write_text(f'{head}\n\n{tables}', encoding='utf-8')
    meta = metafile(entries, reported)
    (root / METAFILE).write_text(
        "# Written by tools/model_zoo.py; the results are the papers' own.\n"
        + yaml.safe_dump(meta, sort_keys=False, allow_unicode=True),
        encoding='utf-8',
    )
    return [DOCS, METAFILE]


def read_reported(root: Path) -> Dict[str, dict]:
    """Results that authors report: config -> ``metrics`` and ``source``."""
    text = (root / REPORTED).read_text(encoding='utf-8')
    return yaml.safe_load(text)


def metafile(entries: List[Entry], reported: Dict[str, dict]) -> dict:
    """OpenMMLab's index of models."""
    collections = [
        dict(Name=name) for name in dict.fromkeys(COLLECTIONS.values())
    ]
    for collection in collections:
        _describe(collection, entries)
        if collection['Name'] in PAPERS:
            number, title = PAPERS[collection['Name']]
            collection['Paper'] = dict(
                URL=f'https://arxiv.org/abs/{number}', Title=title
            )
    models = []
    for entry in entries:
        model = dict(
            Name=entry.name,
            Config=f'configs/{entry.name}.py',
            Metadata=dict(
                FLOPs=entry.multiplications,
                Parameters=entry.parameters[1],
            ),
        )
        model['In Collection'] = COLLECTIONS[entry.block]
        model['Metadata']['Training Data'] = entry.dataset.name
        model['Metadata']['Training Parameters'] = entry.parameters[0]
        model['Metadata']['Architecture'] = [
            *entry.architecture,
            *BLOCKS_OF.get(COLLECTIONS[entry.block], ())[:1],
        ]
        model['Metadata'].update(entry.training)
        result = reported.get(entry.name)
        if result:
            model['Results'] = [
                dict(
                    Task=entry.dataset.task,
                    Dataset=entry.dataset.name,
                    Metrics=result['metrics'],
                )
            ]
            model['Reported By'] = result['source']
        models.append(model)
    return dict(Collections=collections, Models=models)


def _describe(collection: dict, entries: List[Entry]) -> None:
    """Say what a collection's entries have in common, its docs and code."""
    inside = [e for e in entries if COLLECTIONS[e.block] == collection['Name']]
    techniques, networks = {}, {}
    for entry in inside:
        networks.update(dict.fromkeys(entry.architecture[:1]))
        listed = entry.training.get('Training Techniques', ())
        techniques.update(dict.fromkeys(listed))
    block = BLOCKS_OF.get(collection['Name'])
    collection['Metadata'] = {
        'Training Techniques': list(techniques),
        'Architecture': [*(block or ())[:1], *networks],
    }
    collection['README'] = DOCS
    if block:
        # Relative to the repository, like the configs.
        collection['Code'] = dict(URL=block[1], Version=f'v{__version__}')


def _tables(entries: List[Entry], reported: Dict[str, dict]) -> Iterator[str]:
    groups: Dict[Tuple[str, str], List[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.dataset.name, entry.recipe), []).append(entry)
    order = [dataset.name for dataset in DATASETS.values()]
    for name, recipe in sorted(groups, key=lambda g: (order.index(g[0]), g)):
        height, width = groups[name, recipe][0].dataset.size
        yield f'## {name}' + (f', training of {recipe}' if recipe else '')
        yield ''
        yield (
            '| Config | Parameters, training (M) | Parameters, merged (M) | '
            f'Multiply-adds at {height} x {width} (G) | Authors report | '
            'Source |'
        )
        yield '|---|---|---|---|---|---|'
        for entry in groups[name, recipe]:
            yield row_of(entry, reported.get(entry.name))
        yield ''


def row_of(entry: Entry, result: Optional[dict]) -> str:
    """The row of the docs."""
    training, merged = (number / 1e6 for number in entry.parameters)
    metrics, source = '', ''
    if result:
        metrics = ', '.join(_metric(*m) for m in result['metrics'].items())
        source = result['source']
    return (
        f'| [{entry.name}](../configs/{entry.name}.py) | {training:.2f} | '
        f'{merged:.2f} | {entry.multiplications / 1e9:.2f} | {metrics} | '
        f'{source} |'
    )


def _metric(name: str, value: float) -> str:
    return f'{name} {value:.2f}'
