# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The files that runtimes read: how each is written and run.

Each carries what is known of it as JSON under the name :data:`METADATA`: in
ONNX among the model's properties, in the others as the extra file
``mmdbb.json``.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from typing import Callable, Dict, Iterator, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from mmdbb.errors import UserError, require_packages

#: Under this name each file carries what is known of it, as JSON.
METADATA = 'mmdbb'

#: Name of the exported function's argument.
INPUT = 'images'

#: What torch's exporters build on: 2.5 brought the one by ``torch.export``.
_BY_TORCH_EXPORT = tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 5)
ONNX_OPSET = 18 if _BY_TORCH_EXPORT else 17


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


def file_format(name: str, out: str) -> Format:
    """The format of a name, for an output of this path.

    Raises:
        UserError: If there is no such format, the path ends in something
            else, or a package is missing.
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
    """Within the context, nothing warns."""
    # Tracers warn of each shape that a host reads as a number.
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        yield


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
