# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Collect the figures of a report from a network and some images."""

from __future__ import annotations

import copy
import math
from statistics import fmean
from typing import Callable, Dict, Mapping, NamedTuple, Optional

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.compare import errors_of
from mmdbb.errors import UserError
from mmdbb.found_norms import find_norms
from mmdbb.modules import count_parameters
from mmdbb.proof import SINGLE, prove_equal
from mmdbb.reparam import find_blocks, literal_forward, reparameterize
from mmdbb.report.dropping import (
    Dropping,
    Parts,
    kind_of,
    kinds_of,
    measure_dropping,
    without,
)
from mmdbb.report.figures import (
    Cost,
    KindFigures,
    ProofFigures,
    Report,
)
from mmdbb.report.layers import Layer
from mmdbb.running import CannotRun, run_network

#: Scores a merged network: the higher or lower, as its name says.
Evaluate = Callable[[nn.Module], float]


class ReportOptions(NamedTuple):
    """What a report is about, and what to measure for it.

    Attributes:
        title: Heading of the page; by default the network's class.
        facts: What the reader should know of the network -> in words, such as
            the data that it was trained on.
        evaluate: Function that takes the merged network, in eval mode, and
            returns its score, a number. The report has the score without each
            kind of branch then.
        metric: What ``evaluate`` returns, such as ``'accuracy (%)'``.
        drop: Whether to run the network without each branch.
        progress: Called with a line of text before each part of the work.
    """

    title: str = ''
    facts: Mapping[str, str] = {}
    evaluate: Optional[Evaluate] = None
    metric: str = 'score'
    drop: bool = True
    progress: Optional[Callable[[str], None]] = None


def network_report(
    model: nn.Module,
    images: Optional[Tensor] = None,
    options: Optional[ReportOptions] = None,
) -> Report:
    """Measure what the branches of a network do.

    Args:
        model: A trained network with blocks that are not merged, or a block;
            unchanged. It is measured in eval mode.
        images: Normalised images (N, C, H, W), some of those that the network
            is used for. Without images the layers are measured by themselves.
        options: What to measure beside the kernels, and what to write.

    Returns:
        Report: The figures. :func:`mmdbb.report.write_report` writes them
        into a page.

    Raises:
        TypeError: If ``model`` is no module, or ``images`` no tensor.
        ValueError: If the network has no block that is not merged, a kernel
            is not finite, or ``images`` has no images.
        UserError: If the network runs on other images, but not on these.

    Examples:
        >>> from mmdbb import DBB
        >>> network = nn.Sequential(DBB(3, 4, 3, padding=1), nn.ReLU())
        >>> report = network_report(network, torch.rand(2, 3, 8, 8))
        >>> report.proof.equal, list(report.kinds)
        (True, ['kxk', '1x1', '1x1_avg', '1x1_kxk'])
    """
    options = options or ReportOptions()
    _check(model, images)
    say = options.progress or (lambda text: None)
    model = getattr(model, '_orig_mod', model)  # torch.compile's wrapper
    if isinstance(model, ReparamConv2d):
        model = nn.Sequential(model)
    trained = copy.deepcopy(model).eval().float()
    blocks = _blocks(trained)
    if images is not None:
        images = images.detach().to(next(trained.parameters()).device).float()
    say('merging')
    merged = reparameterize(trained).eval()
    norms = find_norms(
        trained,
        None if images is None else lambda: run_network(trained, images[:1]),
    ).pairs
    layers = {
        name: _layer(trained, name, block, norms.get(name, ()))
        for name, block in blocks.items()
    }
    parts = {name: layer.parts for name, layer in layers.items()}
    say('proving the merge in float64')
    proof = _proof(trained, merged, images)
    flops = _Flops(trained, merged, list(blocks), images)
    dropping = Dropping({}, {})
    able = images is not None and not _cannot_run(merged, images)
    shown = images if able else None
    if shown is not None and options.drop:
        count = sum(map(len, parts.values()))
        say(f'running the network without each of {count} branches')
        dropping = measure_dropping(merged, parts, shown)
    found = [
        layer.figures(
            merged.get_submodule(name),
            flops.of(name),
            dropping.single.get(name, {}),
            proof.layers.get(name),
        )
        for name, layer in layers.items()
    ]
    scores: Dict[str, float] = {}
    if options.evaluate:
        say('evaluating without each kind of branch')
        scores = _scores(merged, parts, options.evaluate)
    before, after = flops.of('')
    return Report(
        title=options.title or type(model).__name__,
        facts=dict(options.facts),
        layers=found,
        kinds=_kinds(found, dropping.kinds, scores),
        before=Cost(count_parameters(trained), before),
        after=Cost(count_parameters(merged), after),
        proof=proof,
        images=0 if shown is None else len(shown),
        metric=options.metric if options.evaluate else '',
        score=scores.get(''),
    )


def _check(model: nn.Module, images: Optional[Tensor]) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(
            f'model must be a torch.nn.Module, got a {type(model).__name__}'
        )
    if images is None:
        return
    if not isinstance(images, Tensor):
        raise TypeError(
            'images must be a tensor of shape (N, C, H, W), got a '
            f'{type(images).__name__}'
        )
    if not images.numel():
        raise ValueError(
            f'images must have images, got shape {tuple(images.shape)}'
        )


def _blocks(model: nn.Module) -> Dict[str, ReparamConv2d]:
    """The blocks that are not merged, each under its first name."""
    found: Dict[ReparamConv2d, str] = {}
    for name, block in find_blocks(model).items():
        if not block.deploy:
            found.setdefault(block, name)
    if not found:
        raise ValueError(
            f'{type(model).__name__} has no block of mmdbb to report on: it '
            'is merged already, or was built without mmdbb'
        )
    return {name: block for block, name in found.items()}


def _layer(
    model: nn.Module, name: str, block: ReparamConv2d, norms: tuple
) -> Layer:
    norm = model.get_submodule(norms[0]) if len(norms) == 1 else None
    if not isinstance(norm, _BatchNorm) or norm.running_var is None:
        return Layer(name, block, None, '')
    return Layer(name, block, norm, norms[0])


def _cannot_run(network: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            run_network(network, images[:1], once=True)
    except CannotRun:
        return True
    return False


def _proof(
    trained: nn.Module, merged: nn.Module, images: Optional[Tensor]
) -> ProofFigures:
    """Compare in float64, prove, and compare in float32."""
    batches = [] if images is None else [images[:2]]
    double = copy.deepcopy(trained).double()
    # Merged in float64: nothing is rounded before it is proven.
    pair = [double, reparameterize(double).eval()]
    exact, plain = pair
    doubled = [batch.double() for batch in batches]
    found = errors_of(exact, plain, doubled)
    left_out: Mapping[str, str] = found.left_out
    refused, tolerance = '', None
    try:
        proven = prove_equal(exact, plain, batches)
        tolerance, left_out = proven.tolerance, proven.left_out
    except UserError as error:
        refused = str(error).partition('; nothing written')[0]
    single = errors_of(trained, merged, batches, SINGLE.smallest)
    rounding = single.difference().largest
    return ProofFigures(
        equal=not refused,
        refused=refused,
        tolerance=tolerance,
        outputs={n: e.largest for n, e in found.outputs.items()},
        layers={n: e.largest for n, e in found.layers.items()},
        single=rounding if math.isfinite(rounding) else None,
        left_out=left_out,
    )


class _Flops:
    """Operations for one image, of both networks and of their layers."""

    def __init__(
        self,
        trained: nn.Module,
        merged: nn.Module,
        names: list,
        images: Optional[Tensor],
    ) -> None:
        self._found: Dict[str, list] = {}
        if images is None:
            return
        with literal_forward(trained):
            counts = [_count(trained, names, images[:1])]
        counts.append(_count(merged, names, images[:1]))
        self._found = {
            name: [count.get(name) for count in counts]
            for name in ('', *names)
        }

    def of(self, name: str) -> list:
        """Before and after merging; of the whole network without a name."""
        return self._found.get(name, [None, None])


@torch.no_grad()
def _count(network: nn.Module, names: list, image: Tensor) -> Dict[str, int]:
    found: Dict[str, int] = {}
    counter = FlopCounterMode(display=False)
    starts = []

    def start(*_) -> None:
        starts.append(counter.get_total_flops())

    def end(name: str) -> Callable:
        def add(*_) -> None:
            spent = counter.get_total_flops() - starts.pop()
            found[name] = found.get(name, 0) + spent

        return add

    hooks = []
    for name in names:
        module = network.get_submodule(name)
        hooks.append(module.register_forward_pre_hook(start))
        hooks.append(module.register_forward_hook(end(name)))
    try:
        with counter:
            run_network(network, image, once=True)
    except CannotRun:
        return {}
    finally:
        for hook in hooks:
            hook.remove()
    found[''] = counter.get_total_flops()
    return found


def _scores(
    merged: nn.Module, parts: Parts, evaluate: Evaluate
) -> Dict[str, float]:
    """The score with all branches (under no name), and without each kind."""
    scores = {'': float(evaluate(merged))}
    for kind in kinds_of(parts):
        with without(merged, parts, kind_of(parts, kind)):
            scores[kind] = float(evaluate(merged))
    return scores


def _kinds(
    layers: list, changes: Mapping[str, float], scores: Mapping[str, float]
) -> Dict[str, KindFigures]:
    found = {}
    by_layer = {layer.name: layer.branches for layer in layers}
    for kind in kinds_of(by_layer):
        parts = {
            name: branches[kind].projection
            for name, branches in by_layer.items()
            if kind in branches
        }
        # Where the merged kernel is zero, its parts are no numbers.
        finite = {n: p for n, p in parts.items() if math.isfinite(p)}
        weakest = min(finite or parts, key=parts.__getitem__)
        found[kind] = KindFigures(
            layers=len(parts),
            projection=fmean(finite.values()) if finite else math.nan,
            weakest=(parts[weakest], weakest),
            network=changes.get(kind),
            metric=scores.get(kind),
        )
    return found
