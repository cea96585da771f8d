import copy
import dataclasses
import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as hs

from shardtrain.errors import ShardtrainError, StrategyError
from shardtrain.strategy import AXES, PRECISIONS, REMAT, SCHEDULES, Strategy

sizes = hs.integers(1, 64)
scalars = hs.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(AXES, sizes),
        "zero": hs.integers(0, 3),
        "num_microbatches": sizes,
        "virtual_stages": sizes,
        "sequence_parallel": hs.booleans(),
        "offload": hs.booleans(),
        "equal_microbatches": hs.booleans(),
        "schedule": hs.sampled_from(SCHEDULES),
        "remat": hs.sampled_from(REMAT),
        "precision": hs.sampled_from(PRECISIONS),
        "max_grad_norm": hs.none() | hs.floats(1e-6, 1e6),
    },
)
entries = hs.none() | hs.sampled_from(AXES) | hs.tuples(hs.sampled_from(AXES))
rules = hs.dictionaries(hs.text("abc/*_", min_size=1, max_size=6), entries, max_size=3)


@given(scalars)
def test_str_is_the_inverse_of_parse(values):
    strategy = Strategy(**values)
    assert Strategy.parse(str(strategy)) == strategy


@given(scalars, rules, hs.lists(hs.text("ab*/", min_size=1), max_size=2))
def test_json_round_trip_keeps_everything(values, rules, allowed):
    strategy = Strategy(**values, rules=rules, allow_replicated=tuple(allowed))
    again = Strategy.from_json(strategy.to_json())
    assert again == strategy
    assert hash(again) == hash(strategy)


def test_json_holds_only_what_differs_from_the_defaults():
    assert Strategy().to_json() == "{}"
    text = Strategy(data=2, fsdp=4, zero=1, dcn={"data": 2}).to_json()
    assert text == '{"data": 2, "fsdp": 4, "zero": 1, "dcn": {"data": 2}}'


def test_str_shows_what_differs():
    assert str(Strategy()) == "data=1"
    assert str(Strategy(tensor=2, data=4, equal_microbatches=True)) == (
        "data=4,tensor=2,equal_microbatches=true"
    )


def test_parse_takes_every_scalar_field():
    text = (
        "data=-1,fsdp=2,pipeline=2,expert=2,context=2,tensor=2,zero=1,sequence_parallel=True,"
        "num_microbatches=4,schedule=gpipe,virtual_stages=2,remat=dots,offload=no,precision=bf16,"
        "max_grad_norm=0.5,equal_microbatches=1"
    )
    s = Strategy.parse(text)
    assert (s.data, s.fsdp, s.pipeline, s.expert, s.context, s.tensor) == (-1, 2, 2, 2, 2, 2)
    assert (s.zero, s.num_microbatches, s.virtual_stages) == (1, 4, 2)
    assert (s.schedule, s.remat, s.precision, s.max_grad_norm) == ("gpipe", "dots", "bf16", 0.5)
    assert (s.sequence_parallel, s.offload, s.equal_microbatches) == (True, False, True)
    assert Strategy.parse(" data = 2 , ") == Strategy(data=2)
    assert Strategy.parse("") == Strategy()
    assert Strategy.parse("max_grad_norm=none") == Strategy()


@pytest.mark.parametrize("spelling", ["bf16", "bfloat16"])
def test_precision_spellings_are_one(spelling):
    assert Strategy(precision=spelling) == Strategy(precision="bf16")
    assert Strategy(precision="float32") == Strategy()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("dta=2", "no field 'dta': did you mean 'data'"),
        ("data", "not of the form field=value"),
        ("data=two", "data='two' is not a whole number"),
        ("data=2.5", "data='2.5' is not a whole number"),
        ("data=2,data=4", "gives 'data' twice"),
        ("max_grad_norm=big", "is not a number"),
        ("max_grad_norm=nan", "not a number > 0"),
        ("offload=maybe", "offload='maybe' is not true or false"),
        ("rules=x", "'rules' cannot be written in a strategy string"),
        ("schedule=1f2b", "did you mean '1f1b'"),
        ("remat=all", "known: dots, dots_no_batch, full, none"),
        ("precision=fp8", "precision='fp8' is not known"),
        ("zero=4", "zero=4 is not 0, 1, 2 or 3"),
        ("data=0", "data=0: a mesh axis size"),
        ("data=-2", "data=-2: a mesh axis size"),
        ("num_microbatches=0", "num_microbatches=0 is not a whole number >= 1"),
        ("data=-1,tensor=-1", "only one axis size may be -1, found data, tensor"),
    ],
)
def test_parse_says_what_is_wrong(text, message):
    with pytest.raises(StrategyError, match=message):
        Strategy.parse(text)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"data": True}, "data=True"),
        ({"data": 2.0}, "data=2.0"),
        ({"tensor": "2"}, "tensor='2'"),
        ({"zero": True}, "zero=True is not"),
        ({"zero": -1}, "zero=-1 is not"),
        ({"num_microbatches": True}, "num_microbatches=True"),
        ({"virtual_stages": 0}, "virtual_stages=0"),
        ({"max_grad_norm": 0}, "max_grad_norm=0"),
        ({"max_grad_norm": "1"}, "max_grad_norm='1'"),
        ({"max_grad_norm": float("nan")}, "max_grad_norm=nan"),
        ({"offload": "no"}, "offload='no' is not True or False"),
        ({"dcn": {"dat": 2}}, "dcn axis 'dat' is not a mesh axis: did you mean 'data'"),
        ({"data": 4, "dcn": {"data": 3}}, "dcn data=3 does not divide data=4"),
        ({"data": 4, "dcn": {"data": 0}}, "dcn data=0"),
        ({"data": 4, "dcn": {"data": "2"}}, "dcn data='2' is not a whole number"),
    ],
)
def test_values_out_of_range_are_refused(values, message):
    with pytest.raises(StrategyError, match=message):
        Strategy(**values)


def test_every_strategy_error_is_a_value_error():
    assert issubclass(StrategyError, ShardtrainError)
    assert issubclass(ShardtrainError, ValueError)


@pytest.mark.parametrize("text", ["", "{", "[1]", '"data=2"', "3", '{"dta": 1}', '{"zero": 9}'])
def test_unreadable_json_is_refused(text):
    with pytest.raises(StrategyError):
        Strategy.from_json(text)


def test_replace_makes_a_checked_copy():
    strategy = Strategy(data=2)
    assert strategy.replace(tensor=2) == Strategy(data=2, tensor=2)
    assert strategy == Strategy(data=2)
    with pytest.raises(StrategyError, match="did you mean 'tensor'"):
        strategy.replace(tensr=2)
    with pytest.raises(StrategyError, match="zero=7"):
        strategy.replace(zero=7)


def test_a_strategy_cannot_be_changed():
    strategy = Strategy(rules={"embed": "tensor"}, dcn={"data": 1})
    with pytest.raises(dataclasses.FrozenInstanceError):
        strategy.data = 2
    rules = strategy.rules
    for change in (
        lambda: rules.update(embed=None),
        lambda: rules.__setitem__("embed", None),
        lambda: rules.__ior__({"mlp": None}),
        lambda: rules.pop("embed"),
        lambda: rules.clear(),
    ):
        with pytest.raises(TypeError, match=r"frozen: use strategy\.replace"):
            change()
    assert dict(strategy.rules) == {"embed": "tensor"}


def test_a_strategy_does_not_share_its_rules_with_the_caller():
    rules = {"embed": ["data", "fsdp"]}
    strategy = Strategy(rules=rules)
    rules["embed"].append("tensor")
    assert strategy.rules == {"embed": ("data", "fsdp")}


def test_copies_and_pickles_are_equal():
    strategy = Strategy(data=2, rules={"a/*": (None, "tensor")}, allow_replicated="a/**")
    assert strategy.allow_replicated == ("a/**",)
    for again in (copy.deepcopy(strategy), pickle.loads(pickle.dumps(strategy))):
        assert again == strategy
        assert hash(again) == hash(strategy)


def test_sizes_are_in_mesh_order():
    assert list(Strategy(tensor=2, data=3).sizes.items()) == [
        ("data", 3),
        ("fsdp", 1),
        ("pipeline", 1),
        ("expert", 1),
        ("context", 1),
        ("tensor", 2),
    ]
