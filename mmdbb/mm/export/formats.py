# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Write and run the files that runtimes read.

Each file carries metadata as JSON: in ONNX a property of the model named
:data:`METADATA`, in the other formats the extra file ``mmdbb.json``.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor

from mmdbb.errors import UserError, require_packages

#: Name under which each file carries its metadata, as JSON.
METADATA = 'mmdbb'

#: Name under which torch notes at a node of an ONNX file in which modules it
#: was computed, from the outermost on.
SCOPES = 'pkg.torch.onnx.name_scopes'

#: Name of the exported function's argument.
INPUT = 'images'

#: Whether torch's ONNX exporter builds on ``torch.export``, as since 2.5.
_BY_TORCH_EXPORT = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 5)
ONNX_OPSET = 18 if _BY_TORCH_EXPORT else 17


#: Most bytes of an ONNX file: protobuf's limit, without a second file.
LARGEST_ONNX = 2**31 - 1


class Format(NamedTuple):
    """A kind of file for a runtime.

    Attributes:
        suffix: Ending of the file's name.
        packages: Packages that writing and checking it need.
        write: Writes a file. Takes the module, an example of its input, the
            names of its outputs, the metadata and the path.
        load: Takes a path, and returns a function that runs the file: from
            images to output tensors.
    """

    suffix: str
    packages: Tuple[str, ...]
    write: Callable[[Any, Tensor, List[str], dict, str], None]
    load: Callable[[str], Callable[[Tensor], Tuple[Tensor, ...]]]


def file_format(name: str, out: str) -> Format:
    """Look up a format, and check that an output can be written in it.

    Args:
        name: Name of the format, a key of :data:`FORMATS`.
        out: Path of the output.

    Raises:
        UserError: If there is no such format, the path does not end in its
            suffix, or a package is missing.
    """
    if name not in FORMATS:
        raise UserError(
            f'format must be one of {", ".join(FORMATS)}; got {name!r}'
        )
    kind = FORMATS[name]
    if not out.endswith(kind.suffix):
        raise UserError(
            f'the output of format {name} must end in {kind.suffix}, got {out}'
        )
    require_packages(f'format {name}', 'formats', *kind.packages)
    return kind


@contextlib.contextmanager
def silence() -> Iterator[None]:
    """Ignore warnings within the context."""
    # Tracers warn of each shape that a network reads as a number.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


def _write_onnx(module, example, names, metadata, path) -> None:
    import onnx

    tensors = (*module.parameters(), *module.buffers())
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    if size > LARGEST_ONNX:
        raise UserError(
            f'the network has {size / 1e9:.2f} GB of weights in single '
            f'precision, and an ONNX file holds {LARGEST_ONNX / 1e9:.2f} GB '
            'at most; the other formats have no such limit'
        )
    if _BY_TORCH_EXPORT:
        how = dict(
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim('batch')},),
            external_data=False,
            verbose=False,
        )
        if module.translations:
            how['custom_translation_table'] = module.translations
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
    # The exporter notes the source file and line of each node, with the paths
    # of this machine.
    for node in (*model.graph.node, *model.graph.input, *model.graph.output):
        notes = [n for n in node.metadata_props if n.key == SCOPES]
        del node.metadata_props[:]
        node.metadata_props.extend(notes)
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
    with silence():
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
    with silence():
        return torch.export.load(path).module()


#: The formats that runtimes read, by name.
FORMATS: Dict[str, Format] = {
    'onnx': Format(
        '.onnx',
        ('onnx', 'onnxruntime') + ('onnxscript',) * _BY_TORCH_EXPORT,
        _write_onnx,
        _load_onnx,
    ),
    'torchscript': Format('.pt', (), _write_torchscript, _load_torchscript),
    'torch.export': Format(
        '.pt2', (), _write_torch_export, _load_torch_export
    ),
}
