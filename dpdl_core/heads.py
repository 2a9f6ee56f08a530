"""The scoring heads M_a, M_n and M_r, and what becomes of their logits.

Know feature maps only. Paper: DPDL section 4.4; Deviation networks and DRA
for multiple-instance scoring.
Shapes: feature maps (B, F, H, W) of F channels.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn


class MapScore(NamedTuple):
    logit: Tensor
    """(B,), signed; high means anomalous."""
    map: Tensor
    """(B, H, W), the logit of each location."""


def top_mean(values: Tensor, share: float = 0.1) -> Tensor:
    """Mean of the highest `share` of (B, H, W) or (B, L) values, at least one, -> (B,).

    K = floor(share * locations), as in DRA. The score of eq. 20: an image is as anomalous as
    its most anomalous places.
    """
    flat = values.flatten(1)
    return flat.topk(top_count(flat.shape[1], share), dim=1).values.mean(1)


def top_count(locations: int, share: float) -> int:
    """top_mean()'s K."""
    if not 0 < share <= 1:
        raise ValueError(f"share={share}: want one in (0, 1]")
    # A float just below an integer, as 0.29 * 100, still means that integer.
    return max(1, int(share * locations + 1e-9))


class AnomalyHead(nn.Module):
    """M_a, eq. 20: a linear anomaly classifier at each location, the top K averaged."""

    def __init__(self, channels: int, share: float = 0.1) -> None:
        super().__init__()
        self.classify = nn.Conv2d(channels, 1, kernel_size=1)
        self.share = share

    def forward(self, features: Tensor) -> MapScore:
        places = self.classify(features).squeeze(1)
        return MapScore(top_mean(places, self.share), places)


class NormalHead(nn.Module):
    """M_n, eq. 21: a classifier on the pooled map whose logit (B,) is high for normals."""

    def __init__(self, channels: int, hidden: int = 256) -> None:
        super().__init__()
        self.classify = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, 1)
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.of_means(features.mean((2, 3)))

    def of_means(self, pooled: Tensor) -> Tensor:
        """(B, F) -> (B,)."""
        logit: Tensor = self.classify(pooled).squeeze(1)
        return logit


class ResidualHead(nn.Module):
    """M_r, eq. 22: as M_a, on the residual map (m_c - p_c) / sqrt(Gam_c) of Bridge.residual.

    Its channels differ in scale by what the prototypes' variances leave over; batch
    normalisation with running statistics evens that out and keeps scores free of the batch.
    """

    def __init__(self, channels: int, share: float = 0.1) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(channels)
        self.head = AnomalyHead(channels, share)

    def forward(self, residuals: Tensor) -> MapScore:
        score: MapScore = self.head(self.norm(residuals))
        return score

    def folded(self) -> tuple[Tensor, Tensor]:
        """Weight (D,) and bias () of the place logits in inference, normalisation included."""
        assert self.norm.running_mean is not None
        assert self.norm.running_var is not None
        gain = self.norm.weight * (self.norm.running_var + self.norm.eps).rsqrt()
        weight = self.head.classify.weight[0, :, 0, 0]
        assert self.head.classify.bias is not None
        shift = self.norm.bias - self.norm.running_mean * gain
        return weight * gain, self.head.classify.bias[0] + weight @ shift


def to_map(rows: Tensor, batch: int, height: int, width: int) -> Tensor:
    """(B*H*W, F) vectors, as `to_rows` lays them out, back to a map (B, F, H, W)."""
    return rows.reshape(batch, height, width, rows.shape[1]).permute(0, 3, 1, 2)


def to_rows(features: Tensor) -> Tensor:
    """(B, F, H, W) -> (B*H*W, F): one vector per location, images one after the other."""
    return features.permute(0, 2, 3, 1).reshape(-1, features.shape[1])
