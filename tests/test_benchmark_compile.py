"""`benchmarks/compile.py`: its parts on small cases."""

import importlib.util
import json
from pathlib import Path

import pytest

PATH = Path(__file__).parents[1] / "benchmarks" / "compile.py"


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("benchmark_compile", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(PATH.parent))
        spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("chip", "count", "name"),
    [
        ("v5p", 8, "v5p:2x2x2"),
        ("v5p", 64, "v5p:4x4x4"),
        ("v5p", 4096, "v5p:16x16x16"),
        ("v5e", 8, "v5e:2x4"),
        ("v6e", 256, "v6e:16x16"),
        ("h100", 8, "h100:1x8"),
        ("h100", 4096, "h100:512x8"),
    ],
)
def test_topologies(benchmark, chip, count, name):
    assert benchmark.topology(chip, count) == name


def test_both_parts_go_into_one_file(benchmark, tmp_path):
    path = tmp_path / "compile.json"
    benchmark.write(str(path), "layers", [{"layers": 2}])
    benchmark.write(str(path), "chips", [{"chips": 8}])
    benchmark.write(str(path), "layers", [{"layers": 3}])
    found = json.loads(path.read_text())
    assert {part: found[part]["cases"] for part in found} == {
        "layers": [{"layers": 3}],
        "chips": [{"chips": 8}],
    }


def test_the_forms_are_what_they_say(benchmark, devices):
    make = lambda form: benchmark.make_plan(
        benchmark.dataclasses.replace(benchmark.SMALL, num_layers=8),
        16,
        64,
        f"data=2,fsdp=2,tensor=2,{benchmark.FORMS[form]}",
    )
    assert make("as a loop").layer_scan is not None
    assert make("one by one").layer_scan is None
