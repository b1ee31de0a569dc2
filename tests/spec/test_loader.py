"""Loading a spec: what is right is read; what is wrong is said at its line, all of it at once."""

from pathlib import Path

import pytest

from autocomp.core.errors import SpecError
from autocomp.spec.loader import load_spec, load_stored_spec, parse_overrides


def complaint(path, overrides=None):
    """The message of a spec that must be refused, without the directory."""
    with pytest.raises(SpecError) as caught:
        load_spec(path, overrides)
    return str(caught.value).replace(f"{path.parent}/", "")


def test_reads_values_and_defaults(write):
    spec, source = load_spec(write())
    assert spec.model.source == "some/model"
    assert spec.task.data.label == "topic"
    assert spec.task.data.text == "text"
    assert spec.space[0].bits.method == ["gptq", "rtn"]
    assert spec.space[0].bits.weights == ["dense", 8, 4]
    assert spec.space[1].structure.heads is None
    assert spec.search.trials == 5
    assert source.line("space[1].bits.method") == 18


def test_no_trials_are_the_baselines_alone(write):
    assert load_spec(write(("{trials: 5}", "{trials: 0}"))).spec.search.trials == 0
    assert load_spec(write(), {"search.trials": 0}).spec.search.trials == 0


@pytest.mark.parametrize("floor", ["0.9", "0.0191", "1", "1.0"])
def test_a_floor_on_quality(write, floor):
    spec = load_spec(write(("size: 12 MB", f"quality: {floor}"))).spec
    assert spec.budget.quality == float(floor)


@pytest.mark.parametrize("floor", ["98%", "perplexity 50"])
def test_a_floor_beside_other_figures_is_kept_as_written(write, floor):
    path = write(("size: 12 MB", f"quality: {floor}"))
    assert load_spec(path).spec.budget.quality == floor
    assert load_stored_spec(path).budget.quality == floor
    assert "budget.quality: '98 %%' is no floor" in complaint(write(), {"budget.quality": "98 %%"})


@pytest.mark.parametrize(
    ("floor", "hint"),
    [
        ("97", "an accuracy of 97% is 0.97, and 97% of dense's is '97%'; of a language model"),
        ("0", "got 0. Leave it out to have none"),
        (".nan", "got nan. Leave it out to have none"),
    ],
)
def test_a_floor_that_no_model_can_be_held_against(write, floor, hint):
    path = write(("size: 12 MB", f"quality: {floor}"))
    message = complaint(path)
    assert message.startswith("spec.yaml:10 budget.quality: a floor on quality lies above 0")
    assert hint in message
    if floor != ".nan":  # a study made with it still opens
        assert load_stored_spec(path).budget.quality == float(floor)
    assert "budget.quality: a floor" in complaint(write(), {"budget.quality": 1.01})


def test_reads_sparsity_levels_with_and_without_quotes(write):
    sparsity = "sparsity: {method: [wanda, sparsegpt], levels: [0, 0.5, 2:4, '4:8']}"
    spec, _ = load_spec(write(("structure: {heads: [1.0, 0.5], skip: true}", sparsity)))
    assert spec.space[0].sparsity.method == ["wanda", "sparsegpt"]
    assert spec.space[0].sparsity.levels == [0, 0.5, "2:4", "4:8"]
    assert spec.space[1].sparsity.levels == [0.0]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "label: topic",
            "lable: topic",
            "7 task.data.lable: unknown key. Did you mean 'label'? Allowed: source, "
            "format, subset, split, text, image, label, lines, unique, group, held_out, calibrate, "
            "distil, search, report, transfer",
        ),
        (
            "label: topic",
            "transfer: {examples: 10}",
            "5 task.data: transfer: without lines every text is read whole, so nothing is left of "
            "it to learn from. Name a source of texts: transfer: {source: …, examples: …}",
        ),
        (
            "label: topic",
            "held_out: {split: train}",
            "5 task.data: held_out: this is the data itself. Name another source, or another split "
            "of a hub dataset: held_out: {source: test.jsonl}, held_out: {split: test}",
        ),
        (
            "method: [gptq, rtn]",
            "metod: gptq",
            "15 space[0].bits.metod: unknown key. Did you mean 'method'? "
            "Allowed: method, weights, activations, cache, range, migration, per_site, group",
        ),
        (
            "search: {trials: 5}",
            "trials: 5",
            "19 trials: unknown key. Did you mean 'search.trials'? Allowed: version, "
            "model, task, target, budget, objectives, space, distill, search",
        ),
        (
            "{trials: 5}",
            "{trials: five}",
            "19 search.trials: expected a whole number, got 'five'",
        ),
        (
            "search: {trials: 5}",
            "distill: {loss: [logits, logits+]}",
            "19 distill.loss[1]: 'logits+' is no sum of losses: write logits, or logits+hidden",
        ),
        (
            "search: {trials: 5}",
            "distill: {loss: [logits + task + logits]}",
            "19 distill.loss[0]: 'logits + task + logits' names a loss twice",
        ),
        (
            "search: {trials: 5}",
            "distill: {loss: logits}",
            "19 distill.loss: expected a list, got 'logits'; write [logits]",
        ),
        (
            "search: {trials: 5}",
            "distill: {weight: [0.0]}",
            "19 distill.weight[0]: must be above 0.0, got 0.0",
        ),
        (
            "search: {trials: 5}",
            "distill: {weight: {low: 0, high: 1}}",
            "19 distill.weight: low (0.0) must be above zero",
        ),
        (
            "search: {trials: 5}",
            "distill: {weight: 0.5}",
            "19 distill.weight: expected a mapping or a list, got 0.5; write [0.5]",
        ),
        (
            "search: {trials: 5}",
            "distill: {schedule: [cosin]}",
            "19 distill.schedule[0]: expected one of cosine, linear, constant, got 'cosin'. "
            "Did you mean 'cosine'?",
        ),
        (
            "search: {trials: 5}",
            "distill: {layers: [first]}",
            "19 distill.layers[0]: expected one of each, last, got 'first'",
        ),
        (
            "search: {trials: 5}",
            "distill: {top_k: [0]}",
            "19 distill.top_k[0]: must be above 0, got 0",
        ),
        (
            "search: {trials: 5}",
            "distill: {on_policy: [0, 1.5]}",
            "19 distill.on_policy[1]: must be at most 1.0, got 1.5",
        ),
        ("{trials: 5}", "{trials: 2.5}", "19 search.trials: expected a whole number, got 2.5"),
        ("{trials: 5}", "{trials: true}", "19 search.trials: expected a whole number, got true"),
        ("{trials: 5}", "{trials: '5'}", "19 search.trials: expected a whole number, got '5'"),
        (
            "budget:\n",
            "target:\n  workload: {prompt: 128}\nbudget:\n",
            "9 target.workload: prompt needs generate: write both, {prompt: 128, generate: 32}, "
            "to measure a generated token, or neither, to measure one run of `sequence` tokens",
        ),
        (
            "budget:\n",
            "target:\n  workload: {generate: 0, prompt: 128}\nbudget:\n",
            "9 target.workload.generate: must be above 0, got 0",
        ),
        (
            "budget:\n",
            "target:\n  workload: {image: 56, prompt: 128, generate: 8}\nbudget:\n",
            "9 target.workload: images are not generated from a prompt: leave out one of the two",
        ),
        ("{trials: 5}", "{trials: -1}", "19 search.trials: must be at least 0, got -1"),
        ("{trials: 5}", "5", "19 search: expected a mapping, got 5"),
        ("{trials: 5}", "", "19 search: expected a mapping, got nothing"),
        ("label: topic", "label: 7", "7 task.data.label: expected text, got 7; put it in quotes"),
        (
            "label: topic",
            "format: jsnl",
            "7 task.data.format: expected one of auto, hub, csv, jsonl, parquet, npz, text, "
            "text-folders, got 'jsnl'. Did you mean 'jsonl'?",
        ),
        (
            "heads: [1.0, 0.5]",
            "heads: 0.5",
            "13 space[0].structure.heads: expected a list, got 0.5; write [0.5]",
        ),
        (
            "heads: [1.0, 0.5]",
            "heads: [1.0, 1.5]",
            "13 space[0].structure.heads[1]: must be at most 1.0, got 1.5",
        ),
        (
            "heads: [1.0, 0.5]",
            "heads: [.nan]",
            "13 space[0].structure.heads[0]: must be a finite number, got nan",
        ),
        (
            "search: {trials: 5}",
            "target: {runtime: [onnxruntime, auto]}",
            "19 target.runtime: auto stands alone: runtime: auto",
        ),
        (
            "search: {trials: 5}",
            "target: {runtime: []}",
            "19 target.runtime: needs at least one runtime, each at most once",
        ),
        (
            "search: {trials: 5}",
            "target: {runtime: 7}",
            "19 target.runtime: expected text or a list, got 7; write [7]",
        ),
        ("heads: [1.0, 0.5]", "heads: []", "13 space[0].structure.heads: needs at least 1 entry"),
        (
            "skip: true",
            "skip: yes",
            "13 space[0].structure.skip: expected true or false, got 'yes'",
        ),
        (
            "structure: {heads: [1.0, 0.5], skip: true}",
            "sparsity: {levels: [0.5, 1.5]}",
            "13 space[0].sparsity.levels[1]: must be a fraction of zeros in [0, 1), or N:M like "
            "2:4, got 1.5",
        ),
        (
            "structure: {heads: [1.0, 0.5], skip: true}",
            "sparsity: {levels: [4:2]}",
            "13 space[0].sparsity.levels[0]: must be a fraction like 0.5, or N:M like 2:4 (N of "
            "every M weights kept, M at most 64), got '4:2'",
        ),
        (
            "structure: {heads: [1.0, 0.5], skip: true}",
            "sparsity: {levels: 0.5}",
            "13 space[0].sparsity.levels: expected a list, got 0.5; write [0.5]",
        ),
        (
            "structure: {heads: [1.0, 0.5], skip: true}",
            "sparsity: {level: [0.5]}",
            "13 space[0].sparsity.level: unknown key. Did you mean 'levels'? Allowed: method, "
            "levels",
        ),
        (
            "[dense, 8, 4]",
            "[dense, eight]",
            "16 space[0].bits.weights[1]: expected dense or a whole number, got 'eight'",
        ),
        (
            "[gptq, rtn]",
            "[gptq, 3]",
            "15 space[0].bits.method[1]: expected text, got 3; put it in quotes",
        ),
        (
            "[gptq, rtn]",
            "{a: 1}",
            "15 space[0].bits.method: expected text or a list, got a mapping",
        ),
        (
            "latency: 20%",
            "latency: 20 kB",
            "9 budget.latency: '20 kB' is no latency: write '4 ms', '800 us' or '25%' of dense",
        ),
        (
            "size: 12 MB",
            "size: 12",
            "10 budget.size: 12 is no size: write '12 MB', '8 MiB' or '25%' of dense",
        ),
        ("version: 1", "version: 2", "1 version: expected 1, got 2"),
        (
            "  - match: embeddings\n    bits",
            "  - bits",
            "17 space[1].match: required, but missing. Glob over unit names: "
            "layers.*.attention, embeddings, head.",
        ),
        (
            "search: {trials: 5}",
            "distill: {lr: {low: 1e-3, high: 1e-4}}",
            "19 distill.lr: low (0.001) must not exceed high (0.0001)",
        ),
        (
            "search: {trials: 5}",
            "distill: {lr: {low: 0.0, high: 1e-4}}",
            "19 distill.lr: low (0.0) must be above zero",
        ),
        (
            "search: {trials: 5}",
            "objectives: [latency, size]",
            "19 objectives: needs quality and at least one of latency, size, peak_memory",
        ),
        (
            "search: {trials: 5}",
            "objectives: [quality, size, size]",
            "19 objectives: each objective at most once",
        ),
    ],
)
def test_says_what_is_wrong_where(write, old, new, message):
    assert complaint(write((old, new))) == f"spec.yaml:{message}"


def test_reports_every_problem_in_the_order_of_the_file(write):
    path = write(
        ("version: 1", "version: one"),
        ("label: topic", "label: topic\n    lable: topic"),
        ("latency: 20%", "latency: fast\n  latency: 30%"),
        ("weights: [8]", "weights: [x]"),
        ("search:", "serach:"),
    )
    places = [line.split(": ")[0] for line in complaint(path).splitlines()]
    assert places == [
        "spec.yaml:1 version",
        "spec.yaml:8 task.data.lable",
        "spec.yaml:10 budget.latency",
        "spec.yaml:10 budget.latency",
        "spec.yaml:20 space[1].bits.weights[0]",
        "spec.yaml:21 serach",
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1,\nb: 2\n", "spec.yaml:3: not valid YAML: expected ',' or ']'"),
        ("a: [1,\nb: 2\n", "while parsing a flow sequence, begun on line 1"),
        ("a:\n\t- b\n", "spec.yaml:2: not valid YAML: a tab cannot indent YAML; use spaces"),
        ("a: 1\nb: c: d\n", "spec.yaml:2: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n---\nb: 2\n", "spec.yaml:2: not valid YAML: but found another document"),
        ("a: *nowhere\n", "spec.yaml:1: not valid YAML: found undefined alias"),
        ("a: 1\nb: \x07\n", "spec.yaml: not valid YAML"),
        ("- 1\n- 2\n", "spec.yaml:1: a spec is a mapping with the keys version, model, task"),
        ("just words\n", "spec.yaml:1: a spec is a mapping with the keys version, model, task"),
        ("", "spec.yaml:1 space: required, but missing. Rules: which units"),
        ("x: !!python/name:os.system 1\n", "spec.yaml:1 x: the YAML tag"),
        ("a: &a [*a]\n", "spec.yaml:1 a[0]: an alias that contains itself"),
        ("version: 1\n? [a, b]\n: 2\n", "line 2: a key must be a word"),
    ],
)
def test_what_is_no_yaml(write, text, message):
    assert message in complaint(write(text=text))


def test_a_key_written_twice(write):
    message = complaint(write(("  size: 12 MB", "  size: 12 MB\n  latency: 30%")))
    assert message == (
        "spec.yaml:9 budget.latency: written twice: here and again on line 11. Keep one"
    )


def test_read_by_the_rules_of_yaml_1_2(write):
    path = write(
        ("label: topic", "label: no"),
        ("text-classification", "&t text-classification"),
        ("search: {trials: 5}", "distill: {lr: {low: 1e-4, high: 5e-4}, tokens: [010, 40_000]}"),
    )
    spec = load_spec(path).spec
    assert spec.task.data.label == "no"
    assert spec.task.name == "text-classification"
    assert (spec.distill.lr.low, spec.distill.lr.high) == (1e-4, 5e-4)
    assert spec.distill.tokens == [10, 40_000]


def test_aliases_are_followed(write):
    path = write(
        ("    bits:\n      method", "    bits: &b\n      method"),
        ("bits: {method: rtn, weights: [8]}", "bits: *b"),
    )
    spec = load_spec(path).spec
    assert spec.space[1].bits == spec.space[0].bits


def test_files_that_cannot_be_read(tmp_path):
    (tmp_path / "quickstart.yaml").write_text("")
    with pytest.raises(SpecError, match=r"no such file. Did you mean 'quickstart.yaml'\?"):
        load_spec(tmp_path / "quikstart.yaml")
    with pytest.raises(SpecError, match="no such file"):
        load_spec(tmp_path / "nowhere" / "x.yaml")
    with pytest.raises(SpecError, match="a directory; name a spec file"):
        load_spec(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff\n")
    with pytest.raises(SpecError, match=r"not UTF-8 text \(byte 3\)"):
        load_spec(tmp_path / "latin.yaml")


def test_the_key_is_the_identity_not_the_amount(write):
    key = load_spec(write()).spec.key
    for same in ({"search.trials": 50}, {"search.screen": 1}, {"task.data.text": "text"}):
        assert load_spec(write(), same).spec.key == key
    for other in (
        {"search.seed": 1},
        {"budget.latency": "21%"},
        {"space[0].structure.skip": False},
    ):
        assert load_spec(write(), other).spec.key != key


# Overrides


def test_overrides(write):
    settings = parse_overrides(
        ["search.trials=3", "budget.latency=25%", "space[0].bits.weights=[dense, 4]",
         "target.workload.sequence=32", "model.revision='7'", "task.data.subset=a=b"]
    )  # fmt: skip
    spec = load_spec(write(), settings).spec
    assert spec.search.trials == 3
    assert spec.budget.latency == "25%"
    assert spec.space[0].bits.weights == ["dense", 4]
    assert spec.target.workload.sequence == 32
    assert spec.model.revision == "7"
    assert spec.task.data.subset == "a=b"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("search.trials=none", "--set search.trials: expected a whole number, got 'none'"),
        ("search.trails=3", "--set search.trails: unknown key. Did you mean 'trials'?"),
        ("space[7].match=x", "--set space[7].match: space has 2 entries, the last is [1]"),
        ("version.x=1", "--set version.x: version is 1; 'x' does not exist in it"),
        ("space.match=x", "--set space.match: space is a list; 'match' does not exist in it"),
        (
            "space.0.match=x",
            "--set space.0.match: space is a list; its entries are written space[0]",
        ),
        ("budget[0]=x", "--set budget[0]: budget is a mapping; '[0]' does not exist in it"),
        ("budget={latency: 0 ms}", "--set budget.latency: '0 ms': a latency limit must be above"),
        ("search.trials", "--set search.trials: write it like --set search.trials=3"),
        ("search..trials=3", "'search..trials' is no path into a spec"),
        ("search.trials=[3", "--set: '[3' is not a YAML value"),
        ("budget={size: 1 B, size: 2 B}", "written twice"),
    ],
)
def test_wrong_overrides(write, setting, message):
    with pytest.raises(SpecError) as caught:
        load_spec(write(), parse_overrides([setting]))
    assert message in str(caught.value)
    assert "spec.yaml" not in str(caught.value)


def test_an_override_mends_what_the_file_has_wrong(write):
    path = write(("{trials: 5}", "{trials: five}"))
    assert load_spec(path, {"search.trials": 4}).spec.search.trials == 4


# Paths


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Files beside the spec, in the working directory and at home."""
    for root in (tmp_path, tmp_path / "cwd", tmp_path / "home"):
        (root / "some").mkdir(parents=True)
        (root / "data.csv").write_text("")
    monkeypatch.chdir(tmp_path / "cwd")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.mark.parametrize(
    ("model", "data", "resolved_model", "resolved_data"),
    [
        ("hub/id", "hub-data", "hub/id", "hub-data"),
        ("package:x/model", "package:y", "package:x/model", "package:y"),
        ("./some", "./data.csv", "{dir}/some", "{dir}/data.csv"),
        ("some", "data.csv", "{dir}/some", "{dir}/data.csv"),
        ("./cwd/../some", "/dev/null", "{dir}/some", "/dev/null"),
        ("./link", "~/data.csv", "{dir}/link", "{dir}/home/data.csv"),
    ],
)
def test_local_sources_are_relative_to_the_file(
    write, files, model, data, resolved_model, resolved_data
):
    (files / "link").symlink_to("some")
    path = write(("some/model", model), ("some-dataset", data))
    for name in (path, Path("..") / path.name):
        spec = load_spec(name).spec
        assert spec.model.source == resolved_model.format(dir=files)
        assert spec.task.data.source == resolved_data.format(dir=files)


def test_overrides_are_relative_to_the_working_directory(write, files):
    overrides = {"model.source": "./some", "task.data.source": "data.csv"}
    spec = load_spec(write(), overrides).spec
    assert spec.model.source == f"{files}/cwd/some"
    assert spec.task.data.source == f"{files}/cwd/data.csv"


def test_missing_files_are_reported_at_their_line(write, files):
    path = write(("some/model", "./sone"), ("some-dataset", "datas.csv"))
    assert complaint(path).splitlines() == [
        "spec.yaml:2 model.source: no such file or directory: sone. Did you mean 'some'? "
        "Put it there, or give yours with --set model.source=PATH",
        "spec.yaml:6 task.data.source: no such file or directory: datas.csv. "
        "Did you mean 'data.csv'? Put it there, or give yours with --set task.data.source=PATH",
    ]
    assert complaint(path, {"model.source": "./x"}).startswith("--set model.source: no such file")


def test_a_stored_spec_is_taken_as_it_is(write, files):
    path = write(("some/model", "./gone"), ("some-dataset", "some"))
    spec = load_stored_spec(path)
    assert (spec.model.source, spec.task.data.source) == ("./gone", "some")
    with pytest.raises(SpecError, match=r"spec.yaml:1 version: expected 1, got 2"):
        load_stored_spec(write(("version: 1", "version: 2")))


def test_every_source_is_relative_to_the_spec(write):
    path = write(("label: topic", "transfer: {source: more.txt, examples: 9}"))
    for name in ("more.txt", "test.jsonl"):
        (path.parent / name).touch()
    path.write_text(
        path.read_text().replace(
            "    transfer:", "    held_out: {source: test.jsonl}\n    transfer:"
        )
    )
    data = load_spec(path).spec.task.data
    assert data.transfer.source == str(path.parent / "more.txt")
    assert data.held_out.source == str(path.parent / "test.jsonl")
    (path.parent / "test.jsonl").unlink()
    assert "task.data.held_out.source: no such file or directory" in complaint(path)
