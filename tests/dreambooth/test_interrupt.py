from __future__ import annotations

import os
import signal
import threading

import pytest

from colabtools.dreambooth.interrupt import deferred_interrupt


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_noted_and_the_second_interrupts(number: int) -> None:
    before = signal.getsignal(number)
    with deferred_interrupt() as asked:
        assert not asked.is_set()
        os.kill(os.getpid(), number)
        assert asked.is_set()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


def test_another_thread_may_train_but_catches_no_signals() -> None:
    seen: list[bool] = []

    def work() -> None:
        with deferred_interrupt() as asked:
            seen.append(asked.is_set())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [False]
