# Copyright (c) mmdbb authors. Licensed under the Apache License 2.0.
"""The figures of a report, as plain values."""

from __future__ import annotations

from typing import Dict, List, Mapping, NamedTuple, Optional, Tuple

from torch import Tensor

from mmdbb.ranges import WeightRange


class Gammas(NamedTuple):
    """Magnitudes of the factors that scale a branch.

    Attributes:
        kind: ``'gamma'`` of the branch's last norm, or ``'scale'`` of a
            composed kernel's branch.
        smallest: The smallest one.
        median: The median.
        largest: The largest one.
    """

    kind: str
    smallest: float
    median: float
    largest: float


class Lost(NamedTuple):
    """What changes if a branch is left out, with nothing trained afterwards.

    Each number is the root mean square of the change, divided by that of the
    values before.

    Attributes:
        layer: The change of the layer's output; None if no image reached it.
        network: The change of the network's output; of several outputs, the
            largest. None if no image reached the layer.
    """

    layer: Optional[float]
    network: Optional[float]


class BranchFigures(NamedTuple):
    """One branch of one layer.

    Attributes:
        share: Length of the branch's kernel, divided by the length of the
            merged kernel: how far the merged kernel moves without the branch.
        projection: The part of the merged kernel that the branch supplies in
            the merged kernel's direction. They add up to 1.
        angle: Angle between the branch's kernel and the merged one, in
            degrees; None if one of them is zero.
        angles: Other branches -> the angles to them, in degrees.
        gammas: The factors that scale the branch; None if it has none.
        taps: Mean magnitude of the branch's kernel at each tap, (kH, kW).
        lost: What is lost without it; None if that was not measured.
    """

    share: float
    projection: float
    angle: Optional[float]
    angles: Dict[str, Optional[float]]
    gammas: Optional[Gammas]
    taps: Tensor
    lost: Optional[Lost]


class Cost(NamedTuple):
    """Size and work, of a layer or of a network.

    Attributes:
        parameters: Number of parameters.
        flops: Floating-point operations for one image; a multiplication and
            an addition count as two. None if no image was given.
    """

    parameters: int
    flops: Optional[int]


class LayerFigures(NamedTuple):
    """One block of the network.

    Attributes:
        name: Name of the layer; empty if the network itself is a block.
        kind: Class of the block.
        shape: Shape of the merged kernel, (out, in / groups, kH, kW).
        geometry: Stride, groups and dilation, where they are not 1, in words.
        branches: Name of each branch -> its figures.
        taps: Mean magnitude of the merged kernel at each tap, (kH, kW).
        filters: Some filters of the merged kernel, (count, channels, kH, kW).
        range: Ranges of the kernel with the norm behind it folded in.
        folded: Name of that norm; empty if there is none.
        before: Cost as the sum of branches.
        after: Cost once merged.
        difference: Largest difference between the literal sum of branches and
            the merged layer in float64, relative to a channel's largest
            magnitude; None if it was not compared by itself.
    """

    name: str
    kind: str
    shape: Tuple[int, ...]
    geometry: str
    branches: Dict[str, BranchFigures]
    taps: Tensor
    filters: Tensor
    range: WeightRange
    folded: str
    before: Cost
    after: Cost
    difference: Optional[float]


class KindFigures(NamedTuple):
    """All branches of one name.

    Attributes:
        layers: Number of layers that have one.
        projection: Mean part of the merged kernels that they supply; NaN if
            all of these kernels are zero.
        weakest: The smallest such part, and the layer.
        network: Change of the network's output without all of them, as in
            :class:`Lost`.
        metric: What the network scores without all of them; None if nothing
            was evaluated.
    """

    layers: int
    projection: float
    weakest: Tuple[float, str]
    network: Optional[float]
    metric: Optional[float]


class ProofFigures(NamedTuple):
    """How far the merged network is from the literal sum of branches.

    Attributes:
        equal: Whether the two are one function in float64.
        refused: Why not; empty if they are.
        tolerance: Largest difference allowed.
        outputs: Outputs of the network -> their largest differences in
            float64, relative to a channel's largest magnitude.
        layers: Layers, compared by themselves -> the same.
        single: Largest difference in float32, relative to the largest
            magnitude of an output; None if it could not be measured.
        left_out: What could not be compared -> why.
    """

    equal: bool
    refused: str
    tolerance: Optional[float]
    outputs: Dict[str, float]
    layers: Dict[str, float]
    single: Optional[float]
    left_out: Mapping[str, str]


class Report(NamedTuple):
    """All figures of one network.

    Attributes:
        title: What the page is called.
        facts: What the reader should know of the network -> in words.
        layers: The layers with blocks, in the network's order.
        kinds: Names of branches -> figures over all layers.
        before: Cost of the network with blocks.
        after: Cost of the merged network.
        proof: How far the two are apart.
        images: Number of images that changes of outputs were measured on.
        metric: Name of what was evaluated; empty if nothing was.
        score: What the network scores with all branches.
    """

    title: str
    facts: Mapping[str, str]
    layers: List[LayerFigures]
    kinds: Dict[str, KindFigures]
    before: Cost
    after: Cost
    proof: ProofFigures
    images: int = 0
    metric: str = ''
    score: Optional[float] = None
