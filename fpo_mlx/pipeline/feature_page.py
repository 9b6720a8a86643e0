"""`features show`: one feature's page."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fpo_mlx.config import RunConfig
from fpo_mlx.data.feature_files import read_labels
from fpo_mlx.errors import ConfigError, DataError
from fpo_mlx.judge.feature_report import Context
from fpo_mlx.judge.scaling import Scaled, Scaling, wanting
from fpo_mlx.pipeline.features import link, tapped_policy
from fpo_mlx.pipeline.job import (
    Job,
    Say,
    need_features,
    one_sae,
    open_job,
    read_pairs,
    read_sae,
    warn_of_adapters,
)
from fpo_mlx.pipeline.origins import warn_of_start
from fpo_mlx.records import Passage, SaeWeights, result_file

if TYPE_CHECKING:
    from fpo_mlx.judge.feature_page import Activity

TOKENS, NEIGHBOURS = 10, 10


@dataclass(frozen=True)
class FeaturePage:
    """before: the reference; after and what follows it: with an adapter."""

    feature: int
    sae: str
    site: str
    model: str
    label: str
    link: str
    pairs: int
    split: str
    before: Activity
    contexts: list[Context]  # under the adapter where there is one
    similar: list[tuple[int, float, str]]  # feature, cosine, label
    promoted: list[tuple[str, float]] = field(default_factory=list)  # empty: not a stream's site
    suppressed: list[tuple[str, float]] = field(default_factory=list)
    adapter_path: str | None = None
    after: Activity | None = None
    change: float | None = None
    effect_size: float | None = None
    scaling: Scaled | None = None

    def as_dict(self) -> dict[str, Any]:
        return result_file("features show", asdict(self))

    def html(self) -> str:
        """The page, for a browser."""
        from fpo_mlx import report

        return report.render_feature(self.as_dict())


def feature_page(
    config: RunConfig,
    feature: int,
    *,
    adapter_path: str | None = None,
    split: str = "valid",
    limit: int | None = None,
    examples: int = 8,
    labels: Path | None = None,
    say: Say,
) -> FeaturePage:
    """What a feature does on a split's answers, and what an adapter did to it.

    Raises: ConfigError for several SAEs or a feature that there is not; DataError without pairs.
    """
    from fpo_mlx.judge.feature_scan import pair_texts
    from fpo_mlx.model.adapters import read_spec

    one = one_sae(config, "features show")
    need_features(config, "features show")
    if adapter_path:
        read_spec(Path(adapter_path))  # before the long part
    job = open_job(config, say=say, need_sae=True)
    sae = job.saes[0]
    if not 0 <= feature < sae.n_features:
        raise ConfigError(f"feature {feature}: the SAE has features 0 to {sae.n_features - 1}.")
    known = read_labels(labels)[0] if labels else {}
    if adapter_path:
        warn_of_adapters([adapter_path], config, job.model_path, say, job.identity.model)
        warn_of_start([adapter_path], config.train.init_adapter, say)
    pairs = read_pairs(job, split, say)[:limit]
    if not pairs:
        raise DataError(f"--split {split}: no pairs to look at.")
    whole = read_sae(one, config.reference, say)
    return _page(
        job, whole, feature, list(pair_texts(pairs)), adapter_path, examples, known, split, say
    )


def _page(
    job: Job, whole: SaeWeights, feature: int, texts: list[Passage], adapter: str | None,
    examples: int, known: dict[int, str], split: str, say: Say,
) -> FeaturePage:  # fmt: skip
    import numpy as np

    from fpo_mlx.judge import feature_page as pages
    from fpo_mlx.model.reader import encoder_of

    sae, decode = job.saes[0], job.tokenizer.decode
    assert sae.site is not None
    of_both = [job.adapter, adapter] if adapter else [job.adapter]
    policies = [tapped_policy(job, one, say) for one in of_both]
    scaling = Scaling(whole, [feature]) if adapter and not wanting(whole) else None
    values, contexts = pages.watch(
        policies, encoder_of(sae), texts, feature, examples, decode, scaling
    )
    more: dict[str, Any] = {}
    if adapter:
        change, effect = pages.moved(*values)
        more = {"adapter_path": adapter, "change": change, "effect_size": effect}
        more["scaling"] = scaling.results()[0] if scaling else None
    top = max(float(np.abs(v).max()) for of_model in values for v in of_model)
    figures = [pages.activity(of_model, top) for of_model in values]
    near: list[tuple[int, float, str]] = []
    if whole.w_dec is not None:
        near = [
            (i, c, known.get(i, "")) for i, c in pages.similar(whole.w_dec, feature, NEIGHBOURS)
        ]
        row = whole.w_dec[feature]
        weights = pages.logit_weights(policies[0], sae.site, row) if whole.writes_back else None
        if weights is not None:
            more["promoted"], more["suppressed"] = pages.extremes(weights, TOKENS, decode)
    return FeaturePage(
        feature, job.config.reference.sae[0], str(sae.site), job.model_path.name,
        known.get(feature, ""), link(sae, feature), len(texts) // 2, split, figures[0],
        contexts, near, after=figures[1] if adapter else None, **more,
    )  # fmt: skip
