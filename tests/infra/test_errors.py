"""Errors cross process borders unchanged."""

from __future__ import annotations

import inspect
import pickle

import pytest

from infra import errors
from infra.errors import BadFrame, DpdlError, Fenced

ALL = [
    kind
    for _, kind in inspect.getmembers(errors, inspect.isclass)
    if issubclass(kind, DpdlError) and kind.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", ALL)
def test_an_error_survives_pickling(kind: type[DpdlError]) -> None:
    arguments = {Fenced: (7, 3), BadFrame: ("empty", "no value")}.get(kind, ("one line",))
    error = kind(*arguments)
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))


@pytest.mark.parametrize("kind", ALL)
def test_the_docstring_draws_every_error(kind: type[DpdlError]) -> None:
    lines = [line for line in (errors.__doc__ or "").splitlines() if kind.__name__ in line.split()]
    assert len(lines) == 1
    assert kind is DpdlError or ("(retryable" in lines[0]) == kind.retryable
