"""The texts of control_margin.py, the features that they name, and others to compare with."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import control
import numpy as np
from texts import ITEM, answers_apart, is_list, rows, say, write_rows

from fpo_mlx import pipeline
from fpo_mlx.config import load_config

if TYPE_CHECKING:
    from fpo_mlx.api import TappedModel
    from fpo_mlx.records import Passage, SaeWeights

MARK = re.compile(r"[-*•]|\d{1,2}[.)]")
OPENING = re.compile(r"(sure|certainly|of course|absolutely|here(?:\s+(?:is|are)|['’]s))\b", re.I)
SHOWN = {"list": None, "opening": 60}  # characters of a text that features are found by; None: all
ALONG = 0.01  # squared cosines with the SAE's mean stream that a feature and its twin differ by
NEAR = 10  # times as many features, the next in line, are no features to compare with
PROMPT = 250  # characters at most, held out or of texts that are looked at: leaves room, costs less


def shows(text: str, behaviour: str) -> bool:
    return is_list(text) if behaviour == "list" else bool(OPENING.match(text.strip()))


def split(o: argparse.Namespace) -> Path:
    """The first pairs to train on; of the others those with short prompts are held out."""
    folder = o.work / "data"
    every = rows(o.data / "train.jsonl")
    left = [*rows(o.data / "valid.jsonl"), *every[o.train_pairs :]]
    short = [row for row in left if len(row["prompt"]) <= PROMPT][: max(o.prompts, o.pairs)]
    write_rows(folder / "train.jsonl", every[: o.train_pairs])
    write_rows(folder / "valid.jsonl", short[: o.pairs])
    write_rows(folder / "asked.jsonl", [{"prompt": row["prompt"]} for row in short[: o.prompts]])
    return folder


def text_sets(o: argparse.Namespace) -> tuple[Path, Path]:
    """Training answers with the behaviour and without; no asked prompt has one."""
    asked = {row["prompt"] for row in rows(o.work / "data" / "asked.jsonl")}
    short = (
        row
        for row in rows(o.data / "train.jsonl")
        if len(row["prompt"]) <= PROMPT and row["prompt"] not in asked
    )
    shown = partial(shows, behaviour=o.behaviour)
    return answers_apart(short, shown, o.texts, o.work, o.shown)


def features_of(o: argparse.Namespace, whose: str, seed: int) -> Path:
    return o.work / (f"{whose}.csv" if whose == "own" else f"{whose}-{seed}.csv")


def features(o: argparse.Namespace, base: dict[str, Any]) -> dict[str, Any]:
    """The behaviour's, and for each seed as many others that are as active and tell nothing of it.

    along: of each set, the share of the SAE's mean stream that lies in its decoders' span.
    """
    from fpo_mlx.api import read_sae

    texts, sae = text_sets(o), read_sae(o.sae)
    named = by_auc(o, base, texts) if o.by == "auc" else by_attribution(o, base, texts[0], sae)
    seen = pipeline.text_activations(load_config(base), texts, limit=o.texts, say=say)
    stream = sae.b_dec / np.linalg.norm(sae.b_dec)
    along = (sae.w_dec @ stream) ** 2 / (sae.w_dec**2).sum(axis=1)
    own, near = named[: o.features], {one["feature"] for one in named}
    names, others = [one["feature"] for one in own], []
    for _ in range(o.seeds):
        taken = near | {one["feature"] for twins in others for one in twins}
        others.append(
            control.twins(names, seen[0].mean, seen[1].mean, along=(along, o.along), taken=taken)
        )
    sets = [names, *([one["feature"] for one in twins] for twins in others)]
    spans = [np.linalg.qr(sae.w_dec[kept].T)[0].T @ stream for kept in sets]
    return {"own": own, "others": others, "along": [float(part @ part) for part in spans]}


def by_auc(
    o: argparse.Namespace, base: dict[str, Any], texts: tuple[Path, Path]
) -> list[dict[str, Any]]:
    """Those that tell answers with the behaviour from answers without it."""
    found = pipeline.find_features(
        load_config(base), positive=texts[0], negative=texts[1], limit=o.texts, top=o.features,
        say=say,
    )  # fmt: skip
    return [
        {"feature": one.feature, "auc": one.auc, "held_out_auc": one.held_out_auc} for one in found
    ]


def by_attribution(
    o: argparse.Namespace, base: dict[str, Any], texts: Path, sae: SaeWeights
) -> list[dict[str, Any]]:
    """Those by which the base begins the behaviour most, in answers that have it."""
    from fpo_mlx.api import open_model
    from fpo_mlx.pipeline.features import read_texts

    model = open_model(base["model"], [sae])
    found = []
    for passage in read_texts(texts, model.tokenizer, o.max_seq_length):
        begun = marked(passage.response.tolist(), model.tokenizer.decode, o.behaviour)
        if begun.any():
            end = int(np.flatnonzero(begun)[-1]) + 1  # nothing that comes later has a part in it
            begins = replace(passage, response=passage.response[:end])
            found.append(attribution(model, sae, begins, begun[:end]))
            say(f"{len(found)} answers that begin it")
    mean = np.mean(found, axis=0)
    first = np.argsort(-mean, kind="stable")[: NEAR * o.features]
    return [{"feature": int(i), "attribution": float(mean[i]), "texts": len(found)} for i in first]


def marked(tokens: Sequence[int], decode: Callable[..., str], behaviour: str) -> np.ndarray:
    """Which of an answer's tokens [L] begin the behaviour: the first item's mark, or the phrase."""
    text = decode(list(tokens))
    if behaviour == "list":
        item = ITEM.search(text)
        found = item and MARK.search(text, item.start())
    else:
        found = OPENING.search(text) if shows(text, behaviour) else None
    if not found:
        return np.zeros(len(tokens), dtype=bool)
    ends = np.array([len(decode(list(tokens[: i + 1]))) for i in range(len(tokens))])
    starts = np.concatenate([[0], ends[:-1]])
    return (ends > found.start()) & (starts < found.end())


def attribution(
    model: TappedModel, sae: SaeWeights, passage: Passage, begun: np.ndarray
) -> np.ndarray:
    """What each feature adds to the log-prob of the tokens marked in `begun` [L]: nats, [F].

    z (g . d) summed over positions, z its activation, d its direction, g the log-prob's gradient at
    the site: what taking it out would cost, to the first order (attribution patching, as in
    Marks et al. 2024, arXiv 2403.19647).
    """
    import mlx.core as mx

    from fpo_mlx.core.features import encode
    from fpo_mlx.core.logprobs import token_logps

    policy, targets = model.reader.policy, mx.array(passage.response)
    (rows,) = policy.answer_rows(passage.prompt, passage.response).tapped  # [L, D]
    marks = mx.array(begun.astype(np.float32))

    def said(more: mx.array) -> mx.array:
        hidden = policy.answer_rows(passage.prompt, passage.response, lambda own: own + more).hidden
        return (marks * token_logps(hidden, targets, policy.head, policy.vocab_size)).sum()

    slopes = mx.grad(said)(mx.zeros_like(rows))
    acts = encode(model.reader.encoders[0], rows)  # [L, F]
    return np.array((acts * (slopes.astype(mx.float32) @ mx.array(sae.w_dec.T))).sum(axis=0))
