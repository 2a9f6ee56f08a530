"""serving/consume.py without Ray: how it asks a scorer that does not answer."""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pytest

from infra.errors import ServiceUnavailable
from serving.consume import HandleScore


class Scorer:
    """A handle whose replica answers once `up` is set."""

    def __init__(self):
        self.up, self.asked = threading.Event(), 0
        self.info = SimpleNamespace(remote=self._remote)

    def _remote(self):
        self.asked += 1
        return self

    def result(self, timeout_s):
        if not self.up.wait(timeout_s):
            raise TimeoutError
        return {"image_size": 64}


def test_while_no_scorer_is_up_the_loop_is_not_held_and_asks_but_once(monkeypatch):
    """Its retries show life and see a stop; each would else leave a call behind."""
    monkeypatch.setattr("serving.consume.INFO_S", 0.05)
    scorer = Scorer()
    score = HandleScore(scorer, SimpleNamespace(bindings=dict), depth=1)
    for _ in range(3):
        with pytest.raises(ServiceUnavailable, match="none has answered yet"):
            score.plan()
    scorer.up.set()
    monkeypatch.setattr("serving.consume.INFO_S", 10.0)
    assert score.plan().default_size == 64
    assert scorer.asked == 1
    score.close()
