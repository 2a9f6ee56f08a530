"""The heads' training on maps that are made here: what they find, and what they leave alone."""

import pytest
import torch

from dpdl_core.config import DpdlConfig
from dpdl_core.heads import AnomalyHead
from dpdl_core.learn import Heads, HeadSample, _best, _logit, fit_heads

CHANNELS, PATCH_DIMS, DEAD = 12, 6, 5
CONFIG = DpdlConfig(head_iterations=60, head_networks=2)


def sample(count, rng, shift=0.0):
    """Noise, with `shift` on one channel at a tenth of the places; the last DEAD never vary."""
    joined = torch.randn(count, CHANNELS, 7, 7, generator=rng)
    residuals = torch.randn(count, PATCH_DIMS, 14, 14, generator=rng)
    joined[:, 0, :2, :3] += shift
    residuals[:, 0, :4, :5] += shift
    joined[:, -DEAD:] = 0.0
    return HeadSample(joined, residuals)


@pytest.fixture(scope="module")
def trained():
    rng = torch.Generator().manual_seed(0)
    heads = Heads([0], CHANNELS, PATCH_DIMS, CONFIG.head_networks)
    fit_heads(heads, sample(60, rng), sample(8, rng, shift=4.0), config=CONFIG, seed=1)
    return heads, rng


def test_each_head_tells_new_defects_from_new_normals(trained):
    heads, rng = trained
    with torch.no_grad():
        normal, defect = (
            heads.logits(heads.whiten(s.joined), s.residuals)
            for s in (sample(40, rng), sample(40, rng, shift=4.0))
        )
    above = (defect[:, None] > normal[None]).double().mean((0, 1))
    assert (above > 0.95).all(), above


def test_a_direction_that_training_never_saw_weighs_nothing(trained):
    """A random start would stay there, and be noise for images that do move in it."""
    heads, _ = trained
    weight = heads.anomaly.classify.weight[0, :, 0, 0]
    assert weight[:-DEAD].abs().min() > 0
    assert weight[-DEAD:].abs().max() == 0


def test_heads_without_anomalies_are_silent():
    rng = torch.Generator().manual_seed(0)
    heads = Heads([0], CHANNELS, PATCH_DIMS, CONFIG.head_networks)
    nothing = HeadSample(torch.empty(0), torch.empty(0))
    fit_heads(heads, sample(20, rng), nothing, config=CONFIG, seed=1)
    with torch.no_grad():
        values = heads.logits(heads.whiten(sample(5, rng).joined), sample(5, rng).residuals)
    assert (values == 0).all()


def test_another_seed_changes_only_the_network_and_little_of_it(trained):
    heads, _ = trained
    rng = torch.Generator().manual_seed(0)
    other = Heads([0], CHANNELS, PATCH_DIMS, CONFIG.head_networks)
    fit_heads(other, sample(60, rng), sample(8, rng, shift=4.0), config=CONFIG, seed=2)
    for part in ("anomaly", "residual"):
        ours, theirs = getattr(heads, part).state_dict(), getattr(other, part).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    means = torch.randn(200, CHANNELS, generator=rng)
    with torch.no_grad():
        logits = torch.stack([h.normal.of_means(means) for h in (heads, other)])
    assert not torch.equal(*logits)
    assert torch.corrcoef(logits)[0, 1] > 0.95


def test_the_gradient_through_the_top_places_is_all_of_it():
    """Against autograd through every place."""
    torch.manual_seed(0)
    head = AnomalyHead(5, share=0.2)
    places = torch.randn(3, 36, 5)
    found = _logit(head, _best(head, places))
    want = head(places.transpose(1, 2).reshape(3, 5, 6, 6)).logit
    torch.testing.assert_close(found, want)
    weights = torch.tensor([1.0, -2.0, 0.5])
    mine, full = (
        torch.autograd.grad((weights * logit).sum(), list(head.parameters()))
        for logit in (found, want)
    )
    torch.testing.assert_close(mine, full)
