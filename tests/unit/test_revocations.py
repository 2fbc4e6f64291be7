"""Which tokens are refused although they have not expired."""

from __future__ import annotations

import pytest

from bridge.service import revocations
from bridge.service.revocations import Revocations


def test_older_tokens_of_a_user_are_refused_and_newer_ones_are_not() -> None:
    made = Revocations()
    assert made.revoke("42", 100.0)
    assert made.refuses("42", 99.9)
    assert made.refuses("42", None), "one that does not say when it was issued counts as old"
    assert not made.refuses("42", 100.0)
    assert not made.refuses("43", None)


def test_an_earlier_revocation_does_not_replace_a_later_one() -> None:
    made = Revocations()
    for until in (100.0, 50.0):
        made.revoke("42", until)
    assert made.refuses("42", 99.0)


def test_the_table_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(revocations, "MAX_USERS", 2)
    made = Revocations()
    assert made.revoke("a", 1.0)
    assert made.revoke("b", 1.0)
    assert made.revoke("a", 2.0)
    assert not made.revoke("c", 1.0), "the caller logs that one was forgotten"
    assert len(made) == 2
    assert not made.refuses("b", 0.0)
