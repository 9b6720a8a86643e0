"""The end of `train`: what its own validations say, and no more than they can carry."""

from __future__ import annotations

import json
import math
import os
import shlex

import pytest
from report_runs import Elements, a_report, a_run

from fpo_mlx import pipeline
from fpo_mlx.cli import main
from fpo_mlx.config import Objective, TrainConfig
from fpo_mlx.report.commands import commands
from fpo_mlx.report.read import read_run
from fpo_mlx.report.verdict import held_out, verdict

NONE_MOVED = {
    "rewards/accuracies": 0.0, "rewards/margins": 0.0, "policy_accuracy": 0.45,
    "logps_per_token/chosen_change": 0.0, "logps_per_token/rejected_change": 0.0,
    "features/chosen": 0.0, "features/rejected": 0.0,
}  # fmt: skip


def a_validation(iteration, loss, metrics=None, *, best=True, pairs=40):
    found = {"kind": "valid", "iteration": iteration, "loss": loss, "pairs": pairs, "best": best}
    return found | {"metrics": NONE_MOVED | (metrics or {})}


def read(path, *validations, train=True, record=None):
    reports = [a_report(30)] if train else []
    run = a_run(path / "run", [*reports, *validations], record)
    return read_run(run, "run")


def of_data(splits, data="owner/set", **settings):
    return {"settings": {"model": "m", "data": data, **settings}, "splits": splits}


END = {
    "rewards/accuracies": 0.85, "rewards/margins": 0.0427, "policy_accuracy": 0.6,
    "logps_per_token/chosen_change": -0.25, "logps_per_token/rejected_change": -0.5,
    "features/chosen": 5.03, "features/rejected": 1.0, "drift/rejected": 0.16,
}  # fmt: skip


def test_before_and_after_stand_side_by_side_with_the_count_and_an_interval(tmp_path):
    lines = held_out(read(tmp_path, a_validation(0, 0.6931), a_validation(30, 0.58, END)))
    assert lines == [
        "On 40 held-out pairs before -> after 30 iterations:",
        "  accuracy 0.85 (0.71 to 0.93 with 95 % confidence): share of pairs whose chosen answer "
        "gained more than the rejected one; chance is 0.5",
        "  chosen answer is the likelier one: 0.45 -> 0.6",
        "  reward margin: 0 -> 0.0427 (gain of chosen less that of rejected answers, times beta)",
        "  chosen answers −0.25 nats/token: a token is 0.78 times as likely as before; rejected "
        "answers −0.5",
        "  distance from the start (0 is none): features by 0.4 of their size (drift, rejected), "
        "D of features 5.03 / 1 (chosen / rejected)",
    ]


def test_pairs_that_share_prompts_count_for_as_many_as_the_validation_says(tmp_path):
    """Six pairs each of four prompts, all right, are four in four, as `evaluate` has it."""
    right = END | {"rewards/accuracies": 1.0}
    end = a_validation(30, 0.5, right, pairs=24) | {"witnesses": 4.0}
    assert "accuracy 1 (0.51 to 1 with" in held_out(read(tmp_path, end))[1]
    end["witnesses"] = None  # as of a run before it was kept
    assert "accuracy 1 (0.86 to 1 with" in held_out(read(tmp_path / "old", end))[1]


@pytest.mark.parametrize(
    ("pairs", "share", "said"),
    [
        (6, 0.667, "so few pairs cannot tell that from chance"),
        (400, 0.667, "; chance is 0.5"),
        (400, 0.2, "worse than chance"),
    ],
)
def test_an_accuracy_is_told_from_chance_only_by_enough_pairs(tmp_path, pairs, share, said):
    end = a_validation(30, 0.6, END | {"rewards/accuracies": share}, pairs=pairs)
    assert said in held_out(read(tmp_path, a_validation(0, 0.7, pairs=pairs), end))[1]


def test_a_best_that_is_not_the_last_is_named_with_its_place(tmp_path):
    seen = [a_validation(0, 0.7), a_validation(20, 0.5), a_validation(30, 0.6, best=False)]
    said = held_out(read(tmp_path, *seen))[-1]
    assert "iteration 20 (0.5, the last 0.6)" in said
    assert str(tmp_path / "run" / "best") in said


def test_a_run_that_made_held_out_pairs_worse_says_that_nothing_was_won(tmp_path):
    run = read(tmp_path, a_validation(0, 0.69), a_validation(30, 0.9, best=False))
    assert "on these pairs nothing was won" in held_out(run)[-1]


@pytest.mark.parametrize("first", [a_validation(10, 0.7), a_validation(0, 0.7, pairs=8)])
def test_a_start_that_was_not_measured_on_these_pairs_is_not_made_up(tmp_path, first):
    lines = held_out(read(tmp_path, first, a_validation(30, 0.6, END)))
    assert lines[0] == "On 40 held-out pairs after 30 iterations:"
    assert not any("->" in line for line in lines)


def test_without_held_out_pairs_it_says_what_cannot_be_said_and_names_the_share(tmp_path):
    for pairs, share in ((9, 0.2), (4000, 0.05)):
        run = read(tmp_path / str(pairs), record=of_data({"train": pairs}))
        assert f"(--valid-share {share}) and train again" in held_out(run)[0]
    lines = held_out(read(tmp_path, record=of_data({"train": None})))
    assert lines[0].startswith("No pair was held out")
    assert "this run cannot say" in lines[0]
    assert "--valid-share 0.05" in lines[0]
    assert "Mean of the last report, at iteration 30:" in lines
    assert any("of training pairs, so it says little of others" in line for line in lines)


def test_of_a_part_of_the_change_that_was_saved_its_own_figures_are_shown(tmp_path):
    landed = a_validation(30, 0.6, {"rewards/margins": 0.01}) | {"kind": "landed", "part": 0.3}
    run = read(tmp_path, a_validation(0, 0.7), a_validation(30, 0.5, END), landed)
    assert any("reward margin: 0 -> 0.01" in line for line in held_out(run))


def test_where_a_part_was_saved_it_is_said_and_best_is_not_offered(tmp_path):
    """best/ holds a whole change, which was not held to the target."""
    landed = a_validation(30, 0.6, END) | {
        "kind": "landed", "part": 0.3, "figure": "drift", "before": 0.4, "after": 0.1,
        "target": 0.1,
    }  # fmt: skip
    seen = [a_validation(0, 0.7), a_validation(20, 0.5), a_validation(30, 0.6, best=False)]
    run = read(tmp_path, *seen, landed)
    (said,) = (line for line in held_out(run) if "saved is" in line)
    assert "saved is 0.3 of the change that was trained" in said
    assert "best/ is of a whole change" in said
    assert not any("lowest validation loss" in line for line in held_out(run))


def test_a_model_that_hardly_moved_is_not_called_worse_than_chance(tmp_path):
    """A pair counts as right only where it moved."""
    still = {"logps_per_token/chosen_change": 1e-4, "logps_per_token/rejected_change": -2e-3}
    for n, (metrics, hardly) in enumerate(((still, True), ({**still, **END}, False))):
        end = a_validation(30, 0.69, metrics | {"rewards/accuracies": 0.1})
        line = held_out(read(tmp_path / str(n), a_validation(0, 0.69), end))[1]
        assert ("hardly moved yet" in line) is hardly
        assert ("worse than chance" in line) is not hardly


def test_an_accuracy_without_a_reference_in_the_loss_is_of_gains_on_it_all_the_same(tmp_path):
    """Rewards are: `core.objectives.preference_losses`."""
    record = {"settings": {"margin": "constant"}}
    line = held_out(read(tmp_path, a_validation(30, 0.6, END), record=record))[1]
    assert "gained more than the rejected one; chance is 0.5" in line


def test_so_few_pairs_of_more_name_the_setting_that_looks_at_all(tmp_path):
    record = of_data({"train": 9, "valid": 1000})
    head = held_out(read(tmp_path, a_validation(30, 0.6, END), record=record))[0]
    assert head.startswith("On 40 of 1000 held-out pairs (--val-batches -1 looks at all)")
    record = of_data({"train": 9, "valid": 40})
    head = held_out(read(tmp_path / "all", a_validation(30, 0.6, END), record=record))[0]
    assert head.startswith("On 40 held-out pairs")


def test_training_beyond_the_last_validation_is_not_passed_over(tmp_path):
    """A run that is resumed with --val-batches 0, or stopped between two validations."""
    run = read(tmp_path, a_validation(10, 0.7, END), a_validation(20, 0.6, END))
    assert "  training went on to iteration 30, and no validation saw that" in held_out(run)
    assert "the lowest validation loss was at iteration 20" in held_out(run)[-2]


def test_a_run_that_was_validated_before_it_began_alone_is_not_said_to_have_won_nothing(tmp_path):
    """A report of a run that goes on, or that was stopped early, said so."""
    assert not any(
        "nothing was won" in line for line in held_out(read(tmp_path, a_validation(0, 1)))
    )


@pytest.mark.parametrize(
    ("splits", "said"),
    [
        ({"train": 9, "valid": None}, "on the valid split"),  # --val-batches 0
        ({"train": 9, "test": None}, "on the test split"),
    ],
)
def test_held_out_pairs_that_no_validation_looked_at_are_not_denied(tmp_path, splits, said):
    line = held_out(read(tmp_path, record=of_data(splits)))[0]
    assert line.startswith("No validation was made")
    assert said in line
    assert "--valid-share" not in line


@pytest.mark.parametrize(("of", "silent"), [("test", True), ("train", False)])
def test_a_held_out_evaluation_is_not_called_impossible(tmp_path, of, silent):
    read(tmp_path)
    result = {"summary": {"n": 9}, "split": of}
    (tmp_path / "run" / "evaluate.json").write_text(json.dumps(result))
    lines = held_out(read_run(tmp_path / "run", "run"))
    assert any("cannot say" in line for line in lines) is not silent


def test_a_collapse_on_held_out_pairs_is_the_reports_own_warning(tmp_path):
    """The report looked at training pairs alone."""
    from fpo_mlx.report.findings import warnings

    end = a_validation(30, 0.5, {"logps_per_token/chosen_change": -1.2})
    run = read(tmp_path, a_validation(0, 0.7), end)
    (said,) = (line for line in verdict(run) if line.startswith("warning: "))
    assert "lost 1.2 nats a token" in said
    assert said.removeprefix("warning: ") in [w.text for w in warnings([run])]


@pytest.mark.parametrize("age", [1, None])
def test_an_evaluation_of_the_adapters_before_says_nothing_of_these(tmp_path, age):
    """The folder's evaluate.json outlives `--overwrite` and `--resume`."""
    from fpo_mlx.report.findings import warnings

    lost = {"summary": {"logps_per_token/chosen_change": -9.0}}
    read(tmp_path, a_validation(0, 0.7), a_validation(30, 0.5, END))
    folder = tmp_path / "run"
    (folder / "evaluate.json").write_text(json.dumps(lost))
    (folder / "adapters.safetensors").write_bytes(b"")
    if age:
        os.utime(folder / "evaluate.json", (age, age))
        assert not any("lost" in w.text for w in warnings([read_run(folder, "run")]))
    assert not any("warning" in line for line in verdict(read_run(folder, "run")))


def test_the_next_commands_are_commands_with_these_flags(tmp_path):
    found = [shlex.split(line) for line in commands(read(tmp_path))]
    assert [words[1] for words in found] == ["evaluate", "compare", "chat", "fuse"]
    for words in found:
        known = {name for p in main.commands[words[1]].params for name in p.opts}
        assert set(words[2::2]) <= known, words
    assert found[-1][2:4] == ["--model", "m"]


@pytest.mark.parametrize(
    ("settings", "advice"),
    [
        ({"objective": "dpo"}, "Give --nll-weight 1, "),
        ({"objective": "dpo", "nll_weight": 0.5}, "raise --nll-weight above 0.5"),
        ({"lr_schedule": {"name": "x"}}, "the rates of lr_schedule"),
        ({"beta": "damaged", "link": 3}, "--nll-weight"),
    ],
)
def test_a_collapse_is_met_with_the_advice_that_the_run_itself_gives(tmp_path, settings, advice):
    """It named alpha and beta, which a run without a constraint has no use for."""
    end = a_validation(30, 0.5, {"logps_per_token/chosen_change": -1.2})
    (said,) = (
        w for w in verdict(read(tmp_path, end, record={"settings": settings})) if "ing:" in w
    )
    assert advice in said
    assert "stop earlier" in said
    assert "raise alpha" not in said


def test_a_collapse_that_the_run_warned_of_is_not_explained_again(tmp_path):
    pytest.importorskip("mlx.core")
    from fpo_mlx.train import guard

    told = guard.fallen({"logps_per_token/chosen_change": -1.1}, TrainConfig(), Objective())
    end = a_validation(30, 0.5, {"logps_per_token/chosen_change": -1.2})
    run = read(tmp_path, a_validation(20, 0.5) | {"warnings": [told]}, end)
    (said,) = (line for line in verdict(run) if line.startswith("warning: "))
    assert "have lost 1.2 nats a token at the end" in said
    assert "iteration 20" in said
    assert "--nll-weight" not in said


def test_the_command_that_asks_has_the_templates_variables_of_the_run(tmp_path):
    """A model that was trained not to think thought."""
    args = {"enable_thinking": False}
    made = {"chat_template": "own.jinja", "chat_template_args": args, "trust_remote_code": True}
    words = words_of(read(tmp_path, record=of_data(None, **made)), "chat")
    taken = main.commands["chat"].make_context("chat", words[2:]).params
    assert {name: taken[name] for name in made} == made


@pytest.mark.parametrize(
    ("model", "settings", "serves"),
    [("a", {}, True), ("b", {}, False), ("a", {"project_out": "w.json"}, False), (None, {}, True)],
)
def test_a_cache_that_judging_refuses_is_not_named(tmp_path, model, settings, serves):
    """`train` takes one of other weights and one without the directions it projects out."""
    cache = tmp_path / "cache"
    cache.mkdir()
    if model:
        (cache / "manifest.json").write_text(json.dumps({"identity": {"model": model}}))
    record = of_data(None, reference=str(cache), **settings) | {"fingerprints": {"model": "a"}}
    words = words_of(read(tmp_path, record=record), "evaluate")
    assert ("--reference" in words) is serves


def words_of(run, name):
    (found,) = (w for line in commands(run) if (w := shlex.split(line))[1] == name)
    return found


@pytest.mark.parametrize(
    ("splits", "judged", "compared"),
    [
        ({"train": 9, "valid": 2, "test": None}, None, None),
        ({"train": 9, "valid": 2}, "valid", None),
        ({"train": 9, "test": None}, None, "test"),
    ],
)
def test_each_command_names_a_split_that_the_data_have(tmp_path, splits, judged, compared):
    """`evaluate` looks at test by itself, `compare` at valid: one of them was refused."""
    run = read(tmp_path, record=of_data(splits))
    for name, split in (("evaluate", judged), ("compare", compared)):
        words = words_of(run, name)
        assert words[words.index("--data") + 1] == "owner/set"
        assert ("--split" in words) is (split is not None)
        assert split is None or words[words.index("--split") + 1] == split


def test_where_all_was_trained_on_the_commands_want_another_file_and_say_so(tmp_path):
    run = read(tmp_path, record=of_data({"train": 9}, subset="en", train_split="train[:9]"))
    for name in ("evaluate", "compare"):
        words = words_of(run, name)
        assert words[words.index("--data") + 1] == "HELD_OUT.jsonl"
        assert not {"--subset", "--train-split", "--split"} & set(words), "one file has no splits"
    assert "Next (HELD_OUT.jsonl is your file of other pairs):" in verdict(run)


def test_a_run_of_an_older_version_that_validated_has_a_valid_split(tmp_path):
    run = read(tmp_path, a_validation(0, 0.7), record={"settings": {"data": "owner/set"}})
    assert words_of(run, "evaluate")[-4:-2] != ["--data", "HELD_OUT.jsonl"]
    assert "valid" in words_of(run, "evaluate")


def test_figures_that_an_earlier_training_left_are_replaced_and_its_model_stays(tmp_path):
    """From the second training in one folder on all of these commands were refused."""
    read(tmp_path, a_validation(0, 0.7), a_validation(30, 0.5, END))
    folder, fused = tmp_path / "run", tmp_path / "run-fused"
    fused.mkdir()
    for place in (folder / "compare.json", folder / "evaluate.json", fused):
        if place != fused:
            place.write_text(json.dumps({"summary": {}}) if "evaluate" in place.name else "{}")
        os.utime(place, (1, 1))
    run = read_run(folder, "run")
    assert not any("--overwrite" in line for line in commands(run)), "these are no older ones"
    (folder / "adapters.safetensors").write_bytes(b"")
    run = read_run(folder, "run")
    for name in ("evaluate", "compare"):
        assert words_of(run, name)[-1] == "--overwrite"
    assert words_of(run, "fuse")[-1] == f"{fused}-2"
    assert str(folder / "evaluate.json") in words_of(run, "evaluate")


def test_better_adapters_than_the_last_are_those_that_come_next(tmp_path):
    seen = [a_validation(0, 0.7), a_validation(20, 0.5), a_validation(30, 0.6, best=False)]
    run = read(tmp_path, *seen)
    best = run.path / "best"
    best.mkdir()
    (best / "adapters.safetensors").write_bytes(b"")
    for line in commands(run):
        assert f"--adapter-path {best}" in line
    assert str(best / "evaluate.json") in words_of(run, "evaluate")
    assert words_of(run, "fuse")[-1] == f"{run.path}-fused"


@pytest.mark.parametrize(
    ("seen", "settings"),
    [
        ([a_validation(0, 0.5), a_validation(30, 0.6, best=False)], {}),
        ([a_validation(0, 0.7), a_validation(30, 0.6)], {}),
        ([a_validation(20, 0.5), a_validation(30, 0.6, best=False)], {"target_drift": 0.1}),
        ([a_validation(0, 0.7), a_validation(20, 0.6)], {}),  # trained on to 30, unseen
    ],
)
def test_best_is_not_next_where_it_is_no_training_the_last_or_held_to_no_target(
    tmp_path, seen, settings
):
    run = read(tmp_path, *seen, record={"settings": settings})
    (run.path / "best").mkdir()
    (run.path / "best" / "adapters.safetensors").write_bytes(b"")
    assert not any("/best" in line for line in commands(run))


def test_the_page_says_what_the_terminal_says(tmp_path):
    pytest.importorskip("jinja2")
    pytest.importorskip("matplotlib")
    from fpo_mlx.report import render

    run = read(tmp_path, a_validation(0, 0.6931), a_validation(30, 0.58, END))
    page = " ".join(Elements(render([run])).text.split())
    for line in held_out(run):
        assert " ".join(line.split()) in page


def test_figures_that_are_damaged_end_no_training(tmp_path):
    nothing = {"kind": "valid", "iteration": None, "loss": "x", "metrics": 3, "pairs": None}
    worse = a_validation(30, math.nan, dict.fromkeys(END, math.nan))
    for number, odd in enumerate((nothing, json.loads(json.dumps(worse)))):
        assert verdict(read(tmp_path / str(number), a_validation(0, 0.7), odd))


def test_a_run_of_an_absolute_folder_and_relative_data_is_read(tmp_path):
    """It was an IndexError, of `report` too: where the data lay is not known."""
    folder = tmp_path / "run"
    record = {"settings": {"data": "pairs", "adapter_path": str(folder)}}
    assert read(tmp_path, record=record).pairs == {}


def test_a_training_that_is_done_does_not_fail_by_its_folder(tmp_path):
    (line,) = pipeline.verdict(tmp_path / "none")
    assert line.startswith("no verdict: ")
    assert "no such folder" in line
