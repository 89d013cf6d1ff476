# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The files of all workflows: read sources, write outputs, note and prove.

Deploying, exporting, converting, inserting norms, pruning and quantizing read
one :class:`Source` and write within :func:`writing`. So no workflow overwrites
its inputs, every output carries the same notes, and every file is read again
before it appears.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
from typing import (
    Any,
    Dict,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    Tuple,
    Union,
)

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdbb.errors import UserError
from mmdbb.files.atomic import all_or_nothing
from mmdbb.files.checkpoints import (
    load_strictly,
    read_checkpoint,
    refuse_untied,
    sha256,
)
from mmdbb.files.formats import OWN, SUFFIXES, write_checkpoint
from mmdbb.files.sources import with_versions_of
from mmdbb.mm.config_files import files_of
from mmdbb.mm.deploy.images import given_batch, random_batch
from mmdbb.mm.deploy.load import network_of
from mmdbb.mm.structure import Structure
from mmdbb.untouched import prove_rounded
from mmdbb.version import __version__


@dataclasses.dataclass(frozen=True, eq=False)
class Source:
    """A checkpoint to read, and the config that it was trained with.

    Attributes:
        cfg: The config; None if the checkpoint alone tells the network, as
            official files do.
        checkpoint: Path of the checkpoint.
        ema: True for the averaged weights, False for the weights that are
            trained; None for the averaged ones if the file has any.
        unsafe: Whether code in the checkpoint may run. True is for a file
            that you trust as you trust a program. False and None forbid it;
            with False the error message names the option that allows it, with
            None the caller has no such option.
    """

    cfg: Optional[Config]
    checkpoint: str
    ema: Optional[bool] = None
    unsafe: Optional[bool] = None

    def __post_init__(self) -> None:
        if not (self.cfg is None or isinstance(self.cfg, Config)):
            raise TypeError(
                'cfg must be a Config, as Config.fromfile(path) returns one; '
                f'got a {type(self.cfg).__name__}'
            )
        if not isinstance(self.checkpoint, str):
            raise TypeError(
                'checkpoint must be a path in a string, got '
                f'{self.checkpoint!r}'
            )

    @property
    def config(self) -> Config:
        """The config, for a workflow that needs one.

        Raises:
            UserError: If there is none.
        """
        if self.cfg is None:
            raise UserError(
                f'{self.checkpoint} needs the config that it was trained '
                'with: Source(config, checkpoint)'
            )
        return self.cfg

    def read(self) -> dict:
        """Read the checkpoint.

        Returns:
            dict: With ``state_dict`` (names to tensors), ``meta`` and
            ``weights`` (tells in words which weights were taken).

        Raises:
            UserError: If it cannot be read, or lacks the weights asked for.
        """
        return read_checkpoint(self.checkpoint, self.ema, self.unsafe)

    @functools.cached_property
    def sha256(self) -> str:
        """The hash of the checkpoint file, in hexadecimal digits."""
        return sha256(self.checkpoint)

    def notes(
        self, structure: Structure, weights: str, **more: Any
    ) -> Dict[str, Any]:
        """Notes that every file made from this source carries.

        Args:
            structure: The structure of the network in the file.
            weights: Tells in words which weights were taken; :meth:`read`
                returns it.
            more: More notes of the workflow, plain data.
        """
        return dict(
            more,
            version=__version__,
            structure=structure.value,
            weights=weights,
            source_sha256=self.sha256,
        )


class Proof(NamedTuple):
    """Images to compare two networks on, and how close they must be.

    Attributes:
        images: Images to compare on besides random ones: paths, or batches of
            normalised images (N, C, H, W) as they enter the network.
        image_size: Height and width of the images in pixels. A file for a
            runtime takes images of this size only.
        tolerance: Largest difference allowed. By default it is 1e-9 of a
            channel's largest magnitude for checkpoints (compared in float64
            before they are rounded), 1e-5 where only float32 is possible,
            and 1e-4 of an output's largest magnitude for files
            of runtimes.
        seed: Seed of the random images.
    """

    images: Sequence[Union[str, Tensor]] = ()
    image_size: Tuple[int, int] = (224, 224)
    tolerance: Optional[float] = None
    seed: int = 0

    @property
    def paths(self) -> List[str]:
        """Paths of those images that are files."""
        return [i for i in self.images if not isinstance(i, Tensor)]

    def given(self, model: nn.Module) -> List[Tensor]:
        """Preprocess the given images for a model.

        Args:
            model: The model whose preprocessor is used.

        Raises:
            UserError: If an image cannot be read.
        """
        return [given_batch(model, i, self.image_size) for i in self.images]

    def batches(self, model: nn.Module) -> List[Tensor]:
        """A batch of random images, then the given ones, all preprocessed.

        Args:
            model: The model whose preprocessor is used.

        Raises:
            UserError: If an image cannot be read.
        """
        random = random_batch(model, self.image_size, self.seed)
        return [random, *self.given(model)]


class Contents(NamedTuple):
    """The contents of a checkpoint and of the config beside it.

    Attributes:
        cfg: The config of the network.
        state: The weights, names -> tensors, exactly as the workflow proved
            them.
        structure: The structure of the network, which the config alone
            cannot tell.
        weights: Tells in words from which weights of the source they come;
            :meth:`Source.read` returns it.
        dtypes: Names of entries -> precisions to round them to; None to round
            nothing.
        meta: The ``meta`` of the training's checkpoint.
        notes: More notes of the workflow, plain data.
    """

    cfg: Config
    state: Dict[str, Tensor]
    structure: Structure
    weights: str
    dtypes: Optional[Dict[str, torch.dtype]] = None
    meta: Mapping[str, Any] = {}
    notes: Mapping[str, Any] = {}

    def noting(self, **notes: Any) -> Contents:
        """The same contents with more notes.

        Args:
            notes: The notes by name, plain data.
        """
        return self._replace(notes={**self.notes, **notes})

    def rounded(self) -> Dict[str, Tensor]:
        """The weights to write: each number rounded once."""
        dtypes = self.dtypes or {}
        return with_versions_of(
            self.state,
            {
                name: value.to(dtypes.get(name, value.dtype))
                for name, value in self.state.items()
            },
        )


class Drafts(NamedTuple):
    """Files that are not in their places yet; see :func:`writing`.

    Attributes:
        source: The source that they are made from; None for a network in
            memory.
        paths: Temporary paths to write to, one for each output, in order.
    """

    source: Optional[Source]
    paths: List[str]

    def network(self, contents: Contents) -> nn.Module:
        """Build the network from the written config, to prove it.

        Args:
            contents: The contents that the first two files will have. The
                network takes over the weights, which are not rounded yet.

        Raises:
            UserError: If the weights do not fit the network of the config.
        """
        checkpoint, config = self.paths[:2]
        contents.cfg.dump(config)
        described = dict(state_dict=contents.state, meta=self._meta(contents))
        network = network_of(config, described)
        load_strictly(network, contents.state, checkpoint, keep_dtype=True)
        return network

    def write(self, contents: Contents) -> None:
        """Write a checkpoint and its config, the first two of the files.

        Both are read again. The config must build a network that the entries
        fit, and each entry must equal the one in ``contents``, rounded once.

        Args:
            contents: The contents of the two files.

        Raises:
            UserError: If they cannot be written, or read back differently.
        """
        checkpoint, config = self.paths[:2]
        contents.cfg.dump(config)
        write_checkpoint(checkpoint, contents.rounded(), self._meta(contents))
        loaded = read_checkpoint(checkpoint)
        own = {name: value.dtype for name, value in contents.state.items()}
        dtypes = {**own, **(contents.dtypes or {})}
        prove_rounded(loaded['state_dict'], contents.state, dtypes)
        network = network_of(config, loaded)
        load_strictly(network, loaded['state_dict'], checkpoint)
        refuse_untied(network, loaded['state_dict'], checkpoint)

    def _meta(self, contents: Contents) -> Dict[str, Any]:
        notes = self.source.notes(
            contents.structure, contents.weights, **contents.notes
        )
        meta = {k: v for k, v in contents.meta.items() if k != OWN}
        return {**meta, 'cfg': contents.cfg.pretty_text, OWN: notes}


@contextlib.contextmanager
def writing(
    source: Optional[Source],
    *outputs: str,
    inputs: Sequence[str] = (),
    overwrite: bool = False,
) -> Iterator[Drafts]:
    """Write files that appear whole, at the end of the context, or not at all.

    Args:
        source: The source that the files are made from; None for a network
            in memory. An output must not be one of its files.
        outputs: Paths to write. A checkpoint comes first and its config
            second; see :func:`output_paths`.
        inputs: Paths of other files that are read. An output must not be one
            of them either.
        overwrite: Whether existing outputs may be replaced.

    Yields:
        Drafts: The temporary paths to write to. Every one must have been
        written by the end of the context.

    Raises:
        TypeError: If ``source`` is something else.
        UserError: If an output is an input, exists and may not be replaced,
            or cannot be written.
    """
    if not (source is None or isinstance(source, Source)):
        raise TypeError(
            'source must be a Source(config, checkpoint), got a '
            f'{type(source).__name__}'
        )
    if source is not None:
        inputs = (*inputs, source.checkpoint)
    refuse_inputs(outputs, source and source.cfg, *inputs)
    with all_or_nothing(*outputs, overwrite=overwrite) as drafts:
        yield Drafts(source, drafts)


def output_paths(out: str) -> Tuple[str, str]:
    """The paths of a checkpoint and of the config beside it.

    Args:
        out: Path of the checkpoint.

    Raises:
        UserError: If ``out`` does not end in a suffix of checkpoints.
    """
    out = os.fspath(out)
    suffix = next((s for s in SUFFIXES if out.endswith(s)), None)
    if suffix is None:
        raise UserError(
            f'the output must end in {" or ".join(SUFFIXES)}, got {out}'
        )
    return out, out[: -len(suffix)] + '.py'


def refuse_inputs(
    outputs: Sequence[str], cfg: Optional[Config], *inputs: str
) -> None:
    """Raise if an output is also an input.

    Args:
        outputs: Paths to write.
        cfg: The config, whose file and base files are inputs; None if there
            is no config.
        inputs: Paths of other files that are read.

    Raises:
        UserError: If one is; the message names it.
    """
    files = files_of(cfg) if cfg is not None else ()
    read = {os.path.realpath(path) for path in (*files, *inputs)}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f'output {path} is also an input')
