"""The GPU benchmark at toy size: the same programs, figures and sentences, on a CPU."""

import importlib.util
import json
import pathlib
import sys

import jax
import pytest

FOLDER = pathlib.Path(__file__).resolve().parent.parent / "benchmarks"
MODULES = ("gpu_cases", "gpu_steps", "gpu_figure", "gpu")


@pytest.fixture(scope="module")
def bench():
    """The benchmark's modules by name."""
    found = {}
    for name in MODULES:
        spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
        found[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(found[name])
    yield found
    for name in MODULES:
        del sys.modules[name]


def test_counts_of_parameters_and_flops(bench):
    cases = bench["gpu_cases"]
    assert {n: cases.count_parameters(c)[0] for n, c in cases.SHAPES.items()} == {
        "0.5B": 553_704_960,
        "1B": 1_126_262_784,
        "3B": 3_020_073_984,
        "8B": 8_030_261_248,  # Llama 3 8B's published count
        "toy": 22_688,
    }
    block = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 64
    expected = 6 * (2 * block + 64 * 32) + 6 * 2 * 64 * 32
    assert cases.flops_per_token(cases.SHAPES["toy"], 64) == expected


@pytest.mark.parametrize("layers", ["scanned", "auto", "unrolled"])
def test_models_have_the_counted_parameters(bench, layers):
    cases = bench["gpu_cases"]
    plan = cases.make_plan(cases.Case("toy", 64, rows=8, layers=layers), hardware="cpu:8")
    sizes = [x.size for x in jax.tree.leaves(plan.abstract_state.params)]
    assert sum(sizes) == 22_688


def test_the_batch_and_recomputation_that_fit_are_chosen(bench):
    cases = bench["gpu_cases"]
    case = cases.Case("toy", 64)
    roomy = cases.choose(case, 1e9, (256, 128))
    assert (roomy.case.rows, roomy.case.remat, roomy.rejected) == (4, "dots_no_batch", ())
    tight = cases.choose(case, roomy.planned_bytes, (256, 128))
    assert tight.planned_bytes < roomy.planned_bytes
    assert tight.rejected[0] == ("4 rows, remat=dots_no_batch, fp32 moments", roomy.planned_bytes)
    assert cases.choose(case, 1e4, (64,)).case is None


def test_the_command_at_toy_size(bench, tmp_path, capsys):
    json_path = tmp_path / "gpu.json"
    cache = jax.config.jax_compilation_cache_dir or tmp_path / "cache"
    bench["gpu"].main(
        ["--toy", "--only", "toy-64", "toy-64 torch", "--rounds", "2", "--steps", "2",
         "--json", str(json_path), "--cache", str(cache),
         "--torch", str(tmp_path / "no-python")]
    )  # fmt: skip
    results = json.loads(json_path.read_text())
    record = results["jobs"]["toy-64"]
    assert set(record["programs"]) == {"shardtrain", "hand-written"}
    for row in record["programs"].values():
        assert row["tokens_per_s"] == pytest.approx(256 / row["step_s"])
        assert len(row["rounds_s"]) == 2
        assert row["mfu"] is None  # no peak is known of this CPU
        assert row["loss"] == pytest.approx(4.16, abs=0.1)  # ln(64): a model that knows nothing
    # Both took their first step from the same parameters on the same batch.
    losses = [row["loss"] for row in record["programs"].values()]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert record["planned_bytes"] > 22_688 * 16
    assert record["model_flops"] == 256 * 147_456
    assert results["jobs"]["toy-64 torch"]["left_out"].endswith("is not a Python (see --torch)")
    assert {"date", "versions", "flops"} <= set(results)
    assert json_path.with_suffix(".png").stat().st_size > 5_000
    printed = capsys.readouterr().out
    assert "toy-64 shardtrain: " in printed
    assert "| toy-64 | hand-written | " in printed


def test_what_there_is_no_time_for_is_named(bench, tmp_path):
    path = tmp_path / "gpu.json"
    bench["gpu"].main(["--toy", "--budget-minutes", "0", "--only", "toy-64", "--json", str(path)])
    left = json.loads(path.read_text())["jobs"]["toy-64"]["left_out"]
    assert left == "no time left in 0 minutes (--continue runs it)"


def test_the_most_telling_jobs_come_first_and_torch_after_its_shape(bench):
    keys = [job.key for job in bench["gpu"].jobs()]
    assert keys[:4] == ["3B-4096", "3B-4096 torch", "8B-4096", "8B-4096 torch"]
    assert len(set(keys)) == len(keys) == 19
    for key in keys:
        if key.endswith(" torch"):
            assert keys.index(key.removesuffix(" torch")) < keys.index(key)


def test_mfu_and_peaks_are_in_the_table(bench, tmp_path):
    """The figures of a GPU, of which a CPU has none."""
    row = {"step_s": 0.5, "tokens_per_s": 32768.0, "mfu": 0.5321, "peak_bytes": 3 << 30}
    record = {"programs": {"shardtrain": row | {"gap_ms": 0.25}}, "planned_bytes": 2 << 30,
              "estimated_step_s": 0.45}  # fmt: skip
    results = {"jobs": {"3B-4096": record, "3B-4096 torch": row, "8B-4096": {"left_out": "no"}}}
    text = bench["gpu_figure"].table(results)
    assert "| 3B-4096 | shardtrain | 32,768 | 53.2% | 500.0 | 450.0 | 0.25 | 3.0 | 2.0 |" in text
    assert "| 3B-4096 | PyTorch | 32,768 | 53.2% | 500.0 |  |  | 3.0 |  |" in text
    assert "8B-4096: no" in text
    bench["gpu_figure"].draw(results, tmp_path / "gpu.png")
    assert (tmp_path / "gpu.png").stat().st_size > 5_000


def test_the_compilers_account_that_is_kept():
    """What docs/gpu.md says of steps without a GPU, from the file it was read from."""
    kept = json.loads((FOLDER / "results" / "gpu_deviceless.json").read_text())
    assert "XLA's GPU compiler for h200" in kept["compiler"]
    for name, step in kept["steps"].items():
        assert step["fits"], name
        assert step["custom_calls"]["__cudnn$fmhaSoftmax"] >= 1
        assert step["custom_calls"]["__cudnn$fmhaSoftmaxBackward"] == 1
        assert step["planned_bytes"] == pytest.approx(step["peak_bytes"], rel=0.035)
        assert step["flops"] >= step["model_flops"]
        if "hand" in step:
            assert step["flops"] == pytest.approx(step["hand"]["flops"], rel=1e-3)
    knobs = kept["tuning"]
    assert knobs["base"]["flops"] == knobs["remat: none"]["flops"]  # attention is not run twice
    assert knobs["base"]["temp_bytes"] < 0.5 * knobs["remat: none"]["temp_bytes"]
    assert knobs["FP8 matmuls"]["custom_calls"]["__cublas$lt$matmul$f8"] == 17
    assert "__cudnn$fmhaSoftmax" not in knobs["attention: XLA's"]["custom_calls"]
    for rows in kept["presets"].values():
        assert all("accepted" in row for row in rows.values())
    calls = kept["eight"]["off"]["collectives"]
    assert calls["all-gather over fsdp"] == {"count": 388, "bytes": 30288257024}
