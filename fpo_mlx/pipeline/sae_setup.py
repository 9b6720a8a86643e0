"""What `sae train` begins with: settings that are checked, texts, the site's activations."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from fpo_mlx import data
from fpo_mlx.config import SaeTrainConfig, named
from fpo_mlx.errors import ConfigError, SaeError
from fpo_mlx.pipeline.job import Say, read_sae
from fpo_mlx.pipeline.prepared import longest, tokenizer_of
from fpo_mlx.records import SITE_KINDS, SaeWeights, Site
from fpo_mlx.reference import weights
from fpo_mlx.saetrain import rows, texts
from fpo_mlx.saetrain import sizes as sizing
from fpo_mlx.storage import outputs
from fpo_mlx.storage.adapter_files import public_name
from fpo_mlx.storage.hub import read_config, resolve_model, size_in

if TYPE_CHECKING:
    from fpo_mlx.machine.parallel import Ranks
    from fpo_mlx.saetrain.activations import Reader

CALIBRATION = 40  # documents that the norm limit and the speed are measured on
HELD_OUT_MOST = 65_536
MOST_POSITIONS = 20_000_000  # that are tokenized where the budget is a time
INIT = "init"  # among the fingerprints: of the SAE that is started from, no matter to activations
TRAINING_DOCUMENTS = "training_documents"  # among them: of what is not held out
RUN = outputs.Made(
    "an SAE and its run",
    r"cfg\.json|sae_weights\.safetensors|README\.md|run\.json|checkpoint\.safetensors|"
    r"metrics\.jsonl",
    mark="run.json",
    ways="--resume goes on with it; ",
)
STORE = outputs.Made("stored activations", r"rows\.npy|store\.json", mark=rows.STORE_ABOUT)


@dataclass(frozen=True)
class Setup:
    """A run before its budget is known."""

    config: SaeTrainConfig
    path: Path  # of the model's folder
    model_name: str  # of the hub, or its folder's bare name
    site: Site
    hidden: int
    sizes: sizing.Sizes
    train: tuple[texts.Document, ...]
    held_out: tuple[texts.Document, ...]
    reader: Reader
    fingerprints: dict[str, str]
    seconds_a_row: float  # that is kept; measured, of all processes together
    init: SaeWeights | None = None  # that the training starts from

    @property
    def ranks(self) -> Ranks:
        return self.reader.ranks

    @property
    def micro(self) -> int:
        """Rows of a micro-batch: each process has one at least."""
        whole = self.config.batch_size // self.ranks.size
        return min(self.config.micro_batch_size or whole, whole)

    @property
    def positions(self) -> int:
        return sum(int(document.keep.sum()) for document in self.train)


def check(config: SaeTrainConfig) -> None:
    faults = []
    if not config.model:
        faults.append("--model is missing. Wanted a model folder or hub id.")
    if not config.data:
        faults.append("--data is missing. Wanted texts, chats or pairs to run the model on.")
    if config.site not in SITE_KINDS:
        faults.append(f"--site {config.site}: wanted one of {', '.join(SITE_KINDS)}.")
    if config.micro_batch_size and config.micro_batch_size > config.batch_size:
        faults.append("--micro-batch-size is larger than --batch-size.")
    if faults:
        raise ConfigError("\n".join(faults))


def claim(config: SaeTrainConfig) -> None:
    """Raises: ConfigError where the run would write over anything but itself."""
    from fpo_mlx.saetrain.state import run_folder

    inputs = (config.model, config.data, config.chat_template, config.init)
    output, store = Path(config.output), Path(config.store) if config.store else None
    run = run_folder(output)
    run.check_own()
    if config.resume:
        run.check_begun()
        outputs.refuse_inputs(output, "--output", inputs, RUN)
        outputs.refuse_links(output, "--output", RUN)
    else:
        made, anew = run.as_made(RUN), config.overwrite
        outputs.claim_folder(output, "--output", made, inputs=inputs, overwrite=anew)
        if store is not None and output.resolve() in (store.resolve(), *store.resolve().parents):
            raise ConfigError(
                f"--store {store}: lies in --output {output}, which is of one SAE and its run "
                "alone. Name a folder elsewhere."
            )
    if store is not None and not (store / rows.STORE_ABOUT).is_file():
        outputs.claim_folder(store, "--store", STORE, inputs=inputs, overwrite=config.overwrite)


def open_setup(config: SaeTrainConfig, ranks: Ranks, say: Say) -> Setup:
    """Tokens first: a fault in the data should not wait for the model."""
    from fpo_mlx.model.open import open_model
    from fpo_mlx.saetrain import warm
    from fpo_mlx.saetrain.activations import OUTLIER, norm_limit, open_reader

    path = resolve_model(config.model)
    model_config = read_config(path)
    init = _init(config, say) if config.init else None
    config = config if init is None else _settled(config, init)
    layer = sizing.sizes(config, model_config, size_in(model_config, "hidden_size")).layer
    site = Site(layer, config.site)  # type: ignore[arg-type]
    documents = _documents(config, path, say)
    train, held_out = texts.split_held_out(
        documents.items, config.held_out, config.seed, HELD_OUT_MOST
    )
    fingerprints = {
        "model": weights.model_fingerprint(path), "data": documents.fingerprint(),
        TRAINING_DOCUMENTS: texts.fingerprint(train),
    }  # fmt: skip
    _agree(config, fingerprints, ranks)
    loaded = open_model(path, trust_remote_code=config.trust_remote_code, say=say)
    reader = replace(open_reader(loaded.model, loaded.config, site), ranks=ranks)
    reader.rows(train[:1])  # the first call is slower than the others
    started = time.perf_counter()
    sample = reader.rows(train[:CALIBRATION])
    seconds = ranks.first_number(time.perf_counter() - started)
    limit = ranks.first_number(norm_limit(sample))
    say(
        f"{documents.kind}: {len(train)} documents to train on, {len(held_out)} held out; left "
        f"out are first positions and norms above {limit:.4g} ({OUTLIER:.0f} medians)"
    )
    _warn_of_few(config, held_out, say)
    hidden = sample.shape[1]
    if init is not None:
        if init.d_in != hidden:
            raise SaeError(
                f"--init {config.init}: reads vectors of {init.d_in}, but at the {site} this model "
                f"has {hidden}. Start from an SAE of a model of this width."
            )
        k = config.k or int(ranks.first_number(warm.target_l0(init, sample)))
        config = replace(config, k=k)
    fingerprints |= {"norm_limit": repr(limit)}
    if init is not None:
        fingerprints[INIT] = _fingerprint(init)
    return Setup(
        config, path, public_name(config.model), site, hidden,
        sizing.sizes(config, model_config, hidden), tuple(train), tuple(held_out),
        replace(reader, limit=limit), fingerprints,
        seconds / max(len(sample), 1), init,
    )  # fmt: skip


def _agree(config: SaeTrainConfig, fingerprints: dict[str, str], ranks: Ranks) -> None:
    """Raises: ConfigError, in all processes, where one of them would train something else."""
    own = {*named("may_change", (SaeTrainConfig,)), *named("by_content", (SaeTrainConfig,))}
    settings = {name: value for name, value in asdict(config).items() if name not in own}
    for what, text in (*fingerprints.items(), ("settings", json.dumps(settings))):
        if not ranks.all_say(text):
            raise ConfigError(
                f"The processes of this run do not have the same {what}. Give all of them the same "
                "command, and copies of the same model and data at the paths it names."
            )


def _init(config: SaeTrainConfig, say: Say) -> SaeWeights:
    """The SAE to start from. Raises: SaeError where this training cannot go on with it."""
    from fpo_mlx.saetrain import warm

    assert config.init is not None
    sae = read_sae(config.init, config, say)
    warm.check(sae, config.architecture)
    if config.width not in (None, sae.n_features):
        raise SaeError(
            f"--init {config.init}: has {sae.n_features} features, and --width is {config.width}. "
            "Leave --width out."
        )
    if sae.site is not None and sae.site.kind != config.site:
        raise SaeError(
            f"--init {config.init}: reads the {sae.site}, and --site is {config.site}. Give "
            f"--site {sae.site.kind}, or start from another SAE."
        )
    of = f" of {sae.model_name}" if sae.model_name else ""
    say(f"starts from {config.init}: {sae.n_features} features on {sae.site or 'a site'}{of}")
    return sae


def _settled(config: SaeTrainConfig, init: SaeWeights) -> SaeTrainConfig:
    """What is not given is the SAE's own."""
    layer = config.layer
    if layer is None and init.site is not None:
        layer = init.site.layer
    return replace(config, layer=layer, width=init.n_features, k=config.k or init.k)


def _fingerprint(sae: SaeWeights) -> str:
    """sha256 over all that the first state is made of."""
    digest = hashlib.sha256(sae.fingerprint().encode())
    for array in (sae.w_dec, sae.b_dec):
        assert array is not None
        digest.update(array.astype("<f4").tobytes())
    return digest.hexdigest()


def _documents(config: SaeTrainConfig, model: Path, say: Say) -> texts.Documents:
    tokenizer = tokenizer_of(
        model, config.chat_template, config.chat_template_args, config.trust_remote_code, say
    )
    documents = texts.read_documents(
        config.data, tokenizer, max_length=longest(config.max_seq_length, tokenizer, say),
        kind=config.data_kind, tokens=config.tokens,
        limit=config.training_tokens or MOST_POSITIONS, columns=_columns(config),
        hub=data.HubSplits(train=config.train_split, subset=config.subset),
    )  # fmt: skip
    for note in documents.notes:
        say(note)
    return documents


def _columns(config: SaeTrainConfig) -> data.Columns:
    return data.Columns(
        config.prompt_feature, config.chosen_feature, config.rejected_feature, config.system_feature
    )


def _warn_of_few(config: SaeTrainConfig, held_out: list[texts.Document], say: Say) -> None:
    """Before the training, not after it: what is held out gives no figures."""
    positions = sum(int(document.keep.sum()) for document in held_out)
    if config.held_out and positions < 2:
        say(
            f"held-out positions: {positions}, too few to judge the SAE on; its card will have no "
            "figures. More text or a larger --held-out gives some."
        )
