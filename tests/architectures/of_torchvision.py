"""Networks of torchvision: classification, segmentation, detection, optical flow and video."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torchvision.models
from law import Inputs
from torch import nn
from torchvision.models import detection, segmentation
from torchvision.ops import misc

from architectures.architecture import IMAGE_LAYERS, Architecture, images, of_class


def of_torchvision(name: str, size: int = 32, heavy: bool = False, **options: Any) -> Architecture:
    options = {"num_classes": 5, "weights": None, **options}
    return Architecture(
        partial(torchvision.models.get_model, name, **options), partial(images, 3, size, size), heavy=heavy
    )


def boxes(size: int) -> Inputs:
    """Return a list of images, and their annotations."""
    (both,) = images(3, size, size)
    found = {"boxes": torch.tensor([[2.0, 2.0, size - 8.0, size - 8.0]]), "labels": torch.tensor([1])}
    return list(both), [found, found]


def of_detection(name: str, size: int = 64, **options: Any) -> Architecture:
    options = {"num_classes": 3, "weights": None, "weights_backbone": None, **options}
    return Architecture(
        partial(torchvision.models.get_model, name, **options), partial(boxes, size), heavy=True
    )


def small_faster_rcnn() -> nn.Module:
    backbone = nn.Sequential(misc.Conv2dNormActivation(3, 8, 3, 4), misc.Conv2dNormActivation(8, 16, 3, 4))
    backbone.out_channels = 16
    anchors = detection.anchor_utils.AnchorGenerator(((16, 32),), ((0.5, 1.0),))
    pool = torchvision.ops.MultiScaleRoIAlign(["0"], 3, 2)
    head = detection.faster_rcnn.TwoMLPHead(16 * 9, 16)
    predictor = detection.faster_rcnn.FastRCNNPredictor(16, 3)
    return detection.FasterRCNN(
        backbone,
        min_size=64,
        max_size=64,
        rpn_anchor_generator=anchors,
        box_roi_pool=pool,
        box_head=head,
        box_predictor=predictor,
    )


def small_fcn() -> nn.Module:
    return segmentation.FCN(_features(), segmentation.fcn.FCNHead(16, 3))


def small_deeplab() -> nn.Module:
    return segmentation.DeepLabV3(_features(), segmentation.deeplabv3.DeepLabHead(16, 3, (2, 4)))


def _features() -> nn.Module:
    layers = misc.Conv2dNormActivation(3, 8, 3, 2), misc.Conv2dNormActivation(8, 16, 3, 2)
    return torchvision.models._utils.IntermediateLayerGetter(nn.Sequential(*layers), {"1": "out"})


def flow() -> Inputs:
    (both,) = images(3, 128, 128)
    return both[:1], both[1:], 2


resnet = torchvision.models.resnet
vision = torchvision.models
ATTENTION = ("MultiheadAttention", "NonDynamicallyQuantizableLinear")
VIT = of_class(
    vision.VisionTransformer,
    image_size=32,
    patch_size=8,
    num_layers=2,
    num_heads=2,
    hidden_dim=16,
    mlp_dim=32,
    dropout=0.1,
)
TORCHVISION: dict[str, Architecture] = {
    "alexnet": of_torchvision("alexnet", 64, heavy=True),
    "vgg11_bn": of_torchvision("vgg11_bn", heavy=True),
    "resnet18": of_torchvision("resnet18", heavy=True),
    "resnet, bottlenecks": of_class(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], width_per_group=8),
    "resnext": of_class(resnet.ResNet, resnet.Bottleneck, [1, 1, 1, 1], groups=4, width_per_group=4),
    "wide_resnet50_2": of_torchvision("wide_resnet50_2", heavy=True),
    "densenet121": of_torchvision("densenet121", heavy=True),
    "densenet": of_class(vision.DenseNet, 8, (2, 2, 2), 16),
    "squeezenet1_1": of_torchvision("squeezenet1_1"),
    "inception_v3": of_torchvision("inception_v3", 75, heavy=True, aux_logits=False, init_weights=False),
    "googlenet": of_torchvision("googlenet", heavy=True, init_weights=False),
    "shufflenet_v2": of_class(vision.ShuffleNetV2, [1, 2, 1], [8, 16, 32, 64, 128]),
    "mobilenet_v2": of_class(vision.MobileNetV2, width_mult=0.25),
    "mobilenet_v3_small": of_torchvision("mobilenet_v3_small"),
    "mnasnet": of_class(vision.MNASNet, 0.25),
    "efficientnet_b0": of_torchvision("efficientnet_b0", heavy=True),
    "efficientnet_v2_s": of_torchvision("efficientnet_v2_s", heavy=True),
    "regnet_y_400mf": of_torchvision("regnet_y_400mf", heavy=True),
    "convnext": of_class(
        vision.ConvNeXt, [vision.convnext.CNBlockConfig(8, 16, 1), vision.convnext.CNBlockConfig(16, None, 1)]
    ),
    "convnext_tiny": of_torchvision("convnext_tiny", heavy=True),
    "vit": VIT,
    "vit, its attention": replace(VIT, op_types=(*IMAGE_LAYERS, *ATTENTION)),
    "swin": of_class(vision.SwinTransformer, [2, 2], 16, [2, 2], [2, 4], [4, 4]),
    "swin_v2": of_class(
        vision.SwinTransformer,
        [2, 2],
        16,
        [2, 2],
        [2, 4],
        [4, 4],
        block=vision.swin_transformer.SwinTransformerBlockV2,
        downsample_layer=vision.swin_transformer.PatchMergingV2,
    ),
    "maxvit": of_class(vision.MaxVit, (32, 32), 16, 2, [16, 32], [1, 1], 8, 0.1),
    "fcn": Architecture(small_fcn, partial(images, 3, 32, 32)),
    "deeplabv3": Architecture(small_deeplab, partial(images, 3, 32, 32)),
    "lraspp_mobilenet_v3_large": of_torchvision(
        "lraspp_mobilenet_v3_large", 64, heavy=True, weights_backbone=None
    ),
    "faster_rcnn": Architecture(small_faster_rcnn, partial(boxes, 64)),
    "ssdlite320_mobilenet_v3_large": of_detection("ssdlite320_mobilenet_v3_large"),
    "retinanet_resnet50_fpn": of_detection(
        "retinanet_resnet50_fpn", min_size=64, max_size=64, score_thresh=0.0
    ),
    "raft_small": Architecture(partial(vision.optical_flow.raft_small, weights=None), flow, heavy=True),
    "r3d_18, its convolutions known to NNI": Architecture(
        partial(vision.video.r3d_18, num_classes=5),
        partial(images, 3, 4, 16, 16),
        ("Conv3DSimple", "Conv3d", "Linear"),
        ("Conv3DSimple",),
        heavy=True,
    ),
}
