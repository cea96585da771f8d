"""Text sources, tokenizers and the cut into windows."""

import importlib
import json
import sys

import numpy as np
import pytest

from shardtrain.data import (
    ByteTokenizer,
    TokenDataset,
    load_tokenizer,
    read_text,
    stdlib_text,
    train_validation_split,
)
from shardtrain.errors import DataError


def test_the_standard_library_is_there_and_real():
    text = stdlib_text()
    assert len(text) > 3_000_000
    assert b"class OrderedDict(dict)" in text
    assert b"site-packages/pip" not in text[:1000]
    assert text == stdlib_text()


def test_stdlib_leaves_out_tests_and_installed_packages(tmp_path):
    for name in ("b.py", "a/x.py", "test/t.py", "site-packages/p.py", "a/test/u.py", "a/n.txt"):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"# {name}")
    assert stdlib_text(tmp_path) == b"# a/x.py\n# b.py"


def test_no_standard_library_says_what_to_do(tmp_path):
    with pytest.raises(DataError, match="Pass your own text"):
        stdlib_text(tmp_path / "absent")


def test_read_text_of_file_directory_and_jsonl(tmp_path):
    (tmp_path / "b.txt").write_text("two", encoding="utf-8")
    (tmp_path / "a.txt").write_text("öne", encoding="utf-8")
    (tmp_path / ".hidden").write_text("no")
    (tmp_path / "c.jsonl").write_text('{"text": "three"}\n\n{"text": "four", "id": 1}\n')
    assert read_text(tmp_path / "a.txt") == "öne".encode()
    assert read_text(tmp_path / "c.jsonl") == b"three\nfour"
    assert read_text(tmp_path) == "öne\ntwo\nthree\nfour".encode()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.txt", b"", "holds no text"),
        ("x.txt", b" \n", "holds no text"),
        ("x.txt", b"abc\xff\xfe", "not UTF-8 text: .* at byte 3"),
        ("x.jsonl", b'{"text": "a"}\nnope', "line 2 is not JSON"),
        ("x.jsonl", b'{"txt": "a"}', r"line 1 has no .text. field.*\['txt'\]"),
        ("x.jsonl", b"[1]", "line 1 has no .text. field.*list"),
    ],
)
def test_unreadable_text_names_the_place(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_text(tmp_path / name)


def test_a_missing_path_is_named(tmp_path):
    with pytest.raises(DataError, match=r"no such file or directory: .*absent"):
        read_text(tmp_path / "absent")
    with pytest.raises(DataError, match="0 files read"):
        read_text(tmp_path)


def test_bytes_round_trip():
    tokens = ByteTokenizer().encode("naïve ✓".encode())
    assert tokens.dtype == np.int32
    assert ByteTokenizer().decode(tokens) == "naïve ✓"
    assert ByteTokenizer().decode(tokens[:-1]) == "naïve �"
    assert load_tokenizer(None).vocab_size == 256


def test_a_tokenizer_file_is_used(tmp_path):
    tokenizers = importlib.import_module("tokenizers")
    model = tokenizers.models.WordLevel({"hello": 0, "world": 1, "?": 2}, unk_token="?")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    loaded = load_tokenizer(tmp_path / "tokenizer.json")
    assert loaded.vocab_size == 3
    assert loaded.encode(b"hello there world").tolist() == [0, 2, 1]
    assert loaded.decode(np.array([1, 0])) == "world hello"


def test_tokenizer_errors(tmp_path, monkeypatch):
    with pytest.raises(DataError, match="no tokenizer file"):
        load_tokenizer(tmp_path / "absent.json")
    (tmp_path / "bad.json").write_text(json.dumps({"version": 3}))
    with pytest.raises(DataError, match=r"bad.json is not a tokenizer.json"):
        load_tokenizer(tmp_path / "bad.json")
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(DataError, match=r"shardtrain\[hf\]"):
        load_tokenizer(tmp_path / "bad.json")


def test_windows_predict_every_token_but_the_first_once():
    dataset = TokenDataset(np.arange(100, 111), 4)
    assert len(dataset) == 3
    first, last = dataset[0], dataset[2]
    assert first["tokens"].tolist() == [100, 101, 102, 103]
    assert first["targets"].tolist() == [101, 102, 103, 104]
    assert last["mask"].tolist() == [1, 1, 0, 0]
    assert {k: v.dtype for k, v in first.items()} == {
        "tokens": np.int32, "targets": np.int32, "mask": np.float32
    }  # fmt: skip
    predicted = [t for i in range(3) for t, m in zip(*masked(dataset[i]), strict=True) if m]
    assert predicted == list(range(101, 111))
    with pytest.raises(IndexError):
        dataset[3]


def masked(example):
    return example["targets"].tolist(), example["mask"]


@pytest.mark.parametrize(
    ("tokens", "length", "message"),
    [
        (np.arange(1), 4, "1 tokens are too few"),
        (np.zeros(9), 4, "must be integers"),
        (np.zeros((3, 3), int), 4, "must be integers"),
        (np.arange(9), 0, "at least 1"),
    ],
)
def test_token_datasets_that_cannot_be(tokens, length, message):
    with pytest.raises(DataError, match=message):
        TokenDataset(tokens, length)


def test_the_split_is_disjoint_complete_and_contiguous():
    tokens = np.arange(10_000)
    train, validation = train_validation_split(tokens, 0.05)
    assert abs(len(validation) - 500) <= 16
    np.testing.assert_array_equal(np.sort(np.concatenate([train, validation])), tokens)
    assert (np.diff(validation) > 1).sum() == 15
    np.testing.assert_array_equal(train_validation_split(tokens, 0.05)[0], train)


def test_a_split_that_leaves_nothing_is_refused():
    with pytest.raises(DataError, match="too few to hold out 5%"):
        train_validation_split(np.arange(3), 0.05)
    with pytest.raises(DataError, match="between 0 and 1"):
        train_validation_split(np.arange(100), 1.0)
