"""A model that is open to be looked into: activations at its taps, scores of pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fpo_mlx import data
from fpo_mlx.config import load_config
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.pipeline.job import at_site, open_tokenizer
from fpo_mlx.pipeline.prepared import longest
from fpo_mlx.records import PairScore, SaeWeights, Site, TokenPair
from fpo_mlx.storage.hub import read_config, resolve_model

if TYPE_CHECKING:
    from fpo_mlx.model.reader import Reader

Row = Mapping[str, Any]


@dataclass(frozen=True)
class TappedModel:
    """A loaded model, its tokenizer, and taps at `sites`. Made by `open_tapped`."""

    folder: Path
    tokenizer: ChatTokenizer
    sites: tuple[Site, ...]
    reader: Reader
    limit: int | None = None  # tokens of prompt + response; None: answers are whole

    def pair_of(self, row: Row) -> TokenPair:
        """A row, in any form that `--data` takes, as tokens; its `keys` name it in a cache.

        Raises: DataError for a row that cannot be used.
        """
        return self._tokens(data.parse_row(row))

    def _tokens(self, row: data.PreferenceRow) -> TokenPair:
        pair = data.tokenize_row(row, self.tokenizer)
        return pair if self.limit is None else data.cut_to([pair], self.limit).pairs[0]

    def activations(self, prompt: str, response: str) -> tuple[np.ndarray, ...]:
        """What the taps see of an answer: per site float32 [L, D_in], a row per response token.

        Row t is the position that predicts token t of the response; the template's end-of-turn
        token counts as part of it. Raises: DataError for a response that `--data` may not have as
        the chosen one of this prompt.
        """
        import mlx.core as mx

        turns = ({"role": "user", "content": prompt},)
        chosen = ({"role": "assistant", "content": response},)
        other = ({"role": "assistant", "content": f"{response}."},)  # a row has two
        row = data.PreferenceRow(turns, chosen, other, where="", index=0)
        pair = self._tokens(row)
        tapped = self.reader.policy.answer_rows(pair.prompt, pair.chosen).tapped
        return tuple(np.array(site.astype(mx.float32)) for site in tapped)

    def score(self, rows: Sequence[Row]) -> list[PairScore]:
        """(chosen, rejected) of each row: log-prob in nats, tokens, pooled features per SAE.

        Raises: DataError naming the row that cannot be used.
        """
        pairs = []
        for number, row in enumerate(rows):
            try:
                pairs.append(self.pair_of(row))
            except DataError as error:
                raise DataError(f"row {number}: {error}") from error
        return [score for pair in pairs for score in self.reader.scores([pair])]


def open_tapped(
    model: str | Path,
    taps: Sequence[Site | SaeWeights] = (),
    *,
    adapter_path: str | Path | None = None,
    chat_template: str | Path | None = None,
    chat_template_args: dict[str, Any] | None = None,
    max_seq_length: int | None = None,
    trust_remote_code: bool = False,
) -> TappedModel:
    """Load a model folder or hub id, with an adapter if one is named, and tap it.

    taps: places, or SAEs, which are tapped where they read. max_seq_length: cuts answers as a run
    does; without it they are whole.
    Raises: ModelError, SaeError for what does not fit; ConfigError for places and SAEs mixed.
    """
    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.tapping import reader_of

    given = {
        "model": str(model), "trust_remote_code": trust_remote_code,
        "chat_template": str(chat_template) if chat_template else None,
        "chat_template_args": chat_template_args, "max_seq_length": max_seq_length,
    }  # fmt: skip
    settings = load_config(given)
    folder = resolve_model(model)
    about = read_config(folder)
    saes = [tap for tap in taps if isinstance(tap, SaeWeights)]
    if saes and len(saes) < len(taps):
        raise ConfigError(
            f"taps: found {len(saes)} SAEs and {len(taps) - len(saes)} places, wanted one kind. "
            "Name the SAE's own place, or open the model twice."
        )
    placed = [at_site(sae, settings, about, lambda _: None) for sae in saes]
    places = [tap for tap in taps if isinstance(tap, Site)]
    loaded = open_model(folder, adapter=adapter_path, trust_remote_code=trust_remote_code)
    reader = reader_of(loaded, placed, also=places)
    tokenizer = open_tokenizer(settings, folder)
    limit = None if max_seq_length is None else longest(settings.data.max_seq_length, tokenizer)
    return TappedModel(folder, tokenizer, reader.policy.sites, reader, limit)
