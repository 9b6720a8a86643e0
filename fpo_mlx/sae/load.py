"""Which family a file belongs to, and its reader."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from fpo_mlx.errors import SaeError
from fpo_mlx.records import SaeWeights
from fpo_mlx.sae.arrays import open_tensors
from fpo_mlx.sae.common import LoadOptions, Source
from fpo_mlx.sae.families import (
    connor_rob,
    dictionary_learning,
    gemma_scope,
    gemma_scope2,
    linear,
    llama_scope,
    llamascopium,
    openai,
    qwen_scope,
    saelens,
    sparsify,
    transcoders,
)
from fpo_mlx.sae.files import weight_file
from fpo_mlx.sae.registry import facts


@dataclass(frozen=True)
class Family:
    """One layout on disk: how it is recognised, and how it is read."""

    name: str
    matches: Callable[[Source], bool]
    load: Callable[[Source], SaeWeights]
    asks: tuple[str, ...] = ()  # the readings that a user may have to choose, of _READINGS


_READINGS = {  # option of load_sae -> its flag, and the value that says nothing
    "k": ("--sae-k", None),
    "norm_scaling_factor": ("--norm-scaling-factor", None),
    "llama_scope_gate": ("--llama-scope-gate", "authors"),
}
_K, _FACTOR, _GATE = _READINGS
# the first match wins: the more particular come first
_FAMILIES: tuple[Family, ...] = (
    Family(saelens.FORMAT, saelens.matches, saelens.load, (_K, _FACTOR)),
    Family(gemma_scope.FORMAT, gemma_scope.matches, gemma_scope.load),
    Family(gemma_scope2.FORMAT, gemma_scope2.matches, gemma_scope2.load),
    Family(sparsify.FORMAT, sparsify.matches, sparsify.load, (_K,)),
    Family(
        dictionary_learning.FORMAT,
        dictionary_learning.matches,
        dictionary_learning.load,
        (_K,),
    ),
    Family(llama_scope.FORMAT, llama_scope.matches, llama_scope.load, (_FACTOR, _GATE)),
    Family(llama_scope.SAELENS_FORMAT, lambda _: False, llama_scope.load_saelens, (_FACTOR, _GATE)),
    Family(llama_scope.R1_FORMAT, llama_scope.matches_r1, llama_scope.load_r1, (_FACTOR, _GATE)),
    Family(llamascopium.FORMAT, llamascopium.matches, llamascopium.load, (_K, _FACTOR)),
    Family(qwen_scope.FORMAT, qwen_scope.matches, qwen_scope.load, (_K,)),
    Family(openai.FORMAT, openai.matches, openai.load, (_K,)),
    Family(linear.GOODFIRE, linear.matches_goodfire, linear.load_goodfire),
    Family(linear.QRESEARCH, linear.matches_qresearch, linear.load_qresearch),
    Family(connor_rob.FORMAT, connor_rob.matches, connor_rob.load),
    Family(transcoders.MWHANNA, transcoders.matches_mwhanna, transcoders.load_mwhanna),
    Family(transcoders.MNTSS, transcoders.matches_mntss, transcoders.load_mntss),
)
FORMATS: tuple[str, ...] = tuple(family.name for family in _FAMILIES)


def load_sae(
    path: Path,
    *,
    format: str | None = None,
    allow_pickle: bool = False,
    decoder: bool = True,
    on_disk: bool = False,
    k: int | None = None,
    llama_scope_gate: Literal["authors", "saelens"] = "authors",
    norm_scaling_factor: float | None = None,
    name: str = "",
) -> SaeWeights:
    """Read one SAE into the canonical form.

    path: its folder or weight file; a folder that holds exactly one SAE further down will do.
    format: one of FORMATS, to skip the recognition. allow_pickle: read .pt files, tensors only.
    decoder: False leaves w_dec out. on_disk: the matrices stay in the file and are read by blocks
    (`stored.Stored`), so that loading takes no memory. k: where the files do not say it.
    llama_scope_gate: "saelens" leaves the decoder norm out of Llama Scope's gate, as SAELens does.
    norm_scaling_factor: the scale of the inputs in training, where the files do not hold it.
    name: the name the user gave (hub id), searched for layer, site and k beside the path.

    Raises SaeError for a file that is missing, damaged, of no known family, or refused.
    """
    options = LoadOptions(
        allow_pickle, decoder, k, llama_scope_gate, norm_scaling_factor, name, on_disk
    )
    source = _open(Path(path), options)
    family = _recognise(source, format)
    _refuse_idle(family, source)
    try:
        sae = family.load(source)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SaeError(
            f"{source.file}: its configuration cannot be understood as {family.name} "
            f"({type(error).__name__}: {error}). Compare it with one that its tool wrote, or "
            "name another --sae-format."
        ) from error
    if k is not None and sae.k is None:
        raise SaeError(
            f"{source.file}: is a {sae.activation} SAE, which has no k. Leave --sae-k out."
        )
    known = facts(source.name)
    if known is not None and sae.neuronpedia is None:
        sae = replace(sae, neuronpedia=known.neuronpedia)
    return sae if decoder else replace(sae, w_dec=None, b_dec=None)


def _refuse_idle(family: Family, source: Source) -> None:
    """A reading that the family does not ask for would be believed and change nothing."""
    for name, (flag, silent) in _READINGS.items():
        if getattr(source.options, name) != silent and name not in family.asks:
            raise SaeError(
                f"{source.file}: {flag} says nothing to a {family.name} SAE. Leave it out, or name "
                "another --sae-format."
            )


def sniff(path: Path, *, allow_pickle: bool = False) -> str:
    """The family's name (one of FORMATS) of the SAE at `path`. Raises SaeError if unknown."""
    return _recognise(_open(Path(path), LoadOptions(allow_pickle=allow_pickle)), None).name


def _recognise(source: Source, format: str | None) -> Family:
    if format is not None and format not in FORMATS:
        raise SaeError(f"SAE format {format!r} is unknown; wanted one of {', '.join(FORMATS)}.")
    for family in _FAMILIES:
        if family.name == format or (format is None and family.matches(source)):
            return family
    if "D" in source.tensors and any("attn_layers" in name for name in source.tensors.shapes):
        raise SaeError(
            f"{source.file}: is a temporal SAE, whose features of a token depend on the whole "
            "sequence before it. Only SAEs that encode each token by itself are supported."
        )
    raise SaeError(
        f"{source.file}: is no SAE format that is known here; its tensors are "
        f"{', '.join(sorted(source.tensors.shapes)) or 'none'}. Known: {', '.join(FORMATS)}. "
        "If it is one of them, name it with --sae-format."
    )


def _open(path: Path, options: LoadOptions) -> Source:
    file = weight_file(path)
    return Source(open_tensors(file, allow_pickle=options.allow_pickle), options)
