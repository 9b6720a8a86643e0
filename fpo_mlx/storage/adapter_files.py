"""What an adapter folder says of itself, whoever wrote it: mlx-lm, its older versions, or PEFT.

mlx-lm: adapters.safetensors with `<path>.lora_a` [in, r] and `.lora_b` [r, out]; the layer adds
scale x A B. PEFT: adapter_model.safetensors with `base_model.model.<path>.lora_A.weight` [r, in]
and `.lora_B.weight` [out, r]; the layer adds alpha / r (with rsLoRA alpha / sqrt(r)) x B A.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fpo_mlx.errors import ModelError
from fpo_mlx.storage import files
from fpo_mlx.storage.hub import unpinned
from fpo_mlx.storage.limits import NOT_TEXT
from fpo_mlx.storage.tensors import read_header

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
PEFT_WEIGHTS = "adapter_model.safetensors"
RUN = "run.json"  # what a run says of itself
EARLIER = "earlier"  # in it: sha256 of the adapters that the folder held when a run went on
TEMPLATE = "chat_template.jinja"  # of any model's folder; an adapter's has that of its training
PREFIX = "base_model.model."
PARTS = {"lora_A": "lora_a", "lora_B": "lora_b", "lora_magnitude_vector": "m"}  # PEFT's: mlx-lm's
_TENSOR = re.compile(r"(?:base_model\.model\.)?(.+?)\.(lora_A|lora_B|lora_magnitude_vector)\b.*")
# how mlx-lm's and transformers' names of the blocks begin
_THEIRS = {
    "model.layers.": "model.layers.",
    "language_model.model.layers.": "model.language_model.layers.",
}
# PEFT's settings that change what a layer computes in ways that mlx-lm's layers do not know
_BEYOND = (
    "modules_to_save", "lora_bias", "layer_replication", "target_parameters", "use_qalora",
    "trainable_token_indices", "alora_invocation_tokens", "use_bdlora", "arrow_config",
)  # fmt: skip
_OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")  # these starts change the base too


def run_of(adapter: Path) -> Path:
    """The folder of the run that an adapter is of: of one in a run's best/ the one above."""
    inner = adapter.name == "best" and not (adapter / RUN).is_file()
    return adapter.parent if inner else adapter


def own_template(adapter: Path) -> Path | None:
    """The chat template beside an adapter: that of its training."""
    place = run_of(adapter) / TEMPLATE
    return place if place.is_file() else None


def model_template(folder: Path) -> str | None:
    """The chat template of a model's folder, as its file or its tokenizer's settings have it."""
    place, settings = folder / TEMPLATE, folder / "tokenizer_config.json"
    if place.is_file():
        return place.read_text(encoding="utf-8", errors="replace")
    found = files.parse_json(settings.read_bytes()) if settings.is_file() else {}
    inner = found.get("chat_template") if isinstance(found, dict) else None
    return inner if isinstance(inner, str) else None


@dataclass(frozen=True)
class AdapterFile:
    """One adapter folder. For PEFT rank and scale are the largest rank and its scale.

    num_layers: None where the files do not say (PEFT). keys: as written; None where absent, and
    then what is adapted is what has tensors: mlx-lm's default has changed since.
    """

    folder: Path
    weights: Path
    kind: str  # "lora" | "dora"
    rank: int
    scale: float  # multiplies A B
    dropout: float
    num_layers: int | None
    keys: tuple[str, ...] | None
    paths: tuple[str, ...]  # of the layers that have tensors; empty without a file of weights
    layers: Mapping[str, PeftLayer] = field(default_factory=dict)  # by path; empty for mlx-lm's
    left_out: tuple[str, ...] = ()  # paths in towers of vision or audio, which text never meets

    @property
    def peft(self) -> bool:
        return self.weights.name == PEFT_WEIGHTS

    @property
    def digest(self) -> str | None:
        """sha256 of the weights, by which `report` knows whose a result is; None without them."""
        return files.known_digest(self.weights)


@dataclass(frozen=True)
class PeftLayer:
    """One adapted layer of a PEFT file. parts: mlx-lm's leaf -> name of the tensor in the file."""

    parts: Mapping[str, str]
    rank: int
    scale: float


def read_adapter(folder: Path) -> AdapterFile:
    """The configuration of an adapter folder, and of PEFT's the names and ranks of its layers.

    Raises: ModelError when the folder is not an adapter of a kind that can be used here.
    """
    path = folder / CONFIG
    try:
        config = files.read_object(path)
        if is_peft(config):
            return _read_peft(folder, config)
        return _read_mlx(folder, config)
    except FileNotFoundError as error:
        if error.filename != str(path):
            raise
        raise ModelError(_nothing_there(folder)) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise ModelError(
            f"{path}: not an adapter configuration that can be read ({error!r}). Wanted what "
            "mlx-lm (lora_parameters with rank and scale, num_layers) or PEFT (r, lora_alpha) "
            "writes."
        ) from error


def is_peft(config: Mapping[str, Any]) -> bool:
    """Whether an adapter's configuration is PEFT's; its oldest versions name no type."""
    return "peft_type" in config or ("r" in config and "lora_alpha" in config)


def _nothing_there(folder: Path) -> str:
    if (folder / "adapters.npz").is_file():
        return (
            f"{folder}: found adapters.npz, as mlx-lm wrote it before 2024, and no {CONFIG}. Its "
            "rank and scale are not in the file: train it again, or fuse it with the mlx-lm that "
            "made it."
        )
    return (
        f"{folder}: found no {CONFIG}. Wanted an adapter folder as mlx_lm.lora, fpo-mlx train or "
        "PEFT writes it."
    )


def _read_mlx(folder: Path, config: Mapping[str, Any]) -> AdapterFile:
    lora = config["lora_parameters"]
    n = config["num_layers"] if "num_layers" in config else config["lora_layers"]  # before 0.19
    rank, scale, keys = int(lora["rank"]), float(lora["scale"]), lora.get("keys")
    dropout = float(lora.get("dropout", 0.0))
    if keys is not None and not (isinstance(keys, list) and all(type(k) is str for k in keys)):
        raise TypeError(f"keys {keys!r}")
    if rank < 1 or not 0 <= dropout < 1 or not math.isfinite(scale):
        raise ValueError(f"rank {rank}, scale {scale}, dropout {dropout}")
    if "alpha" in lora and float(lora["alpha"]) != rank:
        both = f"{scale * float(lora['alpha']) / rank:g} or {scale:g}"
        raise ModelError(
            f"{folder / CONFIG}: lora_parameters has alpha {lora['alpha']} beside scale {scale:g}. "
            f"An older mlx-lm multiplied by scale x alpha / rank, later ones by scale alone: it is "
            f"{both}. Write the one that it was trained with as scale, and remove alpha."
        )
    kind = config.get("fine_tune_type", "dora" if config.get("use_dora") else "lora")
    if kind not in ("lora", "dora"):
        raise ModelError(
            f"{folder / CONFIG}: fine_tune_type {kind!r}; wanted lora or dora. Fuse it first."
        )
    keys = None if keys is None else tuple(keys)
    weights = folder / WEIGHTS
    names = [n.rpartition(".") for n in (tensor_shapes(weights) if weights.is_file() else ())]
    paths = tuple(sorted({path for path, _, leaf in names if leaf in PARTS.values()}))
    return AdapterFile(folder, weights, kind, rank, scale, dropout, int(n), keys, paths)


def _read_peft(folder: Path, config: Mapping[str, Any]) -> AdapterFile:
    name = f"{folder}: this is a PEFT adapter"
    if (kind := config.get("peft_type", "LORA")) != "LORA":
        raise ModelError(f"{name} of the kind {kind}; wanted LORA. Merge it into the model first.")
    if not (folder / PEFT_WEIGHTS).is_file():
        old = " It has adapter_model.bin, a pickle: save it again with safetensors."
        raise ModelError(
            f"{name} without {PEFT_WEIGHTS}."
            + (old if (folder / "adapter_model.bin").is_file() else " Copy the whole folder.")
        )
    beyond = [key for key in _BEYOND if config.get(key)]
    if config.get("bias", "none") != "none":
        beyond.append(f"bias: {config['bias']}")
    if str(config.get("init_lora_weights")).lower().startswith(_OTHER_BASE):
        beyond.append(f"init_lora_weights: {config['init_lora_weights']}")
    if beyond:
        raise ModelError(
            f"{name} with {', '.join(beyond)}, which mlx-lm's layers cannot express. Merge it "
            "into the model with PEFT (merge_and_unload), and convert that."
        )
    found = _peft_layers(name, config, tensor_shapes(folder / PEFT_WEIGHTS))
    left_out = tuple(sorted(path for path in found if any(word in path for word in NOT_TEXT)))
    layers = {path: layer for path, layer in found.items() if path not in left_out}
    if not layers:
        raise ModelError(
            f"{name} of layers of vision or audio alone ({left_out[0]}, …), which a model of text "
            "does not have. Wanted one of the layers that read text."
        )
    most = max(layers.values(), key=lambda layer: layer.rank)
    dropout = float(config.get("lora_dropout") or 0.0)
    return AdapterFile(
        folder, folder / PEFT_WEIGHTS, "dora" if config.get("use_dora") else "lora", most.rank,
        most.scale, dropout if dropout < 1 else 0.0, None, None, tuple(sorted(layers)), layers,
        left_out,
    )  # fmt: skip


def _peft_layers(
    name: str, config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]
) -> dict[str, PeftLayer]:
    parts: dict[str, dict[str, str]] = {}
    odd = []
    for tensor in shapes:
        if found := _TENSOR.fullmatch(tensor):
            parts.setdefault(found[1], {})[PARTS[found[2]]] = tensor
        else:
            odd.append(tensor)
    wanted = {"lora_a", "lora_b"} | ({"m"} if config.get("use_dora") else set())
    odd += [path for path, have in parts.items() if set(have) != wanted]
    if odd or not parts:
        shown = ", ".join(sorted(odd)[:3]) or "no tensors"
        raise ModelError(
            f"{name} with tensors that mlx-lm's layers do not have: {shown}. Merge it into the "
            "model with PEFT (merge_and_unload), and convert that."
        )
    alphas = config.get("alpha_pattern") or {}
    layers = {}
    for path, names in parts.items():
        rank = int(shapes[names["lora_a"]][0])
        alpha = float(next((alphas[k] for k in alphas if _is_of(k, path)), config["lora_alpha"]))
        if not math.isfinite(alpha) or alpha == 0:
            raise ModelError(
                f"{name} whose lora_alpha of {path} is {alpha:g}: it changes nothing, or has no "
                "number. Wanted another than 0."
            )
        under = math.sqrt(rank) if config.get("use_rslora") else rank
        layers[path] = PeftLayer(names, rank, alpha / under)
    return layers


def _is_of(pattern: str, path: str) -> bool:
    """PEFT's rule: a pattern names the end of a module's path."""
    try:
        return re.match(rf"(.*\.)?({pattern})$", path) is not None
    except re.error as error:
        raise ValueError(f"alpha_pattern {pattern!r}: {error}") from error


def tensor_shapes(path: Path) -> dict[str, list[int]]:
    """Names and shapes of a safetensors file; no tensor is read. Raises: ModelError."""
    try:
        return {name: list(one.shape) for name, one in read_header(path).tensors.items()}
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error


def in_model(path: str, names: Iterable[str]) -> str | None:
    """The module of a model that a path of another library means.

    Libraries differ in what stands before the blocks (`model.language_model.layers.3.mlp`), not
    in what stands behind their number. None where nothing, or more than one, fits.
    """
    names = set(names)
    if path in names:
        return path
    found = re.search(r"(?:^|\.)((?:layers|h)\.\d+\..+)", path)
    fitting = [n for n in names if found and (n == found[1] or n.endswith("." + found[1]))]
    return fitting[0] if len(fitting) == 1 else None


def peft_config(
    *, kind: str, rank: int, scale: float, dropout: float, paths: Sequence[str], base: str
) -> dict[str, Any]:
    """adapter_config.json as PEFT reads it; target_modules are the full paths."""
    alpha = scale * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "use_dora": kind == "dora",
        "use_rslora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "modules_to_save": None,
        "target_modules": sorted(paths),
    }


def peft_path(path: str) -> str | None:
    """transformers' name of a layer that mlx-lm calls `path`; None where it has another form."""
    for ours, theirs in _THEIRS.items():
        if path.startswith(ours):
            return theirs + path.removeprefix(ours)
    return None


def peft_name(path: str, leaf: str) -> str:
    """The name of a tensor in PEFT's file. leaf: mlx-lm's."""
    theirs = {ours: name for name, ours in PARTS.items()}[leaf]
    return f"{PREFIX}{path}.{theirs}.weight"


def public_name(model: str) -> str:
    """What a file that is passed on may say of a model: its hub id, or its folder's bare name."""
    path = Path(model).expanduser()
    plain = path.is_absolute() or path.exists() or model.startswith((".", "~"))
    return path.resolve().name if plain else unpinned(model)


def deciding(adapter: AdapterFile) -> dict[str, Any]:
    """What of a PEFT configuration decides the numbers, for a fingerprint."""
    scales = {path: layer.scale for path, layer in adapter.layers.items()}
    return {"form": "peft", "kind": adapter.kind, "scales": scales}
