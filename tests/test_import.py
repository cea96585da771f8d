"""What importing does, who may import whom, and the public names."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import shardtrain as st

PACKAGE = Path(st.__file__).parent

LAYERS = (
    ("errors", "pytree", "hardware", "compat", "compile_cache", "tables"),
    ("replay",),
    ("algorithms", "xla_options", "strategy"),
    ("modules", "mesh"),
    ("partitioning",),
    ("train", "pipeline", "ops"),
    ("data", "checkpoint", "launch", "monitoring", "sync"),
    ("planner", "viz"),  # pictures of plain data
    ("plan",),
    ("recovery", "hf"),
    ("fit", "verify", "explore", "async_ps", "doctor"),
    ("sweep",),
    ("cli",),
)
"""Lowest first; `models` may use what it likes and nothing uses it but the command line."""

LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

PUBLIC = """
AllReduce AsyncJob Aux Callback Checkpointer DataLoader DiLoCo Exploration FitResult Float8
Functional Gossip Int4 Int8 LocalSGD LossGuard Mean Nesterov ParameterServer Plan PowerSGD Privacy
Sign Strategy SweepResult TensorBoardLog TopK TrainState Uniform VerifyReport assert_collectives
async_ps cross_entropy evaluate explain_oom explore export export_hf fit freeze hardware
init_distributed inspect load_hf lora ops plan planner replay_step replica_divergence restore
simulate sweep verify
"""


def test_public_names():
    """A name added or taken away is a decision, and a line in the CHANGELOG."""
    assert sorted(st.__all__) == PUBLIC.split()


def test_every_public_name_loads_and_is_no_accidental_module():
    for name in st.__all__:
        loaded = getattr(st, name)
        assert loaded.__doc__, name
        assert name in dir(st)
    assert callable(st.plan)


def test_unknown_name_is_an_attribute_error():
    assert not hasattr(st, "plann")


def python(code: str) -> list[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=environment,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_import_is_light_and_touches_nothing():
    """No backend, no flag, and neither JAX nor Flax before a name is used."""
    heavy = ("jax", "flax", "optax", "orbax", "grain", "rich", "scipy", "matplotlib", "numpy")
    lines = python(
        "import sys, os\nbefore = dict(os.environ); n = len(sys.modules)\n"
        "import shardtrain\n"
        "print(len(sys.modules) - n)\n"
        f"print([m for m in {heavy} if m in sys.modules])\n"
        "print(dict(os.environ) == before)\n"
    )
    assert int(lines[0]) < 30
    assert lines[1:] == ["[]", "True"]


def test_planning_and_training_in_memory_import_nothing_slow():
    """What only checkpoints, shuffles or pictures need waits until one is asked for."""
    lines = python(
        "import sys\nimport jax, flax.nnx, optax\nbefore = set(sys.modules)\n"
        "import shardtrain as st\n"
        "st.plan, st.fit, st.DataLoader, st.Checkpointer\n"
        "slow = {'scipy', 'orbax', 'tensorstore', 'grain', 'matplotlib', 'IPython'}\n"
        "print(sorted(slow & (set(sys.modules) - before)))\n"
    )
    assert lines == ["[]"]


def test_using_every_name_and_planning_start_no_backend():
    lines = python(
        "import jax, jax.numpy as jnp, optax\n"
        "import shardtrain as st\n"
        "from shardtrain import compat\n"
        "flags = {k: v for k, v in jax.config.values.items()}\n"
        "[getattr(st, name) for name in st.__all__]\n"
        "print(compat.backends_started())\n"
        "print([k for k, v in jax.config.values.items() if flags.get(k, v) != v])\n"
        "model = st.Functional(init=lambda key: {'w': jax.random.normal(key, (64,))})\n"
        "batch = {'x': jax.ShapeDtypeStruct((64, 64), jnp.float32)}\n"
        "loss = lambda v, b: st.Mean(jnp.sum(b['x'] @ v['w']), b['x'].shape[0])\n"
        "s = 'data=8,fsdp=8'\n"
        "plan = st.plan(model, loss, optax.adam(1e-3), batch, s, hardware='h100:8x8')\n"
        "print(str(plan.explain()).count('fsdp'))\n"
        "print(compat.backends_started())\n"
    )
    assert lines[0] == "False"
    assert lines[1] == "[]"
    assert lines[-1] == "False"


def sources() -> dict[str, Path]:
    files = PACKAGE.rglob("*.py")
    return {".".join(f.relative_to(PACKAGE).with_suffix("").parts): f for f in files}


def imports(path: Path, nested: bool) -> set[str]:
    """Shardtrain modules a file imports; those inside functions only if `nested`."""
    tree = ast.parse(path.read_text())
    skipped: set[int] = set()
    for node in ast.walk(tree):
        is_types = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        if is_types or (is_function and not nested):
            skipped |= {id(n) for n in ast.walk(node)}
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("shardtrain")}
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("shardtrain"):
            assert node.level == 0
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name.removeprefix("shardtrain").lstrip(".") for name in found}


def test_imports_point_down():
    wrong = []
    for module, path in sources().items():
        layer = module.split(".")[0]
        if layer in ("__init__", "__main__", "models"):
            continue
        assert layer in LEVEL, f"{module}: say in which layer {layer} is"
        for name in imports(path, nested=True):
            target = name.split(".")[0]
            if target == layer:
                continue
            if target == "models":
                below = layer in ("cli", "verify")
            else:
                below = LEVEL.get(target, -1) <= LEVEL[layer]
            if not below:
                wrong.append(f"{module} imports {name}")
    assert not wrong, "\n".join(sorted(wrong))


def test_no_import_cycles():
    files = sources()
    graph: dict[str, set[str]] = {}
    for module, path in files.items():
        found = set()
        for name in imports(path, nested=False):
            for candidate in (name, name.rpartition(".")[0]):
                target = candidate if candidate in files else f"{candidate}.__init__"
                if candidate and target in files:
                    found.add(target)
                    break
        graph[module] = found - {module}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail[trail.index(module) :], module))
        if module not in done:
            for target in graph[module]:
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_private_jax_only_in_compat():
    wrong = []
    for module, path in sources().items():
        text = path.read_text()
        if module != "compat" and any(
            isinstance(node, ast.ImportFrom | ast.Import)
            and any("jax._src" in n for n in _names(node))
            for node in ast.walk(ast.parse(text))
        ):
            wrong.append(module)
    assert wrong == []


def _names(node: ast.ImportFrom | ast.Import) -> list[str]:
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{a.name}" for a in node.names)]
    return [a.name for a in node.names]
