"""Break one line of the package at a time, and see whether a test notices.

    make mutate
    python tests/mutations.py --only moments.py 'SyncBN' --jobs 2

Each line of the table below is broken in a copy of the checkout, never in the
working tree, and the tests named beside it run there until one fails. First
all of those tests run once on the unbroken copy: a test that always fails
would kill everything.

A line that survives is code that nothing holds. Write the test that fails,
with a computation of its own, or take the line out of the package. The exit
code is 1 if a line survives, if its text is not found exactly once, or if
its tests end in any other way than by failing.
"""

import argparse
import compileall
import concurrent.futures
import importlib.util
import multiprocessing
import os
import py_compile
import queue
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Callable, NamedTuple, Tuple

ROOT = Path(__file__).resolve().parents[1]
#: Seconds after which a broken package counts as hanging.
TIMEOUT = 900
#: Exit codes of pytest, and one of ours.
PASSED, FAILED, NOT_A_COPY = 0, 1, 64
#: What takes long to import, and imports nothing of the package.
PRELOADED = ['torch', 'torchvision', 'mmcv.cnn', 'mmengine.runner', 'pytest']
LEFT_OUT = shutil.ignore_patterns(
    '.*', '__pycache__', '*.egg-info', 'build', 'dist', 'work_dirs'
)
_CONTEXT = multiprocessing.get_context('forkserver')


class Mutation(NamedTuple):
    """A line that matters.

    Attributes:
        path: The file, from the checkout's root.
        text: What is broken; it stands in the file exactly once.
        replacement: What takes its place.
        breaks: What is wrong then, in a few words.
        tests: Names of files or tests, of which one must fail.
    """

    path: str
    text: str
    replacement: str
    breaks: str
    tests: Tuple[str, ...]


GEOMETRY = 'tests/test_geometry.py'
KXK = 'tests/test_branches/test_kxk.py'
LARGE = 'tests/test_blocks/test_large_kernels.py'
UNIREPLKNET = 'tests/test_backbones/test_unireplknet.py'
FILES_OF_THEIRS = (
    'tests/test_mm/test_official.py::test_file_gives_the_recorded_output'
)
TRANSFORMS = 'tests/test_transforms.py'
KERNELS = 'tests/test_kernels.py'
BRANCHES = 'tests/test_branches/test_branches.py'
FORMS = 'tests/test_blocks/test_forms.py'
NORMS = 'tests/test_branches/test_norm.py'
BASE = 'tests/test_blocks/test_base.py'
SUM = 'tests/test_blocks/test_branch_sum.py'
FAST = 'tests/test_blocks/test_fast.py'
FAST_IS_LITERAL = f'{FAST}::test_fast_equals_literal'
CHECKPOINTING = 'tests/test_blocks/test_checkpointing.py'
MODE = 'tests/test_blocks/test_modes.py::test_mode'
PRECISION = 'tests/test_blocks/test_precision.py'
EXACT_AUTOCAST = f'{PRECISION}::test_autocast_is_as_exact_as_the_literal_sum'
PROPERTIES = 'tests/test_blocks/test_properties.py'
REFERENCE = 'tests/test_blocks/test_reference.py'
OREPA = 'tests/test_blocks/test_orepa.py'
WATCHED = 'tests/test_blocks/test_watched.py'
ONEDNN = 'tests/test_blocks/test_onednn.py'
PROCESSES = 'tests/test_blocks/test_environments.py'
SYNC = f'{PROCESSES}::test_sync_bn_in_two_processes'
PLAIN = 'tests/test_plain/test_weights.py'
REPARAM = 'tests/test_reparam.py'
INSERT = 'tests/test_insert.py'
MERGE_BACK = 'tests/test_merge_back.py'
SWEEP = 'tests/test_sweep.py'
STUDY = 'tests/test_study.py'
RUNNING = 'tests/test_mm/test_running.py'
PROOF = 'tests/test_proof.py'
OWN_BLOCKS = 'tests/test_own_blocks.py'
WITHOUT_SHIFT = 'tests/test_blocks/test_without_shift.py'
BLOCKS_HOOK = 'tests/test_engine/test_blocks_hook.py'
FUSED = 'tests/test_mm/test_fused.py'
OFFERS = 'tests/test_plain/test_offers.py'
FLOW = 'tests/test_mm/test_data_flow.py'
CONTRACT = 'tests/test_blocks/test_contract.py'
ADAPTIVE = 'tests/test_blocks/test_adaptive.py'
REPLACED = 'tests/test_mm/test_replaced.py'
OFFICIAL = 'tests/test_blocks/test_official.py'
SHARES = 'tests/test_shares.py'
REPOPT = 'tests/test_repopt.py'
BY_NAME = 'tests/test_mm/test_by_name.py'
DROP = 'tests/test_drop_branches.py'
REPORT_MEASURE = 'tests/test_report/test_measure.py'
SHARES_HOOK = 'tests/test_engine/test_branch_shares_hook.py'
MATCHING = 'tests/test_engine/test_matching.py'
MARKS = 'tests/test_engine/test_mistakes.py'

TABLE = (
    # -------------------------------------- smaller kernels, large kernels
    Mutation(
        'mmdbb/geometry.py',
        '(x.shape[dim] - 1) // step * step + 1',
        '(x.shape[dim] - 1) // step * step',
        'a crop takes an output row away',
        (f'{ONEDNN}::test_only_what_no_tap_reads_is_cropped',),
    ),
    Mutation(
        'mmdbb/branches/base.py',
        "return conv(crop_unread(x, conv, conv._parameters.get('weight')))",
        'return conv(x)',
        "oneDNN's wrong gradients reach the branches",
        (f'{ONEDNN}::test_blocks_train_on_pictures_in_channels_last',),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'span <= k and (k - span) % 2 == 0',
        'span <= k',
        'kernels whose middle lies between two taps',
        (KXK,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'c if s == 1 < k else (k - span) // 2',
        'c if s == 1 < k else (k - s) // 2',
        'where a dilated kernel begins',
        (KXK,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'pads += [before - d * first, after - d * (k - first - span)]',
        'pads += [before - d * first, after - d * (k - first)]',
        'the pads behind a smaller kernel',
        (
            GEOMETRY,
            KXK,
        ),
    ),
    Mutation(
        'mmdbb/transforms.py',
        '        span = step * (kernel.shape[axis] - 1) + 1\n        behind',
        '        span = step * kernel.shape[axis]\n        behind',
        'the zeros behind the last tap',
        (KXK,),
    ),
    Mutation(
        'mmdbb/branches/base.py',
        'd * r for d, r in zip(spec.dilation, self._dilation(spec))',
        'r for d, r in zip(spec.dilation, self._dilation(spec))',
        'a dilated kernel in a dilated block',
        (KXK,),
    ),
    Mutation(
        'mmdbb/branches/base.py',
        'kernel = dilate_kernel(kernel, dilation)',
        'kernel = dilate_kernel(kernel, (1, 1))',
        'a dilated kernel, merged',
        (KXK,),
    ),
    Mutation(
        'mmdbb/branches/kxk.py',
        'return self._size == self.spec.kernel_size',
        'return True',
        'which branch takes plain weights',
        (KXK,),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'return _is_large(branch.spec) and not branch.is_dense',
        'return _is_large(branch.spec)',
        'that a large kernel runs once',
        (LARGE,),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'if not block.spec.is_depthwise or _is_large(block.spec):',
        'if not block.spec.is_depthwise:',
        "that a large kernel's sum is not run again",
        (LARGE,),
    ),
    Mutation(
        'mmdbb/blocks/dilated.py',
        'known = [size for size in SMALL_KERNELS if size <= shorter]',
        'known = [size for size in SMALL_KERNELS if size >= shorter]',
        'which row of the table',
        (LARGE,),
    ),
    Mutation(
        'mmdbb/mm/backbones/absorbed.py',
        '        if self.absorbs_norms:\n            self._absorb',
        '        if True:\n            self._absorb',
        "UniRepLKNet's norms behind blocks",
        (UNIREPLKNET,),
    ),
    Mutation(
        'mmdbb/mm/backbones/unireplknet.py',
        'return tuple(3 if i % n else 13 for i in range(count))',
        'return tuple(13 if i % n else 3 for i in range(count))',
        'which units have large kernels',
        (UNIREPLKNET,),
    ),
    Mutation(
        'mmdbb/mm/engine/layer_decay.py',
        'scale = rate ** (count - depth - 1)',
        'scale = rate ** (count - depth)',
        'the rate of the last layer',
        (UNIREPLKNET,),
    ),
    Mutation(
        'mmdbb/mm/official/newer.py',
        "ones = name.endswith('.gamma')",
        'ones = False',
        'factors that were folded',
        (FILES_OF_THEIRS,),
    ),
    Mutation(
        'mmdbb/mm/official/newer.py',
        'and bias in state',
        'and False',
        'norms that were folded',
        (FILES_OF_THEIRS,),
    ),
    # -------------------------------------------- RepOptimizer, by name, drop
    Mutation(
        'mmdbb/gradient_map.py',
        'scales[branch.key].double().square()',
        'scales[branch.key].double().abs()',
        'gradients take the square of the scales',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/gradient_map.py',
        'matrix = branch.basis.t() @ branch.basis',
        'matrix = branch.basis.t() @ branch.basis / 2',
        'how much a spread branch adds',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/gradient_map.py',
        '            factor = factor + pattern.square()',
        '            factor = factor + 0 * pattern',
        'the identity adds 1 on the diagonal',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/gradient_map.py',
        '            weight.grad = grad\n',
        '            pass\n',
        'gradients are put back after the step',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/gradient_map.py',
        '            if group.get(NOTE) != self.digest:',
        '            if False:',
        'a state of other scales is refused',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/gradient_map.py',
        '        return args, dict(kwargs, closure=mapped)',
        '        return args, kwargs',
        'gradients that a closure computes',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/repopt.py',
        '                generator.weights[dense].copy_(conv.weight)',
        '                pass',
        'the start takes the kernel that is there',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/repopt.py',
        '        if weight in maps and not maps[weight].equals(new):',
        '        if False:',
        'two scales of one weight',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/blocks/linear.py',
        '    if not torch.allclose(_kernel(branch), expected, atol=1e-12):',
        '    if False:',
        'a branch that is not linear',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/blocks/linear.py',
        '    is_dense = torch.equal(basis, dense.double())',
        '    is_dense = len(basis) == len(dense)',
        'which branch is the whole kernel',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/blocks/linear_add.py',
        '            trained = train_scales or branch.size is None',
        '            trained = train_scales',
        'the scale of a branch without a weight is trained',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/blocks/linear_add.py',
        '        self.set_maps(self.branches)\n        return self',
        '        return self',
        'constants are exact in double precision',
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        '            and not _matches(name, self.skip)',
        '            and True',
        'layers to skip',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        '    for place in absorbed:\n        place.belong_to(new)',
        '    pass',
        'a block takes over an absorbed norm',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        '        new.requires_grad_(False)',
        '        pass',
        'a frozen layer becomes a frozen block',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        "        if form.transposed:\n            args['output_padding']",
        "        if False:\n            args['output_padding']",
        'a transposed layer keeps its output padding',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        '        and module not in tied',
        '        and True',
        'layers of one weight stay plain',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        '        and not _is_zero(module)',
        '        and True',
        'offsets that start as zero stay plain',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/by_name.py',
        '        _start_as_(new, start, layer)',
        '        pass',
        'a fixed filter starts its block',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/mm/stock/by_name.py',
        '    copy_entries_(block, plain_start(block, ',
        '    return\n    copy_entries_(block, plain_start(block, ',
        "a detector's prior starts its block",
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        '            if is_settable(self):\n                fn(self)',
        '            pass',
        'rules for a layer by its name are heard',
        (BY_NAME,),
    ),
    Mutation(
        'mmdbb/mm/outputs.py',
        "        refuse_untied(network, loaded['state_dict'], checkpoint)",
        '        pass',
        'one tensor does not hold two kernels',
        ('tests/test_mm/test_other_ways.py',),
    ),
    Mutation(
        'mmdbb/mm/stock/config.py',
        '        return {k: _without_layers(v, scope) for k',
        '        return {k: v for k',
        'blocks under any key become convolutions',
        ('tests/test_mm/test_other_ways.py',),
    ),
    Mutation(
        'mmdbb/merge_back.py',
        '        conv.requires_grad_(trains)',
        '        pass',
        'frozen layers come back frozen',
        ('tests/test_merge_back.py',),
    ),
    Mutation(
        'mmdbb/drop_branches.py',
        '    weight, norm = kernel_of(new.conv.weight, block.spec), new.norm',
        '    weight, norm = new.conv.weight, new.norm',
        'a transposed kernel has its inputs first',
        (DROP,),
    ),
    Mutation(
        'mmdbb/blocks/linear.py',
        "return kind(**spec.conv_args, **args, device='meta')."
        'preset_branches()',
        'return kind.preset_for(spec)',
        "the block's own arguments say which branches it has",
        (REPOPT,),
    ),
    Mutation(
        'mmdbb/drop_branches.py',
        '    shift = mean - bias',
        '    shift = -bias',
        'the mean that dropped branches add',
        (DROP,),
    ),
    Mutation(
        'mmdbb/drop_branches.py',
        '    tiny = size < _TINY * kernel.flatten(1).norm(dim=1)',
        '    tiny = size < 0',
        'channels without a scale',
        (DROP,),
    ),
    Mutation(
        'mmdbb/drop_branches.py',
        '        spread = (scale.square() * norm.running_var + var) / (',
        '        spread = (scale.square() * norm.running_var) / (',
        'the variance that dropped branches add',
        (DROP,),
    ),
    Mutation(
        'mmdbb/drop_branches.py',
        'if key != target and branch.share <= threshold',
        'if branch.share <= threshold',
        'the kxk branch is never dropped',
        (DROP,),
    ),
    # --------------------------------------------------------------- report
    *(
        Mutation(f'mmdbb/report/{name}.py', *change, (REPORT_MEASURE,))
        for name, change in (
            (
                'dropping',
                (
                    'tensor.sub_(value.to(tensor))',
                    'tensor.add_(value.to(tensor))',
                    'a branch is doubled, not taken out',
                ),
            ),
            (
                'dropping',
                (
                    'zip((conv.weight, conv.bias), part)',
                    'zip((conv.weight,), part)',
                    'the bias of a branch that is taken out stays',
                ),
            ),
            (
                'dropping',
                (
                    'tensor.copy_(value)',
                    'pass',
                    'a branch that was taken out does not come back',
                ),
            ),
            (
                'layers',
                (
                    'name: bias * scale for name, bias in biases.items()',
                    'name: bias for name, bias in biases.items()',
                    'biases without the norm behind the sum',
                ),
            ),
            (
                'layers',
                (
                    'folded = kernel * scale',
                    'folded = kernel + 0 * scale',
                    'ranges without the norm behind',
                ),
            ),
            (
                'layers',
                (
                    'return share.projection / share.share',
                    'return share.projection',
                    'the angle from a projection of the wrong length',
                ),
            ),
            (
                'measure',
                (
                    'pair = [double, reparameterize(double).eval()]',
                    'pair = [double, merged.double()]',
                    'a merge that was rounded is proven',
                ),
            ),
            (
                'measure',
                (
                    'found[name] = found.get(name, 0) + spent',
                    'found[name] = spent',
                    'a layer that runs twice counts once',
                ),
            ),
        )
    ),
    Mutation(
        'mmdbb/report/pieces.py',
        "return re.sub(r'`([^`]*)`', r'<code>\\1</code>', escape(text))",
        "return re.sub(r'`([^`]*)`', r'<code>\\1</code>', text)",
        'names of layers are taken for HTML',
        ('tests/test_report/test_page.py::test_hostile_names',),
    ),
    Mutation(
        'mmdbb/mm/engine/branch_shares_hook.py',
        "getattr(hooks[0], 'ema_model', None) if hooks else None",
        'runner if hooks else None',
        'the average is not what is logged',
        (SHARES_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/engine/branch_shares_hook.py',
        'if self._off or self._last == step:',
        'if self._off:',
        'one step is logged twice',
        (SHARES_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/engine/matching.py',
        'same = (objects.labels == found.labels[i]) & ~taken',
        'same = objects.labels == found.labels[i]',
        'an object is found by several boxes',
        (MATCHING,),
    ),
    Mutation(
        'mmdbb/mm/engine/matching.py',
        'order = found.scores.argsort(descending=True, stable=True).tolist()',
        'order = range(len(found.bboxes))',
        'boxes take objects in another order than by score',
        (MATCHING,),
    ),
    Mutation(
        'mmdbb/mm/engine/mistakes.py',
        'wrong = known & (truth != found)',
        'wrong = truth != found',
        'pixels of no class count as wrong',
        (MARKS,),
    ),
    Mutation(
        'mmdbb/mm/engine/mistakes.py',
        'found = found[found.scores > score]',
        'pass',
        'boxes that are not drawn count',
        (MARKS,),
    ),
    # --------------------------------------------------------------- shares
    Mutation(
        'mmdbb/shares.py',
        'name: kernel * scale.reshape(',
        'name: kernel * scale.square().reshape(',
        'the norm behind the sum, in the kernels of branches',
        (SHARES,),
    ),
    Mutation(
        'mmdbb/shares.py',
        "vars(generator)['scale'] = alone",
        'generator.scale.copy_(alone)',
        'a block that is measured keeps its scales',
        (SHARES,),
    ),
    Mutation(
        'mmdbb/shares.py',
        'projection=_ratio(float(kernel @ merged), norm**2)',
        'projection=_ratio(float(kernel @ merged), norm * length)',
        'projections add up to 1',
        (SHARES,),
    ),
    # ------------------------------------------------------------- geometry
    Mutation(
        'mmdbb/geometry.py',
        'min((k // 2, (k - 1) // 2), key',
        'min(((k - 1) // 2, k // 2), key',
        'the tie between the two middle taps',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'key=lambda tap: abs(tap * d - before)',
        'key=lambda tap: abs(tap - before)',
        'dilation in the choice of the centre',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'before = d * (k - 1) // 2',
        'before = (d * (k - 1) + 1) // 2',
        "the larger side of padding='same'",
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'c if s == 1 < k else (k - span) // 2',
        '(k - span) // 2',
        'the offset of a small kernel',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'after - d * (k - first - span)',
        'after - d * (k - first - 1)',
        'pads behind a kernel of several taps',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'slice(before, size - after)',
        'slice(before, size - before)',
        'cropping at the bottom',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'inside, _for_torch(pads), value',
        'inside, _for_torch([*pads[:2], *pads[:1:-1]]), value',
        'the sides of the border',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'self.groups == self.in_channels == self.out_channels',
        'self.groups == self.in_channels',
        'depthwise or grouped',
        (GEOMETRY,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'return zeros and any(self.pads)',
        'return any(self.pads)',
        'a border of reflected pixels',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'total = grad.sum(over, keepdim=True, dtype=ctx.dtype)',
        'total = grad.sum(over, keepdim=True).to(ctx.dtype)',
        "the precision of a bias's gradient",
        (f'{GEOMETRY}::test_a_shift_gets_its_gradient_in_its_own_precision',),
    ),
    # ----------------------------------------------------------- transforms
    Mutation(
        'mmdbb/transforms.py',
        'scale = (var + eps).rsqrt()',
        'scale = var.rsqrt()',
        'eps',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'shift = -mean * scale',
        'shift = mean * scale',
        "the mean's sign",
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'conv.bias * norm.scale + norm.shift',
        'conv.bias + norm.shift',
        'the bias through a norm',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        '(fused.bias - norm.shift) / norm.scale',
        '(fused.bias + norm.shift) / norm.scale',
        'a norm taken out again',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'bias.reshape(out) + second.bias',
        'bias.reshape(out)',
        'the bias behind a 1x1 and a KxK',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'eye.repeat(groups, 1).reshape',
        'eye.repeat_interleave(groups, 0).reshape',
        'the identity kernel of groups',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        '(first.kernel / area).expand',
        'first.kernel.expand',
        "average pooling's count",
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'zip(offset[::-1], after[::-1])',
        'zip(offset, after)',
        'rows and columns of a padded kernel',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'offset = tuple((k - s) // 2 for',
        'offset = tuple((k - s + 1) // 2 for',
        'the middle of an even kernel',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'kernel = kernel.reshape(out, taps, inside).transpose(1, 2)',
        'kernel = kernel.reshape(out, inside, taps)',
        'taps and inputs of a composed kernel',
        (TRANSFORMS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'rows.permute(1, 2, 0, 3)',
        'rows.reshape(groups, -1, *rows.shape[2:]).transpose(1, 2)',
        "the order of a separable branch's rows",
        (REFERENCE, OREPA),
    ),
    Mutation(
        'mmdbb/transforms.py',
        '    if flip:\n        second',
        '    if not flip:\n        second',
        'the flip in a stack',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'tuple(n - 1 for n in size)',
        'tuple(n - 1 for n in size[::-1])',
        'a stack of kernels that are not square',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'own = channel - 1 >= i * share',
        'own = channel >= i * share',
        'where the frequency prior turns',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'frequency = (channel - i * share)',
        'frequency = channel',
        'the frequencies along the columns',
        (KERNELS,),
    ),
    # ----------------------------------------------------------- dimensions
    Mutation(
        'mmdbb/geometry.py',
        'pads = [-n for n in pads]',
        'pads = [*pads]',
        'where a small transposed kernel writes',
        ('tests/test_dimensions.py',),
    ),
    Mutation(
        'mmdbb/transforms.py',
        'grouped.transpose(1, 2).reshape(-1, first',
        'grouped.reshape(-1, first',
        'the outputs of a transposed kernel, group by group',
        ('tests/test_dimensions.py',),
    ),
    Mutation(
        'mmdbb/branches/pointwise_kxk.py',
        "BN'), shift=False)",
        "BN'))",
        'a constant that a transposed kernel spreads',
        (FORMS,),
    ),
    Mutation(
        'mmdbb/branches/asymmetric.py',
        'any(k > 1 for i, k in enumerate(spec.kernel_size) if i != own)',
        'True',
        'a direction that is the whole kernel',
        (FORMS,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        "name == 'BN' and layer is nn.BatchNorm2d",
        'False',
        'the norm of other dimensions',
        (FORMS,),
    ),
    Mutation(
        'mmdbb/blocks/build.py',
        'LAYER_KINDS.get(replaced',
        'dict().get(replaced',
        'the form that a host asks for by its default',
        ('tests/test_mm/test_forms.py',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'forms[kind_of(conv)]',
        'block_type',
        'the form that a convolution asks for',
        ('tests/test_dimensions.py',),
    ),
    Mutation(
        'mmdbb/plain/branch_sums.py',
        'copy_(work.in_torchs_layout(weight).kernel)',
        'copy_(weight.kernel.reshape_as(dense.conv.weight))',
        'the start of a transposed kernel',
        ('tests/test_dimensions.py',),
    ),
    Mutation(
        'mmdbb/mm/host_internals.py',
        '    if _builds_upsample_layer():\n',
        '    if False:\n',
        'a bare block as an upsample layer',
        ('tests/test_mm/test_forms.py',),
    ),
    Mutation(
        'mmdbb/mm/stock/config.py',
        'kind = LAYER_KINDS.get(default, kind)',
        'pass',
        'the plain layer of a network of videos',
        ('tests/test_mm/test_forms.py',),
    ),
    # -------------------------------------------------------------- kernels
    Mutation(
        'mmdbb/kernels/kxk.py',
        'torch.eye(inside).repeat(-(-internal // inside), 1)',
        'torch.eye(inside).repeat_interleave(-(-internal // inside), 0)',
        'the identity inside of groups',
        (KERNELS, REFERENCE),
    ),
    Mutation(
        'mmdbb/kernels/kxk.py',
        'before * length + tap',
        'before + tap',
        'the centre in a row of taps',
        (PROPERTIES,),
    ),
    Mutation(
        'mmdbb/kernels/kxk.py',
        'separable.reshape(spec.groups, -1).t()',
        'separable.reshape(spec.groups, -1)',
        'the scales of a separable branch in groups',
        (REFERENCE, PROPERTIES),
    ),
    Mutation(
        'mmdbb/kernels/kxk.py',
        '(1 + (spec.groups > 4))',
        '(1 + (spec.groups >= 4))',
        'the width of the 1x1 in groups',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/kernels/base.py',
        'return in_layout(kernel, memory_format_of(self))',
        'return kernel',
        'the output of a 1x1 OREPA lies in another layout than a '
        "convolution's",
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/kernels/pointwise.py',
        'grows = out // self.spec.groups > inside',
        'grows = out // self.spec.groups >= inside',
        'which 1x1 starts as the identity',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/kernels/pointwise.py',
        'self.inner1, self.inner2 * inner, self.spec.groups',
        'self.inner1 * inner, self.inner2, self.spec.groups',
        'which 1x1 has the scale',
        (REFERENCE, PROPERTIES),
    ),
    Mutation(
        'mmdbb/kernels/stack.py',
        'kernel, other, self.spec.groups, flip',
        'kernel, others[-1], self.spec.groups, flip',
        'the order of kernels in a stack',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/plain/kernels.py',
        'origin.copy_(kernel - generator.compose())',
        'origin.copy_(kernel)',
        'a composed kernel that starts as another',
        (f'{PLAIN}::test_composed_kernel_is_the_plain_one',),
    ),
    Mutation(
        'mmdbb/plain/kernels.py',
        'share * wanted / own, 1.0',
        'share * wanted, 1.0',
        'the share of the other branches',
        (f'{PLAIN}::test_composed_kernel_starts_with_a_share_of_the_others',),
    ),
    Mutation(
        'mmdbb/kernels/base.py',
        'with without_autocast(next(tensors_of(self)).device):',
        'if True:',
        'composing in half precision',
        (KERNELS,),
    ),
    Mutation(
        'mmdbb/kernels/base.py',
        'or is_watched(self)',
        '',
        'parametrizations that take a step when read',
        (f'{WATCHED}::test_a_stateful_parametrization_takes_one_step',),
    ),
    # ------------------------------------------------------------- branches
    Mutation(
        'mmdbb/branches/moments.py',
        'cov = cov / count - rest[..., None] * rest[..., None, :]',
        'cov = cov / count',
        'what rounding the mean leaves in the covariance',
        (f'{FAST}::test_moments_of_float32_are_rounded_as_float64',),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'mean = centre.to(wide).reshape(groups, -1) + rest',
        'mean = centre.to(wide).reshape(groups, -1)',
        'what rounding leaves in the mean',
        (f'{FAST}::test_moments_of_float32_are_rounded_as_float64',),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'kernel = (grad_cov + grad_cov.transpose(-1, -2)) / count',
        'kernel = 2 * grad_cov / count',
        "the gradient of a covariance's half",
        (f'{FAST}::test_moments_gradient',),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'return torch.float32 if half else torch.float64',
        'return torch.float32',
        "the covariance's precision",
        (f'{PRECISION}::test_correlated_channels',),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'torch.var_mean(z, over, correction=0)',
        'torch.var_mean(z, over)',
        'a biased variance of maps that are not kept',
        (f'{FAST}::test_statistics_behind_a_1x1_are_those_of_its_output',),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        '_Sum.apply(sums * moments.count, own.process_group)',
        '_Sum.apply(sums, own.process_group)',
        'SyncBN: processes with unequal batches',
        (SYNC,),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'return _Sum.apply(grad, ctx.group), None',
        'return grad, None',
        'SyncBN: gradients of the other processes',
        (SYNC,),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'second = cov + mean[..., None] * mean[..., None, :]',
        'second = cov',
        'SyncBN: processes whose means differ',
        (SYNC,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'stats.count / (stats.count - 1)',
        'stats.count / stats.count',
        'the unbiased running variance',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'own.running_mean.lerp_(stats.mean.to(dtype), momentum)',
        'own.running_mean.lerp_(stats.mean.to(dtype), 1 - momentum)',
        'the momentum',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'momentum = 1 / own.num_batches_tracked.item()',
        'momentum = 1 / (own.num_batches_tracked.item() + 1)',
        'the cumulative average',
        (f'{FAST}::test_cumulative_momentum',),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'if norm.training and is_recomputing():',
        'if False:',
        'statistics counted twice by checkpoints',
        (CHECKPOINTING,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'if is_recomputing() or not norm.track_running_stats:',
        'if not norm.track_running_stats:',
        'statistics counted twice by the fast way',
        (CHECKPOINTING, f'{FAST}::test_gradient_checkpointing'),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'with torch.no_grad():\n        value = norm_scale',
        'if True:\n        value = norm_scale',
        "the border's value detached",
        (NORMS, REFERENCE),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'return from_forward(mean, value, norm.running_mean)',
        'return value',
        'the border of a segment that runs again',
        (
            f'{MODE}[training checkpointed_views-collapsed-DBB]',
            f'{MODE}[training checkpointed_views-small-DBB]',
        ),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'per_channel(value.to(y.dtype), spec.dims),',
        '0 * per_channel(value.to(y.dtype), spec.dims),',
        'a border of zeros',
        (NORMS,),
    ),
    Mutation(
        'mmdbb/branches/base.py',
        "padding_mode=spec.padding_mode if own_padding else 'zeros'",
        "padding_mode='zeros'",
        "a branch's padding mode",
        (BRANCHES,),
    ),
    Mutation(
        'mmdbb/branches/base.py',
        'pad_kernel(kernel, spec.kernel_size, offset), bias',
        'pad_kernel(kernel, spec.kernel_size), bias',
        "a branch's place in an even kernel",
        (BRANCHES,),
    ),
    Mutation(
        'mmdbb/branches/identity.py',
        'pad_kernel(kernel, spec.kernel_size, spec.centre), bias',
        'pad_kernel(kernel, spec.kernel_size), bias',
        "the identity's place in an even kernel",
        (BRANCHES,),
    ),
    Mutation(
        'mmdbb/branches/pointwise_kxk.py',
        'kernel.reshape(groups, -1, inner, *size)',
        'kernel.reshape(-1, groups, inner, *size).transpose(0, 1)',
        'the groups of a border',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/branches/pointwise_kxk.py',
        'spec.in_channels * (1 + spec.is_depthwise)',
        'spec.in_channels * (1 + (spec.groups == spec.in_channels))',
        'the width inside of a depthwise block',
        (BRANCHES,),
    ),
    Mutation(
        'mmdbb/branches/pointwise_avg.py',
        'channels, spec.kernel_size, channels, x.dtype',
        'channels, spec.kernel_size, 1, x.dtype',
        'pooling channel by channel, dilated',
        (BRANCHES,),
    ),
    # --------------------------------------------------------------- blocks
    Mutation(
        'mmdbb/blocks/base.py',
        'cast(self, work, dtype)',
        'cast(self, work, own_dtype)',
        'the precision that kernels are composed in',
        (BASE,),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        'if not self._initializing and PORTS.is_host_rule(fn):',
        'if False:',
        "the host's rules stop at a block",
        ('tests/test_hosts_integration.py::test_blocks_survive_init_weights',),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        'return conv.train(self.training)',
        'return conv',
        'the mode of a merged convolution',
        (BASE,),
    ),
    Mutation(
        'mmdbb/blocks/branch_sum.py',
        'bias = bias + self.own_bias',
        'bias = bias * 1',
        "a block's own bias, merged",
        (SUM,),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'mask_kernel(kernel2, value.to(near) - shift, spec.groups)',
        'mask_kernel(kernel2, value.to(near), spec.groups)',
        'the border beside the constant inside',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'per_channel(value, dims) - constant',
        'per_channel(value, dims)',
        'the border of pooling',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'if key not in self.borders:',
        'if True:',
        'the border of what is computed again',
        (f'{REFERENCE}::test_two_forwards_before_one_backward',),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'shift = shift + moments.mean_through(exact - kernel)',
        'shift = shift + 0',
        'the rounding of a scaled 1x1',
        (f'{FAST}::test_a_normalised_1x1_is_centred_beside_a_large_mean',),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        '        and not spec.is_strided\n',
        '',
        'a 1x1 with a stride reads some pixels only',
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/blocks/fast.py',
        'if len(modes) != 1:',
        'if False:',
        'norms of which some are frozen',
        (f'{FAST}::test_one_frozen_norm_among_others',),
    ),
    Mutation(
        'mmdbb/blocks/frozen.py',
        'kernel * per_channel(after.scale, block.dims + 1)',
        'kernel * 1',
        "the border's gradient behind the norm of a sum",
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/blocks/frozen.py',
        'share = scale * nothing / math.prod(spec.kernel_size)',
        'share = scale * nothing',
        "the border's gradient of pooling",
        (FAST_IS_LITERAL,),
    ),
    Mutation(
        'mmdbb/blocks/kernel_cache.py',
        'a.dtype == b.dtype and torch.equal(a, b)',
        'a.dtype == b.dtype',
        'a kept kernel that is stale',
        (f'{FAST}::test_the_kept_kernel_is_never_stale',),
    ),
    Mutation(
        'mmdbb/blocks/kernel_cache.py',
        'or kept.structure != structure',
        '',
        'a kept kernel of another eps',
        (f'{WATCHED}::test_the_kept_kernel_follows_eps',),
    ),
    Mutation(
        'mmdbb/blocks/build.py',
        'if low <= max(spec.kernel_size) <= high:',
        'if low <= min(spec.kernel_size) <= high:',
        'which kernels become blocks',
        ('tests/test_blocks/test_build.py',),
    ),
    Mutation(
        'mmdbb/mm/host_internals.py',
        'if seen is not None and norm is not None:',
        'if False:',
        "mmcv's fusing across a block",
        ('tests/test_blocks/test_fusing.py',),
    ),
    Mutation(
        'mmdbb/blocks/repvgg.py',
        'norm_scale_shift(branch.norm).scale.detach()',
        'norm_scale_shift(branch.norm).scale',
        'constants in the custom L2',
        (OREPA,),
    ),
    Mutation(
        'mmdbb/plain/branch_sums.py',
        'values.mean - plain.bias',
        'values.mean',
        "the mean that a plain convolution's bias moves",
        (f'{PLAIN}::test_statistics_are_those_of_a_convolution_without_bias',),
    ),
    Mutation(
        'mmdbb/plain/branch_sums.py',
        'branch_scale * gamma.abs()',
        'branch_scale * gamma',
        'the sign of the gammas that branches start with',
        (f'{PLAIN}::test_branches_start_on_the_positive_side',),
    ),
    # ------------------------------------------------------ nn.Conv2d's part
    Mutation(
        'mmdbb/blocks/equivalent.py',
        '    if shifted and not block._wants_bias:\n',
        '    if False:\n',
        'a weight without the shift of the norms',
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/blocks/equivalent.py',
        'isinstance(module, _BatchNorm) and module.training',
        'False',
        "a weight in training mode, where norms use the batch's statistics",
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/blocks/equivalent.py',
        '_storage(result) == _storage(source)',
        'False',
        'writing into a view of the weight',
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/blocks/equivalent.py',
        "name.endswith(('.init', '.weight_init'))",
        'False',
        "the hosts' initialisation passes a block by",
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        'if isinstance(x, torch.fx.Proxy):',
        'if False:',
        'a block is a leaf of a trace',
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        'layout if value.dim() > 1 else torch.contiguous_format',
        'torch.contiguous_format',
        'the memory format of a merged kernel',
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/blocks/block_type.py',
        "return block.to(kwargs.get('dtype'))",
        'return block',
        'the argument dtype',
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/kernels/kxk.py',
        'self.prior_pattern.copy_(frequency_prior(out, size))',
        'pass',
        'constants when parameters are reset',
        (CONTRACT,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'pads += [total // 2, total - total // 2]',
        'pads += [total - total // 2, total // 2]',
        'the side that gets the odd pixel of an adaptive padding',
        (ADAPTIVE,),
    ),
    Mutation(
        'mmdbb/branches/base.py',
        'self.explicit_pads = self._pads(spec)',
        'pass',
        "a branch's own pads at the size of an image",
        (ADAPTIVE,),
    ),
    Mutation(
        'mmdbb/geometry.py',
        'self.dilation, self.largest_pads[::2]',
        'self.dilation, self.pads[::2]',
        'one centre tap for images of all sizes',
        (ADAPTIVE,),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        "changes['padding'] = 'adaptive'",
        'pass',
        'a stride that is set later stays adaptive',
        (ADAPTIVE,),
    ),
    Mutation(
        'mmdbb/blocks/build.py',
        'if keeps_adaptive(block, replaced):',
        'if False:',
        "EfficientNet's padding under conv_cfg",
        (REPLACED,),
    ),
    Mutation(
        'mmdbb/mm/stock/config.py',
        'if layer.get(',
        'if False and layer.get(',
        "EfficientNet's padding in the stock config",
        (REPLACED,),
    ),
    Mutation(
        'mmdbb/mm/registration.py',
        'return layer_of(block) if is_layer else None',
        'return None',
        'the rule of sizes for a type that is a class',
        (REPLACED,),
    ),
    Mutation(
        'mmdbb/official/names.py',
        "('dbb_avg.bn.', 'branches.1x1_avg.norm1.')",
        "('dbb_avg.bn.', 'branches.1x1_avg.norm2.')",
        'the names of the first revision',
        (OFFICIAL,),
    ),
    # -------------------------------------------------------------- tracing
    Mutation(
        'mmdbb/tracing.py',
        'alone = sum(self.reads[n] for n in read) == len(readers)',
        'alone = True',
        'a norm that reads two convolutions',
        (
            f'{INSERT}::test_follows_the_data',
            f'{INSERT}::test_a_norm_of_others_takes_no_bias',
        ),
    ),
    Mutation(
        'mmdbb/tracing.py',
        'found[conv] = norms if alone and None not in norms else ()',
        'found[conv] = tuple(read) if alone else ()',
        'a convolution of which one call has no norm',
        (f'{INSERT}::test_as_many_calls_are_not_the_same_calls',),
    ),
    Mutation(
        'mmdbb/tracing.py',
        'conv: found[0] if len(found) == 1 else None',
        'conv: found[0] if found else None',
        'a convolution before two norms',
        (f'{INSERT}::test_follows_the_data',),
    ),
    Mutation(
        'mmdbb/tracing.py',
        "if len(users) == 1 and users[0].op == 'call_module'",
        "if users[0].op == 'call_module'",
        'a convolution that a sum reads too',
        (f'{INSERT}::test_follows_the_data',),
    ),
    Mutation(
        'mmdbb/tracing.py',
        'watch.read(run())  #',
        'run()  #',
        'a convolution that the caller reads too',
        (f'{INSERT}::test_follows_the_data',),
    ),
    Mutation(
        'mmdbb/tracing.py',
        'readers[conv].append(found.pop() if len(found) == 1 else None)',
        'readers[conv].append(max(found, key=bool, default=None))',
        'several readers in a run that is watched',
        (f'{INSERT}::test_follows_the_data',),
    ),
    Mutation(
        'mmdbb/tracing.py',
        'if _name_of(func) not in _LOOKS:',
        'if True:',
        'a shape is no reader',
        (f'{INSERT}::test_a_shape_is_no_reader',),
    ),
    Mutation(
        'mmdbb/tracing.py',
        'frame.failed = output is None',
        'frame.failed = False',
        'a run that broke off tells nothing',
        (f'{FLOW}::test_what_a_run_does_not_reach_is_found_by_names',),
    ),
    # ------------------------------------------------- weights of others
    Mutation(
        'mmdbb/blocks/offers.py',
        'offer is not None and offer.missing is missing',
        'offer is not None',
        'what another load left',
        (f'{OFFERS}::test_one_after_the_other',),
    ),
    Mutation(
        'mmdbb/blocks/offers.py',
        "self.eps = getattr(norm, 'eps', 0.0)",
        'self.eps = 1e-5',
        'the eps of an absorbed norm',
        (f'{OFFERS}::test_each_kind_of_block',),
    ),
    Mutation(
        'mmdbb/blocks/offers.py',
        'unexpected[:] = [name for name in unexpected if name not in names]',
        'pass',
        'entries of absorbed norms are used',
        (f'{OFFERS}::test_absorbed_norms_come_in',),
    ),
    Mutation(
        'mmdbb/blocks/offers.py',
        "self._offers['norm'] = norm  #",
        'pass  #',
        'a norm that stands before its convolution',
        (f'{OFFERS}::test_absorbed_norms_come_in',),
    ),
    Mutation(
        'mmdbb/blocks/offers.py',
        'if branches & offered:',
        'if False:',
        'plain entries and some of the branches',
        (f'{OFFERS}::test_refuses_with_the_reason',),
    ),
    Mutation(
        'mmdbb/plain/weights.py',
        '    if forgotten:\n',
        '    if False:\n',
        'norms that nobody remembers',
        (f'{OFFERS}::test_a_forgotten_norm_is_refused',),
    ),
    Mutation(
        'mmdbb/stock_weights.py',
        'state._metadata = expected._metadata',
        'pass',
        'versions of layers',
        (f'{OFFERS}::test_versions_of_layers_are_kept',),
    ),
    Mutation(
        'mmdbb/stock_weights.py',
        'for alias in names[modules[norm]]:',
        'for alias in names[modules[norm]][:1]:',
        'a norm under two names',
        (f'{FLOW}::test_a_norm_a_level_takes_the_bias',),
    ),
    Mutation(
        'mmdbb/stock_weights.py',
        '        for norm in behind:\n',
        '        for norm in behind[:1]:\n',
        'a norm for each level',
        (f'{INSERT}::test_a_bias_goes_into_each_of_several_norms',),
    ),
    Mutation(
        'mmdbb/untouched.py',
        '[[name, norm] for norm in norms.get(name, ())]',
        '[[name, norm] for norm in norms.get(name, ())[:1]]',
        'the proof with each norm',
        (f'{FLOW}::test_a_norm_a_level_takes_the_bias',),
    ),
    Mutation(
        'mmdbb/modules.py',
        "c.__name__ == 'FrozenBatchNorm2d'",
        "c.__name__ == 'Frozen'",
        'frozen norms',
        (f'{INSERT}::test_frozen_norms_stay_and_take_the_bias',),
    ),
    Mutation(
        'mmdbb/reparam.py',
        'branches\\.(?!\\d+\\.)\\w+\\.',
        'branches\\.\\w+\\.',
        "HRNet's own branches",
        (
            'tests/test_engine/test_fitting.py::test_hrnets_branches_are_no_blocks',
        ),
    ),
    Mutation(
        'mmdbb/modules.py',
        'module.training = mode',
        'module.training = False',
        'the mode after looking',
        (f'{INSERT}::test_looking_changes_nothing',),
    ),
    Mutation(
        'mmdbb/modules.py',
        'if not torch.allclose(base.forward(single, x.float()), expected):',
        'if False:',
        'a sync norm that computes more than its base',
        (
            'tests/test_proof.py::test_a_norm_that_asks_for_float32_runs_in_float64',
        ),
    ),
    Mutation(
        'mmdbb/modules.py',
        "            own.pop('forward', None)\n",
        '            pass\n',
        'sync norms are again what they were',
        (
            'tests/test_proof.py::test_a_norm_that_asks_for_float32_runs_in_float64',
        ),
    ),
    # -------------------------------------------------------------- reparam
    Mutation(
        'mmdbb/reparam.py',
        'if block in convs:',
        'if False:',
        'shared blocks merged once',
        (REPARAM,),
    ),
    Mutation(
        'mmdbb/reparam.py',
        '            _hand_hooks_on(block, conv)\n',
        '',
        'hooks handed on',
        (f'{WATCHED}::test_hooks_on_a_block_stay_with_its_convolution',),
    ),
    Mutation(
        'mmdbb/reparam.py',
        'for key, hook in hooks.items() if computes_weight(hook)',
        'for key, hook in hooks.items() if False',
        'hooks that computed a weight, handed on',
        (
            f'{WATCHED}::test_a_pruned_bias_of_the_block_itself',
            f'{WATCHED}::test_merged_as_forward_computes_after_a_step',
        ),
    ),
    Mutation(
        'mmdbb/reparam.py',
        "vars(block).pop('forward_train', None)",
        'pass',
        'the end of the literal forward',
        (REPARAM,),
    ),
    # --------------------------------------------------- running and proof
    Mutation(
        'mmdbb/running.py',
        'torch.manual_seed(0)',
        'pass',
        'the same random numbers in each run',
        (RUNNING,),
    ),
    Mutation(
        'mmdbb/running.py',
        'if reached.isdisjoint(heads[label].modules())',
        'if False',
        'heads that the whole network did not reach, named',
        (RUNNING,),
    ),
    Mutation(
        'mmdbb/proof.py',
        'elif is_of_head(name) and _jumps(',
        'elif _jumps(',
        'features that jump, refused',
        (PROOF,),
    ),
    Mutation(
        'mmdbb/proof.py',
        'error.mean <= _AS_FAR * moved.mean',
        'True',
        'a head that jumps, and is wrong everywhere',
        (PROOF,),
    ),
    Mutation(
        'mmdbb/proof.py',
        'if moved.largest <= bound.tolerance:',
        'if False:',
        'a head that does not jump, and is wrong',
        (PROOF,),
    ),
    Mutation(
        'mmdbb/proof.py',
        'min(bound.amplified, moved[name].largest)',
        'bound.amplified',
        'amplified rounding, bounded by what rounding does',
        (PROOF,),
    ),
    Mutation(
        'mmdbb/own_blocks.py',
        'if not error <= TOLERANCE:',
        'if False:',
        "a wrong method of another package's block",
        (OWN_BLOCKS,),
    ),
    Mutation(
        'mmdbb/own_blocks.py',
        'with _float64():',
        'if True:',
        "new layers of another package's block in float64",
        (OWN_BLOCKS,),
    ),
    Mutation(
        'mmdbb/own_blocks.py',
        'if module in known or isinstance',
        'if isinstance',
        "another package's block in two places",
        (OWN_BLOCKS,),
    ),
    Mutation(
        'mmdbb/untouched.py',
        'changed.update(own)',
        'pass',
        "another package's block is merged, so it is no copy",
        (OWN_BLOCKS,),
    ),
    # --------------------------------------------------------------- insert
    Mutation(
        'mmdbb/insert.py',
        'absorbed = absorbed and not has_hooks(norm)',
        'absorbed = absorbed and True',
        'norms with hooks stay',
        (f'{INSERT}::test_norms_and_convs_with_hooks_stay',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'absorbed = absorbed and norm.track_running_stats',
        'absorbed = absorbed and True',
        'norms without statistics stay',
        (f'{INSERT}::test_other_norms_stay',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'eps=norm.eps, momentum=norm.momentum',
        'eps=norm.eps',
        "the norm's momentum",
        (f'{INSERT}::test_takes_over_what_the_modules_were',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'return block.train(conv.training)',
        'return block',
        "the convolution's mode",
        (f'{INSERT}::test_takes_over_what_the_modules_were',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'return plain and not written and not has_hooks(layer)',
        'return plain and not written',
        'convolutions with hooks stay',
        (f'{INSERT}::test_norms_and_convs_with_hooks_stay',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'return plain and not written and not has_hooks(layer)',
        'return plain and not has_hooks(layer)',
        'convolutions stay that the model wrote into',
        (f'{INSERT}::test_a_layer_that_the_model_wrote_into_stays',),
    ),
    # ----------------------------------------------------------- merge back
    Mutation(
        'mmdbb/merge_back.py',
        'mean.double() - bias',
        'mean.double() + bias',
        'the sign of a bias that a norm takes',
        (MERGE_BACK,),
    ),
    Mutation(
        'mmdbb/merge_back.py',
        'torch.zeros_like(bias) if replaced.bias else bias.detach()',
        'bias.detach()',
        'a bias that the convolution keeps',
        (f'{MERGE_BACK}::test_biases_that_were_there_stay_there',),
    ),
    Mutation(
        'mmdbb/merge_back.py',
        'momentum=norm.momentum',
        'momentum=0.1',
        "the absorbed norm's momentum",
        (f'{MERGE_BACK}::test_structure_and_function_come_back',),
    ),
    Mutation(
        'mmdbb/merge_back.py',
        '        del model.fuse\n',
        '        pass\n',
        'nothing of mmdbb is left',
        (MERGE_BACK,),
    ),
    Mutation(
        'mmdbb/insert.py',
        '    merge_before_fuse_(model)\n',
        '',
        "models' own fuse merges first",
        (f'{MERGE_BACK}::test_the_models_own_fuse_merges_first',),
    ),
    Mutation(
        'mmdbb/yolo.py',
        'plain = None if resumed else weights',
        'plain = weights',
        'checkpoints with blocks are loaded once the blocks are in',
        (MERGE_BACK,),
    ),
    Mutation(
        'mmdbb/yolo.py',
        '            _check_same_blocks(model, weights)\n',
        '',
        'checkpoints with other blocks are refused',
        (f'{MERGE_BACK}::test_a_trainer_refuses_other_blocks',),
    ),
    # ---------------------------------------------------------------- sweep
    Mutation(
        'tools/workshop/sweep/training.py',
        "if _is_in(error, 'mmdbb/blocks/'):",
        'if False:',
        'an error in a block is no network that cannot be run',
        (f'{SWEEP}::test_it_sees_an_error_in_a_block',),
    ),
    Mutation(
        'tools/workshop/sweep/run.py',
        "path.write_text(''.join(map(_line, self.rows.values())))",
        'pass',
        'a line that was cut',
        (f'{SWEEP}::test_a_run_goes_on_where_it_was_cut',),
    ),
    Mutation(
        'tools/workshop/sweep/verdicts.py',
        'if warned and works',
        'if warned',
        'a network that no form holds is no success',
        (f'{SWEEP}::test_verdicts',),
    ),
    Mutation(
        'tools/workshop/sweep/architectures.py',
        'if not _USUAL.match(name):',
        'if name not in ("None",):',
        'batch norms make no other architecture',
        (f'{SWEEP}::test_unusual_layers_make_another_architecture',),
    ),
    Mutation(
        'mmdbb/mm/engine/blocks_hook.py',
        '        if changed:',
        '        if False:',
        'blocks that cannot be merged are named before training',
        (f'{BLOCKS_HOOK}::test_layers_that_another_changed_are_named',),
    ),
    Mutation(
        'mmdbb/untouched.py',
        '_arguments(other) != _arguments(module)',
        'other.extra_repr() != module.extra_repr()',
        "numbers of numpy's in a stock network",
        (f'{FLOW}::test_numbers_of_numpy_are_numbers',),
    ),
    # ---------------------------------------------------- weights that come in
    Mutation(
        'mmdbb/plain/blocks.py',
        'var = exactly(one) - norm.eps if is_merged else one',
        'var = one',
        'a merged convolution holds its norm already',
        (f'{OFFERS}::test_a_merged_file_starts_blocks_that_absorbed_norms',),
    ),
    Mutation(
        'mmdbb/insert.py',
        'given = sorted(args.keys() & _OF_CONV)',
        'given = []',
        'a block takes its geometry from the convolution',
        (f'{INSERT}::test_the_convolution_gives_its_own_arguments',),
    ),
    Mutation(
        'mmdbb/blocks/equivalent.py',
        '        _refuse_weight_norm(block)',
        '        pass',
        'a weight norm of a block',
        (f'{WATCHED}::test_a_weight_norm_of_the_block_itself_is_refused',),
    ),
    # ---------------------------------------------------------------- study
    Mutation(
        'tools/workshop/study/images.py',
        'pool = places[HELD_OUT:]',
        'pool = places',
        'settings are chosen on images that are trained on',
        (f'{STUDY}::test_the_search_sees_no_test_image',),
    ),
    Mutation(
        'tools/workshop/study/images.py',
        'key=digests.__getitem__',
        'key=None',
        'splits follow the order in the files',
        (f'{STUDY}::test_the_order_in_the_files_does_not_matter',),
    ),
    Mutation(
        'tools/workshop/study/networks.py',
        'copy_(width * kernel)',
        'copy_(kernel)',
        "OREPA's original kernel starts narrower than in its paper",
        (f'{STUDY}::test_the_shared_kernel_of_orepa_has_the_papers_width',),
    ),
    Mutation(
        'tools/workshop/study/networks.py',
        'y.clone()',
        'y',
        'the control starts from what an activation in place left',
        (f'{STUDY}::test_the_control_starts_as_dbbs_function',),
    ),
    Mutation(
        'tools/workshop/study/plan.py',
        'return allowed[place + 1]',
        'return None',
        'a search stops at its largest rate',
        (f'{STUDY}::test_each_block_gets_its_own_setting',),
    ),
    Mutation(
        'tools/workshop/study/plan.py',
        'costs[0].milliseconds / costs[1].milliseconds',
        'costs[1].milliseconds / costs[0].milliseconds',
        'a slow block gets more time than plain',
        (f'{STUDY}::test_the_same_time_is_plains',),
    ),
    Mutation(
        'tools/workshop/study/report.py',
        'return search(record, cell, block)[1]',
        'return None',
        'trainings of several searches are averaged',
        (f'{STUDY}::test_rows_of_another_search_are_left_out',),
    ),
    Mutation(
        'tools/workshop/study/follow.py',
        'plain = plain_form(trained)',
        'plain = trained.network',
        'pruning changes the trained network',
        (f'{STUDY}::test_pruning_saves_what_it_says',),
    ),
    Mutation(
        'tools/workshop/study/drop.py',
        'network = copy.deepcopy(trained.network)',
        'network = trained.network',
        'dropping branches changes the trained network',
        (f'{STUDY}::test_dropped_branches_are_folded_or_cut',),
    ),
    Mutation(
        'tools/workshop/study/drop.py',
        'weak_branches(network, threshold), fold)',
        'weak_branches(network, threshold))',
        'what the study says is cut was folded',
        (f'{STUDY}::test_dropped_branches_are_folded_or_cut',),
    ),
    Mutation(
        'tools/workshop/study/drop.py',
        'return TRAINED_ON if longer else WHOLE',
        'return WHOLE',
        'what was trained on is compared with what was not',
        (f'{STUDY}::test_drops_are_compared_with_what_was_trained_as_long',),
    ),
    # ------------------------------------------------------------ recompute
    Mutation(
        'mmdbb/recompute.py',
        't.view_as(t) if n else t.detach()',
        't.detach().requires_grad_(n)',
        'gradients that are differentiated again',
        (f'{MODE}[training gradient_penalty-depthwise-DBB]',),
    ),
    Mutation(
        'mmdbb/recompute.py',
        "if frame.f_globals.get('__name__') in _ENGINE:",
        'if False:',
        'a forward pass that a backward pass starts',
        (
            f'{CHECKPOINTING}::test_a_forward_pass_that_a_hook_within_a_segment_starts',
        ),
    ),
    Mutation(
        'mmdbb/recompute.py',
        'ctx.autocast = device, autocast_dtype(device)',
        'ctx.autocast = device, None',
        'autocast in what is computed again',
        (EXACT_AUTOCAST,),
    ),
    Mutation(
        'mmdbb/recompute.py',
        '        found.used = True\n',
        '',
        'equal batches that were run twice',
        (
            f'{MODE}[training checkpointed_views_reentrant-collapsed-DBB]',
            f'{MODE}[training checkpointed_views-collapsed-DBB]',
            f'{MODE}[training twice_in_a_segment-collapsed-DBB]',
            f'{MODE}[training nested_checkpoints-collapsed-DBB]',
        ),
    ),
    Mutation(
        'mmdbb/recompute.py',
        'if distance <= same]',
        'if distance == nearest]',
        'means of one batch that two graphs round',
        (
            'tests/test_blocks/test_compiled.py::test_rounding_tells_no_batches_apart',
        ),
    ),
    Mutation(
        'mmdbb/recompute.py',
        'order = inside\n',
        'order = inside[::-1]\n',
        'the order of values within a segment',
        (
            f'{MODE}[training twice_in_a_segment-collapsed-DBB]',
            f'{MODE}[training nested_checkpoints-collapsed-DBB]',
        ),
    ),
    # -------------------------------------------------------------- modules
    Mutation(
        'mmdbb/modules.py',
        "    '_backward_hooks',\n",
        '',
        'backward hooks are seen',
        (f'{WATCHED}::test_a_hook_of_one_kind_alone_is_called',),
    ),
    Mutation(
        'mmdbb/modules.py',
        "has_hooks(each) or 'forward' in vars(each) or is_par",
        'has_hooks(each) or is_par',
        'a forward put in place of a layer of a block',
        (f'{WATCHED}::test_a_forward_put_in_place_of_a_layers_own_is_obeyed',),
    ),
    Mutation(
        'mmdbb/modules.py',
        'is_parametrized(module) or any(',
        'any(',
        'a parametrization of the block itself',
        (
            f'{WATCHED}::test_a_stateful_parametrization_takes_one_step',
            f'{WATCHED}::test_merged_as_forward_computes_after_a_step',
        ),
    ),
    Mutation(
        'mmdbb/modules.py',
        'return type(layer).forward in KNOWN_FORWARDS',
        'return True',
        'layers with a forward of their own',
        (f'{WATCHED}::test_layers_with_a_forward_of_their_own',),
    ),
    Mutation(
        'mmdbb/modules.py',
        'do_power_iteration=False',
        'do_power_iteration=True',
        'a spectral norm that merging moves',
        (f'{WATCHED}::test_merged_as_forward_computes_after_a_step',),
    ),
    Mutation(
        'mmdbb/modules.py',
        'for each, attribute, weight in reversed(stale):',
        'for each, attribute, weight in ():',
        'weights put back after merging',
        (f'{WATCHED}::test_merging_leaves_computed_weights_as_they_stood',),
    ),
    # ------------------------------------------------ found by earlier runs
    Mutation(
        'mmdbb/mm/engine/resume.py',
        '-1 <= state.get(key, 0)',
        '0 <= state.get(key, 0)',
        'a resumed training whose schedule has not begun',
        (
            'tests/test_engine/test_resume.py::test_a_demo_that_is_killed_and_resumed[segmentation]',
        ),
    ),
    Mutation(
        'mmdbb/files/second_reader.py',
        '_MADE.get((module, name), _Nothing)',
        '_MADE.get((module, name)) or super().find_class(module, name)',
        'a second reader that runs what a file names',
        (
            'tests/test_files/test_checkpoints.py::test_the_second_reader_runs_nothing',
        ),
    ),
    Mutation(
        'mmdbb/files/checkpoints.py',
        'else state[name].to(value.dtype)',
        'else state[name]',
        'integers of merged files',
        (
            'tests/test_files/test_checkpoints.py::test_merged_files_keep_their_floats_and_get_the_models_integers',
        ),
    ),
    Mutation(
        'mmdbb/files/atomic.py',
        'if fcntl is None:',
        'if False:',
        'writing where the system has no locks (Windows)',
        ('tests/test_files/test_without_locks.py',),
    ),
    Mutation(
        'tools/workshop/demo/started.py',
        'return same and bool(found)',
        'return bool(found)',
        'a demo that goes on from the checkpoints of another',
        ('tests/test_demo/test_demo_torch.py',),
    ),
    Mutation(
        'tools/workshop/demo/plain_torch.py',
        'torch.Generator().manual_seed(1000 * seed + epoch)',
        'torch.Generator().manual_seed(1000 * seed)',
        'each epoch in an order of its own',
        ('tests/test_demo/test_demo_torch.py',),
    ),
    Mutation(
        'tools/workshop/site/pages.py',
        "if '://' in target or target.startswith(('#', 'mailto:')):",
        "if '://' in target:",
        'links within a page of the website',
        ('tests/test_site.py',),
    ),
    Mutation(
        'requirements/progress.py',
        'left = (now - begun) / (done - 1) * (of - done)',
        'left = (now - begun) / done * of',
        'how long compiling takes',
        ('tests/test_install.py',),
    ),
    Mutation(
        'mmdbb/files/atomic.py',
        'os.fsync(file.fileno())',
        'file.fileno()',
        'a disk that is full only in the end',
        (
            'tests/test_files/test_atomic.py::test_a_disk_that_shows_only_at_the_end_that_it_is_full',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/qdq.py',
        'scales = np.maximum(scales, largest / room)',
        'scales = np.maximum(scales, 0)',
        'a scale raised for a large bias',
        (
            'tests/test_quantization/test_fake.py::test_a_scale_is_raised_where_the_bias_would_not_fit',
        ),
    ),
    # -------------------------------------- no shift, and no place for one
    Mutation(
        'mmdbb/scale_norm.py',
        'square = root.square() / max(',
        'square = root / max(',
        'the mean square of a batch',
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/scale_norm.py',
        'momentum = 1 / own.num_batches_tracked.item()',
        'momentum = 0.1',
        'the cumulative average of mean squares',
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/scale_norm.py',
        'zero, persistent=False',
        'zero',
        'a mean of zero in files, which takes that of a norm with a shift',
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'stats = stats.about_zero()',
        'pass',
        'the fast way of a norm without shift',
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/branches/moments.py',
        'square = self.var + self.mean.square()',
        'square = self.var',
        'the mean square from mean and variance',
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/branches/norm.py',
        'isinstance(place, ScaleNorm) and is_sync_norm(norm)',
        'False',
        "a trainer's SyncBN in the place of a norm without shift",
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/plain/branch_sums.py',
        'square = values.var + mean.square()',
        'square = values.var',
        'the mean square that a block without shift starts with',
        (WITHOUT_SHIFT,),
    ),
    Mutation(
        'mmdbb/mm/deploy/places.py',
        'takes_bias(norm) or drops_bias(norm) for',
        'True for',
        'group norms, which take no bias',
        (BLOCKS_HOOK,),
    ),
    Mutation(
        'mmdbb/blocks/base.py',
        'return self.merges_with_bias and not self._wants_bias',
        'return self.merges_with_bias',
        'convolutions with a bias of their own',
        (BLOCKS_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/deploy/parts.py',
        'and m not in own',
        '',
        "branches' convolutions counted as plain ones",
        (BLOCKS_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/deploy/parts.py',
        'if type(module) is asked.kind and',
        'if False and',
        'parts that a wrapper builds under other names',
        (BLOCKS_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/engine/blocks_hook.py',
        'with random_numbers_kept():',
        'if True:',
        "the training's random numbers, when a network draws some",
        (BLOCKS_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/engine/blocks_hook.py',
        'refuse_no_block(runner.cfg, model)',
        'pass',
        'a training without any block that the config asks for',
        (BLOCKS_HOOK,),
    ),
    Mutation(
        'mmdbb/mm/deploy/fused.py',
        'or readers.count(norm_name) > 1',
        '',
        'a norm folded into one convolution that another one has too',
        (FUSED,),
    ),
    Mutation(
        'mmdbb/mm/deploy/fused.py',
        'pairs.get(conv_name) != (norm_name,)',
        'False',
        'a norm folded by the order of registration',
        (FUSED,),
    ),
    Mutation(
        'mmdbb/mm/deploy/fused.py',
        'block.merges_with_bias and conv.bias is None',
        'False',
        'the place of a merged bias in a fused network',
        (FUSED,),
    ),
    # --------------------------------------------- quantizing and pruning
    Mutation(
        'mmdbb/own_forward.py',
        'and output._version == 0',
        'and True',
        'layers that change their result in place',
        (
            'tests/test_quantization/test_fake.py::test_training_and_file_are_one_function',
        ),
    ),
    Mutation(
        'mmdbb/own_forward.py',
        "found[0].weight is layer._parameters['weight']",
        'True',
        'layers whose kernel is not their weight',
        (
            'tests/test_quantization/test_fake.py::test_training_and_file_are_one_function',
        ),
    ),
    Mutation(
        'mmdbb/own_forward.py',
        "if 'forward' in vars(layer):",
        'if False:',
        'a forward of the object',
        (
            'tests/test_quantization/test_fake.py::test_a_weight_that_is_computed_is_left_in_float',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/quantizers.py',
        'average.copy_(torch.where(finite, new, average))',
        'average.copy_(new)',
        'ranges of a batch that overflows',
        (
            'tests/test_quantization/test_fake.py::test_a_batch_that_overflows_does_not_count',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/qdq.py',
        "axis = 0 if attributes.get('transB') else 1",
        'axis = 0',
        'scales of the columns of a matrix',
        (
            'tests/test_quantization/test_fake.py::test_products_of_matrices_are_written_as_they_were_trained',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/qdq.py',
        '    if left:\n',
        '    if False:\n',
        'layers that the file lacks',
        (
            'tests/test_quantization/test_fake.py::test_a_layer_that_the_file_lacks_is_not_left_in_float',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/flow.py',
        "name != 'batch_norm' or origins[0].layer in self._norms",
        'True',
        'a ReLU behind a norm that does not fold',
        (
            'tests/test_quantization/test_fake.py::test_a_norm_of_two_convolutions_is_not_folded',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/fake.py',
        'weight_quantizer(torch.zeros(_outputs(layer), 1))',
        'pass',
        'shapes of quantizers in averaged copies',
        (
            'tests/test_engine/test_resume.py::test_killed_and_resumed_is_the_uninterrupted_run',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/insert_bn.py',
        'if end is block:',
        'if True:',
        'norms that stand outside of blocks',
        (
            'tests/test_quantization/test_training.py::test_norms_are_inserted_behind_any_block',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/insert_bn.py',
        'rest(misfit.missing_keys) | set(misfit.unexpected_keys)',
        'set()',
        'entries that nobody loads',
        (
            'tests/test_quantization/test_training.py::test_no_entry_is_lost_when_norms_are_inserted',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/ptq.py',
        'remove_quantizers_(plain)',
        'pass',
        'the network that is timed',
        (
            'tests/test_quantization/test_ptq.py::test_the_float_network_is_timed_and_weighed',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/onnx_layers.py',
        'not _has_weight(node, computed) and tensors & set(node.input)',
        'False',
        'sums behind layers that stay in float',
        (
            'tests/test_quantization/test_partial.py::test_only_what_computes_in_integers_rounds',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/onnx_layers.py',
        'if scopes and scopes[-1].startswith(PREFIX):',
        'if False:',
        'names of layers whose weight has none',
        (
            'tests/test_quantization/test_partial.py::test_layers_are_named_as_modules',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/onnx_static.py',
        'part_weights_(model, left)\n',
        'pass\n',
        'weights that two layers share',
        (
            'tests/test_quantization/test_partial.py::test_kept_layers_are_float_in_the_file',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/onnx_static.py',
        'if shield_float_(written):\n',
        'if False:\n',
        'layers that the runtime would quantize by itself',
        (
            'tests/test_quantization/test_partial.py::test_runtimes_compute_kept_layers_in_float',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/partial.py',
        'high, best = middle, trials[-1]',
        'high = middle',
        'the best of the trials',
        (
            'tests/test_quantization/test_partial.py::test_the_fewest_layers_are_found',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/sensitivity.py',
        'return sorted(found, key=lambda layer: -layer.error)',
        'return found',
        'the order of sensitive layers',
        (
            'tests/test_quantization/test_partial.py::test_the_bad_layer_is_the_most_sensitive',
        ),
    ),
    Mutation(
        'mmdbb/mm/quantization/qdq.py',
        'shield_float_(exported)',
        'pass',
        'layers that training left in float',
        (
            'tests/test_quantization/test_fake.py::test_the_runtime_leaves_in_float_what_training_left',
        ),
    ),
    Mutation(
        'mmdbb/mm/evaluation/metric.py',
        'return round(lost, 4)',
        'return lost',
        'budgets that are met exactly',
        (
            'tests/test_evaluation/test_metric.py::test_single_precision_is_no_fall',
        ),
    ),
    Mutation(
        'mmdbb/mm/evaluation/metric.py',
        'lost = abs(lost)',
        'lost = lost',
        'figures whose direction nobody knows',
        (
            'tests/test_evaluation/test_metric.py::test_a_collapse_of_an_unknown_figure_passes_no_guard',
        ),
    ),
    Mutation(
        'mmdbb/mm/evaluation/metric.py',
        'if 0 <= value <= 1:',
        'if False:',
        'shares under the name of per cents',
        (
            'tests/test_evaluation/test_metric.py::test_known_figures_are_compared_in_points',
        ),
    ),
    Mutation(
        'mmdbb/mm/evaluation/metric.py',
        'lost *= 100 / abs(first.value) if first.value else math.inf',
        'lost *= 1',
        'figures without a unit',
        (
            'tests/test_evaluation/test_metric.py::test_a_collapse_of_an_unknown_figure_passes_no_guard',
        ),
    ),
    Mutation(
        'mmdbb/mm/evaluation/figures.py',
        'stack.enter_context(in_eval_mode(runner.model))',
        'pass',
        'modes after an evaluation',
        (
            'tests/test_quantization/test_ptq.py::test_evaluator_sees_what_the_file_computes',
        ),
    ),
    Mutation(
        'mmdbb/mm/evaluation/figures.py',
        'end_workers(runner)\n',
        'pass\n',
        'workers that outlive a runner',
        ('tests/test_quantization/test_ptq.py::test_workers_have_ended',),
    ),
    Mutation(
        'mmdbb/mm/pruning/structure.py',
        'parameter.requires_grad_(required[name])',
        'parameter.requires_grad_(True)',
        'frozen parameters after pruning',
        (
            'tests/test_pruning/test_pruning.py::test_what_parameters_require_and_their_modes_stay',
        ),
    ),
    Mutation(
        'mmdbb/mm/pruning/structure.py',
        'if touched & set(own.values()):',
        'if False:',
        'channels of layers with a forward of their own',
        (
            'tests/test_pruning/test_pruning.py::test_a_forward_of_its_own_is_pruned_right_or_left',
        ),
    ),
    Mutation(
        'mmdbb/mm/export/folding.py',
        'if not is_foldable(norm) or not is_plain(conv):',
        'if not is_foldable(norm):',
        'norms behind layers with a forward of their own',
        (
            'tests/test_mm/test_export.py::test_norms_are_folded_where_that_is_right',
        ),
    ),
    Mutation(
        'mmdbb/folding.py',
        'and is_known(norm)',
        'and True',
        'norms with a forward of their own',
        (
            'tests/test_mm/test_export.py::test_norms_are_folded_where_that_is_right',
        ),
    ),
    # ------------------------------------------------- boxes, own data, tools
    Mutation(
        'mmdbb/mm/export/boxes.py',
        'valid, group = scores > threshold, index % classes',
        'valid, group = scores > 0, index % classes',
        'the threshold of a single stage',
        ('tests/test_mm/test_boxes.py::test_boxes_are_those_of_mmdet',),
    ),
    Mutation(
        'mmdbb/mm/export/boxes.py',
        'valid = (chance > self.score_threshold) & (scores[..., None] >= 0)',
        'valid = chance > self.score_threshold',
        'proposals that are none',
        ('tests/test_mm/test_boxes.py',),
    ),
    Mutation(
        'mmdbb/mm/export/boxes.py',
        'apart = boxes + found.groups[..., None].to(boxes) * step',
        'apart = boxes + 0 * step',
        'classes that do not suppress each other',
        ('tests/test_mm/test_boxes.py::test_boxes_are_those_of_mmdet',),
    ),
    Mutation(
        'mmdbb/mm/export/boxes.py',
        'mine = levels == i',
        'mine = levels >= i',
        'the level that a region is pooled from',
        ('tests/test_mm/test_boxes.py::test_boxes_are_those_of_mmdet',),
    ),
    Mutation(
        'mmdbb/mm/export/boxes.py',
        "if getattr(coder, 'clip_border', True):",
        'if True:',
        'boxes that reach beyond the border',
        ('tests/test_mm/test_boxes.py::test_configs_are_followed',),
    ),
    Mutation(
        'mmdbb/mm/export/boxes.py',
        '(sides > least).all(-1)',
        '(sides > least).any(-1)',
        'boxes that are too small',
        ('tests/test_mm/test_boxes.py',),
    ),
    Mutation(
        'mmdbb/mm/export/same_boxes.py',
        'distance[mine.labels[:, None] != theirs.labels[None]] = torch.inf',
        'distance[mine.labels[:, None] < 0] = torch.inf',
        'boxes of two classes are not the same',
        ('tests/test_mm/test_boxes.py::test_comparing_boxes_bites',),
    ),
    Mutation(
        'mmdbb/mm/engine/data_check.py',
        'if classes > count:',
        'if classes > count + 1:',
        'one class too many for a head',
        ('tests/test_tools/test_own_data.py',),
    ),
    Mutation(
        'mmdbb/mm/engine/data_check.py',
        'wrong = np.unique(labels[(labels < 0) | (labels >= len(classes))])',
        'wrong = np.unique(labels[labels < 0])',
        'labels beyond the classes',
        ('tests/test_tools/test_own_data.py',),
    ),
    Mutation(
        'mmdbb/mm/evaluation/images.py',
        'largest = [max(pair) for pair in zip(largest, size)]',
        'largest = size',
        'the size that holds all images',
        (
            'tests/test_tools/test_own_data.py::test_default_size_holds_wide_and_tall_images',
        ),
    ),
    Mutation(
        'mmdbb/mm/inference/onnx_files.py',
        'bboxes=boxes / scale, scores',
        'bboxes=boxes * scale, scores',
        'boxes in pixels of the photograph',
        (
            'tests/test_tools/test_own_data.py::test_boxes_of_a_file_are_those_of_the_network',
        ),
    ),
    Mutation(
        'tools/arguments/paths.py',
        'if os.path.lexists(out) and not args.force:',
        'if False:',
        'an existing output is refused before the imports',
        ('tests/test_tools/test_order.py',),
    ),
)


def broken(mutation: Mutation, root: Path = ROOT) -> str:
    """The file's text with the mutation in it.

    Raises:
        ValueError: If the text to break is not there exactly once.
    """
    source = (root / mutation.path).read_text()
    found = source.count(mutation.text)
    if found != 1:
        raise ValueError(
            f'{mutation.path}: {mutation.text!r} stands there {found} times, '
            'and should once'
        )
    return source.replace(mutation.text, mutation.replacement)


# ------------------------------------------------------------------ running


class Copy:
    """A copy of the checkout, in which tests run.

    Args:
        root: The checkout.
        folder: Where the copy goes.
        package: The package that must be imported from the copy.
    """

    def __init__(self, root: Path, folder: Path, package: str) -> None:
        self.root, self.package = folder / 'checkout', package
        shutil.copytree(root, self.root, ignore=LEFT_OUT)
        # Told from stale ones by their source, not by its size and second.
        compileall.compile_dir(
            self.root / package,
            quiet=2,
            invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH,
        )
        self._log = folder / 'log'

    def test(self, tests: Tuple[str, ...]) -> Tuple[int, str]:
        """Run tests until one fails: pytest's exit code and output."""
        arguments = (tests, self.root, self.package, self._log)
        run = _CONTEXT.Process(target=_run_tests, args=arguments)
        run.start()
        run.join(TIMEOUT)
        if run.exitcode is None:
            run.kill()
            run.join()
        return run.exitcode, self._log.read_text()

    def verdict(self, mutation: Mutation) -> str:
        """Break a line, test, mend it: ``killed``, or what is wrong."""
        path = self.root / mutation.path
        before = path.read_text()
        try:
            path.write_text(broken(mutation, self.root))
            code, output = self.test(mutation.tests)
        except ValueError as error:
            return str(error)
        finally:
            path.write_text(before)
        if code == FAILED:
            return 'killed'
        if code == PASSED:
            return 'SURVIVED'
        return f'no test ran: exit code {code}\n{output[-2000:]}\n'


def _run_tests(
    tests: Tuple[str, ...], root: Path, package: str, log: Path
) -> None:
    """In a process of its own: end with pytest's exit code."""
    with open(log, 'w') as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(root)
    # The processes that tests start import the copy as well.
    os.environ['PYTHONPATH'] = str(root)
    os.environ['PYTHONDONTWRITEBYTECODE'] = '1'
    sys.dont_write_bytecode = True
    ours = {str(ROOT), str(ROOT / 'tests'), ''}
    sys.path[:] = [str(root), *(p for p in sys.path if p not in ours)]
    found = Path(importlib.util.find_spec(package).origin).resolve()
    if not found.is_relative_to(root.resolve()):
        print(f'the tests would import {found}, which is no copy')
        sys.exit(NOT_A_COPY)

    import pytest

    options = ['-x', '-q', '-W', 'ignore', '-p', 'no:cacheprovider']
    sys.exit(int(pytest.main([*options, *tests])))


def run_all(
    table: Tuple[Mutation, ...],
    root: Path = ROOT,
    package: str = 'mmdbb',
    jobs: int = 1,
) -> int:
    """Try each line of the table; how many were not killed."""
    # What the server of processes has imported, each of them has; it starts
    # with the first one, and one thread is all that a fork keeps.
    os.environ['OMP_NUM_THREADS'] = '1'
    _CONTEXT.set_forkserver_preload(PRELOADED)
    copies = queue.SimpleQueue()

    def with_a_copy(run: Callable[[Copy], Any]) -> Tuple[Any, float]:
        copy, start = copies.get(), time.monotonic()
        try:
            return run(copy), time.monotonic() - start
        finally:
            copies.put(copy)

    names = dict.fromkeys(name for row in table for name in row.tests)
    names = [n for n in names if n.partition('::')[0] not in {*names} - {n}]
    with (
        tempfile.TemporaryDirectory(prefix='mutations-') as folder,
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
    ):
        for i in range(jobs):
            copies.put(Copy(root, Path(folder) / str(i), package))
        unbroken = pool.map(
            lambda name: with_a_copy(lambda copy: copy.test((name,))), names
        )
        for name, ((code, output), _) in zip(names, unbroken):
            if code != PASSED:
                print(f'{name} fails without any mutation:\n{output}')
                pool.shutdown(cancel_futures=True)
                return len(table)
        bad = 0
        verdicts = pool.map(
            lambda row: with_a_copy(lambda copy: copy.verdict(row)), table
        )
        for row, (found, seconds) in zip(table, verdicts):
            bad += found != 'killed'
            line = f'{found}: {row.path}: {row.breaks} ({seconds:.0f} s)'
            print(line, flush=True)
    print(f'{len(table) - bad} of {len(table)} killed')
    return bad


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument(
        '--only',
        nargs='+',
        default=[''],
        metavar='WORDS',
        help='lines of the table whose path or description has these words',
    )
    parser.add_argument('--jobs', type=int, default=1, help='at once')
    args = parser.parse_args()
    table = tuple(
        row
        for row in TABLE
        if any(words in f'{row.path}: {row.breaks}' for words in args.only)
    )
    if not table:
        parser.error(f'no line of the table has {args.only}')
    sys.exit(1 if run_all(table, jobs=args.jobs) else 0)


if __name__ == '__main__':
    main()
