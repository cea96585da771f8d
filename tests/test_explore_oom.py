"""explain_oom on the texts XLA really prints: TPU compiler and runtime, GPU, CPU."""

import jax
import jax.numpy as jnp
import pytest

import shardtrain as st
from shardtrain.cli.verify_run import decoder_problem
from shardtrain.errors import OutOfMemoryError
from shardtrain.explore import explain_oom
from shardtrain.explore.oom_text import read_oom, short_operation
from shardtrain.planner.compiled import out_of_memory

GIB = 2**30

# As reported in erfanzar/EasyDeL issue 166 (TPU v4, jaxlib 0.4), shortened to two allocations.
TPU_COMPILER = """\
RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. Used \
63.80G of 30.75G hbm. Exceeded hbm capacity by 33.05G.

Total hbm usage >= 65.05G:
    reserved          1.25G
    program          63.80G
    arguments            0B

Output size 0B; shares 0B with arguments.

Program hbm requirement 63.80G:
    global            1.14M
    scoped            4.56M
    HLO temp         63.79G (100.0% utilization: Unpadded (63.58G) Padded (63.58G), 0.3% \
fragmentation (210.89M))

  Largest program allocations in hbm:

  1. Size: 2.00G
     Operator: op_name="jit(casual_language_model_train_step)/jit(main)/\
jvp(FlaxFalconForCausalLMModule)/transformer/h/0/self_attention/...qhd,...khd->...hqk/\
dot_general[dimension_numbers=(((3,), (3,)), ((0, 2), (0, 2))) precision=None]" \
source_file="/home/air/EasyDel/modules/attention_module.py" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1265.remat3 = fusion(custom-call.224, custom-call.241), kind=kOutput
     Allocation type: HLO temp
     ==========================

  2. Size: 2.00G
     Operator: op_name="jit(casual_language_model_train_step)/jit(main)/\
jvp(FlaxFalconForCausalLMModule)/transformer/h/1/self_attention/...qhd,...khd->...hqk/\
dot_general[dimension_numbers=(((3,), (3,)), ((0, 2), (0, 2))) precision=None]" \
source_file="/home/air/EasyDel/modules/attention_module.py" source_line=1059
     Shape: f32[32,4096,4096]{1,2,0:T(8,128)}
     Unpadded size: 2.00G
     XLA label: fusion.1266.remat3 = fusion(custom-call.225, custom-call.242), kind=kOutput
     Allocation type: HLO temp
     ==========================
"""

# huggingface/transformers issue 22328 and google-deepmind/gemma issue 85.
TPU_RUNTIME = (
    "RESOURCE_EXHAUSTED: Attempting to reserve 10.51G at the bottom of memory. That was not "
    "possible. There are 8.97G free, 0B reserved, and 8.97G reservable."
)
TPU_BUFFER = (
    "RESOURCE_EXHAUSTED: Error allocating device buffer: Attempting to allocate 15.65G. That was "
    "not possible. There are 11.08G free.; (0x0x0_HBM0)"
)
# EnzymeAD/Enzyme-JAX pull request 2422 (2026).
TPU_CODED = (
    "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: XLA:TPU compile permanent error. Ran out of "
    "memory in memory space hbm. Used 215.17G of 31.25G hbm. Exceeded hbm capacity by 183.92G."
)

# jax-ml/jax issue 13428, with the layout of google-research/t5x issue 870's operators.
GPU = """\
RESOURCE_EXHAUSTED: Out of memory while trying to allocate 6291456 bytes.
BufferAssignment OOM Debugging.
BufferAssignment stats:
             parameter allocation:    6.00MiB
              constant allocation:         0B
        maybe_live_out allocation:    6.00MiB
     preallocated temp allocation:         0B
                 total allocation:   12.00MiB
              total fragmentation:         0B (0.00%)
Peak buffers:
        Buffer 1:
                Size: 96.00MiB
                Operator: op_name="pjit(train_step)/jit(main)/jvp(Transformer)/\
Transformer.encode/encoder/layers_2/pre_mlp_layer_norm/reduce_sum[axes=(2,)]" \
source_file="/data/t5x/examples/t5/layers.py" source_line=652
                XLA Label: fusion
                Shape: f32[128,256,768]
                ==========================

        Buffer 2:
                Size: 16.0KiB
                Entry Parameter Subshape: f32[256,64]
                ==========================
"""

CPU = "RESOURCE_EXHAUSTED: Out of memory allocating 4398046511104 bytes."


def test_tpu_compiler():
    found = read_oom(TPU_COMPILER)
    assert found.needed == round(63.80 * GIB)
    assert found.available == round(30.75 * GIB)
    assert found.is_whole
    assert found.classes["program"] == found.needed
    (scores,) = found.allocations
    assert (scores.count, scores.bytes, scores.shape) == (2, 4 * GIB, "f32[32,4096,4096]")
    report = explain_oom(TPU_COMPILER)
    assert report.owners == (
        ("FlaxFalconForCausalLMModule/transformer/h/0/self_attention/...qhd,...khd->...hqk/"
         "dot_general f32[32,4096,4096] x2 (modules/attention_module.py:1059)", 4 * GIB),
    )  # fmt: skip
    assert str(report).startswith("out of memory: the program needs 68.5 GB, there are 33 GB")


@pytest.mark.parametrize(
    ("text", "needed", "available", "is_whole"),
    [
        (TPU_RUNTIME, 10.51, 8.97, False),
        (TPU_BUFFER, 15.65, 11.08, False),
        (TPU_CODED, 215.17, 31.25, True),
    ],
)
def test_tpu_runtime(text, needed, available, is_whole):
    found = read_oom(text)
    assert found.shortfall == round(needed * GIB) - round(available * GIB)
    assert found.is_whole is is_whole


def test_gpu():
    found = read_oom(GPU)
    assert (found.needed, found.available, found.shortfall) == (6291456, None, None)
    assert found.classes == {
        "parameter": 6 * 2**20, "constant": 0, "maybe_live_out": 6 * 2**20, "preallocated temp": 0,
        "total": 12 * 2**20,
    }  # fmt: skip
    first, second = found.allocations
    assert (first.bytes, first.is_argument) == (96 * 2**20, False)
    assert (second.shape, second.is_argument) == ("f32[256,64]", True)


def test_cpu_text_is_the_one_this_jax_prints():
    assert read_oom(CPU).needed == 4 * 2**40
    with pytest.raises(jax.errors.JaxRuntimeError, match="RESOURCE_EXHAUSTED") as caught:
        jax.jit(lambda: jnp.ones((1 << 44,), jnp.float32))().block_until_ready()
    assert explain_oom(caught.value).text.needed == 4 << 44


def test_operations_of_this_jax_are_shortened():
    assert short_operation("jit(step)/transpose(jvp(Net))/blocks/1/dot") == "Net/blocks/1/dot"
    assert short_operation("") == ""


@pytest.fixture(scope="module")
def plan():
    return st.plan(*decoder_problem(), "data=2", "cpu:2")


def test_plan_names_the_cheapest_change_that_fits(plan):
    total = plan.memory().total
    text = f"RESOURCE_EXHAUSTED: Used {total / 2**20:.2f}M of {total / 2**20 - 0.3:.2f}M hbm."
    report = explain_oom(text, plan)
    assert dict(report.owners)["activations (estimate)"] == plan.memory().activations
    assert report.fix.fits
    again = plan.again(strategy=report.fix.strategy)
    assert total - again.memory().total == report.fix.saves
    assert report.fix.saves >= 0.3 * 2**20 * 0.95
    cheaper = [c for c in report.changes if c.change == "num_microbatches=2"]
    assert cheaper == [report.changes[0]]
    assert f"{report.fix.change} saves" in str(report)
    assert "and fits" in str(report)
    assert "fits" in str(report.table())


def test_plan_says_when_nothing_is_enough(plan):
    report = explain_oom("RESOURCE_EXHAUSTED: Used 63.80G of 30.75G hbm.", plan)
    assert report.fix.fits is False
    assert report.fix.saves == max(c.saves for c in report.changes)
    assert "not enough alone" in str(report)
    assert report._repr_html_().startswith("<div>")


def test_arguments_are_named_by_parameter(plan):
    report = explain_oom(GPU.replace("f32[256,64]", "f32[64,4,8]"), plan)
    named = [who for who, _ in report.owners if "attention/key/kernel" in who]
    assert named == [
        "blocks/0/attention/key/kernel and 3 more or its optimizer state f32[64,4,8]",
    ]


def test_the_compilers_words_are_found_behind_our_error(plan):
    try:
        try:
            raise RuntimeError(TPU_COMPILER)
        except RuntimeError as error:
            raise out_of_memory(str(error), "TPU v4") from error
    except OutOfMemoryError as error:
        report = explain_oom(error)
    assert report.text.allocations[0].count == 2
