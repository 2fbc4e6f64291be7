"""The bytes of each frame, exactly as in docs/contract.md."""

import pytest

from bridge.service.streams import sse


@pytest.mark.contract("2.23", "2.25", "2.26", "2.28", "2.29", "2.34")
def test_the_bridges_own_frames() -> None:
    assert (
        sse.encode_ready(user="a.b", identity="i", resumed=False, heartbeat_seconds=15.0, cursor="1.0.", retry_ms=3000)
        == b"retry: 3000\nid: 1.0.\nevent: bridge.ready\n"
        b'data: {"user":"a.b","identity":"i","resumed":false,"heartbeat_seconds":15}\n\n'
    )
    assert sse.encode_gap("no-log") == b'event: bridge.gap\ndata: {"reason":"no-log"}\n\n'
    assert sse.encode_position("1.0.") == b"id: 1.0.\nevent: bridge.position\ndata: {}\n\n"
    assert sse.encode_bye("drain", 7) == b'retry: 7\nevent: bridge.bye\ndata: {"reason":"drain"}\n\n'
    assert sse.HEARTBEAT == b":\n"


def test_a_user_id_cannot_break_ready() -> None:
    frame = sse.encode_ready(
        user='\r\n\n"\0😀', identity="i", resumed=True, heartbeat_seconds=0.5, cursor="c", retry_ms=1
    )
    assert frame.count(b"\n") == 5
    assert b"\r" not in frame
    assert b"\0" not in frame


@pytest.mark.parametrize("text", [b"a\nb", b"a\rb", b"\0"])
def test_a_field_cannot_hold_a_line_end(text: bytes) -> None:
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        sse.encode_data(text)
    with pytest.raises(ValueError, match="CR, LF or NUL"):
        sse.encode_type(text.decode())


def test_a_user_id_is_written_as_utf_8() -> None:
    frame = sse.encode_ready(user="\u00e9", identity="i", resumed=True, heartbeat_seconds=1, cursor="c", retry_ms=1)
    assert '"user":"\u00e9"'.encode() in frame
