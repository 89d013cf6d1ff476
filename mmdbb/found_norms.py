# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Which norms follow which convolutions of a network, by their full names.

Three things need to know: a block starts from plain weights with the norm
behind the convolution, a merged bias folds into that norm, and the proof runs
each block with the norm behind it. All of them ask here.
"""

from __future__ import annotations

import logging
from typing import (
    Any,
    Callable,
    Dict,
    FrozenSet,
    NamedTuple,
    Optional,
    Tuple,
)

from torch import nn

from mmdbb.blocks.base import ReparamConv2d
from mmdbb.blocks.offers import AbsorbedNorm
from mmdbb.conv_norms import norm_names
from mmdbb.dimensions import CONVS
from mmdbb.files.sources import some
from mmdbb.modules import names_of
from mmdbb.ports import PORTS
from mmdbb.tracing import (
    Norms,
    norms_behind,
    norms_in_run,
    outside_blocks,
)


class FoundNorms(NamedTuple):
    """Which norms follow which convolutions, and how that was found out.

    Attributes:
        pairs: Full name of a convolution or block -> full names of the norms
            that alone read its output, one for each call of it with another
            norm (such as one a level in a detector's head). All names of a
            convolution are listed; of each norm the first.
        by: ``'data'`` if the network was run or traced, ``'names'`` if its
            attributes had to tell.
        reason: Why not by data, or for which convolutions not; empty if all
            was found by data.
        unreached: Full names of the convolutions of which the data tells
            nothing.
    """

    pairs: Dict[str, Tuple[str, ...]]
    by: str
    reason: str
    unreached: FrozenSet[str] = frozenset()


def find_norms(
    model: nn.Module, run: Optional[Callable[[], Any]] = None
) -> FoundNorms:
    """Find the norms behind all convolutions and blocks of a network.

    The network is run, or else traced with torch.fx, and the data watched.
    Names are asked where neither is possible, and for the convolutions that
    the run did not reach (inside a RoI head, say).

    Args:
        model: Any network; unchanged.
        run: Runs the network and returns its outputs. By default it is run on
            a random image, if OpenMMLab's packages are installed.
    """
    run_network = PORTS.run_network
    if run is None and run_network is not None:

        def run() -> Any:
            return run_network(model)

    seen, reason = _by_data(model, run)
    names = names_of(model)
    by_name = norm_names(model)
    pairs: Dict[str, Tuple[str, ...]] = {}
    unseen, named, outside = {}, [], {*outside_blocks(model)}
    for module, own in names.items():
        is_conv = isinstance(module, (*CONVS, ReparamConv2d))
        if not is_conv or module not in outside:
            continue
        if module in seen:
            norms = tuple(names[norm][0] for norm in seen[module])
        else:
            norms = by_name.get(own[0], ())
            unseen.update(dict.fromkeys(own))
            named += own[:1] if norms else []
        if norms:
            pairs.update(dict.fromkeys(own, norms))
    if seen and unseen:
        reason = f'a run does not reach {some([*unseen])}'
    if named:
        PORTS.log(
            'the norms behind these convolutions are found by the names of '
            f'attributes, not by the data: {some(named)} ({reason})',
            logging.INFO if seen else logging.WARNING,
        )
    by = 'data' if seen else 'names'
    return FoundNorms(pairs, by, reason, frozenset(unseen))


def norms_shown(model: nn.Module, example: Any = None) -> FoundNorms:
    """Find the norms behind convolutions by the data alone.

    Args:
        model: Any model; unchanged.
        example: Input to run the model on; without one, it is traced with
            torch.fx.

    Raises:
        ValueError: If the model cannot be traced, and no example is given.
    """
    names = names_of(model)
    pairs = {
        name: tuple(names[norm][0] for norm in norms)
        for conv, norms in norms_behind(model, example).items()
        for name in names[conv]
        if norms
    }
    return FoundNorms(pairs, 'data', '')


def absorbed_norms(model: nn.Module) -> Dict[str, str]:
    """The norms that blocks have absorbed, as the blocks remember.

    Args:
        model: A network with blocks.

    Returns:
        dict: Full name of a block -> full name of the place where the norm
        was. All names of a block are listed.
    """
    names = names_of(model)
    return {
        name: own[0]
        for place, own in names.items()
        if isinstance(place, AbsorbedNorm)
        for name in names.get(place.block, ())
    }


def _by_data(
    model: nn.Module, run: Optional[Callable[[], Any]]
) -> Tuple[Dict[nn.Module, Norms], str]:
    """What the data tells, and the reason if it tells nothing."""
    reasons = []
    if run is not None:
        try:
            return norms_in_run(model, run), ''
        except Exception as error:  # a network may fail in any way
            reason = (str(error) or type(error).__name__).splitlines()[0]
            reasons.append(f'it cannot be run: {reason}')
    try:
        return norms_behind(model), ''
    except ValueError as error:
        reasons.append(str(error).partition(';')[0])
    return {}, '; '.join(reasons)
