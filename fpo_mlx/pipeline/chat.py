"""Talk to the base and to adapters, features steered and shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fpo_mlx.config import RunConfig, Sampling
from fpo_mlx.data.feature_files import read_labels, read_steering
from fpo_mlx.data.tokenizer import ChatTokenizer
from fpo_mlx.errors import ConfigError
from fpo_mlx.pipeline.evaluate import check_scales
from fpo_mlx.pipeline.job import (
    Say,
    at_site,
    need_model,
    one_sae,
    open_tokenizer,
    read_sae,
    warn_of_adapters,
)
from fpo_mlx.pipeline.prepared import room_for
from fpo_mlx.records import BASE, SaeWeights, shown_name
from fpo_mlx.storage.hub import read_config, resolve_model

if TYPE_CHECKING:
    from fpo_mlx.judge.speaking import Speaker

Said = tuple[str, tuple[tuple[int, float], ...]]  # a piece of text, the features behind it


@dataclass
class Chat:
    """Models that answer the same questions, each with its own memory of the conversation."""

    tokenizer: ChatTokenizer
    speakers: dict[str, Speaker]
    sae: SaeWeights | None
    labels: dict[int, str]
    system: str | None
    turns: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    cut: int | None = None  # tokens after which the last answer was cut

    def steer(self, text: str) -> None:
        """ "812=+4,97=0"; "" ends it. Raises: ConfigError, ModelError."""
        from fpo_mlx.judge.speaking import steering

        if not text.strip():
            for speaker in self.speakers.values():
                speaker.steer(None)
            return
        sae = self.sae
        if sae is None or sae.site is None:
            raise ConfigError("--steer: --sae is missing. Wanted the SAE whose features it names.")
        if sae.w_dec is None or not sae.writes_back:
            raise ConfigError(
                f"--steer: {sae.source} does not write into the stream that it reads, so its "
                "features have no direction there. Use an SAE that writes where it reads."
            )
        asked = read_steering(text, sae.n_features)
        added = next((feature for feature, amount in asked.items() if amount is not None), None)
        if added is not None and sae.normalize != "none":
            raise ConfigError(
                f"--steer: {sae.source} normalises its inputs ({sae.normalize}), so what an amount "
                f"of feature {added} is in the stream changes from token to token. Take its "
                f"direction out ({added}=0), or use an SAE without normalised inputs."
            )
        for speaker in self.speakers.values():
            speaker.steer(steering(sae.w_dec, sae.site, asked))

    def reset(self) -> None:
        first = [{"role": "system", "content": self.system}] if self.system else []
        self.turns = {name: list(first) for name in self.speakers}

    def answer(
        self, name: str, prompt: str, sampling: Sampling, *, show: int = 0
    ) -> Iterator[Said]:
        """What one model says to the next question, piece by piece. Raises: DataError."""
        turns = [*self.turns[name], {"role": "user", "content": prompt}]
        tokens = np.array(self.tokenizer.prompt_tokens(turns), dtype=np.int32)
        room = room_for(tokens, sampling.max_tokens, self.tokenizer)
        sampling = replace(sampling, max_tokens=room)
        ids: list[int] = []
        shown, text = "", ""
        speaker = self.speakers[name]
        for one in speaker.speak(tokens, sampling, self.tokenizer.eos_token_ids, show=show):
            ids.append(one.token)
            text = self.tokenizer.decode(ids, skip_special=True)
            piece = "" if text.endswith("\ufffd") else text[len(shown) :]  # half a character waits
            shown += piece
            yield piece, one.features
        if text[len(shown) :]:
            yield text[len(shown) :], ()
        ended = ids and ids[-1] in self.tokenizer.eos_token_ids
        self.cut = None if ended else room
        self.turns[name] = [*turns, {"role": "assistant", "content": text}]


def open_chat(
    config: RunConfig,
    *,
    adapter_paths: Sequence[str] = (),
    scale: float = 1.0,
    beside_base: bool = False,
    steer: str = "",
    system: str | None = None,
    labels: Path | None = None,
    show: int = 0,
    say: Say,
) -> Chat:
    """Load what speaks: the adapters, and the base where there are none or it is asked for.

    scale: part of each adapter's change. Every model is in memory on its own.
    """
    from fpo_mlx.judge.speaking import Speaker
    from fpo_mlx.model.adapters import read_spec
    from fpo_mlx.model.open import open_model
    from fpo_mlx.model.reader import encoder_of
    from fpo_mlx.model.tapping import refuse_other_widths
    from fpo_mlx.model.taps import norm_and_residual

    if scale != 1.0:
        check_scales(config, adapter_paths, [scale])
    path = resolve_model(need_model(config))
    ref = config.reference
    if show or steer:
        one_sae(config, "--show-features and --steer")
    tokenizer = open_tokenizer(config, path, say)
    for adapter in adapter_paths:
        read_spec(Path(adapter))  # before the long part
    warn_of_adapters([config.train.init_adapter, *adapter_paths], config, path, say)
    about, sae = read_config(path), None
    if len(ref.sae) == 1:
        sae = at_site(read_sae(ref.sae[0], ref, say, on_disk=True), config, about, say)
    known = read_labels(labels)[0] if labels else {}
    base = {BASE: config.train.init_adapter} if beside_base or not adapter_paths else {}
    site, encoder = (sae.site, encoder_of(sae)) if sae else (None, None)
    speakers = {}
    for name, adapter in {**base, **{shown_name(p): p for p in adapter_paths}}.items():
        model = open_model(
            path, adapter=adapter, scale=1.0 if name == BASE else scale,
            trust_remote_code=ref.trust_remote_code, say=say,
        ).model  # fmt: skip
        refuse_other_widths([sae] if sae else [], model)
        speakers[name] = Speaker(model, site, encoder, *norm_and_residual(about), say)
    chat = Chat(tokenizer, speakers, sae, known, system)
    chat.reset()
    chat.steer(steer)
    return chat
