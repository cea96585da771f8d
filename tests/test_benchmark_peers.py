"""The benchmark against other programs: its JAX half at toy size, and its table."""

import importlib
import json
import sys
from pathlib import Path

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import shardtrain as st
from shardtrain.models import DecoderConfig
from shardtrain.planner.collectives import collectives_of

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
DOC = BENCHMARKS.parent / "docs" / "performance.md"


@pytest.fixture(scope="module")
def benchmark():
    """The benchmark's modules by name; they leave no trace in `sys.modules`."""
    names = ("peers", "peers_worker", "peers_report", "with_shardtrain", "by_hand")
    paths = [str(BENCHMARKS), str(BENCHMARKS / "peers_scripts")]
    sys.path[:0] = paths
    yield {name: importlib.import_module(name) for name in names}
    for path in paths:
        sys.path.remove(path)
    for name in names:
        del sys.modules[name]


@pytest.fixture(scope="module")
def batch(benchmark):
    spec = {"config": benchmark["peers"].TOY, "batch": 8, "sequence": 32}
    return benchmark["peers_worker"].make_batch(spec)


def test_by_hand_and_shardtrain_are_the_same_program(benchmark, batch, devices):
    config = DecoderConfig(**benchmark["peers"].TOY)
    losses, shards = {}, {}
    for script in ("by_hand", "with_shardtrain"):
        state, step = benchmark[script].start(config, batch, 8, "fsdp")
        params = state[0] if script == "by_hand" else state.params
        shards[script] = sorted((x.shape, x.sharding.shard_shape(x.shape)) for x in
                                jax.tree.leaves(params))  # fmt: skip
        losses[script] = []
        for _ in range(3):
            state, loss = step(state, batch)
            losses[script].append(float(loss))
    assert shards["by_hand"] == shards["with_shardtrain"]
    assert losses["by_hand"] == pytest.approx(losses["with_shardtrain"], rel=1e-6)
    assert losses["by_hand"][2] < losses["by_hand"][0]


def test_shardtrain_sends_one_message_more_than_by_hand(benchmark, batch, devices, monkeypatch):
    """That of the gradient norm, which the program by hand does not report."""
    config, kept = DecoderConfig(**benchmark["peers"].TOY), []
    jit = jax.jit

    def keep(fn, **options):
        kept.append(jit(fn, **options))
        return kept[-1]

    monkeypatch.setattr(jax, "jit", keep)
    state, _ = benchmark["by_hand"].start(config, batch, 8, "fsdp")
    monkeypatch.undo()
    rows = jax.tree.leaves(state)[0].sharding.mesh
    placed = jax.device_put(batch, NamedSharding(rows, PartitionSpec("devices")))
    by_hand = collectives_of(kept[0].lower(state, placed).compile(), rows)
    plan = benchmark["with_shardtrain"].start(config, batch, 8, "fsdp")[1].__closure__
    [plan] = [cell.cell_contents for cell in plan if isinstance(cell.cell_contents, st.Plan)]
    count = lambda found: sum(c.count for c in found)
    size = lambda found: sum(c.bytes * c.count for c in found)
    assert count(plan.collectives()) == count(by_hand) + 1
    assert size(plan.collectives()) == size(by_hand) + 4


def test_a_run_writes_what_the_table_needs(benchmark, tmp_path, monkeypatch):
    peers = benchmark["peers"]
    absent = peers.torch_peer("PyTorch, eager", "torch_single", "1 device", package="absent")
    monkeypatch.setattr(peers, "PEERS", (*peers.PEERS[:2], absent))
    monkeypatch.setattr(peers, "use_cores", lambda count: (0, 1))
    no_python = Path(tmp_path, "python")
    no_python.write_text("#!/bin/sh\necho 'ImportError: no such thing' >&2\nexit 1\n")
    no_python.chmod(0o755)
    where = ["--from", f"absent={no_python}", "--only", "absent", "--json", str(tmp_path / "j")]
    size = ["--toy", "--batch", "8", "--sequence", "32", "--rounds", "2", "--steps", "1"]
    peers.main([*size, *where, "--png", str(tmp_path / "p.png")])
    found = json.loads((tmp_path / "j").read_text())
    ours, by_hand = found["rows"]
    assert ours["parameters"] == by_hand["parameters"] == 25_696
    assert ours["first_loss"] == pytest.approx(by_hand["first_loss"], rel=1e-6)
    assert len(ours["step_seconds"]) == len(by_hand["step_seconds"]) == 2
    assert by_hand["ratio_quartiles"][0] <= by_hand["ratio"] <= by_hand["ratio_quartiles"][1]
    assert min(ours["peak_bytes"], ours["tokens_per_second"], ours["seconds_to_first_step"]) > 0
    assert ours["versions"]["jax"] == jax.__version__
    assert found["absent"] == {
        "PyTorch, eager": "PyTorch, eager does not run here: ImportError: no such thing"
    }
    assert (tmp_path / "p.png").read_bytes()[:4] == b"\x89PNG"
    assert "does not run here" in benchmark["peers_report"].table(found)


def test_another_first_loss_or_size_ends_the_run(benchmark):
    peers = benchmark["peers"]

    def program(peer, loss, parameters=10):
        return peers.Running(peer, [], [{"loss": loss, "parameters": parameters}])

    base = program(peers.PEERS[1], 5.0)
    peers.check([base, program(peers.PEERS[0], 5.0), program(peers.PEERS[2], 5.0004)])
    with pytest.raises(SystemExit, match="first loss"):
        peers.check([base, program(peers.PEERS[0], 5.0004)])
    with pytest.raises(SystemExit, match="11 parameters"):
        peers.check([base, program(peers.PEERS[0], 5.0, 11)])


def test_lines_are_those_a_user_writes(benchmark):
    lines = benchmark["peers"].lines_of
    assert lines("with_shardtrain") == 17
    assert lines("with_shardtrain") < lines("torch_ddp") < lines("by_hand")


@pytest.mark.parametrize("name", ["peers", "input_pipeline", "startup"])
def test_the_docs_show_the_result_files(benchmark, name):
    report = benchmark["peers_report"]
    found = json.loads((BENCHMARKS / "results" / f"{name}.json").read_text())
    assert report.TABLES[name](found) in DOC.read_text()
