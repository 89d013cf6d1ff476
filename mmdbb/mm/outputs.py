# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""What all workflows do with their files: refuse, write, note, prove.

Deploying, exporting, converting, inserting norms, pruning and quantizing read
one :class:`Source` and write within :func:`writing`. So none of them writes
over what it reads, all of them note the same things in what they write, and
no file appears that was not read again.
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
from mmdbb.files.checkpoints import load_strictly, read_checkpoint, sha256
from mmdbb.files.formats import OWN, SUFFIXES, write_checkpoint
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
        cfg: The config; None where the checkpoint alone says what network it
            is of.
        checkpoint: Path of the checkpoint.
        ema: True for the averaged weights, False for those that training went
            on with; None for the averaged ones if the file has any.
        unsafe: Whether to run what code the checkpoint holds, for a file that
            you trust as you trust a program. None if the user has no way to
            ask for that: then no message advises it.
    """

    cfg: Optional[Config]
    checkpoint: str
    ema: Optional[bool] = None
    unsafe: Optional[bool] = None

    def read(self) -> dict:
        """Read the checkpoint.

        Returns:
            dict: With ``state_dict`` (names to tensors), ``meta`` and
            ``weights`` (a text that says which were taken).

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
        """What every file made from this source says of itself.

        Args:
            structure: The structure of the network in the file.
            weights: Which weights were taken, as :meth:`read` says.
            more: What this workflow notes besides, plain data.
        """
        return dict(
            more,
            version=__version__,
            structure=structure.value,
            weights=weights,
            source_sha256=self.sha256,
        )


class Proof(NamedTuple):
    """What two networks are compared on, and how close they must be.

    Attributes:
        images: Images to compare on besides random ones: paths, or batches of
            normalised images (N, C, H, W) as they enter the network.
        image_size: Height and width in pixels of the images. A file for a
            runtime takes images of this size only.
        tolerance: Largest difference allowed. By default, of a checkpoint
            before it is rounded, 1e-5 of the largest magnitude of a channel;
            of a runtime's outputs, 1e-4 of that of an output.
        seed: Of the random images.
    """

    images: Sequence[Union[str, Tensor]] = ()
    image_size: Tuple[int, int] = (224, 224)
    tolerance: Optional[float] = None
    seed: int = 0

    @property
    def paths(self) -> List[str]:
        """Paths of the images that are read from files."""
        return [i for i in self.images if not isinstance(i, Tensor)]

    def given(self, model: nn.Module) -> List[Tensor]:
        """The images that were given, as the model's preprocessor leaves them.

        Args:
            model: The model whose preprocessor is used.

        Raises:
            UserError: If an image cannot be read.
        """
        return [given_batch(model, i, self.image_size) for i in self.images]

    def batches(self, model: nn.Module) -> List[Tensor]:
        """A batch of random images, then those that were given.

        Args:
            model: The model whose preprocessor is used.

        Raises:
            UserError: If an image cannot be read.
        """
        random = random_batch(model, self.image_size, self.seed)
        return [random, *self.given(model)]


class Contents(NamedTuple):
    """What is written into a checkpoint and into the config beside it.

    Attributes:
        cfg: The config of the network.
        state: The weights, names to tensors, as they were proven.
        structure: How the network differs from what the config builds.
        weights: Which weights of the source they come from, as
            :meth:`Source.read` says.
        dtypes: Entry -> the precision to round it to; None to round nothing.
        meta: What the training noted of itself.
        notes: What the workflow notes besides, plain data.
    """

    cfg: Config
    state: Dict[str, Tensor]
    structure: Structure
    weights: str
    dtypes: Optional[Dict[str, torch.dtype]] = None
    meta: Mapping[str, Any] = {}
    notes: Mapping[str, Any] = {}

    def noting(self, **notes: Any) -> Contents:
        """The same contents with more notes."""
        return self._replace(notes={**self.notes, **notes})

    def rounded(self) -> Dict[str, Tensor]:
        """The weights to write: each number rounded once."""
        dtypes = self.dtypes or {}
        return {
            name: value.to(dtypes.get(name, value.dtype))
            for name, value in self.state.items()
        }


class Drafts(NamedTuple):
    """Files that are not in their places yet; see :func:`writing`.

    Attributes:
        source: What they are made from; None for a network in memory.
        paths: Where they are written, one a path asked for.
    """

    source: Optional[Source]
    paths: List[str]

    def network(self, contents: Contents) -> nn.Module:
        """The network of the files, built from the config as it is written.

        Args:
            contents: What the first two files will hold. The network gets the
                weights themselves, before they are rounded.

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

        Both are read again: the config must build a network that takes the
        entries, and these must be the contents', each rounded once.

        Args:
            contents: What to write.

        Raises:
            UserError: If they cannot be written, or are not read as they were
                written.
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
        source: What the files are made from, none of whose own files is
            written over; None for a network in memory.
        outputs: Paths to write. A checkpoint comes first and its config
            second; see :func:`output_paths`.
        inputs: Paths of other files that are read.
        overwrite: Whether files that exist may be replaced, inputs apart.

    Yields:
        Drafts: Where to write meanwhile. Every file must have been written by
        the end.

    Raises:
        UserError: If an output is an input, exists and may not be replaced,
            or cannot be written.
    """
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
        UserError: If it has no suffix of a checkpoint.
    """
    suffix = next((s for s in SUFFIXES if out.endswith(s)), None)
    if suffix is None:
        raise UserError(
            f'the output must end in {" or ".join(SUFFIXES)}, got {out}'
        )
    return out, out[: -len(suffix)] + '.py'


def refuse_inputs(
    outputs: Sequence[str], cfg: Optional[Config], *inputs: str
) -> None:
    """Raise if a file would be written over one that is read.

    Args:
        outputs: Paths to write.
        cfg: The config, which may have been read from several files; None if
            there is none.
        inputs: Paths of other files that are read.

    Raises:
        UserError: It names the path.
    """
    files = files_of(cfg) if cfg is not None else ()
    read = {os.path.realpath(path) for path in (*files, *inputs)}
    for path in outputs:
        if os.path.realpath(path) in read:
            raise UserError(f'output {path} is also an input')
