"""`fpo-mlx rounds` on a tiny model: two rounds, stopped and gone on with."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import yaml

pytest.importorskip("mlx.core")

from command_line import lines, refused, run  # noqa: E402
from evaluated import own_cache, place  # noqa: E402, F401
from judges import candidates  # noqa: E402

from fpo_mlx.errors import ConfigError, DataError  # noqa: E402
from fpo_mlx.pairs import example_rewards  # noqa: E402
from fpo_mlx.pairs.records import HUMAN, read_verdicts  # noqa: E402
from fpo_mlx.pairs.reward import judge_name  # noqa: E402
from fpo_mlx.pairs.settings import JudgeConfig, RoundsConfig  # noqa: E402
from fpo_mlx.pipeline.rounds import _training  # noqa: E402
from fpo_mlx.pipeline.rounds_settings import same_settings  # noqa: E402
from fpo_mlx.train.events import SkippedReport, StepReport  # noqa: E402


def write(place, root, **changes):
    for name, count in (("prompts", 12), ("held-out", 6)):
        (root / f"{name}.txt").write_text(
            "".join(f"Question {n} of the {name}?\n" for n in range(count))
        )
    reward = root / "grade.py"
    reward.write_text(
        "def grade(prompt, answer):\n    return answer.count('e') - len(answer) / 9\n"
    )
    settings = {
        "model": str(place / "model"), "prompts": str(root / "prompts.txt"),
        "held_out": str(root / "held-out.txt"), "output": str(root / "rounds"), "rounds": 2,
        "generate": {"n": 3, "max_tokens": 6}, "judge": {"reward": f"{reward}:grade"},
        "build": {"force": True, "keep_cut": True, "near_duplicates": 1.0},
        "train": {"objective": "dpo", "iters": 2, "batch_size": 1, "learning_rate": 1e-3,
                  "steps_per_report": 1, "val_batches": 0},
    } | changes  # fmt: skip
    path = root / "rounds.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def always(monkeypatch):
    """No early end: a tiny model gets no better."""
    module = importlib.import_module("fpo_mlx.pipeline.rounds")
    monkeypatch.setattr(module, "_end", lambda one, settings: "")


def test_two_rounds_and_their_files(place, tmp_path, monkeypatch):
    always(monkeypatch)
    done = run("rounds", "-c", write(place, tmp_path, keep_old=4), "--json", tmp_path / "r.json")
    assert done.exit_code == 0, done.stderr + str(done.exception)
    found = json.loads((tmp_path / "r.json").read_text())
    assert [one["number"] for one in found] == [1, 2]
    for one in found:
        assert one["interval"][0] <= one["win_rate"] <= one["interval"][1]
    root = tmp_path / "rounds"
    made = [json.loads(x) for x in (root / "round-2/candidates.jsonl").read_text().splitlines()]
    assert "round-1/adapters" in made[0]["candidates"][0]["model"]
    new, both = (
        (root / "round-2" / name / "train.jsonl").read_text().splitlines()
        for name in ("pairs", "data")
    )
    assert len(both) == len(new) + 4
    settings = json.loads((root / "round-2/adapters/run.json").read_text())["settings"]
    assert settings["init_adapter"].endswith("round-1/adapters")
    assert "round-2/adapters" in done.stdout
    page = (root / "report.html").read_text()
    assert "round-1/adapters" in page
    for one in found:  # the figures that were printed
        assert f"{one['win_rate']:.3g}" in page
    assert "Longer answer is the chosen one" in page


def test_a_run_that_lost_its_later_steps_makes_them_again_alike(place, tmp_path, monkeypatch):
    always(monkeypatch)
    path = write(place, tmp_path)
    assert run("rounds", "-c", path).exit_code == 0
    root = tmp_path / "rounds"
    want = json.loads((root / "rounds.json").read_text())
    held_out = (root / "round-2/held-out.jsonl").read_bytes()
    for gone in ("held-out.jsonl", "round.json", "versus.jsonl", "versus-verdicts.jsonl"):
        (root / "round-2" / gone).unlink()
    assert run("rounds", "-c", path).exit_code == 0
    assert json.loads((root / "rounds.json").read_text()) == want
    assert (root / "round-2/held-out.jsonl").read_bytes() == held_out
    shutil.rmtree(root / "round-2")
    assert run("rounds", "-c", path).exit_code == 0
    assert json.loads((root / "rounds.json").read_text()) == want


@pytest.mark.parametrize("at", [1, 2])
def test_a_signal_ends_a_round_s_training_with_all_of_it_saved(place, tmp_path, monkeypatch, at):
    """It lost what was trained since --save-every; at 2 it came in the last update."""
    show = importlib.import_module("fpo_mlx.cli.show")
    before = signal.getsignal(signal.SIGTERM)

    def end(text):
        if text.strip().startswith(f"{at}  loss"):
            os.kill(os.getpid(), signal.SIGTERM)

    path = write(place, tmp_path, rounds=1)
    with monkeypatch.context() as patched:
        patched.setattr(show, "say", end)
        refused(run("rounds", "-c", path), 143, "stopped in training", "The same command goes on")
    assert signal.getsignal(signal.SIGTERM) is before
    assert not (tmp_path / "rounds/round-1/held-out.jsonl").exists()
    again = run("rounds", "-c", path)
    assert again.exit_code == 0, again.stderr
    said = "resumed after iteration 1" if at == 1 else "is at iteration 2 already"
    assert said in again.stderr


def test_rounds_say_of_a_training_what_train_says(place, tmp_path, monkeypatch):
    """Warnings and updates left out were swallowed, and validations looked like updates."""
    always(monkeypatch)
    module = importlib.import_module("fpo_mlx.pipeline.rounds")
    real = module.train

    def train(config, **rest):
        for report in real(config, **rest):
            warned = isinstance(report, StepReport)
            yield replace(report, warnings=("it moves",)) if warned else report
        yield SkippedReport(3, "a loss of nan", 1)

    monkeypatch.setattr(module, "train", train)
    settings = {"objective": "dpo", "iters": 1, "batch_size": 1, "steps_per_eval": 1}
    build = {"force": True, "keep_cut": True, "near_duplicates": 1.0, "valid_share": 0.2}
    done = run("rounds", "-c", write(place, tmp_path, rounds=1, train=settings, build=build))
    assert done.exit_code == 0, done.stderr
    for part in ("warning: it moves", "1  loss ", "1  valid ", "acc ", "update left out: a loss",
                 "held-out pairs before -> after 1 iterations"):  # fmt: skip
        assert part in done.stderr
    assert "Next" not in done.stderr


def test_rounds_end_where_nothing_is_won(place, tmp_path):
    train = {"objective": "dpo", "iters": 1, "batch_size": 1, "learning_rate": 1e-9,
             "val_batches": 0}  # fmt: skip
    done = run("rounds", "-c", write(place, tmp_path, rounds=3, train=train))
    assert done.exit_code == 0, done.stderr
    assert "round 1 is the last: its answers are not told from" in done.stderr
    (one,) = json.loads((tmp_path / "rounds/rounds.json").read_text())
    assert one["win_rate"] == 0.5  # the same noise, the same answers


def test_too_few_pairs_of_a_later_round_end_the_rounds_and_may_be_trained_on(
    place, tmp_path, monkeypatch
):
    """It was an error that named a flag which `rounds` lacks; nothing was written of round 1."""
    always(monkeypatch)
    module = importlib.import_module("fpo_mlx.pipeline.rounds")
    real, build = module.pairs_build, {"keep_cut": True, "near_duplicates": 1.0}

    def enough_at_first(settings, **rest):
        forced = replace(settings, force="round-1" in str(rest["output"]))
        return real(forced, **rest)

    with monkeypatch.context() as patched:
        patched.setattr(module, "pairs_build", enough_at_first)
        done = run("rounds", "-c", write(place, tmp_path, rounds=3, build=build))
    assert done.exit_code == 0, done.stderr
    for part in ("round 1 is the last", "too few", "`build: {force: true}`"):
        assert part in done.stderr
    assert "round-1/adapters" in done.stdout
    root = tmp_path / "rounds"
    assert [one["number"] for one in json.loads((root / "rounds.json").read_text())] == [1]
    assert (root / "report.html").exists()
    forced = write(place, tmp_path, rounds=2, build=build | {"force": True})
    done = run("rounds", "-c", forced)
    assert done.exit_code == 0, done.stderr
    assert len(json.loads((root / "rounds.json").read_text())) == 2
    refused(run("rounds", "-c", write(place, tmp_path, build={"keep_cut": True})), 2, "(build)")


def test_a_later_round_whose_answers_are_all_alike_ends_the_rounds_with_the_one_before(
    place, tmp_path, monkeypatch
):
    """Nothing was judged, and the judge that gave no verdict was missed as a --judge-name."""
    always(monkeypatch)
    module = importlib.import_module("fpo_mlx.pipeline.rounds")
    real = module.pairs_generate

    def alike_later(settings, *, output, **rest):
        real(settings, output=output, **rest)
        if output.name == "candidates.jsonl" and "round-2" in str(output):
            rows = [json.loads(line) for line in output.read_text().splitlines()]
            candidates(output, {row["prompt"]: ["so"] * 3 for row in rows})

    monkeypatch.setattr(module, "pairs_generate", alike_later)
    done = run("rounds", "-c", write(place, tmp_path))
    assert done.exit_code == 0, done.stderr
    assert "round 1 is the last: the next one has too few pairs. 0 pairs from 12" in done.stderr
    assert "12 × a prompt without verdicts, whose answers are all equal" in done.stderr
    assert "--judge-name" not in done.stderr
    assert len(json.loads((tmp_path / "rounds/rounds.json").read_text())) == 1


def test_too_few_pairs_of_the_first_round_are_an_error_that_says_what_rounds_take(place, tmp_path):
    done = run("rounds", "-c", write(place, tmp_path, build={"keep_cut": True}))
    refused(done, 3, "too few to learn from", "`build: {force: true}`")


@pytest.mark.parametrize(
    ("number", "rate", "why", "last"),
    [(1, 0.1, "lose to those of the model itself", "the model itself is the better one"),
     (2, 0.1, "lose to those of the round before, whose", "the better adapters in ROOT/round-1/"),
     (1, 0.5, "not told from those of the model itself", "the last adapters in ROOT/round-1/"),
     (2, 0.9, "", "the last adapters in ROOT/round-2/")],
)  # fmt: skip
def test_the_better_adapters_are_named_at_the_end(tmp_path, monkeypatch, number, rate, why, last):
    """The last ones were, after a round that had lost, too; the model has no adapters."""
    from fpo_mlx import pipeline

    module = importlib.import_module("fpo_mlx.pipeline.rounds")
    between = {0.1: (0.0, 0.3), 0.5: (0.4, 0.6), 0.9: (0.7, 1.0)}
    one = module.Round(number, 40, None, 1.0, 0.0, rate, between[rate], 9.0, None)
    said = module._end(one, RoundsConfig(model="m", prompts="p", held_out="h"))
    assert why in said
    assert bool(why) == bool(said)
    monkeypatch.setattr(pipeline, "rounds", lambda *_, **__: [one])
    monkeypatch.setattr(pipeline, "rounds_report", lambda *_: None)
    done = run("rounds", "-c", write(tmp_path, tmp_path))
    assert done.exit_code == 0, done.stderr
    ends = done.stdout.splitlines()[-1]
    assert ends.startswith(last.replace("ROOT", str(tmp_path / "rounds")))


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"held_out": ""}, "held_out is missing"), ({"held_out": "prompts.txt"}, "file of prompts"),
     ({"rounds": 0}, "rounds 0"),
     ({"train": {"adapter_path": "x"}}, "settled by the rounds"), ({"odd": 1}, "odd"),
     ({"judge": {}}, "--judge"), ({"train": {"lerning_rate": 1}}, "lerning_rate"),
     ({"generate": {"m": 1}}, "m"), ({"generate": {"seed": "abc"}}, "--seed 'abc'"),
     ({"generate": {"seed": 1.9}}, "--seed 1.9"),
     ({"train": {"objective": "dpo", "chat_template": "t.jinja"}}, "chat_template differs"),
     ({"train": {"objective": "dpo", "valid_share": 0.05}}, "train: valid_share 0.05")],
)  # fmt: skip
def test_what_cannot_be_is_said_before_the_first_step(place, tmp_path, monkeypatch, changes, part):
    monkeypatch.chdir(tmp_path)
    refused(run("rounds", "-c", write(place, tmp_path, **changes)), 2, part)
    assert not (tmp_path / "rounds").exists()


def test_other_settings_are_not_mixed_into_a_run(place, tmp_path, monkeypatch):
    always(monkeypatch)
    assert run("rounds", "-c", write(place, tmp_path, rounds=1)).exit_code == 0
    changed = write(place, tmp_path, rounds=1, generate={"n": 2, "max_tokens": 6})
    refused(run("rounds", "-c", changed), 2, "begun with other settings (generate)")


@pytest.mark.parametrize(
    ("changes", "part"),
    [({"judge": {"reward": "grad.py:grade"}}, "there is no file grad.py"),
     ({"judge": {"reward": f"{example_rewards.__file__}:brevty"}}, "brevty"),
     ({"judge": {"judge_url": "http://h/v1", "judge_model": "m", "criteria": "no.txt"}}, "no.txt"),
     ({"judge": {"judge": "no/model"}}, "no/model"), ({"held_out": "none.txt"}, "none.txt"),
     ({"train": {"sae": ["no-sae"]}}, "no-sae")],
)  # fmt: skip
def test_what_a_section_names_is_there_before_the_first_answer(place, tmp_path, changes, part):
    done = run("rounds", "-c", write(place, tmp_path, **changes))
    assert done.exit_code != 0
    assert part in done.stderr
    assert not (tmp_path / "rounds").exists()


def test_held_out_prompts_that_are_trained_on_are_told_of(tmp_path):
    """A win rate on them was reported without a word."""
    rounds, said = importlib.import_module("fpo_mlx.pipeline.rounds"), []
    prompts, held = tmp_path / "p.txt", tmp_path / "h.jsonl"
    prompts.write_text("One?\nTwo?\n")
    lines(held, {"prompt": "two?  ", "system": "Be brief."}, {"prompt": "Three?"})
    rounds._check_held_out(held, prompts, said.append)
    assert len(said) == 1
    assert "1 of the 2 prompts" in said[0]
    lines(held, {"prompt": "Three?"})
    rounds._check_held_out(held, prompts, said.append)
    assert len(said) == 1


def test_what_nothing_was_made_with_may_be_mended(place, tmp_path, monkeypatch):
    """A run that failed in training keeps its answers and pairs."""
    always(monkeypatch)
    bad = {"objective": "dpo", "iters": 2, "max_seq_length": 4}
    refused(run("rounds", "-c", write(place, tmp_path, rounds=1, train=bad)), 3, "4")
    answers = (tmp_path / "rounds/round-1/candidates.jsonl").stat().st_mtime_ns
    done = run("rounds", "-c", write(place, tmp_path, rounds=1))
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "rounds/round-1/candidates.jsonl").stat().st_mtime_ns == answers
    changed = write(place, tmp_path, rounds=1, train={"objective": "dpo", "learning_rate": 1})
    refused(run("rounds", "-c", changed), 2, "begun with other settings (train)")


def test_how_answers_are_made_may_be_mended_before_the_first_one(place, tmp_path, monkeypatch):
    always(monkeypatch)
    narrow = {"n": 3, "max_tokens": 6, "max_seq_length": 8}
    refused(run("rounds", "-c", write(place, tmp_path, rounds=1, generate=narrow)), 3, "room for 2")
    assert run("rounds", "-c", write(place, tmp_path, rounds=1)).exit_code == 0


def test_a_drift_that_is_no_finite_number_ends_the_rounds(tmp_path):
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    settings = RoundsConfig(model="m", prompts="p", held_out="h", output=str(tmp_path), max_drift=1)
    (tmp_path / "adapters").mkdir()
    log = tmp_path / "adapters/metrics.jsonl"
    log.write_text(json.dumps({"metrics": {"logps_per_token/chosen_change": None}}) + "\n")
    drift = rounds._drift(tmp_path / "adapters")
    one = rounds.Round(1, 1, None, 0.0, 0.0, 0.9, (0.8, 1.0), 1.0, drift)
    assert "over max_drift" in rounds._end(one, settings)


def test_the_users_folder_is_spelled_out_in_a_file_of_rounds(place, tmp_path, monkeypatch):
    always(monkeypatch)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    path = write(
        place, tmp_path, rounds=1, prompts="~/prompts.txt", output="~/rounds",
        judge={"reward": "~/grade.py:grade"},
    )  # fmt: skip
    done = run("rounds", "-c", path)
    assert done.exit_code == 0, done.stderr
    assert (tmp_path / "rounds/rounds.json").exists()
    assert not (tmp_path / "~").exists()


def test_a_model_that_says_nothing_any_more_loses(tmp_path):
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    before = candidates(tmp_path / "b.jsonl", {f"Q{i}?": ["an answer"] for i in range(10)})
    after = candidates(
        tmp_path / "a.jsonl", {f"Q{i}?": ["" if i < 8 else "an answer"] for i in range(10)}
    )
    judge = JudgeConfig(reward="brevity")
    rate, interval = rounds._against(before, after, judge, tmp_path, lambda _: None)
    assert rate == pytest.approx(0.1)  # 8 lost, 2 alike
    one = rounds.Round(2, 1, None, 0.0, 0.0, rate, interval, 1.0, None)
    settings = RoundsConfig(model="m", prompts="p", held_out="h")
    assert "lose to those of the round before" in rounds._end(one, settings)


def test_all_of_a_few_held_out_prompts_are_no_certainty_and_end_the_rounds(tmp_path):
    """Three won of three gave 100 to 100 %, and another round."""
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    before = candidates(tmp_path / "b.jsonl", {f"Q{i}?": ["long words " * 9] for i in range(3)})
    after = candidates(tmp_path / "a.jsonl", {f"Q{i}?": ["short"] for i in range(3)})
    judge = JudgeConfig(reward="brevity")
    rate, interval = rounds._against(before, after, judge, tmp_path, lambda _: None)
    assert rate == 1.0
    assert interval == pytest.approx((0.438, 1.0), abs=1e-3)
    one = rounds.Round(1, 1, None, 0.0, 0.0, rate, interval, 1.0, None)
    settings = RoundsConfig(model="m", prompts="p", held_out="h")
    assert "not told from those" in rounds._end(one, settings)


def test_only_held_out_prompts_that_both_rounds_answered_are_compared(tmp_path):
    """Mended between two runs: it was a KeyError, after the round's training."""
    rounds, spoken = importlib.import_module("fpo_mlx.pipeline.rounds"), []
    before = candidates(tmp_path / "b.jsonl", {f"Q{i}?": ["long words " * 9] for i in range(10)})
    after = candidates(tmp_path / "a.jsonl", {f"Q{i}?": ["short"] for i in range(2, 13)})
    judge = JudgeConfig(reward="brevity")
    rate, _ = rounds._against(before, after, judge, tmp_path, spoken.append)
    assert rate == 1.0
    assert len(read_verdicts(tmp_path / "versus-verdicts.jsonl")) == 8
    assert any("5 held-out prompts" in text for text in spoken)


def test_rounds_that_answered_no_held_out_prompt_in_common_are_not_compared(tmp_path):
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    before = candidates(tmp_path / "b.jsonl", {"Q?": ["long words"]})
    after = candidates(tmp_path / "a.jsonl", {"R?": ["short"]})
    with pytest.raises(DataError, match="no prompt in common"):
        rounds._against(before, after, JudgeConfig(reward="brevity"), tmp_path, print)


def test_the_length_of_a_held_out_answer_is_of_the_models_own(tmp_path):
    """Those that came with the prompts were counted in."""
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    after = candidates(tmp_path / "a.jsonl", {"Q?": ["two words", "and four words more"]})
    row = json.loads(after.read_text())
    row["candidates"].append(row["candidates"][0] | {"model": HUMAN, "tokens": 300})
    after.write_text(json.dumps(row))
    assert rounds._mean_tokens(after) == 3.0


def test_rounds_are_told_apart_where_the_judge_compares_with_a_persons_answers(tmp_path):
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    before = candidates(tmp_path / "b.jsonl", {f"Q{i}?": ["long words " * 9] for i in range(10)})
    after = candidates(tmp_path / "a.jsonl", {f"Q{i}?": ["short"] for i in range(10)})
    judge = JudgeConfig(reward="brevity", against_reference=True)
    rate, _ = rounds._against(before, after, judge, tmp_path, lambda _: None)
    assert rate == 1.0
    assert len(read_verdicts(tmp_path / "versus-verdicts.jsonl")) == 10


def test_held_out_answers_are_compared_by_the_judge_that_was_just_asked(tmp_path):
    """A mended reward's verdicts tied with those that it gave before it was mended."""
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    before = candidates(tmp_path / "b.jsonl", {f"Q{i}?": ["long words " * 9] for i in range(10)})
    after = candidates(tmp_path / "a.jsonl", {f"Q{i}?": ["short"] for i in range(10)})
    reward = tmp_path / "grade.py"
    for sign, want in (("", 0.0), ("-", 1.0), ("", 0.0)):  # the last one's verdicts are there
        reward.write_text(f"def grade(prompt, answer):\n    return {sign}len(answer)\n")
        judge = JudgeConfig(reward=f"{reward}:grade")
        assert rounds._against(before, after, judge, tmp_path, print)[0] == want


@pytest.mark.parametrize("own", [None, "reward:other@00000001"])
def test_a_round_s_pairs_are_those_of_the_judge_that_was_just_asked(
    place, tmp_path, monkeypatch, own
):
    """Its file may hold verdicts of the reward as it was before it was mended."""
    module, asked = importlib.import_module("fpo_mlx.pipeline.rounds"), []

    def stop(settings, **_):
        asked.append(settings.judge_name)
        raise DataError("enough")

    monkeypatch.setattr(module, "pairs_build", stop)
    build = {"force": True, "judge_name": own}
    refused(run("rounds", "-c", write(place, tmp_path, rounds=1, build=build)), 3, "enough")
    assert asked == [own or judge_name(f"{tmp_path / 'grade.py'}:grade")]


@pytest.mark.parametrize("build", [{}, {"keep_cut": True}])
def test_what_a_round_builds_of_is_judged(place, tmp_path, monkeypatch, build):
    """A model is not asked about answers that were cut, unless they may make pairs."""
    module, asked = importlib.import_module("fpo_mlx.pipeline.rounds"), []

    def stop(settings, **_):
        asked.append(settings.keep_cut)
        raise DataError("enough")

    monkeypatch.setattr(module, "pairs_judge", stop)
    refused(run("rounds", "-c", write(place, tmp_path, rounds=1, build=build)), 3, "enough")
    assert asked == [bool(build)]


def begun(tmp_path, **train):
    """Rounds with these settings of training are begun, or gone on with; what is said."""
    said = []
    settings = RoundsConfig(
        model="m", prompts="p", held_out="h", output=str(tmp_path / "rounds"), train=train
    )
    same_settings(tmp_path / "rounds", settings, said.append)
    return said


def test_what_a_resumed_training_may_change_gets_a_round_past_the_guard(tmp_path):
    assert begun(tmp_path, learning_rate=1e-3) == []
    adapters = tmp_path / "rounds/round-1/adapters"
    (adapters / "checkpoint").mkdir(parents=True)
    (adapters / "checkpoint/state.safetensors").write_text("a state")
    said = begun(tmp_path, learning_rate=1e-3, on_divergence="skip", max_margin=float("inf"))
    assert "a round that is done stays as it is" in said[0]
    assert begun(tmp_path, learning_rate=1e-3, on_divergence="skip", max_margin=float("inf")) == []
    with pytest.raises(ConfigError, match="begun with other settings \\(train\\)"):
        begun(tmp_path, learning_rate=1e-4, on_divergence="skip")
    with pytest.raises(ConfigError, match="begun with other settings \\(train\\)"):
        begun(tmp_path, learning_rate=1e-3, project_out="other.csv")  # another objective


def test_a_round_that_the_guard_stopped_before_a_state_may_learn_slower(tmp_path):
    assert begun(tmp_path, learning_rate=1e-3) == []
    (tmp_path / "rounds/round-1/adapters/checkpoint").mkdir(parents=True)
    assert begun(tmp_path, learning_rate=1e-4) == []


def test_a_seed_that_is_left_empty_is_the_usual_one():
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    settings = RoundsConfig(model="m", prompts="p", held_out="h", generate={"seed": None})
    assert rounds._generate(settings, None, "p", 2).seed == 2


def test_a_round_that_was_killed_before_its_first_state_trains_anew(tmp_path):
    settings = RoundsConfig(model="m", prompts="p", held_out="h", output=str(tmp_path))
    adapter = tmp_path / "adapters"
    (adapter / "checkpoint").mkdir(parents=True)
    (adapter / "run.json").write_text("{}")
    begun = _training(settings, tmp_path, adapter, None).train
    assert (begun.resume, begun.overwrite) == (False, True)
    (adapter / "checkpoint/state.safetensors").touch()
    saved = _training(settings, tmp_path, adapter, None).train
    assert (saved.resume, saved.overwrite) == (True, False)


def test_of_earlier_rounds_whole_reward_augmented_pairs_are_kept():
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    plain = [b'{"chosen": "a"}\n', b'{"chosen": "b", "from": {}}\n']
    twice = [b'{"from": {"wanted": %d}}\n' % score for score in (1, 2, 3, 4)]
    assert rounds._pairs([]) == []
    assert rounds._pairs(plain) == plain
    assert rounds._pairs(twice) == [twice[0] + twice[1], twice[2] + twice[3]]


@pytest.mark.parametrize("rows", [1, 2])
def test_no_pair_of_an_earlier_round_is_kept_whose_prompt_this_round_holds_back(tmp_path, rows):
    """Prompts may have been mended between two rounds, and change sides."""
    rounds = importlib.import_module("fpo_mlx.pipeline.rounds")
    source = {"wanted": 1.0} if rows == 2 else {}
    for number, train, held in ((1, "abcdef", "gh"), (2, "efgh", "ab")):
        pairs = tmp_path / f"round-{number}/pairs"
        pairs.mkdir(parents=True)
        for name, ids in (("train", train * rows), ("valid", held[0]), ("test", held[1])):
            made = [{"id": id, "round": number, "from": source} for id in sorted(ids)]
            lines(pairs / f"{name}.jsonl", *made)
    settings = RoundsConfig(model="m", prompts="p", held_out="h", keep_old=100)
    data = rounds._with_old(settings, 2, tmp_path / "round-2")
    found = [json.loads(line) for line in (data / "train.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in found if row["round"] == 1) == sorted("cdef" * rows)
