"""A judge that explains itself: the regression of `features data` on an answer's features.

The light form of SARM (Zhang et al. 2025, arXiv 2508.08746): a linear reward on SAE features, read
in one pass of the model. It is a difference of two answers that has a meaning: the log-odds that
the first is preferred.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from fpo_mlx.config import load_config
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import CacheMismatch, ConfigError
from fpo_mlx.pipeline.job import Say, read_sae
from fpo_mlx.pipeline.tapped import open_tapped
from fpo_mlx.records import ResponseScore, Site, TokenPair
from fpo_mlx.reference.weights import model_fingerprint
from fpo_mlx.storage import files
from fpo_mlx.storage.hub import resolve_model

KIND, VERSION = "feature reward", 1


@dataclass(frozen=True)
class FeatureReward:
    """weights: log-odds per unit of a pooled activation."""

    model: str  # folder or hub id, as named
    model_fingerprint: str
    saes: tuple[tuple[str, str, int, str], ...]  # (as named, fingerprint, layer, site) of each
    features: tuple[tuple[int, int, float, str], ...]  # (SAE, feature, weight, in words)
    pairs: int  # that it was fitted on
    held_out_accuracy: float

    def parts(self, score: ResponseScore) -> np.ndarray:
        """What each of the features adds to the reward of an answer, [K]."""
        found = [
            dict(zip(f.indices.tolist(), f.values.tolist(), strict=True)) for f in score.features
        ]
        return np.array(
            [weight * found[sae].get(feature, 0.0) for sae, feature, weight, _ in self.features]
        )

    def why(self, difference: np.ndarray, count: int = 5) -> str:
        """The features that decided between two answers, the strongest first. [K]"""
        order = np.argsort(-np.abs(difference), kind="stable")[:count]
        return "; ".join(
            f"{self.name(int(i))} {difference[i]:+.3g}" for i in order if difference[i]
        )

    def name(self, i: int) -> str:
        sae, feature, _, words = self.features[i]
        number = f"{sae}:{feature}" if len(self.saes) > 1 else str(feature)
        return f"{number} ({words.strip()})" if words.strip() else number


def write_reward(path: Path, reward: FeatureReward) -> None:
    files.write_json(path, {"kind": KIND, "version": VERSION, **asdict(reward)})


def read_reward(path: Path) -> FeatureReward:
    """Raises: ConfigError for a file that is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if (value["kind"], value["version"]) != (KIND, VERSION):
            raise ValueError(f"it is {value['kind']} version {value['version']}")
        return FeatureReward(
            str(value["model"]),
            str(value["model_fingerprint"]),
            tuple((str(s), str(f), int(n), str(k)) for s, f, n, k in value["saes"]),
            tuple((int(s), int(f), float(w), str(t)) for s, f, w, t in value["features"]),
            int(value["pairs"]),
            float(value["held_out_accuracy"]),
        )
    except (OSError, ValueError, TypeError, KeyError, RecursionError) as error:
        raise ConfigError(
            f"--reward {path}: cannot be read as a regression on features ({error!r}). Wanted a "
            "file of `fpo-mlx features data --save-reward`."
        ) from error


Turns = Sequence[Mapping[str, Any]]
ScoreAnswers = Callable[[Turns, Any, Sequence[str]], list[ResponseScore]]


def open_reward(
    reward: FeatureReward, path: Path, *, trust_remote_code: bool = False, say: Say
) -> ScoreAnswers:
    """The model and the SAEs of a reward, to read the answers to a prompt with.

    Raises: CacheMismatch where they are not those that the weights belong to.
    """
    folder = resolve_model(reward.model)
    config = load_config({"model": str(folder)})
    saes = [
        replace(
            read_sae(spec, config.reference, say, decoder=False, on_disk=True),
            site=Site(layer, kind),  # type: ignore
        )
        for spec, _, layer, kind in reward.saes
    ]
    check_same(reward, path, model_fingerprint(folder), [sae.fingerprint() for sae in saes])
    opened = open_tapped(folder, saes, trust_remote_code=trust_remote_code)

    def score(turns: Turns, tools: Any, answers: Sequence[str]) -> list[ResponseScore]:
        tokens = [_response(opened.tokenizer, turns, tools, text) for text in answers]
        tokens += tokens[-1:] * (len(tokens) % 2)  # a pass reads two
        found: list[ResponseScore] = []
        for (prompt, one), (_, other) in zip(tokens[::2], tokens[1::2], strict=True):
            for both in opened.reader.scores([TokenPair(prompt, one, other, index=0)]):
                found += both
        return found[: len(answers)]

    return score


def _response(
    tokenizer: ChatTokenizer, turns: Turns, tools: Any, text: str
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens of the prompt, and those that the answer and the template's end add."""
    asked = [dict(turn) for turn in turns]
    prompt = tokenizer.prompt_tokens(asked, tools)
    whole = tokenizer.conversation_tokens([*asked, {"role": "assistant", "content": text}], tools)
    own = whole[len(prompt) :] if whole[: len(prompt)] == prompt else tokenizer.text_tokens(text)
    return np.array(prompt, np.int32), np.array(own or whole[-1:], np.int32)


def check_same(reward: FeatureReward, path: Path, model: str, saes: Sequence[str]) -> None:
    """Raises: CacheMismatch where model or SAEs are not those that the weights belong to."""
    known = [fingerprint for _, fingerprint, _, _ in reward.saes]
    for what, found, wanted in (("model", [model], [reward.model_fingerprint]),
                                ("SAE", list(saes), known)):  # fmt: skip
        if found != wanted:
            raise CacheMismatch(
                f"--reward {path}: its weights belong to another {what} ({wanted}) than the one "
                f"that is there ({found}). Run `fpo-mlx features data --save-reward` again."
            )
