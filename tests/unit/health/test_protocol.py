"""What every type of check promises to those that run it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastlb.config import Check
from fastlb.health.protocol import MAX_ANSWER
from fastlb.health.types import CONVERSATIONS

ROWS = pytest.mark.parametrize("kind", CONVERSATIONS)


@ROWS
@given(received=st.binary(max_size=64), repeated=st.integers(1, MAX_ANSWER))
def test_enough_of_an_answer_is_judged(kind: str, received: bytes, repeated: int) -> None:
    """Whatever a server sends: after MAX_ANSWER bytes, or when it has closed the connection, no more is waited for."""
    judge = CONVERSATIONS[kind].judge
    if judge is not None:
        assert judge(received, True) is not None
        assert judge((received * repeated).ljust(MAX_ANSWER, b"x"), False) is not None


@ROWS
def test_who_is_asked_answers_to_be_judged(kind: str) -> None:
    """A request without a judge would be sent by nobody."""
    request, judge = CONVERSATIONS[kind]
    if request is not None:
        assert judge is not None
        assert request(Check.model_validate({"type": kind}), "10.0.0.1", 80)
