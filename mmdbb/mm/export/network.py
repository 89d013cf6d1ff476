# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write merged networks as ONNX, TorchScript and ``torch.export`` files.

A file appears only after its runtime (ONNX Runtime or torch) has loaded it
and computed the same outputs as the network with its branches.
"""

from __future__ import annotations

import copy
import math
import os
from typing import (
    Callable,
    Dict,
    List,
    NamedTuple,
    Optional,
    Tuple,
    Union,
)

import torch
from mmengine.logging import print_log
from torch import Tensor, nn

from mmdbb.compare import Difference
from mmdbb.errors import UserError
from mmdbb.mm.data_flow import image_shape
from mmdbb.mm.export.folding import fold_norms_
from mmdbb.mm.export.formats import INPUT, file_format, silence
from mmdbb.mm.export.modules import (
    Detector,
    ExportModule,
    export_module,
    preprocessing,
)
from mmdbb.mm.outputs import Proof, writing
from mmdbb.modules import in_eval_mode
from mmdbb.reparam import find_blocks, literal_forward, reparameterize
from mmdbb.running import reason_of, takes_other_images
from mmdbb.version import __version__

#: Numbers of images to trace the network with, and to verify the file with.
_BATCH, _VERIFIED_BATCHES = 2, (1, 3)
#: Largest difference allowed between an output of the file and the network's,
#: as a share of the output's largest magnitude. It is not smaller because
#: runtimes compute in single precision.
EXPORT_TOLERANCE = 1e-4


class Exported(NamedTuple):
    """The file that :func:`export_network` wrote, and its proof.

    Attributes:
        path: Path of the file.
        blocks: Number of blocks merged in the copy that was exported.
        outputs: Names of the outputs -> their shapes without the batch.
        difference: Difference between the outputs of file and network.
        metadata: Metadata that the file carries.
    """

    path: str
    blocks: int
    outputs: Dict[str, Tuple[int, ...]]
    difference: Difference
    metadata: dict


#: How much of a detector's head to export: False for nothing, True for the
#: raw maps of the dense head, :data:`BOXES` for the boxes in the end.
Head = Union[bool, str]
BOXES = 'boxes'


class ExportOptions(NamedTuple):
    """Which parts of a network to export, and for which runtime.

    Attributes:
        format: ``onnx``, ``torchscript`` or ``torch.export``.
        head: How much of a detector's head to export besides backbone and
            neck: False for nothing, True for the raw maps of the dense head,
            ``'boxes'`` for the boxes in the end (ONNX only).
        fold_norms: Whether to fold norms into the convolutions before them.
        channels: Number of channels of an image.
    """

    format: str = 'onnx'
    head: Head = False
    fold_norms: bool = True
    channels: int = 3


def export_network(
    model: nn.Module,
    out: str,
    format: str = 'onnx',
    head: Head = False,
    fold_norms: bool = True,
    channels: int = 3,
    proof: Optional[Proof] = None,
    overwrite: bool = False,
) -> Exported:
    """Write a network for a runtime, and prove the file equal to it.

    Blocks are first merged in a copy; the log and the result say how many.
    The file takes batches of any size, but images of one size only.

    Args:
        model: A classifier, segmentor, detector, backbone, or any module
            that maps images to tensors, with blocks or without. Unchanged.
        out: Path of the file to write, with the suffix of the format.
        format: ``onnx``, ``torchscript`` or ``torch.export``.
        head: How much of a detector's head to export besides backbone and
            neck: False for nothing, True for the raw maps of the dense head,
            ``'boxes'`` for the boxes in the end (ONNX only).
        fold_norms: Whether to fold norms into the convolutions before them.
        channels: Number of channels of an image.
        proof: Images to compare the file with the network on, besides random
            ones, and the tolerance. The file takes images of its
            ``image_size``.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Exported: The file's path, outputs and metadata, and the difference
        that the proof found.

    Raises:
        UserError: If an argument is wrong, a package is missing, the network
            cannot be exported, or the file differs from it.
    """
    out, proof = os.fspath(out), proof or Proof()
    options = ExportOptions(format, head, fold_norms, channels)
    file_format(format, out)  # refuses before the work starts
    with writing(None, out, inputs=proof.paths, overwrite=overwrite) as drafts:
        result = write_network(model, drafts.paths[0], options, proof)
    return result._replace(path=out)


@torch.no_grad()
def write_network(
    model: nn.Module,
    path: str,
    options: ExportOptions,
    proof: Proof,
    reference: Optional[nn.Module] = None,
    notes: Optional[dict] = None,
) -> Exported:
    """Write a file for a runtime to a draft's path, and prove it.

    If the file turns out wrong it stays there, so the path must be a draft
    that the caller discards on errors.

    Args:
        model: The network, with blocks or without. Unchanged.
        path: Path of the draft, from :func:`mmdbb.mm.outputs.writing`.
        options: Which parts to export, and for which runtime.
        proof: Images to compare the file with the network on, and the
            tolerance.
        reference: The network to compare the file with, such as the one with
            blocks that ``model`` was merged from; by default ``model``.
        notes: More metadata for the file, plain data.

    Returns:
        Exported: The path, outputs and metadata of the file, and the
        difference that the proof found.

    Raises:
        UserError: If a package is missing, the network cannot be exported, or
            the file differs from it.
    """
    format, head, channels = options.format, options.head, options.channels
    kind = file_format(format, path)
    check_head(head, format)
    tolerance = (
        EXPORT_TOLERANCE if proof.tolerance is None else proof.tolerance
    )
    batches = _batches(model, channels, proof)
    reference = model if reference is None else reference
    with in_eval_mode(model, reference):
        example = batches[0].new_zeros(_BATCH, *batches[0].shape[1:])
        expected = _outputs(reference, head, batches)
        module, blocks = exportable(model, head, example)
        if options.fold_norms:
            fold_norms_(module, example)
        module.drop_unused(example)
        names = list(expected[0])
        metadata = dict(
            notes or {},
            version=__version__,
            format=format,
            merged_blocks=len(find_blocks(reference)),
            input=dict(
                name=INPUT,
                shape=['batch', *batches[0].shape[1:]],
                **preprocessing(model),
            ),
            outputs=names,
            tolerance=tolerance,
        )
        try:
            with silence():
                kind.write(module, example, names, metadata, path)
        except UserError:
            raise
        except Exception as error:  # exporters raise all kinds of errors
            raise UserError(
                f'{type(model).__name__} cannot be exported as {format}: '
                f'{type(error).__name__}: {error}'
            ) from error
        difference = _compare(kind.load(path), batches, expected, module)
        if head == BOXES:
            difference = _more(
                difference,
                _compare_all_boxes(path, reference, batches, module),
            )
        if not difference.largest <= tolerance:
            raise UserError(
                f'the {format} file differs by {difference.largest:.2e} of '
                f'the largest magnitude, more than the tolerance '
                f'{tolerance:.0e} (in {difference.output}); nothing written'
            )
    return Exported(
        path=path,
        blocks=blocks,
        outputs={n: tuple(y.shape[1:]) for n, y in expected[0].items()},
        difference=difference,
        metadata=metadata,
    )


def check_head(head: Head, format: str) -> None:
    """Raise if a format cannot hold as much of a detector's head.

    Args:
        head: How much of the head to export.
        format: Name of the format.

    Raises:
        UserError: If it cannot, or torch is too old to write it.
    """
    if head not in (False, True, BOXES):
        raise UserError(f'head must be False, True or {BOXES!r}, got {head!r}')
    if head != BOXES:
        return
    if format != 'onnx':
        raise UserError(
            f'boxes are for the format onnx, not for {format}, whose '
            'runtimes have no suppression'
        )
    if tuple(map(int, torch.__version__.split('.')[:2])) < (2, 6):
        raise UserError(
            f'writing boxes needs torch 2.6 or later, got {torch.__version__}'
        )


def _wrapped(model: nn.Module, head: Head, example: Tensor) -> ExportModule:
    """A network as a function from images to the outputs asked for."""
    if head == BOXES:
        from mmdbb.mm.export.boxes import box_detector

        return box_detector(model, example)
    return export_module(model, head)


def exportable(
    model: nn.Module, head: Head, example: Tensor
) -> Tuple[ExportModule, int]:
    """A merged copy of a network, in float32 on the CPU, as one function.

    Args:
        model: A network, with blocks or without. Unchanged.
        head: How much of a detector's head to export.
        example: Images (N, C, H, W) of the size that the function takes.

    Returns:
        tuple: The module, in eval mode, and the number of merged blocks.
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
    network = network.float().cpu()
    return _wrapped(network, head, example).eval(), blocks


def _batches(model: nn.Module, channels: int, proof: Proof) -> List[Tensor]:
    generator = torch.Generator().manual_seed(proof.seed)
    shape = image_shape(model, channels, proof.image_size)
    batches = [
        torch.randn(count, *shape, generator=generator)
        for count in _VERIFIED_BATCHES
    ]
    for batch in proof.given(model):
        if tuple(batch.shape[1:]) != shape:
            raise UserError(
                f'images are of shape {tuple(batch.shape[1:])} as they enter '
                f'the network, but the export is for {shape}; choose '
                'another image size'
            )
        batches.append(batch.float().cpu())
    return batches


def _outputs(
    model: nn.Module, head: Head, batches: List[Tensor]
) -> List[Dict[str, Tensor]]:
    """The network's outputs for each batch, computed branch by branch."""
    parameter, outputs = next(model.parameters(), batches[0]), []
    module = _wrapped(model, head, batches[0].to(parameter))
    with literal_forward(model):
        for images in batches:
            try:
                named = module.expected(images.to(parameter))
            except Exception as error:  # networks raise all kinds of errors
                raise UserError(
                    f'the network cannot be run on images of shape '
                    f'{tuple(images.shape)}: {reason_of(error)}; '
                    + _advice(model, head, images.to(parameter))
                ) from error
            outputs.append({k: _single(y) for k, y in named.items()})
    return outputs


def _single(value: Tensor) -> Tensor:
    value = value.cpu()
    return value.float() if value.is_floating_point() else value


def _advice(model: nn.Module, head: Head, images: Tensor) -> str:
    """What a user can do about a network that does not run on images."""
    if head and isinstance(export_module(model), Detector):
        return (
            'backbone and neck are exported where the head is left out '
            '(without --head, head=False)'
        )
    if takes_other_images(model, images):
        return 'choose another image size'
    return 'only networks that map images to tensors are exported'


def _compare(
    run: Callable[[Tensor], Tuple[Tensor, ...]],
    batches: List[Tensor],
    expected: List[Dict[str, Tensor]],
    module: ExportModule,
) -> Difference:
    errors = dict.fromkeys(expected[0], 0.0)
    for images, named in zip(batches, expected):
        for name, error in module.errors(run(images), named).items():
            # A NaN is worse than any number.
            error = float('inf') if math.isnan(error) else error
            errors[name] = max(errors[name], error)
    worst = max(errors, key=errors.get)
    return Difference(errors[worst], worst, tuple(errors))


def _compare_all_boxes(
    path: str, model: nn.Module, batches: List[Tensor], module: ExportModule
) -> Difference:
    """Compare boxes of any score: random images have few of a high one."""
    from mmdbb.mm.export.same_boxes import all_boxes, without_threshold

    with all_boxes(model), without_threshold(path) as run:
        expected = _outputs(model, BOXES, batches)
        return _compare(run, batches, expected, module)


def _more(one: Difference, other: Difference) -> Difference:
    return max(one, other, key=lambda difference: difference.largest)
