"""Eight virtual CPU devices for every test, and one compilation cache for all workers."""

import os
import signal
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("NPROC", "64")  # XLA's threads, as `st.simulate(8)` sets them

import jax
import pytest

# A background job of a shell ignores Ctrl-C, and so would what the tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)

CACHE = os.environ.get(
    "SHARDTRAIN_TEST_CACHE", os.path.join(tempfile.gettempdir(), "shardtrain-test-cache")
)

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_compilation_cache_dir", CACHE)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


@pytest.fixture(scope="session")
def devices():
    """The eight devices; a test that would run on fewer must fail, not pass."""
    found = jax.devices()
    assert len(found) == 8, f"tests need 8 CPU devices, found {len(found)}"
    return found


@pytest.fixture(autouse=True)
def _eight_devices_remain():
    """A test that leaves fewer devices to the tests after it fails by its own name."""
    yield
    assert jax.config.jax_num_cpu_devices == 8, "the test changed the number of devices"
