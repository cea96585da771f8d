"""Compiled programs are kept on disk unless the user says otherwise."""

import os
import subprocess
import sys

import jax
import optax

import shardtrain as st
from shardtrain.compile_cache import use_compile_cache

CODE = """
import jax, numpy as np, optax, shardtrain as st
print(jax.numpy.ones(3).sum())  # JAX has compiled something before
model = st.Functional(init=lambda key: {"w": jax.random.normal(key, (4,))})
loss = lambda v, batch: jax.numpy.mean(jax.numpy.sort(batch["x"] @ v["w"]) ** 2)
loader = st.DataLoader({"x": np.ones((16, 4), "f")}, 8)
jax.config.update("jax_enable_compilation_cache", False)
st.plan(model, loss, optax.adam(0.1), loader.abstract_batch)
print(jax.config.jax_compilation_cache_dir)
jax.config.update("jax_enable_compilation_cache", True)
plan = st.plan(model, loss, optax.adam(0.1), loader.abstract_batch)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
st.fit(plan, loader, 1)
"""


def test_a_plan_turns_the_cache_on_and_fit_says_where_it_is(tmp_path):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    place = tmp_path / "shardtrain" / "xla"
    lines = done.stdout.splitlines()
    assert lines[:3] == ["3.0", "None", f"compiled programs are kept in {place}"]
    assert any(file.name.startswith("jit_step-") for file in place.iterdir())


def test_a_directory_of_the_users_own_stays():
    chosen = jax.config.jax_compilation_cache_dir
    assert use_compile_cache() == chosen
    model = st.Functional(init=lambda key: {"w": jax.numpy.zeros(4)})
    batch = {"x": jax.ShapeDtypeStruct((8, 4), "float32")}
    st.plan(model, lambda v, b: jax.numpy.mean(b["x"] @ v["w"]), optax.sgd(0.1), batch)
    assert jax.config.jax_compilation_cache_dir == chosen
