"""Weights to grow, distributed over layers."""

from __future__ import annotations

from collections.abc import Mapping


def shares(total: int, proportions: Mapping[str, float], room: Mapping[str, int]) -> dict[str, int]:
    """Distribute a number over layers in proportion; what does not fit in a layer goes to the others.

    Parameters
    ----------
    total
        What is distributed, at most the sum of ``room``.
    proportions
        Finite and not negative; if all are zero, layers with room are equal.
    room
        The most that each layer takes.
    """
    given = dict.fromkeys(room, 0)
    left = total
    while left:
        free = {name: room[name] - given[name] for name in room if room[name] > given[name]}
        whole = sum(proportions[name] for name in free)
        quotas = {name: left * proportions[name] / whole if whole else left / len(free) for name in free}
        if not any(int(quota) for quota in quotas.values()):
            for name in sorted(free, key=lambda name: -quotas[name])[:left]:
                given[name] += 1
                left -= 1
            continue
        for name, quota in quotas.items():
            given[name] += (part := min(int(quota), free[name], left))
            left -= part
    return given
