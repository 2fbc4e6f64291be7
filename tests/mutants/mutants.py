"""Mutants of the code: one edit each, what a user would see of it, and the test that must catch it.

`make mutants` lets each loose in a copy of the tree and shows whether its keeper noticed. Added when one bites.
"""

from __future__ import annotations

from dataclasses import dataclass

WORLD = "tests/property/test_session.py"
SESSION = "tests/unit/test_session.py"


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    harm: str
    killer: str


MUTANTS = [
    Mutant(
        "replay-skips-one",
        "bridge/service/broker/eventlog.py",
        "            request.verified = True\n            request.next = offset + 1\n",
        "            request.verified = True\n            request.next = offset + 2\n",
        "the first event after a client's place is lost",
        "tests/integration/test_resume.py::test_a_client_can_be_cut_after_every_single_event",
    ),
    Mutant(
        "names-are-forgotten",
        "bridge/service/streams/session.py",
        "        self._sent_by_cursor = frozenset(resume_from.digests + resume_from.passed)\n",
        "        self._sent_by_cursor = frozenset()\n",
        "what was sent behind the anchor comes a second time",
        WORLD,
    ),
    Mutant(
        "buffered-is-dropped",
        "bridge/service/streams/session.py",
        "        buffered, self._buffered, self._buffered_bytes = self._buffered, OrderedDict(), 0\n",
        "        buffered, self._buffered, self._buffered_bytes = OrderedDict(), OrderedDict(), 0\n",
        "what came live while the log was read is lost",
        WORLD,
    ),
    Mutant(
        "buffered-is-not-compared",
        "bridge/service/streams/session.py",
        "        self._unbuffer(event.id)\n        if was_sent or",
        "        if was_sent or",
        "with more than 512 buffered, what the log gave comes again from the live queue",
        SESSION,
    ),
    Mutant(
        "ready-moves-the-client",
        "bridge/service/streams/session.py",
        "            self._send_ready(self._cursor, resumed=True)\n",
        "            self._send_ready(Cursor(self._live_from), resumed=True)\n",
        "a client cut off in its replay comes back behind what it never got",
        WORLD,
    ),
    Mutant(
        "a-sum-is-not-compared",
        "bridge/service/streams/recall.py",
        "        return () if total == 0 else None\n",
        "        return ()\n",
        "an event that others overtook is taken as sent, and lost to whoever comes back just then (this one bit)",
        WORLD,
    ),
    Mutant(
        "both-queues-in-one-count",
        "bridge/service/streams/recall.py",
        "        shared, event = entry.shared, entry.event\n",
        "        shared, event = False, entry.event\n",
        "what one queue brought is counted as the other's, and is sent again",
        SESSION,
    ),
    Mutant(
        "an-anchor-without-proof",
        "bridge/service/streams/hub.py",
        "        anchor = self._hub.watermark(min(number, self._hub.shared_fence))\n",
        "        anchor = self._hub.watermark(number)\n",
        "a cursor moves past events that the shared queue has not brought yet (this one bit)",
        "tests/unit/test_hub.py",
    ),
    Mutant(
        "anchor-drops-all-names",
        "bridge/service/streams/progress.py",
        "            if at >= first or each.received_ms >= since_ms\n",
        "            if at >= first\n",
        "what was sent just before a watermark, and stands behind it, comes a second time",
        SESSION,
    ),
    Mutant(
        "names-fall-out-uncounted",
        "bridge/service/streams/progress.py",
        "            if oldest.counted and unnamed is not None:\n",
        "            if oldest.counted and unnamed is None:\n",
        "a client with more than sixteen behind its anchor gets the others twice",
        SESSION,
    ),
    Mutant(
        "the-log-runs-ahead",
        "bridge/service/streams/session.py",
        "        self._pending = {}\n",
        "        self._pending = None\n",
        "who has just come gets what was published behind its ready before what was published before (this one bit)",
        WORLD,
    ),
    Mutant(
        "anchor-of-a-dead-queue",
        "bridge/service/streams/hub.py",
        "        self._watermarks_seen = self._hub.watermarks\n\n    def ask_for_proof",
        "        pass\n\n    def ask_for_proof",
        "a client's place jumps over what fell in while its queues were gone",
        "tests/unit/test_hub.py",
    ),
    Mutant(
        "buffer-without-end",
        "bridge/service/streams/session.py",
        "        if self._buffer_overflowed:\n            # The new",
        "        if False:\n            # The new",
        "what was too much for the buffer during a replay is lost",
        WORLD,
    ),
    Mutant(
        "buffered-only-from-the-answer-on",
        "bridge/service/streams/session.py",
        "        self._live_from = watermark\n        self._overlapping = True\n",
        "        self._live_from = watermark\n        self._overlapping = True\n        self._clear_buffer()\n",
        "a client far behind gets what came while a later watermark was asked for out of order (this one bit)",
        WORLD,
    ),
    Mutant(
        "tail-read-forgets",
        "bridge/service/streams/session.py",
        "        excess = len(self._recent) - (OVERLAP_IDS if self._overlapping else RECENT_IDS)\n",
        "        excess = len(self._recent) - RECENT_IDS\n",
        "a busy client gets hundreds of events twice after each return (this one bit)",
        SESSION,
    ),
    Mutant(
        "full-backlog-swallows",
        "bridge/service/streams/session.py",
        "self._max_bytes)\n        ):\n            return False\n",
        "self._max_bytes)\n        ):\n            return True\n",
        "a client that reads slowly loses events of its replay",
        WORLD,
    ),
    Mutant(
        "any-anchor-will-do",
        "bridge/service/broker/eventlog.py",
        "            if request.replay.check != check:",
        "            if False:",
        "a cursor of a log that was deleted is resumed in the new one, at a place that means nothing",
        "tests/integration/test_resume.py::test_hostile_cursors_are_told_a_gap_and_stream_on",
    ),
    Mutant(
        "gap-before-the-queue",
        "bridge/service/streams/session.py",
        "        self.state = State.DETACHED if self.is_ready else State.OPENING\n",
        "        self.state = State.DETACHED if self.is_ready else State.OPENING\n"
        '        self._backlog.append(sse.encode_gap("no-log"))\n',
        "a page fetches its state before the new queue is bound, and misses what falls between",
        SESSION,
    ),
    Mutant(
        "log-of-everybody",
        "bridge/service/streams/hub.py",
        "        self._prefixes = [audience.prefix for audience in audiences]\n",
        '        self._prefixes = [*(audience.prefix for audience in audiences), "user.43."]\n',
        "a client sees events of others in its replay",
        "tests/integration/test_resume.py::test_a_cursor_of_another_user_discloses_nothing",
    ),
    Mutant(
        "busy-is-dead",
        "bridge/service/broker/consumer.py",
        "        elif deliveries.takes and now - self._passed_at > QUIET_SECONDS:\n",
        "        elif False:\n",
        "every half minute under load all queues are lost, because the library hears no heartbeat",
        "tests/integration/test_broker.py::test_a_connection_that_brings_nothing_but_events_is_not_taken_for_dead",
    ),
    Mutant(
        "groups-are-never-there",
        "bridge/service/broker/live.py",
        "                        self._epoch.check_waiting(group)\n",
        "                        self._epoch.check_waiting(None)\n",
        "after a reconnect nobody with a group is live again",
        "tests/integration/test_broker.py::test_everyone_is_on_each_of_their_groups_again",
    ),
    Mutant(
        "blocked-is-written-to",
        "bridge/service/streams/writer.py",
        "        if connection is None or self._blocked_since is not None or self._transport.is_closing():\n",
        "        if connection is None or self._transport.is_closing():\n",
        "a client that reads nothing fills the memory of the process",
        "tests/integration/test_stream.py::test_a_client_that_falls_behind_is_told_slow",
    ),
    Mutant(
        "infinity-is-null",
        "bridge/event.py",
        'return None if b"null" in text or',
        "return None if",
        "a page reads null where the worker wrote what is no number, and nobody is told",
        "tests/property/test_event.py",
    ),
    Mutant(
        "anything-is-as-written",
        "bridge/event.py",
        "if text != data or b",
        "if b",
        "members that nobody declared, or that stand twice, reach the page as they were published",
        "tests/unit/test_event.py",
    ),
    Mutant(
        "acks-after-the-close",
        "bridge/service/broker/deliveries.py",
        "            self._sinks[channel] = _discard\n            self._last_tags.pop(channel, None)\n",
        "            self._sinks[channel] = _discard\n",
        "whoever ends reading the log closes the connection for all who read it",
        "tests/property/test_deliveries.py",
    ),
    Mutant(
        "large-bodies-are-gathered",
        "bridge/service/broker/deliveries.py",
        "            delivery.is_cut = delivery.size > self.max_body\n",
        "",
        "a body of 10 MB to a user with 20 streams delays everybody by seconds",
        "tests/property/test_deliveries.py",
    ),
    Mutant(
        "any-frame-is-waited-for",
        "bridge/service/broker/deliveries.py",
        "                if length > max_frame and (kind != _HEADER or length > self._max_header):\n",
        "                if length > UNLIMITED_BYTES:\n",
        "a length of 512 MiB is waited for, and buffered",
        "tests/property/test_deliveries.py",
    ),
    Mutant(
        "a-flood-hides-the-others",
        "bridge/service/broker/quarantine.py",
        "        elif not self._budgets[reason].take(self._clock()):\n",
        "        elif not self._budgets[routing_key].take(self._clock()):\n",
        "refused messages of one kind keep all others out of the quarantine",
        "tests/unit/test_quarantine.py",
    ),
    Mutant(
        "an-older-reading-decides",
        "bridge/service/http/keys.py",
        "            self._needs[token.digest] = self._begun + 1\n",
        "            self._needs[token.digest] = self._begun\n",
        "a page with a new key gets 401 for good, from a key set whose reading began before the key was shown",
        "tests/unit/test_auth.py",
    ),
    Mutant(
        "strangers-have-no-budget",
        "bridge/service/budgets.py",
        "        if self.left(now) < 1:\n",
        "        if self.left(now) < -1e9:\n",
        "anybody has the bridge flood the identity provider",
        "tests/unit/test_auth.py",
    ),
    Mutant(
        "claims-are-read-last",
        "bridge/service/http/auth.py",
        "                    self._reader.read(token.claims, now)\n                unverified",
        "                    pass\n                unverified",
        "tokens of other issuers have the key set read, and use up the budget",
        "tests/unit/test_auth.py",
    ),
]
