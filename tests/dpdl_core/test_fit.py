"""Fitting, scoring, refreshing and files of a whole model, small. Also the worker of two ranks."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from small import SIZE, anomalies, normals, tiny_config

import dpdl_core.fit as fit_module
from dpdl_core import artifact
from dpdl_core.fit import fit, renew
from dpdl_core.images import ArraySource
from dpdl_core.metrics import auroc
from dpdl_core.model import Dpdl
from dpdl_core.observe import look_at_all, observe
from dpdl_core.sieve import look_over, see

NORMALS, SEEN = normals(60), anomalies(4)


@pytest.fixture(scope="module")
def model() -> Dpdl:
    return fit(tiny_config(), ArraySource(NORMALS), SEEN, seed=0)


def test_finds_what_it_has_not_seen(model):
    images = torch.cat([normals(20, seed=5), anomalies(20, seed=6)])
    scores = model.score(images)
    assert auroc([0] * 20 + [1] * 20, scores.score.numpy()) > 0.9
    assert scores.maps.shape == (40, 4, 4)
    assert set(scores.parts) == set(model.part_names)
    assert (scores.energy <= scores.score + 1e-5).all()


def test_a_batch_scores_as_its_images_do_alone(model):
    images = torch.cat([normals(30, seed=7), anomalies(34, seed=8)])
    together = model.score(images)
    alone = torch.cat([model.score(image[None]).score for image in images])
    torch.testing.assert_close(together.score, alone, rtol=1e-3, atol=1e-3)
    assert torch.equal(together.score, model.score(images).score)


def test_other_sizes_are_resized_and_other_types_refused(model):
    assert model.score(torch.zeros(2, 100, 40, 3, dtype=torch.uint8)).score.shape == (2,)
    with pytest.raises(ValueError, match="uint8"):
        model.score(torch.zeros(2, SIZE, SIZE, 3))


def test_heat_map_is_hot_where_the_defect_is(model):
    clean = normals(1, seed=9)
    spoiled = clean.clone()
    spoiled[0, 32:, 32:] = 255
    heat = model.score(spoiled).maps[0] - model.score(clean).maps[0]
    assert heat[2:, 2:].mean() > heat[:2, :2].mean()


def test_a_heat_map_is_0_at_the_median_patch_and_1_at_the_99th_percentile(model):
    seen = look_at_all(model.trunk, NORMALS, model.config)
    grids = model.parts(seen.pooled, seen.maps)[1]  # (B, spaces, side, side)
    for space, values in enumerate(grids.transpose(0, 1).flatten(1)):
        heat = (values - model.map_median[space]) / model.map_scale[space]
        assert float((heat < 0).float().mean()) == pytest.approx(0.5, abs=0.005)
        assert float((heat > 1).float().mean()) == pytest.approx(0.01, abs=0.002)
    want = ((grids - model.map_median.view(-1, 1, 1)) / model.map_scale.view(-1, 1, 1)).mean(1)
    torch.testing.assert_close(model.score(NORMALS).maps, want.clamp_min(0), atol=1e-3, rtol=1e-3)


def test_one_unseen_normal_in_two_hundred_exceeds_the_energy_limit(monkeypatch):
    """Of 60 that is a place between the two highest, .705 of the way by linear interpolation."""
    crossed = []
    real = fit_module.calibrate.cross_fit
    monkeypatch.setattr(
        fit_module.calibrate,
        "cross_fit",
        lambda *a, **k: crossed.append(real(*a, **k)) or crossed[0],
    )
    model = fit(tiny_config(), ArraySource(NORMALS), SEEN, seed=0)
    shares = model.weigh(model.tails(crossed[0].normals))
    energies = [i for i, name in enumerate(model.part_names) if name.startswith(("poo", "pat"))]
    *_, second, first = shares[:, energies].sum(1).sort().values.tolist()
    assert float(model.energy_limit) == pytest.approx(second + 0.705 * (first - second), rel=1e-4)


def test_same_seed_same_model(model):
    before = torch.get_rng_state()
    again = fit(tiny_config(), ArraySource(NORMALS), SEEN, seed=0)
    assert torch.equal(torch.get_rng_state(), before)  # the caller's draws stay the caller's
    images = anomalies(5, seed=3)
    assert torch.equal(model.score(images).score, again.score(images).score)


@pytest.mark.parametrize("shots", [0, 1])
def test_few_anomalies_or_none(shots):
    model = fit(tiny_config(), ArraySource(NORMALS), SEEN[:shots], seed=0)
    scores = model.score(torch.cat([normals(20, seed=5), anomalies(20, seed=6)])).score
    assert auroc([0] * 20 + [1] * 20, scores.numpy()) > 0.85


def test_too_few_normals_and_wrong_anomalies_are_told():
    with pytest.raises(ValueError, match="at least 10"):
        fit(tiny_config(), ArraySource(NORMALS[:5]), SEEN, seed=0)
    with pytest.raises(ValueError, match="anomalies are"):
        fit(tiny_config(), ArraySource(NORMALS), SEEN[:, :32], seed=0)
    with pytest.raises(ValueError, match="stages 1-5"):
        fit(tiny_config(pooled_spaces="5q,9qe"), ArraySource(NORMALS), SEEN, seed=0)


def test_settings_and_images_that_will_not_do_are_told_before_any_long_work():
    told = []

    def attempt(source, **changes):
        fit(tiny_config(**changes), source, SEEN, seed=0, progress=lambda *x: told.append(x))

    everything = ArraySource(NORMALS)
    tuned = {"tuned_stages": "1", "tune_epochs": "1", "tune_iterations": "3"}
    with pytest.raises(ValueError, match="need at least 10"):
        attempt(ArraySource(NORMALS[:5]), **tuned)
    with pytest.raises(ValueError, match="stages 1-5"):
        attempt(everything, head_stages="5-9", **tuned)
    with pytest.raises(ValueError, match="stages 1-5"):
        attempt(everything, patch_spaces="4-6s", **tuned)
    larger = torch.zeros(20, SIZE + 32, SIZE + 32, 3, dtype=torch.uint8)
    for changes in ({}, tuned):
        with pytest.raises(ValueError, match=f"normals are .*, {SIZE}, {SIZE}, 3"):
            attempt(ArraySource(larger), **changes)
    assert told == []


@pytest.mark.parametrize(
    "images",
    [
        NORMALS[:1].repeat(30, 1, 1, 1),
        NORMALS[:3].repeat(10, 1, 1, 1),
        torch.full((30, SIZE, SIZE, 3), 255, dtype=torch.uint8),
    ],
    ids=["one picture", "three pictures", "white"],
)
def test_the_same_pictures_again_and_again_are_learnt_and_renewed_on(images):
    """A camera that stood still: fewer distinct patches than prototypes."""
    many = {"patch_prototypes": "200", "tune_prototypes": "32", "renew_every_epochs": "1"}
    tuned = {"tuned_stages": "1", "tune_epochs": "2", "tune_iterations": "2"}
    fit(tiny_config(**many, **tuned), ArraySource(images), SEEN, seed=0)
    found = fit(tiny_config(patch_prototypes="200"), ArraySource(images), SEEN, seed=0)
    renewed, _ = renew(found, ArraySource(images), ArraySource(images[:12]), SEEN, seed=1)
    for model in (found, renewed):
        usual, defects = model.score(images[:3]).score, model.score(SEEN).score
        assert usual.isfinite().all()
        assert defects.isfinite().all()
        assert usual.max() < defects.min()
    # What the camera shows when it moves again.
    _, report = renew(found, ArraySource(images), ArraySource(NORMALS[:16]), SEEN, seed=1)
    assert math.isfinite(report.input_shift)
    assert math.isfinite(report.score_shift)


def test_a_renewal_on_fewer_patches_than_prototypes_leaves_them_where_they_are(model):
    still = NORMALS[:1].repeat(30, 1, 1, 1)
    many = fit(tiny_config(patch_prototypes="200"), ArraySource(NORMALS), SEEN, seed=0)
    renewed, report = renew(many, ArraySource(still), ArraySource(still[:12]), SEEN, seed=1)
    assert (report.kept, report.replaced) == (report.prototypes, 0)
    for space, part in many.parts.energies.patches.items():
        assert torch.equal(renewed.parts.energies.patches[space].bridge.means, part.bridge.means)


def test_of_very_many_normals_a_sample_is_kept(model, monkeypatch):
    monkeypatch.setattr("dpdl_core.observe.MAX_POOLED", 30)
    found = observe(
        model.trunk,
        ArraySource(NORMALS),
        tiny_config(max_maps="20", batch_size="16"),
        spoilers=[],
        generator=torch.Generator().manual_seed(0),
        tell=lambda share: None,
    )
    every = look_at_all(model.trunk, NORMALS, model.config).pooled
    rows = torch.cdist(found.pooled, every).argmin(1)
    assert len(rows) == 30
    assert (rows.diff() > 0).all()
    torch.testing.assert_close(found.pooled, every[rows])
    assert len(found.kept) == len(found.features) == 20
    torch.testing.assert_close(found.pooled[found.kept[found.mine]], found.features.pooled)


def test_without_anomalies_nothing_is_tuned_and_the_config_says_so():
    config = tiny_config(tuned_stages="1", tune_epochs="1", kappa="3")
    found = fit(config, ArraySource(NORMALS), SEEN[:0], seed=0)
    assert (found.config.tuned_stages, found.config.kappa) == (0, tiny_config().kappa)


def test_no_more_stages_are_tuned_than_there_are():
    with pytest.raises(ValueError, match=r"tuned_stages=99: test_efficientnet has 5 .* set 5 at"):
        fit(tiny_config(tuned_stages="99"), ArraySource(NORMALS), SEEN, seed=0)


def test_tuning_moves_the_tuned_stages_only():
    told = []
    changes = {"tuned_stages": "1", "tune_epochs": "1", "tune_iterations": "3"}
    config = tiny_config(**changes, tune_prototypes="4", rotate="true")
    tuned = fit(config, ArraySource(NORMALS), SEEN, seed=0, progress=lambda *x: told.append(x))
    frozen = fit(tiny_config(), ArraySource(NORMALS), SEEN, seed=0)
    a, b = tuned.trunk.state_dict(), frozen.trunk.state_dict()
    weights = [k for k in a if k.endswith("weight")]
    assert torch.equal(a[weights[0]], b[weights[0]])
    assert not torch.equal(a[weights[-1]], b[weights[-1]])
    assert told[0][0] == "tuning"


# Refresh --------------------------------------------------------------------------------------


def test_unchanged_data_change_little(model):
    """None new is the same model; the same again as if new moves no AUROC by more than .005."""
    images = torch.cat([normals(40, seed=5), anomalies(40, seed=6)])
    labels = [0] * 40 + [1] * 40
    before = model.score(images).score
    same, report = renew(model, ArraySource(NORMALS), ArraySource(NORMALS[:0]), SEEN, seed=1)
    assert torch.equal(same.score(images).score, before)
    assert (report.new_normals, report.replaced) == (0, 0)
    again, report = renew(model, ArraySource(NORMALS), ArraySource(NORMALS[:30]), SEEN, seed=1)
    after = again.score(images).score
    assert auroc(labels, after.numpy()) == pytest.approx(auroc(labels, before.numpy()), abs=0.005)
    assert not report.relearnt
    assert report.kept > report.replaced


@pytest.mark.parametrize("poison", [1, 4])
def test_poison_is_set_aside(model, poison):
    """5 % and 20 % of 20 new "normals" are anomalies."""
    new = torch.cat([normals(20 - poison, seed=11), anomalies(poison, seed=12)])
    poisoned, report = renew(model, ArraySource(NORMALS), ArraySource(new), SEEN, seed=1)
    assert set(report.set_aside) >= set(range(20 - poison, 20))
    assert len(report.set_aside) <= poison + 2
    clean, _ = renew(model, ArraySource(NORMALS), ArraySource(new[: 20 - poison]), SEEN, seed=1)
    images = torch.cat([normals(40, seed=5), anomalies(40, seed=6)])
    labels = [0] * 40 + [1] * 40
    found = [auroc(labels, m.score(images).score.numpy()) for m in (clean, poisoned)]
    assert abs(found[0] - found[1]) < 0.01


def test_a_renewed_model_shares_nothing_with_the_present_one(model, monkeypatch):
    """Moved to another device, neither takes a part of the other along."""
    pairs = []
    shift = fit_module._score_shift
    monkeypatch.setattr(
        fit_module, "_score_shift", lambda *args: pairs.append(args[:2]) or shift(*args)
    )
    new = ArraySource(normals(30, seed=14))
    pairs.append((model, renew(model, ArraySource(NORMALS), new, SEEN, seed=1)[0]))
    for before, after in pairs:
        assert not {id(m) for m in before.modules()} & {id(m) for m in after.modules()}
        tensors = [{t.data_ptr() for t in _tensors(m) if t.numel()} for m in (before, after)]
        assert not tensors[0] & tensors[1]


def _tensors(model):
    return [*model.parameters(), *model.buffers()]


def test_what_a_person_vouches_for_is_learnt_however_it_looks(model):
    new = torch.cat([normals(16, seed=11), anomalies(4, seed=12)])
    vouched = [False] * 16 + [True] * 4
    renewed, report = renew(
        model, ArraySource(NORMALS), ArraySource(new), SEEN, seed=1, vouched=vouched
    )
    assert not set(report.set_aside) & set(range(16, 20))
    sieved, _ = renew(model, ArraySource(NORMALS), ArraySource(new), SEEN, seed=1)
    assert renewed.score(new[16:]).score.mean() < sieved.score(new[16:]).score.mean()


@pytest.mark.parametrize("count", [1, 4, 5, 9, 33])
@pytest.mark.parametrize("most", [0, 2, 7, 50])
def test_of_any_number_of_new_normals_some_are_mapped_evenly(model, count, most):
    """Batches of 4: whole batches lie between two that are kept."""
    config = tiny_config(batch_size="4")
    found = see(config, model.trunk, ArraySource(NORMALS[:count]), most)
    step = -(-count // most) if most else 0
    assert found.mapped.tolist() == (list(range(0, count, step)) if most else [])
    assert found.pooled.shape[0] == count
    assert len(found.features) == len(found.mapped)
    assert look_over(model, ArraySource(NORMALS[:count]), max_maps=0).aside.shape == (count,)


def test_drift_is_learnt(model):
    darker = (normals(30, seed=13).float() * 0.6).to(torch.uint8)
    assert look_over(model, ArraySource(darker), max_maps=0).aside.float().mean() < 0.2
    before = model.score(darker).score.mean()
    renewed, _ = renew(model, ArraySource(NORMALS), ArraySource(darker), SEEN, seed=1)
    assert renewed.score(darker).score.mean() < before


def test_a_shift_is_measured_and_makes_what_anomalies_taught_be_learnt_anew(model):
    """Directions and heads stay as they are for more of the same, and follow a shift."""
    same, report = renew(
        model, ArraySource(NORMALS), ArraySource(normals(30, seed=14)), SEEN, seed=1
    )
    assert abs(report.input_shift) < 0.7
    assert not report.relearnt
    assert torch.equal(same.parts.seen, model.parts.seen)
    darker = (normals(30, seed=13).float() * 0.6).to(torch.uint8)
    other, report = renew(model, ArraySource(NORMALS), ArraySource(darker), SEEN, seed=1)
    assert report.input_shift > 1
    assert report.relearnt
    assert not torch.equal(other.parts.seen, model.parts.seen)


def test_a_tuned_trunk_is_tuned_again_after_a_shift_only():
    changes = {"tuned_stages": "1", "tune_epochs": "2", "tune_iterations": "3"}
    config = tiny_config(**changes, tune_prototypes="4")
    tuned = fit(config, ArraySource(NORMALS), SEEN, seed=0)
    darker = (normals(30, seed=13).float() * 0.6).to(torch.uint8)
    for new, shifted in ((normals(30, seed=14), False), (darker, True)):
        renewed, report = renew(tuned, ArraySource(NORMALS), ArraySource(new), SEEN, seed=1)
        assert report.relearnt == shifted
        a, b = tuned.trunk.state_dict(), renewed.trunk.state_dict()
        weights = [k for k in a if k.endswith("weight")]
        assert torch.equal(a[weights[0]], b[weights[0]])
        assert torch.equal(a[weights[-1]], b[weights[-1]]) != shifted


class Looked(Exception):
    pass


def test_a_refresh_looks_at_new_normals_on_the_device(model, monkeypatch):
    """No GPU is at hand: that it is not the CPU shows on the device without memory."""

    def look_over(there, *args, **kwargs):
        assert {p.device.type for p in there.state_dict().values()} == {"meta"}
        raise Looked

    monkeypatch.setattr(fit_module, "look_over", look_over)
    sources = (ArraySource(normals(n, seed=n)) for n in (20, 10))
    with pytest.raises(Looked):
        renew(model, *sources, anomalies(0), seed=0, device="meta")
    assert model.weights.device.type == "cpu"


def test_a_refresh_leaves_the_given_model_alone(model):
    before = model.score(SEEN).score
    renew(model, ArraySource(NORMALS), ArraySource(normals(5, seed=2)), SEEN[:0], seed=1)
    assert torch.equal(before, model.score(SEEN).score)


# Files ----------------------------------------------------------------------------------------


def test_files_there_and_back(model, tmp_path):
    artifact.save(tmp_path, model, thresholds={"default": 3.0}, metrics={"auroc": 0.9})
    loaded = artifact.load(tmp_path)
    assert torch.equal(loaded.model.score(SEEN).score, model.score(SEEN).score)
    assert (loaded.thresholds, loaded.metrics) == ({"default": 3.0}, {"auroc": 0.9})
    files = artifact.pack(model, thresholds={}, metrics={})
    assert files == artifact.pack(loaded.model, thresholds={}, metrics={})


def test_a_version_from_before_head_networks_has_one():
    old = fit(tiny_config(head_networks="1"), ArraySource(NORMALS), SEEN, seed=0)
    files = artifact.pack(old, thresholds={}, metrics={})
    described = json.loads(files["config.json"])
    del described["config"]["head_networks"]
    loaded = artifact.unpack(files | {"config.json": json.dumps(described).encode()}).model
    assert loaded.config.head_networks == 1
    assert torch.equal(loaded.score(SEEN).score, old.score(SEEN).score)


def test_a_version_with_whole_whiteners_scores_as_it_did(model):
    """Format 2: one matrix each, and no word of axes in the settings."""
    files = artifact.pack(model, thresholds={}, metrics={})
    described = json.loads(files["config.json"]) | {"format": 2}
    del described["config"]["pooled_axes"]
    state = safetensors.torch.load(files["weights.safetensors"])
    for space in model.config.pooled_spaces:
        place = f"parts.energies.pooled.{space}."
        axes, gain, rest = (state.pop(place + name) for name in ("axes", "gain", "rest"))
        state[place + "whitener"] = axes * gain @ axes.T + rest * torch.eye(len(axes))
    old = files | {
        "config.json": json.dumps(described).encode(),
        "weights.safetensors": safetensors.torch.save(state),
    }
    loaded = artifact.unpack(old).model
    # To the rounding of axes found anew: scores of 40,000 here, of features in thousands.
    torch.testing.assert_close(
        loaded.score(SEEN).score, model.score(SEEN).score, rtol=1e-5, atol=1e-5
    )
    again = artifact.unpack(artifact.pack(loaded, thresholds={}, metrics={})).model
    assert torch.equal(again.score(SEEN).score, loaded.score(SEEN).score)
    state[place + "whitener"] = torch.ones(3, 2)
    with pytest.raises(artifact.ArtifactError, match="no whitener"):
        artifact.unpack(old | {"weights.safetensors": safetensors.torch.save(state)})


def test_broken_files_are_told(model, tmp_path):
    files = artifact.pack(model, thresholds={}, metrics={})
    for name in files:
        with pytest.raises(artifact.ArtifactError, match=name):
            artifact.unpack({k: v for k, v in files.items() if k != name})
        with pytest.raises(artifact.ArtifactError, match=name):
            artifact.unpack(files | {name: b"nonsense"})
    newer = files["config.json"].replace(
        b'"format": %d' % artifact.FORMAT, b'"format": %d' % (artifact.FORMAT + 1)
    )
    with pytest.raises(artifact.ArtifactError, match=f"format {artifact.FORMAT + 1}"):
        artifact.unpack(files | {"config.json": newer})
    other = files["config.json"].replace(b'"patch_dims": 8', b'"patch_dims": 6')
    with pytest.raises(artifact.ArtifactError, match="does not fit"):
        artifact.unpack(files | {"config.json": other})
    artifact.save(tmp_path, model, thresholds={}, metrics={})
    (tmp_path / "metrics.json").write_text("{}")
    with pytest.raises(artifact.ArtifactError, match="changed"):
        artifact.load(tmp_path)


def test_weights_that_are_not_finite_are_refused(model):
    ill = artifact.unpack(artifact.pack(model, thresholds={}, metrics={})).model
    ill.weights[0] = float("nan")
    with pytest.raises(artifact.ArtifactError, match="NaN"):
        artifact.unpack(artifact.pack(ill, thresholds={}, metrics={}))


# Two ranks ------------------------------------------------------------------------------------


def test_two_ranks_end_with_the_model_of_one(model, tmp_path):
    environment = os.environ | {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        "OMP_NUM_THREADS": "1",
        "WORLD_SIZE": "2",
    }
    store = tmp_path / "store"
    command = [sys.executable, __file__, str(store)]
    ranks = [
        subprocess.Popen([*command, str(r)], env=environment | {"RANK": str(r)}) for r in (0, 1)
    ]
    assert [rank.wait(timeout=300) for rank in ranks] == [0, 0]
    images = torch.cat([normals(10, seed=5), anomalies(10, seed=6)])
    want = model.score(images).score
    for case in ("both", "one without an image"):
        first, second = (torch.load(f"{store}.{r}")[case] for r in (0, 1))
        torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(first, want, rtol=0.02, atol=0.02)


def _work(store: str, rank: int) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    images, found = torch.cat([normals(10, seed=5), anomalies(10, seed=6)]), {}
    for case, split in (("both", 32), ("one without an image", 60)):
        shard = ArraySource(NORMALS, range(split) if rank == 0 else range(split, 60))
        found[case] = fit(tiny_config(), shard, SEEN, seed=0).score(images).score
    torch.save(found, f"{store}.{rank}")
    dist.destroy_process_group()


if __name__ == "__main__":
    _work(sys.argv[1], int(sys.argv[2]))
