"""A module of one's own, imported by a model whose state it holds."""

import itertools


class Store:
    """An object that counts."""

    def __init__(self) -> None:
        self.count = 0

    def up(self) -> int:
        """One more."""
        self.count += 1
        return self.count


class Tracker:
    """A class that counts."""

    count = 0

    @classmethod
    def up(cls) -> int:
        """One more."""
        cls.count += 1
        return cls.count


STORE, COUNTER, NUMBER = Store(), itertools.count(), 0


def up() -> int:
    """One more."""
    global NUMBER
    NUMBER += 1
    return NUMBER
