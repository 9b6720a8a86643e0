"""Whose figures a report shows: of which adapter, which part of it, which pairs."""

from __future__ import annotations

import hashlib
import json
import os
import unicodedata
from pathlib import Path

import pytest

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from report_runs import SUMMARY, Elements, a_report, a_run

from fpo_mlx.errors import FpoError
from fpo_mlx.report import read, read_runs, render
from fpo_mlx.report.findings import missing, warnings
from fpo_mlx.report.read import Run
from fpo_mlx.report.rounds import rounds
from fpo_mlx.report.tables import card, chosen_drop, evaluation

VALID = {"kind": "valid", "iteration": 30, "loss": 0.6, "pairs": 8,
         "metrics": {"rewards/accuracies": 0.625}}  # fmt: skip


def said(run: Run) -> str:
    return "\n".join(w.text for w in warnings([run]))


def n_of(run: Run):
    found = run.results.get("evaluate")
    return found.value["summary"]["n"] if found else None


def write(path, value, when=None):
    path.write_text(json.dumps(value))
    if when is not None:
        os.utime(path, (when, when))
    return path


def summary(n, **more):
    return {"summary": SUMMARY | {"n": n}} | more


def text_of(*runs):
    return " ".join(Elements(render(runs)).text.split())


def parts(run, *scales):
    return [
        {"adapter_path": str(run)} | summary(i, **({} if scale == 1 else {"adapter_scale": scale}))
        for i, scale in enumerate(scales)
    ]


def test_of_several_parts_of_an_adapter_the_whole_is_shown(tmp_path):
    run = a_run(tmp_path / "run")
    write(run / "evaluate.json", {"base": {}, "adapters": parts(run, 0.1, 0.25, 1, 2)})
    (read,) = read_runs([run])
    assert n_of(read) == 2
    assert "×" not in text_of(read)


@pytest.mark.parametrize("listed", [True, False])
def test_a_part_is_shown_only_where_the_whole_is_not_judged_and_as_a_part(tmp_path, listed):
    run = a_run(tmp_path / "run")
    own = parts(run, 0.1, 0.5)
    write(run / "evaluate.json", {"adapters": own} if listed else own[1], 9e9)
    (read,) = read_runs([run])
    assert n_of(read) == 1
    assert "1 held-out pairs, by fpo-mlx evaluate, of the adapter × 0.5" in card(read, 0).source
    table, _ = evaluation([read])
    assert table is not None
    assert table.head == ["Metric", "run × 0.5"]
    assert "evaluate.json is of the adapter × 0.5" in said(read)
    assert chosen_drop(read) == 0.01  # of the training: what a part lost is not all
    write(run / "whole.json", summary(7), 1)
    assert n_of(read_runs([run])[0]) == 7


def test_figures_of_training_pairs_are_named_and_give_way_to_others(tmp_path):
    run = a_run(tmp_path / "run")
    write(run / "train.json", {"kind": "evaluate", "split": "train"} | summary(9), 9e9)
    (read,) = read_runs([run])
    assert card(read, 0).source == "9 training pairs, by fpo-mlx evaluate"
    text = text_of(read)
    assert "Training pairs" in text
    assert "Held-out pairs" not in text
    assert "train.json is of training pairs" in said(read)
    write(run / "evaluate.json", {"kind": "evaluate", "split": "valid"} | summary(5), 1)
    (read,) = read_runs([run])
    assert card(read, 0).source == "5 held-out pairs (valid), by fpo-mlx evaluate"
    assert "Training pairs" not in text_of(read)
    (read,) = read_runs([run], [run / "train.json"])
    assert n_of(read) == 5
    assert "train.json is not shown" in said(read)


def test_pairs_of_training_that_were_called_held_out_are_training_pairs(tmp_path):
    own = summary(9, split="valid", trained_on=True)
    (read,) = read_runs([a_run(tmp_path / "run", evaluate=own)])
    assert card(read, 0).source == "9 training pairs, by fpo-mlx evaluate"
    assert "evaluate.json is of training pairs" in said(read)


def test_features_of_training_pairs_are_named_and_give_way_to_others(tmp_path):
    run = a_run(tmp_path / "run")
    write(run / "t.json", {"kind": "features", "split": "train", "features": [{"feature": 1}]}, 9e9)
    assert "Of training pairs." in text_of(read_runs([run])[0])
    write(run / "v.json", {"kind": "features", "split": "valid", "features": [{"feature": 2}]}, 1)
    (read,) = read_runs([run])
    assert read.results["features"].path.name == "v.json"
    assert "Of training pairs." not in text_of(read)


def test_validation_figures_of_the_run_come_before_those_of_training_pairs(tmp_path):
    run = a_run(tmp_path / "run", [a_report(30), VALID], evaluate=summary(9, split="train"))
    shown = card(read_runs([run])[0], 0)
    assert shown.source == "validation pairs: 8, iteration 30"
    assert ("Reward accuracy", "0.625", "") in shown.figures


def test_training_and_held_out_pairs_side_by_side_are_told_apart(tmp_path):
    base = {"base": {"summary": {"policy_accuracy": 0.5}}}
    runs = read_runs([
        a_run(tmp_path / "a", evaluate=summary(40, split="train", **base)),
        a_run(tmp_path / "b", evaluate=summary(40, split="test")),
    ])  # fmt: skip
    table, _ = evaluation(runs)
    assert table is not None
    assert table.caption == "Held-out pairs"
    assert table.head == ["Metric", "base model, training pairs", "a, training pairs", "b"]
    between = "\n".join(w.text for w in warnings(runs))
    assert "over different pairs: held-out pairs (test), training pairs" in between


@pytest.mark.parametrize("name", ["model", "data", "tokenizer", "saes"])
def test_runs_that_differ_in_one_thing_are_said_to_differ_in_that(tmp_path, name):
    same = dict.fromkeys(("model", "data", "tokenizer", "saes", "adapter"), "a" * 64)
    runs = read_runs([
        a_run(tmp_path / part, record={"settings": {}, "fingerprints": prints})
        for part, prints in (("one", same), ("two", same | {name: "b" * 64}))
    ])  # fmt: skip
    told = [w.text for w in warnings(runs) if "differ in" in w.text]
    assert [text.split(" (")[0] for text in told] == [f"The runs differ in {name}"]


def trained(path, weights):
    """A run whose adapters are these bytes, and what a result says of them."""
    (a_run(path) / "adapters.safetensors").write_bytes(weights)
    return path, {"adapter_path": str(path), "adapter_sha256": sha256(weights)}


def sha256(content):
    return hashlib.sha256(content).hexdigest()


def compared(names):
    """The JSON of `compare`: names of adapters with their digests."""
    answers = {name: f"of {name}" for name in ("base", *names)}
    prompts = [{"prompt": "Q", "answers": answers}]
    return {"kind": "compare", "adapter_sha256": names, "prompts": prompts}


KINDS = {  # a result file of one adapter
    "evaluate": lambda told: summary(1) | told,
    "features": lambda told: {"features": [{"feature": 1}]} | told,
    "compare": lambda told: compared({told["adapter_path"]: told["adapter_sha256"]}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_the_run_s_very_adapters_is_its_own_whatever_they_were_called(tmp_path, kind):
    """Moved, renamed, or judged as a copy: among other runs, and within the folder."""
    (run, own), (other, _) = trained(tmp_path / "a", b"a"), trained(tmp_path / "b", b"b")
    for name in ("gone/x", "a/best", str(tmp_path / "copy")):
        value = KINDS[kind](own | {"adapter_path": name})
        file = write(tmp_path / "judged.json", value, 1)  # file times say nothing
        first, second = read_runs([run, other], [file])
        assert not first.results[kind].stale, name
        assert kind not in second.results, name
        write(run / "r.json", value, 1)
        assert not read_runs([run])[0].results[kind].stale, name
        (run / "r.json").unlink()


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_adapters_that_changed_since_is_stale(tmp_path, kind):
    run, own = trained(tmp_path / "a" / "adapters", b"now")
    for name in (str(run), "adapters", "./a/adapters"):  # as called from above the folder
        told = own | {"adapter_path": name, "adapter_sha256": sha256(b"then")}
        write(run / "r.json", KINDS[kind](told), 9e9)
        (read,) = read_runs([run])
        assert read.results[kind].stale, name
        assert f"r.json ({kind}) is older than the adapters" in said(read)
    write(run / "fresh.json", KINDS[kind](own), 1)
    assert read_runs([run])[0].results[kind].path.name == "fresh.json"


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_adapters_that_the_run_had_before_it_went_on_is_stale(tmp_path, kind):
    """Whatever they were called: the run may have moved between."""
    (run, own), (other, _) = trained(tmp_path / "a", b"now"), trained(tmp_path / "b", b"b")
    (run / "run.json").write_text(json.dumps({"earlier": ["0" * 64, sha256(b"then")]}))
    value = KINDS[kind](own | {"adapter_path": "gone/x", "adapter_sha256": sha256(b"then")})
    file = write(tmp_path / "elsewhere.json", value, 9e9)
    first, second = read_runs([run, other], [file])
    assert first.results[kind].stale
    assert kind not in second.results
    write(run / "r.json", value, 9e9)
    assert read_runs([run])[0].results[kind].stale


@pytest.mark.parametrize("earlier", [None, 3, "x" * 64, [None, 3, []]])
def test_a_spoiled_list_of_earlier_adapters_counts_for_nothing(tmp_path, earlier):
    run, own = trained(tmp_path / "a", b"now")
    (run / "run.json").write_text(json.dumps({"earlier": earlier}))
    told = own | {"adapter_path": "gone/x", "adapter_sha256": "x"}
    write(run / "r.json", summary(1) | told)
    assert "is of another adapter" in said(read_runs([run])[0])


@pytest.mark.parametrize("kind", KINDS)
def test_a_result_of_another_adapter_is_left_out_and_it_is_said(tmp_path, kind):
    """The run's own best/, too."""
    run, own = trained(tmp_path / "run", b"run")
    for name in ("run/best", str(run / "best"), str(tmp_path / "other" / "run"), "renamed"):
        told = own | {"adapter_path": name, "adapter_sha256": sha256(b"other")}
        file = write(run / "best.json", KINDS[kind](told), 9e9)
        (read,) = read_runs([run])
        assert kind not in read.results, name
        assert f"best.json is of another adapter, {name}, and was left out" in said(read)
        with pytest.raises(FpoError, match="found nothing of run"):
            read_runs([run], [file])
    write(run / "own.json", KINDS[kind](own), 1)
    assert "another adapter" not in said(read_runs([run])[0])


def test_figures_in_best_have_a_column_beside_the_run_as_long_as_they_are_of_what_lies_there(
    tmp_path,
):
    """The next command that `train` prints writes them there, where best/ is better."""
    run, own = trained(tmp_path / "run", b"run")
    (run / "best").mkdir()
    (run / "best" / "adapters.safetensors").write_bytes(b"best")
    told = {"adapter_path": str(run / "best"), "adapter_sha256": sha256(b"best")}
    write(run / "best" / "evaluate.json", summary(2) | told)
    for head in (["Metric", "run/best"], ["Metric", "run", "run/best"]):
        table, _ = evaluation(read_runs([run]))
        assert table is not None
        assert list(table.head) == head
        write(run / "evaluate.json", summary(1) | own)
    (run / "best" / "adapters.safetensors").write_bytes(b"later")
    table, _ = evaluation(read_runs([run]))
    assert table is not None
    assert list(table.head) == ["Metric", "run"]


def test_a_file_of_several_adapters_gives_a_run_the_row_of_its_present_adapters(tmp_path):
    run, own = trained(tmp_path / "run", b"now")
    rows = [own | {"adapter_sha256": sha256(b"then")}, own | {"adapter_path": "copy"},
            own | {"adapter_path": "x/run", "adapter_sha256": sha256(b"x")}]  # fmt: skip
    listed = [row | summary(i) for i, row in enumerate(rows)]
    write(run / "all.json", {"adapters": listed})
    assert n_of(read_runs([run])[0]) == 1
    write(run / "all.json", {"adapters": listed[:1] + listed[2:]})
    (read,) = read_runs([run])
    assert n_of(read) == 0
    assert "older than the adapters" in said(read)


@pytest.mark.parametrize(
    ("name", "within", "named"),
    [
        ("{run}", True, True),
        ("old/x", True, False),
        ("x/run", True, False),
        ("x/best", False, False),
    ],
)
def test_of_a_file_without_a_digest_its_place_and_its_path_say_whose_it_is(
    tmp_path, name, within, named
):
    """As older versions wrote it: of the run's folder, or its path is the run's; and its time."""
    run, _ = trained(tmp_path / "run", b"now")
    value = {"adapter_path": name.format(run=run)} | summary(3)
    file = write(tmp_path / "elsewhere.json", value, 9e9)
    if named:
        assert n_of(read_runs([run], [file])[0]) == 3
    else:
        with pytest.raises(FpoError, match="found nothing of run"):
            read_runs([run], [file])
    write(run / "evaluate.json", value, 1)
    (read,) = read_runs([run])
    assert n_of(read) == (3 if within else None)
    assert ("older than the adapters" in said(read)) == within


def test_a_folder_without_its_adapters_keeps_its_results(tmp_path):
    """Copied without what is large."""
    run, own = trained(tmp_path / "run", b"run")
    (run / "adapters.safetensors").unlink()
    write(run / "evaluate.json", own | {"adapter_path": "elsewhere/run"} | summary(3))
    (read,) = read_runs([run])
    assert n_of(read) == 3
    assert "older" not in said(read)


def pairs_at(folder, pairs):
    folder.mkdir(parents=True)
    return hashlib.sha256(write(folder / "pairs.json", {"pairs": pairs}).read_bytes()).hexdigest()


def test_the_pairs_of_a_run_are_those_that_it_was_trained_on(tmp_path, monkeypatch):
    """Whatever lies under that name where the report is made."""
    known = pairs_at(tmp_path / "mine" / "pairs", 5)
    pairs_at(tmp_path / "yours" / "pairs", 7)
    settings = {"data": "pairs", "adapter_path": "adapters"}
    source = {"data": str(tmp_path / "mine" / "pairs"), "pairs": known}
    run = a_run(tmp_path / "runs" / "adapters", record={"settings": settings, "source": source})
    older = a_run(tmp_path / "mine" / "adapters", record={"settings": settings})
    monkeypatch.chdir(tmp_path / "yours")
    assert [read.pairs for read in read_runs([run, older])] == [{"pairs": 5}] * 2
    renamed = (tmp_path / "mine" / "adapters").rename(tmp_path / "mine" / "first")
    assert read_runs([renamed])[0].pairs == {}


@pytest.mark.parametrize("then", ["0" * 64, None])
def test_pairs_that_were_made_since_are_left_out_and_it_is_said(tmp_path, then):
    pairs_at(tmp_path / "pairs", 5)
    source = {"data": str(tmp_path / "pairs"), "pairs": then}
    run = a_run(tmp_path / "adapters", record={"settings": {"data": "x"}, "source": source})
    (read,) = read_runs([run])
    assert read.pairs == {}
    assert "pairs.json was written after the run began" in said(read)


def test_pairs_beside_a_run_are_its_own_only_in_a_round(tmp_path):
    record = {"settings": {"data": "owner/set", "adapter_path": "adapters"}}
    for name, known in (("round-2", {"pairs": 4}), ("project", {})):
        pairs_at(tmp_path / name / "pairs", 4)
        (read,) = read_runs([a_run(tmp_path / name / "adapters", record=record)])
        assert read.pairs == known
    assert rounds([read]) is None


def test_the_run_s_own_validation_comes_before_a_part_of_it(tmp_path):
    part = summary(9, adapter_scale=0.25)
    (read,) = read_runs([a_run(tmp_path / "run", [a_report(30), VALID], evaluate=part)])
    assert card(read, 0).source == "validation pairs: 8, iteration 30"
    (what,) = (m for m in missing([read]) if m.what == "held-out figures")
    assert what.command.endswith("evaluate.whole.json")


@pytest.fixture
def apfs(monkeypatch):
    """A disk that takes names of other letter case or Unicode form for the same, as a Mac's."""

    def plain(path):
        return unicodedata.normalize("NFC", os.path.realpath(path)).casefold()

    monkeypatch.setattr(Path, "samefile", lambda one, other: plain(one) == plain(other))


@pytest.mark.usefixtures("apfs")
@pytest.mark.parametrize("spelled", ["Läufe/Run", unicodedata.normalize("NFD", "läufe/run")])
def test_a_run_is_the_same_in_whatever_letters_its_path_is_written(tmp_path, spelled):
    run = tmp_path / "läufe" / "run"
    assert read.is_of(str(tmp_path / spelled), run)
    assert not read.is_of(str(tmp_path / spelled / "best"), run)
    assert read._ends_in(run, Path(spelled).parts)
    assert not read._ends_in(run, ("other", "run"))
    assert not read._ends_in(run, ("..", "run"))
    assert read._named_data(run, {"adapter_path": spelled, "data": "pairs"}) == [tmp_path / "pairs"]
    assert read._is_name(Path(spelled).name, run)
    assert not read._is_name("run-2", run)
    assert not read._is_name(None, run)
