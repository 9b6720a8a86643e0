"""What `sae train` ends with: the SAE on the disk, then its figures, then the loss with it.

run.json says which cards were written, and when all is: what is killed between is measured anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.pipeline.job import Say
from fpo_mlx.pipeline.sae_setup import Setup
from fpo_mlx.records import Passage, SaeWeights
from fpo_mlx.saetrain.texts import Document
from fpo_mlx.storage import files

if TYPE_CHECKING:
    import numpy as np

    from fpo_mlx.core.dictionary import Rule
    from fpo_mlx.judge.sae_fit import LossFigures
    from fpo_mlx.saetrain.finish import Figures
    from fpo_mlx.saetrain.state import State

LOSS_DOCUMENTS, LOSS_TOKENS = 16, 256  # held out, that the loss with the SAE spliced in is taken on
CARDS, FINISHED = "cards", "finished"  # in run.json: digests of the cards; all figures were taken


@dataclass(frozen=True)
class Written:
    """An SAE that is on the disk, and what else of its run is asked for: no model, no Adam."""

    folder: Path
    sae: SaeWeights
    figures: Figures | None
    facts: Mapping[str, Any]
    model: Path
    held_out: tuple[Document, ...]


def write(
    setup: Setup, current: State, rule: Rule, sample: np.ndarray | None, tokens: int, say: Say
) -> Written | None:
    """The folder, and then what held-out rows say of it; None in all processes but the first.

    sample: rows [n, D] that BatchTopK's threshold is fitted to; tokens: that were trained on.
    """
    from fpo_mlx.saetrain import finish

    folder, facts, sae = Path(setup.config.output), _facts(setup, tokens), None
    if setup.ranks.first:
        name = setup.model_name.rsplit("/", 1)[-1]  # without owner, as SAELens names models
        sae = finish.finished(current, rule, sample, site=setup.site, model_name=name)
        card = finish.card(sae, None, facts)
        _note_card(folder, card)
        finish.write(folder, sae, card)
    held = setup.reader.rows(setup.held_out) if setup.held_out else None
    if sae is None:
        return None
    figures = None if held is None else finish.measure(sae, held)
    if held is not None and figures is None:
        say(f"no figures: of {len(held)} held-out rows (--held-out) no two differ")
    made = Written(folder, sae, figures, facts, setup.path, setup.held_out)
    _write_card(made, None)
    return made


def is_finished(folder: Path) -> bool:
    """Whether an SAE is here, and its card stays: all figures were taken, or a user edited it.

    Without a checkpoint there is nothing that they could be taken with.
    """
    from fpo_mlx.saetrain import finish, state

    run, card = state.run_folder(folder), folder / finish.CARD
    if not finish.is_there(folder):
        return False
    record = run.noted()
    ours = card.is_file() and _digest(card.read_bytes()) in record.get(CARDS, ())
    return FINISHED in record or not ours or run.stateless


def measure_loss(made: Written, *, trust_remote_code: bool) -> LossFigures | None:
    """With the SAE in the site's place on held-out documents; None where it cannot be had.

    The last of the figures. The model is read again: the one that gave the activations was cut
    behind the site.
    """
    from fpo_mlx.saetrain import state

    loss = _loss(made, trust_remote_code)
    if loss is not None:
        _write_card(made, loss.recovered)
    state.run_folder(made.folder).note({FINISHED: True})
    return loss


def _loss(made: Written, trust_remote_code: bool) -> LossFigures | None:
    from fpo_mlx.judge import sae_fit
    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.tapping import tapped

    passages = [
        Passage(document.tokens[:first], document.tokens[first : first + LOSS_TOKENS])
        for document in made.held_out
        if document.keep.any() and (first := max(1, int(document.keep.argmax())))
    ][:LOSS_DOCUMENTS]
    if not passages:
        return None
    loaded = open_model(made.model, trust_remote_code=trust_remote_code)
    policy = tapped(loaded, [made.sae], share_prompt=False)
    return sae_fit.evaluate(policy, made.sae, passages).loss


def _write_card(made: Written, recovered: float | None) -> None:
    from fpo_mlx.saetrain import finish

    text = finish.card(made.sae, made.figures, made.facts, recovered)
    _note_card(made.folder, text)
    files.write_text(made.folder / finish.CARD, text)


def _note_card(folder: Path, text: str) -> None:
    """Before it is written: a run may be killed between, and no card of ours passes for edited."""
    from fpo_mlx.saetrain import state

    run = state.run_folder(folder)
    cards = dict.fromkeys((*run.noted().get(CARDS, ()), _digest(text.encode())))
    run.note({CARDS: list(cards)})


def _digest(card: bytes) -> str:
    return hashlib.sha256(card).hexdigest()


def _facts(setup: Setup, tokens: int) -> dict[str, Any]:
    """Rows of the card: what a reader should know of the training."""
    config = setup.config
    facts = {
        "model": setup.model_name,
        "site": str(setup.site),
        "architecture": config.architecture + (", matryoshka" if config.matryoshka else ""),
        "k": setup.sizes.k,
        "data": config.data if not Path(config.data).exists() else Path(config.data).name,
        "positions": f"{config.tokens}; without first positions and outlier norms",
        "tokens trained on": tokens,
        "passes": f"{tokens / max(setup.positions, 1):.2f}",
    }  # fmt: skip
    if config.init:
        facts["started from"] = config.init if not Path(config.init).exists() else (
            Path(config.init).name
        )  # fmt: skip
    return facts
