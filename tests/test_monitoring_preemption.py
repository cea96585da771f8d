"""Stop requests in one process; several processes are covered by test_launch_processes.py."""

import os
import signal
import threading

import pytest

from shardtrain.monitoring.preemption import PREEMPTED_EXIT_CODE, Preempted, Preemption


def test_sigterm_stops_after_the_current_step_and_restores_the_handler():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption() as preemption:
        assert preemption.watching
        assert not preemption.should_stop(1)
        os.kill(os.getpid(), signal.SIGTERM)
        assert preemption.should_stop(2)
        assert preemption.should_stop(3)
        assert preemption.reason == "SIGTERM"
    assert signal.getsignal(signal.SIGTERM) is before
    assert not preemption.watching


def test_first_ctrl_c_asks_second_interrupts(capfd):
    before = signal.getsignal(signal.SIGINT)
    with Preemption() as preemption:
        os.kill(os.getpid(), signal.SIGINT)
        assert preemption.should_stop(1)
        assert preemption.reason == "SIGINT"
        assert "Ctrl-C again to interrupt at once" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_handlers_come_back_after_an_exception():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ZeroDivisionError), Preemption():
        _ = 1 / 0
    assert signal.getsignal(signal.SIGINT) is before


def test_ignored_signals_stay_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with Preemption() as preemption:
            os.kill(os.getpid(), signal.SIGINT)
            assert not preemption.should_stop(1)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_outside_the_main_thread_it_says_that_signals_are_not_caught():
    seen = []

    def work():
        with pytest.warns(UserWarning, match="outside the main thread"), Preemption() as preemption:
            seen.append((preemption.watching, preemption.should_stop(1)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=10)
    assert seen == [(False, False)]


def test_distributed_mode_leaves_sigterm_to_jax_and_warns_if_somebody_took_it():
    before = signal.getsignal(signal.SIGTERM)
    with Preemption(distributed=True) as preemption:
        assert signal.getsignal(signal.SIGTERM) is before
        assert preemption.watching
    signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with pytest.warns(UserWarning, match="replaced the preemption notice"):
            Preemption(distributed=True).__enter__()
    finally:
        signal.signal(signal.SIGTERM, before)


def test_preempted_leaves_with_code_42():
    with pytest.raises(SystemExit) as caught:
        raise Preempted(step=12)
    assert caught.value.code == PREEMPTED_EXIT_CODE == 42
    assert str(caught.value) == "preempted; state saved at step 12"
