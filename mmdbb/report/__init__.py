# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""A page on what the branches of a trained network did."""

from mmdbb.report.figures import (
    BranchFigures,
    Cost,
    Gammas,
    KindFigures,
    LayerFigures,
    Lost,
    ProofFigures,
    Report,
)
from mmdbb.report.findings import Finding, findings
from mmdbb.report.measure import ReportOptions, network_report
from mmdbb.report.page import page
from mmdbb.report.write import write_report

__all__ = [
    'BranchFigures',
    'Cost',
    'Finding',
    'Gammas',
    'KindFigures',
    'LayerFigures',
    'Lost',
    'ProofFigures',
    'Report',
    'ReportOptions',
    'findings',
    'network_report',
    'page',
    'write_report',
]
