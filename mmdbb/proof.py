# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Prove that a merged network equals the trained one, or refuse it.

Both run in float64, where rounding is far smaller than any error of a merge.
A head may jump under rounding nevertheless: it sorts scores, or asks whether a
value equals its neighbourhood's maximum. The trained network shows this by
itself, when the outputs of its blocks are moved by rounding errors.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import Dict, Iterable, Iterator, NamedTuple, Optional, Sequence

import torch
from torch import Tensor, nn

from mmdbb.compare import (
    SMALLEST_CHANNEL,
    Difference,
    Error,
    Errors,
    error_of,
    errors_of,
    worse_of,
)
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks, literal_forward
from mmdbb.running import CannotRun, is_of_head, run_network


class Bound(NamedTuple):
    """How far a merged network, not yet rounded, may be from the trained one.

    Attributes:
        tolerance: Largest difference allowed, relative to the largest
            magnitude of a channel.
        smallest: Channels smaller than this share of the largest channel are
            measured by this share of it.
        jitter: Size of rounding errors, relative to a block's largest output.
    """

    tolerance: float
    smallest: float
    jitter: float


#: In float64. Right merges of several hundred networks of OpenMMLab's packages
#: stay below 1e-11.
DOUBLE = Bound(1e-9, SMALLEST_CHANNEL, 1e-13)
#: Where kernels were composed in float32, or networks cannot run in float64.
SINGLE = Bound(1e-5, 1.0, 1e-6)
#: How often a network is compared with itself under jitter.
_TRIES = 3
#: Where an output jumps, a right merge is, on average, no further from the
#: trained network than this many times the distance of that from itself.
_AS_FAR = 4


def prove_equal(
    trained: nn.Module,
    network: nn.Module,
    batches: Sequence[Tensor],
    tolerance: Optional[float] = None,
    exact: bool = True,
    own: Sequence[str] = (),
) -> Difference:
    """Raise unless a merged network equals the trained one.

    What runs in float64 is compared in float64, the rest in float32.

    Args:
        trained: The network that was trained, with its blocks; in float64
            afterwards.
        network: The network to prove, not yet rounded; in float64 afterwards.
        batches: Normalised images, each of shape (N, C, H, W).
        tolerance: Largest difference allowed, relative to the largest
            magnitude of a channel; by default that of :data:`DOUBLE`, or of
            :data:`SINGLE`.
        exact: Whether kernels were composed in float64.
        own: Names of blocks of other packages, which both networks have.

    Returns:
        Difference: The largest difference found. Its tolerance is that of
        float32 if any output was compared in float32.

    Raises:
        UserError: If the network runs on other images but not on these, or
            the difference is larger than the tolerance.
    """
    bound = _within(DOUBLE if exact else SINGLE, tolerance)
    trained, network = trained.double(), network.double()
    images = [batch.double() for batch in batches]
    errors = errors_of(trained, network, images, bound.smallest, own)
    proven = _proven(errors, trained, images, bound, own)
    allowed = bound.tolerance
    if errors.left_out:
        # Some layers of other packages run in single precision only.
        trained, network = (
            copy.deepcopy(each).float() for each in (trained, network)
        )
        bound = _within(SINGLE, tolerance)
        images = [batch.float() for batch in batches]
        errors = errors_of(trained, network, images, bound.smallest)
        known = {**proven.outputs, **proven.left_out}
        outputs = {n: e for n, e in errors.outputs.items() if n not in known}
        errors = Errors(outputs, {}, errors.left_out)
        single = _proven(errors, trained, images, bound, own)
        proven = Errors(
            {**proven.outputs, **single.outputs},
            proven.layers,
            {**proven.left_out, **single.left_out},
        )
        if single.outputs:
            allowed = bound.tolerance
    left_out = {**errors.left_out, **proven.left_out}
    difference = proven._replace(left_out=left_out).difference()
    return difference._replace(tolerance=allowed)


@torch.no_grad()
def own_rounding(network: nn.Module, images: Tensor) -> Optional[float]:
    """How far a network in float32 is from itself in float64.

    A network with a large number here is as far from itself in any other
    program that computes in float32.

    Args:
        network: Any network in eval mode; unchanged.
        images: Normalised images (N, C, H, W).

    Returns:
        float: The largest difference, relative to an output's largest
        magnitude; None if the network cannot be run in both.
    """
    try:
        exact = run_network(network.double(), images.double()).tensors
        rounded = run_network(
            copy.deepcopy(network).float(), images.float()
        ).tensors
    except CannotRun:
        return None
    errors = [
        error_of(rounded[name].double(), value, 1.0).largest
        for name, value in exact.items()
        if name in rounded
    ]
    return max(errors, default=None)


def _within(bound: Bound, tolerance: Optional[float]) -> Bound:
    return bound if tolerance is None else bound._replace(tolerance=tolerance)


def _proven(
    errors: Errors,
    trained: nn.Module,
    images: Sequence[Tensor],
    bound: Bound,
    own: Sequence[str],
) -> Errors:
    """Raise if an error is too large, unless the network jumps there.

    Features and blocks by themselves never count as jumping.

    Returns:
        Errors: Those within the tolerance. What jumps is left out.
    """
    too_large = {
        name: error
        for name, error in errors.outputs.items()
        if not error.largest <= bound.tolerance
    }
    jumps: Dict[str, str] = {}
    if too_large and all(map(is_of_head, too_large)):
        moved = _moved(trained, images, bound, own)
        jumps = {
            name: 'it jumps by itself where its blocks are rounded, by '
            f'{moved[name].largest:.1e}'
            for name, error in too_large.items()
            if not moved[name].largest <= bound.tolerance
            and not _is_further(error.mean, _AS_FAR * moved[name].mean)
        }
    outputs = {n: e for n, e in errors.outputs.items() if n not in jumps}
    proven = Errors(outputs, errors.layers, jumps)
    difference = proven.difference()
    if not difference.largest <= bound.tolerance:
        raise UserError(
            f'the merged network differs by {difference.largest:.2e} of '
            f"a channel's largest magnitude, more than the tolerance "
            f'{bound.tolerance:.0e} (in {difference.output}); nothing written'
        )
    return proven


@torch.no_grad()
def _moved(
    trained: nn.Module,
    images: Sequence[Tensor],
    bound: Bound,
    own: Sequence[str],
) -> Dict[str, Error]:
    """How far a network is from itself if its blocks are rounded.

    Returns:
        dict: Name of an output -> the distance.
    """
    blocks = set(find_blocks(trained).values())
    blocks.update(map(trained.get_submodule, own))
    moved: Dict[str, Error] = {}
    with literal_forward(trained):
        for batch in images:
            exact = run_network(trained, batch).tensors
            with _jittered(blocks, bound.jitter):
                tries = [run_network(trained, batch) for _ in range(_TRIES)]
            for name, expected in exact.items():
                for found in tries:
                    value = found.tensors.get(name, batch.new_zeros(0))
                    error = error_of(value, expected, bound.smallest)
                    moved[name] = worse_of(moved.get(name, error), error)
    return moved


@contextlib.contextmanager
def _jittered(blocks: Iterable[nn.Module], size: float) -> Iterator[None]:
    """Within the context, the outputs of blocks have rounding errors."""
    generator = torch.Generator().manual_seed(0)

    def move(block: nn.Module, args: object, output: Tensor) -> Tensor:
        noise = torch.randn(output.shape, generator=generator)
        return output + size * output.abs().amax() * noise.to(output)

    hooks = [block.register_forward_hook(move) for block in blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _is_further(mean: float, than: float) -> bool:
    # Lists of other lengths have no distance: NaN.
    return not math.isnan(than) and not mean <= than
