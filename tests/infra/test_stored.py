"""Stored records: a newer version's are read as far as they are known, what is none is told."""

import json
from dataclasses import asdict

import pytest

from infra.decisions import Decision
from infra.errors import DataError
from infra.stored import from_json

DECISION = Decision("v2", "v1", "held", "AUROC down", {"auroc": 0.5}, {"incoming/a": "etag"}, "now")


def test_what_a_newer_version_adds_is_left_out():
    record = json.dumps(asdict(DECISION) | {"approved_by": "ann"})
    assert from_json(Decision, record, "m/decisions/v2.json") == DECISION


@pytest.mark.parametrize("data", [b"", b"no", b"[]", b"7", b"{}", b'{"candidate": "v2"}', b"\xff"])
def test_what_is_no_such_record_is_told_by_its_place(data):
    with pytest.raises(DataError, match=r"m/decisions/v2\.json is"):
        from_json(Decision, data, "m/decisions/v2.json")
