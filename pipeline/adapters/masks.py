"""Masks are functions of keys, never state: equal on every device, after a resume, in every layout of the rows.

*Weight masks* are drawn before the forward, for all layers and members in one flat draw, keyed by (run seed,
step or phase, draw, layer name, position). They are shared by all rows of a draw, by micro-batches and by processes.

*Activation masks* are never stored. An entry is kept or dropped by a 32-bit hash of (seed, step, branch, layer,
example, token position, feature); an attention logit by one of (…, layer, head, example, key position) or of (…, head,
example, query and key position). So padding side, packing, batch order, number of processes, accumulation and
recomputation do not change it. All arithmetic is int32 with wrap-around.

*Spans*: positions are cut into blocks of `span_length` consecutive ones, with an offset drawn per line of positions
(per example and layer; in attention per head and query too), and a block is dropped as a whole with probability
`rate`. So every entry is dropped with probability `rate` exactly, a block never depends on the length of the row, and
all but the first and last block of a line have `span_length` entries.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from pipeline.adapters.members import MaskKey, Member, RowKeys, same_for_all
from pipeline.config.extensions import MASK_PATTERNS, load
from pipeline.config.method import WEIGHT_POSITIONS, Site
from pipeline.errors import ConfigError
from pipeline.randomness import key64, least_bits, random_bits, shifted, signed, uniform

_TWO_31 = 2147483648


@dataclass(frozen=True)
class LayerSites:
    """Size of each masked axis of a layer, and per adapter the weight sites in force."""

    sizes: dict[tuple[int, str], int]
    """(adapter, position) -> n: I, O or R."""
    sites: dict[int, Mapping[str, Site]]
    """adapter -> position -> site."""

    def note(self, adapter: int, sizes: Mapping[str, int], sites: Mapping[str, Site]) -> None:
        """An adapter has come."""
        self.sites[adapter] = sites
        self.sizes.update({(adapter, position): size for position, size in sizes.items()})

    def forget(self, adapter: int) -> None:
        """It has left."""
        self.sites.pop(adapter, None)
        for place in [place for place in self.sizes if place[0] == adapter]:
            del self.sizes[place]


def draw_weight_masks(
    layers: Mapping[str, LayerSites], members: Sequence[Member], keys: Sequence[MaskKey], device: torch.device | str
) -> dict[str, dict[str, Tensor]]:
    """Masks for one pass: layer -> position -> (M, n) float32.

    An entry is 0 with probability `rate`, else 1/(1-rate) (`inverse`) or 1 (`none`). Members without a draw, and
    adapters without the site, have ones. A position that no member masks is absent.

    Args:
        keys: one per member.
    """
    drawing = [(m, one.adapter) for m, one in enumerate(members) if one.adapter is not None and one.draw is not None]
    masked: dict[tuple[str, str], dict[int, Site]] = {}
    for name, layer in layers.items():
        for position in WEIGHT_POSITIONS:
            of_members = {m: site for m, own in drawing if (site := layer.sites.get(own, {}).get(position))}
            if of_members:
                masked[name, position] = of_members
    if not masked:
        return {}
    adapters = {member.adapter for member in members if member.adapter is not None}
    widths = {  # ranks differ among members: wide enough for those that are not masked, too
        (name, position): max(layers[name].sizes.get((adapter, position), 0) for adapter in adapters)
        for name, position in masked
    }
    bits = random_bits(
        [
            key64(key.seed, key.phase, member.draw, *where) if m in of_members else 0
            for where, of_members in masked.items() for m, (member, key) in enumerate(zip(members, keys, strict=True))
        ],
        [width for width in widths.values() for _ in members], device,
    )
    entries = _entries(bits, masked, widths, len(members))
    masks: dict[str, dict[str, Tensor]] = {}
    begin = 0
    for (name, position), width in widths.items():
        of_bits, of_layer = (_rows(flat, begin, len(members), width) for flat in (bits, entries))
        for m, site in masked[name, position].items():
            size = layers[name].sizes[members[m].adapter, position]  # type: ignore[index]
            if size < width:
                of_layer[m, size:] = 1.0
            if site.pattern != "column":
                keeps = kept_entries(site, uniform(of_bits[m, :size]).cpu().numpy())
                of_layer[m, :size] = torch.from_numpy(keeps).to(of_layer).mul_(_kept_value(site))
        masks.setdefault(name, {})[position] = of_layer
        begin += len(members) * (width + width % 2)
    return masks


def _rows(flat: Tensor, begin: int, members: int, width: int) -> Tensor:
    """(M, width), a view: each member's part of a flat draw begins on a whole word."""
    even = width + width % 2
    return flat[begin : begin + members * even].view(members, even)[:, :width]


def _entries(
    bits: Tensor, masked: Mapping[tuple[str, str], Mapping[int, Site]], widths: Mapping[tuple[str, str], int],
    members: int,
) -> Tensor:
    """What stands in the masks in the place of each of `bits`."""
    everything = (-_TWO_31, 1.0)
    kinds = [
        (least_bits(site.rate), _kept_value(site)) if (site := of_members.get(m)) else everything
        for of_members in masked.values() for m in range(members)
    ]
    if same_for_all(kinds):
        least, kept = kinds[0]
        return (bits >= least).to(torch.float32).mul_(kept)
    counts = torch.tensor([width + width % 2 for width in widths.values() for _ in range(members)])
    least_J = torch.tensor([least for least, _ in kinds], dtype=torch.int32)
    kept_J = torch.tensor([kept for _, kept in kinds], dtype=torch.float32)
    counts_J, least_J, kept_J = (one.to(bits.device) for one in (counts, least_J, kept_J))
    least_of, kept_of = (torch.repeat_interleave(one, counts_J, output_size=len(bits)) for one in (least_J, kept_J))
    return kept_of.mul_(bits >= least_of)


def kept_entries(site: Site, uniforms: np.ndarray) -> np.ndarray:
    """(n,) bool, the entries of a weight mask that are kept, of n independent uniform numbers in [0, 1).

    A pattern of an installed package is a function of these and the rate, so it is drawn anew from the keys alone, as
    `column` is, which keeps each entry whose own number is `rate` or more. It has to drop every entry with probability
    `rate`: scaling and the read-out without masks rest on that, and on nothing else.

    Raises:
        ConfigError: the package's function gives no mask of that form.
    """
    keeps = load(MASK_PATTERNS, site.pattern)(uniforms, site.rate)
    if not isinstance(keeps, np.ndarray) or keeps.dtype != np.bool_ or keeps.shape != uniforms.shape:
        form = f"{keeps.dtype} {keeps.shape}" if isinstance(keeps, np.ndarray) else type(keeps).__name__
        raise ConfigError(
            MASK_PATTERNS, site.pattern, f"must give a bool array {uniforms.shape} for as many uniforms, not {form}",
            "Mend or remove the package that offers it.",
        )
    return keeps


def _kept_value(site: Site) -> float:
    return 1.0 / (1.0 - site.rate) if site.compensation == "inverse" else 1.0


def element_mask(
    keys: RowKeys, rows: slice, layer_key: int, features: int, rate: float, rescale: bool = True
) -> Tensor:
    """Element mask (B, T, features): 0 with probability `rate`, else 1/(1-rate), or 1 without `rescale`.

    Args:
        keys: identity of the rows of the whole pass.
        rows: the rows wanted.
        layer_key: 64-bit key of (layer, site).
    """
    bits = _per_feature(token_hash(keys, rows, layer_key), features)
    kept = (bits >= threshold(rate)).to(torch.float32)
    return kept.div_(1.0 - rate) if rescale else kept


def dropped_hidden(keys: RowKeys, rows: slice, layer_key: int, features: int, site: Site) -> Tensor:
    """Where hidden vectors (B, T, F) are dropped: bool, broadcastable to that shape.

    `element`: every entry on its own, (B, T, F). `column`: a feature for all tokens of an example, (B, 1, F), or
    (B, T, F) where rows are packed. `span`: whole vectors of consecutive tokens, (B, T, 1).
    """
    if site.pattern == "span":
        line = row_hash(keys, rows, layer_key)
        return _drop(_pair(line, _block(line, keys.position[rows], site.span_length)), site).unsqueeze(-1)
    lines = token_hash(keys, rows, layer_key) if site.pattern == "element" else row_hash(keys, rows, layer_key)
    return _drop(_per_feature(lines, features), site)


def dropped_keys(keys: RowKeys, rows: slice, layer_key: int, heads: int, site: Site) -> Tensor:
    """Pattern `column`: (B, H, T) bool, where a key is dropped for all queries of a head."""
    token_BT = token_hash(keys, rows, layer_key)
    return _drop(_per_head(token_BT, heads), site)


def dropped_pairs(keys: RowKeys, rows: slice, layer_key: int, heads: int, site: Site) -> Tensor:
    """Patterns `element` and `span`: (B, H, Tq, Tk) bool, where a (query, key) pair of a head is dropped.

    `span`: consecutive keys of a query are dropped together.
    """
    query_BHT = _per_head(token_hash(keys, rows, layer_key), heads)
    line = query_BHT.unsqueeze(-1)
    key_B11T = keys.position[rows].unsqueeze(1).unsqueeze(1)
    if site.pattern == "span":
        return _drop(_pair(line, _block(line, key_B11T, site.span_length)), site)
    return _drop(_pair(line, key_B11T.to(torch.int32)), site)


def row_hash(keys: RowKeys, rows: slice, layer_key: int) -> Tensor:
    """(B, 1) int32 hash of (seed, step, layer, branch, example); (B, T) where rows are packed."""
    example = keys.example[rows]
    example = example.unsqueeze(-1) if example.dim() == 1 else example
    branch = keys.branch[rows].to(torch.int32).unsqueeze(-1)
    low, high = (example & 0xFFFFFFFF), (example >> 32) & 0xFFFFFFFF
    key_low, key_high = _layer_keys(keys, rows, layer_key)
    row = mix32(_to_int32(low) ^ key_low)
    row = mix32(row ^ _to_int32(high) * _signed(0x85EBCA6B) ^ key_high)
    return mix32(row + branch * _signed(0xC2B2AE35))


def _layer_keys(keys: RowKeys, rows: slice, layer_key: int) -> tuple[int, int] | tuple[Tensor, Tensor]:
    """Low and high int32 of the key of (seed, step, layer): numbers where all `rows` share it, else (B, 1) each.

    Both halves count: no two (step, layer) pairs of a run share masks.
    """
    start, stop, _ = rows.indices(len(keys.branch))
    ends = list(accumulate(keys.rows))
    seeds = keys.seeds[bisect_right(ends, start) : bisect_left(ends, stop) + 1]
    if same_for_all(seeds):
        key = key64(seeds[0], layer_key)
        return _signed(key), _signed(key >> 32)
    halves = [(_signed(key), _signed(key >> 32)) for key in (key64(seed, layer_key) for seed in keys.seeds)]
    of_member = torch.tensor(halves, dtype=torch.int32).to(keys.branch.device, non_blocking=True)
    of_row = torch.cat([key.expand(count, 2) for key, count in zip(of_member, keys.rows, strict=True)])[rows]
    return of_row[:, :1], of_row[:, 1:]


def token_hash(keys: RowKeys, rows: slice, layer_key: int) -> Tensor:
    """(B, T) int32 hash of everything but the feature."""
    return _pair(row_hash(keys, rows, layer_key), keys.position[rows].to(torch.int32))


def _pair(line: Tensor, position: Tensor) -> Tensor:
    """Hash of a line's hash and an int32 position or block on it."""
    return mix32(line ^ mix32(position * _signed(0x27D4EB2F) + 0x165667))


def _per_feature(line: Tensor, features: int) -> Tensor:
    """(…, features): a hash of its own for every feature."""
    feature = torch.arange(features, dtype=torch.int32, device=line.device)
    return mix32(line.unsqueeze(-1) ^ mix32(feature * _signed(0x9E3779B1) + 0x51ED27))


def _per_head(token_BT: Tensor, heads: int) -> Tensor:
    """(B, H, T): a hash of its own for every head."""
    head = torch.arange(heads, dtype=torch.int32, device=token_BT.device).view(-1, 1)
    return mix32(token_BT.unsqueeze(1) ^ mix32(head * _signed(0x9E3779B1) + 0x3C6EF3))


def _block(line: Tensor, position: Tensor, length: int) -> Tensor:
    """int32 index of the block that a position falls into; blocks start at an offset that the line decides."""
    offset = (mix32(line + 0x2545F4) & 0x7FFFFFFF) % length
    return (position.to(torch.int32) + offset) // length


def _drop(bits: Tensor, site: Site) -> Tensor:
    return bits < threshold(site.rate)


def threshold(rate: float) -> int:
    """The int32 below which a hash means "drop": P(hash < threshold) = rate for a uniform hash."""
    return min(max(round(rate * 2.0**32) - _TWO_31, -_TWO_31), _TWO_31 - 1)


def mix32(x: Tensor) -> Tensor:
    """A full-avalanche permutation of int32 (murmur3's finalizer with the constants of C. Wellons' lowbias32)."""
    x, moved = shifted(x, 16).bitwise_xor_(x), torch.empty_like(x)
    x *= _signed(0x7FEB352D)
    x ^= shifted(x, 15, moved)
    x *= _signed(0x846CA68B)
    x ^= shifted(x, 16, moved)
    return x


def _signed(value: int) -> int:
    return signed(value, 32)


def _to_int32(x: Tensor) -> Tensor:
    """Low 32 bits of an int64 tensor as int32, with wrap-around."""
    return torch.where(x >= _TWO_31, x - 2**32, x).to(torch.int32)
