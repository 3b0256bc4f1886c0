"""Presentation times made usable: from zero, strictly increasing, gaps filled, restarts joined on."""

from __future__ import annotations

import math

RESTART_SECONDS = 1.0
"""A time stamp that falls back by more than this is a new beginning, not a wobble."""


class Timeline:
    """Places raw time stamps on one axis whose first frame is at 0.

    - Good stamps are kept exactly, whatever their spacing.
    - A missing stamp is the last time plus one frame period.
    - A stamp that does not move on (two frames with one time) is put a hundredth of a period after the last.
    - A stamp that falls back by more than a second (the source began anew) starts one period after the last frame,
      and everything behind it is shifted alike.
    - So does the first stamp behind a beginning that had none (RTSP begins so), unless it lies in the second after it.
    """

    def __init__(self, period_seconds: float, origin_seconds: float | None = None) -> None:
        """``origin_seconds`` is the stamp that is time 0; by default the first one that comes."""
        self.period_seconds = period_seconds
        self._origin_seconds = origin_seconds
        self._last_seconds = 0.0 if origin_seconds is None else -math.inf
        self._pending_join = False
        self._origin_is_guessed = False

    def restart(self, gap_seconds: float = 0.0) -> None:
        """The source begins anew: its next frame comes one period, plus ``gap_seconds``, after the last one."""
        if self._origin_seconds is not None:
            self._pending_join = True
            self._last_seconds += max(0.0, gap_seconds)

    def place(self, raw_seconds: float | None) -> float:
        """The time of the next frame, given its stamp (None where the source has none)."""
        if raw_seconds is not None and not math.isfinite(raw_seconds):
            raw_seconds = None
        if self._origin_seconds is None:
            self._origin_seconds, self._origin_is_guessed = raw_seconds or 0.0, raw_seconds is None
            return 0.0
        following = self._last_seconds + self.period_seconds
        seconds = following if raw_seconds is None else raw_seconds - self._origin_seconds
        is_astray = self._origin_is_guessed and not self._last_seconds < seconds <= self._last_seconds + RESTART_SECONDS
        if raw_seconds is not None:
            self._origin_is_guessed = False
        if self._pending_join or is_astray or seconds < self._last_seconds - RESTART_SECONDS:
            self._origin_is_guessed = raw_seconds is None
            self._pending_join = False
            self._origin_seconds = (raw_seconds or 0.0) - following
            seconds = following
        elif seconds <= self._last_seconds:
            seconds = max(self._last_seconds + self.period_seconds / 100, math.nextafter(self._last_seconds, math.inf))
        self._last_seconds = seconds
        return seconds
