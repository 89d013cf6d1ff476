# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Prove that a merged network equals the trained one, or refuse it.

Both run in float64, where rounding is far smaller than any error of a merge.
Two kinds of networks move far under rounding nevertheless: deep ones after few
iterations of training amplify it, and some heads jump, because they sort
scores or ask whether a value equals the maximum around it. The trained network
shows both by itself, when the outputs of its blocks are moved by rounding
errors. What moves then is measured by how far it moves.
"""

from __future__ import annotations

import contextlib
import copy
import math
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    List,
    NamedTuple,
    Optional,
    Sequence,
    Set,
)

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
from mmdbb.untouched import Pairs


class Bound(NamedTuple):
    """How far a merged network, not yet rounded, may be from the trained one.

    Differences are relative to the largest magnitude of a channel.

    Attributes:
        tolerance: Largest difference allowed.
        amplified: Largest difference allowed where the trained network is as
            far from itself under rounding errors.
        smallest: Channels smaller than this share of the largest channel are
            measured by this share of it.
        jitter: Size of rounding errors, relative to a block's largest output.
    """

    tolerance: float
    amplified: float
    smallest: float
    jitter: float

    def within(self, tolerance: Optional[float]) -> Bound:
        """The bound with a tolerance that the user asks for, if any."""
        if tolerance is None:
            return self
        return self._replace(tolerance=tolerance, amplified=tolerance)


#: In float64. Right merges of 28 networks of OpenMMLab's packages, with random
#: weights, differed by at most 7e-12, block by block by 1e-14.
DOUBLE = Bound(1e-9, 1e-5, SMALLEST_CHANNEL, 1e-14)
#: Where kernels were composed in float32, or networks cannot run in float64.
SINGLE = Bound(1e-5, 1e-3, 1.0, 1e-6)
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
    norms: Optional[Pairs] = None,
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
        norms: Name of a block -> names of the norms behind it, see
            :func:`~mmdbb.untouched.changed_layers`.

    Returns:
        Difference: The largest difference found, and the bound that was
        needed. An output that jumps under rounding is left out.

    Raises:
        UserError: If the network runs on other images but not on these, or
            the difference is larger than the tolerance.
    """
    bound = (DOUBLE if exact else SINGLE).within(tolerance)
    trained, network = trained.double(), network.double()
    images = [batch.double() for batch in batches]
    errors = errors_of(trained, network, images, bound.smallest, own, norms)
    found = _accepted(errors, trained, images, bound, own)
    if not any(map(_asks_for_float32, errors.left_out.values())):
        left_out = {**errors.left_out, **found.left_out}
        return found._replace(left_out=left_out)
    trained, network = (
        copy.deepcopy(each).float() for each in (trained, network)
    )
    images = [batch.float() for batch in batches]
    bound = SINGLE.within(tolerance)
    errors = errors_of(trained, network, images, bound.smallest, norms=norms)
    known = {*found.compared, *found.left_out}
    outputs = {n: e for n, e in errors.outputs.items() if n not in known}
    single = _accepted(Errors(outputs, {}, {}), trained, images, bound, own)
    allowed: List[Any] = [found.tolerance, single.tolerance]
    worst = max(found, single, key=lambda difference: difference.largest)
    return worst._replace(
        compared=(*found.compared, *single.compared),
        left_out={**errors.left_out, **found.left_out, **single.left_out},
        tolerance=max(allowed),
    )


@torch.no_grad()
def own_rounding(network: nn.Module, images: Tensor) -> Optional[float]:
    """How far a network in float32 is from itself in float64.

    Where it is far, every program that computes in float32 is as far from
    the exact outputs.

    Args:
        network: Any network in eval mode; in float64 afterwards.
        images: Normalised images (N, C, H, W).

    Returns:
        float: The largest difference, relative to an output's largest
        magnitude; None if the network cannot be run in both.
    """
    network = network.double()
    try:
        exact = run_network(network, images.double()).tensors
        rounded = run_network(copy.deepcopy(network).float(), images.float())
    except CannotRun:
        return None
    errors = [
        error_of(rounded.tensors[name].double(), value, 1.0).largest
        for name, value in exact.items()
        if name in rounded.tensors
    ]
    return max(errors, default=None)


def _asks_for_float32(reason: str) -> bool:
    # Some layers of other packages run in single precision only.
    return any(word in reason for word in ('dtype', 'Double', 'double'))


def _accepted(
    errors: Errors,
    trained: nn.Module,
    images: Sequence[Tensor],
    bound: Bound,
    own: Sequence[str],
) -> Difference:
    """Raise if an error is larger than rounding explains.

    Returns:
        Difference: The largest error. Outputs of heads that jump under
        rounding are left out.
    """
    far = {
        name: error
        for name, error in errors.outputs.items()
        if not error.largest <= bound.tolerance
    }
    amplified, jumps = set(), {}
    moved = _moved(trained, images, bound, own) if far else {}
    for name, error in far.items():
        if error.largest <= min(bound.amplified, moved[name].largest):
            amplified.add(name)
        elif is_of_head(name) and _jumps(error, moved[name], bound):
            jumps[name] = (
                'rounding its blocks alone moves it by '
                f'{moved[name].largest:.1e}'
            )
    outputs = {n: e for n, e in errors.outputs.items() if n not in jumps}
    refused = {n: e for n, e in far.items() if n not in {*amplified, *jumps}}
    refused.update(
        {
            name: error
            for name, error in errors.layers.items()
            if not error.largest <= bound.tolerance
        }
    )
    if refused:
        worst = Errors(refused, {}, {}).difference()
        raise UserError(
            f'the merged network differs by {worst.largest:.2e} of '
            f"a channel's largest magnitude, more than the tolerance "
            f'{bound.tolerance:.0e} (in {worst.output}); nothing written'
        )
    allowed = bound.amplified if amplified else bound.tolerance
    difference = Errors(outputs, errors.layers, jumps).difference()
    return difference._replace(tolerance=allowed)


def _jumps(error: Error, moved: Error, bound: Bound) -> bool:
    """Whether an output is no further away than from itself, on average.

    Args:
        error: Distance of the merged network from the trained one.
        moved: Distance of the trained network from itself under jitter; NaN
            if its length changes.
        bound: The bound that ``error`` exceeds.
    """
    if moved.largest <= bound.tolerance:
        return False
    return math.isnan(moved.mean) or error.mean <= _AS_FAR * moved.mean


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
    blocks: Set[nn.Module] = set(find_blocks(trained).values())
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
