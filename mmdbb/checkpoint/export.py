# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Merged networks as ONNX, TorchScript and ``torch.export`` files.

A file appears only after it was read again by what will run it, ONNX Runtime
or torch, and gave what the network with its branches gives.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import json
import math
import warnings
from types import ModuleType
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from mmcv.cnn import fuse_conv_bn
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdbb.checkpoint.export_modules import (
    ExportModule,
    export_module,
    preprocessing,
)
from mmdbb.checkpoint.files import all_or_nothing
from mmdbb.checkpoint.verify import Difference, relative_error
from mmdbb.errors import UserError
from mmdbb.reparam import find_blocks, literal_forward, reparameterize
from mmdbb.version import __version__

#: Under this name each file carries what is known of it, as JSON.
METADATA = 'mmdbb'

#: Name of the exported function's argument.
INPUT = 'images'

#: What torch's exporters build on: 2.5 brought the one by ``torch.export``.
_BY_TORCH_EXPORT = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 5)
ONNX_OPSET = 18 if _BY_TORCH_EXPORT else 17

#: The file is traced with 2 images and verified with these many.
_BATCH, _VERIFIED_BATCHES = 2, (1, 3)


class Exported(NamedTuple):
    """What :func:`export_network` wrote.

    Attributes:
        path: The file.
        blocks: How many blocks were merged for it; the model keeps its own.
        outputs: Names and, for one image, shapes of the outputs.
        difference: How far file and model are apart.
        metadata: What the file says of itself.
    """

    path: str
    blocks: int
    outputs: Dict[str, Tuple[int, ...]]
    difference: Difference
    metadata: dict


class Format(NamedTuple):
    """A kind of file.

    Attributes:
        suffix: How its name ends.
        packages: What writing and checking it imports.
        write: From module, example, output names, metadata and path.
        load: From a path to a function from images to output tensors.
    """

    suffix: str
    packages: Tuple[str, ...]
    write: Callable[[nn.Module, Tensor, List[str], dict, str], None]
    load: Callable[[str], Callable[[Tensor], Tuple[Tensor, ...]]]


@torch.no_grad()
def export_network(
    model: nn.Module,
    out: str,
    format: str = 'onnx',
    image_size: Tuple[int, int] = (224, 224),
    head: bool = False,
    fold_norms: bool = True,
    images: Tensor | None = None,
    channels: int = 3,
    tolerance: float = 1e-4,
    overwrite: bool = False,
    seed: int = 0,
) -> Exported:
    """Write a network for a runtime, and prove the file equal to it.

    Blocks are merged first, in a copy; the log and the result say so. The
    batch size stays free, the size of the images does not.

    Args:
        model: A classifier, segmentor, detector, backbone, or any module
            that maps images to tensors, with blocks or without. Unchanged.
        out: The file to write; its suffix must be the format's.
        format: One of :data:`FORMATS`.
        image_size: Height and width in pixels.
        head: Whether a detector's dense head is exported too, besides
            backbone and neck.
        fold_norms: Whether to fold norms into the convolutions before them.
        images: Normalised images (N, C, H, W) to compare on, besides random
            ones.
        channels: Channels of an image.
        tolerance: Largest difference allowed, relative to the largest
            magnitude of an output.
        overwrite: Whether an existing file may be replaced.
        seed: For the random images.

    Returns:
        Exported: The file and what it was compared to.

    Raises:
        UserError: If an argument is wrong, a package is missing, the network
            cannot be exported, or the file differs from it.
    """
    kind = _format(format, out)
    packages_of(format)
    batches = _batches((channels, *image_size), images, seed)
    with all_or_nothing(out, overwrite=overwrite) as drafts, _in_eval(model):
        reference = export_module(model, head)
        with literal_forward(model):
            expected = [_run(reference, model, batch) for batch in batches]
        module, blocks = exportable(model, head, fold_norms)
        example = batches[0].new_zeros(_BATCH, *batches[0].shape[1:])
        module.drop_unused(example)
        names = list(expected[0])
        metadata = dict(
            version=__version__,
            format=format,
            merged_blocks=blocks,
            input=dict(
                name=INPUT,
                shape=['batch', channels, *image_size],
                **preprocessing(model),
            ),
            outputs=names,
            tolerance=tolerance,
        )
        try:
            with _silence():
                kind.write(module, example, names, metadata, drafts[0])
        except Exception as error:  # exporters raise whatever they meet
            raise UserError(
                f'{type(model).__name__} cannot be exported as {format}: '
                f'{type(error).__name__}: {error}'
            ) from error
        difference = _compare(kind.load(drafts[0]), batches, expected)
        if not difference.largest <= tolerance:
            raise UserError(
                f'the {format} file differs by {difference.largest:.2e} of '
                f'the largest magnitude, more than the tolerance '
                f'{tolerance:.0e} (in {difference.output}); nothing written'
            )
    return Exported(
        out,
        blocks,
        {name: tuple(y.shape[1:]) for name, y in expected[0].items()},
        difference,
        metadata,
    )


def exportable(
    model: nn.Module, head: bool = False, fold_norms: bool = True
) -> Tuple[ExportModule, int]:
    """A merged copy of a network, in float32 on the CPU, as one function.

    Args:
        model: As for :func:`export_network`.
        head: As there.
        fold_norms: As there.

    Returns:
        tuple: The module, in eval mode, and how many blocks were merged.
    """
    blocks = len(set(find_blocks(model).values()))
    if blocks:
        network = reparameterize(model)
        print_log(
            f'merged {blocks} blocks of a copy of the network for the export',
            'current',
        )
    else:
        network = copy.deepcopy(model)
    for module in network.modules():
        module.training = False
    if fold_norms:
        network = fuse_conv_bn(network)
    return export_module(network.float().cpu(), head).eval(), blocks


def packages_of(format: str) -> List[ModuleType]:
    """Import what a format needs.

    Raises:
        UserError: If a package is missing.
    """
    try:
        return [importlib.import_module(n) for n in FORMATS[format].packages]
    except ImportError as error:
        raise UserError(
            f'format {format} needs {error.name or error}: '
            'pip install "mmdbb[formats]"'
        ) from error


def _format(name: str, out: str) -> Format:
    if name not in FORMATS:
        raise UserError(
            f'format must be one of {", ".join(FORMATS)}; got {name!r}'
        )
    kind = FORMATS[name]
    if not out.endswith(kind.suffix):
        raise UserError(
            f'the output of format {name} must end in {kind.suffix}, got {out}'
        )
    return kind


def _batches(
    shape: Tuple[int, int, int], images: Tensor | None, seed: int
) -> List[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    batches = [
        torch.randn(count, *shape, generator=generator)
        for count in _VERIFIED_BATCHES
    ]
    if images is not None:
        if tuple(images.shape[1:]) != shape:
            raise UserError(
                f'images must be of shape (N, {", ".join(map(str, shape))}) '
                f'to be compared on, got {tuple(images.shape)}'
            )
        batches.append(images.float().cpu())
    return batches


def _run(
    reference: ExportModule, model: nn.Module, images: Tensor
) -> Dict[str, Tensor]:
    parameter = next(model.parameters(), images)
    try:
        outputs = reference.outputs(images.to(parameter))
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UserError(
            f'the network cannot be run on images of shape '
            f'{tuple(images.shape)}: {error}; choose another image size'
        ) from error
    return {name: y.float().cpu() for name, y in outputs.items()}


def _compare(
    run: Callable[[Tensor], Tuple[Tensor, ...]],
    batches: List[Tensor],
    expected: List[Dict[str, Tensor]],
) -> Difference:
    errors = dict.fromkeys(expected[0], 0.0)
    for images, named in zip(batches, expected):
        for (name, value), found in zip(named.items(), run(images)):
            error = relative_error(found, value)
            # A NaN is worse than any number.
            error = float('inf') if math.isnan(error) else error
            errors[name] = max(errors[name], error)
    worst = max(errors, key=errors.get)
    return Difference(errors[worst], worst, tuple(errors))


@contextlib.contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    try:
        for module in modes:  # the hosts' train() does more than that
            module.training = False
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    # Tracers warn of each shape that a host reads as a number.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


# ------------------------------------------------------------------ formats


def _write_onnx(module, example, names, metadata, path) -> None:
    import onnx

    if _BY_TORCH_EXPORT:
        how = dict(
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            external_data=False,
            verbose=False,
        )
    else:
        how = dict(
            dynamic_axes={name: {0: 'batch'} for name in (INPUT, *names)}
        )
    torch.onnx.export(
        module,
        (example,),
        path,
        input_names=[INPUT],
        output_names=names,
        opset_version=ONNX_OPSET,
        **how,
    )
    model = onnx.load(path)
    # The exporter notes from which line of whose file each node comes.
    for node in (*model.graph.node, *model.graph.input, *model.graph.output):
        del node.metadata_props[:]
        node.doc_string = ''
    del model.graph.value_info[:]
    note = json.dumps(dict(metadata, opset=ONNX_OPSET))
    onnx.helper.set_model_props(model, {METADATA: note})
    onnx.save(model, path)
    onnx.checker.check_model(path, full_check=True)


def _load_onnx(path: str) -> Callable[[Tensor], Tuple[Tensor, ...]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(
        path, providers=['CPUExecutionProvider']
    )

    def run(images: Tensor) -> Tuple[Tensor, ...]:
        outputs = session.run(None, {INPUT: images.numpy()})
        return tuple(map(torch.from_numpy, outputs))

    return run


def _write_torchscript(module, example, names, metadata, path) -> None:
    traced = torch.jit.trace(module, example, check_trace=False)
    extra = {f'{METADATA}.json': json.dumps(metadata)}
    torch.jit.save(traced, path, _extra_files=extra)


def _load_torchscript(path: str) -> Callable[[Tensor], Tuple[Tensor, ...]]:
    with _silence():
        return torch.jit.load(path, map_location='cpu')


def _write_torch_export(module, example, names, metadata, path) -> None:
    program = torch.export.export(
        module,
        (example,),
        dynamic_shapes=({0: torch.export.Dim('batch')},),
    )
    extra = {f'{METADATA}.json': json.dumps(metadata)}
    torch.export.save(program, path, extra_files=extra)


def _load_torch_export(path: str) -> Callable[[Tensor], Tuple[Tensor, ...]]:
    with _silence():
        return torch.export.load(path).module()


#: The formats that runtimes read, by name.
FORMATS: Dict[str, Format] = {
    'onnx': Format(
        '.onnx', ('onnx', 'onnxruntime', 'onnxscript'), _write_onnx, _load_onnx
    ),
    'torchscript': Format('.pt', (), _write_torchscript, _load_torchscript),
    'torch.export': Format(
        '.pt2', (), _write_torch_export, _load_torch_export
    ),
}
