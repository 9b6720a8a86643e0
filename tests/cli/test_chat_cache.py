"""Between turns of a conversation only what is new is run, and it changes nothing."""

from __future__ import annotations

import numpy as np
import pytest
from command_line import random_sae
from evaluated import own_cache, place  # noqa: F401
from mlx_lm.models import cache
from tiny_models import HIDDEN

from fpo_mlx.config import Sampling, load_config
from fpo_mlx.judge import slots
from fpo_mlx.judge.speaking import Speaker, steering
from fpo_mlx.model.load import load_model
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.pipeline import open_chat

FIRST = [5, 17, 3, 250, 99, 42, 7, 8, 120]
ASK = Sampling(6, 0.0)


class Watched:
    """A speaker's turns: what it ran and the log-probs of each token, as it drew them."""

    def __init__(self, speaker, monkeypatch) -> None:
        self.speaker, self.ran, self.logprobs = speaker, [], []
        draw = slots.draw

        def drawing(logprobs, keys, temp):
            self.logprobs.append(np.array(logprobs))
            return draw(logprobs, keys, temp)

        monkeypatch.setattr(slots, "draw", drawing)
        model = speaker.model
        speaker.model = lambda tokens, **words: (self.ran.append(tokens.shape[1]), model(
            tokens, **words))[1]  # fmt: skip
        speaker.model.layers = model.layers

    def turn(self, prompt, end=()) -> tuple[list[int], np.ndarray, int]:
        """(tokens, log-probs [n, V], positions run)."""
        self.ran.clear()
        self.logprobs.clear()
        spoken = [one.token for one in self.speaker.speak(np.array(prompt, np.int32), ASK, end)]
        return spoken, np.concatenate(self.logprobs[: len(spoken)]), sum(self.ran)


def opened(place, steered=False, **words):
    sae = random_sae(HIDDEN)
    speaker = Speaker(load_model(place / "model").model, sae.site, encoder_of(sae), **words)
    if steered:
        speaker.steer(steering(sae.w_dec, sae.site, {3: 4.0, 7: None}))
    return speaker


@pytest.mark.parametrize("steered", [False, True])
def test_a_second_turn_runs_the_new_tokens_alone_and_is_that_of_a_fresh_model(
    place, monkeypatch, steered
):
    watched = Watched(opened(place, steered), monkeypatch)
    said, _, ran = watched.turn(FIRST)
    assert ran == len(FIRST) + len(said)
    prompt = [*FIRST, *said[:4], 11, 12, 13]  # the template ends the answer two tokens earlier
    second, logprobs, ran = watched.turn(prompt)
    assert ran == 3 + len(second)
    fresh = Watched(opened(place, steered), monkeypatch)
    tokens, wanted, ran = fresh.turn(prompt)
    assert ran == len(prompt) + len(tokens)
    assert tokens == second
    np.testing.assert_allclose(logprobs, wanted, atol=1e-5)


def test_an_answer_that_was_broken_off_or_ended_is_gone_on_with(place, monkeypatch):
    watched = Watched(opened(place), monkeypatch)
    said = []
    answer = watched.speaker.speak(np.array(FIRST, np.int32), ASK, ())
    for _ in range(2):
        said.append(next(answer).token)
    answer.close()
    prompt = [*FIRST, *said, 11, 12]
    second, logprobs, ran = watched.turn(prompt, end=())
    assert ran == 2 + len(second)
    ended, _, _ = watched.turn([*prompt, *second, 40], end=(second[-1], *range(4000)))
    assert len(ended) == 1
    third, logprobs, _ = watched.turn([*prompt, *second, 40, *ended, 9])
    tokens, wanted, _ = Watched(opened(place), monkeypatch).turn([*prompt, *second, 40, *ended, 9])
    assert tokens == third
    np.testing.assert_allclose(logprobs, wanted, atol=1e-5)


def test_other_steering_and_another_conversation_begin_anew(place, monkeypatch):
    speaker = opened(place)
    watched = Watched(speaker, monkeypatch)
    said, plain, _ = watched.turn(FIRST)
    _, again, ran = watched.turn(FIRST)  # the same prompt: all but its last token is there
    assert ran == 1 + len(said)
    np.testing.assert_allclose(again, plain, atol=1e-5)
    sae = random_sae(HIDDEN)
    speaker.steer(steering(sae.w_dec, sae.site, {3: 4.0}))
    said, steered, ran = watched.turn(FIRST)
    assert ran == len(FIRST) + len(said)
    assert np.abs(steered[0] - plain[0]).max() > 1e-3
    _, _, ran = watched.turn([9, 8, 7])
    assert ran == 3 + ASK.max_tokens


def test_a_full_window_is_run_anew_with_the_same_answer_and_says_so_once(place, monkeypatch):
    def rotating(model):
        return [cache.RotatingKVCache(max_size=12) for _ in model.layers]

    monkeypatch.setattr(cache, "make_prompt_cache", rotating)
    told: list[str] = []
    watched = Watched(opened(place, tell=told.append), monkeypatch)
    said, _, _ = watched.turn(FIRST)
    prompt = [*FIRST, *said[:3], 11, 12]
    second, logprobs, ran = watched.turn(prompt)
    assert ran == len(prompt) + len(second)
    watched.turn([*prompt, 13])
    assert len(told) == 1
    assert "anew" in told[0]
    tokens, wanted, _ = Watched(opened(place), monkeypatch).turn(prompt)
    assert tokens == second
    np.testing.assert_allclose(logprobs, wanted, atol=1e-5)
    whole, _, _ = watched.turn(prompt)
    _, _, ran = watched.turn([*prompt, *whole, 14])  # nothing has to go: the window serves
    assert ran == 1 + ASK.max_tokens


def test_a_conversation_answers_as_one_that_is_opened_at_its_second_turn(place):
    config = load_config({"model": str(place / "model")})
    kept, fresh = (open_chat(config, say=lambda _: None) for _ in range(2))

    def answer(chat, prompt):
        return "".join(piece for piece, _ in chat.answer("base", prompt, ASK))

    answer(kept, "Why?")
    fresh.turns = {"base": list(kept.turns["base"])}
    assert answer(kept, "And how?") == answer(fresh, "And how?")
