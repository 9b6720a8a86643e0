"""The training loop: known factors come back, a stopped run is the run that was not stopped."""

from __future__ import annotations

import json
import os
import tracemalloc
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

mx = pytest.importorskip("mlx.core")

from fpo_mlx.core import dictionary  # noqa: E402
from fpo_mlx.core.dictionary import Rule  # noqa: E402
from fpo_mlx.errors import ConfigError, Diverged, FpoError, Interrupted, ModelError  # noqa: E402
from fpo_mlx.records import Site  # noqa: E402
from fpo_mlx.sae import load_sae  # noqa: E402
from fpo_mlx.sae.encode import decode, encode  # noqa: E402
from fpo_mlx.saetrain import activations, finish, rows, state, trainer  # noqa: E402
from fpo_mlx.saetrain.rows import Position  # noqa: E402
from fpo_mlx.saetrain.texts import Document  # noqa: E402
from fpo_mlx.saetrain.trainer import Plan  # noqa: E402
from fpo_mlx.storage import locks  # noqa: E402
from fpo_mlx.storage.runfolder import METRICS, RUN  # noqa: E402

ARCHITECTURES = ("topk", "batchtopk", "jumprelu")
FACTORS, WIDTH, ACTIVE = 128, 64, 4


def factors(n: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """(directions [128, 64] of length 1, rows [n, 64] of 4 of them each, away from 0)."""
    rng = np.random.default_rng(seed)
    true = rng.standard_normal((FACTORS, WIDTH)).astype(np.float32)
    true /= np.linalg.norm(true, axis=1, keepdims=True)
    chosen = np.argsort(rng.random((n, FACTORS)), axis=1)[:, :ACTIVE]
    sizes = rng.uniform(0.5, 1.5, (n, ACTIVE)).astype(np.float32)
    return true, np.einsum("nk,nkd->nd", sizes, true[chosen]) + np.float32(0.3)


def small(architecture: str = "topk", groups: tuple[int, ...] = (256,)) -> Rule:
    return Rule(architecture, ACTIVE, groups, aux_k=32)


def start(rule: Rule, sample: np.ndarray) -> state.State:
    return state.fresh(sample, rule, seed=0, centre="geometric_median")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_known_sparse_factors_are_found(architecture):
    true, data = factors(30_000)
    run, rule = start(small(architecture), data[:4096]), small(architecture)
    plan = Plan(350, 512, 512, 6e-3, 0, 10_000)
    last = list(trainer.train(rows.from_array(data), run, rule, plan))[-1]
    cosines = (true @ np.array(run.params["w_dec"]).T).max(axis=1)
    assert cosines.mean() >= 0.95
    assert last.l0 == pytest.approx(ACTIVE, rel=0.1)
    sae = finish.finished(run, rule, data[:2000], site=Site(0), model_name="factors")
    figures = finish.measure(sae, factors(33_000)[1][30_000:])
    assert figures.l0 == pytest.approx(ACTIVE, rel=0.1)
    assert figures.fvu == pytest.approx(last.loss, rel=0.25)


PLAN = Plan(24, 64, 32, 3e-3, 7, 256, report_every=4, save_every=5)


def run_all(folder, rule, source, plan=PLAN, stop=lambda: None):
    folder.mkdir(exist_ok=True)
    sample = source.chunk(0)[:512]
    begun = (folder / state.STATE).exists()
    current = state.load(folder / state.STATE) if begun else start(rule, sample)
    current.metrics_bytes = state.run_folder(folder).rewind_log(current.metrics_bytes)
    return current, list(trainer.train(source, current, rule, plan, folder, stop))


def stop_after(n: int, code: int = 130):
    asked = iter(range(1, 1000))
    return lambda: code if next(asked) >= n else None


def pieces(data: np.ndarray) -> rows.Source:
    """Five chunks a pass, so that a run crosses several."""
    return rows.Source(lambda number: data[(number % 5) * 300 :][:300], 5)


def contents(folder) -> tuple[bytes, list[dict]]:
    lines = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    for line in lines:
        del line["tokens_per_second"], line["peak_memory_gb"]
    with_log = state.load(folder / state.STATE)
    arrays = {**with_log.params, **{f"v{k}": v for k, v in with_log.second.items()}}
    return b"".join(np.array(arrays[k]).tobytes() for k in sorted(arrays)), lines


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("at", [1, 5, 13])
def test_a_stopped_run_goes_on_bit_for_bit(tmp_path, architecture, at):
    rule, source = small(architecture, (32, 64, 128, 256)), pieces(factors(1500)[1])
    straight = run_all(tmp_path / "straight", rule, source)[0]
    with pytest.raises(Interrupted) as stopped:
        run_all(tmp_path / "cut", rule, source, stop=stop_after(at))
    assert stopped.value.exit_code == 130
    cut = run_all(tmp_path / "cut", rule, source)[0]
    assert cut.step == straight.step == 24
    assert cut.position == straight.position
    assert (straight.unused > 256).any(), "no feature was dead: the auxiliary loss was not on"
    np.testing.assert_array_equal(cut.unused, straight.unused)
    assert contents(tmp_path / "cut") == contents(tmp_path / "straight")


def test_a_run_killed_at_any_file_operation_loses_nothing(tmp_path, monkeypatch):
    rule, source = small(), pieces(factors(1500)[1])
    run_all(tmp_path / "straight", rule, source)
    wanted = contents(tmp_path / "straight")
    kills = 0
    for name in ("fsync", "replace"):
        for at in range(1, 40):
            folder, calls = tmp_path / f"{name}{at}", iter(range(1, 1000))
            whole = getattr(os, name)

            def dies(*args, real=whole, calls=calls, at=at, **kwargs):
                if next(calls) == at:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with monkeypatch.context() as patch:
                patch.setattr(os, name, dies)
                try:
                    run_all(folder, rule, source)
                except KeyboardInterrupt:
                    kills += 1
                else:
                    break
            run_all(folder, rule, source)
            assert contents(folder) == wanted
    assert kills >= 10


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
def test_micro_batches_change_nothing_but_rounding(tmp_path, architecture):
    rule, source = small(architecture), pieces(factors(1500)[1])
    a, b = (
        run_all(tmp_path / str(micro), rule, source, replace(PLAN, micro=micro))[0]
        for micro in (16, 64)
    )
    for name, value in a.params.items():
        np.testing.assert_allclose(value, b.params[name], atol=2e-3, err_msg=name)


def test_a_loss_that_is_not_finite_ends_the_run_and_keeps_the_checkpoint(tmp_path):
    rule, data = small(), factors(1500)[1]
    broken = rows.Source(lambda number: data[:640] if number == 0 else data * np.nan, 1)
    with pytest.raises(Diverged, match="anew with --overwrite and a --learning-rate below 0.003"):
        run_all(tmp_path / "run", rule, broken)
    kept = state.load(tmp_path / "run" / state.STATE)
    assert kept.step == 10
    assert all(np.isfinite(np.array(value)).all() for value in kept.params.values())


def test_the_finished_sae_on_raw_rows_is_the_trained_one_on_scaled_rows(tmp_path):
    data = factors(2000)[1] * 40 + 7
    for architecture in ARCHITECTURES:
        rule = small(architecture)
        run, _ = run_all(tmp_path / architecture, rule, pieces(data))
        sae = finish.finished(run, rule, data[:1000], site=Site(3), model_name="m")
        finish.write(tmp_path / architecture, sae, finish.card(sae, None, {"model": "m"}))
        read = load_sae(tmp_path / architecture)
        assert (read.site, read.model_name) == (Site(3), "m")
        acts = encode(read, data[1000:])
        error = np.square(data[1000:] - decode(read, acts, data[1000:])).sum()
        figures = finish.measure(sae, data[1000:])
        variance = np.square(data[1000:] - data[1000:].mean(axis=0)).sum()
        assert figures.fvu == pytest.approx(error / variance, rel=1e-4)
        assert figures.l0 == pytest.approx((acts > 0).sum(axis=1).mean(), rel=1e-3)
        assert figures.l0 == pytest.approx(ACTIVE, rel=0.5)
        assert figures.fvu < 0.9


def test_the_first_update_sees_a_fraction_of_variance_near_1(tmp_path):
    data = factors(2000)[1] * 40 + 7
    run = start(small(), data)
    assert run.scale == pytest.approx(1 / data.std(axis=0).mean(), rel=0.05)
    loss, l0 = trainer.step(run, small(), PLAN, data[:64])
    assert 0.5 < loss < 1.5
    assert l0 == ACTIVE


def test_the_first_reconstruction_is_scaled_to_fit():
    data, rule = factors(1024)[1], small()
    run = start(rule, data)
    x = mx.array((data - run.centre) * run.scale)
    acts = dictionary.activate(rule, run.params, dictionary.pre_activations(run.params, x))
    recon, wanted = np.array(acts @ run.params["w_dec"], np.float64), np.array(x, np.float64)
    assert (recon * wanted).sum() / (recon * recon).sum() == pytest.approx(1, abs=1e-4)
    lengths = np.linalg.norm(run.params["w_enc"], axis=1)
    np.testing.assert_allclose(lengths, lengths[0], rtol=1e-5)  # one factor for all


def test_the_geometric_median_is_not_drawn_by_an_outlier():
    points = np.array([[0.0, 0], [1, 0], [0, 1], [1, 1], [1000, 1000]], dtype=np.float32)
    near = state.centre_of(points, "geometric_median", steps=400)
    gradient = points - near  # where the unit vectors to the points cancel
    gradient /= np.linalg.norm(gradient, axis=1, keepdims=True)
    assert np.linalg.norm(gradient.sum(axis=0)) < 0.05
    assert np.abs(near).max() < 2
    np.testing.assert_allclose(state.centre_of(points, "mean"), [200.4, 200.4], rtol=1e-5)


def documents(*lengths: int) -> list[Document]:
    return [
        Document(np.full(n, n, dtype=np.int32), np.arange(n) > 0) for n in lengths
    ]  # fmt: skip


@settings(max_examples=40)
@given(st.lists(st.integers(2, 30), min_size=4, max_size=30), st.integers(30, 200))
def test_every_pass_uses_every_document_once(lengths, bound):
    items = documents(*lengths)

    def rows_of(part):
        return np.array([[id(item)] for item in part for _ in range(item.keep.sum())])

    source = rows.from_documents(items, rows_of, rows=bound, seed=3)
    everything, number = sorted(rows_of(items)[:, 0]), 0
    for _ in range(3):
        found: list[int] = []
        while len(found) < len(everything):
            chunk = source.chunk(number)[:, 0]
            assert len(chunk) <= bound
            found += chunk.tolist()
            number += 1
        assert sorted(found) == everything
    assert source.chunks >= len(everything) / bound


def test_a_batch_is_a_function_of_its_position():
    source = pieces(np.arange(1500, dtype=np.float32)[:, None])
    stream = rows.batches(source, 64, 0, Position())
    seen = [next(stream) for _ in range(30)]
    for at in (0, 3, 4, 17):
        again = rows.batches(source, 64, 0, seen[at][1])
        np.testing.assert_array_equal(next(again)[0], seen[at + 1][0])
    used = np.concatenate([batch[:, 0] for batch, _ in seen[:20]])
    assert len(set(used)) == len(used)  # one pass: 4 batches of each of 5 chunks
    assert not (np.diff(seen[0][0][:, 0]) == 1).all()  # shuffled


def test_too_few_activations_for_a_batch_are_refused():
    with pytest.raises(FpoError, match="fewer than one batch of 64"):
        next(rows.batches(rows.from_array(np.zeros((63, 4))), 64, 0, Position()))


def test_a_chunk_smaller_than_a_batch_is_passed_over():
    sizes = (100, 20, 130)
    source = rows.Source(lambda number: np.full((sizes[number % 3], 1), number), 3)
    stream = rows.batches(source, 64, 0, Position())
    seen = [next(stream) for _ in range(9)]
    assert [int(batch[0, 0]) for batch, _ in seen] == [0, 2, 2, 3, 5, 5, 6, 8, 8]
    for (_, at), (wanted, behind) in zip(seen, seen[1:], strict=False):
        again, position = next(rows.batches(source, 64, 0, at))
        assert position == behind
        np.testing.assert_array_equal(again, wanted)


def test_chunks_that_are_all_smaller_than_a_batch_are_refused():
    asked = []
    source = rows.Source(lambda number: asked.append(number) or np.zeros((63 - number % 2, 1)), 2)
    with pytest.raises(FpoError, match="fewer than one batch of 64"):
        next(rows.batches(source, 64, 0, Position()))
    assert len(asked) <= 6


def test_a_bound_below_one_batch_is_refused_before_anything_is_computed():
    with pytest.raises(FpoError, match="--memory-gb has room for 20 .* batch of 64"):
        rows.from_documents(documents(*[11] * 30), pytest.fail, rows=20, seed=0, least=64)


@settings(max_examples=40)
@given(st.lists(st.integers(2, 30), min_size=8, max_size=30), st.integers(58, 90))
def test_every_chunk_has_a_batch_and_the_bound_is_kept(lengths, bound):
    def rows_of(part):
        return np.zeros((sum(int(item.keep.sum()) for item in part), 1))

    source = rows.from_documents(documents(*lengths), rows_of, rows=bound, seed=3, least=30)
    if source.chunks > 1:
        assert all(30 <= len(source.chunk(number)) <= bound for number in range(9))


def test_a_chunk_is_computed_once_until_another_is_asked_for():
    """The start, the speed and the training itself all begin with the first one."""
    asked = []

    def rows_of(part):
        asked.append(len(part))
        return np.zeros((sum(int(item.keep.sum()) for item in part), 1))

    source = rows.from_documents(documents(*[11] * 30), rows_of, rows=100, seed=0)
    assert source.chunks == 3
    for number, computed in ((0, 1), (0, 1), (1, 2), (1, 2), (0, 3)):
        source.chunk(number)
        assert len(asked) == computed


class FakeTap:
    """Stands in for a tap: what the backbone appends to `seen` is what it recorded."""

    @contextmanager
    def recording(self):
        self.seen = []
        yield self.seen


def fake_reader(width: int, limit: float = float("inf")) -> activations.Reader:
    """A model whose activation of a token is the token, `width` times."""
    tap = FakeTap()

    def backbone(tokens, cache):
        wide = tokens[..., None].astype(mx.float32)
        tap.seen.append(mx.broadcast_to(wide, (*tokens.shape, width)))

    return activations.Reader(backbone, tap, Site(0), 1e-6, 1.0, limit)  # type: ignore[arg-type]


def test_activations_stay_near_their_bound_of_memory():
    width, bound = 256, 16_384
    reader = fake_reader(width, limit=16 * 290.0)  # norms are 16 times the token
    items = documents(*range(101, 301), *range(101, 301))
    source = rows.from_documents(items, reader.rows, rows=bound, seed=0, least=512)
    assert source.chunks > 3
    stream = rows.batches(source, 512, 0, Position())
    next(stream)
    tracemalloc.start()
    at = Position()
    while at.chunk < source.chunks + 2:
        batch, at = next(stream)
        assert batch.max() <= 290
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    row = 4 * width
    assert peak <= 1.5 * bound * row + 3 * activations.BATCH_TOKENS * row


def test_rows_are_in_the_documents_order_and_within_the_limit():
    items = documents(9, 4, 30, 4, 7)
    found = fake_reader(3).rows(items)
    assert found.dtype == np.float32
    wanted = np.repeat([9, 4, 30, 4, 7], [8, 3, 29, 3, 6])
    np.testing.assert_array_equal(found, np.repeat(wanted[:, None], 3, axis=1))
    few = fake_reader(3, limit=9 * 3**0.5 + 0.01).rows(items)
    np.testing.assert_array_equal(few, found[wanted <= 9])


def test_activations_that_are_not_finite_are_refused():
    reader = fake_reader(3)
    tap = reader.tap

    def backbone(tokens, cache):
        tap.seen.append(mx.full((*tokens.shape, 3), mx.inf))

    broken = replace(reader, backbone=backbone)
    with pytest.raises(ModelError, match="not finite"):
        broken.rows(documents(5, 6))


def test_rows_that_do_not_vary_have_no_figures():
    run, rule = start(small(), factors(300)[1]), small()
    data = factors(301)[1]
    sae = finish.finished(run, rule, data, site=Site(0), model_name="m")
    for held in (data[:0], data[:1], np.repeat(data[:1], 5, axis=0)):
        assert finish.measure(sae, held) is None
    found = finish.measure(sae, data[:2])
    assert found is not None
    assert found.rows == 2


def test_a_new_writer_of_a_store_clears_what_a_killed_one_left(tmp_path):
    for name in (".tmp-1-rows.npy", ".tmp-1-store.json", ".tmp-1-mine.txt"):
        (tmp_path / name).write_text("half")
    with (
        locks.held(tmp_path / rows.STORE_LOCK, tmp_path),
        pytest.raises(FpoError, match="being written"),
    ):
        rows.write_store(tmp_path, iter([np.zeros((2, 3))]), {})
    assert len(list(tmp_path.glob(".tmp-*"))) == 3
    rows.write_store(tmp_path, iter([np.zeros((2, 3))]), {})
    assert {p.name for p in tmp_path.iterdir()} == {"rows.npy", "store.json", ".tmp-1-mine.txt"}


def test_a_store_gives_back_its_rows_and_what_they_are_of(tmp_path):
    parts = [np.random.default_rng(i).standard_normal((n, 5)) for i, n in enumerate((3, 40, 1))]
    assert rows.write_store(tmp_path / "s", iter(parts), {"site": "x"}) == 44
    read, about = rows.read_store(tmp_path / "s")
    np.testing.assert_array_equal(read, np.concatenate(parts).astype(np.float32))
    assert about == {"site": "x", "rows": 44, "width": 5}
    with pytest.raises(FpoError, match="no stored activations"):
        rows.read_store(tmp_path / "absent")


def test_a_store_whose_writing_failed_is_not_there(tmp_path):
    def parts():
        yield np.zeros((2, 3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        rows.write_store(tmp_path / "s", parts(), {})
    assert list((tmp_path / "s").iterdir()) == []


def test_a_damaged_checkpoint_is_said_to_be_one(tmp_path):
    (tmp_path / state.STATE).write_bytes(b"nonsense")
    with pytest.raises(ModelError, match="cannot be read"):
        state.load(tmp_path / state.STATE)
    with pytest.raises(ConfigError, match="holds no checkpoint"):
        state.run_folder(tmp_path / "empty").check_resumable({}, set())


def test_a_resumed_run_must_have_the_old_settings(tmp_path):
    state.save(tmp_path, start(small(), factors(300)[1]))
    record = {"settings": {"k": 4, "seed": 0, "output": "a"}, "fingerprints": {"data": "x"}}
    record |= {"plan": {}}
    (tmp_path / RUN).write_text(json.dumps(record))
    other = {"settings": {"k": 5, "seed": 0, "output": "b"}, "fingerprints": {"data": "y"}}
    with pytest.raises(ConfigError) as refused:
        state.run_folder(tmp_path).check_resumable(other, {"output"})
    assert "k: was 4, now 5" in str(refused.value)
    assert "data: was 'x', now 'y'" in str(refused.value)
    assert "output" not in str(refused.value).split("\n", 1)[1].rsplit("\n", 1)[0]
    (tmp_path / RUN).write_text("[]")
    with pytest.raises(ModelError, match="damaged"):
        state.run_folder(tmp_path).check_resumable(other, set())


def test_learning_rate_rises_then_stays_then_falls_to_nearly_nothing():
    plan = Plan(100, 1, 1, 1e-3, 0, 1, warm_up=0.1, decay=0.5)
    rates = [plan.rate(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-4)
    assert rates[9:51] == pytest.approx([1e-3] * 42)
    assert rates[99] == pytest.approx(2e-5)
    assert rates[51:] == sorted(rates[51:], reverse=True)


def test_the_list_of_dead_features_keeps_few_shapes():
    unused = np.arange(200)
    assert trainer.dead_list(unused, 199) is None
    for dead, size in ((1, 64), (64, 64), (65, 128), (200, 200)):
        found = np.array(trainer.dead_list(unused, 199 - dead))
        assert len(found) == size
        assert sorted(found[found >= 0]) == list(range(200 - dead, 200))
