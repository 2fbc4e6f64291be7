"""Cursors come back as they went, and nothing else is taken for one."""

import re

import pytest

from bridge.cursor import MAX_CHARS, Cursor, InvalidCursor


def test_a_cursor_comes_back() -> None:
    cursor = Cursor(1_795_383_917_901, "abcd" * 16)
    assert Cursor.parse(str(cursor)) == cursor
    assert re.fullmatch(r"[A-Za-z0-9._:~-]{1,160}", str(cursor))
    assert len(str(Cursor(2**48 - 1, "zzzz" * 16))) <= MAX_CHARS


@pytest.mark.parametrize(
    "text",
    ["", "1", "1.", "1.0", "2.0.", "1.-1.", "1.0.abc", "1.0." + "abcd" * 17, "1.0.abc\n", "1.0.\n",
     "1." + "f" * 13 + ".", "1.G.", " 1.0.", "1.0.ab=d", "\0", "../../etc/passwd", "é", "1.0.abcd,"],
)  # fmt: skip
def test_anything_else_is_no_cursor(text: str) -> None:
    with pytest.raises(InvalidCursor):
        Cursor.parse(text)
