"""Small networks with heads that read more than features, as configs."""

from mmengine.config import Config
from networks import BN, DBB, DETECTOR, SHALLOW


def backbone(kind='ResNet', **options):
    return dict(type=kind, conv_cfg=DBB, **{**SHALLOW, **options})


def detr():
    attention = dict(embed_dims=16, num_heads=2)
    layer = dict(
        self_attn_cfg=attention,
        ffn_cfg=dict(embed_dims=16, feedforward_channels=16, num_fcs=2),
    )
    return dict(
        type='DETR',
        num_queries=5,
        data_preprocessor=dict(type='DetDataPreprocessor'),
        backbone=backbone(out_indices=(1,)),
        neck=dict(
            type='ChannelMapper',
            in_channels=[16],
            kernel_size=1,
            out_channels=16,
            num_outs=1,
        ),
        encoder=dict(num_layers=1, layer_cfg=layer),
        decoder=dict(
            num_layers=1,
            layer_cfg=dict(layer, cross_attn_cfg=attention),
            return_intermediate=True,
        ),
        positional_encoding=dict(num_feats=8, normalize=True),
        bbox_head=dict(
            type='DETRHead',
            num_classes=3,
            embed_dims=16,
            loss_cls=dict(type='CrossEntropyLoss', class_weight=1.0),
            train_cfg=None,
        ),
    )


def ocr():
    head = dict(
        in_channels=16,
        in_index=1,
        channels=8,
        num_classes=3,
        conv_cfg=DBB,
        norm_cfg=BN,
        align_corners=False,
    )
    return dict(
        type='CascadeEncoderDecoder',
        num_stages=2,
        data_preprocessor=dict(type='SegDataPreProcessor'),
        backbone=backbone('ResNetV1c', norm_cfg=BN),
        decode_head=[
            dict(head, type='FCNHead', num_convs=1),
            dict(head, type='OCRHead', ocr_channels=4),
        ],
        test_cfg=dict(mode='whole'),
    )


def pointrend():
    """Its second head is a Conv1d's, and has no blocks."""
    model = ocr()
    first, second = model['decode_head']
    second.update(type='PointHead', in_channels=[16], in_index=[1])
    second.update(num_fcs=1, conv_cfg=dict(type='Conv1d'), norm_cfg=None)
    del second['ocr_channels']
    # All points, so that no rounding chooses among them.
    model['test_cfg'].update(
        subdivision_steps=1, subdivision_num_points=10000, scale_factor=2
    )
    return model


def byol():
    neck = dict(
        type='NonLinearNeck',
        in_channels=16,
        hid_channels=4,
        out_channels=4,
        num_layers=2,
        with_avg_pool=True,
    )
    return dict(
        type='BYOL',
        data_preprocessor=dict(
            type='SelfSupDataPreprocessor', mean=[120.0] * 3, std=[60.0] * 3
        ),
        backbone=backbone(),
        neck=neck,
        head=dict(
            type='LatentPredictHead',
            loss=dict(type='CosineSimilarityLoss'),
            predictor=dict(neck, in_channels=4, with_avg_pool=False),
        ),
    )


def sparse_rcnn():
    """Its first head has no forward, and its boxes need trained weights."""
    model = Config.fromstring(DETECTOR, '.py').model
    model.type = 'SparseRCNN'
    model.rpn_head = dict(
        type='EmbeddingRPNHead', num_proposals=4, proposal_feature_channel=8
    )
    return model
