"""`st.simulate` in fresh processes: devices are fixed once JAX has started."""

import os
import subprocess
import sys

import jax
import optax
import pytest

import shardtrain as st
from shardtrain.errors import SimulationError


def run(code: str, **environment: str) -> str:
    keep = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "JAX_NUM_CPU_DEVICES")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**keep, "JAX_PLATFORMS": "cpu", **environment},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_before_jax_started():
    code = "import shardtrain as st, jax; print(len(st.simulate(3)), jax.device_count())"
    assert run(code) == "3 3\n"


def test_after_jax_started_says_what_to_do_and_reset_mends_it():
    out = run(
        "import os, jax, shardtrain as st\n"
        "x = jax.numpy.ones(3)\n"
        "os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=8'\n"
        "try:\n    st.simulate(4)\nexcept st.errors.SimulationError as e:\n    print(e)\n"
        "print(len(st.simulate(4, reset=True)), float(jax.numpy.ones(3).sum()))\n"
        "print(len(st.simulate(2)), jax.device_count())\n"
        "print(len(st.simulate(2, reset=True)), jax.device_count())\n"
    )
    error, more, fewer, again = out.splitlines()
    assert error.startswith("JAX already started with 1 CPU device, so it cannot show 4. XLA_FLAGS")
    assert "Restart the kernel and run st.simulate(4) before any JAX call" in error
    assert "st.simulate(4, reset=True)" in error
    assert more == "4 3.0"
    assert fewer == "2 4"  # enough devices: nothing is reset, two of them are handed out
    assert again == "2 2"


def test_a_plan_runs_after_a_reset():
    out = run(
        "import jax, jax.numpy as jnp, optax, shardtrain as st\n"
        "jax.jit(lambda x: x + 1)(jnp.ones(2))\n"
        "st.simulate(2, reset=True)\n"
        "model = st.Functional(init=lambda key: {'w': jnp.zeros(4)})\n"
        "loss = lambda v, b: jnp.mean((b['x'] @ v['w'] - 1.0) ** 2)\n"
        "plan = st.plan(model, loss, optax.sgd(0.1), {'x': jnp.ones((4, 4))}, 'data=2')\n"
        "print(float(plan.step(plan.init(), {'x': jnp.ones((4, 4))})[1]['loss']))\n"
    )
    assert out == "1.0\n"


def test_environment_is_overruled_before_start():
    code = "import shardtrain as st; print(len(st.simulate(3)))"
    assert run(code, JAX_NUM_CPU_DEVICES="5") == "3\n"


def test_flag_in_the_environment_is_named_when_it_wins_or_is_overruled():
    code = (
        "import shardtrain as st\n"
        "try:\n    print(len(st.simulate(3)))\nexcept st.errors.SimulationError as e:\n"
        "    print('refused', 'XLA_FLAGS' in str(e))\n"
    )
    flags = "--xla_force_host_platform_device_count=5"
    assert run(code, XLA_FLAGS=flags) in ("3\n", "refused True\n")


@pytest.mark.parametrize("count", [0, -1, 2.0, "8", True, None])
def test_only_whole_numbers(count):
    with pytest.raises(SimulationError, match="whole number of devices >= 1"):
        st.simulate(count)


def test_enough_devices_is_no_reset(devices):
    assert st.simulate(8) == devices
    assert st.simulate(2) == devices[:2]
    with pytest.raises(SimulationError, match="JAX already started with 8 CPU devices"):
        st.simulate(9)
    assert jax.devices() == devices


def test_devices_made_by_simulate_have_threads_to_wait_in():
    code = (
        "import os, shardtrain as st\nst.simulate(2); print(os.environ['NPROC'])\n"
        "st.simulate(4, reset=True); print(os.environ['NPROC'])"
    )
    assert run(code, NPROC="3") == "16\n32\n"


def test_a_plan_on_devices_with_too_few_threads_says_so(monkeypatch):
    model = st.Functional(init=lambda key: {"w": jax.numpy.zeros((4,))})
    batch = {"x": jax.ShapeDtypeStruct((8, 4), "float32")}
    make = lambda: st.plan(
        model, lambda v, b: jax.numpy.mean((b["x"] @ v["w"]) ** 2), optax.sgd(0.1), batch, "data=8"
    )
    assert make().findings == ()
    monkeypatch.setenv("NPROC", "9")
    assert make().findings == (
        "8 CPU devices share 9 XLA threads: collectives can wait for each other for ever (XLA "
        "aborts after 40 s). Make the devices with st.simulate(8), or set NPROC=64 before JAX "
        "starts",
    )
