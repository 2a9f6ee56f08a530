"""Tuning is the same on one rank and on two, goes on where it stopped, and renews its prototypes.

Also the worker of two ranks.
"""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))
from small import anomalies, normals, tiny_config

from dpdl_core import deal as dealing
from dpdl_core import distributed, renewal
from dpdl_core.bridge import Bridge
from dpdl_core.codebook import Codebook, EmaCodebook
from dpdl_core.deal import deal
from dpdl_core.features import Trunk
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource
from dpdl_core.losses import dispersion_loss
from dpdl_core.norms import GlobalNorm
from dpdl_core.renewal import stand_out
from dpdl_core.shard import Shard
from dpdl_core.tune import _Training, tune
from dpdl_core.tune_network import TuneNetwork
from dpdl_core.tune_state import TuneState

NORMALS, SEEN = normals(60), anomalies(4)
GLARE = torch.full_like(SEEN[:3], 255)  # what even a trunk of random weights finds strange
NEW = torch.cat([normals(20, seed=7), GLARE])
CONFIG = tiny_config(
    tuned_stages="2",
    tune_epochs="4",
    tune_iterations="3",
    tune_batch="12",
    tune_prototypes="6",
    renew_every_epochs="2",
    renew_min_new="10",
    rotate="true",
)


def shard(images: torch.Tensor, first: int = 0) -> Shard:
    """Groups of six images, dealt to the ranks in turn."""
    rank, world = distributed.rank(), distributed.world_size()
    mine = [i for i in range(len(images)) if i // 6 % world == rank]
    return Shard([(ArraySource(images, mine), first + torch.tensor(mine, dtype=torch.long))])


class Kept:
    """A Keeper in memory, through the files that would be stored; 23 images arrive at epoch 1."""

    def __init__(self, start=None, arrive=True, vouched=()):
        self.start, self.arrive, self.vouched = start, arrive, vouched
        self.states, self.figures = [], []

    def resume(self):
        return None if self.start is None else TuneState.from_files(self.start)

    def keep(self, state, figures):
        self.states.append(state.to_files())
        self.figures.append(figures)

    def arrivals(self, at_least):
        assert at_least == 10
        if not self.arrive:
            return None
        self.arrive = False
        return shard(NEW, first=1000), torch.tensor(self.vouched, dtype=torch.long)


def run(keeper, source=None, config=CONFIG):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trunk = Trunk(config.trunk)
        generator = torch.Generator().manual_seed(0)
        source = source or shard(NORMALS)
        found = tune(
            config, trunk, source, SEEN, generator=generator, tell=lambda *_: None, keeper=keeper
        )
    return trunk, found, int(torch.randint(2**31, (1,), generator=generator))


@pytest.fixture(scope="module")
def alone():
    keeper = Kept()
    trunk, found, drawn = run(keeper)
    return SimpleNamespace(trunk=trunk, found=found, drawn=drawn, keeper=keeper)


CURVE = ("loss", "energy_of_normals", "transport", "margin", "dispersion", "residual_head")


def curve(figures):
    return torch.tensor([[epoch[name] for name in CURVE] for epoch in figures])


def test_each_epoch_says_how_it_went(alone):
    first, *_, last = alone.keeper.figures
    assert (first["epoch"], last["epoch"], last["steps"]) == (1, 4, 12)
    assert first["lr"] == pytest.approx(2e-4)
    assert last["lr"] < first["lr"]
    assert 0 <= first["data_wait_share"] <= 1
    heads = first["anomaly_head"] + first["normal_head"] + first["residual_head"]
    rest = first["transport"] + first["margin"] + 0.01 * first["dispersion"]
    assert first["loss"] == pytest.approx(heads + rest, rel=1e-4)


def test_without_renewals_every_normal_is_tuned_on():
    """What is held out tells renewals apart, and there are none."""
    held_out = []
    for every, arrivals in ((0, 0), (0, 10), (2, 0)):
        keeper = Kept(arrive=False)
        renewals = {"renew_every_epochs": every, "renew_min_new": arrivals}
        run(keeper, config=replace(CONFIG, tune_epochs=1, **renewals))
        held_out.append(len(TuneState.from_files(keeper.states[-1]).tensors["held_out"]))
    assert held_out == [0, 8, 8]
    run(None, config=replace(CONFIG, tune_epochs=1, renew_every_epochs=0))  # nobody brings any


def test_dispersion_is_of_all_samples():
    """Eq. 19 sums over normals and anomalies, U = N + M."""
    torch.manual_seed(0)
    means = torch.randn(6, Trunk(CONFIG.trunk).channels[-1])
    bridge = Bridge(means, torch.ones(1, means.shape[1]), torch.zeros(6), CONFIG.eps)
    book = Codebook(means, torch.ones(6), torch.ones_like(means), 0.0)
    network = TuneNetwork(CONFIG, Trunk(CONFIG.trunk), bridge, EmaCodebook(book, decay=0.9))
    images = torch.cat([NORMALS[:4], SEEN]).float()
    label = torch.tensor([0.0] * 4 + [1.0] * 4)
    with torch.no_grad():
        got = network(images, label, torch.arange(4)).terms.dispersion
        want = dispersion_loss(network.features(images).mean((2, 3)), CONFIG.kappa)
    assert float(got) == pytest.approx(float(want))


def test_renewals_come_by_the_clock_and_by_arrivals(alone):
    by_arrival, by_clock, third, last = [f.get("renewal") for f in alone.keeper.figures]
    assert third is None
    assert last is None  # no step would have followed
    assert by_arrival["new_normals"] == 23
    assert by_clock["new_normals"] == 0
    assert by_clock["kept"] + by_clock["replaced"] == by_clock["prototypes"] == 6
    # Little changed since the first.
    assert by_clock["kept"] > 3
    assert abs(by_clock["score_shift"]) < abs(by_arrival["score_shift"])


def test_energies_beyond_the_old_and_the_bulk_of_the_new_stand_out():
    old = torch.linspace(0.9, 1.1, 100)
    alike, drifted = torch.linspace(0.95, 1.15, 20), torch.linspace(1.9, 2.1, 20)
    poison = torch.tensor([3.0, 4.0])
    assert not stand_out(alike, old).any()
    assert not stand_out(drifted, old).any()
    for some in (alike, drifted):
        assert stand_out(torch.cat([some, poison]), old).tolist() == 20 * [False] + [True, True]


def test_what_arrives_joins_but_for_what_stands_out(monkeypatch):
    monkeypatch.setattr(renewal, "stand_out", lambda new, old: new >= new.topk(3).values.min())
    keeper = Kept()
    _, found, _ = run(keeper)
    assert keeper.figures[0]["renewal"]["set_aside"] == 3
    aside = TuneState.from_files(keeper.states[-1]).tensors["left_out"].tolist()
    assert len(aside) == 3
    assert all(1000 <= number < 1023 for number in aside)
    known = {*range(60), *range(1000, 1023)}
    assert set(found.numbers.tolist()) == known - set(aside)


def test_what_a_person_vouches_for_joins_however_it_stands_out(monkeypatch):
    monkeypatch.setattr(renewal, "stand_out", lambda new, old: new >= new.topk(3).values.min())
    keeper = Kept()
    run(keeper)
    aside = TuneState.from_files(keeper.states[-1]).tensors["left_out"].tolist()
    keeper = Kept(vouched=aside[:2])
    _, found, _ = run(keeper)
    assert keeper.figures[0]["renewal"]["set_aside"] == 1
    assert set(range(1000, 1023)) - set(found.numbers.tolist()) == {aside[2]}


def test_a_training_goes_on_from_any_checkpoint_as_if_it_had_not_stopped(alone):
    for epoch in (1, 3):
        keeper = Kept(alone.keeper.states[epoch - 1], arrive=False)
        joined = shard(NORMALS).and_also(shard(NEW, first=1000))
        trunk, found, drawn = run(keeper, joined)
        assert torch.equal(curve(keeper.figures), curve(alone.keeper.figures[epoch:]))
        assert torch.equal(found.numbers, alone.found.numbers)
        assert drawn == alone.drawn
        for name, tensor in alone.trunk.state_dict().items():
            assert torch.equal(trunk.state_dict()[name], tensor), name


def test_a_broken_or_foreign_checkpoint_is_told(alone):
    state = alone.keeper.states[0]
    with pytest.raises(ValueError, match="not a training's checkpoint"):
        TuneState.from_files(state | {"training.safetensors": b"\x80\x04nonsense"})
    other = tiny_config(trunk="test_resnet", pooled_spaces="4", patch_spaces="4", tuned_stages="1")
    with pytest.raises(ValueError, match="another config"):
        run(Kept(state), config=other)


def test_fit_learns_from_what_arrived():
    keeper = Kept()
    told = []
    model = fit(
        CONFIG,
        ArraySource(NORMALS),
        SEEN,
        seed=0,
        progress=lambda stage, share, figures: told.append((stage, share)),
        keeper=keeper,
    )
    stages = [stage for stage, _ in told]
    assert stages[:4] == ["tuning", "renewal", "tuning", "renewal"]
    assert model.score(NEW[20:]).score.min() > model.score(NEW[:20]).score.median()


# Batches --------------------------------------------------------------------------------------


def test_a_pass_takes_every_image_at_most_once_and_nearly_all():
    stream = deal(shard(NORMALS), 8, seed=3)
    first, second = ([next(stream).normals for _ in range(3)] for _ in range(2))
    known = {image.numpy().tobytes(): i for i, image in enumerate(NORMALS)}
    taken = [known[image.numpy().tobytes()] for image in torch.cat(first)]
    assert len(set(taken)) == len(taken) == 48
    again = [known[image.numpy().tobytes()] for image in torch.cat(second)]
    assert taken != again


def test_windows_are_read_in_turn_and_skipping_lands_where_reading_would(monkeypatch):
    monkeypatch.setattr(dealing, "WINDOW", 20)
    whole = deal(shard(NORMALS), 4, seed=3)
    batches = [next(whole) for _ in range(14)]
    known = {image.numpy().tobytes(): i for i, image in enumerate(NORMALS)}
    for number in range(2):
        assert {known[i.numpy().tobytes()] // 20 for i in batches[2 * number].normals} == {number}
    for skip in (1, 5, 6, 13):
        jumped = next(deal(shard(NORMALS), 4, seed=3, skip=skip))
        assert torch.equal(jumped.normals, batches[skip].normals)


def test_fewer_images_than_a_batch_are_drawn_again():
    part = next(deal(shard(NORMALS[:10]), 8, seed=0))
    assert part.normals.shape[0] == 16
    assert part.seen_places.tolist() == list(range(8))


def test_every_weight_that_is_tuned_gets_a_gradient():
    """Two ranks would wait for one: timm's feature levels leave the classifier out."""
    config = replace(CONFIG, trunk="test_convnext", tuned_stages=1)
    generator = torch.Generator().manual_seed(0)
    training = _Training(config, Trunk(config.trunk), shard(NORMALS), SEEN, generator, None)
    training._train_mode()
    training._take_step()
    tuned = {n: p for n, p in training.network.named_parameters() if p.requires_grad}
    assert [name for name, p in tuned.items() if p.grad is None] == []
    assert "trunk.stages.0.network.stages.3.blocks.0.conv_dw.weight" in tuned


# Two ranks ------------------------------------------------------------------------------------


def norm_of_all(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, input gradient and running variance of a GlobalNorm over rows dealt 5 and 3."""
    torch.manual_seed(0)
    norm = GlobalNorm(nn.BatchNorm2d(4))
    norm.norm.weight.data.uniform_(0.5, 2)
    mine = x if distributed.world_size() == 1 else x.split([5, 3])[distributed.rank()]
    mine = mine.clone().requires_grad_(True)
    y = distributed.gather_with_grad(norm(mine))
    (y.square() * torch.linspace(-1, 2, y.numel()).view_as(y)).sum().backward()
    grad = distributed.gather_rows(mine.grad) / distributed.world_size()
    return y.detach(), grad, norm.norm.running_var


def work():
    x = 100 + torch.randn(8, 4, 3, 3, generator=torch.Generator().manual_seed(1))
    keeper = Kept()
    trunk, found, drawn = run(keeper)
    state = TuneState.from_files(keeper.states[-1]).tensors
    return {
        "curve": curve(keeper.figures),
        "renewals": torch.tensor(
            [list(f["renewal"].values())[:-1] for f in keeper.figures[:2]], dtype=torch.float64
        ),
        "prototypes": state["network.bridge.means"],
        "codebook": state["network.codebook.means"],
        "moments": torch.cat(
            [t.flatten() for n, t in sorted(state.items()) if n.endswith("exp_avg")]
        ),
        # Of the weights themselves a few differ: where the true gradient is zero, Adam makes steps
        # of its usual size out of rounding.
        "features": trunk(NORMALS[:8])[-1].detach(),
        "numbers": found.everyone()[0],
        "drawn": torch.tensor(drawn),
        **{f"norm {i}": t for i, t in enumerate(norm_of_all(x))},
    }


def test_two_ranks_see_the_losses_take_the_steps_and_find_the_prototypes_of_one(tmp_path):
    compare_with_one(work, 2, tmp_path)


def compare_with_one(what, count, folder):
    """What `count` ranks find is the same on all of them, and what one process finds."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [sys.executable, __file__, str(folder)]
    end = [what.__name__, str(count)]
    ranks = [subprocess.Popen([*command, str(r), *end], env=environment) for r in range(count)]
    try:
        assert [rank.wait(timeout=300) for rank in ranks] == [0] * count
    finally:
        for rank in ranks:
            rank.kill()
    # As many threads as they have: another order of sums can turn a tie between two prototypes.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        want = what()
    finally:
        torch.set_num_threads(threads)
    first, *others = (torch.load(folder / f"{r}.pt", weights_only=True) for r in range(count))
    for name, tensor in want.items():
        for other in others:
            assert torch.equal(first[name], other[name]), f"{name}: ranks disagree"
        torch.testing.assert_close(
            first[name], tensor, rtol=2e-3, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def idle_ranks():
    """A rank without an image, and batches too small to give every rank a part."""
    count = {1: [60], 3: [40, 20, 0]}[distributed.world_size()]
    rank = distributed.rank()
    mine = list(range(sum(count[:rank]), sum(count[: rank + 1])))
    source = Shard([(ArraySource(NORMALS, mine), torch.tensor(mine, dtype=torch.long))])
    keeper = Kept()
    _, found, _ = run(keeper, source, replace(CONFIG, tune_epochs=2, tune_batch=3))
    # With three images a batch, rounding soon takes the steps apart: the first is compared.
    one_step = Kept(arrive=False)
    run(one_step, source, replace(CONFIG, tune_epochs=1, tune_iterations=1, tune_batch=3))
    return {"curve": curve(one_step.figures), "numbers": found.everyone()[0]}


def test_a_rank_may_have_no_image_of_a_batch_and_none_at_all(tmp_path):
    compare_with_one(idle_ranks, 3, tmp_path)


if __name__ == "__main__":
    place, number = Path(sys.argv[1]), int(sys.argv[2])
    what, count = sys.argv[3], int(sys.argv[4])
    dist.init_process_group("gloo", f"file://{place}/meet", rank=number, world_size=count)
    torch.save(globals()[what](), place / f"{number}.pt")
    dist.barrier()
    dist.destroy_process_group()
