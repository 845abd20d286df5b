"""Weight masks: drawn before the forward, for all layers and members in one flat draw on the CPU.

Keyed by (run seed, step or phase, draw, layer name, position): shared by all rows of a draw, by micro-batches
and by processes; equal on every device and after a resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.members import Member
from pipeline.config.method import WEIGHT_POSITIONS, Site
from pipeline.randomness import key64, uniforms


@dataclass(frozen=True)
class LayerSites:
    """Size of each masked axis of a layer, and per adapter the weight sites in force."""

    sizes: Mapping[tuple[int, str], int]
    """(adapter, position) -> n: I, O or R."""
    sites: Mapping[int, Mapping[str, Site]]
    """adapter -> position -> site."""


def draw_weight_masks(
    layers: Mapping[str, LayerSites], members: Sequence[Member], seed: int, phase: object, device: torch.device | str
) -> dict[str, dict[str, Tensor]]:
    """Masks for one pass: layer -> position -> (M, n) float32.

    An entry is 0 with probability `rate`, else 1/(1-rate) (`inverse`) or 1 (`none`). Members without a draw, and
    adapters without the site, have ones. A position that no member masks is absent.

    Args:
        seed: run seed.
        phase: optimizer step in training, a name such as "test" elsewhere.
    """
    jobs: list[tuple[str, str, int, Site, int]] = []
    keys: list[int] = []
    for name, layer in layers.items():
        for position in WEIGHT_POSITIONS:
            for m, member in enumerate(members):
                if member.adapter is None or member.draw is None:
                    continue
                site = layer.sites.get(member.adapter, {}).get(position)
                if site is not None:
                    jobs.append((name, position, m, site, layer.sizes[member.adapter, position]))
                    keys.append(key64(seed, phase, member.draw, name, position))
    if not jobs:
        return {}
    flat = uniforms(keys, [job[-1] for job in jobs])
    adapters = {member.adapter for member in members if member.adapter is not None}
    widths = {  # ranks differ among members: wide enough for those that are not masked, too
        (name, position): max(layers[name].sizes.get((adapter, position), 0) for adapter in adapters)
        for name, position, *_ in jobs
    }
    return _assemble(jobs, flat, widths, len(members), device)


def _assemble(
    jobs: list[tuple[str, str, int, Site, int]], flat: np.ndarray, widths: Mapping[tuple[str, str], int],
    members: int, device: torch.device | str,
) -> dict[str, dict[str, Tensor]]:
    """Cut the flat draw into (M, n) views of one buffer, moved to the device in one copy."""
    starts, total = {}, 0
    for where, width in widths.items():
        starts[where] = total
        total += members * width
    buffer = np.ones(total, dtype=np.float32)
    offset = 0
    for name, position, m, site, size in jobs:
        kept = np.float32(1.0 / (1.0 - site.rate) if site.compensation == "inverse" else 1.0)
        begin = starts[name, position] + m * widths[name, position]
        buffer[begin : begin + size] = np.where(flat[offset : offset + size] < site.rate, np.float32(0), kept)
        offset += size
    moved = torch.from_numpy(buffer).to(device)
    masks: dict[str, dict[str, Tensor]] = {}
    for (name, position), width in widths.items():
        begin = starts[name, position]
        masks.setdefault(name, {})[position] = moved[begin : begin + members * width].view(members, width)
    return masks
