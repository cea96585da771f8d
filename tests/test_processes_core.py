"""The core on two real processes (gloo): the same numbers as in one."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

pytestmark = pytest.mark.processes
WORKER = Path(__file__).with_name("core_worker.py")


@pytest.fixture(scope="module")
def reports():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port = str(found.getsockname()[1])
    environment = {
        **{k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")},
        "JAX_PLATFORMS": "cpu",
        "no_proxy": "localhost,127.0.0.1",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(i), port],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [w.communicate(timeout=200) for w in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    lines = [line for out, _ in outputs for line in out.splitlines() if line.startswith("REPORT ")]
    return [json.loads(line.removeprefix("REPORT ")) for line in lines]


def one_device():
    """The same three steps in plain JAX."""
    x = jnp.linspace(-1, 1, 16 * 8).reshape(16, 8)
    mask = (jnp.arange(16) < 11).astype(jnp.float32)

    def loss(params):
        error = (jnp.tanh(x @ params["w"] + params["b"]) - 1.0).sum(-1) ** 2
        return jnp.sum(error * mask) / 11.0

    params = {"w": jax.random.normal(jax.random.key(0), (8, 4)), "b": jnp.zeros((4,))}
    optimizer, history = optax.adam(0.1), []
    state = optimizer.init(params)
    for _ in range(3):
        value, grads = jax.value_and_grad(loss)(params)
        norm = jnp.sqrt(sum(jnp.sum(g**2) for g in jax.tree.leaves(grads)))
        history.append([float(value), float(norm)])
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return history, float(loss(params))


def test_two_processes_equal_one_device(reports):
    history, evaluated = one_device()
    assert len(reports) == 2
    for report in reports:
        np.testing.assert_allclose(report["losses"], history, rtol=1e-5)
        np.testing.assert_allclose(report["evaluated"], evaluated, rtol=1e-5)
    assert reports[0]["losses"] == reports[1]["losses"]


def test_dcn_keeps_fsdp_inside_a_host(reports):
    assert reports[0]["hosts"] == [0, 0, 1, 1]
    assert reports[0]["held"] == [[4, 4], [4, 4]]


def test_one_trace_and_the_same_refusals(reports):
    for report in reports:
        assert report["traces"] == 1
        assert "x: shape (16, 8) planned, (8, 8) given" in report["refused"]
