"""Which tokens are refused although they have not expired: those of a user that were issued before a moment.

Pure. Every replica has the same table, because every replica reads the same control stream.
"""

from __future__ import annotations

from collections import OrderedDict

MAX_USERS = 100_000
"""Users with a revocation, about 20 MB. Above this, the oldest revocation is forgotten."""


class Revocations:
    def __init__(self) -> None:
        self._until: OrderedDict[str, float] = OrderedDict()

    def __len__(self) -> int:
        return len(self._until)

    def revoke(self, user: str, until: float) -> bool:
        """Refuses the user's tokens that were issued before `until` (seconds since 1970). A later moment stays.

        Returns:
            False: the table was full, and another user's revocation was forgotten.
        """
        self._until[user] = max(until, self._until.pop(user, until))
        if len(self._until) <= MAX_USERS:
            return True
        self._until.popitem(last=False)
        return False

    def refuses(self, user: str, issued_at: float | None) -> bool:
        """Whether a token is refused. One that does not say when it was issued (`iat`) counts as old."""
        until = self._until.get(user)
        return until is not None and (issued_at is None or issued_at < until)
