"""The page of versions: only what it shows is read, and little of that is kept."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from functools import lru_cache
from types import SimpleNamespace

import pytest

from infra.errors import NotFound
from serving.console.desk import Desk


class Store:
    """Versions v-000, v-001, ... of the same second; the manifest of v-007 is gone by now."""

    def __init__(self, number):
        self.read, self.number = [], number

    def current(self, model):
        return None

    def written(self, model):
        return {f"v-{n:03d}": datetime(2026, 1, 1, tzinfo=UTC) for n in range(self.number)}

    def manifest(self, model, version):
        self.read.append(version)
        if version == "v-007":
            raise NotFound(version)
        return {
            "kind": "bridge", "stored_at": "2026-01-01", "auroc": 0.9, "thresholds": {"default": 2},
            "data": {"dataset": "valves", "objects": ["a"] * 1000}, "answers": ["b"] * 1000,
        }  # fmt: skip


@pytest.fixture
def desk():
    one = Desk.__new__(Desk)
    one._model, one._store = "default", Store(12)
    one._decisions = {"default": SimpleNamespace(all=list)}
    one._decisions_turn = threading.Lock()
    one._manifest = lru_cache(100)(one._read_manifest)
    return one


def test_a_page_reads_its_own_manifests_once(desk):
    for _ in range(2):
        page = desk.versions(None, 2, 0)
        assert [each.version for each in page.versions] == ["v-011", "v-010"]
        assert page.known == 12
    assert desk._store.read == ["v-011", "v-010"]
    shown = page.versions[0]
    assert (shown.dataset, shown.auroc, shown.threshold) == ("valves", 0.9, 2)
    assert len(str(desk._manifest("default", "v-011"))) < 300


def test_a_version_that_goes_meanwhile_hides_no_other(desk):
    page = desk.versions(None, 3, 3)
    assert [each.kind for each in page.versions] == ["bridge", "broken", "bridge"]
