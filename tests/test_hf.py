"""Hugging Face checkpoints: the numbers of `transformers`, read in slices, written back bit by bit.

The checkpoints and logits below tests/data/hf were made with `transformers` (make_goldens.py).
"""

import functools
import json
import logging
import os
import re
import shutil
import sys
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import flax.linen as linen
import flax.nnx as nnx
import hf_models
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

import shardtrain as st
from shardtrain.errors import CheckpointError
from shardtrain.hf import source
from shardtrain.hf.pieces import Pieces, reshaped, splits_or_merges
from shardtrain.launch import launch
from shardtrain.models import from_hf_config
from shardtrain.pytree import leaves_by_path

ROOT = Path(__file__).with_name("data") / "hf"
FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
PIPELINE = "data=2,tensor=2,pipeline=2,num_microbatches=2"


@functools.cache
def golden(family):
    return safetensors.numpy.load_file(ROOT / family / "golden.safetensors")


def loss_fn(model, batch):
    return st.cross_entropy(model(batch["tokens"])[:, :-1], batch["tokens"][:, 1:])


def make_plan(family, strategy, adapt=lambda model: model, optimizer=None):
    devices = jax.devices()[:1] if strategy == "data=1" else None
    batch = {"tokens": golden(family)["tokens"]}
    model = adapt(from_hf_config(ROOT / family))
    return st.plan(model, loss_fn, optimizer or optax.adam(1e-2), batch, strategy, devices=devices)


def logits(plan, state, family):
    return np.asarray(plan.call(state, lambda model, x: model(x), golden(family)["tokens"]))


def files(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "golden.safetensors"}


# -- the numbers of transformers --------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["data=1", "data=2,fsdp=2,tensor=2", PIPELINE])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_the_way_back(family, strategy, devices, tmp_path):
    plan = make_plan(family, strategy)
    state = st.load_hf(ROOT / family, plan)
    for leaf, planned in zip(
        jax.tree.leaves(state), jax.tree.leaves(plan.abstract_state), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(planned.sharding, leaf.ndim)
    wanted = golden(family)["logits"]
    assert wanted.std() > 1
    np.testing.assert_allclose(logits(plan, state, family), wanted, rtol=0, atol=1e-5)
    st.export_hf(plan, state, tmp_path / "out", like=ROOT / family)
    assert files(tmp_path / "out") == files(ROOT / family)


def test_loaded_state_trains_like_one_that_was_given_its_values(devices):
    """The step donates the state: no shard may share memory with another or with a file."""
    before = files(ROOT / "gpt2")
    plan = make_plan("gpt2", "data=4,tensor=2")
    batch = {"tokens": golden("gpt2")["tokens"]}
    one = st.load_hf(ROOT / "gpt2", plan, seed=3)
    other = plan.init(3, variables=plan.model(one))
    for _ in range(3):
        one, mine = plan.step(one, batch)
        other, theirs = plan.step(other, batch)
    assert float(mine["loss"]) == float(theirs["loss"])
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)
    assert files(ROOT / "gpt2") == before


# -- fine-tuning ------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "strategy"), [("qwen3", "fsdp=8"), ("gpt2", PIPELINE)])
def test_corrections_are_added_up_on_the_way_back(family, strategy, devices, tmp_path):
    adapt = lambda model: st.lora(model, rank=2, targets="blocks/**/kernel", train="norm/*")
    plan, batch = make_plan(family, strategy, adapt), {"tokens": golden(family)["tokens"]}
    state = st.load_hf(ROOT / family, plan, seed=1)
    before = logits(plan, state, family)
    np.testing.assert_allclose(before, golden(family)["logits"], rtol=0, atol=1e-5)
    corrections = [x for p, x in leaves_by_path(state.params).items() if p.endswith("lora_a")]
    assert len(corrections) == {"qwen3": 14, "gpt2": 6}[family]  # a pipeline stacks layers
    assert all(np.std(x) > 0 for x in corrections)
    for _ in range(4):
        state, _ = plan.step(state, batch)
    tuned = logits(plan, state, family)
    assert np.abs(tuned - before).max() > 0.1
    st.export_hf(plan, state, tmp_path / "out", like=ROOT / family)
    plain = make_plan(family, "data=1")
    merged = st.load_hf(tmp_path / "out", plain)
    np.testing.assert_allclose(logits(plain, merged, family), tuned, rtol=0, atol=3e-5)
    embedding = {"gpt2": "transformer.wte.weight"}.get(family, "model.embed_tokens.weight")
    tensors = [source.open_source(d).tensors[embedding] for d in (tmp_path / "out", ROOT / family)]
    np.testing.assert_array_equal(*tensors)  # frozen


def test_frozen_in_the_dtype_of_the_file(devices, tmp_path, caplog):
    adapt = lambda model: st.lora(model, rank=2, dtype=jnp.bfloat16)
    plan = make_plan("qwen2", "data=2,fsdp=4", adapt)
    state = st.load_hf(ROOT / "qwen2", plan)
    assert {x.dtype for x in jax.tree.leaves(state.variables["frozen"])} == {jnp.dtype("bfloat16")}
    assert caplog.messages == []
    st.export_hf(plan, state, tmp_path / "out", like=ROOT / "qwen2")
    assert files(tmp_path / "out") == files(ROOT / "qwen2")


def test_part_of_it_frozen_under_a_pipeline(devices):
    plan = make_plan("gpt2", PIPELINE, lambda model: st.freeze(model, "embedding/*", "**/mlp/**"))
    state = st.load_hf(ROOT / "gpt2", plan)
    np.testing.assert_allclose(
        logits(plan, state, "gpt2"), golden("gpt2")["logits"], rtol=0, atol=1e-5
    )


# -- only what is needed ----------------------------------------------------------------------


@dataclass
class Reads:
    """What `Pieces.read` gave: bytes of each slice, and how many there were at once."""

    sizes: list[int] = field(default_factory=list)
    alive: int = 0
    most: int = 0

    def add(self, value):
        self.sizes.append(value.nbytes)
        self.alive += value.nbytes
        self.most = max(self.most, self.alive)
        weakref.finalize(value, self.gone, value.nbytes)

    def gone(self, size):
        self.alive -= size


@pytest.fixture
def reads(monkeypatch):
    found, whole = Reads(), Pieces.read

    def counted(self, index, dtype):
        value = whole(self, index, dtype)
        found.add(value)
        return value

    monkeypatch.setattr(Pieces, "read", counted)
    return found


def mapped_bytes(name):
    """Resident bytes of mapped files of this name, in the kernel's own words."""
    text = Path("/proc/self/smaps").read_text()
    parts = re.split(r"^(?=[0-9a-f]+-[0-9a-f]+ )", text, flags=re.MULTILINE)
    resident = [re.search(r"^Rss: +(\d+) kB", p, re.MULTILINE) for p in parts if name in p]
    return sum(int(r[1]) * 1024 for r in resident if r is not None)


@pytest.mark.parametrize("strategy", ["fsdp=8", "data=2,pipeline=4,num_microbatches=4"])
def test_each_slice_is_read_once_and_no_more_than_one_array_is_in_memory(
    strategy, devices, tmp_path, reads, monkeypatch
):
    directory = hf_models.save(tmp_path / "source")
    plan = hf_models.make_plan(strategy)
    total = sum(x.nbytes for x in hf_models.tensors().values())
    largest = hf_models.WIDTH**2 * 4
    resident, release = [], source.Source.release

    def watched(self):
        if sys.platform == "linux":
            resident.append(mapped_bytes(str(directory)))
        release(self)

    monkeypatch.setattr(source.Source, "release", watched)
    state = st.load_hf(directory, plan, hf_models.MAPPING)
    slices = 8 if strategy == "fsdp=8" else 1
    assert sum(reads.sizes) == sum(x.nbytes for x in jax.tree.leaves(state.params)) == total
    assert max(reads.sizes) == largest // slices
    assert reads.most <= 2 * largest // slices  # one that is read, one on its way to a device
    assert reads.alive == 0
    assert all(n < 1.3 * largest for n in resident), resident
    assert len(resident) == (len(reads.sizes) if sys.platform == "linux" else 0)
    assert sys.platform != "linux" or mapped_bytes(str(directory)) == 0


@pytest.mark.processes
def test_two_processes_read_one_half_each_and_write_the_same_files(tmp_path, capfd):
    hf_models.save(tmp_path / "source")
    worker = Path(__file__).with_name("hf_worker.py")
    environ = os.environ | {
        "PYTHONPATH": str(worker.parents[1]),
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": "2",
    }
    command = [sys.executable, str(worker), str(tmp_path), "fsdp=4"]
    assert launch(command, 2, run_directory=tmp_path / "run", environ=environ) == 0
    lines = [x.split("REPORT ")[1] for x in capfd.readouterr().out.splitlines() if "REPORT" in x]
    reports = [json.loads(line) for line in lines]
    assert len(reports) == 2
    biases = hf_models.LAYERS * hf_models.WIDTH * 4
    for report in reports:
        assert report["total"] == 2 * 2**22 + biases
        assert report["read"] <= report["total"] / 2 + biases
        assert report["largest"] == hf_models.WIDTH**2
    assert files(tmp_path / "out") == files(tmp_path / "source")


# -- names ------------------------------------------------------------------------------------


class Stacked(nnx.Module):
    """The same layers, scanned."""

    def __init__(self, rngs):
        make = nnx.vmap(hf_models.Layer, axis_size=hf_models.LAYERS)
        self.layers = make(rngs.split(hf_models.LAYERS))

    def __call__(self, x):
        @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
        def run(layer, x):
            return layer(x)

        return run(self.layers, x)


@pytest.mark.parametrize("strategy", ["fsdp=8", "data=2,pipeline=4,num_microbatches=4"])
def test_layers_of_a_file_become_a_stack(strategy, devices, tmp_path):
    directory = hf_models.save(tmp_path / "source")
    mapping = {
        name: (rule[0].replace("*/", ""), rule[1])
        if isinstance(rule, tuple)
        else "layers/down/bias"
        for name, rule in hf_models.MAPPING.items()
    }
    plan = hf_models.make_plan(strategy, model=Stacked)
    plain = hf_models.make_plan("data=1", devices[:1])
    state = st.load_hf(directory, plan, mapping)
    wanted = st.load_hf(directory, plain, hf_models.MAPPING)
    x = np.linspace(-1, 1, 8 * hf_models.WIDTH, dtype=np.float32).reshape(8, -1)
    run = lambda plan, state: np.asarray(plan.call(state, lambda model, x: model(x), x))
    np.testing.assert_allclose(run(plan, state), run(plain, wanted), rtol=1e-4, atol=1e-4)
    st.export_hf(plan, state, tmp_path / "out", directory, mapping)
    assert files(tmp_path / "out") == files(directory)


class TwoLayers(linen.Module):
    """Of two layers, in Linen."""

    @linen.compact
    def __call__(self, x):
        return linen.Dense(12, name="b", use_bias=False)(linen.Dense(8, name="a")(x))


def two_layers(variables, x):
    return (x @ variables["a"]["kernel"] + variables["a"]["bias"]) @ variables["b"]["kernel"]


def start(key):
    shapes = {"a": {"kernel": (16, 8), "bias": (8,)}, "b": {"kernel": (8, 12)}}
    return jax.tree.map(jnp.ones, shapes, is_leaf=lambda x: isinstance(x, tuple))


@pytest.mark.parametrize(
    ("model", "call"),
    [
        (TwoLayers(), lambda model, x: model(x)),
        (st.Functional(init=start), two_layers),
    ],
    ids=["linen", "functional"],
)
@pytest.mark.parametrize("strategy", ["fsdp=4,tensor=2", "data=4,tensor=2,sync=LocalSGD(2)"])
def test_other_kinds_of_models(model, call, strategy, devices, tmp_path):
    normal = np.random.default_rng(0).normal
    shapes = {"a.weight": (8, 16), "a.bias": (8,), "b.weight": (12, 8)}
    values = {name: normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    safetensors.numpy.save_file(values, tmp_path / "model.safetensors")
    mapping = {
        "a.weight": ("a/kernel", "transpose"),
        "a.bias": "a/bias",
        "b.weight": ("b/kernel", "transpose"),
    }
    batch = {"x": np.linspace(-1, 1, 8 * 16, dtype=np.float32).reshape(8, 16)}
    loss = lambda m, batch: st.Mean(jnp.sum(call(m, batch["x"]) ** 2), 8 * 12)
    strategy = st.Strategy.parse(strategy)
    plan = st.plan(st.lora(model, 2), loss, optax.sgd(0.1), batch, strategy)
    state = st.load_hf(tmp_path / "model.safetensors", plan, mapping)
    for _ in range(2):
        state, _ = plan.step(state, batch)
    out = st.export_hf(plan, state, tmp_path / "out", tmp_path / "model.safetensors", mapping)
    written = safetensors.numpy.load_file(out / "model.safetensors")
    np.testing.assert_array_equal(written["a.bias"], values["a.bias"])
    assert np.abs(written["b.weight"] - values["b.weight"]).max() > 1e-3
    hidden = batch["x"] @ written["a.weight"].T + written["a.bias"]
    tuned = np.asarray(plan.call(state, call, batch["x"]))
    np.testing.assert_allclose(hidden @ written["b.weight"].T, tuned, rtol=1e-4, atol=1e-4)


def test_parts_of_unequal_width_share_a_tensor(devices, tmp_path):
    fused = np.arange(6 * 4, dtype=np.float32).reshape(6, 4)
    safetensors.numpy.save_file({"qkv.weight": fused}, tmp_path / "model.safetensors")
    shapes = {"q": (4, 2, 2), "k": (4, 1), "v": (4, 1)}
    init = lambda key: {name: jnp.ones(shape) for name, shape in shapes.items()}
    loss = lambda v, batch: st.Mean(jnp.sum(batch["x"] @ v["k"]) + jnp.sum(v["q"]), 8)
    plan = st.plan(
        st.Functional(init=init),
        loss,
        optax.sgd(0.1),
        {"x": np.ones((8, 4), np.float32)},
        "fsdp=4,data=2",
    )
    mapping = {"qkv.weight": (("q", "k", "v"), "transpose")}
    state = st.load_hf(tmp_path / "model.safetensors", plan, mapping)
    np.testing.assert_array_equal(state.params["q"], fused.T[:, :4].reshape(4, 2, 2))
    np.testing.assert_array_equal(state.params["k"], fused.T[:, 4:5])
    np.testing.assert_array_equal(state.params["v"], fused.T[:, 5:])


def test_all_that_does_not_fit_is_said_at_once(devices, tmp_path):
    values = hf_models.tensors()
    values["head.weight"] = values.pop("layers.2.up.weight")
    values["layers.1.down.weight"] = values["layers.1.down.weight"][:100]
    values["layers.7.down.bias"] = values["layers.0.down.bias"]
    directory = hf_models.save(tmp_path / "source", values)
    with pytest.raises(CheckpointError) as error:
        st.load_hf(directory, hf_models.make_plan("fsdp=8"), hf_models.MAPPING)
    lines = str(error.value).splitlines()
    assert lines[0] == "4 tensors and parameters do not fit:"
    assert sorted(lines[1:5]) == [
        "  layers.1.down.weight for layers/1/down/kernel: [512, 100] does not become [512, 512]",
        "  missing: layers/2/up/kernel [512, 512], from layers.*.up.weight",
        "  unexpected: head.weight [512, 512]",
        "  unexpected: layers.7.down.bias [512]: the model has no layers/7/down/bias",
    ]


def test_left_out_on_the_way_in_and_copied_on_the_way_back(devices, tmp_path):
    """As older files of GPT-2 are: no prefix, and the causal masks among the weights."""
    old = safetensors.numpy.load_file(ROOT / "gpt2" / "model.safetensors")
    old = {name.removeprefix("transformer."): x for name, x in old.items()}
    for n in range(2):
        old[f"h.{n}.attn.bias"] = np.tril(np.ones((1, 1, 32, 32), np.bool_))
    (tmp_path / "old").mkdir()
    shutil.copy(ROOT / "gpt2" / "config.json", tmp_path / "old")
    safetensors.numpy.save_file(old, tmp_path / "old" / "model.safetensors")
    plan = make_plan("gpt2", "data=8")
    state = st.load_hf(tmp_path / "old", plan)
    np.testing.assert_allclose(
        logits(plan, state, "gpt2"), golden("gpt2")["logits"], rtol=0, atol=1e-5
    )
    st.export_hf(plan, state, tmp_path / "out", tmp_path / "old")
    assert files(tmp_path / "out") == files(tmp_path / "old")


@pytest.mark.parametrize("equal", [True, False])
def test_a_head_in_the_file_of_a_tied_model(equal, devices, tmp_path):
    values = safetensors.numpy.load_file(ROOT / "qwen2" / "model.safetensors")
    values["lm_head.weight"] = values["model.embed_tokens.weight"] * (1 if equal else 2)
    (tmp_path / "twice").mkdir()
    shutil.copy(ROOT / "qwen2" / "config.json", tmp_path / "twice")
    safetensors.numpy.save_file(values, tmp_path / "twice" / "model.safetensors")
    plan = make_plan("qwen2", "fsdp=8")
    if not equal:
        with pytest.raises(
            CheckpointError, match=r"embedding/embedding and hold different numbers"
        ):
            st.load_hf(tmp_path / "twice", plan)
        return
    state = st.load_hf(tmp_path / "twice", plan)
    st.export_hf(plan, state, tmp_path / "out", tmp_path / "twice")
    assert files(tmp_path / "out") == files(tmp_path / "twice")


@pytest.mark.parametrize(
    "rule",
    [3, ("a", "tranpose"), ("a/*/b/*", "transpose"), {"a": 1}],
)
def test_rules_that_are_none(rule, devices, tmp_path):
    directory = hf_models.save(tmp_path / "source")
    with pytest.raises(CheckpointError, match=r"mapping\['layers\.\*\.up\.weight'\]"):
        st.load_hf(directory, hf_models.make_plan("fsdp=8"), {"layers.*.up.weight": rule})


def test_reshapes_that_would_mix_dims_are_refused():
    assert splits_or_merges((4, 6), (2, 2, 6))
    assert splits_or_merges((4, 1, 6), (24,))
    assert not splits_or_merges((4, 6), (6, 4))
    assert not splits_or_merges((4, 6), (4, 7))
    with pytest.raises(CheckpointError, match="only by a copy"):
        reshaped(np.ones((4, 6)).T, (24,), "x")


# -- dtypes -----------------------------------------------------------------------------------


def test_conversions_are_said(devices, tmp_path, caplog):
    plan = make_plan("qwen2", "data=8")
    with caplog.at_level(logging.WARNING, "shardtrain.hf"):
        st.load_hf(ROOT / "qwen2", plan)
    (message,) = caplog.messages
    assert message.endswith("qwen2: 26 parameters bfloat16 -> float32 (exact)")


def test_rounding_needs_to_be_asked_for(devices, tmp_path, caplog):
    directory = hf_models.save(tmp_path / "source")
    half = lambda rngs: jax.tree.map(lambda x: x, hf_models.Model(rngs))
    plan = hf_models.make_plan("fsdp=8", model=st.freeze(half, "**/kernel", dtype=jnp.bfloat16))
    with pytest.raises(CheckpointError, match=r"8 parameters float32 -> bfloat16 .*cast=True"):
        st.load_hf(directory, plan, hf_models.MAPPING)
    state = st.load_hf(directory, plan, hf_models.MAPPING, cast=True)
    got = np.asarray(state.variables["frozen"]["layers"]["0"]["up"]["kernel"])
    wanted = hf_models.tensors()["layers.0.up.weight"].T.astype(hf_models.BFLOAT16)
    np.testing.assert_array_equal(got, wanted)
    assert "8 parameters float32 -> bfloat16 (rounded)" in caplog.text


# -- files ------------------------------------------------------------------------------------


def edit_index(directory, change):
    file = directory / source.INDEX
    index = json.loads(file.read_text())
    change(index["weight_map"])
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/hostname", "a.bin", 3])
def test_an_index_names_files_beside_it(name, tmp_path):
    directory = hf_models.save(tmp_path / "source")
    edit_index(directory, lambda files: files.update({"layers.0.up.weight": name}))
    with pytest.raises(CheckpointError, match="no file of this directory"):
        source.open_source(directory)


def test_files_that_are_missing_torn_or_of_another_format(tmp_path):
    directory = hf_models.save(tmp_path / "source")
    edit_index(directory, lambda files: files.pop("layers.0.up.weight"))
    with pytest.raises(CheckpointError, match=r"disagree about 1 tensors.*download complete"):
        source.open_source(directory)
    (directory / "a.safetensors").write_bytes((directory / "a.safetensors").read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"a\.safetensors"):
        source.open_source(directory)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*can execute code"):
        source.open_source(tmp_path / "other")
    with pytest.raises(CheckpointError, match="can execute code"):
        source.open_source(tmp_path / "other" / "pytorch_model.bin")


def test_links_of_a_download_cache_are_followed(devices, tmp_path):
    (tmp_path / "snapshot").mkdir()
    for file in (ROOT / "gpt2").iterdir():
        (tmp_path / "snapshot" / file.name).symlink_to(file)
    assert len(source.open_source(tmp_path / "snapshot").tensors) == 28


def test_export_does_not_mix_two_checkpoints(devices, tmp_path):
    plan = make_plan("gpt2", "data=8")
    state = st.load_hf(ROOT / "gpt2", plan)
    shutil.copy(ROOT / "llama" / "model-00001-of-00003.safetensors", tmp_path)
    with pytest.raises(CheckpointError, match="already has model-00001-of-00003"):
        st.export_hf(plan, state, tmp_path, ROOT / "gpt2")


def test_export_never_writes_what_it_reads(devices):
    plan = make_plan("gpt2", "data=8")
    with pytest.raises(CheckpointError, match="write elsewhere"):
        st.export_hf(plan, plan.init(), ROOT / "gpt2", ROOT / "gpt2")


def test_a_family_without_a_table(devices, tmp_path):
    directory = hf_models.save(tmp_path / "source")
    (directory / "config.json").write_text('{"model_type": "lama"}')
    with pytest.raises(CheckpointError, match=r"did you mean 'llama'.*mapping="):
        st.load_hf(directory, hf_models.make_plan("fsdp=8"))


def test_a_module_that_has_values_gets_those_of_the_file(devices):
    plan = make_plan("gpt2", "fsdp=8", lambda factory: factory(nnx.Rngs(0)))
    state = st.load_hf(ROOT / "gpt2", plan)
    np.testing.assert_allclose(
        logits(plan, state, "gpt2"), golden("gpt2")["logits"], rtol=0, atol=1e-5
    )
