"""The heads against DRA's formulas worked by hand."""

import pytest
import torch

from dpdl_core.heads import (
    AnomalyHead,
    NormalHead,
    ResidualHead,
    to_map,
    to_rows,
    top_mean,
)


def test_top_mean_is_dras():
    """K = max(1, int(share * locations)): of 25, the best 2; of 9, the best 1."""
    values = torch.arange(25.0).reshape(1, 5, 5)[:, torch.randperm(5)]
    assert top_mean(values).item() == pytest.approx((24 + 23) / 2)
    assert top_mean(torch.arange(9.0).reshape(1, 3, 3)).item() == 8
    assert top_mean(torch.arange(100.0)[None], 0.29).item() == pytest.approx(85.0)  # 71..99
    assert top_mean(torch.arange(4.0)[None], 1.0).item() == pytest.approx(1.5)


@pytest.mark.parametrize("share", [0.0, 1.5])
def test_a_share_is_a_share(share):
    with pytest.raises(ValueError, match="share="):
        top_mean(torch.zeros(1, 4), share)


def test_anomaly_head_by_hand():
    """A 1x1 convolution is a dot product per place; no |.|: negative logits stay so."""
    head = AnomalyHead(2, share=0.5)
    with torch.no_grad():
        head.classify.weight.copy_(torch.tensor([1.0, -2.0]).view(1, 2, 1, 1))
        head.classify.bias.fill_(-10.0)
    features = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]], [[0.0, 1.0], [-1.0, 1.0]]]])
    logit, places = head(features)
    assert places.tolist() == [[[-9.0, -10.0], [-5.0, -8.0]]]
    assert logit.item() == pytest.approx(-6.5)


def test_anomaly_gradient_reaches_the_top_places_only():
    features = torch.randn(1, 3, 10, 10, requires_grad=True)
    logit, places = AnomalyHead(3)(features)
    logit.sum().backward()
    touched = features.grad.abs().sum(1)[0] > 0
    assert int(touched.sum()) == 10
    assert places[0][touched].min() >= places[0][~touched].max()


def test_normal_head_sees_the_pooled_map():
    head = NormalHead(3)
    features = torch.randn(2, 3, 4, 5)
    first, _, last = head.classify
    pooled = features.flatten(2).mean(2)
    hidden = (pooled @ first.weight.T + first.bias).clamp_min(0)
    want = (hidden @ last.weight.T + last.bias)[:, 0]
    torch.testing.assert_close(head(features), want)
    assert head(features).shape == (2,)
    torch.testing.assert_close(head(features.flip(3)), head(features))  # no place, only the mean


def test_residual_head_scores_one_as_among_many():
    head = ResidualHead(4).train()
    for _ in range(20):
        head(3 + 5 * torch.randn(8, 4, 6, 6))
    head.eval()
    residuals = torch.randn(5, 4, 6, 6)
    together = head(residuals)
    alone = head(residuals[2:3])
    torch.testing.assert_close(together.logit[2:3], alone.logit)
    torch.testing.assert_close(together.map[2:3], alone.map)


def test_residual_head_evens_channels_out():
    """Channels of scale 1 and 1000 weigh alike once the statistics have settled."""
    scale = torch.tensor([1.0, 1000.0]).view(1, 2, 1, 1)
    head = ResidualHead(2).train()
    for _ in range(60):
        normalised = head.norm(scale * torch.randn(16, 2, 8, 8))
    torch.testing.assert_close(normalised.std((0, 2, 3)), torch.ones(2), atol=0.05, rtol=0)


def test_rows_and_maps_are_each_others_inverse():
    features = torch.randn(2, 3, 4, 5)
    rows = to_rows(features)
    assert rows.shape == (40, 3)
    torch.testing.assert_close(rows[1 * 20 + 2 * 5 + 4], features[1, :, 2, 4])
    assert torch.equal(to_map(rows, 2, 4, 5), features)
