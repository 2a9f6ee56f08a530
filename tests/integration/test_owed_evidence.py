"""Evidence that S3 could not take, noted in a real Redis: all of it is paid, however much it is."""

import numpy as np
import pytest

from serving.archive import PAY_AT_ONCE, Archive, Debts

pytestmark = pytest.mark.integration

HEAT = np.eye(4, dtype=np.float32)


def test_all_that_a_long_outage_left_is_paid(settings, monkeypatch):
    monkeypatch.setattr("serving.archive.BREATHER_S", 3600.0)  # the test pays, no thread
    debts, owed, bucket = Debts(settings), 1500, {}
    for offset in range(owed):
        debts.note(f"t/0/{offset}", HEAT * offset)
    assert len(debts) == owed
    archive = Archive(lambda key, data, kind: bucket.update({key: data}), str.encode, debts)
    try:
        turns = 0
        while archive.pay():
            turns += 1
    finally:
        archive.close()
    assert len(debts) == 0
    assert turns == -(-owed // PAY_AT_ONCE)
    assert len(bucket) == 2 * owed


def test_a_note_is_given_back_as_it_was(settings):
    debts = Debts(settings)
    assert debts.some(16) == []
    debts.note("t/0/7", HEAT)
    ((frame_id, heat),) = debts.some(16)
    assert frame_id == "t/0/7"
    assert np.array_equal(heat, HEAT)
