"""Own photographs: train, deploy, predict; and what is refused before."""

import functools
import json
import os
import re
from pathlib import Path

import numpy as np
import photographs
import pytest
from helpers import run_tool
from mmengine.config import Config
from mmengine.runner import Runner
from PIL import Image

import mmdbb
from mmdbb.deploy import Source, predict
from mmdbb.errors import UserError
from mmdbb.mm.deploy.load import build_model
from mmdbb.mm.engine.command import parsed_options
from mmdbb.mm.evaluation.images import calibration_images, default_size

pytestmark = pytest.mark.usefixtures('quiet')
pytest.importorskip('sklearn')

ROOT = Path(__file__).resolve().parents[2]
#: What a user changes at the top of each config, for tiny photographs.
CHANGES = {
    'classification': dict(image_size=64, batch_size=4, max_epochs=1),
    'detection': dict(image_scale=(96, 64), batch_size=4, max_epochs=1),
    'segmentation': dict(
        crop_size=(64, 64), batch_size=2, max_iters=2, val_interval=2
    ),
}
#: The networks made narrow and shallow, and no processes that load.
SMALL = """
for loader in (train_dataloader, val_dataloader, test_dataloader):
    loader.update(num_workers=0, persistent_workers=False)
del loader
model['backbone'].update(
    base_channels=8, stem_channels=8, num_stages=2, strides=(1, 2),
    dilations=(1, 1), out_indices=(0, 1))
if 'bbox_head' in model:
    model['neck'].update(
        in_channels=[8, 16], out_channels=16, start_level=0, num_outs=2)
    model['bbox_head'].update(
        in_channels=16, feat_channels=16, stacked_convs=1,
        anchor_generator=dict(strides=[4, 8]))
elif 'decode_head' in model:
    model['decode_head'].update(in_channels=16, in_index=1, channels=8)
else:
    model['backbone']['out_indices'] = (1,)
    model['head']['in_channels'] = 16
"""


def own_config(task, folder):
    """The config as its user changes it; the data set lies beside it."""
    root = folder / 'data'
    if not root.exists():
        getattr(photographs, task)(root)
    text = (ROOT / f'configs/own_data/{task}.py').read_text()
    changes = dict(CHANGES[task], data_root=f'{root}/', start=None)
    for name, value in changes.items():
        text, count = re.subn(
            rf'^{name} = .*$', f'{name} = {value!r}', text, flags=re.M
        )
        assert count == 1, name
    config = folder / 'own.py'
    config.write_text(text + SMALL)
    return config


@pytest.fixture(scope='module')
def own(tmp_path_factory):
    """From a task to its config and a checkpoint."""
    made = {}

    def make(task):
        if task not in made:
            folder = tmp_path_factory.mktemp(task)
            config, work = own_config(task, folder), folder / 'work'
            options = '--work-dir', work, '--quiet', '--auto-scale-lr'
            assert run_tool('train', config, *options) == 0
            last = (work / 'last_checkpoint').read_text()
            made[task] = config, last
        return made[task]

    return make


def by_host(task, config, checkpoint, image, out):
    """As docs/own_data.md does it with the packages' own inferencers."""
    if task == 'classification':
        from mmpretrain import ImageClassificationInferencer

        ImageClassificationInferencer(config, checkpoint, device='cpu')(
            image, show_dir=out
        )
    elif task == 'detection':
        from mmdet.apis import DetInferencer

        DetInferencer(config, checkpoint, device='cpu')(image, out_dir=out)
    else:
        from mmseg.apis import MMSegInferencer

        MMSegInferencer(
            config,
            checkpoint,
            classes=['background', 'flower'],
            palette=[[0, 0, 0], [255, 128, 0]],
            device='cpu',
        )(image, out_dir=out)


@pytest.mark.parametrize('task', CHANGES)
def test_own_data_from_training_to_prediction(task, own, tmp_path, capfd):
    config, checkpoint = own(task)
    said = capfd.readouterr().out
    assert 'training     ' in said and 'mmengine' not in said.split('work')[0]
    image = next((config.parent / 'data').rglob('val*/**/flower_1.jpg'))
    options = '--image-size', 64, 96
    out = tmp_path / 'out.pth'
    assert run_tool('reparam', config, checkpoint, out, *options) == 0
    deployed = tmp_path / 'out.py'
    found = {}
    for name, pair in dict(
        trained=(config, checkpoint), deployed=(deployed, out)
    ).items():
        picture = tmp_path / f'{name}.png'
        capfd.readouterr()
        assert run_tool('predict', *pair, image, picture) == 0
        found[name] = capfd.readouterr().out.splitlines()
        with Image.open(picture) as drawn:
            assert min(drawn.size) >= 64
        by_host(task, *map(str, pair), str(image), str(tmp_path / name))
        assert list((tmp_path / name).rglob('*.jpg')) or list(
            (tmp_path / name).rglob('*.png')
        )
    assert found['trained'][:-1] == found['deployed'][:-1]
    assert found['trained'][-1].startswith('picture: ')
    if task == 'classification':
        names = {line.split()[0] for line in found['trained'][:-1]}
        assert names == set(photographs.CLASSES)


def test_predictions_of_a_file_are_those_of_the_network(own, tmp_path):
    """A classifier's logits, in an ONNX file."""
    pytest.importorskip('onnxruntime')
    config, checkpoint = own('classification')
    image = next((config.parent / 'data').rglob('china_1.jpg'))
    cfg = Config.fromfile(config)
    path = tmp_path / 'a.onnx'
    arguments = config, checkpoint, path, '--format', 'onnx'
    assert run_tool('reparam', *arguments, '--image-size', 64, 64) == 0
    expected = predict(Source(cfg, checkpoint), image)
    found = predict(Source(cfg, str(path)), image)
    assert found.pred_label == expected.pred_label
    assert (found.pred_score - expected.pred_score).abs().max() < 1e-5
    cfg.test_dataloader.dataset.pipeline[2].crop_size = 48
    with pytest.raises(UserError, match='export it with --image-size 48 48'):
        predict(Source(cfg, str(path)), image)


def test_boxes_of_a_file_are_those_of_the_network(own, tmp_path):
    """In pixels of the photograph, which is scaled to fit into the file."""
    pytest.importorskip('onnxruntime')
    config, checkpoint = own('detection')
    cfg = Config.fromfile(config)
    cfg.model.test_cfg.update(score_thr=0.0, max_per_img=20)
    cfg.dump(tmp_path / 'low.py')
    path = tmp_path / 'a.onnx'
    arguments = tmp_path / 'low.py', checkpoint, path, '--format', 'onnx'
    options = '--boxes', '--image-size', 64, 96
    assert run_tool('reparam', *arguments, *options) == 0
    tall = config.parent / 'data' / 'train' / 'flower_0.jpg'
    filling = tmp_path / 'filling.png'  # the file's size, times one and a half
    with Image.open(tall) as photograph:
        photograph.resize((144, 96)).save(filling)
    theirs = predict(Source(cfg, checkpoint), filling).pred_instances
    mine = predict(Source(cfg, str(path)), filling).pred_instances
    assert len(mine) == len(theirs) == 20
    assert (mine.scores - theirs.scores).abs().max() < 1e-4
    near = (mine.bboxes[:, None] - theirs.bboxes).abs().amax(-1)
    # Scores of a network that is hardly trained lie close to each other.
    assert (near.amin(1) < 0.01).float().mean() >= 0.9
    mine = predict(Source(cfg, str(path)), tall).pred_instances
    with Image.open(tall) as photograph:
        width, height = photograph.size
    assert height > width and len(mine) == 20
    assert mine.bboxes[:, 0::2].max() <= width + 0.01
    assert height / 2 < mine.bboxes[:, 1::2].max() <= height + 0.01


def test_default_size_holds_wide_and_tall_images(own):
    """64 x 81 and 71 x 64 pixels, and the preprocessor pads to 32."""
    cfg = Config.fromfile(own('detection')[0])
    model = build_model(cfg)
    assert default_size(cfg, model) == (96, 96)
    first = calibration_images(cfg, model, 1, 'test')
    assert first.shape[-2:] == (96, 64)
    model.data_preprocessor.pad_size_divisor = 1
    assert default_size(cfg, model) == (71, 81)
    # Images to calibrate with that do not fit are passed over.
    few = calibration_images(cfg, model, 4, 'test', (64, 96))
    assert 0 < len(few) < 4 and few.shape[-2:] == (64, 96)
    with pytest.raises(UserError, match='or none for the smallest that hol'):
        calibration_images(cfg, model, 4, 'test', (32, 32))


def train(config, folder, *options):
    """Refused before anything is written."""
    work = folder / 'refused'
    code = run_tool(
        'train', config, '--work-dir', work, '--cfg-options', *options
    )
    assert not list(work.rglob('*.pth'))
    return code


LOADER = 'train_dataloader.dataset'
#: What the config and the files say, before anything is built.
WRONG = {
    'no folder': (
        'detection',
        [f'{LOADER}.data_root=nowhere'],
        f'{LOADER}.data_root names nowhere, which is no folder; name yours '
        f'by --cfg-options {LOADER}.data_root=FOLDER',
    ),
    'no annotations': (
        'detection',
        [f'{LOADER}.ann_file=a.json'],
        f'{LOADER}.ann_file names *a.json, which does not exist (within '
        f'data_root *); name yours by --cfg-options {LOADER}.ann_file=FILE',
    ),
    'no annotations for the evaluator': (
        'detection',
        ['val_evaluator.ann_file=a.json'],
        'val_evaluator.ann_file names a.json, which does not exist; *',
    ),
    'no images': (
        'detection',
        [f'{LOADER}.data_prefix.img=b/'],
        f'{LOADER}.data_prefix.img names *b/, which is no folder; name *',
    ),
    'too many classes': (
        'detection',
        ['model.bbox_head.num_classes=1'],
        f'{LOADER} has 2 classes, but model.bbox_head has num_classes=1; set '
        'it by --cfg-options model.bbox_head.num_classes=2',
    ),
    'another name': (
        'detection',
        [f'{LOADER}.metainfo.classes="(Flower,temple)"'],
        f"{LOADER}.metainfo.classes names 'Flower', which *train.json does "
        "not have; it has 'temple', 'flower'",
    ),
    'too many classes of images': (
        'classification',
        ['model.head.num_classes=1'],
        f'{LOADER} has 2 classes, but model.head has num_classes=1; *',
    ),
    'too few folders': (
        'classification',
        [f'{LOADER}.metainfo.classes="(a,b,c)"', 'model.head.num_classes=3']
        + ['model.data_preprocessor.num_classes=3'],
        f'{LOADER}.metainfo.classes has 3 names, but *train has 2 folders: '
        "'flower', 'temple'",
    ),
    'folders in another order': (
        'classification',
        [f'{LOADER}.metainfo.classes="(temple,flower)"'],
        f"{LOADER}.metainfo.classes names 'temple', 'flower', but the "
        "folders are counted in alphabetical order: 'flower', 'temple'",
    ),
    'too many classes of pixels': (
        'segmentation',
        ['model.decode_head.num_classes=1'],
        f'{LOADER} has 2 classes, but model.decode_head has num_classes=1; *',
    ),
}
#: What shows once the data sets are built.
BUILT = {
    'images elsewhere': (
        'detection',
        [f'{LOADER}.data_prefix.img=val/'],
        f'{LOADER} has an image that does not exist: *.jpg; set '
        f'{LOADER}.data_root or {LOADER}.data_prefix.img',
    ),
    'another ending': (
        'segmentation',
        [f'{LOADER}.img_suffix=.jpeg'],
        'the data set BaseSegDataset is empty: no image that ends in .jpeg '
        'in *images/train/*, *labels/train/*; set data_root, ann_file and *',
    ),
    'no label maps': (
        'segmentation',
        [f'{LOADER}.seg_map_suffix=_labels.png'],
        f'{LOADER} has an image that does not exist: *_labels.png; set *',
    ),
}


@pytest.fixture(scope='module')
def configs(tmp_path_factory):
    """From a task to its config; its data set must not be changed."""
    return functools.cache(
        lambda task: own_config(task, tmp_path_factory.mktemp(task))
    )


def assert_says(line, message):
    pattern = '.*'.join(map(re.escape, message.split('*')))
    assert re.fullmatch(pattern, line), line


@pytest.mark.parametrize('case', WRONG)
def test_mistakes_in_a_config_are_refused(case, configs):
    task, options, message = WRONG[case]
    cfg = Config.fromfile(configs(task))
    mmdbb.check_data(cfg)
    options = [option.replace('"', '') for option in options]
    cfg.merge_from_dict(parsed_options(options))
    with pytest.raises(UserError) as error:
        mmdbb.check_data(cfg)
    assert_says(str(error.value), message)


@pytest.mark.parametrize('case', BUILT)
def test_mistakes_are_refused_before_the_training(
    case, configs, tmp_path, capfd
):
    task, options, message = BUILT[case]
    assert train(configs(task), tmp_path, *options) == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert_says(line, f'train.py: {message}')


def test_the_command_refuses_before_it_builds(configs, tmp_path, capfd):
    task, options, message = WRONG['too many classes']
    assert train(configs(task), tmp_path, *options) == 2
    error = capfd.readouterr().err.strip()
    assert_says(error.splitlines()[-1], f'train.py: {message}')
    assert not list((tmp_path / 'refused').rglob('*'))


def test_a_data_set_without_boxes_is_refused(tmp_path, capfd):
    config = own_config('detection', tmp_path)
    path = tmp_path / 'data' / 'train.json'
    content = json.loads(path.read_text())
    content['annotations'] = []
    path.write_text(json.dumps(content))
    assert train(config, tmp_path, 'val_interval=1') == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f'{LOADER} is empty: none of the 8 images in {path} has a' in line
    path.write_text('[')
    assert train(config, tmp_path, 'val_interval=1') == 2
    assert 'which is no JSON file' in capfd.readouterr().err


def test_labels_beyond_the_classes_are_refused(tmp_path, capfd):
    """Masks are often painted with 255 for what is there."""
    config = own_config('segmentation', tmp_path)
    for path in (tmp_path / 'data/labels/train').iterdir():
        with Image.open(path) as image:
            pixels = np.asarray(image) * 254
        Image.fromarray(pixels).save(path)
    assert train(config, tmp_path, 'randomness.seed=0') == 2
    line = capfd.readouterr().err.strip().splitlines()[-1]
    assert f'{LOADER} has 2 classes, and pixels of ' in line
    assert line.endswith('the labels 254; labels must lie between 0 and 1')


def test_any_runner_can_check(tmp_path):
    """By a function before it is built, and by a hook."""
    config = own_config('classification', tmp_path)
    cfg = Config.fromfile(config)
    cfg.work_dir = str(tmp_path / 'work')
    mmdbb.check_data(cfg)
    cfg.custom_hooks = [dict(type='DataCheckHook')]
    for image in (tmp_path / 'data/train/flower').iterdir():
        image.rename(image.with_suffix('.txt'))
        break
    lines = tmp_path / 'data/list.txt'
    lines.write_text('flower/none.jpg 0\ntemple/china_0.jpg 5\n')
    cfg.train_dataloader.dataset.ann_file = 'list.txt'
    runner = Runner.from_cfg(cfg)
    with pytest.raises(UserError, match='does not exist: .*none.jpg; set'):
        runner.train()
    lines.write_text('temple/china_0.jpg 5\n')
    cfg.experiment_name = 'another'
    runner = Runner.from_cfg(cfg)
    with pytest.raises(UserError, match='labels have the labels 5; labels'):
        runner.train()
    cfg.train_dataloader.dataset.data_root = 'nowhere'
    with pytest.raises(UserError, match='nowhere, which is no folder'):
        mmdbb.check_data(cfg)


@pytest.mark.skipif(os.name != 'posix', reason='of Unix')
def test_a_work_folder_that_cannot_be_written(tmp_path, capfd):
    config = own_config('classification', tmp_path)
    for folder in ('/proc/x', str(config)):
        assert run_tool('train', config, '--work-dir', folder) == 2
        line = capfd.readouterr().err.strip().splitlines()[-1]
        assert line.startswith(f'train.py: cannot write to {folder}: ')
        assert line.endswith('; choose another --work-dir')
