# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The test pipeline of a config, for an image without annotations."""

from __future__ import annotations

import copy
from typing import Any, Dict, List, Optional, Tuple

from mmengine.config import Config
from mmengine.dataset import Compose
from torch import Tensor

from mmdbb.errors import UserError
from mmdbb.mm.engine.data_paths import dataset_configs


class TestPipeline:
    """Reads one image as a config tests.

    Args:
        cfg: A config with a test dataloader; unchanged.
        image: Path of the image.

    Raises:
        UserError: If the config has no test pipeline.
    """

    #: No test for pytest.
    __test__ = False

    def __init__(self, cfg: Config, image: str) -> None:
        found = next(dataset_configs(cfg, ('test_dataloader',)), None)
        if found is None or not found.cfg.get('pipeline'):
            raise UserError(
                'the config has no test_dataloader with a pipeline, which '
                'says how to read an image'
            )
        self.image = image
        self._steps = [
            _local(step)
            for step in copy.deepcopy(list(found.cfg['pipeline']))
            if not _annotates(step)
        ]

    def __call__(
        self, resize: Optional[Dict[str, Any]] = None
    ) -> Dict[str, Any]:
        """Read the image.

        Args:
            resize: Arguments of ``Resize`` that replace those of the config.

        Returns:
            dict: ``inputs``, the image (C, H, W), and ``data_samples``.

        Raises:
            UserError: If the image cannot be read.
        """
        steps = self._steps
        if resize is not None:
            steps = _resizing(steps, resize)
        try:
            found = Compose(steps)(dict(img_path=self.image, img_id=0))
        except Exception as error:  # pipelines raise errors of any type
            raise UserError(
                f'cannot read image {self.image}: {type(error).__name__}: '
                f'{error}'
            ) from error
        if found is None:
            raise UserError(f'cannot read image {self.image}')
        return found

    def within(self, size: Tuple[int, int]) -> Dict[str, Any]:
        """Read the image so that it fits into a size, in its own proportions.

        Args:
            size: Height and width in pixels.
        """
        found = self()
        if _fits(found['inputs'], size):
            return found
        height, width = found['data_samples'].ori_shape[:2]
        factor = min(size[0] / height, size[1] / width)
        # Rounding may give a pixel too many.
        factor = min(
            int(height * factor) / height, int(width * factor) / width
        )
        return self(dict(scale_factor=factor, keep_ratio=True))

    def exactly(self, size: Tuple[int, int]) -> Dict[str, Any]:
        """Read the image at a size, whatever its proportions.

        Args:
            size: Height and width in pixels.
        """
        found = self()
        if tuple(found['inputs'].shape[-2:]) == tuple(size):
            return found
        return self(dict(scale=(size[1], size[0]), keep_ratio=False))


def _fits(image: Tensor, size: Tuple[int, int]) -> bool:
    return image.shape[-2] <= size[0] and image.shape[-1] <= size[1]


def _name(step: Any) -> str:
    kind = step.get('type') if isinstance(step, dict) else type(step)
    name = kind if isinstance(kind, str) else kind.__name__
    return name.rpartition('.')[2]


def _annotates(step: Any) -> bool:
    name = _name(step)
    return name.startswith('Load') and 'Annotation' in name


def _local(step: Any) -> Any:
    """A step that reads the image from the local disk."""
    if isinstance(step, dict) and _name(step).startswith('Load'):
        for key in ('backend_args', 'file_client_args'):
            step.pop(key, None)
    return step


def _resizing(steps: List[Any], resize: Dict[str, Any]) -> List[Any]:
    changed, found = [], False
    for step in steps:
        if _name(step).endswith('Resize'):
            step, found = dict(type='Resize', **resize), True
        changed.append(step)
    if not found:
        raise UserError(
            'the image is not of the size that the file takes, and the test '
            'pipeline has no Resize'
        )
    return changed
