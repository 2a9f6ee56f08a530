"""The gate on made-up scores whose right verdict is plain to see."""

import math

import numpy as np
import pytest

from pipelines.gate import GateLimits, Held, Lasting, judge


def normals(count, seed=0, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, count)


def by(threshold, rate=0.05):
    return {"default": threshold, "cameras": {}, "false_alarm_rate": rate}


def imported(held, name=1):
    """All defects and old normals."""
    normals = np.arange(len(held.old_normals) + len(held.new_normals)) < len(held.old_normals)
    return Lasting(np.ones(len(held.defects), bool), normals, name)


def verdict(current, candidate, *, threshold=2.0, own=None, best=None, limits=None, name=1):
    """own: thresholds of a training, which has not seen the new normals."""
    return judge(
        current,
        candidate,
        defect_cameras=[""] * len(candidate.defects),
        old_cameras=[""] * len(candidate.old_normals),
        new_cameras=[""] * len(candidate.new_normals),
        current_thresholds=by(threshold),
        candidate_thresholds=own or by(2.0),
        set_on_new=own is None,
        lasting=imported(candidate, name),
        best=best,
        limits=limits,
    )


@pytest.fixture
def current():
    return Held(np.full(10, 3.0), normals(200), normals(50, seed=1))


def test_an_equal_candidate_is_promoted_with_its_numbers(current):
    got = verdict(current, current)
    assert got.promote
    assert got.numbers["auroc_current"] == got.numbers["auroc_candidate"]
    assert "AUROC on known defects" in got.why
    assert "50 new normals" in got.why


def test_a_candidate_that_ranks_defects_lower_is_held(current):
    worse = Held(np.full(10, 0.0), current.old_normals, current.new_normals)
    got = verdict(current, worse)
    assert not got.promote
    assert "AUROC falls by more than 0.01" in got.why
    assert got.numbers["auroc_candidate"] == pytest.approx(0.5, abs=0.1)


def test_the_auroc_bound_is_the_limit_itself():
    """20 normals, 5 defects: one swapped pair is 1/100 of AUROC exactly."""
    old = np.arange(20.0)
    before = Held(np.full(5, 30.0), old, np.empty(0))
    after = Held(np.array([30.0, 30.0, 30.0, 30.0, 18.5]), old, np.empty(0))
    assert verdict(before, after, limits=GateLimits(max_auroc_drop=0.0101)).promote
    assert not verdict(before, after, limits=GateLimits(max_auroc_drop=0.0099)).promote


def test_false_alarms_on_new_normals_hold_a_candidate_that_is_worse(current):
    shifted = Held(np.full(10, 30.0), current.old_normals, normals(50, seed=1, shift=2.0))
    got = verdict(current, shifted)
    assert not got.promote
    assert "false alarms on new normals above" in got.why


@pytest.mark.parametrize("count", [1, 2, 5, 9, 30, 100])
def test_by_chance_hardly_any_good_candidate_is_held(count):
    """Oracle: P(more alarms than the bound) by the binomial's sum, at most .0013 for any number."""
    old = np.linspace(0, 1, 999)
    held = Held(np.empty(0), old, np.linspace(0, 1, count))
    bound = verdict(held, held, own=by(2.0, rate=0.01)).numbers["false_alarms_new_bound"]
    most = round(bound * count)
    chance = 1 - sum(math.comb(count, k) * 0.01**k * 0.99 ** (count - k) for k in range(most + 1))
    assert chance <= 0.0013 + 1e-12
    if most:
        assert chance + math.comb(count, most) * 0.01**most * 0.99 ** (count - most) > 0.0013


def test_one_alarm_among_few_new_normals_holds_nothing():
    quiet = Held(np.empty(0), np.linspace(0, 1, 999), np.array([0.5]))
    alarmed = Held(np.empty(0), np.linspace(0, 1, 999), np.array([3.0]))
    assert verdict(quiet, alarmed, own=by(2.0, rate=0.01)).promote


def test_after_a_drift_better_is_enough(current):
    """The current model alarms on every new normal; the candidate on far fewer, still too many."""
    drifted = Held(np.full(10, 30.0), normals(200), normals(50, seed=1, shift=9.0))
    better = Held(np.full(10, 30.0), normals(200), normals(50, seed=1, shift=1.5))
    got = verdict(drifted, better)
    assert got.numbers["false_alarms_new_candidate"] > got.numbers["false_alarms_new_bound"]
    assert got.promote


def test_alarms_of_the_candidate_are_counted_on_normals_its_thresholds_have_not_seen():
    """In-sample, split conformal never exceeds the rate; two halves that differ show it."""
    old = np.where(np.arange(200) % 2 == 0, 0.0, 5.0) + normals(200) * 0.01
    got = verdict(Held(np.full(5, 9.0), old, np.empty(0)), Held(np.full(5, 9.0), old, np.empty(0)))
    assert got.numbers["false_alarms_old_candidate"] == pytest.approx(0.5, abs=0.05)


def test_what_one_minute_shows_is_on_one_side_and_counts_once():
    """Forty minutes of ten frames, four of them far off: halves that share a minute would set the
    thresholds on what they are then judged by."""
    minutes = [f"{row // 10}" for row in range(400)]
    old = np.where(np.isin(np.arange(400) // 10, [7, 9, 11, 13]), 9.0, 0.0) + normals(400) * 0.01
    held = Held(np.empty(0), old, np.empty(0))
    told = {"defect_cameras": [], "old_cameras": [""] * 400, "new_cameras": []}
    told |= {"current_thresholds": by(2.0), "candidate_thresholds": by(2.0), "set_on_new": True}
    got = judge(held, held, moments=minutes, **told).numbers
    by_row = judge(held, held, **told).numbers
    assert got["false_alarms_old_candidate"] >= 0.1
    assert by_row["false_alarms_old_candidate"] < 0.08
    # By the binomial's table more than 6 of 40 come by chance with .0034, more than 7 with .0007.
    assert got["false_alarms_old_bound"] == 7 / 40
    assert by_row["false_alarms_old_bound"] < 0.09


def test_a_burst_that_alarms_is_one_alarm():
    """A hundred frames of one minute among a hundred frames of as many: half of all frames."""
    minutes = ["burst"] * 100 + [f"{minute}" for minute in range(100)]
    quiet, loud = np.zeros(200), np.r_[np.full(100, 9.0), np.zeros(100)]
    held = [Held(np.empty(0), scores, np.empty(0)) for scores in (quiet, loud)]
    told = {"defect_cameras": [], "old_cameras": [""] * 200, "new_cameras": []}
    told |= {"current_thresholds": by(2.0), "candidate_thresholds": by(2.0), "set_on_new": True}
    got = judge(*held, moments=minutes, **told)
    assert got.promote, got.why
    assert got.numbers["false_alarms_old_candidate"] == pytest.approx(1 / 101)


def test_without_known_defects_the_gate_says_so(current):
    none = Held(np.empty(0), current.old_normals, current.new_normals)
    got = verdict(none, none)
    assert got.promote
    assert "no known defects" in got.why


def test_a_training_is_judged_on_normals_it_does_not_know_by_its_own_thresholds():
    """Drift of 2 that the current model has adapted to: by cross-fitting it would not show."""
    current = Held(np.full(10, 9.0), normals(100), normals(300, seed=1))
    trained = Held(np.full(10, 9.0), normals(100), normals(300, seed=1, shift=2.0))
    own = by(2.0)
    assert verdict(current, trained).promote
    got = verdict(current, trained, own=own)
    assert not got.promote
    assert got.reasons[0].startswith("false alarms on new normals")
    assert got.numbers["false_alarms_new_candidate"] > 0.4
    assert verdict(current, current, own=own).promote


def test_with_nothing_to_judge_by_nothing_is_promoted(current):
    nothing = Held(np.empty(0), np.empty(0), np.empty(0))
    got = verdict(nothing, nothing)
    assert not got.promote
    assert "imported anew" in got.why


def test_a_candidate_that_finds_fewer_of_the_known_defects_is_held(current):
    """Their ranks are the same, so AUROC is; a threshold far up finds none of them."""
    found = verdict(current, current)
    assert (found.numbers["recall_current"], found.numbers["recall_candidate"]) == (1.0, 1.0)
    blind = judge(
        current,
        current,
        defect_cameras=[""] * 10,
        old_cameras=[""] * 200,
        new_cameras=[""] * 50,
        current_thresholds=by(2.0),
        candidate_thresholds=by(8.0),
        set_on_new=True,
    )
    assert not blind.promote
    assert blind.reasons == ["known defects that alarm fall by more than 0.1"]
    assert "of these alarm 1.000 -> 0.000" in blind.why


def test_a_current_model_that_alarms_at_everything_is_no_measure_of_what_is_found():
    drifted = Held(np.full(10, 9.0), normals(200), normals(50, seed=1, shift=8.0))
    mended = Held(np.r_[np.full(7, 9.0), np.full(3, 1.9)], normals(200), normals(50, seed=1))
    got = verdict(drifted, mended, limits=GateLimits(max_auroc_drop=1.0))
    assert got.numbers["recall_candidate"] == 0.7
    assert got.promote


def test_small_losses_of_a_line_of_refreshes_do_not_add_up():
    """Each candidate ranks a few more normals above the defects: .005 of AUROC at a time."""
    old, losses, best, aurocs = np.arange(1000.0), 0, None, []
    while losses < 20:
        held = [
            Held(np.full(5, 999.5 - 5 * worse), old, np.empty(0)) for worse in (losses, losses + 1)
        ]
        got = verdict(*held, threshold=900.0, own=by(900.0), best=best)
        if not got.promote:
            break
        aurocs.append(got.numbers["auroc_candidate"])
        best, losses = got.numbers, losses + 1
    assert losses == 6
    assert aurocs[-1] == pytest.approx(0.97, abs=1e-6)
    assert got.reasons == ["AUROC falls further below the 1.000 that there was"]
    better = Held(np.full(5, 999.5 - 5 * (losses - 1)), old, np.empty(0))
    assert verdict(held[0], better, threshold=900.0, own=by(900.0), best=best).promote


def test_what_a_line_has_lost_is_added_up_on_the_same_images_alone():
    """After a drift the new normals are harder, for both: .95 of AUROC where there was 1 without
    them. That the candidate ranks two more of them above the defects is no loss of the line's."""
    easy, hard = normals(900), normals(100, seed=1, shift=9.0)
    current, sound = Held(np.full(10, 9.0), easy, hard), Held(np.full(10, 9.0), easy, hard + 0.05)
    best = {"auroc_best": 1.0, "auroc_best_on": 1}
    got = verdict(current, sound, best=best)
    assert got.numbers["auroc_candidate"] < got.numbers["auroc_current"] < 0.96
    assert got.numbers["auroc_best"] == 1.0
    assert got.promote, got.why
    # What it was measured on is no more: the current model says what there was.
    worse = Held(np.full(10, 1.5), easy, hard)
    slightly = Held(np.full(10, 1.48), easy, hard)
    held = verdict(worse, slightly, best=best, threshold=1.0, own=by(1.0))
    assert held.reasons == ["AUROC falls further below the 1.000 that there was"]
    anew = verdict(worse, slightly, best=best, threshold=1.0, own=by(1.0), name=2)
    assert anew.promote, anew.why
    assert anew.numbers["auroc_best"] < 0.95
    assert anew.numbers["auroc_best_on"] == 2
