"""Small arguments for every registered backbone, for its generic tests."""

from typing import NamedTuple, Tuple


class Row(NamedTuple):
    """How to build a backbone that is small.

    Attributes:
        outputs: How many outputs ``out_indices`` chooses from.
        arguments: Of the constructor.
        size: Height and width of images in pixels.
    """

    outputs: int
    arguments: dict
    size: Tuple[int, int] = (32, 48)


MOBILENET = Row(6, dict(channels=(4, 8, 4, 8, 8, 16)), (64, 48))
ALEXNET = Row(5, dict(channels=(4, 6, 8, 8, 4)), (112, 128))
#: Two groups in the third layer; the second has an identity branch.
REPVGG = Row(
    4,
    dict(
        arch=dict(
            num_blocks=(2, 1, 2, 1),
            width_factor=(0.125, 0.125, 0.0625, 0.0625),
            group_layer_map={3: 2},
            se_cfg=None,
        )
    ),
    (64, 48),
)
NARROW = dict(num_stages=2, out_indices=(1,), base_channels=8, stem_channels=8)
STAGES = dict(NARROW, strides=(1, 2), dilations=(1, 1))
DILATED = dict(NARROW, strides=(1, 1), dilations=(1, 2))
GROUPS = dict(depth=50, groups=4, width_per_group=4)

#: Name in configs -> row.
UNIREPLKNET = Row(
    4,
    dict(
        arch=dict(
            channels=(4, 8, 12, 8), kernel_sizes=((3,), (7,), (5, 7), (7,))
        ),
        gap_before_final_norm=False,
        layer_scale_init_value=0.5,
    ),
    (96, 64),
)
SMALL = {
    'AlexNetDBB': ALEXNET,
    'MobileNetV1': MOBILENET,
    'MobileNetV1DBB': MOBILENET,
    'PlainAlexNet': ALEXNET,
    'PlainRepVGG': REPVGG,
    'PlainResNeXt': Row(2, dict(GROUPS, stage_blocks=(2, 1), **STAGES)),
    'PlainResNet': Row(2, dict(depth=18, stage_blocks=(1, 2), **STAGES)),
    'PlainUniRepLKNet': UNIREPLKNET,
    'ReparamRepVGG': REPVGG,
    'ResNeXtDBB': Row(2, dict(GROUPS, **STAGES)),
    'ResNetDBB': Row(2, dict(depth=18, **STAGES)),
    'ResNetV1cDBB': Row(2, dict(depth=50, **DILATED)),
    'ResNetV1dDBB': Row(2, dict(depth=18, **STAGES)),
    'UniRepLKNet': UNIREPLKNET,
    'VGGDBB': Row(
        2, dict(depth=11, num_stages=2, dilations=(1, 1), out_indices=(1,))
    ),
}
