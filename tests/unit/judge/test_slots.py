"""Rows of a batch that are refilled: every answer is what the model alone would have said."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models

mx = pytest.importorskip("mlx.core")

from fpo_mlx.config import Sampling  # noqa: E402
from fpo_mlx.judge import sampling, slots  # noqa: E402
from fpo_mlx.judge.slots import Asked, answers, prefill  # noqa: E402
from fpo_mlx.model.load import load_model  # noqa: E402

MAKERS = (tiny_models.tiny_llama, tiny_models.tiny_gemma3_text, tiny_models.tiny_gemma2)


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def model(request, tmp_path_factory):
    return load_model(request.param(tmp_path_factory.mktemp("model"))).model


def asked(lengths=(3, 19, 70, 1, 8), n=3):
    rng = np.random.default_rng(0)
    return [
        Asked(rng.integers(5, 60, size=length).astype(np.int32), [(0, i, j) for j in range(n)])
        for i, length in enumerate(lengths)
    ]


def drawn(model, requests, settings, end=(), **words):
    return {(i, j): a for i, j, a in answers(model, requests, settings, end, **words)}


def test_every_answer_is_what_mlx_lms_plain_loop_draws_with_the_same_noise(model):
    """Windowed layers, soft-caps, one-token prompts, two widths of caches."""
    requests, settings = asked(), Sampling(20)
    end = {int(t) for t in next(iter(drawn(model, requests, settings).values())).tokens[5:6]}
    got = drawn(model, requests, settings, end, rows=4)
    assert sorted(got) == [(i, j) for i in range(5) for j in range(3)]
    for (i, j), answer in got.items():
        alone = sampling._alone(model, requests[i].prompt, (0, i, j), settings, end)
        assert answer.tokens.tolist() == alone.tokens.tolist()
        assert answer.finished == alone.finished
        assert answer.logp == pytest.approx(alone.logp, abs=1e-3)


@pytest.fixture(scope="module")
def by_sevens(model):
    return drawn(model, asked(), Sampling(12), rows=7)


@pytest.mark.parametrize("rows", [1, 3, 15])
def test_answers_do_not_depend_on_the_batch(model, by_sevens, rows):
    requests = asked()
    got = drawn(model, requests[::-1], Sampling(12), rows=rows)
    assert len(got) == len(by_sevens)
    for (i, j), answer in got.items():
        assert answer.tokens.tolist() == by_sevens[len(requests) - 1 - i, j].tokens.tolist()


def test_a_prompt_runs_once_for_all_its_answers(model, monkeypatch):
    seen = []
    monkeypatch.setattr(slots, "prefill", lambda m, p: seen.append(len(p)) or prefill(m, p))
    drawn(model, asked(n=4), Sampling(3), rows=2)
    assert sorted(seen) == [1, 3, 8, 19, 70]


def test_a_prompt_in_pieces_leaves_the_same_keys_and_values(model, monkeypatch):
    prompt = asked([33])[0].prompt
    whole = prefill(model, prompt)
    monkeypatch.setattr(slots, "PREFILL", 5)
    for one, two in zip(whole, prefill(model, prompt), strict=True):
        for a, b in zip(one, two, strict=True):
            np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-4)


def test_the_logp_is_the_models_own_at_temperature_one(model):
    (request,) = asked([6], n=1)
    answer = drawn(model, [request], Sampling(5, temp=0.5))[0, 0]
    whole = np.concatenate([request.prompt, answer.tokens])
    logits = np.array(model(mx.array(whole[None]))[0].astype(mx.float32), np.float64)
    logps = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True))
    logps -= logits.max(-1, keepdims=True)
    want = sum(logps[5 + t, token] for t, token in enumerate(answer.tokens))
    assert answer.logp == pytest.approx(want, abs=1e-3)


def test_widths_waste_at_most_a_quarter_above_one_step():
    for need in range(65, 5000):
        width = slots.width_for(need - 10, 10)
        assert need <= width <= max(need * 5 / 4, need + 63)
        assert width % 64 == 0


def sized(*lengths, n=4):
    return [Asked(np.zeros(length, np.int32), [(i, j) for j in range(n)])
            for i, length in enumerate(lengths)]  # fmt: skip


def test_widths_go_together_where_that_costs_less_than_idle_rows(monkeypatch):
    """By hand: 4 rows, a column costs 1/100: 2.28 for a wave of 128, 2.92 for one of 192."""
    monkeypatch.setattr(slots, "COLUMN_COST", 1 / 100)
    few = sized(60, 100, n=2)  # apart 2.28 + 2.92, together one wave of 2.92
    assert slots.column_groups(few, 60, 4) == [(192, {0, 1})]
    many = sized(*[60] * 8, 100, n=2)  # apart 4 x 2.28 + 2.92, together 5 x 2.92
    assert slots.column_groups(many, 60, 4) == [(192, {8}), (128, set(range(8)))]
    assert slots.column_groups([], 60, 4) == []


def test_known_prompts_count_for_widths_and_are_not_answered(model):
    from dataclasses import replace

    requests, settings = asked(), Sampling(12)
    want = drawn(model, requests, settings, rows=4)
    part = [replace(one, known=i in (2, 3)) for i, one in enumerate(requests)]
    assert slots.column_groups(part, 12, 4) == slots.column_groups(requests, 12, 4)
    got = drawn(model, part, settings, rows=4)
    assert {i for i, _ in got} == {0, 1, 4}
    for key, answer in got.items():
        assert answer.tokens.tolist() == want[key].tokens.tolist()
        assert answer.logp == want[key].logp  # to the last bit


def test_columns_that_are_masked_change_no_bit(model):
    """Which lets widths go together without a change of any answer."""
    (request,), settings = asked([6], n=4), Sampling(10)
    found = []
    for columns in (64, 128, 192, 640):
        batch = slots._Batch(model, [request], settings, (), 4, columns, False)
        found.append([(a.tokens.tolist(), a.logp) for _, _, a in batch.run([0])])
    assert all(one == found[0] for one in found)
