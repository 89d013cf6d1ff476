"""Each private part of a host that mmdbb relies on is still there.

What fails here names what a new version of a host has changed; the function
of the same name in `mmdbb/mm/host_internals.py` is where to follow it.
"""

import contextlib
import copy
import inspect
import logging
import os
import pickle
import re
import sys

import mmdet.models  # noqa: F401  (registers)
import mmengine.dist.utils
import mmpretrain.models
import numpy as np
import pytest
import torch
from mmcv.cnn import ConvModule, build_conv_layer, fuse_conv_bn
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.dataset import BaseDataset
from mmengine.evaluator import Evaluator
from mmengine.hooks import CheckpointHook, Hook
from mmengine.logging import HistoryBuffer, MessageHub, MMLogger
from mmengine.model import (
    BaseDataPreprocessor,
    BaseModel,
    BaseModule,
    ImgDataPreprocessor,
)
from mmengine.optim import (
    ConstantLR,
    DefaultOptimWrapperConstructor,
    OptimWrapper,
)
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader, Runner
from mmengine.runner import checkpoint as host_checkpoint
from mmengine.visualization import Visualizer
from mmpretrain.models import EfficientNet, ResNet
from mmseg.models.decode_heads import PointHead
from torch import nn
from torch.utils.data import DataLoader, Dataset

from mmdbb.blocks import DBB
from mmdbb.mm import host_internals
from mmdbb.mm.host_loading import load_for_mmengine, load_url
from mmdbb.ports import PORTS


class Numbers(Dataset):
    def __init__(self, count=4):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return dict(inputs=torch.tensor([float(index)]))


class Model(BaseModel):
    """What a runner needs of one."""

    def __init__(self):
        super().__init__(BaseDataPreprocessor())
        self.linear = nn.Linear(1, 1)

    def forward(self, inputs, mode='tensor'):
        y = self.linear(inputs).square().mean()
        return dict(loss=y) if mode == 'loss' else [y.item()]


class Score(Evaluator):
    """An evaluator whose figure grows."""

    def __init__(self):
        super().__init__([])
        self.count = 0

    def process(self, data_samples, data_batch=None):
        pass

    def evaluate(self, size):
        self.count += 1
        return dict(score=float(self.count))


def runner_in(folder, **changes):
    settings = dict(
        model=Model(),
        work_dir=str(folder),
        train_dataloader=DataLoader(Numbers(), batch_size=2),
        train_cfg=dict(by_epoch=True, max_epochs=3, val_interval=1),
        optim_wrapper=OptimWrapper(
            torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
        ),
        val_dataloader=DataLoader(Numbers(), batch_size=2),
        val_cfg=dict(),
        val_evaluator=Score(),
        test_dataloader=DataLoader(Numbers(), batch_size=2),
        test_cfg=dict(),
        test_evaluator=Score(),
        default_hooks=dict(logger=None),
        log_level='ERROR',
        experiment_name=f'test_{id(folder)}_{len(os.listdir(folder))}',
    )
    return Runner(**{**settings, **changes})


# The lower storey


def test_is_init_rule():
    seen = []

    class Watching(nn.Module):
        def apply(self, fn):
            seen.append(fn)
            return super().apply(fn)

    class Net(BaseModule):
        def __init__(self):
            super().__init__(
                dict(type='Constant', val=1.0, layer='BatchNorm2d')
            )
            self.norm = Watching()

    Net().init_weights()
    assert seen and all(map(host_internals.is_init_rule, seen))
    assert not host_internals.is_init_rule(nn.Module.eval)


def test_history():
    made = host_internals.history(5, np.array([1.0, 3.0]), np.array([1, 1]))
    expected = HistoryBuffer([1.0, 3.0], [1, 1], max_length=5)
    assert vars(made).keys() == vars(expected).keys()
    assert made.mean() == expected.mean() == 2
    made.update(5.0)
    assert made.current() == 5


def test_classes_in_checkpoints():
    for name, kind in PORTS.classes.items():
        assert f'{kind.__module__}.{kind.__qualname__}' == name
    text = pickle.dumps(HistoryBuffer(), 0).decode()
    assert 'mmengine.logging.history_buffer' in text


def test_refuse_wrong_fusion():
    model = nn.Sequential(
        nn.Conv2d(4, 4, 1), DBB(4, 4, 3, padding=1), nn.BatchNorm2d(4)
    ).eval()
    with pytest.raises(ValueError, match='merge first'):
        fuse_conv_bn(model)
    names = {'module', 'last_conv', 'last_conv_name'}
    assert names <= set(fuse_conv_bn.__code__.co_varnames)
    fused = fuse_conv_bn(nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)))
    assert isinstance(fused[1], nn.Identity)


def test_builds_conv_layer():
    callers = []

    class Seen(nn.Module):
        def __init__(self):
            super().__init__()
            callers.append(host_internals.builds_conv_layer(sys._getframe(1)))

    build_conv_layer(dict(type=Seen))
    Seen()
    assert callers == [True, False]


def test_default_conv_type():
    class Own(EfficientNet):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)

    for kind, expected in (
        (EfficientNet, 'Conv2dAdaptivePadding'),
        (Own, 'Conv2dAdaptivePadding'),
        (PointHead, 'Conv1d'),
        (ResNet, None),
        (nn.Conv2d, None),
    ):
        assert host_internals.default_conv_type(kind) == expected


def test_replaced_layer():
    seen = []

    class Layer(nn.Conv2d):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            seen.append(
                host_internals.replaced_layer(
                    lambda layer: layer.get('type') is Layer
                )
            )

    owned = dict(type=Layer)
    EfficientNet('b0', conv_cfg=owned)
    assert set(seen) == {('EfficientNet', 'Conv2dAdaptivePadding', False)}
    seen.clear()
    ConvModule(4, 4, 3, conv_cfg=owned)
    ConvModule(4, 4, 3, conv_cfg=owned, with_spectral_norm=True)
    assert seen == [('', 'Conv2d', False), ('ConvModule', 'Conv2d', True)]


def test_log():
    logger = MMLogger.get_instance('test_log', logger_name='test_log')
    said = []

    class Listening(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())

    logger.addHandler(Listening())
    host_internals.log('a word')
    assert said == ['a word']


def test_cure_config_bases(monkeypatch):
    assert 'mmseg' in MODULE2PACKAGE
    monkeypatch.setitem(MODULE2PACKAGE, 'mmseg', 'mmsegmentation')
    monkeypatch.setattr(host_internals, 'is_installed', lambda name: False)
    host_internals.cure_config_bases()
    path = 'pspnet/pspnet_r50-d8_4xb2-40k_cityscapes-512x1024.py'
    config = Config.fromstring(f"_base_ = 'mmseg::{path}'", '.py')
    assert config.model.decode_head.type == 'PSPHead'


# Methods of single objects


def test_replaced():
    model = Model()
    with host_internals.replaced(model, 'init_weights', lambda: 'ours'):
        assert model.init_weights() == 'ours'
    assert 'init_weights' not in vars(model)
    host_internals.take_back(model, 'init_weights')
    with pytest.raises(AttributeError):
        host_internals.replace(model, 'no_such_method', print)


@pytest.mark.parametrize(
    'owner, name',
    [
        (BaseModel, 'parse_losses'),
        (BaseModule, 'init_weights'),
        (Runner, 'resume'),
        (mmpretrain.models.BaseClassifier, 'extract_feat'),
    ],
)
def test_methods_that_are_replaced_are_called(owner, name):
    assert callable(getattr(owner, name))
    # By attribute, of the object, and so ours.
    callers = dict(
        parse_losses=BaseModel.train_step,
        init_weights=Runner._init_model_weights,
        resume=Runner.load_or_resume,
        extract_feat=mmpretrain.models.ImageClassifier.predict,
    )
    assert f'.{name}(' in inspect.getsource(callers[name])


# Checkpoints


def test_replace_readers(monkeypatch):
    assert CheckpointLoader._schemes[''] is load_for_mmengine
    assert host_checkpoint.load_url is load_url
    asked = []
    monkeypatch.setattr(
        host_checkpoint, 'load_url', lambda url, **kw: asked.append(url)
    )
    CheckpointLoader.load_checkpoint('https://example.invalid/a.pth')
    CheckpointLoader.load_checkpoint('torchvision://resnet18')
    assert len(asked) == 2


def test_loaded_state(tmp_path):
    runner = runner_in(tmp_path)
    state = runner.model.state_dict()
    wrapped = {f'module.{k}': torch.ones_like(v) for k, v in state.items()}
    torch.save(dict(state_dict=wrapped), tmp_path / 'wrapped.pth')
    runner.load_checkpoint(str(tmp_path / 'wrapped.pth'), strict=True)
    assert runner.model.linear.weight.item() == 1
    found = host_internals.loaded_state(dict(state_dict=wrapped))
    assert found.keys() == state.keys()


def test_removing_last(tmp_path):
    """Old files go after new ones are there; names, folder, pointer, notes."""
    events = []

    class Watching(host_internals.RemovingLast):
        def before_train(self, runner):
            super().before_train(runner)
            backend, save = self.file_backend, runner.save_checkpoint
            remove = backend.remove

            def removing(path):
                events.append(('remove', os.path.basename(path)))
                remove(path)

            def saving(out_dir, filename, *args, **kwargs):
                events.append(('save', filename))
                save(out_dir, filename, *args, **kwargs)

            backend.remove, runner.save_checkpoint = removing, saving

    hook = Watching(
        interval=1, max_keep_ckpts=1, save_best='score', rule='greater'
    )
    runner = runner_in(
        tmp_path, default_hooks=dict(checkpoint=hook, logger=None)
    )
    runner.train()
    removed = [name for what, name in events if what == 'remove']
    assert {'epoch_1.pth', 'epoch_2.pth'} <= set(removed)
    assert 'best_score_epoch_1.pth' in removed
    for name in removed:
        place = events.index(('remove', name))
        kind = 'best' if name.startswith('best') else 'epoch'
        number = int(re.search(r'(\d+)\.pth', name)[1])
        new = re.sub(r'\d+\.pth', f'{number + 1}.pth', name)
        assert ('save', new) in events[:place], (kind, events)
    assert host_internals.TEMPLATES[0].format(3) in os.listdir(tmp_path)
    pointer = (tmp_path / host_internals.POINTER).read_text()
    assert os.path.basename(pointer) == 'epoch_3.pth'
    assert hook.out_dir == host_internals.checkpoint_folder(str(tmp_path))

    best = host_internals.best_checkpoints(runner)
    path, score = best['']
    assert os.path.basename(path) == 'best_score_epoch_3.pth' and score == 3
    host_internals.forget_best(runner, '')
    assert host_internals.best_checkpoints(runner) == {}

    content = load_for_mmengine(str(tmp_path / 'epoch_3.pth'))
    assert host_internals.is_hub_state(content['message_hub'])
    assert {'epoch', 'iter', 'seed', 'cfg'} <= set(content['meta'])
    assert content['message_hub']['runtime_info']['keep_ckpt_ids'] == [3]


def test_checkpoint_folder(tmp_path):
    hook = CheckpointHook(out_dir=str(tmp_path / 'out'), save_last=False)
    runner = runner_in(
        tmp_path, default_hooks=dict(checkpoint=hook, logger=None)
    )
    runner.call_hook('before_train')
    assert hook.out_dir == host_internals.checkpoint_folder(
        runner.work_dir, str(tmp_path / 'out')
    )


def test_templates():
    for by_epoch, template in zip((True, False), host_internals.TEMPLATES):
        hook = CheckpointHook(by_epoch=by_epoch)
        assert hook.filename_tmpl == template


def test_is_hub_state():
    hub = MessageHub.get_instance('test_is_hub_state')
    hub.update_scalar('loss', 1.0)
    state = hub.state_dict()
    assert host_internals.is_hub_state(state)
    assert set(state) == {'log_scalars', 'runtime_info', 'resumed_keys'}
    assert not host_internals.is_hub_state(dict(state, log_scalars=None))


def test_scheduler_counts():
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), 0.1)
    state = ConstantLR(optimizer, factor=0.5).state_dict()
    for name in (*host_internals.SCHEDULER_COUNTS, 'base_values'):
        assert name in state


# Runners


def test_drop_hooks(tmp_path):
    seen = []

    class Watching(Hook):
        def before_test(self, runner):
            seen.append('before_test')

    runner = runner_in(tmp_path, custom_hooks=[Watching()])
    runner.test_loop.run()
    assert seen == ['before_test']
    runner = runner_in(tmp_path, custom_hooks=[Watching()])
    host_internals.drop_hooks(runner)
    assert runner.test_loop.run() == dict(score=1.0)
    assert seen == ['before_test']


def test_name_run(tmp_path):
    first = Visualizer.get_instance('kept', save_dir=str(tmp_path / 'a'))
    again = Visualizer.get_instance('kept', save_dir=str(tmp_path / 'b'))
    assert again is first  # why each run needs a name of its own
    cfg = Config(dict())
    host_internals.name_run(cfg, 'test_name_run')
    runner = runner_in(
        tmp_path,
        visualizer=dict(cfg.visualizer),
        experiment_name=cfg.experiment_name,
    )
    assert runner.visualizer.instance_name == 'test_name_run'


def test_resume_within(tmp_path):
    runner = runner_in(tmp_path, default_hooks=dict(logger=None), resume=True)
    runner._load_from = 'nowhere.pth'
    seen = []

    @contextlib.contextmanager
    def context(path):
        seen.append(path)
        try:
            yield
        except FileNotFoundError:
            seen.append('failed inside')
            raise

    host_internals.resume_within(runner, context)
    with pytest.raises(FileNotFoundError):
        runner.load_or_resume()
    assert seen == ['nowhere.pth', 'failed inside']


def test_give_dataset():
    loader = DataLoader(Numbers(), batch_size=4)
    with pytest.raises(ValueError):
        loader.dataset = Numbers(2)  # why it takes more than that
    host_internals.give_dataset(loader, Numbers(2))
    (batch,) = DataLoader(loader.dataset, batch_size=4)
    assert len(batch['inputs']) == len(loader.dataset) == 2


def test_is_building(tmp_path):
    runner = runner_in(tmp_path)
    with pytest.raises(KeyError) as found:
        runner.build_model(dict(type='NoSuchModel'))
    assert host_internals.is_building(found.value)
    with pytest.raises(ValueError) as found:
        int('no number')
    assert not host_internals.is_building(found.value)


@pytest.mark.parametrize('launcher', host_internals.LAUNCHED)
def test_launched(launcher):
    source = inspect.getsource(mmengine.dist.utils)
    assert f"os.environ['{host_internals.LAUNCHED[launcher]}']" in source
    assert f'_init_dist_{launcher}' in source


def test_det_tta_model():
    assert host_internals.DET_TTA_MODEL in MODELS.module_dict


# Configs


def test_notes_of_configs():
    cfg = Config(dict(a=1))
    host_internals.make_note(cfg, '_note', {'x'})
    assert host_internals.note_of(cfg, '_note') == {'x'}
    assert host_internals.note_of(copy.deepcopy(cfg), '_note') == {'x'}
    assert host_internals.note_of(cfg, '_other', 0) == 0
    assert cfg.to_dict() == dict(a=1) and '_note' not in cfg.pretty_text


def test_forget_filename(tmp_path):
    path = tmp_path / 'config.py'
    path.write_text('a = 1\n')
    cfg = Config.fromfile(path)
    assert cfg.filename
    host_internals.forget_filename(cfg)
    assert cfg.filename is None and cfg.to_dict() == dict(a=1)


def test_files_in_text(tmp_path):
    (tmp_path / 'base.py').write_text('a = 1\n')
    path = tmp_path / 'config.py'
    path.write_text("_base_ = './base.py'\n")
    found = host_internals.files_in_text(Config.fromfile(path))
    assert {os.path.basename(name) for name in found} == {
        'base.py',
        'config.py',
    }
    assert host_internals.files_in_text(Config(dict())) == set()


# Starts


def test_initialization():
    states, order = [], []

    class Child(BaseModule):
        def init_weights(self):
            order.append('child')
            super().init_weights()

    class Net(BaseModule):
        def __init__(self):
            super().__init__()
            self.child = Child()

        def init_weights(self):
            super().init_weights()

    class Outer(BaseModule):
        def __init__(self):
            super().__init__()
            self.net = Net()

        def init_weights(self):
            states.append(host_internals.is_initializing(self.net))
            super().init_weights()

    class Watching(Net):
        def init_weights(self):
            states.append(host_internals.is_initializing(self))
            host_internals.shared_notes(self)['ours'] = 1
            assert host_internals.shared_notes(self.child) == (
                host_internals.shared_notes(self)
            )
            host_internals.initialize_children(self)
            super().init_weights()

    outer = Outer()
    outer.net = Watching()
    outer.init_weights()
    assert states == [False, True]
    assert order == ['child']  # not again
    assert not host_internals.is_initializing(outer.net)
    assert host_internals.shared_notes(outer.net) == {}


def test_say_pretrained():
    """What zero_init_residual asks for."""
    model = mmpretrain.models.ResNet(18, zero_init_residual=True)
    host_internals.say_pretrained(model, 'somewhere.pth')
    model.is_init = True  # nothing is read
    before = model.layer1[0].bn2.weight.clone()
    model.init_weights()
    assert torch.equal(model.layer1[0].bn2.weight, before)
    model.init_cfg = None
    model.init_weights()
    assert not model.layer1[0].bn2.weight.any()


# Images


def test_channel_order():
    from mmdet.models import DetDataPreprocessor
    from mmpretrain.models import ClsDataPreprocessor
    from mmseg.models import SegDataPreProcessor

    mean = dict(mean=[0, 0, 0], std=[1, 1, 1])
    for make in (
        lambda to_rgb: ClsDataPreprocessor(to_rgb=to_rgb, **mean),
        lambda to_rgb: DetDataPreprocessor(bgr_to_rgb=to_rgb, **mean),
        lambda to_rgb: SegDataPreProcessor(bgr_to_rgb=to_rgb, **mean),
        lambda to_rgb: ImgDataPreprocessor(bgr_to_rgb=to_rgb, **mean),
    ):
        assert host_internals.channel_order(make(True)) == 'RGB'
        assert host_internals.channel_order(make(False)) == 'BGR'
    assert host_internals.channel_order(None) is None


# What is overridden where a backbone or a constructor is made


def test_methods_that_are_overridden_are_called():
    """Exceptions of `test_layout.py`: the hosts must still call them."""
    constructor = DefaultOptimWrapperConstructor.__init__
    assert 'self._validate_cfg()' in inspect.getsource(constructor)
    repvgg = mmpretrain.models.RepVGG
    assert 'self._make_stage(' in inspect.getsource(repvgg.__init__)
    parameters = inspect.signature(repvgg._make_stage).parameters
    assert list(parameters) == [
        'self',
        'in_channels',
        'out_channels',
        'num_blocks',
        'stride',
        'dilation',
        'next_create_block_idx',
        'init_cfg',
    ]
    for backbone in ('ResNet', 'VGG', 'RepVGG'):
        kind = getattr(mmpretrain.models, backbone)
        assert callable(kind._freeze_stages)


# Detectors and data sets


def test_heads_that_find_boxes_as_mmdets_own_do():
    from detectors import detector

    for name in ('RetinaNet', 'FCOS', 'RTMDet'):
        head = detector(name).bbox_head
        assert host_internals.decodes_as_mmdet(head)
        assert not host_internals.is_rpn(head)
    model = detector('FasterRCNN')
    assert host_internals.is_rpn(model.rpn_head)
    assert host_internals.decodes_as_mmdet(model.rpn_head)
    assert host_internals.decodes_as_mmdet(model.roi_head)
    for head, name in (
        (model.rpn_head, '_predict_by_feat_single'),
        (model.roi_head, 'predict_bbox'),
        (model.roi_head.bbox_head, 'predict_by_feat'),
    ):
        kind = head.__class__
        head.__class__ = type('Own', (kind,), {name: lambda self: None})
        outer = model.roi_head if head is not model.rpn_head else head
        assert not host_internals.decodes_as_mmdet(outer)
        head.__class__ = kind


def test_data_sets_without_images():
    class Empty(BaseDataset):
        def load_data_list(self):
            return []

    with pytest.raises(ValueError) as error:
        Empty()
    assert isinstance(host_internals.empty_dataset(error.value), Empty)
    with pytest.raises(ValueError) as error:
        np.concatenate([])
    assert host_internals.empty_dataset(error.value) is None
    assert host_internals.empty_dataset(KeyError('key')) is None


def test_loaders_that_are_built(tmp_path):
    runner = runner_in(tmp_path)
    assert host_internals.built_loader(runner, 'train_dataloader') is None
    loop = runner.train_loop
    found = host_internals.built_loader(runner, 'train_dataloader')
    assert found is loop.dataloader and isinstance(found, DataLoader)
