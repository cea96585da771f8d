"""The command line: help without heavy imports, nearest names, clean errors, a whole run."""

import json
import os
import re
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
import tokenizers
from safetensors.numpy import load_file

from shardtrain.cli import COMMANDS, main
from shardtrain.cli.train import devices as train_devices
from shardtrain.cli.train.devices import choose_devices, default_strategy
from shardtrain.cli.train.directory import choose_directory, claim, write_settings
from shardtrain.cli.train.sizes import model_size
from shardtrain.cli.train.text import eval_loader, load_text
from shardtrain.data import TokenDataset
from shardtrain.errors import CheckpointError, StrategyError

TINY = ["train", "--model", "tiny", "--batch", "8", "--sequence", "32", "--sample", "20"]


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "poem.txt"
    file.write_text("the quick brown fox jumps over the lazy dog\n" * 400)
    return file


def said(capsys):
    """Standard output, and standard error with line breaks of the terminal undone."""
    captured = capsys.readouterr()
    return captured.out, " ".join(captured.err.split())


# ---------------------------------------------------------------- help and names


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_the_commands_with_examples(arguments, capsys):
    assert main(arguments) == 0
    out, _ = said(capsys)
    assert "usage: shardtrain COMMAND" in out
    assert all(f"  {name}" in out for name in COMMANDS)
    assert "shardtrain train --strategy data=4,tensor=2" in out


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom shardtrain.cli import main\nmain(['--help'])\n"
        "assert not {'jax', 'tyro', 'rich', 'numpy'} & set(sys.modules)\n"
        "try:\n    main(['train', '--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'jax', 'flax', 'numpy', 'matplotlib'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "--strategy STRING" in done.stdout
    assert "shardtrain train --strategy data=2,tensor=4" in done.stdout


def test_every_listed_command_exists(capsys):
    for name in COMMANDS:
        with pytest.raises(SystemExit) as end:
            main([name, "--help"])
        assert end.value.code == 0
        assert f"usage: shardtrain {name}" in capsys.readouterr().out


def test_version(capsys):
    assert main(["--version"]) == 0
    assert said(capsys)[0].strip().count(".") == 2


def test_unknown_command_suggests_the_nearest(capsys):
    assert main(["trian"]) == 2
    assert said(capsys)[1] == "shardtrain trian: no command 'trian': did you mean 'train'?"


def test_unknown_option_suggests_the_nearest(capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--stratgy", "data=8"])
    assert end.value.code == 2
    assert "--strategy" in said(capsys)[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--strategy", "data=4,tensr=2"], "Strategy has no field 'tensr': did you mean 'tensor'?"),
        (
            ["--strategy", "data=3,tensor=2", "--devices", "8"],
            "data=3 x tensor=2 = 6 devices asked",
        ),
        (["--model", "smal"], "--model smal: did you mean 'small'?"),
        (["--data", "no/such/file.txt"], "no such file or directory: no/such/file.txt"),
        (["--steps", "0"], "--steps 0: give at least 1"),
        (["--snapshot-every", "0"], "--snapshot-every 0: give at least 1"),
        (["--lr", "-1"], "--lr above 0"),
        (["--batch", "7"], "Nearest batch sizes that work: 6 or 8"),
    ],
)
def test_bad_input_is_one_message_and_code_2(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", "tiny", *arguments]) == 2
    _, err = said(capsys)
    assert err.startswith("shardtrain train: ")
    assert message in err
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_empty_and_short_text(tmp_path, capsys):
    file = tmp_path / "empty.txt"
    file.write_text(" \n")
    out = ["--out", str(tmp_path / "run")]
    assert main([*TINY, *out, "--data", str(file)]) == 2
    assert "holds no text (1 files read)" in said(capsys)[1]
    file.write_text("a few words\n" * 10)
    assert main([*TINY, *out, "--data", str(file)]) == 2
    assert "make 4 sequences of 32, fewer than one batch of 8" in said(capsys)[1]
    assert not (tmp_path / "run").exists()


def test_inspect_and_export_what_is_not_there(tmp_path, capsys):
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "no checkpoint directory" in said(capsys)[1]
    assert main(["export", str(tmp_path), str(tmp_path / "m.safetensors")]) == 2
    assert "no complete step in" in said(capsys)[1]
    assert list(tmp_path.iterdir()) == []


def test_launch_needs_a_command(capsys):
    assert main(["launch", "-n", "2", "python", "train.py"]) == 2
    assert "write the command to start after --" in said(capsys)[1]


def test_launch_passes_the_exit_code_on(tmp_path, capfd):
    code = (
        "import os; print('process', os.environ['SHARDTRAIN_PROCESS_INDEX']); raise SystemExit(3)"
    )
    script = tmp_path / "script.py"
    script.write_text(code)
    run = ["launch", "-n", "1", "--max-restarts", "0", "--run-directory", str(tmp_path / "logs")]
    assert main([*run, "--", sys.executable, str(script)]) == 3
    assert "process 0" in capfd.readouterr().out


# ---------------------------------------------------------------- verify


PROBLEM = """
import jax.numpy as jnp, numpy as np, optax
import shardtrain as st

def problem():
    model = st.Functional(init=lambda key: {"w": jnp.ones((4, 8))})
    batch = {"x": np.ones((8, 4), "float32"), "y": np.arange(8)}
    return model, lambda v, b: st.cross_entropy(b["x"] @ v["w"], b["y"]), optax.sgd(0.1), batch

def three():
    return 1, 2, 3

number = 7
"""


@pytest.fixture
def problem(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(PROBLEM)
    return file


def test_verify_a_model_of_ones_own(problem, capsys):
    arguments = ["verify", f"{problem}:problem", "--strategy", "data=2,fsdp=4", "--table"]
    assert main(arguments) == 0
    shown, _ = said(capsys)
    assert "PASS" in shown
    assert "DIFFERS" not in shown


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (":problm", "has no function 'problm': did you mean 'problem'?"),
        (":number", "has no function 'number'"),
        (":three", "returned 3 values, not (model, loss_fn, optimizer, batch)"),
        ("", "is not of the form FILE.py:NAME"),
    ],
)
def test_problem_that_cannot_be_used(name, message, problem, capsys):
    assert main(["verify", f"{problem}{name}"]) == 2
    assert message in said(capsys)[1]


def test_problem_file_that_is_not_there(capsys):
    assert main(["verify", "nowhere.py:problem"]) == 2
    assert "no such file: nowhere.py" in said(capsys)[1]


# ---------------------------------------------------------------- devices and directories


def test_default_strategies():
    assert str(default_strategy(True, 8)) == "data=2,fsdp=2,tensor=2"
    assert str(default_strategy(True, 8, batch=16)) == (
        "data=2,pipeline=2,tensor=2,num_microbatches=4"
    )
    assert default_strategy(True, 8, batch=12).num_microbatches == 2
    assert str(default_strategy(True, 4)) == "fsdp=-1"
    assert str(default_strategy(False, 4)) == "fsdp=-1,precision=bf16"


def test_gradients_are_clipped_unless_the_strategy_says_how():
    assert choose_devices("data=8", None).strategy.max_grad_norm == 1.0
    assert choose_devices("data=8,max_grad_norm=0.5", None).strategy.max_grad_norm == 0.5


def test_virtual_devices_beside_real_ones(monkeypatch):
    class Gpu:
        platform = "gpu"
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(train_devices.jax, "devices", lambda: [Gpu(), Gpu()])
    with pytest.raises(StrategyError, match="this machine has 2 GPU devices"):
        choose_devices(None, 8)
    chosen = choose_devices(None, None)
    assert chosen.description == "2 x NVIDIA H100 80GB HBM3"
    assert str(chosen.strategy) == "fsdp=-1,precision=bf16,max_grad_norm=1.0"


def test_fresh_takes_the_first_free_number(tmp_path):
    base = tmp_path / "run"
    assert choose_directory(base, "x", fresh=True) == base
    base.mkdir()
    (tmp_path / "run-2").mkdir()
    assert choose_directory(base, "x", fresh=True) == tmp_path / "run-3"
    assert choose_directory(base, "x", fresh=False) == base


def test_claim(tmp_path):
    base = tmp_path / "run"
    assert claim(base, {"model": "a"}, ()) is False
    write_settings(base, {"model": "a", "steps": 1})
    assert claim(base, {"model": "a", "steps": 2}, ("steps",)) is True
    with pytest.raises(CheckpointError, match="steps: 1 there, 2 now"):
        claim(base, {"model": "a", "steps": 2}, ())
    write_settings(base, {"model": "a", "config": {"layers": 2, "width": 8}})
    with pytest.raises(CheckpointError, match=r"run:\n  config\.layers: 2 there, 3 now\nGive"):
        claim(base, {"model": "a", "config": {"layers": 3, "width": 8}}, ())
    (base / "run.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"run\.json is damaged"):
        claim(base, {"model": "a"}, ())
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").touch()
    with pytest.raises(CheckpointError, match=r"it holds cat\.jpg"):
        claim(other, {}, ())
    with pytest.raises(CheckpointError, match="is not a directory"):
        claim(other / "cat.jpg", {}, ())


def test_text_with_a_tokenizer_file_counts_bytes_per_token(text, tmp_path):
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    words = tokenizers.trainers.WordLevelTrainer(special_tokens=["?"], show_progress=False)
    tokenizer.train([str(text)], words)
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    found = load_text([text], tmp_path / "tokenizer.json")
    assert found.tokenizer.vocab_size == 9  # eight different words, and ?
    assert found.bytes_per_token == pytest.approx(44 / 9, rel=1e-3)
    assert len(found.train) + len(found.held_out) == 9 * 400
    assert found.description.endswith("3,424 tokens to train on, 176 held out")
    assert found.name == "poem"


def test_vocabulary_is_rounded_up_so_that_it_divides():
    assert model_size("tiny", 257).config.vocab_size == 384
    assert model_size("small", 256).config.vocab_size == 256


def test_held_out_windows_are_spread_over_the_text(text):
    found = load_text([text], None)
    loader = eval_loader(found, sequence=16, batch=4, num_batches=2)
    rows = np.concatenate([batch["tokens"] for batch, _ in loader.eval_batches()])
    windows = TokenDataset(found.held_out, 16)
    assert rows.shape == (8, 16)
    np.testing.assert_array_equal(rows[0], windows[0]["tokens"])
    np.testing.assert_array_equal(rows[-1], windows[len(windows) - 1]["tokens"])


# ---------------------------------------------------------------- whole runs


def test_train_resume_other_model_and_fresh(text, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*TINY, "--data", str(text), "--out", str(out)]
    assert main([*command, "--steps", "6", "--tensorboard"]) == 0
    shown, _ = said(capsys)
    assert "8 virtual CPU devices" in shown
    assert "global batch 8 = data 2 x fsdp 1 x microbatches 4 x 1 rows; 256 tokens" in shown
    assert "data 1 pipeline 0         4         5" in shown
    assert "stage 0: layer 0; stage 1: layer 1" in shown
    assert re.search(r"2x1x1x64x160 +pipeline, -, -, -, tensor +20.0 KiB", shown)
    assert "Trained 6 steps (1.5k tokens)" in shown.replace("\n", " ")

    assert main(["inspect", str(out)]) == 0
    shown, _ = said(capsys)
    assert "step 6 of " in shown
    assert "params/blocks/0/mlp/gate/kernel" in shown
    exported = tmp_path / "model.safetensors"
    assert main(["export", str(out), str(exported)]) == 0
    assert "wrote " in said(capsys)[0]
    assert load_file(exported)["blocks/0/mlp/gate/kernel"].shape == (64, 160)

    names = {p.name for p in out.iterdir()}
    assert names >= {"6", "loss.png", "metrics.jsonl", "run.json", "sample.txt", "tensorboard"}
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    evals = {r["step"]: r["loss"] for r in records if r["kind"] == "eval"}
    assert 5.3 < evals[0] < 6.0
    assert evals[6] < evals[0] - 1.0

    # Pipeline, tensor and data parallel: the losses of data parallel alone.
    plain = tmp_path / "plain"
    options = ["--data", str(text), "--out", str(plain), "--steps", "6", "--strategy", "data=8"]
    assert main([*TINY, *options]) == 0
    lines = [json.loads(line) for line in (plain / "metrics.jsonl").read_text().splitlines()]
    same = {r["step"]: r["loss"] for r in lines if r["kind"] == "eval"}
    assert same == pytest.approx(evals, rel=1e-5)
    said(capsys)

    assert main([*command, "--steps", "8", "--strategy", "data=8"]) == 0
    shown, _ = said(capsys)
    assert "resumed at step 6" in shown
    assert "Trained 2 steps" in shown
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6, 7, 8]

    before = sorted((str(p), p.stat().st_mtime_ns) for p in out.rglob("*"))
    assert main([*command, "--model", "small"]) == 2
    _, err = said(capsys)
    assert "holds another run: model: tiny there, small now" in err
    assert "Nothing was overwritten" in err
    assert sorted((str(p), p.stat().st_mtime_ns) for p in out.rglob("*")) == before

    assert main([*command, "--steps", "1", "--fresh", "--sample", "0"]) == 0
    assert "Trained 1 steps" in said(capsys)[0]
    assert (tmp_path / "run-2" / "1").is_dir()


def test_ctrl_c_saves_the_last_step(text, tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "shardtrain", *TINY, "--data", str(text), "--out", str(out)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--strategy", "data=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if line.startswith("step 1/"):
            process.send_signal(signal.SIGINT)
            break
    try:
        rest, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, seen + rest + err
    assert "Traceback" not in err
    steps = [int(p.name) for p in out.iterdir() if p.name.isdigit()]
    assert f"Stopped at step {steps[-1]}, which is saved" in " ".join(rest.split())


KILLED_AT_4 = """
import os, signal, sys
from shardtrain.cli import main
from shardtrain.monitoring.metrics_log import MetricsLog

written = MetricsLog.on_step

def on_step(self, step, metrics):
    written(self, step, metrics)
    if step == 4:
        os.kill(os.getpid(), signal.SIGKILL)

MetricsLog.on_step = on_step
main(sys.argv[1:])
"""


def test_a_killed_run_is_found_in_memory(text, tmp_path, capsys):
    out = tmp_path / "run"
    command = [*TINY, "--data", str(text), "--out", str(out), "--strategy", "data=8"]
    command += ["--steps", "6", "--save-every", "100", "--snapshot-every", "1"]
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": jax.config.jax_compilation_cache_dir}
    killed = subprocess.run([sys.executable, "-c", KILLED_AT_4, *command], env=environment)
    assert killed.returncode == -signal.SIGKILL
    assert not any(p.name.isdigit() for p in out.iterdir())
    assert main(command) == 0
    shown, _ = said(capsys)
    assert "continuing the run there" in shown
    assert "resumed at step 3 (from memory)" in shown
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in records if r["kind"] == "step"] == [1, 2, 3, 4, 5, 6]
    assert next(r["step"] for r in records if r["kind"] == "eval") == 0


def test_a_loss_that_is_not_finite_stops_the_run_unless_the_guard_is_off(text, tmp_path, capsys):
    command = [*TINY, "--data", str(text), "--strategy", "data=8", "--steps", "8", "--lr", "1e30"]
    command += ["--save-every", "100", "--sample", "0"]
    assert main([*command, "--out", str(tmp_path / "on")]) == 2
    assert "There is no good state to go back to" in said(capsys)[1]
    assert main([*command, "--out", str(tmp_path / "off"), "--no-guard"]) == 0
    said(capsys)
    lines = (tmp_path / "off" / "metrics.jsonl").read_text().splitlines()
    skipped = [r["skipped"] for r in map(json.loads, lines) if r["kind"] == "step"]
    assert len(skipped) == 8
    assert skipped[-1] == 1


def test_goodput_of_a_published_failure_rate(capsys):
    assert main(["goodput", "--stall", "0.5", "--recovery", "60"]) == 0
    out = capsys.readouterr().out
    assert "16384 devices: one interruption every 2.78 h" in out
    assert "expected goodput 98.41 %" in out
    assert "452 interruptions" in out
    assert main(["goodput", "--stall", "-1"]) == 2
    assert "not negative" in capsys.readouterr().err
