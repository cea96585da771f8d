"""The roll call and `init_distributed`'s checks: threads stand for processes, no JAX start."""

import os
import socket
import subprocess
import sys
import threading

import jax
import pytest

from shardtrain.errors import DistributedError
from shardtrain.launch import ProcessLayout, init_distributed
from shardtrain.launch.addresses import (
    default_bind_address,
    is_loopback,
    refuse_loopback,
    require_own_name,
    split_address,
)
from shardtrain.launch.command import free_port
from shardtrain.launch.environment import detect_layout
from shardtrain.launch.roll_call import roll_call
from shardtrain.launch.worker import install_excepthook

pytestmark = pytest.mark.timeout(60)
FACTS = {"jax": "0.10.2"}


def meet(*guests, timeout=20.0, address=None):
    """Run `roll_call(index, count, facts)` for each guest at once; text of each one's error."""
    address = address or f"127.0.0.1:{free_port()}"
    errors: dict[int, str] = {}

    def join(number, index, count, facts=FACTS):
        try:
            roll_call(index, count, address, address, facts=facts, timeout=timeout)
            errors[number] = ""
        except DistributedError as error:
            errors[number] = str(error)

    threads = [threading.Thread(target=join, args=(i, *guest)) for i, guest in enumerate(guests)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [errors[i] for i in range(len(guests))]


def test_all_meet_in_any_order_and_the_port_is_free_again():
    address = f"127.0.0.1:{free_port()}"
    for _ in range(3):
        assert meet((2, 4), (1, 4), (3, 4), (0, 4), address=address) == [""] * 4
    with socket.create_server(("127.0.0.1", split_address(address)[1]), reuse_port=False):
        pass


def test_missing_processes_are_named_everywhere():
    address = f"127.0.0.1:{free_port()}"
    errors = meet((0, 8), (5, 8), (1, 8), timeout=1.0, address=address)
    assert len(set(errors)) == 1
    assert errors[0].startswith(
        "Timed out after 1 s: 3 of 8 processes joined; missing 2, 3, 4, 6, 7. "
        f"Coordinator {address}."
    )


def test_without_process_0_the_others_say_what_they_tried():
    address = f"127.0.0.1:{free_port()}"
    (error,) = meet((3, 8), timeout=0.5, address=address)
    assert f"process 3 on {socket.gethostname()} could not reach process 0" in error
    assert "within 0.5 s" in error
    assert "refused" in error


def test_an_index_taken_twice_names_both(monkeypatch):
    pids = iter([11, 12, 13])
    monkeypatch.setattr("shardtrain.launch.roll_call.os.getpid", lambda: next(pids))
    errors = meet((0, 4), (2, 4), (2, 4))
    assert len(set(errors)) == 1
    assert errors[0].startswith("two processes have index 2: process 2 (pid 1")


@pytest.mark.parametrize(
    ("guest", "message"),
    [
        ((1, 3), "was told that there are 3 processes, process 0 was told 2"),
        ((2, 2), "indices run from 0 to 1"),
        ((1, 2, {"jax": "0.11"}), "the processes differ: jax: process 0 has '0.10.2', process 1"),
    ],
)
def test_disagreement_reaches_both(guest, message):
    errors = meet((0, 2), guest)
    assert errors[0] == errors[1]
    assert message in errors[0]


def test_strangers_on_the_port_are_ignored():
    address = f"127.0.0.1:{free_port()}"
    result: list[list[str]] = []
    server = threading.Thread(
        target=lambda: result.append(meet((0, 2), address=address, timeout=20))
    )
    server.start()
    for noise in (b"GET / HTTP/1.0\r\n\r\n", b"[1, 2]\n", b"\xff" * 5000, b""):
        stranger = None
        while stranger is None:
            try:
                stranger = socket.create_connection(split_address(address), timeout=5)
            except ConnectionRefusedError:
                continue
        with stranger:
            stranger.sendall(noise)
    assert meet((1, 2), address=address) == [""]
    server.join()
    assert result == [[""]]


def test_a_used_port_is_said():
    with socket.create_server(("127.0.0.1", 0)) as other:
        address = f"127.0.0.1:{other.getsockname()[1]}"
        (error,) = meet((0, 2), address=address)
    assert f"process 0 cannot listen on {address}" in error
    assert "in use" in error


def test_addresses():
    assert split_address("gpu007:8476") == ("gpu007", 8476)
    for wrong in ("gpu007", "gpu007:", ":8476", "gpu007:http"):
        with pytest.raises(DistributedError, match="is not host:port"):
            split_address(wrong)


def layout(coordinator, index=0, hosts: int | None = 2, first: bool | None = True):
    return ProcessLayout(index, 4, coordinator, None, "slurm", hosts, first)


@pytest.mark.parametrize("coordinator", ["127.0.0.1:1", "localhost:1", "[::1]:1"])
def test_a_loopback_coordinator_for_several_hosts_is_refused(coordinator):
    with pytest.raises(DistributedError, match="4 processes run on 2 hosts"):
        refuse_loopback(layout(coordinator))
    refuse_loopback(layout(coordinator, hosts=1))
    refuse_loopback(layout(coordinator, hosts=None))


def test_a_host_name_that_is_loopback_is_refused_only_away_from_that_host(monkeypatch):
    monkeypatch.setattr("shardtrain.launch.addresses._resolve", lambda host: "127.0.1.1")
    assert is_loopback("gpu007")
    refuse_loopback(layout("gpu007:1", first=True))
    with pytest.raises(DistributedError, match="gpu007:1 resolves here to a loopback address"):
        refuse_loopback(layout("gpu007:1", first=False))
    assert default_bind_address(layout("gpu007:1")) == "[::]:1"


def test_a_machine_that_does_not_know_its_own_name_is_told_so(monkeypatch):
    require_own_name("localhost")
    monkeypatch.setattr("shardtrain.launch.addresses._resolve", lambda host: None)
    with pytest.raises(DistributedError, match=r"hosts: 127\.0\.0\.1 gpu007"):
        require_own_name("gpu007")


def test_the_coordinator_is_exposed_as_little_as_possible(monkeypatch):
    monkeypatch.setattr("shardtrain.launch.addresses._resolve", lambda host: "10.0.0.4")
    assert default_bind_address(layout("gpu007:1")) == "10.0.0.4:1"
    assert default_bind_address(layout("gpu007:1", hosts=1)) == "127.0.0.1:1"
    assert default_bind_address(layout("gpu007:1", hosts=None)) == "10.0.0.4:1"


# ------------------------------------------------------------------------------ init


def test_a_single_process_needs_nothing():
    assert init_distributed(environ={}) == detect_layout({})
    assert init_distributed(environ={}).process_count == 1


def test_too_late_is_an_error():
    jax.devices()
    with pytest.raises(DistributedError, match="comes too late"):
        init_distributed("127.0.0.1:1", 2, 0, environ={})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:1",), "also needs process_count, process_index"),
        (("127.0.0.1:1", 2), "also needs process_index"),
        (("127.0.0.1:1", 2, 2), "indices run from 0 to 1"),
    ],
)
def test_arguments_come_together(arguments, message):
    with pytest.raises(DistributedError, match=message):
        init_distributed(*arguments, environ={})


def test_without_our_launcher_an_uncaught_error_ends_the_process_at_once():
    code = (
        "import atexit, time; from shardtrain.launch.worker import install_excepthook\n"
        "install_excepthook({}); atexit.register(time.sleep, 60); raise KeyError('x')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=50, check=False,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stderr.endswith("KeyError: 'x'\n")
    assert callable(install_excepthook)
