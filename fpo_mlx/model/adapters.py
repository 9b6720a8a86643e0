"""LoRA and DoRA with mlx-lm's own layers, in mlx-lm's own files; PEFT's are read as well."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from fpo_mlx.errors import ConfigError, ModelError
from fpo_mlx.machine.upstream import leaning_on
from fpo_mlx.model.taps import behind, swap_call
from fpo_mlx.model.trees import ADAPTED, arrays_of, blocks_of, read_arrays
from fpo_mlx.records import Site
from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import CONFIG as CONFIG
from fpo_mlx.storage.adapter_files import (
    PEFT_WEIGHTS,
    AdapterFile,
    in_model,
    peft_config,
    peft_name,
    peft_path,
    public_name,
    read_adapter,
)
from fpo_mlx.storage.adapter_files import WEIGHTS as WEIGHTS


@dataclass(frozen=True)
class AdapterSpec:
    """What adapter_config.json says: enough for mlx-lm to rebuild the layers."""

    fine_tune_type: str  # "lora" | "dora"
    num_layers: int
    rank: int
    scale: float  # multiplies directly, = alpha / rank elsewhere
    dropout: float
    keys: tuple[str, ...]  # full module paths

    def as_config(self, model: str) -> dict[str, Any]:
        return {
            "fine_tune_type": self.fine_tune_type,
            "num_layers": self.num_layers,
            "lora_parameters": {
                "rank": self.rank,
                "scale": self.scale,
                "dropout": self.dropout,
                "keys": list(self.keys),
            },
            "model": public_name(model),
        }


def adapted_paths(
    model: nn.Module, num_layers: int | None, deepest: int, keys: Iterable[str] | None
) -> tuple[int, tuple[str, ...]]:
    """Full paths of the layers to adapt, counting `num_layers` back from block `deepest`.

    num_layers: None for min(16, all), -1 for all. keys: names within a block
    ("self_attn.q_proj") or full paths; None for every linear layer. Returns: (n, paths).
    Raises: ConfigError for more blocks than there are, or a key that matches nothing.
    """
    available = deepest + 1
    n = min(16, available) if num_layers is None else num_layers
    n = available if n == -1 else n
    if not 0 < n <= available:
        raise ConfigError(
            f"--num-layers {num_layers}: there are {available} blocks up to block {deepest}, the "
            f"deepest that is adapted. Use 1 to {available}, or -1 for all."
        )
    first, wanted = available - n, None if keys is None else set(keys)
    paths = _matching(model, range(first, available), wanted)
    everywhere = {name for block in blocks_of(model) for name, _ in block.named_modules()}
    lost = (wanted or set()) - set(paths) - everywhere  # a hybrid's block has not every layer
    if lost or not paths:
        _refuse_keys(model, sorted(lost or wanted or ()), first, deepest)
    return n, paths


def _refuse_keys(model: nn.Module, lost: Sequence[str], first: int, deepest: int) -> NoReturn:
    shown, more = ", ".join(lost[:3]), f" and {len(lost) - 3} more" if len(lost) > 3 else ""
    what = f"lora_parameters.keys: {shown}{more} match no layer of blocks {first} to {deepest}."
    if set(lost) <= set(block_of(model)):  # full paths, as an adapter_config.json has them
        raise ConfigError(
            f"{what} They lie in other blocks: leave them out, or adapt more (--num-layers)."
        )
    there = [name for name, m in blocks_of(model)[deepest].named_modules() if _adaptable(m)]
    raise ConfigError(
        f"{what} Only layers of blocks are adapted; those of block {deepest} are "
        f"{', '.join(sorted(there)[:12])}."
    )


def _matching(model: nn.Module, numbers: Iterable[int], wanted: set[str] | None) -> tuple[str, ...]:
    """Full paths of those layers of some blocks that a name within a block or a full path names."""
    blocks = {id(block): i for i, block in enumerate(blocks_of(model))}
    prefixes = {blocks[id(m)]: name for name, m in model.named_modules() if id(m) in blocks}
    paths = []
    for i in numbers:
        for name, module in blocks_of(model)[i].named_modules():
            path = f"{prefixes[i]}.{name}"
            if (_adaptable(module) and name) if wanted is None else wanted & {name, path}:
                paths.append(path)
    return tuple(sorted(paths))


def _adaptable(module: nn.Module) -> bool:
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    kinds = (nn.Linear, nn.QuantizedLinear, SwitchLinear, QuantizedSwitchLinear)
    return isinstance(module, kinds)


def attach(model: nn.Module, spec: AdapterSpec) -> None:
    """Put fresh adapters (lora_b = 0, so nothing changes yet) on the layers of `spec`."""
    config = {"rank": spec.rank, "scale": spec.scale, "dropout": spec.dropout}
    if spec.fine_tune_type == "dora":
        _refuse_odd_bits(model, spec.keys)
    try:
        with leaning_on("mlx-lm", "`linear_to_lora_layers`, which puts adapters on a model"):
            from mlx_lm.tuner.lora import LoRALinear
            from mlx_lm.tuner.utils import linear_to_lora_layers

            linear_to_lora_layers(
                model,
                spec.num_layers,
                {**config, "keys": set(spec.keys)},
                use_dora=spec.fine_tune_type == "dora",
            )
    except ValueError as error:
        raise ConfigError(f"--fine-tune-type {spec.fine_tune_type}: {error}") from error
    for _, module in model.named_modules():
        if type(module) is LoRALinear and not spec.dropout:
            # a proxy: its class holds the call, and a cycle would keep the weights
            swap_call(module, partial(_lora, weakref.proxy(module)))
    model.train(model.training)  # layers are made as of training, whatever the model is


def _refuse_odd_bits(model: nn.Module, keys: Iterable[str]) -> None:
    """mlx-lm's DoRA takes a packed layer's width from 32 // bits: wrong for 3, 5 and 6."""
    wanted = set(keys)
    for name, module in model.named_modules():
        bits = getattr(module, "bits", None)
        if name in wanted and bits and 32 % bits:
            raise ConfigError(
                f"--fine-tune-type dora: {name} has {bits} bits, and mlx-lm's DoRA reads layers of "
                "2, 4 or 8 bits only. Use --fine-tune-type lora, or a model of 4 or 8 bits."
            )


def _lora(layer: Any, original: Callable[[mx.array], mx.array], x: mx.array) -> mx.array:
    """mlx-lm's y + scale (x A) B, the scale applied at the rank and the sum within the product.

    Two passes over the layer's output fewer, forward and backward. Other dtypes are left to mlx-lm,
    which rounds between the two.
    """
    if x.dtype != layer.lora_a.dtype:
        return original(x)
    return mx.addmm(layer.linear(x), (x @ layer.lora_a) * layer.scale, layer.lora_b)


def read_spec(folder: Path, model: nn.Module | None = None) -> AdapterSpec:
    """What an adapter folder of mlx-lm (older versions included) or PEFT says of itself.

    `model` resolves block-relative or absent keys, and other libraries' names, to full paths
    (before any adapter is attached).
    Raises: ModelError when the folder is not an adapter of a kind that can be used here.
    """
    found = read_adapter(folder)
    n, keys = found.num_layers or -1, found.keys or found.paths
    if model is not None:
        n, keys = _peft_keys(model, found) if found.peft else _mlx_keys(model, found)
    return AdapterSpec(found.kind, n, found.rank, found.scale, found.dropout, keys)


def _peft_keys(model: nn.Module, found: AdapterFile) -> tuple[int, tuple[str, ...]]:
    """Blocks counted back from the last, and mlx-lm's names of the adapted layers."""
    blocks = block_of(model)
    paths = {path: in_model(path, blocks) for path in found.layers}
    _refuse_absent(found, [path for path, ours in paths.items() if ours is None])
    theirs: dict[str, str] = {}
    for path, ours in paths.items():
        if (other := theirs.setdefault(ours or "", path)) != path:
            raise ModelError(
                f"{found.folder}: {other} and {path} both mean {ours} in this model. Merge the "
                "adapter with PEFT into the model that it was trained on."
            )
    keys = tuple(sorted(theirs))
    return len(blocks_of(model)) - min(blocks[key] for key in keys), keys


def _mlx_keys(model: nn.Module, found: AdapterFile) -> tuple[int, tuple[str, ...]]:
    """mlx-lm's count of blocks, and every layer with a tensor, or that the keys ask one of."""
    names = {name for name, _ in model.named_modules()}
    _refuse_absent(found, set(found.paths) - names)
    last, n = len(blocks_of(model)) - 1, found.num_layers or -1  # mlx-lm counts from the end
    within = min(n, last + 1) if n > 0 else last + 1
    if found.keys is None:
        return n, found.paths or adapted_paths(model, within, last, None)[1]
    asked = set(found.keys)  # names within a block, or full paths
    inside = _matching(model, range(last + 1 - within, last + 1), asked)
    if keys := {*found.paths, *(asked & names), *inside}:
        return n, tuple(sorted(keys))
    raise ModelError(f"{found.folder}: its keys {sorted(asked)} name no layer of this model.")


def _refuse_absent(found: AdapterFile, absent: Collection[str]) -> None:
    if absent:
        whose, where = (
            ("a PEFT adapter", " within its blocks") if found.peft else ("an adapter", "")
        )
        raise ModelError(
            f"{found.folder}: this is {whose} of layers that this model does not have{where}: "
            f"{', '.join(sorted(absent)[:3])} ({len(absent)} of {len(found.paths)}). Name the "
            f"model that it was trained on{', or merge it with PEFT first' if found.peft else ''}."
        )


def load(model: nn.Module, folder: Path, *, scale: float = 1.0) -> AdapterSpec:
    """Attach and fill the adapters of a folder, times `scale`.

    Raises: ModelError naming every tensor that does not fit.
    """
    spec = read_spec(folder, model)
    attach(model, spec)
    fill(model, folder, scale=scale)
    return spec


def fill(model: nn.Module, folder: Path, *, scale: float = 1.0) -> None:
    """Read the weights of an adapter folder into layers that are attached already.

    scale: how much of the adapter's change is taken. LoRA: W + scale (change), exactly. DoRA: its
    direction and its magnitudes go by that part from the layer's own to the adapter's, so 0 is the
    base and 1 the adapter, but the weights between do not lie on a line.
    """
    found = read_adapter(folder)
    path = found.weights
    if not path.is_file():
        raise ModelError(f"{path}: no such file. Wanted the weights of an adapter folder.")
    try:
        weights, _ = read_arrays(path)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as safetensors: {error}") from error
    own = dict(parameters(model))
    if found.peft:
        weights = _from_peft(found, weights, {name.rpartition(".")[0] for name in own})
    faults = [f"{k}: not an adapter tensor of this model" for k in weights.keys() - own.keys()]
    faults += [f"{k}: missing" for k in own.keys() - weights.keys()]
    faults += [
        f"{k}: shape {weights[k].shape}, wanted {own[k].shape}"
        for k in weights.keys() & own.keys()
        if weights[k].shape != own[k].shape
    ]
    if faults:
        shown = "\n  ".join(sorted(faults)[:10])
        raise ModelError(f"{path} does not fit the model ({len(faults)} faults):\n  {shown}")
    taken = {k: v.astype(mx.float32) for k, v in weights.items()}
    update(model, taken if scale == 1.0 else part_of(own, taken, scale))


def part_of(
    own: Mapping[str, mx.array], whole: Mapping[str, mx.array], scale: float
) -> dict[str, mx.array]:
    """The adapters whose change is `scale` of that of `whole`; own: before any change."""
    return {path: _part(path, own[path], leaf, scale) for path, leaf in whole.items()}


def _part(path: str, own: mx.array, whole: mx.array, scale: float) -> mx.array:
    leaf = path.rsplit(".", 1)[-1]
    if leaf == "m":
        return own + scale * (whole - own)
    return whole * scale if leaf == "lora_b" else whole


def _from_peft(
    found: AdapterFile, weights: Mapping[str, mx.array], names: Iterable[str]
) -> dict[str, mx.array]:
    """PEFT's tensors as mlx-lm has them: factors transposed, one rank and one scale for all.

    A smaller rank is filled up with zeros; another scale goes into B. Both leave A B as it was.
    """
    out, names = {}, set(names)
    for path, layer in found.layers.items():
        ours = in_model(path, names) or path
        tensors = {leaf: weights[name].astype(mx.float32) for leaf, name in layer.parts.items()}
        a, b = tensors["lora_a"].T, tensors["lora_b"].T * (layer.scale / found.scale)
        missing = found.rank - layer.rank
        out[f"{ours}.lora_a"] = mx.pad(a, [(0, 0), (0, missing)])
        out[f"{ours}.lora_b"] = mx.pad(b, [(0, missing), (0, 0)])
        if "m" in tensors:
            out[f"{ours}.m"] = tensors["m"].reshape(-1)
    return out


def parameters(model: nn.Module) -> list[tuple[str, mx.array]]:
    """(path, array) of every adapter leaf, sorted by path."""
    flat = arrays_of(model.parameters())
    return sorted((k, v) for k, v in flat if k.rsplit(".", 1)[-1] in ADAPTED)


def update(model: nn.Module, weights: Mapping[str, mx.array]) -> None:
    model.update(tree_unflatten(list(weights.items())))


def export_peft(
    source: Path, target: Path, base: str, check: Callable[[], object] = lambda: None
) -> int:
    """Write an adapter folder as PEFT loads it, whole or not at all; the number of layers.

    base: what the configuration says of the base model; check: as
    `files.atomic_folder` has it. Raises: ModelError for layers that PEFT has no file form for.
    """
    found = read_adapter(source)
    if found.peft:
        raise ModelError(f"{source}: this is a PEFT adapter already. Use it as it is.")
    try:
        weights, _ = read_arrays(found.weights)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"{found.weights} cannot be read as safetensors: {error}") from error
    paths = sorted({name.rpartition(".")[0] for name in weights})
    theirs = {path: peft_path(path) for path in paths}
    if odd := [p for p in paths if theirs[p] is None or not _two_dimensional(weights, p)]:
        raise ModelError(
            f"{source}: PEFT's files have no form for an adapter of {odd[0]} ({len(odd)} of "
            f"{len(paths)} layers). Fuse it: `fpo-mlx fuse --dequantize`."
        )
    tensors = {}
    for name, array in weights.items():
        path, _, leaf = name.rpartition(".")
        tensors[peft_name(theirs[path] or path, leaf)] = array if leaf == "m" else array.T
    config = peft_config(
        kind=found.kind, rank=found.rank, scale=found.scale, dropout=found.dropout,
        paths=[path for path in theirs.values() if path], base=base,
    )  # fmt: skip
    with files.atomic_folder(target, check) as folder:
        whole = {name: mx.contiguous(array) for name, array in tensors.items()}
        mx.save_safetensors(str(folder / PEFT_WEIGHTS), whole, metadata={"format": "pt"})
        files.write_json(folder / CONFIG, config)
    return len(paths)


def _two_dimensional(weights: Mapping[str, mx.array], path: str) -> bool:
    return f"{path}.lora_a" in weights and weights[f"{path}.lora_a"].ndim == 2


def save(path: Path, weights: Mapping[str, mx.array]) -> None:
    """One safetensors file, whole or not at all."""
    with files.atomic_path(path) as temporary:
        mx.save_safetensors(str(temporary), dict(weights), metadata={"format": "mlx"})


def unseen(model: nn.Module, sites: Iterable[Site]) -> set[str]:
    """Paths within the blocks of what none of these sites sees anything of; no sites: none."""
    inner = list(_within(model))
    found = [
        {path for path, layer, name in inner if _is_behind(model, site, layer, name)}
        for site in sites
    ]
    return set.intersection(*found) if found else set()


def _is_behind(model: nn.Module, site: Site, layer: int, name: str) -> bool:
    if layer != site.layer or site.kind == "resid_pre":
        return layer >= site.layer
    after = behind(blocks_of(model)[layer], site.kind)
    return any(f"{name}.".startswith(f"{one}.") for one in after)


def block_of(model: nn.Module) -> dict[str, int]:
    """Index of the block for every module path within the blocks."""
    return {path: layer for path, layer, _ in _within(model)}


def _within(model: nn.Module) -> Iterator[tuple[str, int, str]]:
    """Every module within the blocks: its path, its block's index, its name there."""
    blocks = {id(block): i for i, block in enumerate(blocks_of(model))}
    prefixes = {name: blocks[id(m)] for name, m in model.named_modules() if id(m) in blocks}
    for prefix, layer in prefixes.items():
        for name, _ in blocks_of(model)[layer].named_modules():
            if name:
                yield f"{prefix}.{name}", layer, name
