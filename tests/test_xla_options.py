"""Compiler flags of a strategy: presets, flags by name, and what the compiler refuses."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.cli import main
from shardtrain.errors import HardwareError, KernelNeedsDevicesError, StrategyError, XlaOptionError
from shardtrain.planner.compiled import accepted_options
from shardtrain.xla_options import (
    PRESETS,
    compiler_options,
    describe_xla,
    renamed,
    xla_flags,
    xla_option_error,
)

BATCH = {"x": np.ones((8, 4), np.float32), "y": np.ones((8,), np.float32)}


def make_plan(xla: str, **options):
    model = st.Functional(init=lambda key: {"w": jnp.zeros((4,))})
    loss = lambda v, batch: jnp.mean((batch["x"] @ v["w"] - batch["y"]) ** 2)
    return st.plan(model, loss, optax.sgd(0.1), BATCH, st.Strategy(data=-1, xla=xla), **options)


def test_every_flag_says_why_and_who_says_so():
    for platforms in PRESETS.values():
        for flags in platforms.values():
            assert flags
            for flag in flags:
                assert flag.name.startswith("xla_")
                assert len(flag.why) > 10
                assert flag.source


def test_presets_and_flags_are_joined_and_the_later_wins():
    text = "cublas+xla_gpu_enable_triton_gemm=true+xla_gpu_autotune_level=2"
    assert compiler_options(text, "gpu") == {
        "xla_gpu_enable_triton_gemm": True,
        "xla_gpu_autotune_level": "2",
    }
    assert [f.name for f in xla_flags("large-vmem+cublas", "tpu")] == [
        "xla_tpu_scoped_vmem_limit_kib"
    ]
    assert compiler_options("off", "gpu") == {}


def test_values_are_typed_for_the_compiler():
    options = compiler_options("xla_a=False+xla_b=0.5+xla_c=8589934592+xla_d=text+xla_e=", "cpu")
    assert options == {
        "xla_a": False,
        "xla_b": "0.5",
        "xla_c": "8589934592",
        "xla_d": "text",
        "xla_e": "",
    }


@pytest.mark.parametrize("text", ["latency-hidin", "foo=1", "", "cublas+", "cublas=true"])
def test_what_is_neither_preset_nor_flag_is_refused(text):
    with pytest.raises(StrategyError, match=r"neither a preset|did you mean"):
        st.Strategy(xla=text)


def test_a_misspelt_preset_gets_the_nearest():
    with pytest.raises(StrategyError, match="did you mean 'latency-hiding'"):
        st.Strategy.parse("xla=latency-hidin")


def test_a_strategy_carries_it_as_text_and_json():
    s = st.Strategy.parse("data=2,xla=latency-hiding+xla_cpu_prefer_vector_width=128")
    assert s.xla == "latency-hiding+xla_cpu_prefer_vector_width=128"
    assert st.Strategy.parse(str(s)) == s
    assert st.Strategy.from_json(s.to_json()) == s


def test_a_known_flag_reaches_the_compiler_and_changes_nothing_else():
    plain, tuned = make_plan("off"), make_plan("xla_cpu_prefer_vector_width=128")
    assert tuned.xla_options == {"xla_cpu_prefer_vector_width": "128"}
    losses = []
    for plan in (plain, tuned):
        state, _ = plan.step(plan.init(), BATCH)
        state, metrics = plan.step(state, BATCH)
        losses.append(float(metrics["loss"]))
    assert losses[0] == losses[1]
    # The program is what the compiler was given the flag with: another one is refused there too.
    lowered = tuned._lower_step()
    with pytest.raises(jax.errors.JaxRuntimeError, match="No such compile option"):
        lowered.compile(compiler_options={"xla_no_such_flag": True})


def test_an_unknown_flag_is_an_error_before_anything_is_trained():
    with pytest.raises(XlaOptionError, match=r"No such compile option: 'xla_no_such_flag'.*off"):
        make_plan("xla_no_such_flag=true")


def test_a_value_of_the_wrong_kind_is_an_error():
    with pytest.raises(XlaOptionError, match="not a valid bool"):
        make_plan("xla_cpu_enable_fast_math=sometimes")


def test_the_flags_travel_to_another_compiler():
    plan = make_plan("xla_cpu_prefer_vector_width=128", hardware="cpu:8")
    assert plan.compile().argument_bytes == 52
    refused = make_plan("xla_no_such_flag=true", hardware="cpu:8")
    with pytest.raises(XlaOptionError, match="No such compile option"):
        refused.compile()


def test_other_complaints_of_the_compiler_are_left_alone():
    assert xla_option_error("RESOURCE_EXHAUSTED: out of memory", {}) is None


def test_a_flag_of_a_preset_is_passed_by_the_name_this_compiler_knows():
    names = [f"xla_gpu_{kind}" for kind in ("enable_pipelined_all_gather", "pipeline_all_gather")]
    asked = compiler_options("pipelined-collectives", "gpu")
    accepted = accepted_options(asked, jax.devices()[0])  # every compiler knows flags of GPUs
    assert len(accepted) == len(asked) == 4
    assert len([n for n in names if n in accepted]) == 1
    message = "INVALID_ARGUMENT: No such compile option: 'xla_gpu_enable_pipelined_all_gather'"
    assert renamed(message, {names[0]: True, "xla_a": "1"}) == {
        names[1]: "COLLECTIVE_PIPELINING_MODE_ON",
        "xla_a": "1",
    }
    assert renamed(message, {"xla_a": "1"}) is None


def test_what_a_run_prints():
    assert describe_xla("off", "gpu") == "the compiler's own defaults"
    assert describe_xla("cublas", "tpu") == "cublas: no flags on tpu"
    shown = describe_xla("no-command-buffers+xla_gpu_autotune_level=2", "gpu")
    assert shown == ("no-command-buffers: xla_gpu_enable_command_buffer= xla_gpu_autotune_level=2")
    rows = dict(make_plan("xla_cpu_prefer_vector_width=128").summary().rows)
    assert rows["compiler"] == "xla_cpu_prefer_vector_width=128"


def test_the_command_line_refuses_it_before_training(tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be " * 200)
    command = ["train", "--data", str(text), "--model", "tiny", "--steps", "1", "--out",
               str(tmp_path / "run"), "--sequence", "16"]  # fmt: skip
    assert main([*command, "--strategy", "data=8,xla=xla_no_such_flag=true"]) != 0
    assert "No such compile option" in capsys.readouterr().err.replace("\n", " ")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_kernel_that_needs_devices_is_compiled_here_or_not_at_all(monkeypatch):
    """cuDNN's attention cannot be exported; without cuDNN here, the refusal is played."""

    def refuse(*args, **kwargs):
        raise KernelNeedsDevicesError("a kernel needs devices")

    views = importlib.import_module("shardtrain.plan.views")
    monkeypatch.setattr(views, "compile_elsewhere", refuse)
    compiled = make_plan("off", hardware="cpu:8").compile()  # an unused random key is left out
    assert (compiled.argument_bytes, compiled.note) == (44, "compiled for 8 CPU devices")
    plan = make_plan("off", hardware="mi300x:1")
    with pytest.raises(HardwareError, match=r"needs devices; .*no description of mi300x"):
        plan.compile()
