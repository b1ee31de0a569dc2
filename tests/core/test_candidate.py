"""Options and candidates: round trips, keys that follow equality, readable YAML."""

import pickle
from dataclasses import replace

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from autocomp.core.candidate import Candidate, Distillation, Option, Step
from autocomp.core.errors import UserError

NAMES = st.sampled_from(["gptq", "rtn", "heads", "width", "skip", "keep", "weights", "on", "null"])
VALUES = (
    st.text(max_size=8)
    | st.integers(-(10**6), 10**6)
    | st.booleans()
    | st.floats(allow_nan=False, allow_infinity=False)
)
STEPS = st.builds(
    lambda name, args: Step(name, tuple(sorted(args.items()))),
    NAMES,
    st.dictionaries(NAMES, VALUES, max_size=3),
)
OPTIONS = st.lists(STEPS, max_size=3, unique_by=lambda step: step.operator).map(
    lambda steps: Option(tuple(steps))
)
DISTILLATIONS = st.builds(
    Distillation,
    tokens=st.integers(0, 10**7),
    lr=st.floats(1e-7, 1.0),
    temperature=st.floats(0.1, 10.0),
    loss=st.sampled_from(["logits", "logits+hidden"]),
    weight=st.sampled_from([0.5, 1.0]),
    schedule=st.sampled_from(["cosine", "linear"]),
    layers=st.sampled_from(["each", "last"]),
    top_k=st.sampled_from([16, 64]),
    on_policy=st.sampled_from([0.0, 0.5]),
)
UNITS = st.sampled_from(
    ["embeddings", "layers.0.attention", "layers.0.ffn", "layers.11.ffn", "head"]
)
CANDIDATES = st.builds(Candidate.of, st.dictionaries(UNITS, OPTIONS, max_size=5), DISTILLATIONS)

SMALL = Candidate.of(
    {
        "embeddings": Option((Step.of("rtn", weights=4, group=128),)),
        "layers.0.attention": Option((Step.of("heads", keep=6), Step.of("gptq", weights=8))),
        "layers.0.ffn": Option((Step.of("skip"),)),
        "layers.1.ffn": Option(),
    },
    Distillation(tokens=80_000, lr=2e-4),
)


@given(OPTIONS)
def test_option_round_trip(option):
    again = Option.from_json(option.to_json())
    assert again == option
    assert again.key == option.key


@given(CANDIDATES)
def test_candidate_round_trips(candidate):
    for again in (
        Candidate.from_json(candidate.to_json()),
        Candidate.from_yaml(candidate.to_yaml()),
        pickle.loads(pickle.dumps(candidate)),
    ):
        assert again.options == candidate.options
        assert again.to_json() == candidate.to_json()
        assert (again.key, again.stitch_key) == (candidate.key, candidate.stitch_key)


@given(CANDIDATES, CANDIDATES)
def test_keys_differ_where_candidates_do(one, other):
    same_units = one.by_unit == other.by_unit
    assert (one.stitch_key == other.stitch_key) == same_units
    same = same_units and one.distillation.to_json() == other.distillation.to_json()
    assert (one.key == other.key) == same


def test_readable_yaml():
    assert SMALL.to_yaml() == (
        "units:\n"
        "  embeddings: {rtn: {group: 128, weights: 4}}\n"
        "  layers.0.attention: {heads: {keep: 6}, gptq: {weights: 8}}\n"
        "  layers.0.ffn: {skip: {}}\n"
        "  layers.1.ffn: {}\n"
        "distillation: {tokens: 80000, lr: 0.0002, temperature: 2.0, loss: logits}\n"
    )
    assert yaml.safe_load(SMALL.to_yaml()) == SMALL.to_json()


def test_keys_of_older_studies_stay():
    """Found with the code from before there was more than one loss."""
    older = Candidate.of(
        {
            "layers.0.ffn": Option((Step.of("gptq", weights=4, group=128),)),
            "layers.0.attention": Option((Step.of("skip"),)),
        },
        Distillation(80_000, 2e-4, 2.0, "logits"),
    )
    assert older.key == "a9475eb6d18c05bf"
    assert replace(older, distillation=Distillation()).key == "193c5c237274be33"
    assert replace(older, runtime="openvino").key == "6ccce794e96913ff"


def test_settings_at_their_default_are_left_out():
    first = {"tokens": 9, "lr": 1e-4, "temperature": 2.0, "loss": "logits"}
    assert Distillation(tokens=9).to_json() == first
    assert Distillation.from_json(first) == Distillation(tokens=9)
    more = Distillation(9, 1e-4, 2.0, "logits+task", 0.5, "linear", "last", 8, 0.25)
    assert more.to_json() == {
        **first,
        "loss": "logits+task",
        "weight": 0.5,
        "schedule": "linear",
        "layers": "last",
        "top_k": 8,
        "on_policy": 0.25,
    }
    assert more.losses == ("logits", "task")


def test_the_order_of_steps_counts():
    one, two = Step.of("heads", keep=6), Step.of("gptq", weights=8)
    swapped = [Candidate.of({"u": Option(steps)}) for steps in ((one, two), (two, one))]
    assert swapped[0].key != swapped[1].key
    assert swapped[0].stitch_key != swapped[1].stitch_key


def test_keys_follow_equality_and_ignore_settings_without_training():
    assert Step.of("width", keep=0.5) == Step("width", (("keep", 0.5),))
    whole, real = (Candidate.of({"u": Option((Step.of("w", keep=k),))}) for k in (2, 2.0))
    assert whole == real
    assert whole.key == real.key
    idle = replace(SMALL, distillation=Distillation(tokens=0, lr=1e-2))
    assert idle.key == replace(SMALL, distillation=Distillation(tokens=0, lr=1e-5)).key
    assert idle.key != SMALL.key
    assert idle.stitch_key == SMALL.stitch_key


def test_lookups_and_labels():
    option = SMALL["layers.0.attention"]
    step = option.step("heads")
    assert step is not None
    assert step["keep"] == 6
    assert option.step("skip") is None
    with pytest.raises(KeyError):
        step["lost"]
    assert option.label() == "heads keep=6 + gptq weights=8"
    assert Option().label() == "dense"
    assert Option().dense
    assert not option.dense
    assert next(iter(SMALL))[0] == "embeddings"


def test_an_operator_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        Option((Step.of("rtn", weights=8), Step.of("rtn", weights=4)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "- 1",
        "units: 3",
        "units: {a: 3}",
        "units: {a: {b: 3}}",
        "units: {",
        "x: 1",
        "units: {}\ndistillation: {token: 3}",
    ],
)
def test_what_is_no_candidate_is_a_user_error(text):
    with pytest.raises(UserError, match="not a candidate"):
        Candidate.from_yaml(text)


def test_the_runtime_is_part_of_the_key_and_only_where_there_is_one():
    plain = Candidate.of(
        {"a": Option((Step.of("heads", keep=6), Step.of("gptq", weights=8))), "b": Option()},
        Distillation(tokens=80000, lr=2e-4),
    )
    # Of a ledger written before there were runtimes: such studies resume.
    assert (plain.key, plain.stitch_key) == ("6747ff4fff67f791", "9539f5ff944c729a")
    assert set(plain.to_json()) == {"units", "distillation"}
    named = [replace(plain, runtime=name) for name in ("onnxruntime", "openvino")]
    assert len({plain.key, *(each.key for each in named)}) == 3
    assert {each.stitch_key for each in named} == {plain.stitch_key}
    for each in named:
        assert Candidate.from_json(each.to_json()) == each
        assert Candidate.from_yaml(each.to_yaml()) == each
        assert each.to_yaml() == plain.to_yaml() + f"runtime: {each.runtime}\n"
    assert Candidate.from_json(plain.to_json()) == plain
