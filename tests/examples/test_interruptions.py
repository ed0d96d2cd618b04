"""Signals put off, and signals treated alike."""

import signal
import threading

import pytest

from examples.interruptions import interruptions_deferred, leave_interrupts_to_parent, termination_interrupts


def test_second_signal_is_not_held_back() -> None:
    assert threading.current_thread() is threading.main_thread()
    # As usual is as in a terminal: a shell ignores the signal in what it runs in the background.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with interruptions_deferred() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert interrupted.is_set
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_termination_interrupts_only_inside() -> None:
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with pytest.raises(KeyboardInterrupt), termination_interrupts():
            signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before)


def test_interrupts_are_left_to_the_parent() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        leave_interrupts_to_parent()
        signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
