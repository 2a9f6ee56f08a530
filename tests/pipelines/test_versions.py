"""What versions are called, what a rollback goes back to, and what travels to workers."""

import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import yaml
from ray.train import WorkerGroupError

from infra.answers import is_answer
from infra.model_store import Move, version_before
from infra.settings import load_settings
from pipelines.candidate import Inputs
from pipelines.held_out import HELD_OUT_OF, is_held_out, usable
from pipelines.ray_run import cause
from pipelines.sources import RowRef, task_environment, task_settings
from pipelines.storage import shared_filesystem
from pipelines.train import TrainOptions, _shared_again, parse_workers


@pytest.mark.parametrize(
    ("moves", "before"),
    [
        (["a"], None),
        (["a", "b"], "a"),
        (["a", "b", "<a"], None),  # rolled back: going on means before a, not to b again
        (["a", "b", "c", "<b"], "a"),
        (["a", "b", "<a", "c"], "a"),
        (["a", "b", "c", "a"], "c"),  # a person's promotion can be taken back
        (["a", "b", "c", "a", "<c"], "b"),
        (["a", "b", "c", "<b", "<a", "c"], "a"),
        (["a", "b", "a", "<b", "<a"], None),
        (["<b"], None),  # the moves before it are no longer kept
    ],
)
def test_rolling_back_twice_goes_back_twice(moves, before):
    """<a: a rollback to a."""
    assert version_before([move(name, name.startswith("<")) for name in moves]) == before


@pytest.mark.parametrize(
    ("moves", "before"),
    [("aba", None), ("abcb", "a"), ("abac", "a"), ("abcbac", "a")],
)
def test_moves_that_do_not_say_so_are_rollbacks_where_they_went_back(moves, before):
    """As pointers of before were written."""
    assert version_before([move(name) for name in moves]) == before


def move(name, back=None):
    return Move(version=name.lstrip("<"), at="", by="", why="", nonce="", back=back)


INPUTS = Inputs(
    parent="train-0",
    dataset="d",
    objects={"d/a": "1"},
    used={},
    new={"d/n": "2"},
    new_defects={},
    set_aside=[],
    seed=0,
)


def test_a_candidate_is_named_by_all_of_its_inputs_and_nothing_else():
    same = dataclasses.replace(INPUTS, objects=dict(INPUTS.objects))
    assert same.candidate == INPUTS.candidate
    others = {
        dataclasses.replace(INPUTS, **change).candidate
        for change in (
            {"parent": "train-1"},
            {"objects": {"d/a": "9"}},
            {"used": {"d/m": "3"}},
            {"new": {"d/n": "9"}},
            {"new_defects": {"d/a": "1"}},
            {"set_aside": ["ab"]},
            {"seed": 1},
        )
    }
    assert len(others | {INPUTS.candidate}) == 8


def test_what_a_camera_saw_within_a_minute_is_held_out_or_learnt_as_a_whole():
    """Of 2000 minutes of two cameras, ten frames each, a fifth; one camera's say nothing of the
    other's."""
    minutes = {
        (camera, minute): {
            is_held_out(
                RowRef("k", 0, f"{n:064x}", 0, "", camera, "", (minute * 60 + n * 6) * 10**9)
            )
            for n in range(10)
        }
        for camera in ("cam-1", "cam-2")
        for minute in range(1, 1001)
    }
    assert {len(sides) for sides in minutes.values()} == {1}
    share = sum(True in sides for sides in minutes.values()) / len(minutes)
    assert share == pytest.approx(1 / HELD_OUT_OF, abs=0.03)
    alike = sum(minutes["cam-1", m] == minutes["cam-2", m] for m in range(1, 1001))
    assert alike < 750  # .68 of independent ones


def test_without_a_time_about_one_in_five_is_held_out_by_its_content_alone():
    rows = [RowRef("k", i, f"{i * 2654435761 % 2**32:08x}", 0, "", "", "") for i in range(5000)]
    share = sum(map(is_held_out, rows)) / len(rows)
    assert share == pytest.approx(1 / HELD_OUT_OF, abs=0.02)
    moved = dataclasses.replace(rows[7], key="other", row=0, camera="cam-9", source="renamed")
    assert is_held_out(moved) == is_held_out(rows[7])


def test_what_people_answered_is_never_held_out_and_of_a_vouched_folder_a_fifth():
    """A vouched folder is stored as answers are; its rows name files, theirs name frames."""
    key = "plates/incoming/answer-0.parquet"
    digests = [f"{i * 2654435761 % 2**32:08x}" for i in range(5000)]
    answers = [RowRef(key, 0, digest, 0, "", "", f"answer:frames/0/{digest}") for digest in digests]
    assert is_answer(key)
    assert not any(map(is_held_out, answers))
    vouched = [dataclasses.replace(row, source="plates/1.png") for row in answers]
    share = sum(map(is_held_out, vouched)) / len(vouched)
    assert share == pytest.approx(1 / HELD_OUT_OF, abs=0.02)


@pytest.fixture
def settings(tmp_path, monkeypatch):
    path = tmp_path / "dpdl.yaml"
    s3 = {"endpoint": "127.0.0.1:1", "access_key": "key", "secret_key": "hush-hush"}
    path.write_text(yaml.safe_dump({"s3": s3}))
    path.chmod(0o600)
    monkeypatch.setenv("DPDL_CONFIG", str(path))
    monkeypatch.setenv("DPDL_STATE_DIR", str(tmp_path / "state"))
    return load_settings()


def test_the_filesystem_that_travels_to_workers_carries_no_secret(settings):
    filesystem = shared_filesystem(settings)
    data = pickle.dumps(filesystem)
    assert b"hush" not in data
    assert pickle.loads(data) == filesystem
    assert pickle.loads(data).handler.inner == filesystem.handler.inner


def test_a_task_reads_the_same_settings_from_its_own_files(settings, monkeypatch):
    environment = task_environment(settings)
    assert "hush" not in str(environment)
    monkeypatch.delenv("DPDL_CONFIG")
    assert task_settings(environment).s3 == settings.s3


@pytest.mark.parametrize(
    "change", [{"workers": 0}, {"workers": (2, 1)}, {"workers": (0, 2)}, {"false_alarm_rate": 0.0}]
)
def test_options_that_cannot_be_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        TrainOptions(dataset="d", **change)


def test_workers_are_a_number_or_two_bounds():
    assert parse_workers("2") == 2
    assert parse_workers("1:4") == (1, 4)
    for text in ("", "1:", "two", "1:2:3"):
        with pytest.raises(ValueError, match="LEAST:MOST"):
            parse_workers(text)


def test_a_training_says_which_cameras_share_a_threshold_again():
    manifest = {"thresholds": {"cameras": {"cam-1": 1.0, "cam-2": 2.0}}}
    store = SimpleNamespace(
        current=lambda name: SimpleNamespace(version="refresh-1"),
        manifest=lambda name, version: manifest,
    )
    (note,) = _shared_again(store, "plates", {"cameras": {"cam-1": 1.5}})
    assert note.startswith("cam-2: a threshold of their own in refresh-1")
    assert _shared_again(store, "plates", {"cameras": {"cam-1": 1.5, "cam-2": 2.0}}) == []
    nothing = SimpleNamespace(current=lambda name: None)
    assert _shared_again(nothing, "plates", {"cameras": {}}) == []


def test_the_cause_of_a_failed_run_is_the_worker_that_failed_first():
    failures = {
        0: RuntimeError("Traceback ...\nRuntimeError: [gloo/transport] Connection closed by peer"),
        1: RuntimeError("Traceback ...\nValueError: space '9': the trunk has stages 1-7\n"),
    }
    error = WorkerGroupError("two workers failed", failures)
    assert cause(error) == "ValueError: space '9': the trunk has stages 1-7"
    assert cause(RuntimeError()) == "RuntimeError"


def test_a_row_set_aside_repeated_or_labelled_is_not_used():
    row = RowRef("new", 3, "ab12", 0, "", "cam-1", "a.png")
    data = {"set_aside": [], "repeated": {}}
    assert usable(data)(row)
    assert usable({"set_aside": []})(row)  # a manifest from before repeats were kept
    assert not usable(data | {"set_aside": ["ab12"]})(row)
    assert not usable(data | {"repeated": {"new": [3]}})(row)
    assert usable(data | {"repeated": {"new": [4], "old": [3]}})(row)
    assert not usable(data)(dataclasses.replace(row, label=1))
