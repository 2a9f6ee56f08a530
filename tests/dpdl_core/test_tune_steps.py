"""A step of tuning and a renewal against what they must do, looked at from outside, and planted
faults."""

import copy
import math
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from small import anomalies, normals, tiny_config

from dpdl_core import renewal, tune, tune_network
from dpdl_core.bridge import Bridge
from dpdl_core.codebook import Codebook, EmaCodebook, Refreshed
from dpdl_core.features import Trunk
from dpdl_core.images import ArraySource
from dpdl_core.losses import LossTerms
from dpdl_core.shard import Shard

NORMALS, SEEN = normals(30), anomalies(3)
CONFIG = tiny_config(tuned_stages="2", tune_iterations="2", tune_batch="12", tune_prototypes="5")


def training(module):
    torch.manual_seed(0)
    source = Shard([(ArraySource(NORMALS), torch.arange(len(NORMALS)))])
    generator = torch.Generator().manual_seed(0)
    return module._Training(CONFIG, Trunk(CONFIG.trunk), source, SEEN, generator, None)


def network(module, prototypes=4):
    """With prototypes among the patches of the normals."""
    torch.manual_seed(0)
    trunk = Trunk(CONFIG.trunk)
    rows = trunk(NORMALS[:prototypes])[-1].flatten(2).mean(2)
    means = torch.nn.functional.normalize(rows, dim=1)
    bridge = Bridge(means, torch.full_like(means, CONFIG.eps), torch.zeros(prototypes), CONFIG.eps)
    book = Codebook(means, torch.ones(prototypes), torch.ones_like(means), 0.0)
    made = module.TuneNetwork(CONFIG, trunk, bridge, EmaCodebook(book, decay=0.9))
    return made.eval()  # batch statistics would let every image into every feature


def a_batch_is_a_third_each_and_its_labels_say_which(module):
    """Oracle: the images themselves. Spoiled ones are a known normal but for one rectangle."""
    run = training(module)
    images, label, seeds = run._augmented(run.batch)
    assert label.tolist() == [0.0] * 4 + [1.0] * 8
    assert len(set(seeds.tolist())) == 4
    pixels = images.round().to(torch.uint8)

    def share_alike(image, others):
        return (image == others).all(3).float().mean((1, 2)).max()

    clean, spoiled, seen = pixels.split(4)
    assert all(share_alike(image, NORMALS) == 1 for image in clean)
    assert all(0.7 < share_alike(image, NORMALS) < 1 for image in spoiled)
    assert all(share_alike(image, SEEN) == 1 for image in seen)
    assert len({image.numpy().tobytes() for image in clean}) == 4
    assert len({image.numpy().tobytes() for image in seen}) > 1


def prototypes_learn_ten_times_as_fast_and_without_decay(module):
    run = training(module)
    rest, prototypes = run.optimizer.param_groups
    assert (rest["lr"], rest["weight_decay"]) == (2e-4, 1e-5)
    assert (prototypes["lr"], prototypes["weight_decay"]) == (2e-3, 0.0)
    named = {id(p): n for n, p in run.network.named_parameters()}
    fast = {named[id(p)] for p in prototypes["params"]}
    slow = {named[id(p)] for p in rest["params"]}
    assert fast == {"bridge.means", "bridge.log_ratio", "bridge.log_weights"}
    assert fast | slow == {n for n, p in run.network.named_parameters() if p.requires_grad}
    assert {n.split(".")[2] for n in slow if n.startswith("trunk")} == {"3", "4"}  # of 0..4


def gradients_are_clipped_to_a_norm_of_one(module):
    run = training(module)
    total = LossTerms.total
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LossTerms, "total", lambda self, weight: 1e4 * total(self, weight))
        run._take_step()
    squares = [p.grad.square().sum() for p in run.network.parameters() if p.grad is not None]
    assert float(torch.stack(squares).sum().sqrt()) == pytest.approx(1, rel=1e-3)


def variances_are_brought_back_after_a_step(module):
    """S = 0.95 at most: odds of 19."""
    run = training(module)
    with torch.no_grad():
        run.network.bridge.log_ratio[:] = 20.0
    run._take_step()
    assert float(run.network.bridge.log_ratio.detach().max()) == pytest.approx(
        math.log(19), abs=1e-4
    )


def margin_and_codebook_follow_normals_only(module):
    label, seeds = torch.tensor([0.0, 1.0, 0.0, 1.0]), torch.arange(2)
    images = torch.stack([NORMALS[0], SEEN[0], NORMALS[1], SEEN[1]]).float()
    first = network(module)
    energy = first.look(images[::2])[1]
    other, glaring = copy.deepcopy(first), images.clone()
    glaring[1::2] = 255
    with torch.no_grad():
        first(images, label, seeds)
        other(glaring, label, seeds)
    # Two values: the median is their mean, and .95 lies so far between them.
    low, high = sorted(energy.tolist())
    want = [(low + high) / 2, low + 0.95 * (high - low)]
    assert first.margin.quantiles.tolist() == pytest.approx(want, rel=1e-4)
    assert torch.equal(first.margin.quantiles, other.margin.quantiles)
    assert torch.equal(first.codebook.means, other.codebook.means)
    assert torch.equal(first.codebook.share, other.codebook.share)
    assert not torch.equal(first.codebook.means, network(module).codebook.means)


def a_renewal_forgets_the_replaced_prototypes_moments_and_takes_the_new_variances(module):
    net = network(tune_network)
    optimizer = torch.optim.AdamW(net.bridge.parameters())
    for parameter in net.bridge.parameters():
        ones = torch.ones_like(parameter)
        optimizer.state[parameter] = {"exp_avg": ones, "exp_avg_sq": ones.clone()}
    replaced = torch.tensor([False, True, False, True])
    variances = torch.full_like(net.bridge.means, 3 * CONFIG.eps).detach()
    means = -net.bridge.means.detach()
    use = torch.tensor([0.1, 0.2, 0.3, 0.4])
    done = Refreshed(
        means, variances, use.log(), torch.ones(4), ~replaced, replaced, torch.zeros(4) > 0
    )
    with torch.no_grad():
        module._take_over(net, optimizer, done)
    for parameter in net.bridge.parameters():
        for moment in optimizer.state[parameter].values():
            assert moment[replaced].eq(0).all()
            assert moment[~replaced].eq(1).all()
    torch.testing.assert_close(net.bridge.means, means)
    torch.testing.assert_close(net.bridge.variances, variances)
    torch.testing.assert_close(net.codebook.means, means)
    torch.testing.assert_close(net.codebook.share, use)
    # Gam = 3 eps gives S = 3/4; the plan's ends then have variance 9/16 * 3 eps + 3/4 eps.
    want = torch.full_like(means, math.sqrt((27 / 16 + 12 / 16) * CONFIG.eps))
    torch.testing.assert_close(net.deviation, want)


CHECKS = {
    check.__name__: (check, module)
    for check, module in (
        (a_batch_is_a_third_each_and_its_labels_say_which, tune),
        (prototypes_learn_ten_times_as_fast_and_without_decay, tune),
        (gradients_are_clipped_to_a_norm_of_one, tune),
        (variances_are_brought_back_after_a_step, tune),
        (margin_and_codebook_follow_normals_only, tune_network),
        (a_renewal_forgets_the_replaced_prototypes_moments_and_takes_the_new_variances, renewal),
    )
}


@pytest.mark.parametrize("name", CHECKS)
def test_steps(name):
    check, module = CHECKS[name]
    check(module)


def test_turned_images_keep_their_labels():
    run = training(tune)
    run.config = replace(CONFIG, rotate=True)
    images, label, _ = run._augmented(run.batch)
    assert images.shape == (12, 64, 64, 3)
    assert label.tolist() == [0.0] * 4 + [1.0] * 8


BATCH = "a_batch_is_a_third_each_and_its_labels_say_which"
FAST = "prototypes_learn_ten_times_as_fast_and_without_decay"
NORMALS_ONLY = "margin_and_codebook_follow_normals_only"
TAKE_OVER = "a_renewal_forgets_the_replaced_prototypes_moments_and_takes_the_new_variances"
FAULTS = {
    "spoiled ones are normals": (
        "label = (places >= third)",
        "label = (places >= 2 * third)",
        BATCH,
    ),
    "all are spoiled": (
        "spoil = part.normal_places >= third",
        "spoil = part.normal_places >= 0",
        BATCH,
    ),
    "none is spoiled": (
        "pseudo, _ = cut_paste(to_spoil, generator=draws)",
        "pseudo = to_spoil",
        BATCH,
    ),
    "the first anomaly alone": ("picked[part.seen_places]", "0 * part.seen_places", BATCH),
    "seen ones are normals": (
        "seen = self.anomalies[picked[part.seen_places].to(self.device)]",
        "seen = part.normals[picked[part.seen_places]]",
        BATCH,
    ),
    "prototypes as slow": ("fast = 10 * config", "fast = 1 * config", FAST),
    "prototypes decay": (
        '"lr": fast, "weight_decay": 0.0',
        '"lr": fast, "weight_decay": 1e-5',
        FAST,
    ),
    "all stages are tuned": (
        "trunk.requires_grad_(False).tuned_parameters(self.config.tuned_stages)",
        "trunk.requires_grad_(False).tuned_parameters(5)",
        FAST,
    ),
    "not clipped": (
        "nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)",
        "pass",
        "gradients_are_clipped_to_a_norm_of_one",
    ),
    "not projected": (
        "self.network.bridge.project_()",
        "pass",
        "variances_are_brought_back_after_a_step",
    ),
    "margin of all": (
        "top_mean(energy.detach().view(batch, height, width))[normal])",
        "top_mean(energy.detach().view(batch, height, width)))",
        NORMALS_ONLY,
    ),
    "codebook of all": (
        "self.codebook.update(rows[on_normal], energy[on_normal])",
        "self.codebook.update(rows, energy)",
        NORMALS_ONLY,
    ),
    "moments of all stay": (
        "reset_moments(optimizer, parameter, done.replaced)",
        "pass",
        TAKE_OVER,
    ),
    "moments of kept ones go": (
        "reset_moments(optimizer, parameter, done.replaced)",
        "reset_moments(optimizer, parameter, done.kept)",
        TAKE_OVER,
    ),
    "the old deviation": (
        "network.deviation.copy_(target_deviation(bridge))",
        "pass",
        TAKE_OVER,
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_fault_is_found(plant, fault):
    old, new, finder = FAULTS[fault]
    check, module = CHECKS[finder]
    with pytest.raises((AssertionError, RuntimeError)):
        check(plant(module, old, new))
