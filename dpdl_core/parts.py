"""The parts of a score: energies in three kinds of space, and tails that make them comparable.

Knows feature maps and bridges; nothing of trunks, files or training.
Letters: B batch, P pooled features (pool), D features of a space, V parts, K knots, h w map sides.
"""

from __future__ import annotations

import math
from collections.abc import Container, Iterable, Iterator, Sized
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl_core.bridge import Bridge

FIRST = 256
"""Prototypes that every patch is held against; the others see an image's worst patches only. They
are chosen to stand for all (estimate.covering)."""
_CHUNK_ROWS = {"cpu": 1024, "cuda": 1 << 15}
"""Patches held against prototypes at a time: their costs stay in a CPU's cache between the product
and the minimum; an accelerator wants few launches."""
_CHUNK_MAPS = {"cpu": 1 << 19, "cuda": 1 << 31}
"""Values of a map whose moments are taken at a time, likewise."""
TAIL_KNOTS = 256
TAIL_SHARE = 0.2
"""The upper share of normal values that the exponential beyond them is fitted to."""


def pool(maps: list[Tensor], stages: Container[int], quartered: Iterable[int]) -> Tensor:
    """Mean and standard deviation over places of every channel of every stage, (B, P).

    Order: stage by stage, its means, then its deviations; then the means over the four quadrants
    of the last stage, upper left, upper right, lower left, lower right, which overlap by a row
    and a column where its side is odd; then those of the other `quartered` stages. Only `stages`,
    from 0, are looked at: moments of others are zero. Shallow maps are large, and moments of all
    seven of Lite0's cost three times the last five's.
    """
    parts: list[Tensor] = []
    for stage, m in enumerate(maps):
        if stage not in stages:
            parts.append(m.new_zeros((len(m), 2 * m.shape[1]), dtype=torch.float32))
            continue
        values = _CHUNK_MAPS.get(m.device.type, 1 << 19)
        chunks = torch.split(m.float(), max(1, values // m.shape[1:].numel()))
        moments = [(some.mean((2, 3)), some.square().mean((2, 3))) for some in chunks]
        mean, square = (torch.cat(each) for each in zip(*moments, strict=True))
        # Features are of order 1, so the difference does not cancel.
        parts += [mean, (square - mean.square()).clamp_min(0).sqrt()]
    parts += [_quadrants(maps[stage].float()).flatten(1) for stage in _in_quarters(maps, quartered)]
    return torch.cat(parts, 1)


def quadrant_columns(channels: list[int], quartered: Iterable[int]) -> dict[int, range]:
    """Where the means over quadrants of each stage that has them lie among pool()'s columns."""
    columns, start = {}, 2 * sum(channels)
    for stage in _in_quarters(channels, quartered):
        columns[stage] = range(start, start + 4 * channels[stage])
        start += 4 * channels[stage]
    return columns


def pooled_width(channels: list[int], quartered: Iterable[int]) -> int:
    """pool()'s P."""
    return 2 * sum(channels) + sum(map(len, quadrant_columns(channels, quartered).values()))


def _in_quarters(stages: Sized, quartered: Iterable[int]) -> list[int]:
    last = len(stages) - 1
    return [last, *(stage for stage in quartered if stage != last)]


def _quadrants(last: Tensor) -> Tensor:
    """Means over the quadrants of square maps, (B, c, h, h) -> (B, 4, c)."""
    side = last.shape[-1]
    half = (side + 1) // 2
    corners = F.avg_pool2d(last, half, stride=max(1, side - half))
    # A single place is all four of its quadrants.
    return corners.expand(-1, -1, 2, 2).flatten(2).transpose(1, 2)


class PooledEnergy(nn.Module):
    """Bridge energy of whitened pooled features: a soft-min Mahalanobis distance.

    Whitened by the normals' shrinkage covariance, "variances = identity" (paper, section 3.1)
    is true and the plan stays in closed form. Its A leading axes are whitened one by one, all
    that lies outside them by one variance: see whitening().
    """

    columns: Tensor
    mean: Tensor
    axes: Tensor
    gain: Tensor
    rest: Tensor

    def __init__(self, columns: list[int], num_axes: int, num_prototypes: int) -> None:
        super().__init__()
        dims = len(columns)
        num_axes = min(num_axes, dims)
        self.register_buffer("columns", torch.tensor(columns))
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("axes", torch.zeros(dims, num_axes))
        self.register_buffer("gain", torch.zeros(num_axes))
        self.register_buffer("rest", torch.ones(()))
        self.bridge = Bridge(
            torch.zeros(num_prototypes, dims),
            torch.ones(1, dims),
            torch.zeros(num_prototypes),
            eps=1.0,
        )

    def whiten(self, pooled: Tensor) -> Tensor:
        """(B, P) -> (B, D), normals with zero mean and unit covariance."""
        return self.sphere(pooled.index_select(1, self.columns) - self.mean)

    def sphere(self, centred: Tensor) -> Tensor:
        """The symmetric whitener, axes diag(gain) axes^T + rest I, applied to (B, D) rows."""
        return self.rest * centred + (centred @ self.axes * self.gain) @ self.axes.T

    def forward(self, pooled: Tensor) -> Tensor:
        """Energy (B,) per dimension of pooled features (B, P)."""
        if self.bridge.num_prototypes > 1:
            energy = self.bridge.energy(self.whiten(pooled))
        else:
            # The lone prototype is the mean, and orthonormal axes keep the lengths on them apart:
            # no whitened features are needed, which would be half of the time.
            centred = pooled.index_select(1, self.columns) - self.mean
            along = (centred @ self.axes).square()
            gain = (self.rest + self.gain).square() - self.rest.square()
            square = self.rest.square() * centred.square().sum(1) + along @ gain
            # A difference where axes vary more than the rest: shrinkage() bounds what it loses.
            energy = _stiffness(self.bridge, pooled) * square.clamp_min(0) / 2
        return energy / len(self.mean)


class PatchSpace(nn.Module):
    """Unit-norm patches of one or several stages, joined and projected, on a common grid.

    With `smooth` after a 3 x 3 mean. With `step` 2 every second row and column is looked at; what
    is learnt is learnt from all.
    """

    center: Tensor
    axes: Tensor

    def __init__(
        self, stages: list[int], in_dims: int, dims: int, *, grid: int, smooth: bool, step: int = 1
    ) -> None:
        super().__init__()
        self.stages, self.grid, self.smooth, self.step = stages, grid, smooth, step
        self.side = len(range(0, grid, step))
        self.register_buffer("center", torch.zeros(in_dims))
        self.register_buffer("axes", torch.zeros(in_dims, dims))

    def join(self, maps: list[Tensor]) -> Tensor:
        """Maps of all stages -> unit-norm patches, joined, (B, grid * grid, in_dims)."""
        parts = [self._coarse(maps[s], 1) for s in self.stages]
        parts = [self._spread(m, 1) if m.shape[-1] < self.grid else m for m in parts]
        return torch.cat([F.normalize(m.flatten(2).transpose(1, 2), dim=-1) for m in parts], -1)

    def _coarse(self, m: Tensor, step: int) -> Tensor:
        """A stage's map at every `step`-th place of the grid; of a deep stage, whose map is coarser
        than the grid, its own places. A mean that is not looked at is not taken."""
        m = m.float()
        if m.shape[-1] > self.grid:
            m = F.adaptive_avg_pool2d(m, self.grid)
        step = step if m.shape[-1] == self.grid else 1
        if self.smooth:
            return F.avg_pool2d(m, 3, stride=step, padding=1, count_include_pad=False)
        return m[..., ::step, ::step]

    def _spread(self, coarse: Tensor, step: int) -> Tensor:
        """Every `step`-th place of the grid from a deep stage's map."""
        size = (self.grid, self.grid)
        on_grid = F.interpolate(coarse, size=size, mode="bilinear", align_corners=False)
        return on_grid[..., ::step, ::step]

    def everywhere(self, maps: list[Tensor]) -> Tensor:
        """Maps of all stages -> (B, grid * grid, dims), (join() - center) @ axes."""
        return self._project(maps, 1)

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps of all stages -> (B, side * side, dims), everywhere() at the places looked at."""
        return self._project(maps, self.step)

    def _project(self, maps: list[Tensor], step: int) -> Tensor:
        """Deep stages are projected before they are spread on the grid: both are linear, and a map
        of 7 x 7 has a quarter of the places."""
        side, dims = len(range(0, self.grid, step)), self.axes.shape[1]
        offset = -(self.center @ self.axes)
        total = offset.expand(len(maps[0]), side, side, dims).contiguous()
        start = 0
        for stage in self.stages:
            m = self._coarse(maps[stage], step)
            axes = self.axes[start : start + m.shape[1]]
            start += m.shape[1]
            if maps[stage].shape[-1] < self.grid:
                norm = torch.linalg.vector_norm(self._spread(m, step), dim=1).clamp_min(1e-12)
                projected = (m.permute(0, 2, 3, 1) @ axes).permute(0, 3, 1, 2)
                projected = self._spread(projected, step).permute(0, 2, 3, 1)
                total.addcdiv_(projected, norm[..., None])
            else:
                units = F.normalize(m, dim=1).permute(0, 2, 3, 1)
                total.view(-1, dims).addmm_(units.flatten(0, 2), axes)
        return total.flatten(1, 2)


class PatchEnergy(nn.Module):
    """Bridge energy of every patch; an image's is the mean over its worst ones."""

    def __init__(self, space: PatchSpace, num_prototypes: int, eps: float, worst: float) -> None:
        super().__init__()
        dims = space.axes.shape[1]
        self.space, self.worst = space, worst
        self.bridge = Bridge(
            torch.zeros(num_prototypes, dims),
            torch.ones(1, dims),
            torch.zeros(num_prototypes),
            eps=eps,
        )

    def forward(self, maps: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Energy (B,) and its map (B, grid, grid)."""
        patches = self.space(maps)
        first, others = self._lots
        energies = hard_energy(self.bridge, patches.flatten(0, 1), first).view(patches.shape[:2])
        if others is not None:
            worst, rows = self._worst(energies, patches)
            energies = _with_fine(energies, worst, hard_energy(self.bridge, rows, others))
        return self.image_energy(energies), self.on_grid(energies)

    @property
    def _lots(self) -> tuple[slice, slice | None]:
        """Prototypes that every patch is held against, and those that its image's worst see too."""
        if self.bridge.num_prototypes > 2 * FIRST:
            return slice(FIRST), slice(FIRST, None)
        return slice(None), None

    def residuals(self, patches: Tensor, winners: Tensor) -> Tensor:
        """Eq. 22 for patches (B, L, D) and their prototypes (B, L): (B, D, side, side)."""
        rows = self.bridge.residual(patches.flatten(0, 1), winners.flatten())
        return rows.view(len(patches), self.space.side, self.space.side, -1).permute(0, 3, 1, 2)

    def residual_logits(self, patches: Tensor, winners: Tensor, weight: Tensor) -> Tensor:
        """weight (D,) times residuals(), (B, L), without making them.

        With one variance for all prototypes a residual is a scaled difference: the prototypes'
        share of the product is a table of C numbers.
        """
        scale = self.bridge.shrink[0] / self.bridge.variances[0].sqrt()
        weight = weight * scale.to(weight)
        return patches @ weight - (self.bridge.means.to(weight) @ weight)[winners]

    def on_grid(self, values: Tensor) -> Tensor:
        """(B, L) -> (B, grid, grid): a place that was not looked at has its neighbour's value."""
        side, grid, step = self.space.side, self.space.grid, self.space.step
        looked_at = values.view(-1, side, side)
        if step == 1:
            return looked_at
        return looked_at.repeat_interleave(step, 1).repeat_interleave(step, 2)[:, :grid, :grid]

    def nearest(self, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Energies and nearest prototypes of (B, L, D) patches, (B, L) each.

        Every patch is held against the FIRST prototypes, which bounds its energy from above; the
        eighth of an image's patches that come out worst, against all of them. Patches that lie
        near a prototype of the first lot are normal enough as they stand.
        """
        first, others = self._lots
        found = hard_nearest(self.bridge, patches.flatten(0, 1), first)
        energies, winner = (values.view(patches.shape[:2]) for values in found)
        if others is None:
            return energies, winner
        worst, rows = self._worst(energies, patches)
        found = hard_nearest(self.bridge, rows, others)
        fine, nearest = (values.view(worst.shape) for values in found)
        nearer = fine < energies.gather(1, worst)
        nearest = torch.where(nearer, FIRST + nearest, winner.gather(1, worst))
        return _with_fine(energies, worst, fine), winner.scatter(1, worst, nearest)

    def _worst(self, energies: Tensor, patches: Tensor) -> tuple[Tensor, Tensor]:
        """Of energies (B, L) and patches (B, L, D) each image's worst eighth, and no less than
        twice what image_energy() looks at: places (B, l) and rows (B * l, D)."""
        places = patches.shape[1]
        looked_at = min(places, max(1, places // 8, 2 * self._count(places)))
        worst = energies.topk(looked_at, dim=1).indices
        rows = patches.gather(1, worst.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        return worst, rows.flatten(0, 1)

    def _count(self, places: int) -> int:
        # Rounded up: of few places the worst one alone, a maximum, would be all. A float just above
        # an integer, as 0.07 * 100, still means that integer.
        return max(1, math.ceil(self.worst * places - 1e-9))

    def image_energy(self, energies: Tensor) -> Tensor:
        """(B, patches) -> (B,)."""
        return energies.topk(self._count(energies.shape[1]), dim=1).values.mean(1)


def _with_fine(energies: Tensor, worst: Tensor, fine: Tensor) -> Tensor:
    """(B, L) with the worst places' energies as they are against all prototypes, `fine` being
    those against the others than the first.

    Elsewhere they are bounds only: none may pass for worse than those looked at.
    """
    fine = torch.minimum(energies.gather(1, worst), fine.view(worst.shape))
    return torch.minimum(energies, fine.amin(1, keepdim=True)).scatter(1, worst, fine)


class Energies(nn.Module):
    """All bridge energies of a model: those of pooled features first, then those of patches."""

    def __init__(self, pooled: dict[str, PooledEnergy], patches: dict[str, PatchEnergy]) -> None:
        super().__init__()
        self.pooled, self.patches = nn.ModuleDict(pooled), nn.ModuleDict(patches)

    @property
    def names(self) -> list[str]:
        return [f"pooled {s}" for s in self.pooled] + [f"patch {s}" for s in self.patches]

    @property
    def first(self) -> PatchEnergy:
        """The patch space whose residuals M_r looks at."""
        part = next(iter(self.patches.values()))
        assert isinstance(part, PatchEnergy)
        return part

    @property
    def sizes(self) -> dict[str, int]:
        """Number of prototypes behind every energy."""
        parts: list[Any] = [*self.pooled.values(), *self.patches.values()]
        counts = [part.bridge.num_prototypes for part in parts]
        return dict(zip(self.names, counts, strict=True))

    def forward(self, pooled: Tensor, maps: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, P) and the maps -> energies (B, E), patch energies (B, patch spaces, h, w), and of
        the first patch space the patches (B, L, D) and nearest prototypes (B, L)."""
        values = [part(pooled) for part in self.pooled.values()]
        grids: list[Tensor] = []
        first = self.first
        patches = first.space(maps)
        energies, winners = first.nearest(patches)
        values.append(first.image_energy(energies))
        grids.append(first.on_grid(energies))
        for part in list(self.patches.values())[1:]:
            energy, grid = part(maps)
            values.append(energy)
            grids.append(grid)
        return torch.stack(values, 1), torch.stack(grids, 1), patches, winners


_ALL = slice(None)


def hard_nearest(bridge: Bridge, x: Tensor, among: slice = _ALL) -> tuple[Tensor, Tensor]:
    """Bridge.energy's soft-min as a minimum, (N,), and the nearest prototype, (N,), for (N, D).

    For uniform weights and one variance, S is the same everywhere and the energy is the minimum
    over c of (1-S) |x - p_c|^2 / 2, up to what the other prototypes add: between 0 and eps log C.
    A ninth of the soft-min's time, which would cost half as much as the trunk. `among` looks at
    some of the prototypes only, which are numbered from its start.
    """
    found = [_minimum(costs) for costs in _costs(bridge, x, among)]
    least, winners = (torch.cat(each) for each in zip(*found, strict=True))
    return _energy(bridge, x, least), winners


_PIECE, _MANY = 64, 512


def _minimum(costs: Tensor) -> tuple[Tensor, Tensor]:
    """costs.min(1). A CPU finds a row's least value by vectors but its place one by one, so of
    many columns the place is sought in the best piece only, in a third of the time."""
    rows, columns = costs.shape
    if costs.is_cuda or columns <= _MANY or columns % _PIECE:
        least, winners = costs.min(1)
        return least, winners
    pieces = costs.view(rows, -1, _PIECE)
    least, piece = pieces.amin(2).min(1)
    best = pieces[torch.arange(rows), piece]
    return least, piece * _PIECE + best.argmin(1)


def hard_energy(bridge: Bridge, x: Tensor, among: slice = _ALL) -> Tensor:
    """hard_nearest()'s energies without its prototypes, which cost half as much again."""
    return _energy(bridge, x, torch.cat([costs.amin(1) for costs in _costs(bridge, x, among)]))


def _costs(bridge: Bridge, x: Tensor, among: slice) -> Iterator[Tensor]:
    """|p|^2 / 2 - x'p of some rows and the prototypes. Spaces are centred, so these are no larger
    than what they differ by."""
    means = bridge.means[among].to(x.dtype)
    offset = means.square().sum(1) / 2
    for rows in torch.split(x, _CHUNK_ROWS.get(x.device.type, 1024)):
        yield torch.addmm(offset, rows, means.T, alpha=-1)


def _energy(bridge: Bridge, x: Tensor, least: Tensor) -> Tensor:
    """(1-S) (|x|^2 / 2 + least), (N,)."""
    norms: Tensor = torch.linalg.vector_norm(x, dim=1).square() / 2
    return _stiffness(bridge, x) * (norms + least).clamp_min(0)


def _stiffness(bridge: Bridge, x: Tensor) -> Tensor:
    # As a sigmoid: 1 - S would lose its digits where eps is small.
    return (-bridge.log_ratio[0, 0]).sigmoid().to(x.dtype)


class Tails(nn.Module):
    """Values of V parts to -log P(value or more | normal), from values of normals.

    Within the normals' range the empirical tail, interpolated; above their TAIL_SHARE quantile
    an exponential with the mean excess, so that what is far out keeps its order.
    """

    knots: Tensor
    logs: Tensor
    start: Tensor
    scale: Tensor

    def __init__(self, num_parts: int) -> None:
        super().__init__()
        self.register_buffer("knots", torch.zeros(num_parts, TAIL_KNOTS))
        self.register_buffer("logs", torch.zeros(TAIL_KNOTS))
        self.register_buffer("start", torch.zeros(num_parts))
        self.register_buffer("scale", torch.ones(num_parts))

    def fit(self, values: Tensor) -> None:
        """values (N, V) of normals that the parts have not seen."""
        values = values.double()
        levels = torch.linspace(0, 1 - TAIL_SHARE, TAIL_KNOTS, dtype=torch.float64)
        knots = torch.quantile(values, levels, dim=0)
        excess = (values - knots[-1]).clamp_min(0).sum(0) / (values > knots[-1]).sum(0).clamp_min(1)
        # Normals that are one picture again and again differ by rounding, which is no scale.
        tiny = (1e-3 * knots[-1].abs()).clamp_min(1e-6)
        self.knots.copy_(knots.T)
        self.logs.copy_(-torch.log1p(-levels))
        self.start.copy_(knots[-1])
        self.scale.copy_(torch.maximum(excess, tiny))

    def take_over(self, other: Tails, parts: slice) -> None:
        """Some parts' tails as they are in `other`."""
        for name in ("knots", "start", "scale"):
            getattr(self, name)[parts] = getattr(other, name)[parts]

    def forward(self, values: Tensor) -> Tensor:
        """(B, V) -> (B, V), 0 for the most normal, growing without bound."""
        columns = values.T.contiguous()
        right = torch.searchsorted(self.knots, columns).clamp(1, TAIL_KNOTS - 1)
        low, high = self.knots.gather(1, right - 1), self.knots.gather(1, right)
        share = ((columns - low) / (high - low).clamp_min(1e-30)).clamp(0, 1)
        inside = torch.lerp(self.logs[right - 1], self.logs[right], share)
        beyond = (columns - self.start[:, None]).clamp_min(0) / self.scale[:, None]
        return (inside + beyond).T


ENERGY_FLOOR = -4.0
SEEN_FLOOR = -1.0
"""Least log odds that an energy, or a part that knows the seen anomalies, can give."""


def evidence(tails: Tensor, num_energies: int) -> Tensor:
    """Log odds against normality, log((1 - p) / p), above each part's floor: (B, V), >= 0.

    `tails` are -log p, p the share of normals with such a value or more; the energies come first.
    Looking more normal than most is evidence too, so an energy's floor is deep. To be unlike the
    seen anomalies says little where others may come: the floor of what knows them is shallow.
    """
    floor = tails.new_full((tails.shape[1],), SEEN_FLOOR)
    floor[:num_energies] = ENERGY_FLOOR
    odds = tails + torch.log1p(-torch.exp(-tails.clamp_min(1e-6)))
    return torch.maximum(odds, floor) - floor


def shrinkage(gram: Tensor, fourth: float, num_rows: int, dims: int) -> float:
    """Ledoit-Wolf's share of the scaled identity for N rows x of zero mean and D dimensions.

    `gram` is the sum of x x^T over rows, or the table of their products, which has the same trace
    and norm; `fourth` the sum of |x|^4.
    Ledoit and Wolf, J. Multivariate Analysis 88 (2004), lemma 3.3 and theorem 3.2.
    """
    second = float(gram.square().sum()) / num_rows**2
    target = float(gram.trace()) / num_rows / dims
    distance = second - dims * target**2
    noise = fourth / num_rows**2 - second / num_rows
    if distance <= 0:
        return 1.0
    return min(1.0, max(0.0, noise / distance))


_WHITENING_ROWS = 4096


class Whitening(NamedTuple):
    """A symmetric whitener W = axes diag(gain) axes^T + rest I of D features; float64."""

    mean: Tensor
    """(D,)."""
    axes: Tensor
    """(D, A), the normals' largest variance first, orthonormal or zero."""
    gain: Tensor
    """(A,)."""
    rest: Tensor
    """()."""


def whitening(rows: Tensor, num_axes: int) -> Whitening:
    """The whitener of (N, D) rows, computed in float64, with A = min(num_axes, D).

    Ledoit and Wolf's covariance on its leading axes; what is orthogonal to them has one variance,
    the mean of those that are left (Tipping and Bishop, J. Royal Statistical Society B 61 (1999),
    eq. 8). A thousand images do not tell the small variances of sixteen hundred directions apart.
    The shrunk covariance never loses rank, so N below D is fine. A slice of the rows at a time is
    held in float64, so memory grows with D squared, not with N.
    """
    num_rows, dims = rows.shape
    chunks = torch.split(rows, _WHITENING_ROWS)
    mean = torch.stack([chunk.sum(0, dtype=torch.float64) for chunk in chunks]).sum(0) / num_rows
    few = num_rows < dims
    gram = torch.zeros((min(num_rows, dims),) * 2, dtype=torch.float64)
    fourth = 0.0
    for chunk in [rows] if few else chunks:
        x = chunk.double() - mean
        gram += x @ x.T if few else x.T @ x
        fourth += float(x.square().sum(1).square().sum())
    share = shrinkage(gram, fourth, num_rows, dims)
    # Of one picture again and again nothing varies: a thousandth of the features' own size does.
    least = 1e-6 * max(float(mean.square().mean()), 1e-12)
    base = max(share * float(gram.trace()) / rows.numel(), least)
    values, axes = torch.linalg.eigh(gram / num_rows)
    if few:
        real = values > 1e-12 * values[-1]
        values = values[real]
        axes = x.T @ axes[:, real] / (num_rows * values).sqrt()
    variances = (1 - share) * values.clamp_min(0) + base
    axes, leading = axes[:, -num_axes:].flip(1), variances[-num_axes:].flip(0)
    left = variances.sum() - leading.sum() + (dims - len(variances)) * base
    rest = (left / max(1, dims - len(leading))).clamp_min(base).rsqrt()
    blank = min(num_axes, dims) - len(leading)
    return Whitening(mean, F.pad(axes, (0, blank)), F.pad(leading.rsqrt() - rest, (0, blank)), rest)
