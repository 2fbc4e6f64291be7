"""Token buckets: they limit how much may be used at once, and refill at a fixed rate.

Pure: `now` is an argument, in seconds. A clock that is set back changes no bucket.
"""

from __future__ import annotations

from collections import OrderedDict


class Budget:
    """One bucket.

    Args:
        burst: the size of the bucket: the most that may be used at once.
        every: seconds until the bucket has one more.
    """

    __slots__ = ("_at", "_burst", "_every", "_left")

    def __init__(self, burst: float, every: float) -> None:
        self._burst = burst
        self._every = every
        self._left = float(burst)
        self._at: float | None = None

    def left(self, now: float) -> float:
        """The amount that is left. It is negative after a `spend` of more than that."""
        if self._at is not None:
            self._left = min(self._burst, self._left + max(0.0, now - self._at) / self._every)
        self._at = now
        return self._left

    def take(self, now: float) -> bool:
        """Uses one and returns True, or returns False if less than one is left."""
        if self.left(now) < 1:
            return False
        self._left -= 1
        return True

    def spend(self, amount: float, now: float, *, debt: float) -> None:
        """Subtracts an amount that was used already. The balance does not fall below `-debt`."""
        self._left = max(min(self.left(now), -debt), self.left(now) - amount)

    def seconds_until(self, amount: float, now: float) -> float:
        """Seconds until `amount` is left; 0 if it is left now."""
        return max(0.0, (amount - self.left(now)) * self._every)


class Budgets:
    """One bucket for each key, such as a user.

    A full bucket is deleted: it equals a new one. Above `most` buckets, the least recently used one is deleted, so that
    the memory is bounded (about 300 bytes for each key).
    """

    def __init__(self, burst: float, every: float, *, most: int) -> None:
        assert most > 0
        self.burst = burst
        self.every = every
        self._most = most
        self._budgets: OrderedDict[str, Budget] = OrderedDict()  # The most recently used one is at the end.

    def __len__(self) -> int:
        return len(self._budgets)

    def left(self, key: str, now: float) -> float:
        budget = self._budgets.get(key)
        return self.burst if budget is None else budget.left(now)

    def seconds_until(self, key: str, amount: float, now: float) -> float:
        budget = self._budgets.get(key)
        return 0.0 if budget is None else budget.seconds_until(amount, now)

    def take(self, key: str, now: float) -> bool:
        """Uses one from this key's bucket, as `Budget.take`."""
        return self._use(key, now).take(now)

    def spend(self, key: str, amount: float, now: float, *, debt: float) -> None:
        self._use(key, now).spend(amount, now, debt=debt)

    def _use(self, key: str, now: float) -> Budget:
        budget = self._budgets.get(key)
        if budget is None:
            budget = self._budgets[key] = Budget(self.burst, self.every)
            self._forget(now)
        else:
            self._budgets.move_to_end(key)
        return budget

    def _forget(self, now: float) -> None:
        # Checks two old buckets for each new one: full ones disappear faster than new ones appear, without a full walk.
        for _ in range(2):
            oldest = next(iter(self._budgets))
            is_full = self._budgets[oldest].left(now) >= self.burst
            if len(self._budgets) > self._most or (is_full and len(self._budgets) > 1):
                del self._budgets[oldest]
