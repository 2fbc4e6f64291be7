"""Cursors come back as they went, and nothing else is taken for one."""

import re

import pytest

from bridge.cursor import MAX_CHARS, Anchor, Cursor, InvalidCursor, digest


@pytest.mark.parametrize(
    "cursor",
    [
        Cursor(Anchor(0, "AAAAAA")),
        Cursor(Anchor(2**64 - 1, "zz_-09"), ("abcdef",) * 20, True),
        Cursor(Anchor(7, "AAAAAA"), ("abcdef", "ghijkl")),
        Cursor(Anchor(7, "AAAAAA"), ("abcdef",), passed=("ghijkl",) * 19),
        Cursor(Anchor(7, "AAAAAA"), (), passed=("ghijkl",)),
        Cursor(None, time_ms=2**48 - 1),
    ],
)
def test_a_cursor_comes_back(cursor: Cursor) -> None:
    assert Cursor.parse(str(cursor)) == cursor
    assert re.fullmatch(r"[A-Za-z0-9._:~-]{1,160}", str(cursor))
    assert len(str(cursor)) <= MAX_CHARS


def test_a_digest_is_of_the_content() -> None:
    assert digest(b"a") == digest(b"a") != digest(b"b")
    assert re.fullmatch(r"[A-Za-z0-9_-]{6}", digest(b""))


@pytest.mark.parametrize(
    "text",
    ["", "2", "2.", "2.0.AAAAAA", "1.0.AAAAAA.", "2.-1.AAAAAA.", "2.0.AAAAA.", "2.0.AAAAAA.abc", "2.0.AAAAAA.\n",
     "2.0.AAAAAA." + "abcdef" * 21, "2." + "f" * 17 + ".AAAAAA.", "2.G.AAAAAA.", " 2.0.AAAAAA.", "2.0.AAAA=A.", "\0",
     "../../etc/passwd", "é", "2.0.AAAAAA.abcdef,", "0.", "0.g", "2.0.AAAAAA.~~", "2.0.AAAAAA.abcdef~", "2.0.AAAAAA..",
     "2.0.AAAAAA.abcdef." + "abcdef" * 20],
)  # fmt: skip
def test_anything_else_is_no_cursor(text: str) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)
