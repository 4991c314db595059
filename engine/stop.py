"""A run that is asked to stop: what it waits for may be broken off, what it writes or updates is finished first."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class StopAsked(BaseException):
    """Raised in a wait that may be broken off. No Exception: nothing on the way treats it as a failure."""


class StopRequest:
    """Whether somebody asked the run to stop. `ask` is called by a signal handler, in the main thread."""

    def __init__(self) -> None:
        self.reason = ""
        """Who asked, for example SIGTERM; empty while nobody has."""
        self._breakable = False

    def ask(self, reason: str) -> None:
        """Note it; a breakable wait ends here and now."""
        self.reason = self.reason or reason
        if self._breakable:
            # Ray turns what a handler raises during its waits into KeyboardInterrupt, so this is no other.
            self._breakable = False
            raise KeyboardInterrupt

    @contextmanager
    def breakable(self) -> Iterator[None]:
        """Raises StopAsked where the run was, or is meanwhile, asked to stop."""
        if self.reason:
            raise StopAsked(self.reason)
        self._breakable = True
        try:
            yield
        except KeyboardInterrupt:
            if self.reason:
                raise StopAsked(self.reason) from None
            raise
        finally:
            self._breakable = False
