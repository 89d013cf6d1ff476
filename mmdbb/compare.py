# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Compare what two networks compute.

One network sums the branches of its blocks, the other runs plain
convolutions. Features and the outputs of all heads that can be run are
compared on images; the other heads are named. Each block is also compared by
itself, with the norm behind it, because an image may not reach a block (inside
a RoI head) or may hide its error (a ReLU behind it gives zero).
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from typing import (
    Any,
    Dict,
    Iterable,
    Iterator,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.modules import (
    named_values,
    small_size,
    sync_norms_in_any_precision,
)
from mmdbb.reparam import literal_forward
from mmdbb.running import (
    WHOLE,
    CannotRun,
    run_network,
    takes_other_images,
)
from mmdbb.stock_weights import names_in
from mmdbb.untouched import Pairs, changed_layers

#: A channel whose share of the largest channel is smaller than this is
#: measured by this share, because rounding errors of the large channels reach
#: it.
SMALLEST_CHANNEL = 1e-4


class Difference(NamedTuple):
    """How far two networks are apart.

    Attributes:
        largest: Largest difference of one number, relative to the largest
            magnitude of the channel it belongs to.
        output: Name of the output with that difference.
        compared: Names of all outputs that were compared.
        left_out: Name of a part or output that was not compared -> the
            reason. Blocks in it were compared one by one nevertheless.
        tolerance: Largest difference that was allowed; None if any was.
    """

    largest: float
    output: str
    compared: Tuple[str, ...]
    left_out: Mapping[str, str] = {}
    tolerance: Optional[float] = None


class Error(NamedTuple):
    """How far two outputs are apart, relative to magnitudes; or NaN.

    Attributes:
        largest: The largest difference, see :func:`relative_error`.
        mean: The mean difference, relative to the largest magnitude.
    """

    largest: float
    mean: float


class Errors(NamedTuple):
    """How far two networks are apart.

    Attributes:
        outputs: Name of an output of the network or of a part -> its error.
        layers: Name of a changed layer, compared by itself -> its error.
        left_out: Name of a part that was not compared -> the reason.
    """

    outputs: Dict[str, Error]
    layers: Dict[str, Error]
    left_out: Dict[str, str]

    def difference(self) -> Difference:
        """The largest error, and where it is."""
        worst, where = 0.0, ''
        errors = {**self.outputs, **self.layers}
        for name, error in errors.items():
            if _is_worse(error.largest, worst):
                worst, where = error.largest, name
        return Difference(worst, where, tuple(errors), self.left_out)


def compare_networks(
    model: nn.Module,
    merged: nn.Module,
    batches: Sequence[Tensor],
    smallest: float = SMALLEST_CHANNEL,
    norms: Optional[Pairs] = None,
) -> Difference:
    """Compare a network with blocks, each branch by itself, with a merged one.

    Args:
        model: The network with blocks, in eval mode.
        merged: The network without blocks, in eval mode.
        batches: Normalised images, each of shape (N, C, H, W).
        smallest: Channels smaller than this share of the largest channel are
            measured by this share of it, see :func:`relative_error`.
        norms: Name of a block -> names of the norms behind it, see
            :func:`~mmdbb.untouched.changed_layers`.

    Returns:
        Difference: The largest difference found. If the network cannot be
        run on any images, it is that of the blocks by themselves.

    Raises:
        UserError: If the network runs on other images, but not on these, or
            gives values that are not finite.
    """
    return errors_of(
        model, merged, batches, smallest, norms=norms
    ).difference()


@torch.no_grad()
def errors_of(
    model: nn.Module,
    merged: nn.Module,
    batches: Sequence[Tensor],
    smallest: float = SMALLEST_CHANNEL,
    own: Sequence[str] = (),
    norms: Optional[Pairs] = None,
) -> Errors:
    """Like :func:`compare_networks`, with the error of each output.

    Args:
        model: The network with blocks, in eval mode.
        merged: The network without blocks, in eval mode.
        batches: Normalised images, each of shape (N, C, H, W).
        smallest: See :func:`compare_networks`.
        own: Names of blocks of other packages, which both networks have. They
            are compared by themselves if images reach them.
        norms: See :func:`compare_networks`.
    """
    errors = Errors({}, {}, {})
    outputs = _outputs_of_both(model, merged, batches, errors.left_out)
    layers = itertools.chain(
        _layers_of_both(model, merged, own, norms),
        _own_of_both(model, merged, own, batches),
    )
    precise = sync_norms_in_any_precision(model, merged)
    with literal_forward(model), precise:
        for compared, found in (
            (outputs, errors.outputs),
            (layers, errors.layers),
        ):
            for name, expected, value in compared:
                if not expected.isfinite().all():
                    raise UserError(
                        'the network that was trained gives values that are '
                        f'not finite (in {name}), before it is merged'
                    )
                error = error_of(value, expected, smallest)
                found[name] = worse_of(found.get(name, error), error)
    return errors


def error_of(found: Tensor, expected: Tensor, smallest: float) -> Error:
    """How far an output is from what it should be.

    Args:
        found: The output to check.
        expected: The output it should equal.
        smallest: See :func:`relative_error`.
    """
    largest = relative_error(found, expected, smallest)
    if found.shape != expected.shape or not expected.numel():
        return Error(largest, largest)
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return Error(largest, ((found - expected).abs().mean() / scale).item())


def worse_of(one: Error, other: Error) -> Error:
    """The larger of both numbers of two errors; NaN is the largest."""
    return Error(*(b if _is_worse(b, a) else a for a, b in zip(one, other)))


def _is_worse(error: float, worst: float) -> bool:
    # NaN counts as worse than any number.
    return not (math.isnan(worst) or error <= worst)


def relative_error(
    found: Tensor, expected: Tensor, smallest: float = SMALLEST_CHANNEL
) -> float:
    """Largest difference, relative to the largest magnitude of its channel.

    In single precision differences are relative to the largest channel
    instead, because small channels may be rounding errors.

    Args:
        found: The output to check. If it has two dimensions or more, the
            second counts channels.
        expected: The output it should equal.
        smallest: Channels smaller than this share of the largest channel are
            measured by this share of it.

    Returns:
        float: The error; NaN if the shapes differ.
    """
    if found.shape != expected.shape:
        return float('nan')
    if not expected.numel():
        return 0.0
    sizes = expected.abs()
    largest = sizes.max()
    if sizes.dim() > 1:
        sizes = sizes.amax([0, *range(2, sizes.dim())], keepdim=True)
    share = smallest if expected.dtype is torch.float64 else 1.0
    scale = sizes.maximum(share * largest)
    scale = scale.clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs() / scale).max().item()


def network_outputs(model: nn.Module, images: Tensor) -> Dict[str, Tensor]:
    """Run a network once, for features and the heads that read them.

    Args:
        model: A classifier, detector or segmentor, or any module that maps
            images to tensors.
        images: Normalised images of shape (N, C, H, W).

    Returns:
        dict: Names -> tensors.

    Raises:
        UserError: If not even the features can be computed.
    """
    return run_network(model, images, once=True).tensors


def _outputs_of_both(
    model: nn.Module,
    merged: nn.Module,
    batches: Sequence[Tensor],
    left_out: Dict[str, str],
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    ran = 0
    for batch in batches:
        try:
            outputs = run_network(model, batch)
        except CannotRun as error:
            if ran or takes_other_images(model, batch):
                raise UserError(
                    f'{error}; choose another --image-size'
                ) from error
            left_out[WHOLE] = f'{error}, nor on images of other sizes'
            continue
        ran += 1
        left_out.update(outputs.left_out)
        if WHOLE in outputs.left_out and takes_other_images(model, batch):
            left_out[WHOLE] += '; another --image-size would do'
        found = _run_merged(merged, batch)
        nothing = batch.new_zeros(0)
        for name, value in outputs.tensors.items():
            yield name, value, found.get(name, nothing)


def _run_merged(merged: nn.Module, batch: Tensor) -> Dict[str, Tensor]:
    try:
        return run_network(merged, batch).tensors
    except CannotRun as error:
        raise UserError(
            f'the trained network runs, but the merged one does not: {error}'
        ) from error


def _layers_of_both(
    model: nn.Module,
    merged: nn.Module,
    own: Sequence[str],
    norms: Optional[Pairs],
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    renamed = names_in(merged, model)
    inside = tuple(f'{name}.' for name in own)
    for layers in changed_layers(model, merged, norms):
        if layers[0].startswith(inside):
            continue  # it is merged with the block around it
        x = _input_for(model.get_submodule(layers[0]))
        found = _run(merged, map(renamed, layers), x)
        yield layers[0], _run(model, layers, x), found


def _run(model: nn.Module, layers: Iterable[str], x: Tensor) -> Tensor:
    for name in layers:
        x = model.get_submodule(name)(x)
    return x


def _input_for(layer: Any) -> Tensor:
    parameter = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(
        2, layer.in_channels, *small_size(layer), generator=generator
    )
    return x.to(parameter)


def _own_of_both(
    model: nn.Module,
    merged: nn.Module,
    own: Sequence[str],
    batches: Sequence[Tensor],
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    renamed = names_in(merged, model)
    blocks = {name: model.get_submodule(name) for name in own}
    for name, x in inputs_of(model, blocks, batches[:1]).items():
        expected = named_values(name, blocks[name](x))
        found = named_values(name, merged.get_submodule(renamed(name))(x))
        for (output, value), (_, other) in zip(expected, found):
            yield output, value, other


def inputs_of(
    model: nn.Module,
    blocks: Mapping[str, nn.Module],
    batches: Sequence[Tensor],
) -> Dict[str, Tensor]:
    """Random inputs of the shapes that modules get when images are run.

    Args:
        model: The network that the modules are part of.
        blocks: The modules by name.
        batches: Images to run the network on.

    Returns:
        dict: Names of the modules that take one tensor -> an input.
    """
    found: Dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(0)

    def watch(name: str, _: nn.Module, args: Tuple) -> None:
        if len(args) == 1 and isinstance(args[0], Tensor):
            x = torch.randn(args[0].shape, generator=generator)
            found.setdefault(name, x.to(args[0]))

    hooks = [
        block.register_forward_pre_hook(functools.partial(watch, name))
        for name, block in blocks.items()
    ]
    try:
        for batch in batches if blocks else ():
            with contextlib.suppress(CannotRun):
                run_network(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found
