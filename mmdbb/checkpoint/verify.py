# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Whether two networks are the same function, by what they compute.

One side sums branches, the other runs plain convolutions. Compared are the
features and the outputs of every dense head; and each block by itself with
the norm behind it, because an image may not reach it (inside a RoI head) or
may not show an error (behind a ReLU that is zero).
"""

from __future__ import annotations

import itertools
import math
from typing import Dict, Iterable, Iterator, List, NamedTuple, Sequence, Tuple

import mmcv
import numpy as np
import torch
from torch import Tensor, nn

from mmdbb.checkpoint.stock_weights import names_in
from mmdbb.errors import UserError
from mmdbb.host_norms import norm_names
from mmdbb.reparam import find_blocks, literal_forward

#: Attributes under which the host packages keep heads that read features.
DENSE_HEADS = (
    'head',
    'decode_head',
    'auxiliary_head',
    'bbox_head',
    'rpn_head',
    'mask_head',
)


#: How far a merged network may be from the one that was trained, relative to
#: the largest magnitude, by what its weights are rounded to.
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 1e-1}
TOLERANCE = 1e-4


class Difference(NamedTuple):
    """How far two networks are apart.

    Attributes:
        largest: Largest difference of one number, relative to the largest
            magnitude of the output it belongs to.
        output: The output it belongs to.
        compared: Names of all outputs compared.
    """

    largest: float
    output: str
    compared: Tuple[str, ...]


def prove_equal(
    trained: nn.Module,
    network: nn.Module,
    images: Sequence[str] = (),
    image_size: Tuple[int, int] = (224, 224),
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> Difference:
    """Compare a network with the one that was trained.

    Args:
        trained: The network that was trained; in float32 afterwards.
        network: The network to prove, in float32: what was merged, or what
            was read from a file.
        images: Paths of images to compare on, besides random ones.
        image_size: Height and width in pixels to compare at.
        tolerance: Largest difference allowed, relative to the largest
            magnitude of an output.
        seed: For the random images.

    Returns:
        Difference: The largest one.

    Raises:
        UserError: If an image cannot be read, the network cannot be run, or
            the difference is larger.
    """
    trained = trained.float()
    batches = input_batches(trained, images, image_size, seed)
    difference = compare_networks(trained, network, batches)
    if not difference.largest <= tolerance:
        raise UserError(
            f'the merged network differs by {difference.largest:.2e} of '
            f'the largest magnitude, more than the tolerance '
            f'{tolerance:.0e} (in {difference.output}); nothing written'
        )
    return difference


@torch.no_grad()
def compare_networks(
    model: nn.Module, merged: nn.Module, batches: List[Tensor]
) -> Difference:
    """Compare a network with blocks, summed literally, with a merged one.

    Args:
        model: The network with blocks, in eval mode.
        merged: The network without, in eval mode.
        batches: Normalised images, each of shape (N, C, H, W).

    Returns:
        Difference: The largest one.

    Raises:
        UserError: If the network cannot be run on the images.
    """
    worst, where, compared = 0.0, '', {}
    with literal_forward(model):
        for name, expected, found in itertools.chain(
            _outputs_of_both(model, merged, batches),
            _blocks_of_both(model, merged),
        ):
            compared[name] = True
            error = relative_error(found, expected)
            if _is_worse(error, worst):
                worst, where = error, name
    return Difference(worst, where, tuple(compared))


def _is_worse(error: float, worst: float) -> bool:
    # A NaN is worse than any number, and stays the worst.
    return not (math.isnan(worst) or error <= worst)


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest magnitude expected."""
    if found.shape != expected.shape:
        return float('nan')
    scale = expected.abs().max().clamp_min(torch.finfo(expected.dtype).tiny)
    return ((found - expected).abs().max() / scale).item()


def network_outputs(model: nn.Module, images: Tensor) -> Dict[str, Tensor]:
    """Features and outputs of all dense heads, by name.

    Args:
        model: A classifier, detector or segmentor, or any module that maps
            images to tensors.
        images: Normalised images of shape (N, C, H, W).
    """
    if not hasattr(model, 'extract_feat'):
        return dict(_tensors('output', model(images)))
    features = model.extract_feat(images)
    outputs = dict(_tensors('features', features))
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
            raise UserError(
                f'the network cannot be run on images of shape '
                f'{tuple(batch.shape)}: {error}; choose another --image-size'
            ) from error
        for name, value in expected.items():
            yield name, value, found[name]


def _tensors(name: str, value) -> Iterator[Tuple[str, Tensor]]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield name, value
    elif isinstance(value, (list, tuple)):
        for i, item in enumerate(value):
            yield from _tensors(f'{name}.{i}', item)
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from _tensors(f'{name}.{key}', item)


def _blocks_of_both(
    model: nn.Module, merged: nn.Module
) -> Iterator[Tuple[str, Tensor, Tensor]]:
    norms = norm_names(model)
    renamed = names_in(merged, model)
    for name, block in find_blocks(model).items():
        # The norm behind it may hold the merged bias.
        x = _input_for(block)
        layers = [name, norms[name]] if name in norms else [name]
        found = _run(merged, map(renamed, layers), x)
        yield name, _run(model, layers, x), found


def _run(model: nn.Module, layers: Iterable[str], x: Tensor) -> Tensor:
    for name in layers:
        x = model.get_submodule(name)(x)
    return x


def _input_for(block: nn.Module) -> Tensor:
    parameter = next(block.parameters())
    spec = block.spec
    size = [
        2 * d * k + s
        for d, k, s in zip(spec.dilation, spec.kernel_size, spec.stride)
    ]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, spec.in_channels, *size, generator=generator)
    return x.to(parameter)


def input_batches(
    model: nn.Module,
    images: Sequence[str],
    size: Tuple[int, int],
    seed: int,
) -> List[Tensor]:
    """Random and given images, as the model's preprocessor leaves them.

    Args:
        model: The model.
        images: Paths of images.
        size: Height and width in pixels that they are brought to.
        seed: For the random ones.

    Raises:
        UserError: If an image cannot be read.
    """
    generator = np.random.default_rng(seed)
    batches = [
        [
            generator.integers(0, 256, (*size, 3), dtype=np.uint8)
            for _ in range(2)
        ]
    ]
    for path in images:
        try:
            image = mmcv.imread(path)
        except (FileNotFoundError, OSError) as error:
            raise UserError(f'cannot read image {path}: {error}') from error
        if image is None:
            raise UserError(f'not an image: {path}')
        batches.append([mmcv.imresize(image, size[::-1])])
    return [_preprocessed(model, batch) for batch in batches]


def _preprocessed(model: nn.Module, images: List[np.ndarray]) -> Tensor:
    tensors = [
        torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
        for image in images
    ]
    preprocessor = getattr(model, 'data_preprocessor', None)
    if preprocessor is None:
        return torch.stack(tensors).float() / 255
    return preprocessor(dict(inputs=tensors))['inputs']
