"""The cases of the benchmark; each returns a `Result` and shares one loaded model."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import bench_measure as bm
import bench_profile as bp
import bench_rival as rival
import bench_subjects as bs
import mlx.core as mx
import numpy as np

from fpo_mlx import cache
from fpo_mlx.cache.identity import CacheIdentity
from fpo_mlx.config import Objective
from fpo_mlx.core import features as F
from fpo_mlx.core.logprobs import Head, token_logps
from fpo_mlx.model.heads import find_backbone, find_head
from fpo_mlx.model.load import load_model
from fpo_mlx.model.policy import Layout
from fpo_mlx.model.reader import encoder_of
from fpo_mlx.reference import open_backend
from fpo_mlx.train.drift import Controller
from fpo_mlx.train.scoring import Scorer

Say = Callable[[str], None]
LENGTHS = {"main-256": (256, 90, 70), "main-76": (76, 154, 77), "main-512": (512, 256, 256)}
SFT_LIMITS = {"main-256": (0.55, 0.38), "main-76": (0.85, 0.50)}
SMALL_SAE, WIDTHS = 4096, (4096, 16384, 65536, 262144)


@dataclass(frozen=True)
class Plan:
    """How often, and with whom."""

    world: bs.World
    repeats: int
    warmup: int
    rival: bool
    say: Say

    def measure(self, subjects: Sequence[bm.Subject]) -> bm.Samples:
        return bm.interleave(subjects, self.repeats, self.warmup, self.say)


def lengths(plan: Plan, case: str) -> bm.Result:
    """One pair per step: mlx-lm's SFT on its two sequences, ours, and mlx-lm-lora's DPO."""
    world, shape = plan.world, LENGTHS[case]
    pair = bs.make_pair(*shape, world.vocab)
    sae = bs.random_sae(world, SMALL_SAE, pair)
    refs = bs.score(world, [pair], sae)
    subjects: list[bm.Subject] = [bs.sft_step(world, pair)]
    for preset in ("fpo", "simpo", "dpo", "tdpo2"):
        for share in (True, False):
            subjects.append(bs.our_step(world, preset, [pair], refs, sae=sae, share=share))
    notes = [f"prompt {shape[0]}, responses {shape[1]} / {shape[2]} tokens, one pair per step"]
    with ExitStack() as stack:
        if plan.rival:
            other = stack.enter_context(rival.running(world.path, pair, bs.LORA, plan.say))
            subjects.append(other)
            notes.append(f"mlx-lm-lora: {other.facts['blas']} {other.facts['gflops']:.0f} GFLOP/s")
        samples = plan.measure(subjects)
    rows = bm.rows_of(samples, "mlx-lm sft")
    return bm.Result(
        case, "one training step", rows, notes=notes, checks=_length_checks(case, samples)
    )


def _length_checks(case: str, samples: bm.Samples) -> list[bm.Check]:
    checks = []
    if case in SFT_LIMITS:
        time, memory = SFT_LIMITS[case]
        sft = "mlx-lm sft"
        checks += [
            bm.Check(f"{case}: FPO / SFT, time", bm.time_ratio(samples, "fpo", sft), time),
            bm.Check(f"{case}: FPO / SFT, memory", bm.memory_ratio(samples, "fpo", sft), memory),
        ]
    checks += [
        bm.Check(f"{case}: FPO / SimPO, time", bm.time_ratio(samples, "fpo", "simpo"), 1.03),
        bm.Check(f"{case}: FPO / SimPO, memory", bm.memory_ratio(samples, "fpo", "simpo"), 1.02),
        bm.Check(f"{case}: FPO / TDPO2, time", bm.time_ratio(samples, "fpo", "tdpo2"), 0.65),
    ]
    if rival.NAME in samples:
        other = rival.NAME
        checks += [
            bm.Check(f"{case}: FPO / {other}, time", bm.time_ratio(samples, "fpo", other), 0.35),
            bm.Check(f"{case}: FPO / {other}, total", bm.total_ratio(samples, "fpo", other), 0.55),
        ]
    return checks


def sae_width(plan: Plan) -> bm.Result:
    """FPO against SimPO as the SAE grows; memory is above the weights, the SAE's included."""
    world = plan.world
    pair = bs.make_pair(*LENGTHS["main-256"], world.vocab)
    plain = bs.score(world, [pair], None)
    subjects: list[bm.Subject] = [bs.our_step(world, "simpo", [pair], plain)]
    active = []
    for width in WIDTHS:
        sae = bs.random_sae(world, width, pair)
        refs = bs.score(world, [pair], sae)
        active.append(f"{width}: {len(refs[0][0].features[0].indices)}")
        step = bs.our_step(world, "fpo", [pair], refs, sae=sae, name=f"fpo sae {width // 1024}k")
        subjects.append(step)
        del sae
    samples = plan.measure(subjects)
    wide, small = "fpo sae 64k", "fpo sae 4k"
    checks = [
        bm.Check("SAE 64k: FPO / SimPO, time", bm.time_ratio(samples, wide, "simpo"), 1.03),
        bm.Check("SAE 64k: FPO / SimPO, memory", bm.memory_ratio(samples, wide, "simpo"), 1.02),
        bm.Check("SAE 262k / 4k, time", bm.time_ratio(samples, "fpo sae 256k", small), 1.25),
    ]
    notes = [f"non-zero pooled features of the chosen response by width: {', '.join(active)}"]
    rows = bm.rows_of(samples, "simpo")
    return bm.Result("sae", "SAE width, prompt 256 + 90 / 70", rows, notes=notes, checks=checks)


def vocabulary(plan: Plan) -> bm.Result:
    """The loss alone, log-probs and their gradient, on a tiny random llama."""
    from mlx_lm.models.llama import Model, ModelArgs

    subjects: list[bm.Subject] = []
    for vocab in (49152, 256000):
        arguments = ModelArgs(
            model_type="llama", hidden_size=64, num_hidden_layers=2, intermediate_size=128,
            num_attention_heads=2, num_key_value_heads=1, rms_norm_eps=1e-5, vocab_size=vocab,
            tie_word_embeddings=True,
        )  # fmt: skip
        model = Model(arguments)
        model.freeze()
        head = find_head(model, find_backbone(model), {})
        hidden, goals = mx.random.normal((512, 64)), mx.random.randint(0, vocab, (512,))
        mx.eval(model.parameters(), hidden, goals)
        subjects.append(bm.Local(f"V {vocab}", _loss_of(hidden, goals, head, vocab)))
    samples = plan.measure(subjects)
    rows = bm.rows_of(samples, "V 49152")
    ratio = bm.memory_ratio(samples, "V 256000", "V 49152")
    checks = [bm.Check("loss alone, V 256k / 49k, memory", ratio, 1.10)]
    return bm.Result("vocabulary", "the loss alone, 512 rows, D = 64", rows, checks=checks)


def _loss_of(hidden: mx.array, goals: mx.array, head: Head, vocab: int) -> Callable[[], None]:
    slope = mx.value_and_grad(lambda rows: -token_logps(rows, goals, head, vocab).sum())
    return lambda: mx.eval(slope(hidden))


def pairs_a_step(plan: Plan) -> bm.Result:
    """1, 2 and 4 pairs per update, one at a time in memory and all at once."""
    world = plan.world
    pairs = [bs.make_pair(*LENGTHS["main-76"], world.vocab, index=i) for i in range(4)]
    sae = bs.random_sae(world, SMALL_SAE, pairs[0])
    refs, scorer = bs.score(world, pairs, sae), bs.make_scorer(world, "fpo", sae)
    subjects: list[bm.Subject] = []
    for n, micro in ((1, 1), (2, 1), (2, 2), (4, 1), (4, 4)):
        name = f"{n} pairs, {micro} at once"
        subjects.append(
            bs.our_step(world, "fpo", pairs[:n], refs[:n], scorer=scorer, micro=micro, name=name)
        )
    rows = bm.rows_of(plan.measure(subjects), "1 pairs, 1 at once")
    each = [f"{row.name}: {row.seconds / int(row.name[0]):.3f}" for row in rows]
    notes = [f"seconds per pair: {'; '.join(each)}"]
    return bm.Result("pairs", "FPO, pairs per step, prompt 76 + 154 / 77", rows, notes=notes)


def precompute(plan: Plan) -> bm.Result:
    """Filling a reference cache on disk against mlx-lm's bare forward over the same tokens."""
    world = plan.world
    pairs = [
        bs.make_pair(*shape, world.vocab, index=i)
        for i, shape in enumerate([LENGTHS["main-256"], LENGTHS["main-76"]] * 2)
    ]
    sae = bs.random_sae(world, 16384, pairs[0])
    backend = open_backend("mlx", model_path=world.path, saes=[sae])
    model = load_model(world.path).model
    head = find_head(model, find_backbone(model), {})
    identity = CacheIdentity("bench", "bench", saes=((sae.fingerprint(), str(sae.site)),))

    def filled() -> None:
        with tempfile.TemporaryDirectory() as folder:
            store = cache.open_cache(Path(folder) / "cache", identity, create=True)
            cache.fill(store, pairs, backend.score)

    def bare() -> None:
        for pair in pairs:
            mx.eval(bs.bare_forward(model, head, pair))

    subjects = [bm.Local("bare forward", bare), bm.Local("precompute, SAE 16k", filled)]
    samples = plan.measure(subjects)
    rows = bm.rows_of(samples, "bare forward")
    ratio = bm.time_ratio(samples, "precompute, SAE 16k", "bare forward")
    checks = [bm.Check("precompute / bare forward, time", ratio, 1.15)]
    tokens = sum(pair.tokens for pair in pairs)
    notes = [f"{len(pairs)} pairs, {tokens} distinct tokens; the cache is written to disk"]
    return bm.Result("precompute", "reference pass", rows, notes=notes, checks=checks)


def length(plan: Plan) -> bm.Result:
    """Time a token of a long pair against a short one, with and without attention's share."""
    world = plan.world
    shapes = {"256 tokens": (128, 64, 64), "2048 tokens": (1024, 512, 512)}
    pairs = {name: bs.make_pair(*shape, world.vocab) for name, shape in shapes.items()}
    sae = bs.random_sae(world, SMALL_SAE, pairs["256 tokens"])
    scorer = bs.make_scorer(world, "fpo", sae)
    subjects = [
        bs.our_step(world, "fpo", [p], bs.score(world, [p], sae), scorer=scorer, name=name)
        for name, p in pairs.items()
    ]
    rows = bm.rows_of(plan.measure(subjects), "256 tokens")
    per = {row.name: row.seconds / pairs[row.name].tokens * 1e3 for row in rows}
    aside = {
        row.name: (row.seconds - bp.attention_seconds(world, pairs[row.name]))
        / pairs[row.name].tokens
        * 1e3
        for row in rows
    }
    table = [
        {"pair": name, "ms per token": per[name], "without attention": aside[name]}
        for name in pairs
    ]
    all_in = per["2048 tokens"] / per["256 tokens"]
    without = aside["2048 tokens"] / aside["256 tokens"]
    checks = [bm.Check("ms per token, 2048 / 256, attention aside", without, 1.3)]
    notes = [f"with attention the ratio is {all_in:.3f}, without it {without:.3f}"]
    return bm.Result("length", "FPO, time a token", rows, table, notes, checks)


def control(plan: Plan) -> bm.Result:
    """FPO with a given alpha against one that a controller finds, with whole and halved steps."""
    world = plan.world
    pair = bs.make_pair(*LENGTHS["main-76"], world.vocab)
    sae = bs.random_sae(world, SMALL_SAE, pair)
    refs = bs.score(world, [pair], sae)
    given = Objective(alpha=30.0, feature_scale="reference")
    found = Objective(target_drift=0.1)
    whole = Controller.for_drift(0.1)
    half = replace(whole, level=2 * whole.pull / whole.target)
    subjects: list[bm.Subject] = [
        bs.our_step(world, "", [pair], refs, name=name, drift=drift,
                    scorer=Scorer(world.policy, [encoder_of(sae)], objective))
        for name, objective, drift in (
            ("alpha given", given, None),
            ("alpha found", found, whole),
            ("alpha found, steps halved", found, half),
        )
    ]  # fmt: skip
    samples = plan.measure(subjects)
    checks = [
        bm.Check(f"{name} / alpha given, time", bm.time_ratio(samples, name, "alpha given"), 1.01)
        for name in ("alpha found", "alpha found, steps halved")
    ]
    rows = bm.rows_of(samples, "alpha given")
    return bm.Result("control", "alpha by a controller", rows, checks=checks)


def precision(plan: Plan) -> bm.Result:
    """What the encoder's matrix may be kept in: pooled features against float32's."""
    world, table = plan.world, []
    pair = bs.make_pair(*LENGTHS["main-256"], world.vocab)
    exact = encoder_of(bs.random_sae(world, WIDTHS[1], pair))
    rows, means = world.policy.rows([pair]).tapped[0], Layout.of([pair]).means()
    wanted, _ = F.pool(exact, rows, means)
    top = F.top_indices(wanted, 50)
    assert isinstance(exact.w_enc, mx.array)
    packed = mx.quantize(exact.w_enc, 64, 8)
    matrices = {
        "float16": exact.w_enc.astype(mx.float16),
        "bfloat16": exact.w_enc.astype(mx.bfloat16),
        "8 bits": mx.dequantize(*packed, 64, 8),
    }
    for name, matrix in matrices.items():
        got, _ = F.pool(replace(exact, w_enc=matrix.astype(mx.float32)), rows, means)
        other = set(np.array(F.top_indices(got, 50)).ravel().tolist())
        off = (mx.abs(got - wanted).max() / wanted.max()).item()
        table.append(
            {
                "kept in": name, "largest error / largest feature": off,
                "of the top 50, others": len(set(np.array(top).ravel().tolist()) - other),
            }
        )  # fmt: skip
    notes = ["wanted: 1e-4, the agreement of the backends; so float32 is kept"]
    return bm.Result("precision", "the SAE's matrix, 16k random features", (), table, notes)


def profile(plan: Plan) -> bm.Result:
    """The computed floor of a step, the rate reached, and the parts."""
    world, table, facts = plan.world, [], {}
    machine = bp.matmul_rate()
    for case in ("main-256", "main-76"):
        pair = bs.make_pair(*LENGTHS[case], world.vocab)
        sae = bs.random_sae(world, SMALL_SAE, pair)
        times = bp.parts(world, pair, bs.score(world, [pair], sae), sae, plan.repeats)
        least = bp.floor(bp.Shape.of(world.config), pair, world.first_adapted)
        work = {
            "prompt forward": least.prompt_forward,
            "response forward": least.response_forward,
            "backward": least.backward,
            "head and log-probs, with their gradient": least.head,
            "SAE pooling": 2.0 * sum(map(len, pair.responses)) * sae.d_in * sae.n_features,
            "step": least.step,
        }
        for name, seconds in times.items():
            flops = work.get(name)
            table.append(
                {
                    "case": case, "part": name, "s": seconds,
                    "share": seconds / times["step"],
                    "GFLOP": "" if flops is None else flops / 1e9,
                    "GFLOP/s": "" if flops is None or not seconds else flops / seconds / 1e9,
                }
            )  # fmt: skip
        facts[case] = {**vars(least), "floor": least.step, "seconds": times["step"]}
    notes = [
        f"one large float32 product here: {machine:.0f} GFLOP/s",
        *(
            f"{case}: floor {f['floor'] / 1e9:.1f} GFLOP ({f['attention'] / 1e9:.1f} of it "
            f"attention) = {f['floor'] / machine / 1e9:.2f} s at that rate; took "
            f"{f['seconds']:.2f} s, {f['floor'] / f['seconds'] / 1e9:.0f} GFLOP/s"
            for case, f in facts.items()
        ),
    ]
    return bm.Result("profile", "where an FPO step's time goes", (), table, notes, facts=facts)


CASES: dict[str, Callable[[Plan], bm.Result]] = {
    **{case: lambda plan, case=case: lengths(plan, case) for case in LENGTHS},
    "sae": sae_width,
    "control": control,
    "vocabulary": vocabulary,
    "pairs": pairs_a_step,
    "precompute": precompute,
    "length": length,
    "precision": precision,
    "profile": profile,
}
QUICK = ("main-256", "main-76")
