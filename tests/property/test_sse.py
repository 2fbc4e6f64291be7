"""An independent decoder reads the bytes of frames, in any pieces."""

from itertools import pairwise

import hypothesis.strategies as st
from hypothesis import given

from bridge.service.streams import sse
from tests.decoder import Decoder, Frame

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=30)
cursors = st.text("abc019._:~-", min_size=1, max_size=20)


def decode(raw: bytes, cuts: list[int]) -> tuple[list[Frame], Decoder]:
    decoder = Decoder()
    frames: list[Frame] = []
    edges = sorted({0, len(raw), *(cut % (len(raw) + 1) for cut in cuts)})
    for start, end in pairwise(edges):
        frames += decoder.feed(raw[start:end])
    return frames, decoder


@given(user=texts, cursor=cursors, retry_ms=st.integers(0, 10**6), cuts=st.lists(st.integers(0, 10**4)))
def test_ready(user: str, cursor: str, retry_ms: int, cuts: list[int]) -> None:
    raw = sse.HEARTBEAT + sse.encode_ready(
        user=user, identity="i", resumed=True, heartbeat_seconds=15, cursor=cursor, retry_ms=retry_ms
    )
    (frame,), decoder = decode(raw + sse.HEARTBEAT, cuts)
    assert (frame.event, frame.id, frame.retry, frame.json["user"]) == ("bridge.ready", cursor, retry_ms, user)
    assert (decoder.comments, decoder.empty_blocks) == (2, [])


@given(
    data=st.binary(max_size=60), event_type=st.text("abc.", min_size=1, max_size=9), cuts=st.lists(st.integers(0, 99))
)
def test_an_event_is_one_frame_or_is_refused(data: bytes, event_type: str, cuts: list[int]) -> None:
    try:
        raw = sse.encode_id("c") + sse.encode_type(event_type) + sse.encode_data(data)
        data.decode("utf-8")
    except ValueError:
        assert set(data) & {0, 10, 13} or not is_utf8(data)
        return
    frames, _ = decode(raw, cuts)
    if data:
        assert [(frame.id, frame.event, frame.data) for frame in frames] == [("c", event_type, data.decode())]


def is_utf8(data: bytes) -> bool:
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True
