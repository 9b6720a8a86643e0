"""Which features moved on a split, and which tell two sets of texts apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import data
from fpo_mlx.config import RunConfig
from fpo_mlx.data.feature_files import read_labels
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import DataError
from fpo_mlx.judge.feature_report import Change, Found, Sort, TextActivations
from fpo_mlx.judge.scaling import Scaling
from fpo_mlx.pipeline.evaluate import open_scorer
from fpo_mlx.pipeline.job import (
    Job,
    Say,
    check_sae_named,
    need_features,
    need_model,
    one_sae,
    open_job,
    open_saes,
    open_tokenizer,
    read_pairs,
    read_sae,
    warn_of_adapters,
)
from fpo_mlx.pipeline.origins import warn_of_start, warn_of_training_pairs
from fpo_mlx.pipeline.prepared import longest
from fpo_mlx.pipeline.store import CachedScores, OnFill, reference_of
from fpo_mlx.records import Passage, SaeWeights, result_file
from fpo_mlx.storage.adapter_files import read_adapter
from fpo_mlx.storage.hub import read_config, resolve_model

if TYPE_CHECKING:
    from fpo_mlx.core.features import Encoder
    from fpo_mlx.model.policy import Policy
    from fpo_mlx.train.scoring import Scorer

NEURONPEDIA = "https://www.neuronpedia.org"


@dataclass(frozen=True)
class FeatureReport:
    """changes: the features that moved most, of every SAE; distance: mean D a response, by SAE."""

    changes: list[Change]
    distance: list[float]
    pairs: int
    adapter_path: str
    adapter_sha256: str | None  # of its weights
    split: str
    trained_on: bool  # these very pairs, by its run.json

    def as_dict(self) -> dict[str, Any]:
        names = ("adapter_path", "adapter_sha256", "split", "pairs", "distance")
        out = {name: getattr(self, name) for name in names}
        out |= {"trained_on": True} if self.trained_on else {}
        moved = [change.as_dict() for change in self.changes]
        return result_file("features", out | {"features": moved})

    def rows(self) -> list[dict[str, Any]]:
        """Flat, for a CSV: the contexts as their tokens."""
        rows = [change.as_dict() for change in self.changes]
        for row in rows:
            row["tokens"] = " ".join(map(repr, row["tokens"]))
            del row["contexts"]
            row |= row.pop("scaling") or {}
        return rows


def features(
    config: RunConfig,
    *,
    adapter_path: str,
    split: str = "valid",
    limit: int | None = None,
    top: int = 20,
    sort: Sort = "share_of_d",
    examples: int = 3,
    labels: Path | None = None,
    scaling: bool = False,
    say: Say,
    progress: OnFill = lambda _: None,
    count: Callable[[int, int], None] = lambda done, total: None,
) -> FeatureReport:
    """What an adapter did to the SAE's features on a split, against the cached reference.

    limit: pairs to look at; examples: contexts of each feature, found in a second pass; 0 for none;
    count: of the pairs that were looked at, (done, to do); scaling: ask of each feature whether it
    is the stream that moved (`judge.scaling`), for which both models are in memory and run once
    more.
    """
    from fpo_mlx.judge import feature_scan
    from fpo_mlx.train.metrics import ScoredPairs

    if scaling:
        need_features(config, "--scaling")
    digest = read_adapter(Path(adapter_path)).digest  # before the long part
    job = open_job(config, say=say, need_sae=True)
    known = read_labels(labels, len(job.saes)) if labels else ({},) * len(job.saes)
    specs = config.reference.sae if scaling else ()
    whole = [read_sae(spec, config.reference, say) for spec in specs]
    for sae in whole:
        Scaling(sae, ())  # refuses, before the long part
    warn_of_adapters([adapter_path], config, job.model_path, say, job.identity.model)
    warn_of_start([adapter_path], config.train.init_adapter, say)
    pairs = read_pairs(job, split, say)
    seen: set[str] = set()
    if split != "train":
        seen = warn_of_training_pairs([adapter_path], pairs, say, config, split)
    pairs = pairs[:limit]
    data = ScoredPairs(pairs, CachedScores(reference_of(job, pairs, say, progress), pairs))
    scorer = open_scorer(job, adapter_path, measure_kl=False, say=say)
    tallies = feature_scan.tally(scorer, data, lambda done: count(done, len(pairs)))
    texts = list(feature_scan.pair_texts(pairs))
    found = [one.changes(top, sort, sae=i) for i, one in enumerate(tallies)]
    if scaling:
        found = _with_scaling(found, job, scorer, whole, texts, say)
    found = _with_contexts(found, scorer, texts if examples else (), examples, job)
    changes = [
        replace(one, label=names.get(one.feature, ""), link=link(sae, one.feature))
        for of_sae, names, sae in zip(found, known, job.saes, strict=True)
        for one in of_sae
    ]
    distance = [float(one.distance.sum() / one.responses) for one in tallies]
    return FeatureReport(
        changes, distance, len(pairs), adapter_path, digest, split, adapter_path in seen
    )


def _with_scaling(
    found: list[list[Change]], job: Job, scorer: Scorer, whole: Sequence[SaeWeights],
    texts: Sequence[Passage], say: Say,
) -> list[list[Change]]:  # fmt: skip
    """Of each feature whether it is the stream that moved; both models are in memory."""
    from fpo_mlx.judge import feature_scan

    both = tapped_policy(job, job.adapter, say), scorer.policy
    tested = [
        feature_scan.scaled(both, encoder, i, whole[i], texts, [c.feature for c in found[i]])
        for i, encoder in enumerate(scorer.encoders)
    ]
    return [
        [replace(change, scaling=own) for change, own in zip(*of_sae, strict=True)]
        for of_sae in zip(found, tested, strict=True)
    ]


def _with_contexts(
    found: list[list[Change]], scorer: Scorer, texts: Sequence[Passage], examples: int, job: Job
) -> list[list[Change]]:
    """Where each feature fires most."""
    from fpo_mlx.judge import feature_scan

    out = []
    for i, of_sae in enumerate(found):
        shown = feature_scan.contexts(
            scorer.policy, scorer.encoders[i], i, texts, [c.feature for c in of_sae], examples,
            job.tokenizer.decode,
        )  # fmt: skip
        out.append([replace(c, contexts=shown[c.feature]) for c in of_sae])
    return out


def tapped_policy(job: Job, adapter: str | Path | None, say: Say) -> Policy:
    """The job's model with this adapter, its SAEs' sites tapped."""
    return _tapped(job.config, job.model_path, job.saes, adapter, say)


def _tapped(
    config: RunConfig, path: Path, saes: Sequence[SaeWeights], adapter: str | Path | None, say: Say
) -> Policy:
    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.tapping import tapped

    trusted = config.reference.trust_remote_code
    loaded = open_model(path, adapter=adapter, trust_remote_code=trusted, say=say)
    return tapped(loaded, saes)


def find_features(
    config: RunConfig,
    *,
    positive: Path,
    negative: Path,
    limit: int = 200,
    top: int = 10,
    held_out: float = 0.2,
    examples: int = 3,
    labels: Path | None = None,
    say: Say,
) -> list[Found]:
    """Features of one SAE that tell two sets of texts apart under the base model."""
    from fpo_mlx.judge import feature_report, feature_scan

    known = read_labels(labels)[0] if labels else {}
    scan = _scan(config, (positive, negative), limit, say)
    with_, without = scan.seen
    found = feature_report.find(with_, without, top, held_out=held_out)
    shown = feature_scan.contexts(
        scan.policy, scan.encoder, 0, scan.texts[0] if examples else (),
        [one.feature for one in found], examples, scan.tokenizer.decode,
    )  # fmt: skip
    return [
        replace(
            one,
            label=known.get(one.feature, ""),
            link=link(scan.sae, one.feature),
            contexts=shown[one.feature],
        )
        for one in found
    ]


def text_activations(
    config: RunConfig, files: Sequence[Path], *, limit: int = 200, say: Say
) -> list[TextActivations]:
    """What one SAE says of the first `limit` texts of each file, under the base model."""
    return _scan(config, files, limit, say).seen


@dataclass(frozen=True)
class _Scan:
    """Sets of texts, what one SAE said of them, and what read them."""

    policy: Policy
    encoder: Encoder
    sae: SaeWeights
    tokenizer: ChatTokenizer
    texts: list[list[Passage]]
    seen: list[TextActivations]


def _scan(config: RunConfig, files: Sequence[Path], limit: int, say: Say) -> _Scan:
    from fpo_mlx.judge import feature_scan
    from fpo_mlx.model.reader import encoder_of

    model = need_model(config)
    check_sae_named(config, True)
    one_sae(config, "features find")
    path = resolve_model(model)
    tokenizer = open_tokenizer(config, path, say)
    most = longest(config.data.max_seq_length, tokenizer, say)
    texts = [read_texts(file, tokenizer, most, limit) for file in files]
    (sae,) = open_saes(config, read_config(path), need=True, say=say)
    policy, encoder = _tapped(config, path, [sae], None, say), encoder_of(sae)
    seen = [feature_scan.read_texts(policy, encoder, 0, one) for one in texts]
    return _Scan(policy, encoder, sae, tokenizer, texts, seen)


def link(sae: SaeWeights, feature: int) -> str:
    """Neuronpedia's page of a feature; "" where the SAE's files do not say its name there."""
    return f"{NEURONPEDIA}/{sae.neuronpedia}/{feature}" if sae.neuronpedia else ""


def read_texts(
    path: Path, tokenizer: ChatTokenizer, longest: int, limit: int | None = None
) -> list[Passage]:
    """Texts of a data file, or its first `limit`, cut to `longest` tokens.

    A line is {"text": …}, or an answer with its prompt: {"prompt": …, "response": …}. Of an answer
    the response positions are looked at; of a plain text all but the first (the BOS where there is
    one), on which activations are unlike those of any other, and the last, which predicts nothing.
    Raises: DataError naming the lines that cannot be used.
    """
    texts, faults = [], []
    for row in islice(data.file_rows(path), limit):  # no further: a corpus may be large
        where = row.where
        try:
            if row.fault:
                raise ValueError(row.fault)
            prompt, response = _tokens(row.record, tokenizer)
        except (DataError, ValueError, TypeError, KeyError) as error:
            faults.append(f"{where}: {error}")
            continue
        room = max(0, longest - len(prompt))
        if len(response) and room:
            texts.append(Passage(prompt, response[:room], where))
        else:
            faults.append(
                f"{where}: nothing to look at: {len(prompt)} tokens before the first position, "
                f"{len(response)} after it, --max-seq-length {longest}"
            )
    if faults or len(texts) < 2:
        raise DataError(
            f'{path}: wanted two or more lines of {{"text": …}} or {{"prompt": …, "response": …}}.',
            faults,
        )
    return texts


def _tokens(row: Any, tokenizer: ChatTokenizer) -> tuple[Any, Any]:
    import numpy as np

    if not isinstance(row, dict):
        raise TypeError(f"found {type(row).__name__}, wanted an object")
    names = ("text",) if "text" in row else ("prompt", "response")
    for name in names:
        if not isinstance(row.get(name), str) or not row[name].strip():
            raise ValueError(f"{name} is missing, empty or no text")
    if "text" in row:
        tokens = np.array(tokenizer.document_tokens(row["text"]), dtype=np.int32)
        return tokens[:2], tokens[2:]
    begin = [{"role": "user", "content": row["prompt"]}]
    prompt = tokenizer.prompt_tokens(begin)
    turn = {"role": "assistant", "content": row["response"]}
    whole = tokenizer.conversation_tokens([*begin, turn])
    if whole[: len(prompt)] != prompt:
        raise ValueError("the prompt's tokens change when the answer follows")
    lost = data.lost_of_answer(turn, tokenizer.render([*begin, turn]))
    if lost is not None:
        raise ValueError(f"the chat template leaves out {lost}")
    both = np.array(whole, dtype=np.int32)
    return both[: len(prompt)], both[len(prompt) :]
