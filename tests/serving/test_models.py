"""Which model scores: bound models come, go, break and are mended; the default one always scores.

The store is a dictionary of real, tiny versions; a version is broken by changing its bytes.
"""

from __future__ import annotations

import time
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dpdl_core import artifact
from dpdl_core.config import recipe
from dpdl_core.fit import fit
from dpdl_core.images import ArraySource
from infra.errors import AuthFailed, DataError, NotFound, ServiceUnavailable, VersionBroken
from serving import models as subject
from serving import versions
from serving.models import Models


@pytest.fixture(scope="module")
def files():
    config = replace(
        recipe("edge"),
        weights="random",
        image_size=64,
        patch_prototypes=8,
        patch_dims=8,
        pseudo_normals=8,
        folds=2,
    )
    rng = np.random.default_rng(0)
    normals = rng.integers(100, 140, (12, 64, 64, 3), dtype=np.uint8)
    anomalies = rng.integers(0, 255, (3, 64, 64, 3), dtype=np.uint8)
    model = fit(config, ArraySource(normals), anomalies, seed=0)
    return artifact.pack(model, thresholds={"default": 1.0, "cameras": {}}, metrics={})


class Store:
    """serving.versions.Store held in memory; `away` stands for S3 that does not answer."""

    def __init__(self):
        self.versions, self.pointers, self.fetched, self.away = {}, {}, [], False

    def promote(self, name, version, files):
        before = self.pointers.get(name)
        self.versions[name, version] = files
        self.pointers[name] = SimpleNamespace(
            version=version, previous=before.version if before else None
        )

    def current(self, name):
        if self.away:
            raise ServiceUnavailable("S3 is away")
        return self.pointers.get(name)

    def fetch(self, name, version):
        self.fetched.append((name, version))
        if self.away:
            raise ServiceUnavailable("S3 is away")
        if (name, version) not in self.versions:
            raise NotFound(f"{name}/{version}")
        return self.versions[name, version]


@pytest.fixture
def store(files):
    made = Store()
    made.promote("default", "d1", files)
    return made


def models_of(store, max_models=4):
    models = Models(store, "default", device="cpu", trial_batch=1, max_models=max_models)
    models.default.start()
    return models


def scores(models, name):
    models.need(name)
    used, held = models.of(name)
    return used, held.version


def test_a_bound_model_is_loaded_once_when_it_is_needed_and_then_followed(store, files):
    store.promote("special", "s1", files)
    models = models_of(store)
    assert store.fetched == [("default", "d1")]
    assert scores(models, "special") == ("special", "s1")
    assert scores(models, "special") == ("special", "s1")
    assert store.fetched[1:] == [("special", "s1")]
    assert scores(models, "") == scores(models, "default") == ("default", "d1")
    store.promote("special", "s2", files)
    models.refresh()
    assert scores(models, "special") == ("special", "s2")
    assert scores(models, "") == ("default", "d1")
    assert models.trouble == {}


def test_the_default_scores_for_a_model_that_is_not_there_until_it_is(store, files):
    models = models_of(store)
    assert scores(models, "special") == ("default", "d1")
    assert "no current version" in models.trouble["special"]
    store.promote("special", "s1", files)
    models.refresh()
    assert scores(models, "special") == ("special", "s1")
    assert models.trouble == {}


def test_the_default_scores_for_a_broken_model_which_is_not_fetched_again(store, files):
    store.promote("special", "s1", {**files, artifact.CONFIG: b'{"format": 999}'})
    models = models_of(store)
    assert scores(models, "special") == ("default", "d1")
    assert "999" in models.trouble["special"]
    models.refresh()
    models.refresh()
    assert store.fetched.count(("special", "s1")) == 1
    store.promote("special", "s2", files)
    models.refresh()
    assert scores(models, "special") == ("special", "s2")


def test_a_bound_version_that_breaks_later_leaves_the_one_before_in_use(store, files):
    store.promote("special", "s1", files)
    models = models_of(store)
    models.need("special")
    store.promote("special", "s2", {**files, artifact.WEIGHTS: b"nonsense"})
    models.refresh()
    assert scores(models, "special") == ("special", "s1")


def test_a_refused_version_is_tried_again_when_the_pointer_moves_to_it_anew(store, files):
    models = models_of(store)
    store.promote("default", "d2", {**files, artifact.WEIGHTS: b"nonsense"})
    models.refresh()
    models.refresh()
    assert (models.of("")[1].version, models.default.refused_now) == ("d1", "d2")
    assert store.fetched.count(("default", "d2")) == 1
    store.promote("default", "d1", files)
    models.refresh()
    store.promote("default", "d2", files)
    models.refresh()
    assert models.of("")[1].version == "d2"
    assert models.default.refused == {}


def test_a_device_out_of_memory_refuses_a_version_for_a_while_only(store, files, monkeypatch):
    models = models_of(store)
    room, now_s = [False], [time.monotonic()]
    real = versions.unpack

    def unpack(found, device):
        if not room[0]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(found, device=device)

    monkeypatch.setattr(versions, "unpack", unpack)
    monkeypatch.setattr(versions.time, "monotonic", lambda: now_s[0])
    store.promote("default", "d2", files)
    tried_at = []
    for _ in range(100):
        before = len(store.fetched)
        models.refresh()
        if len(store.fetched) > before:
            tried_at.append(round(now_s[0]))
        now_s[0] += 1
    assert "out of memory" in models.default.refused["d2"]
    assert models.default.refused_now == "d2"
    assert np.diff(tried_at).tolist() == [10, 20, 40]
    room[0] = True
    now_s[0] += 100
    models.refresh()
    assert models.of("")[1].version == "d2"
    assert (models.default.refused, models.default.refused_now) == ({}, None)


def test_a_version_that_s3_refused_to_give_is_used_once_it_gives_it(store, files, monkeypatch):
    """Its keys were being changed, say: nothing is known against the version."""
    models, now_s = models_of(store), [time.monotonic()]
    monkeypatch.setattr(versions.time, "monotonic", lambda: now_s[0])
    store.promote("default", "d2", files)
    real = store.fetch

    def fetch(name, version):
        raise AuthFailed("S3 refused the key")

    store.fetch = fetch
    models.refresh()
    assert models.default.refused_now == "d2"
    store.fetch = real
    now_s[0] += versions.FIRST_RETRY_S
    models.refresh()
    assert models.of("")[1].version == "d2"
    assert models.default.refused == {}


def test_a_pointer_that_cannot_be_read_hides_no_other_model(store, files):
    for name in ("a", "b"):
        store.promote(name, "1", files)
    models = models_of(store)
    assert [scores(models, name) for name in ("a", "b")] == [("a", "1"), ("b", "1")]
    real = store.current

    def current(name):
        if name in ("default", "a"):
            raise VersionBroken(f"{name}/current.json is not JSON")
        return real(name)

    store.current = current
    store.promote("b", "2", files)
    with pytest.raises(VersionBroken, match="default"):
        models.refresh()
    assert scores(models, "b") == ("b", "2")
    assert scores(models, "a") == ("a", "1")


def test_s3_away_at_first_need_and_back(store, files):
    store.promote("special", "s1", files)
    models = models_of(store)
    store.away = True
    assert scores(models, "special") == ("default", "d1")
    assert "S3 is away" in models.trouble["special"]
    with pytest.raises(ServiceUnavailable):
        models.refresh()
    store.away = False
    models.refresh()
    assert scores(models, "special") == ("special", "s1")


@pytest.mark.parametrize("name", ["../default", "a/b", "x" * 400])
def test_a_name_that_no_model_can_have_is_trouble_and_no_crash(store, name):
    def current(asked):
        if asked == name:
            raise ValueError(f"{asked}: no name for a model")
        return store.pointers[asked]

    store.current = current
    models = models_of(store)
    assert scores(models, name) == ("default", "d1")
    assert "no name" in models.trouble[name]


def test_memory_is_bounded_and_the_longest_unused_makes_room(store, files, monkeypatch):
    for name in ("a", "b", "c"):
        store.promote(name, f"{name}1", files)
    models = models_of(store, max_models=3)
    assert [scores(models, name)[0] for name in ("a", "b", "c")] == ["a", "b", "default"]
    assert "stream.max_models" in models.trouble["c"]
    models._asked_s["a"] -= subject.IDLE_S + 1
    models.refresh()
    assert [each.name for each in models.in_use()] == ["default", "b", "c"]
    assert models.trouble == {}


def test_trouble_of_a_model_that_nobody_wants_any_more_is_forgotten(store):
    models = models_of(store)
    models.need("special")
    models._asked_s["special"] -= subject.IDLE_S + 1
    models.refresh()
    assert models.trouble == {}


def test_no_usable_default_is_an_error(files):
    store = Store()
    with pytest.raises(DataError, match="no current version"):
        models_of(store)
