"""The slow, independent truth: one response at a time, float64, torch and transformers.

Nothing here is batched, padded, cached or sparse, and nothing comes from the product but the
records. Formulas stand as the design writes them. Usage, with a folder from `tiny_models`:

    site = Site(1, "resid_post")
    model = load_oracle(folder)
    adapters = attach_lora(model, {"model.layers.1.self_attn.q_proj.lora_a": a, ....lora_b": b},
                           scale=20.0)          # mlx-lm's own names and shapes; float64 Parameters
    setup = preset("fpo", k=8)                  # also dpo simpo simpo-kl tdpo1 tdpo2; see Setup
    pairs = [TokenPair(prompt, chosen, rejected, index=0), ...]
    results, grads = loss_and_grads(model, adapters, pairs, setup, taps=[sae])  # sae.site is set
    results[0]["u"], results[0]["features/rejected"], grads["model.layers.1. ... .lora_a"]

A tap is an `SaeWeights` (features of its site) or a bare `Site` (the activation itself, for
constraint "activations"). The reference is the same model with its adapters off; to give another
one (adapters as reference), pass `reference=lambda prompt, response: Scored(...)`.
Mixture-of-experts projections (mlx-lm's LoRASwitchLinear) cannot be adapted here, DoRA neither.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from oracle_sites import F64, hidden_and_logits, torch_path

from fpo_mlx.records import NO_FACTS, PairFacts, SaeWeights, Site, TokenPair

Tap = SaeWeights | Site
Tokens = Sequence[int] | np.ndarray


def load_oracle(folder: Path | str) -> Any:
    """The transformers model of a folder in float64, frozen, with the plainest attention."""
    from tiny_make import for_transformers
    from transformers import AutoModelForCausalLM

    folder = for_transformers(Path(folder))
    plain = {"attn_implementation": "eager", "experts_implementation": "eager"}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=F64, local_files_only=True, **plain)
    return model.requires_grad_(False).eval()


# LoRA ---------------------------------------------------------------------------------------------


class LoraLinear(torch.nn.Module):
    """y = base(x) + scale * (x @ lora_a) @ lora_b; lora_a [in, rank], lora_b [rank, out]."""

    def __init__(self, base: torch.nn.Module, a: np.ndarray, b: np.ndarray, scale: float):
        super().__init__()
        self.base, self.scale, self.enabled = base, scale, True
        self.lora_a = torch.nn.Parameter(torch.tensor(np.asarray(a), dtype=F64))
        self.lora_b = torch.nn.Parameter(torch.tensor(np.asarray(b), dtype=F64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.base(x)
        return y + self.scale * (x @ self.lora_a) @ self.lora_b if self.enabled else y


def attach_lora(
    model: Any, arrays: Mapping[str, np.ndarray], scale: float = 20.0
) -> dict[str, torch.nn.Parameter]:
    """Adapt every module that `arrays` names; returns the parameters under the same names."""
    parameters: dict[str, torch.nn.Parameter] = {}
    for path in sorted({name.rpartition(".")[0] for name in arrays}):
        parent, _, leaf = torch_path(model, path).rpartition(".")
        owner = model.get_submodule(parent)
        base = getattr(owner, leaf)
        a, b = arrays[f"{path}.lora_a"], arrays[f"{path}.lora_b"]
        adapted = LoraLinear(base, a, b, scale)
        setattr(owner, leaf, adapted)
        parameters |= {f"{path}.lora_a": adapted.lora_a, f"{path}.lora_b": adapted.lora_b}
    return parameters


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    adapted = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for module in adapted:
        module.enabled = False
    try:
        yield
    finally:
        for module in adapted:
            module.enabled = True


# SAE ----------------------------------------------------------------------------------------------


def encode(sae: SaeWeights, x: torch.Tensor) -> torch.Tensor:
    """Feature activations of every token, differentiable. x: [L, D_in] -> [L, F]."""
    blank = {"b_in": 0, "threshold": 0, "gate_scale": 1, "gate_bias": 0, "act_scale": 1}
    weights = {"w_enc": sae.w_enc, "b_enc": sae.b_enc}
    weights |= {n: v if (a := getattr(sae, n)) is None else a for n, v in blank.items()}
    tensors = {name: torch.tensor(array, dtype=F64) for name, array in weights.items()}
    return torch.stack([_encode_one(sae, SimpleNamespace(**tensors), row) for row in x])


def _encode_one(sae: SaeWeights, w: SimpleNamespace, x: torch.Tensor) -> torch.Tensor:
    if sae.normalize == "layer_norm":
        x = (x - x.mean()) / (x.std(correction=1) + 1e-5)
    elif sae.normalize == "constant_norm":
        x = x * math.sqrt(len(x)) / torch.sqrt((x * x).sum())
    raw = (x - w.b_in) @ w.w_enc  # [F]
    pre = raw + w.b_enc
    acts = torch.clamp(pre, min=0.0)
    if sae.activation == "identity":
        acts = pre
    elif sae.activation == "jumprelu":
        acts = acts * (pre > w.threshold)
    elif sae.activation == "gated":
        magnitude = raw * w.gate_scale + w.b_enc
        acts = torch.clamp(magnitude, min=0.0) * (raw + w.gate_bias > 0)
    elif sae.activation == "topk":
        acts = acts * _mark(len(pre), torch.topk(pre, int(sae.k or 0)).indices)
    elif sae.activation == "abstopk":
        acts = pre * _mark(len(pre), torch.topk(pre.abs(), int(sae.k or 0)).indices)
    elif sae.activation == "groupmax":
        size = len(pre) // int(sae.k or 1)
        best = [i + int(acts[i : i + size].argmax()) for i in range(0, len(pre), size)]
        acts = acts * _mark(len(pre), torch.tensor(best))
    return acts * w.act_scale


def _mark(size: int, indices: torch.Tensor) -> torch.Tensor:
    mask = torch.zeros(size, dtype=F64)
    mask[indices] = 1.0
    return mask


# One response -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Scored:
    """One response under one model. n = number of its tokens."""

    token_logps: torch.Tensor  # [n]
    log_probs: torch.Tensor  # [n, V], the whole distribution at every response position
    pooled: tuple[torch.Tensor, ...]  # per tap [F] or [D]: mean over response positions

    @property
    def tokens(self) -> int:
        return len(self.token_logps)

    @property
    def logps(self) -> torch.Tensor:
        return self.token_logps.sum()

    def detached(self) -> Scored:
        pooled = tuple(value.detach() for value in self.pooled)
        return Scored(self.token_logps.detach(), self.log_probs.detach(), pooled)


Sides = tuple[tuple[Scored, Scored], tuple[Scored, Scored]]  # policy's and reference's


def score_response(
    model: Any, prompt: Tokens, response: Tokens, taps: Sequence[Tap] = ()
) -> Scored:
    """Score one response. Its positions are those whose next token is one of its tokens."""
    tokens = [*map(int, prompt), *map(int, response)]
    sites = [_site_of(tap) for tap in taps]
    hidden, logits = hidden_and_logits(model, tokens, *sites)
    first, last = len(prompt) - 1, len(prompt) + len(response) - 2
    log_probs = torch.log_softmax(logits[first : last + 1], dim=-1)  # [n, V]
    token_logps = torch.stack([row[y] for row, y in zip(log_probs, response, strict=True)])
    pooled = []
    for tap, h in zip(taps, hidden, strict=True):
        h = h[first : last + 1]
        pooled.append((encode(tap, h) if isinstance(tap, SaeWeights) else h).mean(dim=0))
    return Scored(token_logps, log_probs, tuple(pooled))


def _site_of(tap: Tap) -> Site:
    site = tap.site if isinstance(tap, SaeWeights) else tap
    if site is None:
        raise ValueError("give the SAE a site: dataclasses.replace(sae, site=Site(layer, kind))")
    return site


# The objective ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setup:
    """One objective. The defaults are the paper's FPO."""

    normalize: bool = True  # divide log-probs by |y|
    margin: str = "reference"  # or "constant"
    constraint: str = "features"  # none, features, activations, kl
    stop_gradient: bool = True  # on the chosen response's part of delta
    beta: float = 0.1
    alpha: float = 0.5
    gamma: float = 0.0  # the constant margin
    k: int = 50
    feature_scale: str = "raw"  # or "reference"
    log_odds: bool = False  # of exp(lp / |y|), in place of log-probs
    link: str = "sigmoid"  # ipo hinge ada sail apo-zero apo-down each
    tau: tuple[float, float] = (0.1, 4.0)  # of ada
    rho: float = 0.1  # of ada and sail
    share: float = 0.4  # of sail: how often its coin falls 1
    preference: float = 1.0  # weight of the preference term
    nll: float = 0.0  # weight of -lp_w / |w|
    smoothing: float = 0.0
    robust: bool = False
    score_margin: float = 0.0
    wpo: bool = False
    named: tuple[int, ...] = ()  # features that are always in I
    weights: Mapping[int, float] | None = None  # w_i where it is not 1


def preset(name: str, **changes: Any) -> Setup:
    """The named methods of the paper's Table 1. tdpo1 is beta [KL - KL], so its alpha is 1."""
    presets = {
        "fpo": Setup(),
        "dpo": Setup(normalize=False, constraint="none"),
        "simpo": Setup(margin="constant", constraint="none", beta=2.0, gamma=1.0),
        "simpo-kl": Setup(margin="constant", constraint="kl", beta=2.0, gamma=1.0),
        "tdpo1": Setup(normalize=False, constraint="kl", stop_gradient=False, alpha=1.0),
        "tdpo2": Setup(normalize=False, constraint="kl"),
        "ipo": Setup(constraint="none", link="ipo"),
        "orpo": Setup(
            constraint="none", margin="constant", log_odds=True, beta=1.0, preference=0.1, nll=1.0
        ),
        "asft": Setup(
            constraint="none", margin="constant", log_odds=True, beta=1.0, preference=0.1, nll=1.0,
            link="each",
        ),
        "cpo": Setup(normalize=False, constraint="none", margin="constant", nll=1.0),
        "sft": Setup(constraint="none", margin="constant", preference=0.0, nll=1.0),
    }  # fmt: skip
    for name_, link in (
        ("hinge", "hinge"), ("apo-zero", "apo-zero"), ("apo-down", "apo-down"),
        ("ada-dpo", "ada"), ("sail-ddp", "sail"),
    ):  # fmt: skip
        rho = 0.2 if link == "sail" else 0.1
        presets[name_] = Setup(normalize=False, constraint="none", link=link, rho=rho)
    return replace(presets[name], **changes)


def top_indices(values: torch.Tensor, k: int, by_magnitude: bool) -> set[int]:
    """The k largest of [F], without those that are exactly zero: a silent feature is not 'top'."""
    size = (values.abs() if by_magnitude else values).detach().tolist()
    order = sorted(range(len(size)), key=lambda i: -size[i])
    return {i for i in order[:k] if size[i] != 0.0}


def distance(
    policy: torch.Tensor,
    ref: torch.Tensor,
    setup: Setup,
    by_magnitude: bool = False,
    named_only: bool = False,
) -> torch.Tensor:
    """D of Eq. 10. policy, ref: pooled [F]. The choice of I carries no gradient.

    named_only: the part of it that is due to the features with a weight of the user's.
    """
    policy_top = top_indices(policy, setup.k, by_magnitude)
    ref_top = top_indices(ref, setup.k, by_magnitude)
    weights = setup.weights or {}
    total = torch.zeros((), dtype=F64)
    union = policy_top | ref_top | set(setup.named)
    for i in sorted(union & set(setup.named) if named_only else union):
        total = total + weights.get(i, 1.0) * (policy[i] - ref[i]) ** 2
    total = total / setup.k
    if setup.feature_scale == "reference":
        total = total / (sum(ref[i] ** 2 for i in sorted(ref_top)) / setup.k)
    return total


def sequential_kl(ref_log_probs: torch.Tensor, policy_log_probs: torch.Tensor) -> torch.Tensor:
    """Sum over positions of KL(reference || policy). Both [n, V]."""
    total = torch.zeros((), dtype=F64)
    for ref, policy in zip(ref_log_probs, policy_log_probs, strict=True):
        total = total + (ref.exp() * (ref - policy)).sum()
    return total


def odds(scored: Scored) -> torch.Tensor:
    """log p / (1 - p), p the geometric mean of the token probabilities."""
    p = torch.exp(scored.logps / scored.tokens)
    return torch.log(p / (1 - p))


def preference_term(
    setup: Setup, r_w: torch.Tensor, r_l: torch.Tensor, facts: PairFacts
) -> torch.Tensor:
    """The link with the label as it is and turned round, each as far as it is believed."""
    e, a = setup.smoothing, facts.agreement
    right = a * (1 - e) + (1 - a) * e
    wrong = a * e + (1 - a) * (1 - e)
    if setup.robust:
        right, wrong = (a - e) / (1 - 2 * e), (1 - a - e) / (1 - 2 * e)
    return right * link_loss(setup, r_w, r_l) + wrong * link_loss(setup, r_l, r_w)


def link_loss(setup: Setup, r_w: torch.Tensor, r_l: torch.Tensor) -> torch.Tensor:
    log_sigmoid, u = torch.nn.functional.logsigmoid, r_w - r_l
    if setup.link == "ipo":
        return (u / setup.beta - 1 / (2 * setup.beta)) ** 2
    if setup.link == "hinge":
        return torch.clamp(1 - u, min=0)
    if setup.link == "ada":
        tau = ada_tau(float(u.detach()), setup)
        return -tau * log_sigmoid(u / tau) + (setup.rho - math.log(2)) * tau
    if setup.link == "sail":  # the mean over the coin: with it, and without
        added = 0.5 * setup.rho * log_sigmoid(u) ** 2
        return (1 - setup.share) * -log_sigmoid(u) + setup.share * (-log_sigmoid(u) - added)
    if setup.link == "apo-zero":
        return 1 - torch.sigmoid(r_w) + torch.sigmoid(r_l)
    if setup.link == "apo-down":
        return torch.sigmoid(r_w) + 1 - torch.sigmoid(u)
    if setup.link == "each":
        return -torch.log(torch.sigmoid(r_w)) - torch.log(1 - torch.sigmoid(r_l))
    return -log_sigmoid(u)


def ada_tau(u: float, setup: Setup, steps: int = 200) -> float:
    """The tau of Adaptive Preference Scaling (arXiv 2406.02764), by golden-section search.

    The objective is convex in tau, so the least value within the bounds is found by comparing.
    """

    def value(tau: float) -> float:
        x = u / tau
        log_sigmoid = -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))
        return -tau * log_sigmoid + (setup.rho - math.log(2)) * tau

    low, high = setup.tau
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(steps):
        first, second = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, second) if value(first) < value(second) else (first, high)
    return (low + high) / 2


def wpo_weight(chosen: Scored, rejected: Scored) -> float:
    """exp of the mean of log pi(y_t) - log sum_v pi(v)^2, both responses, at most 1."""
    total = 0.0
    for side in (chosen, rejected):
        collisions = torch.log((side.log_probs.exp() ** 2).sum(-1))
        total += float((side.token_logps - collisions).mean().detach())
    return min(1.0, math.exp(total))


def objective(
    setup: Setup,
    policy: tuple[Scored, Scored],
    ref: tuple[Scored, Scored],
    by_magnitude: Sequence[bool] = (False,),
    facts: PairFacts = NO_FACTS,
) -> dict[str, torch.Tensor]:
    """Loss and parts of one pair. policy and ref: (chosen, rejected); by_magnitude: per tap."""
    (pw, pl), (rw, rl) = policy, ref
    size_w, size_l = (pw.tokens, pl.tokens) if setup.normalize else (1, 1)
    parts: dict[str, torch.Tensor] = {"logps/chosen": pw.logps, "logps/rejected": pl.logps}
    parts |= {"ref_logps/chosen": rw.logps, "ref_logps/rejected": rl.logps}
    parts["kl/chosen"] = sequential_kl(rw.log_probs, pw.log_probs)
    parts["kl/rejected"] = sequential_kl(rl.log_probs, pl.log_probs)
    for side, of_policy, of_ref in (("chosen", pw, rw), ("rejected", pl, rl)):
        if setup.constraint in ("features", "activations"):
            taps = zip(of_policy.pooled, of_ref.pooled, by_magnitude, strict=True)
            each = [distance(p, r, setup, magnitude) for p, r, magnitude in taps]
            parts[f"features/{side}"] = torch.stack(each).mean()  # D is averaged over SAEs
            taps = zip(of_policy.pooled, of_ref.pooled, by_magnitude, strict=True)
            each = [distance(p, r, setup, m, named_only=True) for p, r, m in taps]
            parts[f"named/{side}"] = torch.stack(each).mean()

    z_w, z_l, z_rw, z_rl = (
        odds(s) if setup.log_odds else s.logps / size
        for s, size in ((pw, size_w), (pl, size_l), (rw, size_w), (rl, size_l))
    )
    difference = setup.beta * (z_w - z_l)
    gamma = torch.tensor(setup.gamma, dtype=F64)
    if setup.margin == "reference":
        gamma = setup.beta * (z_rw - z_rl)
    gamma = gamma + setup.score_margin * facts.score_gap
    delta = torch.zeros((), dtype=F64)
    if setup.constraint != "none":
        source = "kl" if setup.constraint == "kl" else "features"
        d_w, d_l = parts[f"{source}/chosen"], parts[f"{source}/rejected"]
        held = parts.get("named/chosen", torch.zeros((), dtype=F64))
        pull = held - held.detach()  # nothing by value
        d_w = d_w.detach() if setup.stop_gradient else d_w - pull
        delta = setup.alpha * setup.beta * (d_l - d_w + pull)
    u = difference - gamma - delta
    ref_w = z_rw if setup.margin == "reference" else torch.zeros((), dtype=F64)
    r_w = setup.beta * (z_w - ref_w)  # what is not u's own counts on the rejected side,
    if setup.constraint != "none":  # but for the chosen response's C
        r_w = r_w + setup.alpha * setup.beta * (d_w - pull)
    loss = setup.preference * preference_term(setup, r_w, r_w - u, facts)
    if setup.wpo:
        loss = loss * wpo_weight(pw, pl)
    loss = facts.weight * (loss - setup.nll * pw.logps / pw.tokens)
    parts["rewards/chosen"] = setup.beta * (pw.logps - rw.logps) / size_w
    parts["rewards/rejected"] = setup.beta * (pl.logps - rl.logps) / size_l
    return {"loss": loss, "u": u, "delta": delta, "gamma": gamma} | parts


def scored(
    model: Any,
    pairs: Sequence[TokenPair],
    taps: Sequence[Tap] = (),
    reference: Callable[[Tokens, Tokens], Scored] | None = None,
) -> list[Sides]:
    """Per pair (chosen, rejected) of the policy, with their graph, and of the reference."""

    def score_reference(prompt: Tokens, response: Tokens) -> Scored:
        if reference is not None:
            return reference(prompt, response).detached()
        with torch.no_grad(), adapters_off(model):
            return score_response(model, prompt, response, taps)

    found = []
    for pair in pairs:
        chosen, rejected = (score_response(model, pair.prompt, y, taps) for y in pair.responses)
        ref_chosen, ref_rejected = (score_reference(pair.prompt, y) for y in pair.responses)
        found.append(((chosen, rejected), (ref_chosen, ref_rejected)))
    return found


def loss_and_grads(
    model: Any,
    adapters: Mapping[str, torch.nn.Parameter],
    pairs: Sequence[TokenPair],
    setup: Setup,
    taps: Sequence[Tap] = (),
    reference: Callable[[Tokens, Tokens], Scored] | None = None,
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """Every pair's parts, and the gradient of the mean loss by every LoRA matrix."""
    return of_scored(scored(model, pairs, taps, reference), adapters, pairs, setup, taps)


def of_scored(
    sides: Sequence[Sides],
    adapters: Mapping[str, torch.nn.Parameter],
    pairs: Sequence[TokenPair],
    setup: Setup,
    taps: Sequence[Tap] = (),
) -> tuple[list[dict[str, float]], dict[str, np.ndarray]]:
    """`loss_and_grads` of what `scored` gave; its graph stays, so that other setups may follow."""
    signed = ("abstopk", "identity")
    magnitude = [isinstance(tap, Site) or tap.activation in signed for tap in taps]
    results = []
    total = torch.zeros((), dtype=F64)
    for pair, both in zip(pairs, sides, strict=True):
        parts = objective(setup, *both, magnitude, pair.facts)
        total = total + parts["loss"] / len(pairs)
        results.append({name: value.item() for name, value in parts.items()})
    found = torch.autograd.grad(
        total, list(adapters.values()), materialize_grads=True, retain_graph=True
    )
    return results, {name: grad.numpy() for name, grad in zip(adapters, found, strict=True)}
