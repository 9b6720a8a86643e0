"""How well an SAE reads a model: `sae evaluate`, and the short look before the reference pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from fpo_mlx import data, demo
from fpo_mlx.config import RunConfig
from fpo_mlx.pipeline.job import (
    Say,
    at_site,
    columns,
    hub_splits,
    need_model,
    one_sae,
    open_tokenizer,
    read_sae,
    warn_of_adapters,
)
from fpo_mlx.pipeline.prepared import longest
from fpo_mlx.records import Passage, SaeWeights, TokenPair
from fpo_mlx.reference import ReferenceBackend
from fpo_mlx.sae import fit
from fpo_mlx.storage.hub import read_config, resolve_model

if TYPE_CHECKING:
    from fpo_mlx.judge.sae_fit import Ablation, FitReport

HELD_OUT_FIRST = ("valid", "test", "train")
CHECKED_PAIRS, CHECKED_TOKENS = 16, 64  # 32 answers, of each so many tokens at most


def sae_evaluate(
    config: RunConfig,
    *,
    adapter_path: str | None = None,
    sequences: int = 64,
    ablation: Ablation = "zero",
    say: Say,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> FitReport:
    """One SAE on base (+ adapter), on answers of --data, or of the demo's pairs without it."""
    from fpo_mlx.judge import sae_fit
    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.tapping import tapped

    ref, notes = config.reference, []
    model = need_model(config)
    one = one_sae(config, "sae evaluate")
    folder = resolve_model(model)
    warn_of_adapters([adapter_path], config, folder, say)
    sae = at_site(read_sae(one, ref, say), config, read_config(folder), notes.append)
    for note in sae.notes:
        say(f"{one}: {note}")
    passages = read_passages(config, folder, sequences, say)
    loaded = open_model(
        folder, adapter=adapter_path, trust_remote_code=ref.trust_remote_code, say=say
    )
    assert sae.site is not None
    places = sae_fit.places_to_compare(loaded.model, sae.site)
    policy = tapped(loaded, [sae], also=places, share_prompt=False)
    report = sae_fit.evaluate(policy, sae, passages, ablation=ablation, progress=progress)
    said = (note.removeprefix("warning: ") for note in notes)
    return replace(report, warnings=(*said, *report.warnings))


def read_passages(config: RunConfig, model: Path, count: int, say: Say) -> list[Passage]:
    """Answers to judge on: of the split that is held out, where the data has one."""
    d = config.data
    source = d.data or str(Path(demo.__file__).parent / "data")
    splits = data.find_splits(source, hub_splits(config), want="valid")
    split = next((name for name in HELD_OUT_FIRST if name in splits), "train")
    read = partial(data.iterate_raw, source, split, hub_splits(config), columns(config))
    tokenizer = open_tokenizer(config, model, say)
    most = longest(d.max_seq_length, tokenizer, say)
    return data.read_passages(read, tokenizer, count, most, columns(config))


def quick_check(
    config: RunConfig,
    saes: Mapping[str, SaeWeights],
    engine: ReferenceBackend,
    pairs: Sequence[TokenPair],
) -> Iterator[str]:
    """L0 and FVU of each SAE, by its name, on the beginnings of 32 answers; then its warnings.

    The SAEs are read once more from their files, tile by tile, with their decoders, which the
    reference pass does without.
    """
    if not saes or not pairs:
        return
    rows = engine.activations(beginnings(pairs))
    for (spec, half), x in zip(saes.items(), rows, strict=True):
        whole = read_sae(spec, config.reference, lambda _: None, on_disk=True)
        sae = replace(whole, site=half.site)
        found = fit.figures(fit.measure(sae, x), fit.reconstructs(sae))
        fvu = f"FVU {found.fvu:.3f}" if found.fvu is not None else f"no FVU: {found.why_not}"
        yield f"{spec}: L0 {found.l0:.1f}, {fvu} ({found.tokens} tokens; --no-check-sae: no look)"
        stated = fit.stated_l0(sae)
        for text in fit.verdict(found, features=sae.n_features, stated_l0=stated):
            yield f"warning: {spec}: {text}"


def beginnings(pairs: Sequence[TokenPair]) -> list[TokenPair]:
    """CHECKED_PAIRS pairs, evenly spread over those with the shorter prompts, answers cut short."""
    short = sorted(pairs, key=lambda pair: len(pair.prompt))[: max(CHECKED_PAIRS, len(pairs) // 2)]
    n = CHECKED_TOKENS
    return [
        replace(pair, chosen=pair.chosen[:n], rejected=pair.rejected[:n])
        for pair in data.spread(short, CHECKED_PAIRS)
    ]
