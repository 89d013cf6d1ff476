"""Networks run in their own ways; what cannot be run is named."""

import pytest
import torch
from helpers import image, randomize
from mmengine.config import Config
from mmengine.registry import MODELS
from networks import SIZE
from torch import nn
from unusual import byol, detr, ocr, pointrend, sparse_rcnn

from mmdbb import DBB as Block
from mmdbb.deploy import Proof, Source, build_model, deploy_checkpoint
from mmdbb.files.checkpoints import read_checkpoint
from mmdbb.mm.data_flow import channels_of, run_on_image
from mmdbb.mm.deploy.images import data_samples, random_batch
from mmdbb.running import CannotRun, run_network, takes_other_images

pytestmark = pytest.mark.usefixtures('quiet')
BATCH = image(2, 3, *SIZE)


NETWORKS = {
    'mmdet': (detr, {'network.0', 'network.1'}, {}),
    'mmseg': (ocr, {'decode_head.0', 'network'}, {}),
    'mmseg, float32': (pointrend, {'decode_head.0', 'network'}, {}),
    'mmpretrain': (
        byol,
        {'features.0'},
        {'head': 'missing the required', 'target_net': 'more than features'},
    ),
    'mmdet, left out': (
        sparse_rcnn,
        {'features.0'},
        {'rpn_head': 'missing the required', 'roi_head': 'more than features'},
    ),
}


@pytest.mark.parametrize('name', NETWORKS)
def test_hosts_networks_deploy(tmp_path, name):
    model, outputs, left_out = NETWORKS[name]
    cfg = Config(dict(default_scope=name.split(',')[0], model=model()))
    path = str(tmp_path / 'trained.pth')
    torch.save(randomize(build_model(cfg)).state_dict(), path)
    result = deploy_checkpoint(
        Source(cfg, path),
        str(tmp_path / 'out.pth'),
        proof=Proof(image_size=SIZE),
    )
    difference = result.difference
    assert outputs <= set(difference.compared)
    assert difference.left_out.keys() == left_out.keys()
    for part, reason in left_out.items():
        assert reason in difference.left_out[part]
    # PointRend makes its points in float32.
    tolerance = 1e-5 if model is pointrend else 1e-9
    assert difference.largest < difference.tolerance == tolerance
    assert result.rounding < 1e-3
    own = read_checkpoint(result.checkpoint)['meta']['mmdbb']
    assert own['not_compared'] == dict(difference.left_out)
    assert own['own_rounding'] == result.rounding


class Parts(nn.Module):
    """A network of a backbone and heads, each given or not."""

    def __init__(self, **parts):
        super().__init__()
        self.backbone = Block(3, 4, 3, padding=1)
        for name, part in parts.items():
            self.add_module(name, part)

    def extract_feat(self, images):
        return (self.backbone(images),)


class Needy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = Block(4, 2, 3, padding=1)

    def forward(self, features, boxes):
        return self.conv(features[0])


class First(nn.Module):
    def forward(self, features):
        return features[0]


def run(model, images=BATCH):
    return run_network(model.double().eval(), images)


def test_heads_that_run_count_beside_one_that_does_not():
    model = Parts(bbox_head=Needy(), rpn_head=First(), neck=nn.ReLU())
    outputs = run(model)
    assert set(outputs.tensors) == {'features.0', 'rpn_head'}
    assert list(outputs.left_out) == ['bbox_head']
    assert (
        'TypeError: Needy.forward() missing 1' in outputs.left_out['bbox_head']
    )


def test_a_part_with_blocks_that_nothing_reaches_is_named():
    parts = dict(momentum=Needy(), queries=nn.Embedding(2, 2))
    left_out = run(Parts(**parts)).left_out
    assert list(left_out) == ['momentum']
    assert left_out['momentum'].startswith('it reads more than features; as a')


class Whole(Parts):
    def forward(self, images, samples, mode):
        assert mode == 'tensor'
        assert samples[0].metainfo['batch_input_shape'] == SIZE
        assert samples[0].gt_instances.bboxes.dtype == images.dtype
        return self.bbox_head(self.extract_feat(images), torch.rand(1))


def test_as_a_whole():
    model = Whole(bbox_head=Needy())
    outputs = run(model)
    assert set(outputs.tensors) == {'features.0', 'network'}
    assert outputs.left_out == {}


def test_random_numbers_are_the_same_and_the_callers_stay():
    class Masked(nn.Module):
        def forward(self, features):
            return torch.rand(3)

    model = Parts(head=Masked())
    torch.manual_seed(5)
    first, after = run(model), torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(1))
    second = run(model)
    assert torch.equal(first.tensors['head'], second.tensors['head'])


class Tracker(nn.Module):
    def __init__(self):
        super().__init__()
        self.detector = Parts(rpn_head=First())
        self.track_head = Needy()

    def forward(self, inputs, data_samples):
        raise NotImplementedError


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone = Block(3, 4, 3, padding=1)
        self.neck = nn.ReLU()

    def extract_feat(self, images, stage):
        raise NotImplementedError


def test_parts_of_networks_that_do_not_take_images():
    outputs = run(Tracker())
    assert set(outputs.tensors) == {'detector.features.0', 'detector.rpn_head'}
    assert set(outputs.left_out) == {'network', 'track_head'}
    outputs = run(Video())
    assert set(outputs.tensors) == {'backbone', 'neck'}
    assert 'stage' in outputs.left_out['network']
    points = nn.Sequential(nn.Linear(5, 5))
    with pytest.raises(CannotRun, match=r'images of shape \(2, 3, 64, 48\)'):
        run(points)


def test_images_of_another_size():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(63)).double()
    with pytest.raises(CannotRun):
        run(model)
    assert takes_other_images(model, BATCH)
    assert not takes_other_images(nn.Linear(5, 5).double(), BATCH)


def test_images_of_other_preprocessors():
    class Views(nn.Module):
        def forward(self, data):
            return dict(inputs=[x.float() for x in data['inputs']])

    class Points(nn.Module):
        mean, std = torch.full((3, 1, 1), 100.0), torch.full((3, 1, 1), 50.0)

        def forward(self, data):
            return data['points']

    def batch(preprocessor, channels=3):
        model = nn.Sequential(nn.Conv2d(channels, 2, 1))
        model.data_preprocessor = preprocessor
        return random_batch(model, SIZE, 0)

    plain = batch(None)
    assert plain.shape == (2, 3, *SIZE)
    assert torch.equal(batch(Views()), (plain * 255).round())
    expected = ((plain * 255).round() - 100) / 50
    assert torch.equal(batch(Points()), expected)
    assert batch(None, channels=1).shape == (2, 1, *SIZE)


def test_a_focus_reads_images_of_three_channels():
    """YOLOX's stem makes twelve channels of three."""
    model = dict(
        type='mmdet.CSPDarknet',
        widen_factor=0.125,
        deepen_factor=0.33,
        conv_cfg=dict(type='DBB'),
    )
    network = MODELS.build(model)
    assert random_batch(network, SIZE, 0).shape == (2, 3, *SIZE)
    assert channels_of(network) == 3
    assert len(run_on_image(network, SIZE)) == 3


def test_data_samples():
    first, second = data_samples(BATCH)
    assert first.img_shape == first.pad_shape == SIZE
    assert second.gt_instances.bboxes.tolist() == [[12, 16, 36, 48]]
