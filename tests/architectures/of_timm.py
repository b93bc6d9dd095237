"""Networks of timm."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import timm

from architectures.architecture import IMAGE_LAYERS, Architecture, images, of_class


def of_timm(
    name: str, size: int = 32, heavy: bool = False, registered: tuple[str, ...] = (), **options: Any
) -> Architecture:
    make = partial(timm.create_model, name, num_classes=5, **options)
    return Architecture(
        make, partial(images, 3, size, size), (*IMAGE_LAYERS, *registered), registered, heavy=heavy
    )


VIT: Mapping[str, Any] = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2}
TIMM: dict[str, Architecture] = {
    "beit": of_timm("beit_base_patch16_224", **VIT),
    "deit, distilled": of_timm("deit_tiny_distilled_patch16_224", **VIT),
    "mixer": of_class(timm.models.MlpMixer, img_size=32, patch_size=8, embed_dim=32, num_blocks=2),
    "convnextv2": of_timm("convnextv2_atto", dims=(8, 16, 24, 32), depths=(1, 1, 1, 1)),
    "swinv2": of_timm(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4)
    ),
    "efficientvit_m0": of_timm("efficientvit_m0", 224, heavy=True),
    "levit_128s": of_timm("levit_128s", 224, heavy=True),
    "coat": of_timm(
        "coat_tiny",
        64,
        img_size=64,
        embed_dims=(16, 16, 16, 16),
        serial_depths=(1, 1, 1, 1),
        parallel_depth=1,
    ),
    "xcit": of_timm("xcit_nano_12_p16_224", cls_attn_layers=1, **VIT),
    "pvt_v2": of_timm("pvt_v2_b0", embed_dims=(8, 16, 16, 32), depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4)),
    "nf_regnet, its convolutions known to NNI": of_timm(
        "nf_regnet_b0", 64, registered=("ScaledStdConv2d",), heavy=True
    ),
    "resnetv2": of_timm("resnetv2_50", layers=(1, 1, 1, 1), channels=(16, 32, 48, 64), stem_chs=16),
    "repvgg_a0": of_timm("repvgg_a0", heavy=True),
    "ghostnet_050": of_timm("ghostnet_050"),
    "mobilevit_xxs": of_timm("mobilevit_xxs", 64),
    "edgenext": of_timm("edgenext_xx_small", 64, dims=(8, 16, 24, 32), depths=(1, 2, 2, 1)),
    "poolformer": of_class(
        timm.models.MetaFormer, depths=(1, 1), dims=(8, 16), token_mixers=timm.models.metaformer.Pooling
    ),
    "volo_d1_224": of_timm("volo_d1_224", 224, heavy=True),
    "maxxvit_rmlp_nano_rw_256": of_timm("maxxvit_rmlp_nano_rw_256", 256, heavy=True),
    "hrnet_w18_small": of_timm("hrnet_w18_small", 64, heavy=True),
}
