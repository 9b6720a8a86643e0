"""The end of a run with a target: what is saved meets it on the validation pairs."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from helpers import SIZES, log_of, open_trainer, random_pairs, weights  # noqa: E402

from fpo_mlx.cli.show import Progress  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.train.drift import named_as  # noqa: E402
from fpo_mlx.train.events import LandedReport, SavedReport, StoppedReport, ValidReport  # noqa: E402
from fpo_mlx.train.landing import FEWEST, LEAST, LOOKS, MOST, NEAR, meeting  # noqa: E402

PAIRS, VALID = random_pairs(SIZES), random_pairs([*SIZES, *SIZES], seed=1)
DRIFT = {"objective": {"target_drift": 0.25}}
KL = {"preset": "tdpo2", "objective": {"target_kl": 0.5}}
RUN = {
    "iters": 12, "steps_per_eval": 100, "save_every": 100, "batch_size": 2, "learning_rate": 3e-3,
}  # fmt: skip


def never(part: float) -> float:
    pytest.fail("there was nothing to measure")


def test_by_hand_a_square_is_met_by_the_root_in_one_look():
    looks = []

    def square(part: float) -> float:
        looks.append(part)
        return 0.04 * part**2

    part = meeting(square, 0.04, 0.03)
    assert part == pytest.approx(math.sqrt(0.75))
    assert looks == [part]


@pytest.mark.parametrize("bend", [0.0, 0.3, 0.6])
@pytest.mark.parametrize("wanted", [0.4, 0.7, 0.9, 1.15])
def test_a_figure_that_bends_is_met_within_a_look_more(wanted, bend):
    """It grows as the square at first and as the fourth power later."""
    looks = []

    def bent(part: float) -> float:
        looks.append(part)
        return (1 - bend) * part**2 + bend * part**4

    part = meeting(bent, 1.0, wanted)
    assert part is not None
    assert len(looks) <= 2
    assert abs(math.log(bent(part) / wanted)) <= NEAR


def test_looks_that_find_no_such_part_take_the_nearest_and_end():
    """A figure with a leap, as features that begin to fire make one."""
    looks = {}

    def leap(part: float) -> float:
        looks[part] = part**2 if part < 0.6 else 1.0
        return looks[part]

    part = meeting(leap, 1.0, 0.5)
    assert part is not None
    assert len(looks) == LOOKS
    assert looks[part] == min(looks.values(), key=lambda f: abs(math.log(f / 0.5)))


def test_a_look_without_a_figure_ends_the_search_with_the_nearest_before_it():
    looks = iter([0.9, math.nan])
    assert meeting(lambda part: next(looks), 1.0, 0.5) == pytest.approx(math.sqrt(0.5))
    assert meeting(lambda part: math.nan, 1.0, 0.5) is None


@pytest.mark.parametrize("whole", [1.0, 1.02, 0.98, 0.0, math.nan, math.inf])
def test_what_is_near_enough_or_no_figure_is_left_as_it_is(whole):
    assert meeting(never, whole, 1.0) is None


@pytest.mark.parametrize(("target", "part"), [(0.001, LEAST), (100.0, MOST)])
def test_a_target_far_away_is_gone_towards_and_no_further(target, part):
    assert meeting(lambda s: s**2, 1.0, target) == part


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_models.tiny_llama(tmp_path_factory.mktemp("llama"), num_hidden_layers=3)


def landed(trainer) -> LandedReport:
    (report,) = [r for r in trainer.run() if isinstance(r, LandedReport)]
    return report


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("changes", [DRIFT, KL], ids=["drift", "kl"])
def test_what_is_saved_has_the_figure_that_was_named(llama, tmp_path, kind, changes):
    trainer = open_trainer(
        llama, tmp_path, PAIRS, valid=VALID, fine_tune_type=kind, **RUN, **changes
    )
    report = landed(trainer)
    assert abs(report.before / report.target - 1) > 0.05, "it was there already"
    power, figure = (2, "drift/rejected") if changes is DRIFT else (1, "kl/rejected")
    assert report.after == pytest.approx(report.target, rel=2 * NEAR / power)
    assert report.pairs == report.witnesses == len(VALID)
    assert named_as(figure, report.metrics[figure]) == pytest.approx(report.after)

    def measured(path) -> float:
        adapters.update(trainer.model, dict(mx.load(str(path))))
        return float(trainer._measure(trainer.valid)[figure].mean()) ** (1 / power)

    whole = tmp_path / "0000012_adapters.safetensors"
    assert measured(whole) == pytest.approx(report.before, rel=1e-5)
    assert measured(tmp_path / adapters.WEIGHTS) == pytest.approx(report.after, rel=1e-5)
    (entry,) = [e for e in log_of(tmp_path) if e["kind"] == "landed"]
    assert entry["part"] == report.part


def test_a_part_of_a_lora_is_that_part_of_its_second_factor(llama, tmp_path):
    trainer = open_trainer(llama, tmp_path, PAIRS, valid=VALID, **RUN, **DRIFT)
    report = landed(trainer)
    now, part = weights(trainer), dict(mx.load(str(tmp_path / adapters.WEIGHTS)))
    assert part.keys() == now.keys()
    for name, whole in now.items():  # the model itself is where the run left it
        scale = report.part if name.endswith("lora_b") else 1.0
        np.testing.assert_allclose(np.array(part[name]), scale * whole, rtol=1e-6, atol=1e-9)


def test_a_longer_run_goes_on_from_the_whole_change(llama, tmp_path):
    straight, short = tmp_path / "straight", tmp_path / "short"
    list(open_trainer(llama, straight, PAIRS, valid=VALID, **{**RUN, "iters": 20}, **DRIFT).run())
    landed(open_trainer(llama, short, PAIRS, valid=VALID, **RUN, **DRIFT))
    resumed(llama, short, iters=20)
    for name in (adapters.WEIGHTS, "0000020_adapters.safetensors"):
        assert (short / name).read_bytes() == (straight / name).read_bytes()


def resumed(llama, out, **changes):
    run = {**RUN, **changes}
    trainer = open_trainer(llama, out, PAIRS, valid=VALID, start=False, **run, **DRIFT)
    trainer.resume()
    return list(trainer.run())


def test_killed_before_it_landed_a_run_loses_nothing_and_lands_when_it_is_resumed(llama, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    landed(open_trainer(llama, straight, PAIRS, valid=VALID, **RUN, **DRIFT))
    for report in open_trainer(llama, killed, PAIRS, valid=VALID, **RUN, **DRIFT).run():
        if isinstance(report, SavedReport):
            break
    assert "0000012_adapters.safetensors" in {p.name for p in killed.iterdir()}
    (report,) = resumed(llama, killed)
    assert isinstance(report, LandedReport)
    for name in (adapters.WEIGHTS, "0000012_adapters.safetensors"):
        assert (killed / name).read_bytes() == (straight / name).read_bytes()
    before = (killed / adapters.WEIGHTS).read_bytes()
    assert resumed(llama, killed) == []  # once is enough
    assert (killed / adapters.WEIGHTS).read_bytes() == before


def test_a_run_that_ends_early_lands_where_it_ends(llama, tmp_path):
    run = {**RUN, "iters": 40, "steps_per_eval": 4, "early_stopping": 1, "learning_rate": 0.02}
    reports = list(open_trainer(llama, tmp_path, PAIRS, valid=VALID, **run, **DRIFT).run())
    kinds = [type(report) for report in reports[-3:]]
    assert kinds == [SavedReport, LandedReport, StoppedReport]
    assert reports[-2].iteration == reports[-1].iteration < 40


def test_more_of_a_change_is_not_saved_where_the_guard_would_end_a_run(llama, tmp_path):
    far = {**RUN, "objective": {"target_drift": 0.45}}
    free = landed(open_trainer(llama, tmp_path / "free", PAIRS, valid=VALID, **far))
    assert free.part > 1
    trainer = open_trainer(llama, tmp_path / "held", PAIRS, valid=VALID, **far)
    for report in trainer.run():
        assert not isinstance(report, LandedReport)
        if isinstance(report, ValidReport) and report.iteration:
            whole, more = (r.metrics["features/rejected"] for r in (report, free))
            assert whole < more
            trainer.config = replace(trainer.config, max_feature_distance=(whole + more) / 2)
    saved = dict(mx.load(str(tmp_path / "held" / adapters.WEIGHTS)))
    assert all((np.array(saved[k]) == v).all() for k, v in weights(trainer).items())


def test_a_run_that_goes_on_measures_without_dropout(llama, tmp_path):
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    drops = {**RUN, **DRIFT, "dropout": 0.3}
    landed(open_trainer(llama, straight, PAIRS, valid=VALID, **drops))
    for report in open_trainer(llama, killed, PAIRS, valid=VALID, **drops).run():
        if isinstance(report, SavedReport):
            break
    trainer = open_trainer(llama, killed, PAIRS, valid=VALID, start=False, **drops)
    trainer.resume()
    trainer.model.train()  # as layers are when they are made
    landed(trainer)
    assert (killed / adapters.WEIGHTS).read_bytes() == (straight / adapters.WEIGHTS).read_bytes()


def test_resumed_without_landing_the_whole_is_there_again(llama, tmp_path):
    landed(open_trainer(llama, tmp_path, PAIRS, valid=VALID, **RUN, **DRIFT))
    whole = (tmp_path / "0000012_adapters.safetensors").read_bytes()
    assert (tmp_path / adapters.WEIGHTS).read_bytes() != whole
    assert resumed(llama, tmp_path, land=False) == []
    assert (tmp_path / adapters.WEIGHTS).read_bytes() == whole
    (report,) = resumed(llama, tmp_path)
    assert isinstance(report, LandedReport)


def test_the_line_says_what_was_saved(capsys):
    metrics = {"rewards/accuracies": 0.9, "rewards/margins": 0.2,
               "logps_per_token/chosen_change": -0.1}  # fmt: skip
    for figure, unit in (("drift", ""), ("kl", " nats")):
        Progress()(LandedReport(80, figure, 0.1, 0.12, 0.83, 0.1004, 0.6, metrics, 25, 3.0))
        said = capsys.readouterr().err
        assert f"{figure} 0.12{unit} on 25 validation pairs, wanted 0.1: saved is 0.830 of" in said
        assert f"{figure} 0.1004{unit}  acc 0.90" in said


@pytest.mark.parametrize(
    "without", ["a target", "validation pairs", "enough of them", "parts", "--land"]
)
def test_without_what_it_takes_nothing_is_landed(llama, tmp_path, without):
    changes: dict = {**RUN, **({} if without == "a target" else DRIFT)}
    changes["valid"] = {"validation pairs": None, "enough of them": VALID[: FEWEST - 1]}.get(
        without, VALID
    )
    trainer = open_trainer(llama, tmp_path, PAIRS, **changes)
    if without == "parts":
        trainer.config = replace(trainer.config, init_adapter="another")
    if without == "--land":
        trainer.config = replace(trainer.config, land=False)
    assert not [r for r in trainer.run() if isinstance(r, LandedReport)]
    for name in (adapters.WEIGHTS, "0000012_adapters.safetensors"):
        whole = dict(mx.load(str(tmp_path / name)))
        assert all((np.array(whole[k]) == v).all() for k, v in weights(trainer).items())
