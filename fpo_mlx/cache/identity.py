"""What a reference cache was made of, and whether that is what a run wants."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from fpo_mlx.errors import CacheMismatch

FORMAT = "fpo-mlx.reference"
VERSION = 1


@dataclass(frozen=True)
class Provenance:
    """By what rows were made: recorded, and of no weight when caches are compared."""

    dtype: str = "float32"  # of the reference pass
    backend: str = "mlx"


@dataclass(frozen=True)
class CacheIdentity:
    """The fingerprints of everything that a score depends on besides the token ids."""

    model: str  # content fingerprint of the weights and the config fields that change numbers
    tokenizer: str  # fingerprint of tokenizer and chat template
    adapter: str = "none"
    saes: tuple[tuple[str, str], ...] = ()  # (SaeWeights.fingerprint(), str(site)) of each SAE
    pooled_keep: int | None = None  # None: every non-zero is stored
    projected: str | None = None  # fingerprint of what the passes went on without, if anything

    def digest(self) -> str:
        """sha256 over the fields and the version of the format."""
        parts = [FORMAT, VERSION, self.to_json()]
        text = json.dumps(parts, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        values = vars(self) | {"saes": [list(sae) for sae in self.saes]}
        if self.projected is None:  # as in caches that know nothing of it
            del values["projected"]
        return values


def to_manifest(identity: CacheIdentity, made: Provenance) -> dict[str, Any]:
    """What manifest.json says; version 1 keeps both under `identity`."""
    both = identity.to_json() | vars(made)
    return {"format": FORMAT, "version": VERSION, "identity": both, "digest": identity.digest()}


def from_manifest(values: dict) -> tuple[CacheIdentity, Provenance]:
    """Raises KeyError, TypeError or ValueError on anything but `to_manifest`'s `identity`."""
    known: dict[str, Any] = {"projected": None, **values}
    known = {f.name: known[f.name] for f in fields(CacheIdentity)}
    known["saes"] = tuple((str(sae), str(site)) for sae, site in values["saes"])
    for name in ("model", "tokenizer", "adapter", "dtype", "backend"):
        if not isinstance(values[name], str):
            raise TypeError(f"{name} is not a string")
    if not isinstance(known["projected"], str | None):
        raise TypeError("projected is not a string")
    if not isinstance(known["pooled_keep"], int | None):
        raise TypeError("pooled_keep is not a number")
    return CacheIdentity(**known), Provenance(values["dtype"], values["backend"])


def differences(found: CacheIdentity, wanted: CacheIdentity) -> dict[str, tuple[str, str]]:
    """{field: (found, wanted)} of the deciding fields that forbid to read `found` as `wanted`.

    A cache that holds more SAEs than are wanted serves: its other features are not looked at.
    """
    faults: dict[str, tuple[str, str]] = {}
    for name in ("model", "adapter", "tokenizer", "projected"):
        old, new = getattr(found, name), getattr(wanted, name)
        if old != new:
            faults[name] = (old or "nothing", new or "nothing")
    if not set(wanted.saes) <= set(found.saes):
        faults["saes"] = (_show_saes(found), _show_saes(wanted))
    # what was kept of the features matters only to a run that reads features
    if wanted.saes and found.pooled_keep != wanted.pooled_keep:
        faults["pooled_keep"] = (_show_keep(found), _show_keep(wanted))
    return faults


def check_same(
    where: Path, found: CacheIdentity, wanted: CacheIdentity, allow: Collection[str] = ()
) -> None:
    """Raises CacheMismatch naming each differing field with both fingerprints."""
    faults = {k: v for k, v in differences(found, wanted).items() if k not in allow}
    if not faults:
        return
    lines = [f"  {name}: cache {old}, this run {new}" for name, (old, new) in faults.items()]
    raise CacheMismatch(
        f"{where} is a reference cache that was made for something else:\n"
        + "\n".join(lines)
        + "\nRun `fpo-mlx precompute` into another folder, or name the cache that belongs to this "
        "model, adapter, tokenizer and SAE."
    )


def _show_saes(identity: CacheIdentity) -> str:
    return ", ".join(f"{sae} ({site})" for sae, site in identity.saes) or "none"


def _show_keep(identity: CacheIdentity) -> str:
    return "all" if identity.pooled_keep is None else f"largest {identity.pooled_keep}"
