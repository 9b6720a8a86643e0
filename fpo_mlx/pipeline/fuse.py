"""Fuse adapters into a model folder, and compare before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fpo_mlx.config import PARTS, RunConfig, default_of, is_other, options
from fpo_mlx.errors import ConfigError, FpoError
from fpo_mlx.pipeline.evaluate import check_scales, open_scorer, take_part
from fpo_mlx.pipeline.job import Job, Say, has_split, open_job, read_pairs
from fpo_mlx.pipeline.measure import as_trained
from fpo_mlx.pipeline.origins import warn_of_origin, warn_of_training_pairs
from fpo_mlx.pipeline.store import CachedScores, default_cache, fill_cache
from fpo_mlx.records import DEFAULT_FORM, KEPT_BITS, FusedForm, TokenPair
from fpo_mlx.storage.adapter_files import own_template
from fpo_mlx.storage.hub import published, resolve_model
from fpo_mlx.storage.outputs import claim_folder, model_made_from

if TYPE_CHECKING:
    from fpo_mlx.model.fuse import FuseReport
    from fpo_mlx.train.metrics import ScoredPairs

VERIFIED = ("test", "valid", "train")  # splits of --verify, the first that is there
TOLERABLE = 0.2  # error of the rounding over the size of the change


@dataclass(frozen=True)
class Bound:
    """How far from the base the part of an adapter that is fused may be, on held-out pairs.

    value: nats per rejected answer, or a drift r of the SAE's features (docs/objective.md).
    """

    kind: Literal["kl", "drift"]
    value: float

    @property
    def flag(self) -> str:
        return f"--target-{self.kind}"

    @property
    def figure(self) -> str:
        return f"{self.kind}/rejected"


@dataclass(frozen=True)
class Within:
    """The part that was found for a bound, and its KL or drift, before weights were rounded."""

    bound: Bound
    part: float
    found: float

    def said(self) -> str:
        what = f"drift {self.found:.3g}"
        if self.bound.kind == "kl":
            what = f"KL {self.found:.3g} nats per rejected answer"
        return f"--adapter-scale {self.part:.4g}: {what}, within {self.bound.value:g}"


@dataclass(frozen=True)
class FuseResult:
    """scale: part of the adapter that was taken; within: how it was found, if for a bound."""

    report: Any
    scale: float = 1.0
    within: Within | None = None
    before: Mapping[str, float] | None = None
    after: Mapping[str, float] | None = None


def fuse(
    config: RunConfig,
    form: FusedForm = DEFAULT_FORM,
    *,
    adapter_path: str,
    save_path: Path,
    bound: Bound | None = None,
    verify: str | None = None,
    overwrite: bool = False,
    say: Say,
) -> FuseResult:
    """Fuse adapters into a model folder; `verify` names data to compare before and after on.

    bound: in place of `form.scale`, the largest part of the adapter that is within it on those
    pairs. Raises: ConfigError, also where a bound lacks what it is measured with.
    """
    from fpo_mlx.model import adapters
    from fpo_mlx.model import fuse as fusing

    if not config.reference.model:
        raise ConfigError("--model is missing. Wanted the model that the adapter was trained on.")

    def claim(base: Path | None = None) -> Path:
        inputs = [*config.reads(), adapter_path, verify, base]
        made = model_made_from(base, *filter(None, [form.gguf_path]))
        return claim_folder(save_path, "--save-path", made, inputs=inputs, overwrite=overwrite)

    template = config.data.chat_template
    if bound is not None:
        _check_bound(config, bound, verify, form.scale)
    if bound is not None or form.scale != 1.0:
        check_scales(config, [adapter_path], [form.scale])
        adapters.read_spec(Path(adapter_path))  # before the long part
    save_path = claim()  # before a download
    base = resolve_model(config.reference.model)
    claim(base)
    config, held, within = _as_trained(config, Path(adapter_path)), None, None
    _warn(config, adapter_path, base, say, asked=bool(verify))
    saes = bound is not None and bound.kind == "drift"
    # read first: nothing is fused where that fails
    read = _held_out(config, verify, adapter_path, say, saes=saes) if verify else None
    if bound is not None and read is not None:
        held = _scored(*read, say)
        within = _scale_within(held, adapter_path, bound, say)
        held, read = _without_saes(held), None  # it fuses next, and needs their room
        form = replace(form, scale=within.part)
    report = fusing.fuse(
        str(base), Path(adapter_path), save_path, form,
        chat_template=Path(template) if template else None,
        named=published(config.reference.model),
        trust_remote_code=config.reference.trust_remote_code, check=partial(claim, base),
    )  # fmt: skip
    for line in said_of(report):
        say(line)
    if read is not None:
        held = _scored(*read, say)
    if held is None:
        return FuseResult(report, form.scale)
    before, after = _compare_fused(held, adapter_path, form.scale, save_path, say)
    return FuseResult(report, form.scale, within, before, after)


def _as_trained(config: RunConfig, adapter: Path) -> RunConfig:
    """With the chat template that the fused folder gets: pairs are measured as it reads them."""
    place = own_template(adapter.expanduser())
    if place is None or config.data.chat_template:
        return config
    return replace(config, data=replace(config.data, chat_template=str(place)))


def _warn(config: RunConfig, adapter: str, base: Path, say: Say, *, asked: bool) -> None:
    """Of an adapter of another model; where pairs are read, of other variables of its template."""
    d = config.data
    arguments = d.chat_template_args if asked else None
    warn_of_origin([adapter], config.reference.model, base, d.chat_template, say, arguments)


def said_of(report: FuseReport) -> list[str]:
    """What a user should know of a fused folder: its template, its bits, what rounding took."""
    lines = []
    if report.template:
        lines.append(f"the folder has {report.template}, not the base's")
    if (raised := report.raised) is not None:
        are = "layer with adapters is" if raised.layers == 1 else "layers with adapters are"
        lines.append(
            f"{raised.layers} {are} kept at {raised.bits} bits, where the base has "
            f"{_listed(raised.base_bits)}: {raised.added / 1e6:.1f} MB more; --keep-bits base "
            "leaves them the base's bits, and rounds most of a small change away"
        )
    if (kept := report.kept) is not None:
        more = f"--keep-bits {KEPT_BITS} keeps the adapted layers at {KEPT_BITS} bits, "
        more = more if report.below else ""
        whole = "" if kept.bits == (16,) else "--dequantize "
        way = "" if kept.error < TOLERABLE else f"; {more}{whole}--dtype float32 keeps all of it"
        lines.append(
            f"rounding to {_listed(kept.bits)} bits left {kept.share:.0%} of the adapters' change, "
            f"with an error {kept.error:.2f} times its size{way}"
        )
    if report.unreached:
        lines.append(
            f"--keep-bits does not reach {report.unreached} adapted embeddings, blocks of experts "
            "or layers whose rows make no groups of 32: they have the base's bits"
        )
    return lines


def _listed(bits: Sequence[int]) -> str:
    return " and ".join(map(str, bits))


def _check_bound(config: RunConfig, bound: Bound, verify: str | None, scale: float) -> None:
    """Raises: ConfigError where it cannot be measured, before anything is read."""
    if not verify:
        raise ConfigError(f"{bound.flag}: found no pairs to measure on. Add --verify DATA.")
    if not (bound.value > 0 and math.isfinite(bound.value)):
        wanted = "nats" if bound.kind == "kl" else "a drift"
        raise ConfigError(f"{bound.flag} {bound.value:g}: wanted {wanted}, finite and above 0.")
    if scale != 1.0:
        raise ConfigError(f"{bound.flag} finds the part: leave --adapter-scale {scale:g} out.")
    activations = config.objective.constraint == "activations"  # --layer says of which block
    if bound.kind == "drift" and not (config.reference.sae or activations):
        raise ConfigError(
            f"{bound.flag} {bound.value:g}: the features of an SAE are what drifts. Add the --sae "
            "of the training."
        )


Held = tuple[Job, "ScoredPairs", bool]  # pairs; the last: the base's scores in half precision?


def _scale_within(held: Held, adapter_path: str, bound: Bound, say: Say) -> Within:
    """By bisection over the parts, each judged on the held-out pairs.

    Raises: FpoError where the smallest of them is not within.
    """
    from fpo_mlx.judge import evaluate as evaluation
    from fpo_mlx.judge.frontier import largest_scale
    from fpo_mlx.train.drift import named_as

    job, scored, half = held
    scorer = open_scorer(job, adapter_path, half=half, measure_kl=bound.kind == "kl", say=say)

    def measured(part: float) -> float:
        take_part(scorer, adapter_path, part)
        summary = evaluation.evaluate(scorer, scored).summary
        return named_as(bound.figure, float(summary[bound.figure]))

    part, found = largest_scale(measured, bound.value)
    if part == 0:
        raise FpoError(
            f"{bound.flag} {bound.value:g}: the smallest part of {adapter_path} that was tried is "
            "not within it. Wanted a larger bound, or an adapter whose change can be measured; "
            "`fpo-mlx evaluate --adapter-scales 0.01,0.1,1` shows what its parts do."
        )
    within = Within(bound, part, found)
    say(within.said())
    return within


def _held_out(
    config: RunConfig, verify: str, adapter: str, say: Say, *, saes: bool = False
) -> tuple[Job, list[TokenPair]]:
    """The pairs of `verify`, and the job that measures on them.

    saes: by features, for a drift. Said is of which split they are, and whether the adapter was
    trained on them.
    """
    config = as_trained(config, [adapter], say, way="`objective` in a file of -c")
    constraint = "none"
    if saes:
        own = config.objective.constraint
        constraint = own if own == "activations" else "features"
    objective = config.objective.held_by(constraint)
    there = replace(config.data, data=verify)
    if is_other(config.data.data, verify):
        # a flag is of the pairs of this command, unless it goes with data that a flag names
        given = frozenset() if "data" in config.flagged else config.flagged
        left = {name: default_of(options()[name]) for name in PARTS if name not in given}
        there = replace(there, **left)
    config = replace(config, data=there, objective=objective)
    job = open_job(config, say=say)
    split = next((s for s in VERIFIED if has_split(job, s)), VERIFIED[0])
    pairs = read_pairs(job, split, say)
    say(f"--verify {verify}: on its {len(pairs)} pairs of the {split} split")
    warn_of_training_pairs([adapter], pairs, say, job.config, split, way="")  # it chooses the split
    return job, pairs


def _scored(job: Job, pairs: list[TokenPair], say: Say) -> Held:
    """With the scores of the base."""
    from fpo_mlx.train.metrics import ScoredPairs

    store = fill_cache(job, pairs, folder=default_cache(job.identity), say=say)
    return job, ScoredPairs(pairs, CachedScores(store, pairs)), store.half


def _without_saes(held: Held) -> Held:
    """The same for log-probs alone."""
    job, scored, half = held
    plain = replace(job.config, objective=job.config.objective.held_by("none"))
    return replace(job, config=plain, saes=(), feature_weights=()), scored, half


def _compare_fused(
    held: Held, adapter_path: str, scale: float, fused: Path, say: Say
) -> tuple[dict[str, float], dict[str, float]]:
    """Accuracy and margin of base + adapter and of the fused folder, against one reference."""
    from fpo_mlx.judge import evaluate as evaluation

    job, scored, half = held
    results = []
    for path, adapter in ((job.model_path, adapter_path), (fused, None)):
        scorer = open_scorer(
            job, adapter, scale=scale, model=path, half=half, measure_kl=False, say=say
        )
        summary = evaluation.evaluate(scorer, scored).summary
        names = ("rewards/accuracies", "rewards/margins", "logps_per_token/chosen_change")
        results.append({name: float(summary[name]) for name in names})
        del scorer
    return results[0], results[1]
