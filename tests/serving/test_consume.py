"""serving/consume.py without Ray: how it asks a scorer that does not answer."""

from __future__ import annotations

import threading
from contextlib import ExitStack
from types import SimpleNamespace

import pytest
from ray.exceptions import RayActorError, RayTaskError

from infra.errors import ServiceUnavailable
from infra.settings import Settings
from serving import consume
from serving.consume import Consumer, HandleScore


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


class Busy:
    """A handle whose replica takes several waits for a batch, or dies over it."""

    def __init__(self, waits, end):
        self.waits, self.end, self.asked = waits, end, 0
        self.score = SimpleNamespace(remote=self._remote)

    def _remote(self, *batch):
        self.asked += 1
        return self

    def result(self, timeout_s):
        self.waits -= 1
        if self.waits >= 0:
            raise TimeoutError
        if isinstance(self.end, Exception):
            raise self.end
        return self.end


def batch():
    return SimpleNamespace(frames=[], images=None, model="m")


def test_a_batch_that_takes_long_is_not_asked_again_behind_itself():
    scorer = Busy(waits=100, end=SimpleNamespace(image_size=64))
    score = HandleScore(scorer, None, depth=1)
    assert score.submit(batch()).result(10).image_size == 64
    assert scorer.asked == 1
    score.close()


@pytest.mark.parametrize("why", [RayActorError(), RayTaskError("score", "", TimeoutError("own"))])
def test_an_answer_that_will_not_come_is_not_waited_for(why):
    why = why.as_instanceof_cause() if isinstance(why, RayTaskError) else why
    score = HandleScore(Busy(waits=1, end=why), None, depth=1)
    with pytest.raises(ServiceUnavailable, match="the scorer"):
        score.submit(batch()).result(10)
    score.close()


def test_the_end_of_a_consumer_ends_its_waits():
    score = HandleScore(Busy(waits=10**9, end=None), None, depth=1)
    asked = score.submit(batch())
    score.close()
    with pytest.raises(ServiceUnavailable):
        asked.result(10)


def test_a_consumer_joins_no_group_before_a_scorer_answers(monkeypatch):
    """Beside an old cluster that serves, half of the partitions would stand still."""
    opened = []
    monkeypatch.setattr(consume, "INFO_S", 0.05)
    monkeypatch.setattr(consume, "ResultStore", lambda settings: SimpleNamespace(bindings=dict))
    for part in ("DeadLetters", "make_consumer"):
        monkeypatch.setattr(consume, part, lambda *asked, part=part, **more: opened.append(part))

    class Unstarted(Consumer):
        def __init__(self):
            pass

        def __del__(self):
            pass

    consumer = Unstarted()
    consumer._scorer, consumer._stopping, consumer._trouble = Scorer(), threading.Event(), ""
    threading.Timer(0.2, consumer._stopping.set).start()
    with pytest.raises(ServiceUnavailable), ExitStack() as ends:
        consumer._connect(Settings(), ends)
    assert opened == []
    assert "none has answered yet" in consumer._trouble
