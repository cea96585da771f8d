"""st.explore: layouts ranked and pruned with reasons, ties, the cheapest change, own models."""

import json

import flax.linen as nn
import flax.nnx as nnx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shardtrain as st
from shardtrain.cli import main
from shardtrain.cli.verify_run import decoder_problem
from shardtrain.errors import HardwareError, ModelError, StrategyError
from shardtrain.explore import Exploration, explore
from shardtrain.explore.choice import Choice, kind_of
from shardtrain.explore.scatter import pareto, ticks
from shardtrain.hardware import chip
from shardtrain.planner.catalogue import get
from shardtrain.planner.job import Job
from shardtrain.planner.memory import job_memory
from shardtrain.planner.search import Pruned
from shardtrain.planner.search_space import Space
from shardtrain.planner.wire import axis_bytes


@pytest.fixture(scope="module")
def found() -> Exploration:
    return explore("llama3-8b", hardware="h100:8x8", global_batch=512, sequence=8192)


def test_8b_on_64_chips(found):
    assert len(found.ranked) > 1000
    assert found.best.step_time == min(c.step_time for c in found.ranked)


def test_every_layout_is_the_right_size_and_fits(found):
    for one in found.ranked[::97]:
        sizes = one.strategy.sizes.values()
        assert np.prod(list(sizes)) == 64
        assert one.memory_bytes <= 80e9
        assert sum(one.candidate.terms.values()) == pytest.approx(one.step_time)
        assert one.reason


def test_everything_asked_for_is_enumerated(found):
    strategies = [c.strategy for c in found.ranked]
    for name, values in {
        "zero": {0, 1, 2, 3}, "schedule": {"1f1b", "interleaved"}, "offload": {False, True},
        "remat": {"none", "dots", "full"}, "sequence_parallel": {False, True},
        "tensor": {1, 2, 4, 8}, "pipeline": {1, 2, 4, 8, 16, 32}, "virtual_stages": {1, 2, 4},
    }.items():  # fmt: skip
        assert {getattr(s, name) for s in strategies} >= values, name
    long = explore("llama3-8b", hardware="h100:8x8", global_batch=64, sequence=131072,
                   pipeline=1, zero=3, remat="full")  # fmt: skip
    assert {c.strategy.context for c in long.ranked} > {1}
    moe = explore("mixtral-8x7b", hardware="h100:8x8", global_batch=512, sequence=4096,
                  precision=("bf16", "fp32"), pipeline=1, zero=3)  # fmt: skip
    assert {c.strategy.expert for c in moe.ranked} > {1}
    assert {c.strategy.precision for c in moe.ranked} == {"bf16", "fp32"}


def test_losers_have_reasons_with_numbers(found):
    assert found.best.reason.startswith("fastest: matmul")
    assert found.why("fsdp=64,zero=3").startswith("1.")
    assert "slower: tensor +" in found.why("tensor=8,pipeline=1")
    assert found.why("data=64,offload=false").startswith("needs 1")
    assert "GB, device has 80.0" in found.why("data=64,offload=false")
    with pytest.raises(StrategyError, match="tensor=3 was looked at"):
        found.why("tensor=3")


def test_ties_are_within_the_models_error(found):
    assert found.ties[0] is found.best
    assert all(c.step_time <= 1.05 * found.best.step_time for c in found.ties)
    assert "≈" in str(found.table())
    assert f"({len(found.ties)} of {len(found.ranked)} layouts)" in " ".join(found.notes())


def test_families_have_one_row_each_and_the_best_is_first(found):
    kinds = list(found.kinds)
    assert kinds[0] == found.best.kind
    assert {"data parallel", "ZeRO-1", "FSDP", "FSDP + tensor", "FSDP + pipeline"} <= set(kinds)
    small = explore("llama3-70b", hardware="h100:1x8", global_batch=64)
    assert isinstance(small.kinds["data parallel"], Pruned)
    assert [mark for mark, *_ in small.shown()].count("-") >= 4
    assert found.table(rows=5).rows[0][0] == "*"
    assert len(found.table(rows=5).rows) == 5
    assert len(found.table(compact=True).columns) == 5
    assert found.table(compact=True).rows[0][1].startswith(f"{found.best.kind}: ")


def test_kind_words():
    assert kind_of({"fsdp": 8, "zero": 1, "pipeline": 2}) == "ZeRO-1 + pipeline"
    assert kind_of({}) == "one device"


def test_rank_by_memory_takes_the_smallest():
    found = explore("llama3-8b", hardware="h100:8x8", global_batch=512, sequence=8192,
                    rank="memory")  # fmt: skip
    assert found.best.memory_bytes == min(c.memory_bytes for c in found.ranked)
    assert any("faster, but" in c.reason for c in found.ranked)


def test_rank_by_cost_compares_machines():
    arguments = {"hardware": ["h100:8x8", "h200:4x8"], "global_batch": 512, "sequence": 8192,
                 "rank": "cost", "zero": 3}  # fmt: skip
    dear = explore("llama3-8b", prices={"h100": 9.0, "h200": 3.0}, **arguments)
    cheap = explore("llama3-8b", prices={"h100": 1.0, "h200": 3.0}, **arguments)
    assert (dear.best.hardware.chip.name, cheap.best.hardware.chip.name) == ("h200", "h100")
    seconds = cheap.best.step_time
    assert cheap.best.cost == pytest.approx(64 * seconds / 3600)
    assert [k.partition(":")[0] for k in list(cheap.kinds)[:2]] == ["h100", "h200"]
    with pytest.raises(StrategyError, match="no price for h200"):
        explore("llama3-8b", prices={"h100": 1.0}, **arguments)


def test_recomputation_is_chosen_by_what_memory_asks_for():
    """Each step up in length costs more memory; no more is recomputed than it takes."""
    chosen = []
    for sequence in (4096, 16384, 32768):
        found = explore("llama3-8b", hardware="h100:1x8", global_batch=8, sequence=sequence,
                        tensor=1, pipeline=1, context=1, offload=False)  # fmt: skip
        chosen.append(found.best.strategy.remat)
    assert chosen == ["none", "dots", "full"]


def test_nothing_fits_says_the_cheapest_change():
    found = explore("llama3-8b", hardware="v6e:2x2", global_batch=64, sequence=8192,
                    remat="none", offload=False)  # fmt: skip
    assert found.ranked == ()
    assert "needs 47.7 GB, device has 32.0" in found.advice
    assert "offload=true saves 24.1 and fits" in found.advice
    with pytest.raises(StrategyError, match=r"no layout fits: .*saves 24\.1"):
        _ = found.best
    assert "Nothing fits" in found.to_html()


def test_too_big_for_any_field_asks_for_more_hosts():
    found = explore("llama3-405b", hardware="h100:1x8", global_batch=8, sequence=8192)
    assert "has a layout that fits" in found.advice
    assert "h100:" in found.advice


def test_wrong_arguments_are_refused_by_name():
    with pytest.raises(StrategyError, match="did you mean 'tensor'"):
        explore("llama3-8b", tensr=1)
    with pytest.raises(StrategyError, match="known: cost, memory, time"):
        explore("llama3-8b", rank="speed")
    with pytest.raises(ModelError, match="did you mean 'llama3-8b'"):
        explore("llama3-8c")
    with pytest.raises(HardwareError, match="h100"):
        explore("llama3-8b", hardware="h100x")
    with pytest.raises(StrategyError, match="give loss_fn, optimizer, batch too"):
        explore(object())
    with pytest.raises(StrategyError, match="takes global_batch="):
        explore("llama3-8b", batch={"x": 1})
    with pytest.raises(StrategyError, match="no code to compile"):
        explore("llama3-8b", compile_top=1)


def test_bytes_by_axis_are_the_textbook_volumes():
    job = Job(get("llama3-8b"), chip("h100"), 8, 8192, fsdp=8, zero=3)
    weights = sum(job.local_parts())
    assert axis_bytes(job)["fsdp"] == pytest.approx(3 * 2 * weights * 7 / 8)
    both = axis_bytes(job.replace(fsdp=1, zero=0, tensor=4))
    stream = 2 * 8192 * 4096
    assert both["tensor"] == pytest.approx(32 * 4 * 2 * stream * 3 / 4)
    assert both["data"] == pytest.approx((4 + 2) * sum(job.replace(tensor=4).local_parts()) / 2)


def test_pareto_front_is_not_beaten(found):
    front = pareto(found.ranked)
    for one in found.ranked[::53]:
        assert any(
            f.step_time <= one.step_time and f.memory_bytes <= one.memory_bytes for f in front
        )
    assert ticks(0, 80) == [0, 20, 40, 60, 80]


def test_page_is_self_contained(found, tmp_path):
    text = found.to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text() == text
    for outside in ("http://", "https://", "<script", "url(", "@import", "src="):
        assert outside not in text.replace("http://www.w3.org/2000/svg", "")
    assert text.count("<svg") >= 3
    assert "prefers-color-scheme:dark" in text
    assert "Where the step goes" in text
    assert f"{len(found.pruned):,} layouts cannot run" in text
    assert len(text) < 600_000
    assert "<!doctype" not in found._repr_html_()


def test_figure_and_json(found, tmp_path):
    figure = found.plot(tmp_path / "figures.png")
    assert len(figure.axes) == 4
    assert (tmp_path / "figures.png").stat().st_size > 20_000
    data = json.loads(found.to_json(tmp_path / "found.json"))
    assert data == json.loads((tmp_path / "found.json").read_text())
    first = data["ranked"][0]
    assert st.Strategy.parse(first["strategy"]) == found.best.strategy
    assert sum(first["memory"].values()) == pytest.approx(first["memory_bytes"])


# Your own model


@pytest.fixture(scope="module")
def own() -> Exploration:
    return explore(*decoder_problem(), hardware="cpu:4", pipeline=(1, 2))


def test_own_model_is_measured_by_tracing(own):
    assert own.subject.model.layers == 2
    assert (own.subject.global_batch, own.subject.sequence) == (8, 16)
    assert "4 optimizer bytes per parameter" in own.subject.notes[0]  # sgd with momentum
    job = own.best.candidate.job
    assert job.optimizer_bytes == 4
    assert 0.5 < job.flops_scale < 1.5


def test_own_model_best_is_a_plan_that_trains(own):
    plan = own.plan()
    assert plan.strategy == own.best.strategy
    assert str(plan.hardware) == "cpu:1x4"
    assert not any(c.strategy.offload or c.strategy.sequence_parallel for c in own.ranked)
    trained = plan.again(hardware=None, devices=jax.devices()[:4])
    _, metrics = trained.step(trained.init(), decoder_problem()[3])
    assert np.isfinite(float(metrics["loss"]))


def test_own_model_learns_from_st_plan_what_cannot_be_sharded():
    found = explore(*decoder_problem(), hardware="cpu:8", pipeline=1, zero=3)
    assert "not divisible by tensor=8" in found.why("tensor=8")


def test_convolutional_network_offers_data_and_fsdp_only():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            for width in (8, 16):
                x = nn.relu(nn.Conv(width, (3, 3))(x))
            return nn.Dense(10)(x.mean((1, 2)))

    def loss(model, batch):
        return st.cross_entropy(model(batch["x"]), batch["y"])

    batch = {"x": jnp.zeros((16, 8, 8, 3)), "y": jnp.zeros((16,), jnp.int32)}
    found = explore(Net(), loss, optax.adam(1e-3), batch, hardware="cpu:4")
    assert {c.kind for c in found.ranked} == {"data parallel", "ZeRO-1", "ZeRO-2", "FSDP"}
    assert "no repeated transformer block" in " ".join(found.subject.notes)
    assert found.best.candidate.job.optimizer_bytes == pytest.approx(8, rel=0.01)
    # 2 * 9 * (3*8 + 8*16) * 64 + 2*16*10 = 175,424 forward FLOPs; backward all but the input's.
    assert found.subject.adjust.__self__.flops == 16 * (3 * 175_424 - 2 * 9 * 3 * 8 * 64)


def test_activation_estimate_of_own_model_is_the_traced_one():
    model, loss, optimizer, batch = decoder_problem()
    found = explore(model, loss, optimizer, batch, hardware="cpu:1", precision="fp32",
                    remat="none", microbatch=8)  # fmt: skip
    memory = found.best.candidate.memory
    traced = st.plan(model, loss, optimizer, batch, "data=1", "cpu:1").activation_bytes()
    assert memory.activations + memory.logits == pytest.approx(traced, rel=1e-6)


def test_bare_scalar_loss_is_named():
    def loss(model, batch):
        return jnp.mean((model(batch["x"]) - 1.0) ** 2)

    found = explore(lambda rngs: nnx.Linear(4, 4, rngs=rngs), loss, optax.sgd(0.1),
                    {"x": jnp.zeros((8, 4))}, hardware="cpu:2")  # fmt: skip
    assert any("bare scalar" in note for note in found.subject.notes)
    several = [c.strategy for c in found.ranked if c.strategy.num_microbatches > 1]
    assert all(s.equal_microbatches for s in several)


def test_plan_of_a_catalogue_model_is_refused(found):
    with pytest.raises(StrategyError, match="no code to plan"):
        found.plan()


def test_tensor_axis_divides_activations():
    model, loss, optimizer, batch = decoder_problem()
    whole = st.plan(model, loss, optimizer, batch, "data=1", "cpu:1").memory().activations
    split = st.plan(model, loss, optimizer, batch, "tensor=4", "cpu:4").memory().activations
    assert whole / 4 < split < 0.6 * whole


# Command line


def test_cli_writes_files(tmp_path, capsys):
    paths = [str(tmp_path / name) for name in ("a.html", "a.png", "a.json")]
    code = main(["explore", "gpt2-124m", "--hardware", "a100:1x8", "--limit", "zero=3",
                 "--limit", "tensor=1,2", "--html", paths[0], "--png", paths[1],
                 "--json", paths[2], "--price", "a100=2"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "gpt2-124m, 4096 x 1024 tokens" in out
    assert all((tmp_path / name).stat().st_size for name in ("a.html", "a.png", "a.json"))
    tensors = {st.Strategy.parse(r["strategy"]).tensor for r in json.loads(
        (tmp_path / "a.json").read_text())["ranked"]}  # fmt: skip
    assert tensors == {1, 2}


def test_cli_nothing_fits_is_code_1_and_says_what_would(capsys):
    code = main(["explore", "llama3-70b", "--hardware", "h100:1x8", "--global-batch", "8",
                 "--limit", "offload=false"])  # fmt: skip
    assert code == 1
    assert "saves" in capsys.readouterr().out


def test_cli_own_problem(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "import flax.nnx as nnx, jax.numpy as jnp, optax, shardtrain as st\n"
        "def problem():\n"
        "    loss = lambda m, b: st.cross_entropy(m(b['x']), b['y'])\n"
        "    batch = {'x': jnp.zeros((8, 4)), 'y': jnp.zeros((8,), 'int32')}\n"
        "    return lambda rngs: nnx.Linear(4, 2, rngs=rngs), loss, optax.sgd(0.1), batch\n"
    )
    code = main(["explore", f"{tmp_path}/mine.py:problem", "--hardware", "cpu:2", "--limit",
                 "remat=none", "--compile-top", "1"])  # fmt: skip
    out = capsys.readouterr().out
    assert code == 0
    assert "Compiled, on each device" in out


def test_cli_bad_input_is_one_sentence(capsys):
    assert main(["explore", "llama3-8b", "--limit", "tensor"]) == 2
    assert "tensor=1,2" in capsys.readouterr().err
    assert main(["explore", "llama3-8b", "--price", "cheap"]) == 2
    assert "neither a number" in capsys.readouterr().err
    assert main(["explore", "--models"]) == 0
    assert "llama3-405b" in capsys.readouterr().out


def test_limits_are_fields_of_the_search_space():
    found = explore("llama3-8b", hardware="h100:8x8", tensor=[2], pipeline=1, zero=3, remat="full",
                    offload=False)  # fmt: skip
    assert {c.strategy.tensor for c in found.ranked} == {2}
    assert Space().runnable is False
    assert isinstance(found.best, Choice)


def test_memory_of_zero_levels_in_search_is_the_jobs():
    found = explore("gpt2-124m", hardware="a100:1x8", global_batch=64, sequence=1024, remat="none",
                    tensor=1, pipeline=1, offload=False, microbatch=1)  # fmt: skip
    states = {c.strategy.zero: c.candidate.memory.states for c in found.ranked}
    job = Job(get("gpt2-124m"), chip("a100"), 8, 1024, num_microbatches=8)
    assert states[0] == job_memory(job.replace(zero=0)).states
    assert states[0] > states[1] > states[2] > states[3]
