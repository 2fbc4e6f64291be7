"""The bridge reads a cursor back as it wrote it, and refuses any other text."""

import re
from base64 import urlsafe_b64encode

import pytest

from bridge.service.streams.cursor import (
    MAX_CHARS,
    NONE,
    VALUE_MASK,
    Anchor,
    Cursor,
    InvalidCursor,
    Unnamed,
    digest,
    echo,
    hash_event,
)
from tests.service import ROOT


@pytest.mark.contract("2.36")
@pytest.mark.parametrize(
    "cursor",
    [
        Cursor(Anchor(0, "AAAAAA")),
        Cursor(Anchor(2**64 - 1, "zz_-09"), ("abcdef",) * 16, (Unnamed(0xFFFF, 2**48 - 1),) * 2),
        Cursor(Anchor(2**64 - 1, "zz_-09"), ("abcdef",) * 15, (Unnamed(0xFFFF, 2**48 - 1),) * 2, ("ghijkl",)),
        Cursor(Anchor(7, "AAAAAA"), ("abcdef",), (None, Unnamed(1, 0))),
        Cursor(Anchor(7, "AAAAAA"), (), (NONE, None)),
        Cursor(Anchor(7, "AAAAAA"), ("abcdef", "ghijkl")),
        Cursor(Anchor(7, "AAAAAA"), ("abcdef",), passed=("ghijkl",) * 15),
        Cursor(Anchor(7, "AAAAAA"), (), passed=("ghijkl",)),
        Cursor(None, time_ms=2**48 - 1),
    ],
)
def test_a_cursor_is_read_back_as_it_was_written(cursor: Cursor) -> None:
    assert Cursor.parse(str(cursor)) == cursor
    assert re.fullmatch(r"[A-Za-z0-9._:~-]{1,160}", str(cursor))
    assert len(str(cursor)) <= MAX_CHARS == 160


def test_a_count_that_is_too_large_is_written_as_unknown() -> None:
    cursor = Cursor(Anchor(7, "AAAAAA"), (), (Unnamed(0x10000, 5), NONE))
    assert Cursor.parse(str(cursor)).unnamed == (None, NONE)


@pytest.mark.contract("5.55")
@pytest.mark.parametrize(
    ("text", "cursor"),
    [
        ("2.7.AAAAAA.abcdefghijkl", Cursor(Anchor(7, "AAAAAA"), ("abcdef", "ghijkl"))),
        ("2.7.AAAAAA.~" + "abcdef" * 20, Cursor(Anchor(7, "AAAAAA"), ("abcdef",) * 20, (None, None))),
        ("2.7.AAAAAA..ghijkl", Cursor(Anchor(7, "AAAAAA"), passed=("ghijkl",))),
        ("2.1f.AAAAAA.", Cursor(Anchor(31, "AAAAAA"))),
    ],
)
def test_a_cursor_of_the_previous_version_is_read(text: str, cursor: Cursor) -> None:
    assert Cursor.parse(text) == cursor


def test_a_cursor_without_sent_events_has_empty_parts() -> None:
    assert str(Cursor(Anchor(7, "AAAAAA"))) == "3.7.AAAAAA..."
    assert str(Cursor(None)) == "0.0"
    assert Unnamed() == NONE == Unnamed(0, 0)


def test_a_sum_has_at_most_twelve_digits() -> None:
    """The grammar refuses a longer sum, so the largest one must be the mask."""
    largest = Cursor(Anchor(7, "AAAAAA"), (), (Unnamed(1, VALUE_MASK), NONE))
    assert Cursor.parse(str(largest)) == largest
    with pytest.raises(InvalidCursor):
        Cursor.parse(str(Cursor(Anchor(7, "AAAAAA"), (), (Unnamed(1, VALUE_MASK + 1), NONE))))


def test_names_and_numbers_do_not_change_with_a_version() -> None:
    """Clients keep cursors. With another hash, each client would get all its events after the position again."""
    assert digest(b"e1") == "vpIO2p"
    key, name, number = hash_event("/a", "e1")
    assert key.hex() == "cb68e5d06d0d685ec18cbdcecb876c45"
    assert (name, number) == (urlsafe_b64encode(key).decode()[:6], int.from_bytes(key[-6:], "big"))


@pytest.mark.parametrize(
    ("last_event_id", "echoed"),
    [(None, None), ("", None), ("x", None), ("0.3e8", "0.3e8"), ("2.7.AAAAAA.abcdef", "3.7.AAAAAA...abcdef")],
)
def test_only_a_cursor_is_sent_back(last_event_id: str | None, echoed: str | None) -> None:
    assert echo(last_event_id) == echoed


def test_a_digest_depends_on_the_content() -> None:
    assert digest(b"a") == digest(b"a") != digest(b"b")
    assert re.fullmatch(r"[A-Za-z0-9_-]{6}", digest(b""))


@pytest.mark.contract("2.37")
@pytest.mark.parametrize(
    "text",
    ["", "2", "2.", "2.0.AAAAAA", "1.0.AAAAAA.", "2.-1.AAAAAA.", "2.0.AAAAA.", "2.0.AAAAAA.abc", "2.0.AAAAAA.\n",
     "2.0.AAAAAA." + "abcdef" * 21, "2." + "f" * 17 + ".AAAAAA.", "2.G.AAAAAA.", " 2.0.AAAAAA.", "2.0.AAAA=A.", "\0",
     "../../etc/passwd", "é", "2.0.AAAAAA.abcdef,", "0.", "0.g", "2.0.AAAAAA.~~", "2.0.AAAAAA.abcdef~", "2.0.AAAAAA..",
     "2.0.AAAAAA.abcdef." + "abcdef" * 21, "3.0.AAAAAA.", "3.0.AAAAAA..", "3.0.AAAAAA...abc", "3.0.AAAAAA.1.1.",
     "3.0.AAAAAA.0:1..", "3.0.AAAAAA.10000:1..", "3.0.AAAAAA.1:..", "3.0.AAAAAA.1:" + "f" * 13 + "..",
     "3.0.AAAAAA.-1:1..", "3.0.AAAAAA.~~..", "3.0.AAAAAA..." + "abcdef" * 17,
     "3.0.AAAAAA..." + "abcdef" * 16 + ".abcdef", "3.0.AAAAAA...abcdef.", "3.0.AAAAAA.1:1.1:1.1:1.abcdef"],
)  # fmt: skip
def test_any_other_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)


def test_the_cursor_of_the_worked_example_is_right() -> None:
    def values(*ids: str) -> int:
        return sum(hash_event("/workers/a", each)[2] for each in ids) & VALUE_MASK

    names = "".join(hash_event("/workers/a", f"a{number}")[1] for number in (4, 5))
    cursor = f"3 . 64 . AzBLnL . 3:{values('a1', 'a2', 'a3'):x} . 1:{values('b1'):x} . {names}…"
    assert cursor in (ROOT / "docs/join.md").read_text()
