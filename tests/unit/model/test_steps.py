"""Work in steps, done at once."""

from __future__ import annotations

import pytest

from fastlb.model.steps import Steps, finish


@pytest.mark.parametrize("number", [0, 1, 1000])
def test_every_step_is_done(number: int) -> None:
    done = []

    def steps() -> Steps[str]:
        for step in range(number):
            done.append(step)
            yield
        return "the result"

    assert finish(steps()) == "the result"
    assert done == list(range(number))


def test_a_failure_comes_through() -> None:
    def steps() -> Steps[None]:
        yield
        raise ValueError("in the second step")

    with pytest.raises(ValueError, match="in the second step"):
        finish(steps())
