"""Every SAE layout through `fpo-mlx sae encode`, against activations that others computed.

Usage: check_fixtures.py [--shared FOLDER] [--seeds N]
FOLDER (default: shared/fixtures/sae beside the checkout, when it is there) holds one folder for
each SAE: its native files, inputs.npy, expected_acts.npy of the peer that wrote it, fixture.json.
Beside these, the tests' own layouts are written anew with N other seeds (default 5) and held
against their formulas in float64. Prints for each the largest difference relative to the largest
activation, or the refusal. Exit code 1 when one is above 1e-5, or read where it must be refused.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from click.testing import CliRunner

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "support")]

from sae_files import D  # noqa: E402
from tiny_saes import CASES  # noqa: E402

from fpo_mlx.cli import main as command  # noqa: E402
from fpo_mlx.sae.arrays import PICKLED_SUFFIXES  # noqa: E402

ALLOWED = 1e-5
FIRST_SEED = 1000  # the tests use small ones
REFUSED = {  # fixtures that must not be read, and a word of the reason
    "gemma_scope_embedding": "token embeddings",
    "saelens_matching_pursuit": "iterative search",
    "temporal_sae": "whole sequence",
}


@dataclass(frozen=True)
class Line:
    """One row of the table. difference: None for a refusal, which is then in `text`."""

    family: str
    name: str
    difference: float | None
    text: str = ""
    good: bool = True

    def __str__(self) -> str:
        shown = f"{self.difference:.1e}" if self.difference is not None else "refused"
        return (
            f"{'' if self.good else 'WRONG '}{self.family:<26}{self.name:<44}{shown}  {self.text}"
        )


def encoded(sae: Path, inputs: Path, flags: Sequence[str]) -> np.ndarray | str:
    """The activations that the command writes, or its message."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "acts.npy"
        words = ["sae", "encode", "--sae", sae, "--input", inputs, "--output", out, *flags]
        done = CliRunner().invoke(command, [str(word) for word in words])
        if done.exit_code == 0:
            return np.load(out)
        if done.exit_code != 1 or out.exists():
            raise SystemExit(f"{sae}: exit code {done.exit_code}\n{done.output}")
        return done.stderr.strip()


def compared(family: str, name: str, found: np.ndarray | str, wanted: np.ndarray) -> Line:
    if isinstance(found, str):
        return Line(family, name, None, found, good=False)
    difference = float(np.abs(found - wanted).max() / np.abs(wanted).max())
    return Line(family, name, difference, good=difference <= ALLOWED)


def refused(family: str, name: str, found: np.ndarray | str, reason: str) -> Line:
    if isinstance(found, str):
        return Line(family, name, None, f"({reason})", reason in found)
    return Line(family, name, None, f"was read; wanted a refusal: {reason}", good=False)


def peers(folder: Path) -> Iterator[Line]:
    """The lines of one folder of the peers' fixtures."""
    info = json.loads((folder / "fixture.json").read_text())
    family, inputs, flags = info["format"], folder / "inputs.npy", []
    if any(file.endswith(PICKLED_SUFFIXES) for file in info["files"]):
        found = encoded(folder, inputs, flags)
        yield refused(family, f"{folder.name}, no flag", found, "--allow-pickle")
        flags.append("--allow-pickle")
    if family == "qwen_scope":  # its k is in the repository's name, which a bare folder lacks
        flags += ["--sae-k", str(info["k"])]
    if folder.name in REFUSED:
        yield refused(family, folder.name, encoded(folder, inputs, flags), REFUSED[folder.name])
        return
    wanted = np.load(folder / "expected_acts.npy")
    if folder.name == "llama_scope_original":
        authors = np.load(folder / "expected_acts_lm_saes.npy")
        found = encoded(folder, inputs, flags)
        yield compared(family, f"{folder.name}, authors' gate", found, authors)
        flags += ["--llama-scope-gate", "saelens"]
    found = encoded(folder, inputs, flags)
    if info.get("compare") == "sorted_values_and_recon" and not isinstance(found, str):
        found, wanted = np.sort(found, axis=1), np.sort(wanted, axis=1)  # any of equal ones will do
    yield compared(family, folder.name, found, wanted)


def fresh(seed: int) -> Iterator[Line]:
    """Every layout of the tests with new random weights and inputs."""
    x = np.random.default_rng(seed).standard_normal((16, D)).astype(np.float32) * 3
    for case in CASES:
        with tempfile.TemporaryDirectory() as name:
            made = case.make(Path(name), np.random.default_rng(seed))
            np.save(Path(name) / "x.npy", x)
            flags = ["--allow-pickle"] if case.pickled else []
            for option, value in made.options.items():
                flags += ["--" + option.replace("_", "-"), str(value)]
            found = encoded(made.path, Path(name) / "x.npy", flags)
            label = f"{case.name}, seed {seed}"
            yield compared(case.format, label, found, made.encode(x.astype(np.float64)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    beside = ROOT.parent / "shared" / "fixtures" / "sae"
    parser.add_argument("--shared", type=Path, default=beside)
    parser.add_argument("--seeds", type=int, default=5)
    args = parser.parse_args()
    lines: list[Line] = []
    for facts in sorted(args.shared.glob("*/fixture.json")):
        for line in peers(facts.parent):
            print(line, flush=True)
            lines.append(line)
    print(f"{len(lines)} checks of {args.shared}" if lines else f"nothing at {args.shared}")
    new = [line for i in range(args.seeds) for line in fresh(FIRST_SEED + i)]
    worst: dict[str, Line] = {}
    for line in new:
        old = worst.get(line.family, line)
        worst[line.family] = max(old, line, key=lambda one: (not one.good, one.difference or 0.0))
    for line in worst.values():
        print(line)
    print(f"{len(new)} fresh SAEs, {args.seeds} seeds; the worst of each family above")
    bad = [line for line in lines + new if not line.good]
    for line in bad:
        print(line)
    measured = [line.difference for line in lines + new if line.difference is not None]
    print(f"largest difference {max(measured, default=0):.1e}, {len(bad)} wrong")
    return 1 if bad or not measured else 0


if __name__ == "__main__":
    sys.exit(main())
