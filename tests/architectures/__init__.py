"""Networks of torchvision, timm and transformers, small and with random weights, and the law for each.

Sizes are the smallest that the constructors take; what is as large as published is `heavy`.
"""

from __future__ import annotations

from architectures.architecture import Architecture
from architectures.of_timm import TIMM
from architectures.of_torchvision import TORCHVISION
from architectures.of_transformers import TRANSFORMERS

ARCHITECTURES: dict[str, dict[str, Architecture]] = {
    "torchvision": TORCHVISION,
    "timm": TIMM,
    "transformers": TRANSFORMERS,
}
