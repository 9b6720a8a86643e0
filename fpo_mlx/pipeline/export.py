"""Adapters into the files of other libraries."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from fpo_mlx.storage import files
from fpo_mlx.storage.adapter_files import CONFIG, PEFT_WEIGHTS, public_name, read_adapter
from fpo_mlx.storage.outputs import Made, claim_folder

PEFT = Made(
    "a PEFT adapter",
    r"adapter_config\.json|adapter_model\.safetensors",
    whole=True,
    mark=PEFT_WEIGHTS,
)


def export(adapter_path: Path, output: Path, *, base: str | None, overwrite: bool) -> int:
    """Write adapters as PEFT loads them; the number of adapted layers.

    base: hub id of the base model, for PEFT's own look-ups (default: what training was given).
    Raises: ConfigError where the place would lose something, ModelError for an adapter that cannot
    be read or that PEFT has no form for.
    """
    from fpo_mlx.model import adapters

    claim = partial(
        claim_folder, output, "--output", PEFT, inputs=[adapter_path], overwrite=overwrite
    )
    output = claim()
    read_adapter(adapter_path)  # refuses what is none
    named = base or files.parse_json((adapter_path / CONFIG).read_text(encoding="utf-8")).get(
        "model"
    )
    name = public_name(named) if isinstance(named, str) else ""
    return adapters.export_peft(adapter_path, output, name, claim)
