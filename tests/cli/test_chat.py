"""`chat`: steered logits are those of a transformers hook; a person at a terminal; other flags."""

from __future__ import annotations

import os
import pty
import re
import select
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import forked
import mlx.core as mx
import numpy as np
import pytest
import tiny_models
from click.testing import CliRunner
from command_line import FEATURES, random_sae, refused, run
from evaluated import own_cache, place  # noqa: F401
from steer_hook import steered_logits
from tiny_make import for_transformers
from tiny_models import HIDDEN

from fpo_mlx.cli import main
from fpo_mlx.config import Sampling, load_config
from fpo_mlx.data.feature_files import read_steering
from fpo_mlx.errors import ConfigError
from fpo_mlx.judge.speaking import Speaker, steering
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Policy
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.pipeline import open_chat
from fpo_mlx.pipeline.chat import Chat
from fpo_mlx.records import Site
from fpo_mlx.sae.encode import encode
from fpo_mlx.storage.limits import ModelLimits

PROMPT = np.array([5, 17, 3, 250, 99, 42, 7, 8, 120], np.int32)
END = ()


def test_steering_by_its_words():
    assert read_steering("812=+4, 97=0,3=-1.5", 900) == {812: 4.0, 97: None, 3: -1.5}
    for bad in ("812", "x=1", "812=nan", "900=1", "1=1,1=2"):
        with pytest.raises(ConfigError, match="--steer"):
            read_steering(bad, 900)


@pytest.mark.parametrize("asked", [{3: 4.0}, {7: None}, {3: -2.0, 7: None, 9: None, 11: 1.0}])
def test_steered_logits_are_those_of_a_hook_on_the_transformers_model(place, asked):
    sae = random_sae(HIDDEN)
    model = load_model(place / "model").model
    plain = np.array(model(mx.array(PROMPT[None]))[0])
    speaker = Speaker(model, sae.site, encoder_of(sae))
    speaker.steer(steering(sae.w_dec, sae.site, asked))
    ours = np.array(model(mx.array(PROMPT[None]))[0])
    theirs = steered_logits(for_transformers(place / "model"), 1, sae.w_dec, asked, PROMPT)
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * np.abs(theirs).max())
    assert np.abs(ours - plain).max() > 0.01
    speaker.steer(None)
    np.testing.assert_array_equal(np.array(model(mx.array(PROMPT[None]))[0]), plain)


def test_what_is_added_and_shown_is_what_the_sae_reads_behind_granites_factor(tmp_path):
    """The MLP's output is multiplied before it joins the stream; the SAE reads it behind that."""
    loaded = load_model(tiny_models.tiny_granite(tmp_path / "granite"))
    factor = loaded.config["residual_multiplier"]
    site = Site(1, "mlp_out")
    sae = replace(random_sae(HIDDEN), site=site)
    policy = Policy(loaded.model, loaded.config, [site])
    reads = np.array(policy.answer_rows(PROMPT[:-1], PROMPT[-1:]).tapped[0])
    speaker = Speaker(loaded.model, site, encoder_of(sae), residual=factor)
    (spoken,) = speaker.speak(PROMPT[:-1], Sampling(1, 0.0), END, show=FEATURES)
    row = encode(sae, reads)[0]
    assert dict(spoken.features) == pytest.approx(
        {int(i): float(row[i]) for i in np.flatnonzero(row)}, rel=1e-4
    )
    speaker.steer(steering(sae.w_dec, site, {3: 4.0}))
    (change,) = speaker._tap.lasting
    tapped = mx.array(np.random.default_rng(0).normal(size=(1, 5, HIDDEN)).astype(np.float32))
    added = np.array((change(tapped) - tapped) * factor)
    np.testing.assert_allclose(added, np.broadcast_to(4 * sae.w_dec[3], added.shape), atol=1e-5)


def test_an_answer_without_steering_is_that_of_mlx_lm(place):
    from mlx_lm.generate import generate_step

    model = load_model(place / "model").model
    wanted = [int(t) for t, _ in generate_step(mx.array(PROMPT), model, max_tokens=12)]
    spoken = list(Speaker(model).speak(PROMPT, Sampling(12, 0.0), END))
    assert [one.token for one in spoken] == wanted


def test_the_features_shown_are_those_at_the_position_that_predicts_the_token(place):
    sae = random_sae(HIDDEN)
    model = load_model(place / "model").model
    speaker = Speaker(model, sae.site, encoder_of(sae))
    spoken = list(speaker.speak(PROMPT, Sampling(5, 0.0), END, show=3))
    whole = np.concatenate([PROMPT, [one.token for one in spoken[:-1]]])
    with speaker._tap.recording() as seen:
        model(mx.array(whole[None]))
    acts = encode(sae, np.array(seen[0][0]))[len(PROMPT) - 1 :]
    for one, row in zip(spoken, acts, strict=True):
        order = np.argsort(-row)[:3]
        assert [i for i, _ in one.features] == order.tolist()
        np.testing.assert_allclose([v for _, v in one.features], row[order], rtol=1e-3, atol=1e-4)


def test_base_and_adapter_stand_side_by_side_and_each_remembers_its_own(place):
    config = load_config({"model": str(place / "model")})
    chat = open_chat(config, adapter_paths=[str(place / "two")], beside_base=True, say=print)
    assert list(chat.speakers) == ["base", str(place / "two")]
    said = {n: "".join(p for p, _ in chat.answer(n, "Why?", Sampling(8, 0.0))) for n in chat.turns}
    assert said["base"] != said[str(place / "two")]
    assert all(chat.turns[name][-1]["content"] == text for name, text in said.items())
    none = open_chat(config, adapter_paths=[str(place / "two")], scale=0.0, say=print)
    name = str(place / "two")
    assert "".join(p for p, _ in none.answer(name, "Why?", Sampling(8, 0.0))) == said["base"]


def test_the_command_asks_steers_and_shows_features(place):
    words = ["chat", "--model", place / "model", "--sae", place / "sae", "--prompt", "Why?"]
    plain = run(*words, "--max-tokens", 6, "--temp", 0)
    steered = run(*words, "--max-tokens", 6, "--temp", 0, "--steer", "3=+40")
    assert plain.exit_code == steered.exit_code == 0, steered.stderr
    assert plain.stdout != steered.stdout
    shown = run(*words, "--max-tokens", 6, "--temp", 0, "--show-features", 2)
    assert len(re.findall(r"^['\"].*['\"] +\d+ [\d.e+-]+  \d+ ", shown.stdout, re.M)) == 6


def test_an_answer_that_was_cut_is_told(place):
    """Answers ended at 64 tokens, in the middle of a sentence, without a word."""
    words = ["chat", "--model", place / "model", "--prompt", "Why?", "--temp", 0]
    assert "cut after 6 tokens, by --max-tokens 6" in run(*words, "--max-tokens", 6).stderr
    chat = open_chat(load_config({"model": str(place / "model")}), say=print)
    first = next(iter(chat.speakers.values())).speak(PROMPT, Sampling(1, 0.0), END)
    (token,) = (one.token for one in first)
    chat.tokenizer = replace(chat.tokenizer, eos_token_ids=(token,))
    with patch.object(type(chat.tokenizer), "prompt_tokens", lambda *_: PROMPT):
        list(chat.answer("base", "Why?", Sampling(1, 0.0)))
        assert chat.cut is None
        few = ModelLimits(positions=len(PROMPT) + 3)
        chat.tokenizer = replace(chat.tokenizer, limits=few, eos_token_ids=(-1,))
        assert len(list(chat.answer("base", "Why?", Sampling(512, 0.0)))) <= 3
        assert chat.cut == 3
    for command in ("chat", "compare"):
        assert "[default: 512]" in " ".join(run(command, "--help-all").stdout.split())


def test_bytes_that_are_no_text_are_asked_as_far_as_they_are(place):
    """It was a traceback, at whatever line they came."""
    words = ["chat", "--model", str(place / "model"), "--max-tokens", "3", "--temp", "0"]
    done = CliRunner().invoke(main, words, input=b"hi\xff\xfe\nok\n")
    assert done.exit_code == 0, done.output
    assert done.stderr.count("cut after 3 tokens") == 2


def test_a_command_that_is_misspelt_is_not_asked_of_the_model(place):
    words = ["chat", "--model", place / "model", "--max-tokens", 3]
    refused(run(*words, "--prompt", "/qiut"), 1, "/qiut: no such command", "/quit ends")
    assert run(*words, "--prompt", "/etc/hosts?").exit_code == 0


@pytest.mark.parametrize(
    ("words", "part"),
    [(["--steer", "3=+4"], "wanted exactly one"), (["--show-features", "2"], "found 0")],
)
def test_what_needs_an_sae_says_so(place, words, part):
    refused(run("chat", "--model", place / "model", "--prompt", "a", *words), 2, part)


def test_a_feature_that_the_sae_does_not_have_is_refused(place):
    words = ["chat", "--model", place / "model", "--sae", place / "sae", "--prompt", "a"]
    refused(run(*words, "--steer", f"{FEATURES}=1"), 2, f"0 to {FEATURES - 1}")


def test_a_person_at_a_terminal_asks_steers_and_leaves(place):
    ours, theirs = pty.openpty()
    command = ["-m", "fpo_mlx", "chat", "--model", place / "model", "--sae", place / "sae"]
    command += ["--max-tokens", "4", "--temp", "0"]
    process = forked.start_at(os.ttyname(theirs), command, os.environ)
    written = b""

    def until(wanted: bytes) -> bytes:
        nonlocal written
        end = time.monotonic() + 120
        while wanted not in written and time.monotonic() < end:
            if select.select([ours], [], [], 1)[0]:
                written += os.read(ours, 65536)
        before, found, written = written.partition(wanted)
        assert found, before
        return before

    until(b"> ")
    os.write(ours, b"Why?\n")
    first = until(b"> ")
    os.write(ours, b"/steer 3=+40\n")
    assert b"steering 3=+40" in until(b"> ")
    left = b"\x1b[D"  # an arrow key: a slip of the fingers is mended where it is
    os.write(ours, b"/rset" + 3 * left + b"e\n")
    assert b"a new conversation" in until(b"> ")
    os.write(ours, b"Why?\n")
    assert until(b"> ") != first
    os.write(ours, b"/steer 99=1\n")
    assert b"0 to 47" in until(b"> "), "a slip does not end the conversation"
    os.write(ours, b"/quit\n")
    process.join(60)
    os.close(theirs)
    assert process.exitcode == 0
    os.close(ours)


def steered(asked, **changes):
    """The change of the stream that a chat with such an SAE makes."""
    changed: list[Any] = []
    speaker: Any = SimpleNamespace(steer=changed.append)
    sae = replace(random_sae(HIDDEN), source="an SAE", **changes)
    tokenizer: Any = None
    Chat(tokenizer, {"base": speaker}, sae, {}, None).steer(asked)
    return sae, changed[0]


@pytest.mark.parametrize("kind", ["layer_norm", "constant_norm"])
def test_an_sae_of_normalised_inputs_has_directions_to_take_out_and_none_to_add(kind):
    """It was refused for a decoder that writes elsewhere, which is not so."""
    with pytest.raises(ConfigError, match=rf"normalises its inputs \({kind}\).*7=0") as refusal:
        steered("3=0,7=+4", normalize=kind)
    assert "does not write" not in str(refusal.value)
    sae, change = steered("3=0", normalize=kind)
    rows = np.array(change(mx.array(np.ones((2, HIDDEN), np.float32))))
    np.testing.assert_allclose(rows @ sae.w_dec[3], 0, atol=1e-5)


def test_a_transcoder_is_refused_as_one_that_writes_elsewhere():
    with pytest.raises(ConfigError, match="does not write into the stream that it reads"):
        steered("3=0", transcoder=True)
