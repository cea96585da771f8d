"""Every example in a docstring runs and prints what it says."""

import doctest
import importlib
from pathlib import Path

import pytest

import shardtrain as st

PACKAGE = Path(st.__file__).parent
FILES = [p for p in sorted(PACKAGE.rglob("*.py")) if ">>> " in p.read_text()]
NAMES = [".".join(("shardtrain", *p.relative_to(PACKAGE).with_suffix("").parts)) for p in FILES]


@pytest.mark.parametrize("name", [name.removesuffix(".__init__") for name in NAMES])
def test_examples_of(devices, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert found.attempted
    assert not found.failed, "the examples that failed are in the captured output"
