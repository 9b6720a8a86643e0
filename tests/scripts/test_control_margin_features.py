"""scripts/studies/control_margin_features.py: texts, what counts as the behaviour, attribution."""

from __future__ import annotations

import control_margin
import control_margin_features
import numpy as np
import pytest
import texts
import tiny_models
from command_line import lines, random_sae

from fpo_mlx.records import Passage
from fpo_mlx.sae.encode import encode


def test_texts_that_choose_features_are_short_and_none_is_asked(tmp_path):
    def row(prompt, chosen):
        return {"prompt": prompt, "chosen": chosen, "rejected": "no"}

    rows = [row(f"p{i}", "Sure, here." if i % 2 else "A poem. " * 9) for i in range(12)]
    lines(tmp_path / "data" / "train.jsonl", row("long " * 60, "Sure!"), *rows)
    lines(tmp_path / "data" / "valid.jsonl", row("v", "Sure."))
    o = control_margin.parse(
        ["--behaviour", "opening", "--data", str(tmp_path / "data"), "--work", str(tmp_path),
         "--train-pairs", "9", "--prompts", "3", "--pairs", "2", "--texts", "9"]
    )  # fmt: skip
    folder = control_margin_features.split(o)
    assert [row["prompt"] for row in texts.rows(folder / "asked.jsonl")] == ["v", "p8", "p9"]
    with_, without = (
        [row["prompt"] for row in texts.rows(path)] for path in control_margin_features.text_sets(o)
    )
    assert with_ == ["p1", "p3", "p5", "p7", "p11"]
    (response,) = {row["response"] for row in texts.rows(tmp_path / "opening" / "without.jsonl")}
    assert len(response) == control_margin_features.SHOWN["opening"] == 60
    assert without == ["p0", "p2", "p4", "p6", "p10"]


@pytest.mark.parametrize(
    ("text", "opens"),
    [("Certainly! Below is one.", True), (" Here’s a poem", True), ("Here are three ways", True),
     ("Hereby it ends. Here is one.", False), ("Surely not", False)],
)  # fmt: skip
def test_an_opening_is_what_an_answer_begins_with(text, opens):
    assert control_margin_features.shows(text, "opening") is opens


@pytest.mark.parametrize(
    ("pieces", "behaviour", "begun"),
    [
        (["Two", " of", " it", ":\n\n", "1", ".", " One", "\n", "2", ". ", "Two"], "list", (4, 5)),
        (["So:", "\n", "- ", "one\n", "- ", "two"], "list", (2,)),
        (["No", " list", " - ", "here"], "list", ()),
        (["\n", "Here", " are", " two, ", "here are"], "opening", (1, 2)),
        (["I", " am", " sure"], "opening", ()),
        (["Sur", "e", "!", " It"], "opening", (0, 1)),
    ],
)  # fmt: skip
def test_the_tokens_that_begin_a_behaviour_by_hand(pieces, behaviour, begun):
    found = control_margin_features.marked(
        range(len(pieces)), lambda ids: "".join(pieces[i] for i in ids), behaviour
    )
    assert tuple(np.flatnonzero(found)) == begun


def test_what_a_feature_adds_is_what_goes_when_a_little_of_it_is_taken_out(tmp_path):
    """By finite differences on the model itself, of every feature that fires."""
    mx = pytest.importorskip("mlx.core")
    from fpo_mlx.api import open_model
    from fpo_mlx.core.logprobs import token_logps

    tiny_models.tiny_llama(tmp_path / "m", tokenizer=True)
    sae = random_sae(tiny_models.HIDDEN)
    model = open_model(tmp_path / "m", [sae])
    passage = Passage(np.array([1, 5, 9], np.int32), np.array([7, 3, 8, 2], np.int32), "")
    begun = np.array([False, True, True, False])
    found = control_margin_features.attribution(model, sae, passage, begun)

    policy, answer = model.reader.policy, (passage.prompt, passage.response)
    acts = encode(sae, np.array(policy.answer_rows(*answer).tapped[0]))  # [L, F]

    def said(feature, share):
        off = mx.array(share * acts[:, [feature]] * sae.w_dec[feature])
        hidden = policy.answer_rows(*answer, lambda rows: rows + off).hidden
        logps = token_logps(
            hidden, mx.array(passage.response), policy.head, policy.vocab_size, grad=False
        )
        return float(np.array(logps)[begun].sum())

    fires = np.flatnonzero(acts.any(axis=0))
    assert len(fires) > 3
    wanted = np.zeros(sae.n_features)
    wanted[fires] = [(said(f, 0.01) - said(f, -0.01)) / 0.02 for f in fires]
    assert np.abs(wanted).max() > 1e-3
    np.testing.assert_allclose(found, wanted, rtol=0.02, atol=0.02 * np.abs(wanted).max())
