"""The torch backend runs a pair's prompt once under either of transformers' names for the cache."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import tiny_models  # noqa: E402
from tiny_make import for_transformers  # noqa: E402

from fpo_mlx.records import TokenPair  # noqa: E402
from fpo_mlx.reference.torch_backend import TorchBackend, passes  # noqa: E402


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tiny_models.MAKERS["llama"](tmp_path_factory.mktemp("llama"))


@pytest.fixture
def pairs() -> list[TokenPair]:
    rng = np.random.default_rng(0)
    draw = [[rng.integers(3, 90, n).astype(np.int32) for n in (30, 4, 6)] for _ in range(3)]
    return [TokenPair(*ids, index=i) for i, ids in enumerate(draw)]


def named(backend: TorchBackend, name: str, monkeypatch) -> list:
    """Let the backbone take its cache under this name only; the caches that it is given."""
    base, given = backend._model.base_model, []
    real, own = base.forward, passes.cache_argument(backend._model)

    def old(self, input_ids, attention_mask=None, position_ids=None, past_key_values=None, **rest):
        return call(input_ids, attention_mask, position_ids, past_key_values, rest)

    def new(self, input_ids, attention_mask=None, position_ids=None, cache=None, **rest):
        return call(input_ids, attention_mask, position_ids, cache, rest)

    def other(self, input_ids, attention_mask=None, position_ids=None, memory=None, **rest):
        return call(input_ids, attention_mask, position_ids, memory, rest)

    def call(input_ids, attention_mask, position_ids, cache, rest):
        assert not {"cache", "past_key_values"} & set(rest)
        given.append(cache)
        places = {"attention_mask": attention_mask, "position_ids": position_ids}
        return real(input_ids=input_ids, **places, **{own: cache}, **rest)

    takes = {"past_key_values": old, "cache": new, "memory": other}
    monkeypatch.setattr(type(base), "forward", takes[name])
    return given


@pytest.mark.parametrize("name", ["past_key_values", "cache"])
def test_a_prompt_is_shared_under_either_name_of_the_cache(name, folder, pairs, monkeypatch):
    apart = TorchBackend(folder, device="cpu", share_prompt=False).score(pairs)
    backend = TorchBackend(folder, device="cpu")
    given = named(backend, name, monkeypatch)
    assert passes.why_apart(backend._model) == ""
    got = backend.score(pairs)
    assert len(given) == 2, "the prompts once, then the responses behind them"
    assert given[0] is not None
    assert given[0] is given[1]
    for a, b in zip(np.ravel(got), np.ravel(apart), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=1e-5)


def test_a_cache_under_an_unknown_name_is_not_used_and_that_is_said(folder, monkeypatch):
    backend = TorchBackend(folder, device="cpu")
    named(backend, "memory", monkeypatch)
    assert passes.why_apart(backend._model) == "LlamaModel takes no cache or past_key_values"


def test_what_keeps_prompts_from_being_shared_is_one_note(folder, pairs, monkeypatch):
    want = TorchBackend(folder, device="cpu").score(pairs)
    monkeypatch.setattr(passes, "CACHE", ("memory",))
    backend = TorchBackend(folder, device="cpu")
    assert not backend.shares_prompt
    assert backend.notes == ("LlamaModel takes no memory: prompts run twice per pair",)
    for a, b in zip(np.ravel(backend.score(pairs)), np.ravel(want), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=1e-5)


def test_sharing_that_nobody_asked_for_is_not_missed(folder, monkeypatch):
    monkeypatch.setattr(passes, "CACHE", ("memory",))
    assert TorchBackend(folder, device="cpu", share_prompt=False).notes == ()


def test_recurrent_state_is_no_plain_cache_and_that_is_said(tmp_path):
    folder = for_transformers(tiny_models.MAKERS["qwen3_next"](tmp_path))
    backend = TorchBackend(folder, device="cpu")
    assert not backend.shares_prompt
    assert backend.notes == (
        "this model's caches are not plain keys and values: prompts run twice per pair",
    )
