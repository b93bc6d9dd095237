"""Image classifiers of transformers with random weights and an image processor; not a test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def tiny_classifier(kind: str = "ViT", classes: int = 2) -> Any:
    """Return an image classifier for images of 24 x 24 pixels."""
    import transformers

    sizes: dict[str, Any] = {
        "ViT": {
            "hidden_size": 16,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "image_size": 24,
            "patch_size": 8,
        },
        "ResNet": {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"},
        "ConvNext": {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2},
    }[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(num_labels=classes, **sizes)
    return getattr(transformers, f"{kind}ForImageClassification")(config).eval()


def odd_processor() -> Any:
    """Return an image processor with unusual values, for images of 24 x 24 pixels."""
    import transformers

    return transformers.CLIPImageProcessor(
        size={"shortest_edge": 30},
        crop_size={"height": 24, "width": 24},
        image_mean=[0.1, 0.35, 0.6],
        image_std=[0.11, 0.5, 0.2],
    )


def save_classifier(folder: Path, kind: str = "ViT", classes: int = 2, **options: Any) -> Path:
    """Save an image classifier with its image processor to a folder, as safetensors."""
    tiny_classifier(kind, classes).save_pretrained(folder, **options)
    odd_processor().save_pretrained(folder)
    return folder
