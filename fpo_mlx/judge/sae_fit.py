"""An SAE held against the model it is meant for: its figures on answers, and what splicing costs.

Every figure is taken at response positions, the ones that training pools over. The figures of
activations are defined in `sae.fit`; here the cross-entropy (CE, nats a token of the answer) is
measured three times: of the model as it is, with the SAE's reconstruction in the place of the
site's activations, and with nothing of use there (zeros, or the mean over all tokens looked at).
  loss recovered = (CE ablated - CE spliced) / (CE ablated - CE clean)
Only response positions are replaced: SAEs are trained without a text's first position, whose
activations are a hundred times larger, and a prompt in ruins would tell nothing of the answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from fpo_mlx.core.logprobs import token_logps
from fpo_mlx.errors import ModelError, SaeError
from fpo_mlx.model.policy import Policy, Splice
from fpo_mlx.model.taps import refuse_splice, tap_point
from fpo_mlx.model.trees import blocks_of, input_width
from fpo_mlx.records import Passage, SaeWeights, Site, SiteKind
from fpo_mlx.sae import fit
from fpo_mlx.sae.encode import decode, encode

Ablation = Literal["zero", "mean"]
RESIDUAL: tuple[SiteKind, ...] = ("resid_post", "mlp_out", "attn_out")
COMPARED_TOKENS = 1500  # at other places of the model, to find the one that the SAE reads


@dataclass(frozen=True)
class LossFigures:
    """Cross-entropy in nats a token."""

    clean: float
    spliced: float
    ablated: float
    ablation: Ablation

    @property
    def recovered(self) -> float | None:
        """None where the ablation does no harm, so that there is nothing to recover."""
        harm = self.ablated - self.clean
        return (self.ablated - self.spliced) / harm if harm > 1e-3 else None


@dataclass(frozen=True)
class FitReport:
    """What was found. loss is None where `no_loss` says why it cannot be had."""

    site: str
    passages: int
    figures: fit.FitFigures
    loss: LossFigures | None
    no_loss: str
    stated_l0: float | None
    elsewhere: dict[str, float]  # FVU at other places, over the first COMPARED_TOKENS tokens or so
    warnings: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """Flat, in the order of a listing; what cannot be had is a text that says why."""
        f, loss = self.figures, self.loss
        out: dict[str, Any] = {"site": self.site, "answers": self.passages, "tokens": f.tokens}
        out |= {"l0": f.l0, "stated_l0": self.stated_l0, "dead": f.dead}
        out |= {"fvu": f.fvu, "gain": f.gain}
        if f.fvu is None:
            out["no_fvu"] = f.why_not
        out |= {f"fvu at {name}": fvu for name, fvu in self.elsewhere.items()}
        if loss is None:
            return out | {"no_loss": self.no_loss}
        out |= {"ce/clean": loss.clean, "ce/spliced": loss.spliced, "ce/ablated": loss.ablated}
        return out | {"ablation": loss.ablation, "loss_recovered": loss.recovered}


def evaluate(
    policy: Policy,
    sae: SaeWeights,
    passages: Sequence[Passage],
    *,
    ablation: Ablation = "zero",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FitReport:
    """Figures, loss and verdict of the SAE at the policy's first site.

    The policy's other sites are places to compare with. progress: told (passes over an answer
    done, to do). Raises: SaeError, ModelError.
    """
    no_fvu = fit.reconstructs(sae)
    no_loss = no_fvu or _unspliced(policy)
    total = len(passages) * (1 if no_loss else 3)
    sums: list[fit.FitSums] = []  # of the site over all tokens, then of each place over some
    clean = 0.0
    for done, passage in enumerate(passages, start=1):
        logps, places = _run(policy, passage, None)
        clean -= logps
        sums = _added(sums, sae, places, compare=not no_fvu)
        progress(done, total)
    if not sums:
        raise SaeError("there is no answer to look at. Give --data with rows that fit.")
    loss = None
    if not no_loss:
        losses = [0.0, 0.0]
        for done, passage in enumerate(passages, start=1):
            for i, splice in enumerate(_splices(sae, sums[0], ablation)):
                losses[i] -= _run(policy, passage, splice)[0]
            progress(len(passages) + 2 * done, total)
        clean, spliced, ablated = (ce / sums[0].tokens for ce in (clean, *losses))
        loss = LossFigures(clean, spliced, ablated, ablation)
    return _report(policy, sae, len(passages), sums, loss, no_fvu, no_loss)


def _report(
    policy: Policy,
    sae: SaeWeights,
    passages: int,
    sums: Sequence[fit.FitSums],
    loss: LossFigures | None,
    no_fvu: str,
    no_loss: str,
) -> FitReport:
    """The figures of these sums, the neighbouring places among them, and what looks wrong."""
    figures, stated = fit.figures(sums[0], no_fvu), fit.stated_l0(sae)
    fvus = [fit.figures(part).fvu for part in sums[1:]]
    elsewhere = {
        str(site): (fvu, fvus[0])
        for site, fvu in zip(policy.sites[1:], fvus[1:], strict=False)
        if fvu is not None and fvus[0] is not None
    }
    warnings = fit.verdict(
        figures, features=sae.n_features, stated_l0=stated,
        recovered=loss.recovered if loss else None, elsewhere=elsewhere,
    )  # fmt: skip
    there = {name: pair[0] for name, pair in elsewhere.items()}
    return FitReport(
        str(policy.sites[0]), passages, figures, loss, no_loss, stated, there, warnings
    )


def _added(
    sums: list[fit.FitSums], sae: SaeWeights, places: Sequence[np.ndarray], *, compare: bool
) -> list[fit.FitSums]:
    """The sums with one more answer's rows at all places; see `evaluate` for their order."""
    own = fit.measure(sae, places[0])
    if not sums:
        return [own, own, *(fit.measure(sae, x) for x in places[1:])] if compare else [own]
    if compare and sums[1].tokens < COMPARED_TOKENS:
        parts = [own, own, *(fit.measure(sae, x) for x in places[1:])]
        return [a + b for a, b in zip(sums, parts, strict=True)]
    return [sums[0] + own, *sums[1:]]


def _splices(sae: SaeWeights, sums: fit.FitSums, ablation: Ablation) -> tuple[Splice, Splice]:
    """What takes the site's place: the reconstruction, and nothing of use."""
    mean = (sums.x / sums.tokens).astype(np.float32)
    return reconstruction(sae), constant(mean if ablation == "mean" else np.zeros_like(mean))


def reconstruction(sae: SaeWeights) -> Splice:
    """Rows [n, D] to what the SAE makes of them: in numpy, the reference of all encoders."""

    def splice(rows: mx.array) -> mx.array:
        x = np.array(rows.astype(mx.float32))
        return mx.array(decode(sae, encode(sae, x), x))

    return splice


def constant(vector: np.ndarray) -> Splice:
    """Every row [D] becomes the vector."""
    return lambda rows: mx.broadcast_to(mx.array(vector), rows.shape)


def _run(policy: Policy, passage: Passage, splice: Splice | None) -> tuple[float, list[np.ndarray]]:
    """(summed log-prob of the answer in nats, every site's rows [|y|, D_in] as recorded)."""
    rows = policy.answer_rows(passage.prompt, passage.response, splice)
    targets = mx.array(passage.response)
    logps = token_logps(rows.hidden, targets, policy.head, policy.vocab_size, grad=False)
    tapped = [site.astype(mx.float32) for site in rows.tapped]
    mx.eval(logps, tapped)
    return float(np.array(logps, dtype=np.float64).sum()), [np.array(site) for site in tapped]


def _unspliced(policy: Policy) -> str:
    """Why nothing can be put in the site's place, "" if it can."""
    try:
        refuse_splice(policy.sites[0])
    except ModelError as error:
        return str(error)
    return ""


def places_to_compare(model: nn.Module, site: Site) -> tuple[Site, ...]:
    """The blocks before and behind, and the other places of the site's block; of its width."""
    blocks = blocks_of(model)
    found = [replace(site, layer=site.layer + step) for step in (-1, 1)]
    if site.kind in RESIDUAL:
        found += [replace(site, kind=kind) for kind in RESIDUAL if kind != site.kind]
    width = _width(blocks, site)
    return tuple(place for place in found if _width(blocks, place) == width)


def _width(blocks: Sequence[nn.Module], site: Site) -> int | None:
    """Of attn_z what o_proj reads; of others 0, since all are as wide as the stream; None: no site.

    Heads may be larger in some blocks (Gemma 4), and of another kind (Qwen3-Next).
    """
    if not 0 <= site.layer < len(blocks):
        return None
    try:
        module, _ = tap_point(blocks[site.layer], site)
    except ModelError:
        return None
    return input_width(module) if site.kind == "attn_z" else 0
