"""A run that was stopped and resumed is, byte for byte, the run that was not."""

from __future__ import annotations

import json

import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from helpers import SIZES, log_of, open_trainer, random_pairs  # noqa: E402

from fpo_mlx.config.sections import named  # noqa: E402
from fpo_mlx.errors import ConfigError, Interrupted, ModelError  # noqa: E402
from fpo_mlx.train.checkpoint import STATE, check_resumable  # noqa: E402
from fpo_mlx.train.events import (  # noqa: E402
    SavedReport,
)

PAIRS = random_pairs(SIZES)
SETTINGS = {
    "dropout": 0.1, "grad_accumulation_steps": 2, "iters": 12, "steps_per_report": 4,
    "steps_per_eval": 6, "save_every": 4, "batch_size": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def open_run(llama, out, **changes):
    return open_trainer(llama, out, PAIRS, valid=PAIRS[5:], **{**SETTINGS, **changes})


def resume(llama, out, **changes):
    trainer = open_run(llama, out, start=False, **changes)
    mx.random.seed(99)  # another process would not stand where the old one stood
    trainer.resume()
    return trainer, list(trainer.run())


def stop_after(n: int, code: int = 130):
    asked = iter(range(1, 1000))
    return lambda: code if next(asked) >= n else None


def same(a, b) -> None:
    for name in ("adapters.safetensors", "adapter_config.json", "best/adapters.safetensors"):
        assert (a / name).read_bytes() == (b / name).read_bytes(), name
    numbered = [sorted(p.name for p in folder.glob("0*.safetensors")) for folder in (a, b)]
    assert numbered[0] == numbered[1]
    assert len(numbered[0]) == 3
    assert log_of(a) == log_of(b)


@pytest.fixture(scope="module")
def straight(llama, tmp_path_factory):
    """One uninterrupted run per (optimizer, schedule, preset) that a test asks for."""
    runs: dict = {}

    def of(key, **changes):
        if key not in runs:
            runs[key] = tmp_path_factory.mktemp("straight")
            list(open_run(llama, runs[key], **changes).run())
        return runs[key]

    return of


FEWER = {"batch_size": 1}  # adam has more: what differs here is not how many pairs there are
VARIANTS = {
    "adam": {"optimizer": "adam"},
    "adamw": {**FEWER, "optimizer": "adamw", "optimizer_config": {"adamw": {"weight_decay": 0.1}}},
    "schedule": {
        **FEWER,
        "lr_schedule": {"name": "cosine_decay", "arguments": [1e-2, 6], "warmup": 2},
    },
    "muon": {**FEWER, "optimizer": "muon"},
    "adafactor": {**FEWER, "optimizer": "adafactor", "learning_rate": 1.0},
    "dora": {**FEWER, "fine_tune_type": "dora"},
    "tdpo2": {**FEWER, "preset": "tdpo2"},
    "forward": {**FEWER, "gradient": "forward", "optimizer": "sgd", "forward_interval": 4},
    "terms": {**FEWER, "preset": "orpo", "objective": {"wpo": True, "label_smoothing": 0.1}},
    "drift": {**FEWER, "objective": {"target_drift": 0.1}},
    "target kl": {**FEWER, "preset": "tdpo2", "objective": {"target_kl": 0.5}},
}


@pytest.mark.parametrize(
    ("variant", "updates"),
    [("adam", 1), ("adam", 3), ("adam", 5), ("adamw", 2), ("adamw", 3), ("schedule", 3)]
    + [
        ("muon", 1),
        ("adafactor", 5),
        ("dora", 3),
        ("tdpo2", 1),
        ("forward", 3),
        ("terms", 2),
        ("drift", 3),
        ("target kl", 2),
    ],
)
def test_stopped_anywhere_and_resumed_equals_the_run_that_was_not(
    llama, tmp_path, straight, variant, updates
):
    changes = VARIANTS[variant]
    trainer = open_run(llama, tmp_path, stop=stop_after(updates), **changes)
    with pytest.raises(Interrupted, match=f"after iteration {2 * updates};"):
        list(trainer.run())
    resumed, _ = resume(llama, tmp_path, **changes)
    assert resumed.progress.iteration == 12
    same(straight(variant, **changes), tmp_path)


def test_killed_between_checkpoints_the_run_goes_on_from_the_last(llama, tmp_path, straight):
    """Reports, a validation and a new best after the checkpoint are taken back, and made again."""
    trainer = open_run(llama, tmp_path)
    for _ in trainer.run():
        if trainer.progress.iteration == 6:  # the checkpoint is of iteration 4
            break
    resume(llama, tmp_path)
    same(straight("adam"), tmp_path)


def test_a_log_that_a_power_cut_shortened_goes_on_with_whole_lines(llama, tmp_path):
    """Twice: what the first resumed run says of the log's length is what the second cuts it to."""
    list(open_run(llama, tmp_path, iters=4).run())
    log = tmp_path / "metrics.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-9])
    resume(llama, tmp_path, iters=8)
    first = [(x["kind"], x["iteration"]) for x in log_of(tmp_path)]
    assert first == [("valid", 0), ("train", 4), ("valid", 6), ("train", 8), ("valid", 8)]
    with log.open("a") as file:
        file.write("written after the checkpoint")
    resume(llama, tmp_path, iters=10)
    assert [(x["kind"], x["iteration"]) for x in log_of(tmp_path)][:5] == first


def test_a_longer_run_goes_on_from_a_shorter_one(llama, tmp_path, straight):
    """--iters may grow. The end of the short run adds its own validation, which may be a best."""
    list(open_run(llama, tmp_path, iters=4).run())
    resume(llama, tmp_path)
    whole = straight("adam") / "adapters.safetensors"
    assert whole.read_bytes() == (tmp_path / "adapters.safetensors").read_bytes()
    got, want = ([{**x, "best": None} for x in log_of(f)] for f in (tmp_path, straight("adam")))
    assert [(x["kind"], x["iteration"]) for x in got if x not in want] == [("valid", 4)]
    assert [x for x in want if x not in got] == []


def test_iterations_are_whole_updates_and_no_pair_is_dealt_twice_by_a_longer_run(
    llama, tmp_path, straight
):
    """Three iterations are two updates of two, and a cut one that an older version made counts."""
    trainer = open_run(llama, tmp_path, iters=3)
    list(trainer.run())
    assert trainer.progress.iteration == trainer.total == 4
    trainer.progress.iteration = 3
    trainer._save_state()
    resumed, reports = resume(llama, tmp_path, iters=3)
    assert resumed.progress.iteration == 4
    assert reports == []
    resume(llama, tmp_path)
    whole = straight("adam") / "adapters.safetensors"
    assert whole.read_bytes() == (tmp_path / "adapters.safetensors").read_bytes()


@pytest.mark.parametrize("code", [130, 143])
def test_an_interruption_saves_everything_and_carries_its_exit_code(llama, tmp_path, code):
    trainer = open_run(llama, tmp_path, stop=stop_after(3, code))
    reports = []
    with pytest.raises(Interrupted) as error:
        reports.extend(trainer.run())
    assert error.value.exit_code == code
    assert reports[-1] == SavedReport(6, numbered=False)
    for name in ("adapters.safetensors", "adapter_config.json", str(STATE), "metrics.jsonl"):
        assert (tmp_path / name).is_file(), name
    assert not list(tmp_path.rglob(".tmp-*"))


def test_an_interruption_on_the_last_iteration_is_the_end_of_the_run(llama, tmp_path):
    trainer = open_run(llama, tmp_path, iters=4, stop=stop_after(2))
    assert list(trainer.run())[-1] == SavedReport(4, numbered=True)


def test_changed_settings_are_refused_by_name(llama, tmp_path):
    run = {
        "settings": {"learning_rate": 1e-5, "iters": 10, "lora_parameters": {"rank": 8}},
        "fingerprints": {"data": "abc", "model": "m", "saes": [["x", 1]]},
    }
    trainer = open_run(llama, tmp_path, iters=2)
    trainer.folder.start(run)
    list(trainer.run())
    check_resumable(tmp_path, run)
    check_resumable(tmp_path, {**run, "settings": {**run["settings"], "iters": 99}})
    other = {
        "settings": {**run["settings"], "learning_rate": 1e-4, "lora_parameters": {"rank": 4}},
        "fingerprints": {**run["fingerprints"], "data": "abd"},
    }
    with pytest.raises(ConfigError) as error:
        check_resumable(tmp_path, other)
    text = str(error.value)
    for part in ("learning_rate: was 1e-05, now 0.0001", "lora_parameters", "data: was 'abc'"):
        assert part in text
    assert "iters" not in text
    assert "model" not in text


def test_only_these_settings_may_be_others_in_a_resumed_run():
    """Where it writes, how long it goes on, when it stops, what it costs: no step is another."""
    length = {"iters", "epochs", "early_stopping"}
    ends = {"on_divergence", "max_skipped_updates", "max_margin", "max_logp_drop"}
    looks = {"val_batches", "valid_split", "test_split", "steps_per_report", "steps_per_eval"}
    looks |= {"save_every", "land", "check_sae", "max_start_gap", "max_feature_distance"}
    places = {"adapter_path", "resume", "overwrite", "report_to", "project_name"}
    costs = {"grad_checkpoint", "wired_share", "tokens_per_batch", "peer_timeout"}
    code = {"allow_pickle", "trust_remote_code"}
    by_fingerprint = {"reference", "dtype", "feature_weights", "project_out"}
    free = length | ends | looks | places | costs | code | by_fingerprint
    assert set(named("may_change")) == free
    assert set(named("by_content")) == {"model", "sae", "data", "chat_template", "init_adapter"}


def test_resuming_where_nothing_was_saved_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        check_resumable(tmp_path, {"settings": {}, "fingerprints": {}})


@pytest.fixture(scope="module")
def stopped(llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("stopped")
    list(open_run(llama, out, iters=2).run())
    return out


@pytest.mark.parametrize("damage", ["empty", "cut", "header", "metadata", "garbage", "no part"])
def test_a_damaged_state_is_a_plain_error(llama, tmp_path, stopped, damage):
    whole = (stopped / STATE).read_bytes()
    path = tmp_path / STATE
    path.parent.mkdir()
    if damage in ("metadata", "no part"):
        arrays, metadata = mx.load(str(stopped / STATE), return_metadata=True)
        if damage == "metadata":
            metadata = {"progress": json.dumps({"iteration": "?", "bogus": 1})}
        else:
            del arrays["random"]
        mx.save_safetensors(str(path), arrays, metadata=metadata)
    else:
        cut = {"empty": b"", "cut": whole[:-999], "header": whole[:60], "garbage": b"\xff" * 999}
        path.write_bytes(cut[damage])
    trainer = open_run(llama, tmp_path, start=False)
    with pytest.raises(ModelError, match="state.safetensors cannot be read") as error:
        trainer.resume()
    assert "in another --adapter-path" in str(error.value)
    assert "copy them first" in str(error.value)  # --overwrite removes them


def test_a_state_of_other_adapters_is_refused(llama, tmp_path, stopped):
    path = tmp_path / STATE
    path.parent.mkdir()
    path.write_bytes((stopped / STATE).read_bytes())
    trainer = open_run(llama, tmp_path, start=False, fine_tune_type="dora")
    with pytest.raises(ModelError, match="other adapters"):
        trainer.resume()


@pytest.mark.parametrize("text", ["{", "[]", '{"settings": {}}', ""])
def test_a_damaged_run_record_is_a_plain_error(tmp_path, text):
    (tmp_path / STATE).parent.mkdir()
    (tmp_path / STATE).write_bytes(b"x")
    (tmp_path / "run.json").write_text(text)
    with pytest.raises(ModelError, match="run.json is damaged"):
        check_resumable(tmp_path, {"settings": {}, "fingerprints": {}})
