"""Laws of the words: one word an id, and patterns that mean what a topic exchange means by them."""

import re

import hypothesis.strategies as st
from hypothesis import given

from bridge.routing import MAX_HASHES, Audience, TypeFilter, decode_id, encode_id, split_key

ids = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20)
words = st.text("abz09_-", min_size=1, max_size=3)
types = st.lists(words, min_size=1, max_size=5).map(".".join)
pattern_words = st.one_of(words, st.just("*"), st.just("#"))
patterns = st.lists(pattern_words, min_size=1, max_size=5).filter(lambda p: p.count("#") <= MAX_HASHES).map(".".join)


@given(ids)
def test_an_id_is_one_word_without_an_operator(identity: str) -> None:
    word = encode_id(identity)
    assert re.fullmatch(r"[A-Za-z0-9%_~-]+", word)
    assert decode_id(word) == identity


@given(ids, ids)
def test_two_ids_never_share_a_word(one: str, other: str) -> None:
    assert (encode_id(one) == encode_id(other)) == (one == other)


@given(st.sampled_from(["user", "group"]), ids, types)
def test_a_key_comes_apart_as_it_was_put_together(kind: str, identity: str, event_type: str) -> None:
    audience = Audience(kind, identity)  # type: ignore[arg-type]
    assert split_key(audience.routing_key(event_type)) == (audience, event_type)


@given(ids, ids, types)
def test_one_users_binding_never_takes_anothers_event(one: str, other: str, event_type: str) -> None:
    binding = Audience.user(one).binding_key()
    key = Audience.user(other).routing_key(event_type)
    assert broker_matches(binding.split("."), key.split(".")) == (one == other)


@given(st.lists(patterns, min_size=1, max_size=4), types)
def test_a_filter_takes_what_the_brokers_bindings_take(chosen: list[str], event_type: str) -> None:
    expected = any(broker_matches(pattern.split("."), event_type.split(".")) for pattern in chosen)
    assert TypeFilter.parse(",".join(chosen)).matches(event_type) == expected


def broker_matches(pattern: list[str], key: list[str]) -> bool:
    """AMQP 0-9-1, section 3.1.3.3, word for word."""
    if not pattern:
        return not key
    if pattern[0] == "#":
        return broker_matches(pattern[1:], key) or (bool(key) and broker_matches(pattern, key[1:]))
    return bool(key) and pattern[0] in ("*", key[0]) and broker_matches(pattern[1:], key[1:])
