# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""Deploying: from a trained checkpoint to a merged one, proven equal."""

from mmdbb.mm.deploy.checkpoint import Deployed, deploy_checkpoint
from mmdbb.mm.deploy.drop import (
    BranchesDropped,
    branch_report,
    drop_branches_checkpoint,
)
from mmdbb.mm.deploy.load import build_model, load_deployed
from mmdbb.mm.deploy.merge import Merged, MergeOptions, merge_checkpoint
from mmdbb.mm.inference.predict import predict
from mmdbb.mm.official.convert import ConvertedOfficial, convert_official
from mmdbb.mm.outputs import Contents, Proof, Source
from mmdbb.mm.stock.config import stock_config
from mmdbb.mm.structure import Structure
from mmdbb.stock_weights import stock_state

__all__ = [
    'BranchesDropped',
    'Contents',
    'ConvertedOfficial',
    'Deployed',
    'MergeOptions',
    'Merged',
    'Proof',
    'Source',
    'Structure',
    'branch_report',
    'build_model',
    'convert_official',
    'deploy_checkpoint',
    'drop_branches_checkpoint',
    'load_deployed',
    'merge_checkpoint',
    'predict',
    'stock_config',
    'stock_state',
]
