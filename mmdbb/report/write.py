# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Measure a network and write the page, in one call."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional, Union

from torch import Tensor, nn

from mmdbb.files.atomic import all_or_nothing
from mmdbb.report.figures import Report
from mmdbb.report.measure import ReportOptions, network_report
from mmdbb.report.page import page


def write_report(
    model: nn.Module,
    path: Union[str, os.PathLike],
    images: Optional[Tensor] = None,
    options: Optional[ReportOptions] = None,
    overwrite: bool = False,
) -> Report:
    """Write a page on what the branches of a trained network did.

    The page is one HTML file, which needs no network and no other file.

    Args:
        model: A trained network with blocks that are not merged, or a block;
            unchanged.
        path: The file to write, ``*.html``.
        images: Normalised images (N, C, H, W), some of those that the network
            is used for, on which changes of outputs are measured. Without
            images the layers are measured by themselves.
        options: What to measure beside the kernels, and what to write.
        overwrite: Whether an existing file may be replaced.

    Returns:
        Report: The figures in the page.

    Raises:
        UserError: If the file exists or cannot be written, or the network
            runs on other images, but not on these. Nothing is written then.
        TypeError: If ``model`` is no module, or ``images`` no tensor.
        ValueError: If ``path`` does not end in ``.html``, ``images`` has no
            images, or the network has no block that is not merged.

    Examples:
        >>> import tempfile, torch
        >>> from mmdbb import DBB
        >>> network = nn.Sequential(DBB(3, 4, 3, padding=1), nn.ReLU())
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = f'{folder}/report.html'
        ...     report = write_report(network, file, torch.rand(2, 3, 8, 8))
        ...     Path(file).read_text()[:15]
        '<!DOCTYPE html>'
    """
    check_ending(path)
    with all_or_nothing(os.fspath(path), overwrite=overwrite) as (draft,):
        report = network_report(model, images, options)
        Path(draft).write_text(page(report), encoding='utf-8')
    return report


def check_ending(path: Union[str, os.PathLike]) -> None:
    """Raise a ValueError unless a path ends as a page's does."""
    if not os.fspath(path).lower().endswith(('.html', '.htm')):
        raise ValueError(f'path must end in .html, got {os.fspath(path)!r}')
