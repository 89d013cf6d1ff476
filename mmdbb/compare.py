# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Compare what two networks compute, to prove that they are the same function.

One network sums the branches of its blocks, the other runs plain
convolutions. Features and the outputs of all dense heads are compared on
images. Each block is also compared by itself, with the norm behind it, because
an image may not reach a block (inside a RoI head) or may hide its error (a
ReLU behind it gives zero).
"""

from __future__ import annotations

import itertools
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
    Tuple,
)

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.modules import named_values
from mmdbb.reparam import literal_forward
from mmdbb.stock_weights import names_in
from mmdbb.untouched import Pairs, changed_layers

#: Attributes under which OpenMMLab's networks keep heads that read features.
DENSE_HEADS = (
    'head',
    'decode_head',
    'auxiliary_head',
    'bbox_head',
    'rpn_head',
    'mask_head',
)

#: Largest difference allowed between the merged network, not yet rounded, and
#: the trained one, relative to the largest magnitude of a channel.
TOLERANCE = 1e-5
#: A channel whose share of the largest channel is smaller than this holds
#: nothing but rounding errors of float64.
SMALLEST_CHANNEL = 1e-8


class Difference(NamedTuple):
    """How far two networks are apart.

    Attributes:
        largest: Largest difference of one number, relative to the largest
            magnitude of the channel it belongs to.
        output: Name of the output with that difference.
        compared: Names of all outputs that were compared.
    """

    largest: float
    output: str
    compared: Tuple[str, ...]


def prove_equal(
    trained: nn.Module,
    network: nn.Module,
    batches: Sequence[Tensor],
    tolerance: float = TOLERANCE,
    smallest: float = SMALLEST_CHANNEL,
    norms: Optional[Pairs] = None,
) -> Difference:
    """Raise unless a merged network equals the trained one.

    They are compared in float64; in float32 if one of them cannot run in
    float64. Both have that precision afterwards.

    Args:
        trained: The network that was trained, with its blocks.
        network: The network to prove, not yet rounded.
        batches: Normalised images, each of shape (N, C, H, W).
        tolerance: Largest difference allowed, relative to the largest
            magnitude of a channel.
        smallest: Channels smaller than this share of the largest channel are
            measured by this share of it, see :func:`relative_error`.
        norms: Name of a block -> names of the norms behind it, see
            :func:`~mmdbb.untouched.changed_layers`.

    Returns:
        Difference: The largest difference found.

    Raises:
        UserError: If the network cannot be run, or the difference is larger.
    """
    try:
        difference = _compared_in(
            torch.float64, trained, network, batches, smallest, norms
        )
    except CannotRun:
        # Some layers of other packages run in single precision only.
        difference = _compared_in(
            torch.float32, trained, network, batches, smallest, norms
        )
    if not difference.largest <= tolerance:
        raise UserError(
            f'the merged network differs by {difference.largest:.2e} of '
            f"a channel's largest magnitude, more than the tolerance "
            f'{tolerance:.0e} (in {difference.output}); nothing written'
        )
    return difference


class CannotRun(UserError):
    """A network cannot be run on the images."""


def _compared_in(
    dtype: torch.dtype,
    trained: nn.Module,
    network: nn.Module,
    batches: Sequence[Tensor],
    smallest: float,
    norms: Optional[Pairs],
) -> Difference:
    return compare_networks(
        trained.to(dtype),
        network.to(dtype),
        [batch.to(dtype) for batch in batches],
        smallest,
        norms,
    )


@torch.no_grad()
def compare_networks(
    model: nn.Module,
    merged: nn.Module,
    batches: List[Tensor],
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
        Difference: The largest difference found.

    Raises:
        UserError: If the network cannot be run on the images, or gives
            values that are not finite.
    """
    worst, where, compared = 0.0, '', {}
    with literal_forward(model):
        for name, expected, found in itertools.chain(
            _outputs_of_both(model, merged, batches),
            _layers_of_both(model, merged, norms),
        ):
            compared[name] = True
            if not expected.isfinite().all():
                raise UserError(
                    'the network that was trained gives values that are not '
                    f'finite (in {name}), before it is merged'
                )
            error = relative_error(found, expected, smallest)
            if _is_worse(error, worst):
                worst, where = error, name
    return Difference(worst, where, tuple(compared))


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
    """Run a network and collect features and outputs of all dense heads.

    Args:
        model: A classifier, detector or segmentor, or any module that maps
            images to tensors.
        images: Normalised images of shape (N, C, H, W).

    Returns:
        dict: Names -> tensors.
    """
    if not hasattr(model, 'extract_feat'):
        return _tensors('output', model(images))
    features = model.extract_feat(images)
    outputs = _tensors('features', features)
    for name in DENSE_HEADS:
        head = getattr(model, name, None)
        if isinstance(head, nn.Module):
            heads = head if isinstance(head, nn.ModuleList) else [head]
            for i, each in enumerate(heads):
                label = f'{name}.{i}' if len(heads) > 1 else name
                outputs.update(_tensors(label, each(features)))
    return outputs


def _outputs_of_both(
    model: nn.Module, merged: nn.Module, batches: List[Tensor]
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    for batch in batches:
        try:
            expected = network_outputs(model, batch)
            found = network_outputs(merged, batch)
        except (RuntimeError, ValueError, IndexError) as error:
            raise CannotRun(
                f'the network cannot be run on images of shape '
                f'{tuple(batch.shape)}: {error}; choose another --image-size'
            ) from error
        for name, value in expected.items():
            yield name, value, found[name]


def _tensors(name: str, outputs: Any) -> Dict[str, Tensor]:
    return {
        full: value
        for full, value in named_values(name, outputs)
        if isinstance(value, Tensor) and value.is_floating_point()
    }


def _layers_of_both(
    model: nn.Module, merged: nn.Module, norms: Optional[Pairs]
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    renamed = names_in(merged, model)
    for layers in changed_layers(model, merged, norms):
        x = _input_for(model.get_submodule(layers[0]))
        found = _run(merged, map(renamed, layers), x)
        yield layers[0], _run(model, layers, x), found


def _run(model: nn.Module, layers: Iterable[str], x: Tensor) -> Tensor:
    for name in layers:
        x = model.get_submodule(name)(x)
    return x


def _input_for(layer: nn.Module) -> Tensor:
    parameter = next(layer.parameters())
    size = [
        2 * d * k + s
        for d, k, s in zip(layer.dilation, layer.kernel_size, layer.stride)
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, layer.in_channels, *size, generator=generator)
    return x.to(parameter)
