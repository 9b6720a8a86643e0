"""From trained parameters to an SAE that others read: folding, threshold, figures, card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from fpo_mlx.core.dictionary import Rule, pre_activations
from fpo_mlx.core.selection import largest
from fpo_mlx.records import SaeWeights, Site
from fpo_mlx.sae import fit
from fpo_mlx.sae.convert import write_saelens
from fpo_mlx.saetrain import state
from fpo_mlx.saetrain.state import State
from fpo_mlx.storage import files
from fpo_mlx.storage.runfolder import METRICS, RUN

CHUNK = 1024
CONFIG, WEIGHTS, CARD = state.CONFIG, "sae_weights.safetensors", "README.md"
PUBLISHED = (CONFIG, WEIGHTS, CARD)  # no checkpoint, no logs
EXPORT = f"{files.TEMPORARY}0-sae"  # where the SAE is put together
LOCK = "writer.lock"  # held while a run writes


@dataclass(frozen=True)
class Figures:
    """On rows that were not trained on."""

    rows: int
    fvu: float  # squared error over squared distance from the rows' mean
    l0: float
    dead: float  # share of features that no row uses


def finished(
    run: State, rule: Rule, sample: np.ndarray | None, *, site: Site, model_name: str
) -> SaeWeights:
    """The SAE on raw activations: centre and scale are folded into biases and thresholds.

    A BatchTopK SAE becomes a JumpReLU one with a single threshold (2412.06410, section 3), the
    one that gives k active features a token on `sample` [n, D], or the running mean of the
    smallest active value without a sample.
    """
    p = {name: np.array(value) for name, value in run.params.items()}
    b_dec = p["b_dec"] / run.scale + run.centre
    lengths = np.float32(1) if run.lengths is None else run.lengths  # of the decoder rows, [F]
    threshold = None
    if rule.architecture == "jumprelu":
        threshold = np.exp(p["log_threshold"]) / run.scale / lengths
    elif rule.architecture == "batchtopk":
        bound = run.threshold
        if sample is not None and len(sample):
            bound = batch_threshold(run, rule, sample)
        threshold = np.full(len(p["b_enc"]), bound / run.scale)
    return SaeWeights(
        activation="topk" if rule.architecture == "topk" else "jumprelu",
        w_enc=np.ascontiguousarray(p["w_enc"].T / lengths),
        b_enc=(p["b_enc"] / run.scale / lengths).astype(np.float32),
        b_in=b_dec.astype(np.float32),
        threshold=None if threshold is None else threshold.astype(np.float32),
        k=rule.k if rule.architecture == "topk" else None,
        w_dec=p["w_dec"] if run.lengths is None else p["w_dec"] * run.lengths[:, None],
        b_dec=b_dec.astype(np.float32),
        site=site,
        model_name=model_name,
        format="fpo-mlx",
    )


def batch_threshold(run: State, rule: Rule, sample: np.ndarray) -> float:
    """Above which k of a row's pre-activations lie, on average; in the scaled input's units."""
    bounds = []
    for at in range(0, len(sample), CHUNK):
        x = (mx.array(sample[at : at + CHUNK]) - mx.array(run.centre)) * run.scale
        flat = pre_activations(run.params, x).reshape(1, -1)
        index = largest(flat, min(rule.k * x.shape[0], flat.shape[1] - 1))
        bounds.append(float(mx.take_along_axis(flat, index, axis=-1).min()) * x.shape[0])
    return max(sum(bounds) / len(sample), 0.0)


def measure(sae: SaeWeights, rows: np.ndarray) -> Figures | None:
    """FVU, L0 and dead share of a finished SAE on raw rows [n, D], as `sae.fit` defines them.

    None where there is no variance to explain: fewer than two rows, or all of them alike.
    """
    if len(rows) < 2:
        return None
    found = fit.figures(fit.measure(sae, rows))
    return None if found.fvu is None else Figures(found.tokens, found.fvu, found.l0, found.dead)


def write(folder: Path, sae: SaeWeights, card: str) -> None:
    """A SAELens folder with its card, beside the run's own files. cfg.json comes last.

    Where cfg.json is, the SAE is whole.
    """
    made = folder / EXPORT
    write_saelens(sae, made)
    files.write_text(made / CARD, card)
    for name in (WEIGHTS, CARD, CONFIG):
        os.replace(made / name, folder / name)
    shutil.rmtree(made, ignore_errors=True)
    files.sync_folder(folder)


def is_there(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written. Hold the folder's lock."""
    for name in (CONFIG, WEIGHTS, CARD, EXPORT, RUN, state.STATE):
        files.sweep(folder, name)
    shutil.rmtree(folder / EXPORT, ignore_errors=True)


def clear(folder: Path) -> None:
    """Remove what an older run left, its SAE included."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CONFIG, WEIGHTS, CARD, RUN, state.STATE, METRICS):
        (folder / name).unlink(missing_ok=True)


def card(
    sae: SaeWeights,
    figures: Figures | None,
    facts: Mapping[str, Any],
    recovered: float | None = None,
) -> str:
    """The README of a published SAE, with the hub's front matter.

    recovered: share of the loss that zeros in the site's place cost and the SAE does not.
    """
    site = sae.site
    lines = [
        "---",
        "library_name: saelens",
        f"base_model: {facts['model']}" if "/" in str(facts["model"]) else "base_model: unknown",
        "tags: [sparse-autoencoder, sae, fpo-mlx]",
        "---",
        "",
        f"# Sparse autoencoder for {sae.model_name}",
        "",
        f"Reads the {site}: {sae.n_features} features of {sae.d_in} dimensions. Trained with "
        "`fpo-mlx sae train`; loads in SAELens and in fpo-mlx.",
        "",
        "| | |",
        "|---|---|",
    ]
    rows = dict(facts)
    if figures is not None:
        rows |= {
            "held-out rows": figures.rows,
            "fraction of variance unexplained": f"{figures.fvu:.4f}",
            "active features a token (L0)": f"{figures.l0:.2f}",
            "features that no held-out row uses": f"{figures.dead:.4f}",
        }
    if recovered is not None:
        rows["loss recovered, against zeros at the site"] = f"{recovered:.4f}"
    lines += [f"| {name} | {value} |" for name, value in rows.items()]
    return "\n".join(lines) + "\n"
