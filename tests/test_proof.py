"""Right merges are proven, wrong ones refused, whatever the network does."""

import copy

import pytest
import torch
from helpers import image, randomize
from torch import nn

from mmdbb import DBB, reparameterize
from mmdbb.errors import UserError
from mmdbb.proof import DOUBLE, SINGLE, own_rounding, prove_equal

BATCH = image(2, 3, 12, 10)


class Net(nn.Module):
    """A detector: a backbone, and one head of blocks."""

    def __init__(self, head):
        super().__init__()
        self.backbone = DBB(3, 4, 3, padding=1)
        self.bbox_head = head

    def extract_feat(self, images):
        return torch.relu(self.backbone(images))


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = DBB(4, 4, 3, padding=1)

    def forward(self, features):
        return self.conv(features)


class Jumps(Head):
    """As SOLO, which asks whether two values are equal to the last bit."""

    def forward(self, features):
        y = self.conv(features)
        return y, (y / 49 * 49 == y).to(y) * y


class Sorts(Head):
    """As a two-stage detector: the length depends on the last bit."""

    def forward(self, features):
        y = self.conv(features)
        return y[y / 49 * 49 == y]


class Single(Head):
    """As Conditional DETR: its own float32 meets weights in float64."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(4, 2)

    def forward(self, features):
        y = self.conv(features)
        return self.fc(torch.ones(1, 4)) * y.mean()


class Chaos(nn.Module):
    """Amplifies rounding, as a deep network after few iterations."""

    def __init__(self, gain):
        super().__init__()
        self.conv, self.gain = DBB(3, 4, 3, padding=1), gain

    def forward(self, x):
        y = self.conv(x)
        return torch.sin(self.gain * y) + y


def pair(model, **harm):
    model = randomize(model.double()).eval()
    merged = reparameterize(model)
    for name, by in harm.items():
        merged.get_submodule(name.replace('__', '.')).bias.data.add_(by)
    return model, merged


def test_sharp():
    for head in (Head(), Jumps(), Sorts(), Single()):
        model, merged = pair(Net(head))
        difference = prove_equal(model, merged, [BATCH])
        assert difference.largest < 1e-12 or isinstance(head, Single)
    for name in ('backbone', 'bbox_head__conv'):
        model, merged = pair(Net(Head()), **{name: 1e-8})
        with pytest.raises(UserError, match='tolerance 1e-09'):
            prove_equal(model, merged, [BATCH])
        assert prove_equal(model, merged, [BATCH], tolerance=1e-3)


@pytest.mark.parametrize('head', [Jumps, Sorts])
def test_a_head_that_jumps_is_left_out(head):
    model, merged = pair(Net(head()))
    difference = prove_equal(model, merged, [BATCH])
    name = 'bbox_head.1' if head is Jumps else 'bbox_head'
    assert list(difference.left_out) == [name]
    assert 'rounding its blocks alone moves it' in difference.left_out[name]
    assert {'features', 'bbox_head.conv', 'backbone'} <= {*difference.compared}
    assert difference.tolerance == 1e-9


@pytest.mark.parametrize('harmed', ['backbone', 'bbox_head__conv'])
def test_a_wrong_merge_of_a_head_that_jumps_is_refused(harmed):
    model, merged = pair(Net(Jumps()), **{harmed: 1e-8})
    with pytest.raises(UserError, match='differs by'):
        prove_equal(model, merged, [BATCH])


class Wired(Jumps):
    """All layers are right, but the merged head computes something else."""

    wrong = False

    def forward(self, features):
        y, jumps = super().forward(features)
        return jumps + (y if self.wrong else 0)


def test_a_wrongly_wired_head_that_jumps_is_refused():
    model, merged = pair(Net(Wired()))
    assert prove_equal(model, merged, [BATCH]).left_out
    merged.bbox_head.wrong = True
    with pytest.raises(UserError, match='in bbox_head'):
        prove_equal(model, merged, [BATCH])


class NaiveSyncBatchNorm2d(nn.BatchNorm2d):
    """As mmdet3d's: shares statistics in its own way, in float32 only."""

    def forward(self, x):
        assert x.dtype == torch.float32, f'float32, not {x.dtype}'
        return super().forward(x)


class SyncBatchNormReLU(nn.BatchNorm2d):
    """A norm with an activation, in any precision."""

    def forward(self, x):
        return super().forward(x).relu()


class NaiveSyncBatchNormReLU(NaiveSyncBatchNorm2d):
    """A norm with an activation, in float32 only."""

    def forward(self, x):
        return super().forward(x).relu()


class SyncNormed(Head):
    """A block, and a norm that its bias goes into."""

    def __init__(self):
        super().__init__()
        self.norm = NaiveSyncBatchNorm2d(4)

    def forward(self, features):
        return self.norm(self.conv(features))


def test_a_norm_that_asks_for_float32_runs_in_float64():
    norms = {'bbox_head.conv': ('bbox_head.norm',)}
    model, merged = pair(Net(SyncNormed()))
    difference = prove_equal(model, merged, [BATCH], norms=norms)
    assert difference.largest < 1e-12 and not difference.left_out
    assert {'bbox_head', 'bbox_head.conv'} <= {*difference.compared}
    model, merged = pair(Net(SyncNormed()), bbox_head__norm=1e-8)
    with pytest.raises(UserError, match='in bbox_head'):
        prove_equal(model, merged, [BATCH], norms=norms)
    # A norm that computes more than its base is no such norm.
    model, merged = pair(Net(SyncNormed()))
    model.bbox_head.norm.__class__ = SyncBatchNormReLU
    with pytest.raises(UserError, match='in bbox_head'):
        prove_equal(model, merged, [BATCH], norms=norms)
    model.bbox_head.norm.__class__ = NaiveSyncBatchNormReLU
    with pytest.raises(AssertionError, match='float32, not'):
        prove_equal(model, merged, [BATCH], norms=norms)
    model.bbox_head.norm.__class__ = NaiveSyncBatchNorm2d
    # Afterwards the norms are again what they were.
    assert 'forward' not in vars(model.bbox_head.norm)
    with pytest.raises(AssertionError, match='float32, not'):
        model.bbox_head.norm(BATCH.double())


class Amplifies(Head):
    """Far from itself under rounding, but not as far as the tolerance."""

    wrong = 0

    def forward(self, features):
        y = torch.sin(1e3 * self.conv(features))
        y[0, 0, 0, 0] += self.wrong
        return y


def test_one_wrong_number_of_a_head_that_does_not_jump_is_refused():
    model, merged = pair(Net(Amplifies()))
    assert prove_equal(model, merged, [BATCH]).left_out == {}
    merged.bbox_head.wrong = 3e-9
    with pytest.raises(UserError, match='in bbox_head'):
        prove_equal(model, merged, [BATCH])


def test_features_never_count_as_jumping():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = Jumps()

        def extract_feat(self, images):
            return self.head(images)

    torch.manual_seed(0)
    model = Net()
    model.head.conv = DBB(3, 3, 3, padding=1)
    with pytest.raises(UserError, match='in features.1'):
        prove_equal(*pair(model), [BATCH])


def test_a_network_that_amplifies_rounding():
    model, merged = pair(Chaos(1e8))
    difference = prove_equal(model, merged, [BATCH])
    assert 1e-9 < difference.largest < difference.tolerance == 1e-5
    assert own_rounding(merged, BATCH) > 0.1
    with pytest.raises(UserError, match='more than the tolerance 1e-09'):
        prove_equal(model, merged, [BATCH], tolerance=1e-9)
    # Less than 1e-5 away, but further than rounding moves it.
    model, merged = pair(Chaos(1e5), conv=1e-11)
    with pytest.raises(UserError, match='differs by .*e-0[67] .* 1e-09'):
        prove_equal(model, merged, [BATCH])


def test_a_head_that_runs_in_float32_only():
    model, merged = pair(Net(Single()))
    difference = prove_equal(model, merged, [BATCH])
    assert difference.left_out == {} and 'bbox_head' in difference.compared
    assert difference.tolerance == SINGLE.tolerance
    assert {p.dtype for p in merged.parameters()} == {torch.float64}
    model, merged = pair(Net(Single()))
    merged.bbox_head.fc.bias.data.add_(1)
    with pytest.raises(UserError, match='1e-05 .in bbox_head'):
        prove_equal(model, merged, [BATCH])


def test_kernels_composed_in_float32():
    model = randomize(Net(Head()).double()).eval()
    merged = reparameterize(copy.deepcopy(model).float()).double()
    with pytest.raises(UserError):
        prove_equal(model, merged, [BATCH])
    difference = prove_equal(model, merged, [BATCH], exact=False)
    assert DOUBLE.tolerance < difference.largest < SINGLE.tolerance


def test_a_network_that_images_cannot_enter():
    """Each block by itself still proves the merge."""
    points = nn.Sequential(nn.Linear(5, 5), DBB(3, 4, 3))
    model, merged = pair(points)
    difference = prove_equal(model, merged, [BATCH])
    assert difference.compared == ('1',)
    assert 'RuntimeError' in difference.left_out['network']
    assert own_rounding(merged, BATCH) is None
    merged[1].bias.data.add_(1e-8)
    with pytest.raises(UserError, match='in 1'):
        prove_equal(model, merged, [BATCH])


def test_own_rounding():
    class Third(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer('third', torch.tensor(1 / 3).double() * 3)

        def forward(self, x):
            return x[:, :1, :1, :1] * 0 + 1 / 3

    found = own_rounding(Third(), BATCH)
    assert found == pytest.approx(
        abs(torch.tensor(1 / 3).double().item() - 1 / 3) * 3
    )
