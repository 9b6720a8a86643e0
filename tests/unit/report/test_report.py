"""The report: what it shows, what it escapes, what it says of runs that are not whole."""

from __future__ import annotations

import json
import math
import os
import re
from typing import Any

import pytest
from click.testing import CliRunner

pytest.importorskip("jinja2")
pytest.importorskip("matplotlib")

from report_runs import SUMMARY, Elements, a_report, a_run, evil_runs

from fpo_mlx.cli import main
from fpo_mlx.errors import FpoError
from fpo_mlx.report import read_runs, render
from fpo_mlx.report.findings import missing, warnings
from fpo_mlx.report.names import unique_names
from fpo_mlx.report.plots import POINTS, Line, _spans, draw, points
from fpo_mlx.report.read import Run, kind_of
from fpo_mlx.report.rounds import rounds
from fpo_mlx.report.tables import objective


def said(runs: list[Run]) -> str:
    return "\n".join(f"{w.run}: {w.text}" for w in warnings(runs))


def test_markup_in_any_file_name_or_path_stays_text(tmp_path):
    page = Elements(render(read_runs(evil_runs(tmp_path / "<b>&amp;"))))
    tags = {tag for tag, _ in page.found}
    assert not tags & {"script", "img", "iframe", "object", "b", "base", "form", "foreignobject"}
    assert not [a for _, attributes in page.found for a in attributes if a.startswith("on")]
    assert page.text.count("alert(") >= 20
    links = [a["href"] for a in page.of("a")]
    assert links
    assert all(link is not None and link.startswith("#") for link in links)


def test_the_page_points_to_nothing_outside_but_neuronpedia(tmp_path):
    rows = [{"index": 7, "change": 0.5, "neuronpedia": "https://www.neuronpedia.org/g/25/7"}]
    run = a_run(tmp_path / "run", evaluate={"summary": SUMMARY}, features={"features": rows})
    page = render(read_runs([run]))
    elements = Elements(page)
    assert re.findall(r"https?://[^\s\"'<]+", page) == ["https://www.neuronpedia.org/g/25/7"]
    assert {a["href"] for a in elements.of("link")} == {"data:,"}
    assert not re.findall(r"url\((?!#)|@import|src=|srcset=", page)
    policy = next(m for m in elements.of("meta") if m.get("http-equiv"))
    assert (policy["content"] or "").startswith("default-src 'none'")


def test_every_table_has_a_caption_and_heads_with_scope(tmp_path):
    page = render(read_runs(evil_runs(tmp_path)))
    tables = re.findall(r"<table.*?</table>", page, re.DOTALL)
    assert len(tables) >= 6
    for table in tables:
        assert "<caption>" in table
        assert '<th scope="col"' in table
        assert '<th scope="row">' in table
        assert not re.search(r"<th(?! scope=)[ >]", table)
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    pictures = [a for a in Elements(page).of("div") if a.get("role") == "img"]
    assert len(pictures) == page.count("<figure>") > 0
    assert all("iteration" in (a["aria-label"] or "") for a in pictures)


FEATURE = {
    "sae": 0, "feature": 123, "change": -0.25, "label": "lists", "tokens": [" -"],
    "link": "https://www.neuronpedia.org/m/1/123",
    "contexts": [{"activation": 2.0, "token": " -", "text": "First:«-» milk\n", "where": "pair 7"}],
}  # fmt: skip


def test_figures_of_the_files_are_on_the_page(tmp_path):
    record = {"settings": {"objective": "fpo"}, "memory": {"predicted_peak_gb": 1.8}}
    run = a_run(
        tmp_path / "run", record=record, evaluate={"summary": SUMMARY},
        features={"features": [FEATURE]},
        compare={"prompts": [{"prompt": "Why?", "answers": {"base": "So.", "run": "Thus."}}]},
    )  # fmt: skip
    text = " ".join(Elements(render(read_runs([run]))).text.split())
    for part in ("0.9", "0.8 to 0.975", "−0.1", "40 held-out pairs", "123", "lists", "−0.25",
                 "First:«-» milk", "Why?", "Thus.", "blocks 3 to 5: mlp.up_proj",
                 "+20 %"):  # fmt: skip
        assert part in text, part


def test_settings_at_their_defaults_stand_apart_from_those_that_were_chosen(tmp_path):
    page = render(read_runs([a_run(tmp_path / "run")]))
    chosen, rest = (
        re.findall(r'<th scope="row">([a-z_]+)</th>', part.split("</table>")[0])
        for part in (
            page.split("Settings that were chosen")[-1],
            page.split("at their defaults")[-1],
        )
    )
    assert {"model", "sae", "data", "iters", "learning_rate"} == set(chosen)
    assert {"beta", "alpha", "constraint", "stop_gradient", "objective"} == set(rest)


@pytest.mark.parametrize("kept", ["run.json", "metrics.jsonl"])
def test_half_a_run_is_shown_and_its_other_half_named(tmp_path, kept):
    run = a_run(tmp_path / "run")
    for path in run.iterdir():
        if path.name != kept:
            path.unlink()
    runs = read_runs([run])
    page = Elements(render(runs)).text
    other = {"run.json": "metrics.jsonl", "metrics.jsonl": "run.json"}[kept]
    assert any(m.what.startswith(other) for m in missing(runs))
    assert f"{other} (" in page


def test_what_is_missing_comes_with_a_command_that_the_shell_reads_back(tmp_path):
    import shlex

    record = {"settings": {"model": "my model", "sae": ["a b"], "data": "pairs; rm x"}}
    run = a_run(tmp_path / "my run", record=record)
    found = {m.what: shlex.split(m.command) for m in missing(read_runs([run]))}
    words = found["held-out figures"]
    assert words[:2] == ["fpo-mlx", "evaluate"]
    assert dict(zip(words[2::2], words[3::2], strict=True)) == {
        "--model": "my model", "--sae": "a b", "--data": "pairs; rm x",
        "--adapter-path": str(run), "--json": str(run / "evaluate.json"),
    }  # fmt: skip
    assert found["sample answers"][1] == "compare"
    assert "--split" not in words
    (run / "evaluate.json").write_text(json.dumps({"summary": SUMMARY}))
    assert "held-out figures" not in {m.what for m in missing(read_runs([run]))}


def test_the_command_names_the_split_that_is_there(tmp_path):
    data = tmp_path / "pairs"
    data.mkdir()
    (data / "valid.jsonl").touch()
    run = a_run(tmp_path / "run", record={"settings": {"data": str(data)}})
    command = next(m.command for m in missing(read_runs([run])) if "evaluate" in m.command)
    assert "--split valid" in command
    (data / "test.jsonl").touch()
    assert not any("--split" in m.command for m in missing(read_runs([run])))


def test_the_commands_that_a_report_names_are_commands_with_these_flags(tmp_path):
    import shlex

    settings = {"link_parameters": {"rho": 0.3}, "chat_template_args": {"thinking": False}}
    runs = [a_run(tmp_path / "run"), a_run(tmp_path / "own", record={"settings": settings})]
    commands = [shlex.split(m.command) for m in missing(read_runs(runs))]
    for words in commands:
        if command := main.commands.get(words[1]):
            known = {name for p in command.params for name in p.opts}
            assert set(words[2::2]) <= known, words
    (own,) = (words for words in commands if words[1] == "evaluate" and str(runs[1]) in words)
    given = dict(zip(own[2::2], own[3::2], strict=True))
    assert json.loads(given["--chat-template-args"]) == {"thinking": False}


@pytest.mark.parametrize(
    ("of", "said"),
    [({"target_drift": 0.3}, "fpo: β 0.1, α for a drift of 0.3 on features"),
     ({"target_kl": 5.0}, "fpo: β 0.1, α for a KL of 5 on features"),
     ({"target_drift": None}, "fpo: β 0.1, α 0.5 on features")],
)  # fmt: skip
def test_an_alpha_that_was_found_is_named_by_its_target(tmp_path, of, said):
    settings = {"objective": "fpo", "beta": 0.1, "alpha": 0.5, "constraint": "features"}
    record = {"settings": {**settings, "stop_gradient": True, **of}}
    assert objective(read_runs([a_run(tmp_path / "run", record=record)])[0]) == said


def test_damaged_files_are_told_and_the_rest_is_shown(tmp_path):
    run = a_run(tmp_path / "run", evaluate={"summary": SUMMARY})
    (run / "evaluate.json").write_text('{"summary": {')
    (run / "run.json").write_text("[1]")
    (run / "deep.json").write_text("[" * 10_000)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "iter')
    runs = read_runs([run])
    assert len(runs[0].train) == 3
    assert "evaluate.json cannot be read" in said(runs)
    assert "run.json holds list, wanted a JSON object" in said(runs)
    assert "deep.json cannot be read: nested too deeply" in said(runs)
    assert "metrics.jsonl:4" in said(runs)
    assert "fpo-mlx evaluate" in render(runs)


def test_figures_of_the_wrong_kind_do_not_stop_a_report(tmp_path):
    odd = {"n": "x", "rewards/accuracies": None, "rewards/margins": math.nan, "kl/chosen": [1],
           "rewards/margins/ci95": "ab", "features/chosen": math.inf, "u": True}  # fmt: skip
    reports = [{"kind": "train"}, {"kind": "train", "iteration": "x", "loss": "y", "metrics": 3},
               a_report(1) | {"loss": math.nan, "warnings": "text"}, {"kind": "valid"}]  # fmt: skip
    run = a_run(tmp_path / "run", reports, evaluate={"summary": odd, "base": 3},
                features={"features": [1, {"index": {}}]}, compare={"prompts": "x"})  # fmt: skip
    text = Elements(render(read_runs([run]))).text
    assert "not a number" in text
    assert "The loss was not finite" in text


@pytest.mark.parametrize("loss", [math.nan, None])
def test_a_loss_that_is_no_number_is_said(tmp_path, loss):
    run = a_run(tmp_path / "run", [{**a_report(1), "loss": loss}])
    assert "The loss was not finite" in said(read_runs([run]))


def test_warnings_speak_of_collapse_length_and_results_older_than_the_adapters(tmp_path):
    run = a_run(
        tmp_path / "run",
        [
            a_report(10, **{"logps_per_token/chosen_change": -22.7}) | {"warnings": ["gap"]},
            {"kind": "skipped", "iteration": 11, "reason": "too far", "in_a_row": 1},
        ],
        evaluate={"summary": SUMMARY},
    )
    (run / "adapters.safetensors").write_bytes(b"")
    os.utime(run / "evaluate.json", (1, 1))
    text = said(read_runs([run]))
    for part in ("Updates left out: 1; the first at iteration 11: too far",
                 "lost 22.7 nats a token", "0.95 where", "0.6 elsewhere", "Iteration 10: gap",
                 "older than the adapters", "iteration 10 of 30"):  # fmt: skip
        assert part in text, part
    assert "collapsed?" in render(read_runs([run]))


LANDED = {
    "kind": "landed", "iteration": 30, "figure": "drift", "part": 0.868, "pairs": 40,
    "before": 0.116, "after": 0.1001, "target": 0.1, "loss": 0.6,
    "metrics": {"rewards/accuracies": 0.625, "logps_per_token/chosen_change": -0.25},
}  # fmt: skip


@pytest.mark.parametrize("reports", [(20, 30), (20,)])  # the second: an early stop between reports
def test_a_part_that_was_saved_is_told_and_its_figures_are_those_of_the_run(tmp_path, reports):
    whole = [a_report(n) | {"metrics": {"logps_per_token/chosen_change": -25.0}} for n in reports]
    runs = read_runs([a_run(tmp_path / "run", [*whole, LANDED])])
    text = said(runs)
    assert (
        "Saved is 0.868 of the change that was trained: on 40 validation pairs features move by "
        "0.1 of their size, wanted 0.1; with the whole change 0.116."
    ) in text
    assert "collapsed" not in text, "the part that was saved has not"
    shown = render(runs)
    assert "validation pairs: 40, iteration 30" in shown
    assert "0.625" in shown


@pytest.mark.parametrize("later", [{}, {"kind": "valid"}])  # the second: an early stop
def test_a_part_that_training_went_on_from_is_not_told(tmp_path, later):
    run = a_run(tmp_path / "run", [a_report(30), LANDED, a_report(40) | later])
    assert "Saved is" not in said(read_runs([run]))


def test_a_whole_run_without_trouble_has_no_warnings(tmp_path):
    even = SUMMARY | {"rewards/accuracies/chosen_not_longer": 0.9}
    runs = read_runs([a_run(tmp_path / "run", evaluate={"summary": even})])
    assert said(runs) == ""
    assert "Before you trust" not in render(runs)


def test_runs_that_cannot_be_compared_are_called_that(tmp_path):
    other = {"settings": {}, "fingerprints": {"model": "c" * 64, "saes": [["d" * 64, "x"]]}}
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b", record=other)]
    text = said(read_runs(runs))
    assert "differ in model" in text
    assert "D cannot be compared" in text
    assert said(read_runs(runs[:1])) == ""


def test_results_over_several_adapters_go_to_their_runs(tmp_path):
    runs = [a_run(tmp_path / name) for name in ("a", "b")]
    listed = [{"adapter_path": str(r), "summary": SUMMARY | {"n": i}} for i, r in enumerate(runs)]
    both = tmp_path / "both.json"
    both.write_text(
        json.dumps({"base": {"summary": {"n": 9, "rewards/margins": 77.5}}, "adapters": listed})
    )
    answers = {"base": "B", str(runs[0]): "of a", str(runs[1]): "second answer"}
    side = tmp_path / "side.json"
    row = {"prompt": "Q", "answers": answers, "cut": [str(runs[1])]}
    side.write_text(json.dumps({"prompts": [row]}))
    read = read_runs(runs, [both, side])
    assert [run.results["evaluate"].value["summary"]["n"] for run in read] == [0, 1]
    page = Elements(render(read)).text
    assert "base model" in page
    assert "77.5" not in page  # against itself: it says nothing
    assert page.count("second answer") == 1
    assert page.count("[cut at its limit]") == 1


def test_a_result_beside_the_folder_is_found_and_the_newest_counts(tmp_path):
    run = a_run(tmp_path / "run", evaluate={"summary": {"n": 1}})
    for name, n, when in (("run.json", 2, 9e9), ("run.old.json", 3, 2), ("runs.json", 4, 9.5e9)):
        (tmp_path / name).write_text(json.dumps({"summary": {"n": n}}))
        os.utime(tmp_path / name, (when, when))
    assert read_runs([run])[0].results["evaluate"].value["summary"]["n"] == 2


def a_round(root, number, judges, **more):
    folder = root / f"round-{number}"
    a_run(folder / "adapters", record={"settings": {"data": str(folder / "pairs")}})
    (folder / "pairs").mkdir()
    pairs = {"pairs": 40 * number, "longer_share": 0.5 + number / 10, "judges": judges}
    (folder / "pairs" / "pairs.json").write_text(json.dumps(pairs | more))
    held_out = {"win_rate": 0.6, "interval": [0.52, 0.68], "tokens": 31.0, "drift": None}
    (folder / "round.json").write_text(json.dumps(held_out))


def test_a_drift_that_stands_squared_in_the_file_is_called_so(tmp_path):
    run = a_run(tmp_path / "run", evaluate={"summary": SUMMARY | {"drift/rejected": 0.09}})
    page = Elements(render(read_runs([run]))).text
    assert "Drift squared, rejected (relative D)" in page
    assert "drift/rejected" not in page


def test_rounds_stand_side_by_side_in_their_order(tmp_path):
    for number in (10, 2, 1):
        a_round(tmp_path / "r", number, {"reward:x@1": {"flip_rate": None, "ties": 3 * number}})
    runs = read_runs([tmp_path / "r"])
    assert [run.name for run in runs] == [f"round-{n}/adapters" for n in (1, 2, 10)]
    table = rounds(runs)
    rows = {row[0]: list(row[1:]) for row in table.rows}
    assert rows["Pairs"] == ["40", "80", "400"]
    assert rows["Judge"] == ["reward:x@1"] * 3
    assert rows["Ties and both bad"] == ["3", "6", "30"]
    assert rows["Held-out answers: wins against the round before"] == ["0.6\n0.52 to 0.68"] * 3
    assert "Flip rate: both orders name different answers" not in rows  # a reward has no order
    assert "Pairs and rounds" in render(runs)


def test_several_judges_have_rows_of_their_own_and_odd_files_do_no_harm(tmp_path):
    a_round(tmp_path / "r", 1, {"j": {"flip_rate": 0.25}, "person": {"flip_rate": 0.1}})
    a_round(tmp_path / "r", 2, ["no object"], pairs="many", longer_share=[1])
    (tmp_path / "r" / "round-2" / "round.json").write_text(
        '{"win_rate": 0.5, "interval": ["a", 2]}'
    )
    runs = read_runs([tmp_path / "r"])
    rows = {row[0]: list(row[1:]) for row in rounds(runs).rows}
    assert rows["Flip rate: both orders name different answers; j"] == ["0.25", "–"]
    assert rows["Pairs"] == ["40", "–"]
    assert render(runs)
    assert rounds(read_runs([a_run(tmp_path / "alone")])) is None


def of(run: Run, kind: str = "evaluate"):
    return run.results[kind].value if kind in run.results else None


def test_a_result_that_names_one_adapter_goes_to_no_other_run(tmp_path):
    """Under --results: the other run keeps its own figures."""
    a, b = a_run(tmp_path / "a"), a_run(tmp_path / "b", evaluate={"summary": {"n": 7}})
    judged, moved = tmp_path / "judged.json", tmp_path / "moved.json"
    judged.write_text(json.dumps({"adapter_path": str(a), "summary": {"n": 1}}))
    moved.write_text(json.dumps({"adapter_path": str(a), "features": [FEATURE]}))
    first, second = read_runs([a, b], [judged, moved])
    assert (of(first)["summary"]["n"], of(second)["summary"]["n"]) == (1, 7)
    assert of(first, "features")
    assert not of(second, "features")


@pytest.mark.parametrize("said", [{}, {"adapter_path": None}, {"adapter_path": "elsewhere"}])
def test_a_result_of_nobody_knows_whom_is_refused_among_several_runs(tmp_path, said):
    file = tmp_path / "judged.json"
    file.write_text(json.dumps({"summary": {"n": 1}} | said))
    runs = [a_run(tmp_path / "a"), a_run(tmp_path / "b")]
    with pytest.raises(FpoError, match="belongs into the folder of its run"):
        read_runs(runs, [file])
    if said:
        with pytest.raises(FpoError, match="found nothing of a,"):
            read_runs(runs[:1], [file])
    else:
        assert of(read_runs(runs[:1], [file])[0]) == {"summary": {"n": 1}}


def test_a_table_of_several_adapters_in_the_folder_gives_its_run_its_own_row(tmp_path):
    listed = [{"adapter_path": f"old/{name}", "summary": {"n": i}} for i, name in enumerate("abc")]
    runs = [a_run(tmp_path / name) for name in ("b", "z")]
    for run in runs:
        (run / "first.json").write_text(json.dumps({"summary": {"n": 9}}))
        os.utime(run / "first.json", (1, 1))
        (run / "all.json").write_text(json.dumps({"base": {}, "adapters": listed}))
    assert [of(run)["summary"]["n"] for run in read_runs(runs)] == [1, 9]


def test_a_result_beside_two_folders_is_of_the_one_with_the_longer_name(tmp_path):
    runs = [a_run(tmp_path / name) for name in ("fpo", "fpo.long")]
    (tmp_path / "fpo.long.json").write_text(json.dumps({"summary": {"n": 4}}))
    short, long = read_runs(runs)
    assert of(short) is None
    assert of(long) == {"summary": {"n": 4}}


@pytest.mark.parametrize("kind", ["evaluate", "features", "compare"])
def test_a_result_file_of_odd_values_is_refused_and_does_not_stop(tmp_path, kind):
    odd = {"evaluate": {"adapters": [3, None]}, "features": {"features": None, "adapter_path": 3},
           "compare": {"prompts": None}}[kind]  # fmt: skip
    (tmp_path / "odd.json").write_text(json.dumps(odd))
    with pytest.raises(FpoError, match="found nothing"):
        read_runs([a_run(tmp_path / "a")], [tmp_path / "odd.json"])


def test_the_command_judges_as_the_run_was_trained(tmp_path):
    """Its preset, its start, its site and lengths: whatever is not the command's default."""
    import shlex

    settings = {
        "model": "m", "sae": ["s", "t"], "data": "d", "objective": "dpo", "init_adapter": "sft",
        "layer": 12, "site": "resid_post", "max_seq_length": 320, "top_k": 50, "beta": 0.1,
        "length_normalize": False, "constraint": "none", "stop_gradient": False,
        "prompt_feature": "question", "norm_scaling_factor": 0.5, "learning_rate": 1.0,
        "system_feature": "system", "reference": "cache",
    }  # fmt: skip
    run = a_run(tmp_path / "run", record={"settings": settings})
    for m in missing(read_runs([run])):
        words = shlex.split(m.command)
        context = main.commands[words[1]].make_context(words[1], words[2:])
        taken = {k: v for k, v in context.params.items() if v not in (None, ())}
        wanted = {k: v for k, v in settings.items() if k in taken} | {"sae": ("s", "t")}
        assert {k: taken[k] for k in wanted if k in taken} == {
            k: v for k, v in wanted.items() if k in taken
        }
        assert (taken["max_seq_length"], taken["init_adapter"]) == (320, "sft")
        assert taken["prompt_feature"] == "question"
        assert not {"top_k", "beta", "learning_rate", "system_feature"} & set(taken)
        if words[1] == "evaluate":  # it reads the objective in run.json itself
            assert not {"objective", "stop_gradient", "constraint"} & set(taken)
        if words[1] == "features":
            assert (taken["objective"], taken["stop_gradient"]) == ("dpo", False)
        if words[1] != "compare":
            assert taken["layer"] == 12
            assert (taken["site"], taken["reference"]) == ("resid_post", "cache")
            assert taken["norm_scaling_factor"] == 0.5


@pytest.mark.parametrize("data", ["pairs.jsonl", "folder"])
def test_a_run_that_held_a_share_back_is_judged_on_that(tmp_path, data):
    """A twentieth of another file was to be judged, of a test split that a share leaves none."""
    settings = {"model": "m", "sae": ["s"], "data": data, "valid_share": 0.05}
    run = a_run(tmp_path / "run", record={"settings": settings})
    commands = [m.command for m in missing(read_runs([run]))]
    assert len(commands) == 3
    for command in commands:
        assert f"--data {data} --valid-share 0.05" in command
        judges = " evaluate " in command  # the others look at valid by themselves
        assert ("--split valid" in command) is judges


def test_the_length_of_few_pairs_is_no_reason_to_warn(tmp_path):
    """One pair of 40 has the shorter chosen answer, and it was judged wrong."""
    one = SUMMARY | {"share_chosen_longer": 0.975, "rewards/accuracies/chosen_not_longer": 0.0}
    assert said(read_runs([a_run(tmp_path / "a", evaluate={"summary": one})])) == ""
    many = one | {"share_chosen_longer": 0.75}
    assert "length" in said(read_runs([a_run(tmp_path / "b", evaluate={"summary": many})]))


def test_a_label_that_begins_like_an_address_keeps_its_column(tmp_path):
    rows = [FEATURE | {"label": "http requests"}, FEATURE | {"feature": 5, "label": "numbers"}]
    page = render(read_runs([a_run(tmp_path / "run", features={"features": rows})]))
    assert "http requests" in page
    assert "numbers" in page


def test_an_axis_is_logarithmic_though_the_first_value_is_zero():
    """D before the first update is 0, and everything else spans decades."""
    spread = Line([0, 1, 2], [0.0, 0.5, 3492.0], 0)
    assert _spans([spread])
    assert not _spans([Line([0, 1], [0.0, 0.5], 0)])
    assert not _spans([Line([0, 1, 2], [-1.0, 0.5, 3492.0], 0)])
    assert "nan" not in draw([spread], True, prefix="p")


def test_names_are_as_long_as_it_takes_to_tell_runs_apart(tmp_path):
    paths = [tmp_path / "a" / "adapters", tmp_path / "b" / "adapters"]
    assert unique_names(paths) == ["a/adapters", "b/adapters"]
    assert unique_names(paths[:1]) == ["adapters"]
    assert len(set(unique_names([paths[0], paths[0]]))) == 2


def test_a_curve_of_many_points_keeps_its_mean_and_its_ends():
    reports = [{"iteration": i, "metrics": {"x": float(i)}} for i in range(10 * POINTS)]
    x, y = points(reports, "x")
    assert len(x) == POINTS
    assert sum(y) / len(y) == pytest.approx((10 * POINTS - 1) / 2)
    assert (x[0], y[0]) == (4.5, 4.5)  # the mean of 0 to 9
    assert points([*reports, {"iteration": 1, "x": math.nan}], "x")[1][-1] <= 10 * POINTS


def test_a_line_is_drawn_where_its_values_are(tmp_path):
    page = render(read_runs([a_run(tmp_path / "run", [a_report(i) for i in (10, 20, 40)])]))
    loss = page.split("Loss by iteration: run from 0.69 to 0.66")[1].split("</figure>")[0]
    path = next(p for p in re.findall(r"<path[^>]*>", loss) if "var(--s0)" in p)
    steps = [tuple(map(float, m)) for m in re.findall(r"[ML] ([\d.]+) ([\d.]+)", path)]
    (x0, y0), (x1, y1), (x2, y2) = steps
    assert (x2 - x1) / (x1 - x0) == pytest.approx(2, rel=1e-3)  # 10, 20, 40
    assert (y2 - y1) / (y1 - y0) == pytest.approx(2, rel=1e-3)  # 0.69, 0.68, 0.66
    assert y2 > y0  # downwards on the page


def test_a_report_of_many_long_runs_stays_small(tmp_path):
    reports = [a_report(i, **{"rewards/margins": math.sin(i)}) for i in range(3000)]
    runs = [a_run(tmp_path / f"r{i}", reports, evaluate={"summary": SUMMARY}) for i in range(3)]
    page = render(read_runs(runs))
    assert len(page.encode()) < 1_000_000
    assert {f"s{i}" for i in range(3)} <= set(re.findall(r'class="(s\d)"', page))


def run_cli(*words: object) -> Any:
    return CliRunner().invoke(main, ["report", *map(str, words)])


def test_the_command_writes_the_page_and_says_where(tmp_path):
    done = run_cli(a_run(tmp_path / "run"), "--output", tmp_path / "new" / "page.html")
    assert done.exit_code == 0, done.output
    assert done.stdout == f"report in {tmp_path / 'new' / 'page.html'}\n"
    assert (
        (tmp_path / "new" / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")
    )


def test_the_folder_of_an_sae_is_refused_by_name(tmp_path):
    """Its metrics are of another kind, and a page of it would show none of them."""
    a_run(tmp_path / "sae", record={"settings": {}, "fingerprints": {}, "plan": {"steps": 40}})
    (tmp_path / "sae" / "adapter_config.json").unlink()
    with pytest.raises(FpoError, match=r"the run of `fpo-mlx sae train`, .* `fpo-mlx train`"):
        read_runs([tmp_path / "sae"])


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["missing"], 1, "no such folder"),
        (["empty"], 1, "neither run.json nor metrics.jsonl"),
        (["run", "--results", "no.json"], 1, "--results no.json cannot be read"),
        (["run", "--results", "odd.json"], 1, "found nothing of run"),
        (["run", "--output", "run"], 2, "which the command reads"),
        ([], 2, "Missing argument"),
    ],
)
def test_bad_input_is_one_message_and_nothing_is_written(tmp_path, monkeypatch, words, code, part):
    monkeypatch.chdir(tmp_path)
    a_run(tmp_path / "run")
    (tmp_path / "empty").mkdir()
    (tmp_path / "odd.json").write_text('{"prompts": [{"prompt": "x", "answers": {"y": "z"}}]}')
    before = sorted(tmp_path.rglob("*"))
    done = run_cli(*words)
    assert done.exit_code == code
    assert part in done.stderr
    assert done.stdout == ""
    assert "Traceback" not in done.output
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("absent", ["jinja2", "matplotlib"])
def test_without_the_report_extra_the_message_says_what_to_install(tmp_path, monkeypatch, absent):
    monkeypatch.setitem(__import__("sys").modules, absent, None)
    done = run_cli(a_run(tmp_path / "run"), "--output", tmp_path / "page.html")
    assert done.exit_code == 2
    assert f"pip install {absent}`" in done.stderr
    assert absent in done.stderr
    assert not (tmp_path / "page.html").exists()


def test_a_folder_without_a_run_raises_an_expected_error(tmp_path):
    with pytest.raises(FpoError, match="wanted the folder"):
        read_runs([tmp_path])


def test_the_numbers_at_the_ticks_are_whole():
    """Coordinates are shortened to two digits; a tick at 0.015 must not become 0.01."""
    svg = draw([Line((0, 100, 200), (0.0, 0.02, 0.01), 0)], False, prefix="c")
    shown = [float(t) for t in re.findall(r">(\d+\.\d+)</text>", svg)]
    steps = {round(b - a, 6) for a, b in zip(shown, shown[1:], strict=False)}
    assert len(shown) >= 3
    assert len(steps) == 1
    assert not re.search(r"<[^>]*\d\.\d{3}", svg)


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        ({"kind": "features", "version": 1, "prompts": []}, "features"),
        ({"kind": "evaluate", "version": 1}, "evaluate"),
        ({"kind": "plan", "version": 1, "summary": {}}, None),  # of a command that is not shown
        ({"kind": ["compare"]}, None),
        ({"summary": {}}, "evaluate"),  # 0.1 wrote no kind
        ({"adapters": []}, "evaluate"),
        ({"features": []}, "features"),
        ({"prompts": []}, "compare"),
        ({}, None),
    ],
)
def test_a_result_file_is_known_by_its_kind_and_an_older_one_by_what_it_holds(value, kind):
    assert kind_of(value) == kind
