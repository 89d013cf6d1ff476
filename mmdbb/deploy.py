# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Deploying: from a trained checkpoint to a merged one, proven equal."""

from mmdbb.mm.deploy.checkpoint import Deployed, deploy_checkpoint
from mmdbb.mm.deploy.load import load_deployed
from mmdbb.mm.deploy.merge import Merged, MergeOptions, merge_checkpoint
from mmdbb.mm.outputs import Contents, Proof, Source
from mmdbb.mm.stock.config import stock_config
from mmdbb.mm.structure import Structure

__all__ = [
    'Contents',
    'Deployed',
    'MergeOptions',
    'Merged',
    'Proof',
    'Source',
    'Structure',
    'deploy_checkpoint',
    'load_deployed',
    'merge_checkpoint',
    'stock_config',
]
