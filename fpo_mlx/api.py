"""The public Python API: what `from fpo_mlx import …` gives. docs/python.md has an example of each.

Everything here is a thin door to a room behind it; names that are not here may change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx import cache, pipeline
from fpo_mlx.config import RunConfig, load_config
from fpo_mlx.errors import FpoError as FpoError
from fpo_mlx.pipeline.job import read_sae as read_sae_of
from fpo_mlx.pipeline.tapped import Row, TappedModel, open_tapped
from fpo_mlx.records import PairScore, SaeWeights
from fpo_mlx.records import Site as Site
from fpo_mlx.sae.check import placed
from fpo_mlx.sae.encode import encode as encode

if TYPE_CHECKING:
    from fpo_mlx.judge.evaluate import EvalReport
    from fpo_mlx.train.events import Report

Say = Callable[[str], None]


def _silent(text: str) -> None:
    """The default of `say`: a library does not print."""


def read_settings(path: str | Path | None = None, **values: Any) -> RunConfig:
    """Settings as the command line has them: `values` over a YAML file over the defaults.

    Raises: ConfigError for unknown names and for values of a wrong type or out of range.
    """
    return load_config(values, None if path is None else Path(path))


def read_sae(spec: str | Path, **reading: Any) -> SaeWeights:
    """An SAE, decoder included: a folder, a file, a hub id with a path, or a short name.

    reading: the settings that say what its files do not, such as `sae_k`, and where else it is put,
    `layer` and `site` (see the reference of settings, "model and SAE"). Raises: SaeError.
    """
    ref = load_config(reading).reference
    return placed(read_sae_of(str(spec), ref, _silent), ref.layer, ref.site)


def open_model(
    model: str | Path,
    taps: Sequence[Site | SaeWeights] = (),
    *,
    adapter_path: str | Path | None = None,
    chat_template: str | Path | None = None,
    chat_template_args: dict[str, Any] | None = None,
    max_seq_length: int | None = None,
    trust_remote_code: bool = False,
) -> TappedModel:
    """A model folder or hub id, loaded, frozen, and tapped at these places or SAEs.

    chat_template (a file), chat_template_args and max_seq_length: as a run had them, for the keys
    of its cache; without max_seq_length no answer is cut.
    Raises: ModelError, SaeError for what does not fit; ConfigError for places and SAEs mixed.
    """
    return open_tapped(
        model, taps, adapter_path=adapter_path, chat_template=chat_template,
        chat_template_args=chat_template_args, max_seq_length=max_seq_length,
        trust_remote_code=trust_remote_code,
    )  # fmt: skip


def score_pairs(model: TappedModel, rows: Sequence[Row]) -> list[PairScore]:
    """(chosen, rejected) of each preference pair: log-prob (a sum, in nats), tokens, features.

    features: per SAE that the model was opened with, the mean over the response, its non-zeros.
    Raises: DataError naming the row that cannot be used.
    """
    return model.score(rows)


def read_cache(folder: str | Path) -> cache.ReferenceCache:
    """A reference cache, to be read: `get(key)` gives a response's score.

    The key of a response is in `keys` of `model.pair_of(row)`. Raises: CacheMismatch where there is
    no cache, FpoError when a file of it is damaged.
    """
    return cache.open_cache(folder, cache.read_identity(folder))


def train_adapters(settings: RunConfig, *, say: Say = _silent) -> Iterator[Report]:
    """Train as `fpo-mlx train` does; yields its reports, and ends with adapters on disk.

    Nothing happens until the reports are asked for. say: gets the lines that the command prints.
    Raises: FpoError as the command does; Diverged when the run left the region where it means
    anything.
    """
    return pipeline.train(settings, say=say)


def judge_adapters(
    settings: RunConfig, *, split: str = "test", measure_kl: bool = True, say: Say = _silent
) -> EvalReport:
    """Judge the adapters in `settings.train.adapter_path` on held-out pairs.

    `summary` has the means over the pairs with their 95 % intervals, `pairs` a record per pair.
    """
    return pipeline.evaluate(
        settings, adapter_path=settings.train.adapter_path, split=split, measure_kl=measure_kl,
        say=say,
    )  # fmt: skip
