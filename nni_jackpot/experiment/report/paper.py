"""The paper's numbers for rows that a run here measures as well (Tables 1 to 4)."""

from __future__ import annotations

from dataclasses import dataclass

from nni_jackpot.experiment.report.measures import Measure


@dataclass(frozen=True)
class Published:
    """Accuracy in percent, with the standard deviation if the paper gives one."""

    accuracy: float
    deviation: float | None = None

    def __str__(self) -> str:
        return f"{self.accuracy:.2f}" + ("" if self.deviation is None else f" ± {self.deviation:.2f}")


_P = Published

# By dataset and network; method and epochs; sparsity.
_ACCURACY: dict[tuple[str, str], dict[tuple[str, int], dict[float, Published]]] = {
    ("cifar10", "vgg19"): {  # Table 1
        ("dense", 0): {0.0: _P(94.23)},
        ("obd", 160): {0.9: _P(93.74), 0.95: _P(93.58)},
        ("set", 160): {0.9: _P(92.46), 0.95: _P(91.73)},
        ("deep_r", 160): {0.9: _P(90.81), 0.95: _P(89.59)},
        ("lt", 160): {0.9: _P(93.66), 0.95: _P(93.39)},
        ("snip", 160): {0.9: _P(93.65), 0.95: _P(93.43)},
        ("grasp", 160): {0.9: _P(93.01), 0.95: _P(92.82)},
        ("jackpot", 30): {0.9: _P(93.87, 0.09), 0.95: _P(93.52, 0.12)},
        ("jackpot", 160): {0.9: _P(93.96, 0.16), 0.95: _P(93.82, 0.17)},
    },
    ("cifar10", "resnet32"): {
        ("dense", 0): {0.0: _P(94.62)},
        ("obd", 160): {0.9: _P(94.17), 0.95: _P(93.29)},
        ("set", 160): {0.9: _P(92.3), 0.95: _P(90.76)},
        ("deep_r", 160): {0.9: _P(91.62), 0.95: _P(89.84)},
        ("lt", 160): {0.9: _P(92.61), 0.95: _P(91.37)},
        ("snip", 160): {0.9: _P(92.59), 0.95: _P(91.01)},
        ("grasp", 160): {0.9: _P(92.79), 0.95: _P(91.80)},
        ("jackpot", 30): {0.9: _P(93.71, 0.08), 0.95: _P(92.92, 0.13)},
        ("jackpot", 160): {0.9: _P(94.41, 0.09), 0.95: _P(93.42, 0.15)},
    },
    ("cifar100", "vgg19"): {  # Table 2
        ("dense", 0): {0.0: _P(74.16)},
        ("obd", 160): {0.9: _P(73.83), 0.95: _P(71.98)},
        ("set", 160): {0.9: _P(72.36), 0.95: _P(69.81)},
        ("deep_r", 160): {0.9: _P(66.83), 0.95: _P(63.46)},
        ("lt", 160): {0.9: _P(72.58), 0.95: _P(70.47)},
        ("snip", 160): {0.9: _P(72.83), 0.95: _P(71.83)},
        ("grasp", 160): {0.9: _P(71.07), 0.95: _P(70.1)},
        ("jackpot", 30): {0.9: _P(72.61, 0.15), 0.95: _P(71.74, 0.21)},
        ("jackpot", 160): {0.9: _P(74.63, 0.18), 0.95: _P(72.95, 0.34)},
    },
    ("cifar100", "resnet32"): {
        ("dense", 0): {0.0: _P(74.64)},
        ("obd", 160): {0.9: _P(71.96), 0.95: _P(68.73)},
        ("set", 160): {0.9: _P(69.66), 0.95: _P(67.41)},
        ("deep_r", 160): {0.9: _P(66.78), 0.95: _P(63.9)},
        ("lt", 160): {0.9: _P(69.63), 0.95: _P(66.48)},
        ("snip", 160): {0.9: _P(69.97), 0.95: _P(64.81)},
        ("grasp", 160): {0.9: _P(70.12), 0.95: _P(67.05)},
        ("jackpot", 30): {0.9: _P(72.20, 0.17), 0.95: _P(69.35, 0.21)},
        ("jackpot", 160): {0.9: _P(73.37, 0.23), 0.95: _P(70.33, 0.24)},
    },
    ("imagenet", "resnet50"): {  # Table 3
        ("dense", 0): {0.0: _P(76.15)},
        ("set", 100): {0.8: _P(72.6), 0.9: _P(70.4)},
        ("deep_r", 100): {0.8: _P(71.7), 0.9: _P(70.2)},
        ("sparse_momentum", 100): {0.8: _P(73.8), 0.9: _P(72.3)},
        ("dsr", 100): {0.8: _P(73.3), 0.9: _P(71.6)},
        ("rigl", 100): {0.8: _P(74.6), 0.9: _P(72.0)},
        ("snip", 100): {0.8: _P(69.67), 0.9: _P(67.21)},
        ("grasp", 150): {0.8: _P(72.06), 0.9: _P(68.14)},
        ("jackpot", 30): {0.8: _P(74.53), 0.9: _P(72.17)},
        ("jackpot", 60): {0.8: _P(75.26), 0.9: _P(72.46)},
    },
}

# Table 4, of ResNet-32 on CIFAR-10: accuracy and overlap with the magnitude mask in percent, by epochs.
_BY_EPOCHS = {
    0: (_P(10.00, 0.01), 100.0),
    10: (_P(93.02, 0.06), 97.9),
    30: (_P(93.87, 0.09), 96.3),
    60: (_P(93.80, 0.12), 95.5),
    100: (_P(94.32, 0.09), 94.4),
    300: (_P(94.37, 0.14), 94.1),
    500: (_P(94.35, 0.12), 94.0),
    1000: (_P(94.36, 0.13), 94.1),
}
# The paper does not say at which sparsity. Its accuracies are near Table 1's at this one.
_BY_EPOCHS_SPARSITY = 0.9


def accuracy_of(one: Measure) -> Published | None:
    """Return the paper's accuracy at the same dataset, network, method, sparsity and epochs (Tables 1-3)."""
    rows = _ACCURACY.get((one.data, _network(one)), {})
    return rows.get((_method(one), one.epochs), {}).get(one.sparsity)


def by_epochs(one: Measure) -> tuple[Published, float] | None:
    """Return the paper's accuracy and overlap, in percent, after as many epochs of search (Table 4)."""
    same = (one.data, _network(one)) == ("cifar10", "resnet32")
    same = same and one.sparsity == _BY_EPOCHS_SPARSITY and one.init == "magnitude" and one.is_pretrained
    return _BY_EPOCHS.get(one.epochs) if same and _method(one) in ("jackpot", "initial") else None


def _network(one: Measure) -> str:
    """Return the name of the paper's network that a run's is; empty for others."""
    name = one.settings["model.name"]
    size = one.settings.get("model.depth"), one.settings.get("model.width")
    if name == "resnet":
        return "resnet32" if size == (32, 32) else ""
    return {"vgg19": "vgg19", "torchvision/resnet50": "resnet50"}.get(name, "")


# Comparators of the same names as the paper's methods.
_COMPARATORS = {name for rows in _ACCURACY.values() for name, _ in rows} - {"dense", "jackpot"}


def _method(one: Measure) -> str:
    """Return the name of the paper's method that a measure is; empty for others."""
    if one.kind in _COMPARATORS:
        return one.kind if one.settings.get("model.init") is None else ""
    if not one.is_pretrained:
        # SNIP and GraSP prune the network's own random weights and train what is left.
        is_theirs = one.kind == "initial_tuned" and one.settings["weights"] == "random"
        return one.init if is_theirs else ""
    if one.settings.get("model.init") is not None:
        return ""
    if one.kind in ("dense", "initial"):
        return one.kind
    is_ours = one.kind == "jackpot" and one.init == "magnitude" and one.method == "edge_popup"
    return "jackpot" if is_ours else ""
