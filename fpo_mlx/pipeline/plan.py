"""Will it fit? Memory and time of `precompute` and `train`, before a weight is read."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from fpo_mlx.cache import CacheIdentity
from fpo_mlx.config import RunConfig, named, options
from fpo_mlx.machine import device
from fpo_mlx.machine import fits as fitting
from fpo_mlx.machine import memory as model_of
from fpo_mlx.machine.fits import Case
from fpo_mlx.machine.memory import Adapted, Lengths, ModelShape, SaeShape, Setup, Term, Tiles
from fpo_mlx.machine.processes import find_share
from fpo_mlx.pipeline.job import (
    Job,
    Say,
    check_sae_named,
    memory_of,
    need_model,
    open_saes,
    open_tokenizer,
    read_pairs,
)
from fpo_mlx.pipeline.policy import Outline, outline_of, put_adapters
from fpo_mlx.records import SaeWeights, TokenPair
from fpo_mlx.storage.headers import outlined
from fpo_mlx.storage.hub import read_config, size_in, todays_names

FUSED_HEADS = (64, 72, 80, 96, 128, 192, 256, 512)  # of the fused backward pass in MLX 0.32.4


@dataclass(frozen=True)
class CommandPlan:
    """One command: its peak, term by term (bytes), and its time."""

    terms: tuple[Term, ...]
    fits: bool
    seconds_per_pair: float
    seconds: float | None  # of the whole command; None where the number of pairs is unknown

    @property
    def peak(self) -> float:
        return model_of.total(self.terms)


@dataclass(frozen=True)
class PlanReport:
    """memory: bytes that may be used; advice: what to change, or what more would fit.

    kept: bytes of freed buffers that MLX keeps beside either peak while there is room.
    """

    memory: float
    gflops: float
    pairs: int | None
    longest: Lengths
    precompute: CommandPlan
    train: CommandPlan
    advice: tuple[str, ...]
    kept: float

    def as_dict(self) -> dict[str, Any]:
        def one(command: CommandPlan) -> dict[str, Any]:
            return {
                "peak_bytes": round(command.peak),
                "terms": {term.name: round(term.bytes) for term in command.terms},
                "fits": command.fits,
                "seconds_per_pair": command.seconds_per_pair,
                "seconds": command.seconds,
            }

        return {
            "memory_bytes": round(self.memory), "kept_bytes": round(self.kept),
            "gflops": self.gflops, "pairs": self.pairs,
            "longest_pair": vars(self.longest), "precompute": one(self.precompute),
            "train": one(self.train), "advice": list(self.advice),
        }  # fmt: skip


def plan(config: RunConfig, *, memory_gb: float | None = None, say: Say) -> PlanReport:
    """Predict peak memory and time of `precompute` and `train` for these settings.

    memory_gb: what may be used; default: what this machine lets MLX use.
    """
    from fpo_mlx.pipeline import doctor

    memory, model = memory_of(memory_gb), need_model(config)
    check_sae_named(config)  # before anything is fetched
    with outlined(model, say) as path:
        job = _open(config, path, say)
        pairs = read_pairs(job, "train", say) if config.data.data else []
        lengths = lengths_of(pairs) if pairs else _assumed(config, say)
        case = case_of(job, lengths)
    speed = doctor.gflops()
    train = _train_plan(case, lengths, config, len(pairs), memory, speed)
    first = _precompute_plan(case, lengths, len(pairs), memory, speed)
    decisive = max(case.lengths, key=lambda one: model_of.total(_terms(case, one)))
    advice = tuple(_advice(case, memory, train.fits))
    kept = device.here().cache_limit or 0
    return PlanReport(memory, speed, len(pairs) or None, decisive, first, train, advice, kept)


def _open(config: RunConfig, path: Path, say: Say) -> Job:
    """As `open_job`, but without fingerprints: those read every byte of the weights."""
    tokenizer = open_tokenizer(config, path, say)
    saes = open_saes(config, read_config(path), say=say)
    start = config.train.init_adapter
    own = Path(start) if start else None
    return Job(config, path, tokenizer, saes, CacheIdentity("plan", "plan"), adapter=own)


def lengths_of(pairs: Sequence[TokenPair]) -> tuple[Lengths, ...]:
    return tuple(Lengths(len(pair.prompt), len(pair.chosen), len(pair.rejected)) for pair in pairs)


def _assumed(config: RunConfig, say: Say) -> tuple[Lengths, ...]:
    """Without data the longest pair that --max-seq-length lets through, half of it prompt."""
    longest = config.data.max_seq_length
    prompt = max(1, longest // 2)
    say(f"no --data: a pair of {longest} tokens is assumed (--max-seq-length), half of them prompt")
    return (Lengths(prompt, longest - prompt, longest - prompt),)


def case_of(job: Job, lengths: Sequence[Lengths], outline: Outline | None = None) -> Case:
    """What memory and time depend on. The model is built, but none of its weights is read.

    outline: of the model, without adapters yet; it has them afterwards.
    """
    from fpo_mlx.model import adapters

    t, o, ref = job.config.train, job.config.objective, job.config.reference
    outline = outline or outline_of(job, lambda _: None)
    model, spec = outline.model, outline.spec
    shape = shape_of(model, read_config(job.model_path), share_prompt=ref.share_prompt)
    block = adapters.block_of(model)
    put_adapters(job, model, spec)
    adapted = {block[key] for key in spec.keys}
    setup = Setup(
        min(adapted), max(adapted),
        sum(array.size for _, array in adapters.parameters(model)),
        t.optimizer, t.micro_batch_size, t.pairs_per_update,
        t.grad_checkpoint, o.constraint == "kl", o.stop_gradient, o.top_k,
        t.gradient == "forward", adapted_of(model, read_config(job.model_path)),
        find_share(os.environ).world,
    )  # fmt: skip
    setup = replace(setup, micro_batch_size=min(t.micro_batch_size, setup.most_at_once))
    tiles = Tiles.of(device.here())
    saes = tuple(_sae_shape(sae) for sae in job.saes) if o.pooled else ()
    held = model_of.data_term(lengths).bytes
    return Case(shape, saes, setup, tiles, fitting.heaviest(lengths), _fixed(job), held)


def _fixed(job: Job) -> frozenset[str]:
    """Settings that the run cannot change: a resumed one keeps most, a given adapter its blocks."""
    kept = set(options()) - set(named("may_change")) if job.config.train.resume else set()
    return frozenset(kept | ({"num_layers"} if job.adapter else set()))


def adapted_of(model: Any, config: Mapping[str, Any]) -> Adapted:
    """Of a model that has its adapters."""
    from fpo_mlx.model.trees import input_width

    used = _used_experts(_stated(model, config))
    inputs = outputs = unpacked = 0
    for _, layer in model.named_modules():
        if "lora_a" not in layer:
            continue
        plain, width = layer["linear"], input_width(layer)
        inputs += width * (used if plain.weight.ndim == 3 else 1)
        if "m" in layer:
            outputs += plain.weight.shape[-2]
            packed = "scales" in plain and not device.here().widen
            unpacked += plain.weight.shape[-2] * width if packed else 0
    return Adapted(inputs, outputs, unpacked)


def _sae_shape(sae: SaeWeights) -> SaeShape:
    names = ("b_enc", "threshold", "gate_scale", "gate_bias", "act_scale")
    vectors = sum(getattr(sae, name) is not None for name in names)
    return SaeShape(sae.n_features, sae.d_in, vectors, sae.activation in ("topk", "abstopk"))


def shape_of(model: Any, config: Mapping[str, Any], *, share_prompt: bool) -> ModelShape:
    """Of a model of mlx-lm without adapters, whose weights need not have been read."""
    from fpo_mlx.model.heads import half_head, vocab_size
    from fpo_mlx.model.policy import plain_caches
    from fpo_mlx.model.trees import arrays_of, blocks_of, float_dtype, value_count

    here = device.here()
    arrays = arrays_of(model.parameters())
    stated = _stated(model, config)
    hidden, heads = size_in(stated, "hidden_size"), _most(stated.get("num_attention_heads")) or 1
    head_dim = int(stated.get("head_dim") or hidden // heads)
    experts = _experts_share(stated)
    blocks = blocks_of(model)
    parameters = sum(
        value_count(blocks[0], name, array) * (experts if "switch" in name else 1)
        for name, array in arrays_of(blocks[0].parameters())
    )
    stored = sum(array.nbytes for _, array in arrays)
    widened = 4 * sum(value_count(model, name, array) for name, array in arrays)
    return ModelShape(
        blocks=len(blocks),
        hidden=hidden,
        heads=heads,
        kv_heads=_most(stated.get("num_key_value_heads")) or heads,
        head_dim=head_dim,
        inner=_inner(stated, hidden),
        vocab=vocab_size(model, stated),
        weights=widened if here.widen else stored,
        block_parameters=round(parameters),
        value_bytes=4 if here.widen else float_dtype(model).size,
        shares_prompt=share_prompt and plain_caches(model) > 0,
        fused_attention=here.gpu and fuses_attention(blocks[0], head_dim),
        window=int(stated.get("sliding_window") or 0) or None,
        half_head=not here.widen and half_head(model, stated),
        states=tuple(map(_state_of, blocks)),
    )


def _state_of(block: Any) -> int:
    """Values of the block's gated-delta state (Qwen3-Next, Kimi Linear); 0 where it has none."""
    import sys

    for _, part in block.named_modules():
        code = sys.modules.get(type(part).__module__)  # none of a model's own file
        if "A_log" in part and hasattr(code, "gated_delta_update"):
            own = hasattr(part, "num_v_heads")
            names = ("num_v_heads", "head_v_dim", "head_k_dim")
            sizes = names if own else ("num_heads", "head_dim", "head_dim")
            return math.prod(getattr(part, name) for name in sizes)
    return 0


def fuses_attention(block: Any, head_dim: int) -> bool:
    """Whether the model's code asks for MLX's fused attention, and MLX has it for these heads.

    Gemma 2 makes its scores by hand: they are capped.
    """
    import inspect
    import sys

    code = inspect.getsource(sys.modules.get(type(block).__module__) or type(block))
    return "scaled_dot_product_attention(" in code and head_dim in FUSED_HEADS


def _stated(model: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """config.json, and mlx-lm's own values of what it leaves out, as Gemma 3's does."""
    found: dict[str, Any] = {}
    for part in (model, getattr(model, "language_model", None)):
        found |= vars(getattr(part, "args", None) or SimpleNamespace())
    return todays_names(found | {name: v for name, v in config.items() if v is not None})


def _most(count: Any) -> int:
    """Of a number for each block, as OpenELM's heads are, the largest; 0 for none."""
    return max(map(int, count), default=0) if isinstance(count, list | tuple) else int(count or 0)


def _experts_share(config: Mapping[str, Any]) -> float:
    """Part of a mixture's experts that a token runs through; 1 without experts."""
    every = config.get("num_local_experts") or config.get("num_experts")
    used = config.get("num_experts_per_tok")
    return used / every if every and used else 1.0


def _inner(config: Mapping[str, Any], hidden: int) -> int:
    inner = config.get("moe_intermediate_size") or config.get("intermediate_size") or 4 * hidden
    return int(inner) * _used_experts(config)


def _used_experts(config: Mapping[str, Any]) -> int:
    """That a token runs through; 1 without experts."""
    return int(config.get("num_experts_per_tok") or 1)


def _terms(case: Case, lengths: Lengths) -> list[Term]:
    return model_of.train_terms(case.model, case.saes, case.setup, case.tiles, lengths)


def _train_plan(
    case: Case,
    lengths: Sequence[Lengths],
    config: RunConfig,
    pairs: int,
    memory: float,
    speed: float,
) -> CommandPlan:
    terms, t = [*case.terms(), model_of.data_term(lengths)], config.train
    work = (model_of.train_flops(case.model, case.saes, case.setup, one) for one in lengths)
    each = model_of.seconds(sum(work) / len(lengths), speed)
    known = pairs or t.epochs is None
    seconds = each * t.iterations(pairs) * t.batch_size if known else None
    return CommandPlan(tuple(terms), model_of.total(terms) <= memory, each, seconds)


def _precompute_plan(
    case: Case, lengths: Sequence[Lengths], pairs: int, memory: float, speed: float
) -> CommandPlan:
    every = (
        model_of.precompute_terms(case.model, case.saes, case.tiles, one) for one in case.lengths
    )
    terms = [*max(every, key=model_of.total), model_of.data_term(lengths)]
    work = (model_of.precompute_flops(case.model, case.saes, one) for one in lengths)
    each = model_of.seconds(sum(work) / len(lengths), speed)
    return CommandPlan(
        tuple(terms), model_of.total(terms) <= memory, each, each * pairs if pairs else None
    )


def _advice(case: Case, memory: float, fits: bool) -> list[str]:
    """What to change until it fits; what more would fit where it does."""
    if fits:
        most = fitting.largest_micro_batch(case, memory)
        longest = fitting.longest_sequence(case, memory)
        return [
            f"largest --micro-batch-size that fits: {most} (an update has "
            f"{case.setup.batch_size} pairs)",
            f"longest pair that fits at --micro-batch-size {case.setup.micro_batch_size}: "
            f"{longest} tokens, half of them prompt",
        ]
    lines = []
    for change in fitting.changes(case):
        need = change.case.need
        lines.append(f"{change}: {need / 1e9:.2f} GB{', fits' if need <= memory else ''}")
        if need <= memory:
            return lines
    weights = case.model.weights
    if weights > 0.8 * memory:
        lines.append(
            f"the weights alone take {weights / 1e9:.2f} GB: take a smaller model, or one of fewer "
            "bits (`fpo-mlx convert -q --q-bits 4`; on a CPU it is widened to float32 all the same)"
        )
    return [*lines, f"nothing of this fits into {memory / 1e9:.2f} GB"]


def predicted_peak(
    job: Job, pairs: Sequence[TokenPair], outline: Outline
) -> tuple[float, str | None]:
    """Bytes, which `train` says before and beside what it measures; a warning of too little memory.

    It fits where `plan` says so.
    """
    case, memory = case_of(job, lengths_of(pairs), outline), memory_of(None)
    if not math.isfinite(case.peak):
        return 0.0, None
    short = case.need > memory
    return case.peak, _shortage(case, memory, job.config.train.resume) if short else None


def _shortage(case: Case, memory: float, resumed: bool) -> str:
    """What is missing, and the first change with which it fits."""
    said = (
        f"this training needs about {case.need / 1e9:.2f} GB and MLX has {memory / 1e9:.2f} GB "
        "here: it may swap, or be ended"
    )
    if way := fitting.way_out(case, memory):
        need = way.case.need / 1e9
        return f"{said}. What fits ({need:.2f} GB): {way}. `fpo-mlx plan` has the figures"
    if resumed:
        return (
            f"{said}. Nothing that a resumed run may change makes it fit: if it is ended, begin "
            "another with what `fpo-mlx plan` names"
        )
    return f"{said}. Nothing that `fpo-mlx plan` knows makes it fit: take a smaller model"
