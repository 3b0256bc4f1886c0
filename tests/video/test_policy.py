"""Policies by name, and the mailbox between two threads."""

from __future__ import annotations

import threading

import pytest
import torch

from sidestream.errors import InputError, SourceError
from sidestream.types import Frame
from sidestream.video.policy import Mailbox, Policy, StopFlag, parse_policy


def frame(index: int) -> Frame:
    return Frame(torch.zeros(1, 1, 3, dtype=torch.uint8), index, float(index))


def test_names() -> None:
    assert parse_policy("newest") == Policy("newest", 1)
    assert parse_policy("lossless") == Policy("lossless", None)
    assert parse_policy("bounded:8").capacity == 8


@pytest.mark.parametrize("text", ["", "latest", "bounded", "bounded:0", "bounded:-1", "bounded:x", "newest:2"])
def test_unknown_names_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="use 'newest', 'lossless' or 'bounded:N'"):
        parse_policy(text)


def test_mailbox_drops_the_oldest_and_counts() -> None:
    mailbox = Mailbox(2)
    for index in range(5):
        mailbox.put(frame(index))
    mailbox.finish()
    taken = [mailbox.get() for _ in range(3)]
    assert [each and each.index for each in taken] == [3, 4, None]
    assert mailbox.num_dropped == 3


def test_mailbox_hands_over_the_error_behind_the_last_frame() -> None:
    mailbox = Mailbox(1)
    mailbox.put(frame(0))
    mailbox.finish(SourceError("gone"))
    assert mailbox.get() is not None
    with pytest.raises(SourceError, match="gone"):
        mailbox.get()


def test_mailbox_flushed_counts_from_zero() -> None:
    mailbox = Mailbox(2)
    for index in range(5):
        mailbox.put(frame(index))
    assert not mailbox.is_empty
    mailbox.flush()
    assert mailbox.is_empty
    assert mailbox.num_dropped == 0
    for index in range(5, 8):
        mailbox.put(frame(index))
    taken = [mailbox.get() for _ in range(2)]
    assert [each and each.index for each in taken] == [6, 7]
    assert mailbox.num_dropped == 1


def test_mailbox_gives_nothing_once_stopped() -> None:
    stopped = StopFlag()
    mailbox = Mailbox(2, stopped)
    mailbox.put(frame(0))
    stopped.is_set = True
    assert mailbox.get() is None


def test_mailbox_wakes_a_waiting_reader() -> None:
    mailbox, taken = Mailbox(1), []
    reader = threading.Thread(target=lambda: taken.append(mailbox.get()))
    reader.start()
    mailbox.put(frame(7))
    reader.join(5)
    assert [each.index for each in taken if each] == [7]
