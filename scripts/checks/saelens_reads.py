"""Does SAELens load what `write_saelens` writes, and encode the same?

Usage: check_saelens.py [--venv FOLDER]
Makes its own virtual environment (torch, then sae-lens 6.54.12; a few minutes the first time),
writes an SAE of every activation in three dtypes, has SAELens encode the same inputs, and prints
the largest difference of each relative to the largest activation. Exit code 1 if one exceeds 1e-5.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import venv
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from fpo_mlx.records import SaeWeights, Site  # noqa: E402
from fpo_mlx.sae import load_sae  # noqa: E402
from fpo_mlx.sae.convert import write_saelens  # noqa: E402
from fpo_mlx.sae.encode import decode, encode  # noqa: E402

PACKAGES = ("torch==2.13.0", "sae-lens==6.54.12")  # torch first: its CPU build, not CUDA's wheels
TOLERANCE = 1e-5
PEER = """
import sys, numpy as np, torch
from pathlib import Path
from sae_lens import SAE
for folder in sorted(Path(sys.argv[1]).iterdir()):
    x = torch.from_numpy(np.load(folder / "inputs.npy"))
    sae = SAE.load_from_disk(folder, dtype="float32")
    with torch.no_grad():
        acts = sae.encode(x)
        np.save(folder / "peer_acts.npy", acts.numpy())
        np.save(folder / "peer_recon.npy", sae.decode(acts).numpy())
"""


def saes() -> dict[str, SaeWeights]:
    """One SAE of each form, with random weights."""
    rng = np.random.default_rng(0)
    d, f = 24, 96

    def array(*shape: int, scale: float = 1.0) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    relu = SaeWeights(
        activation="relu",
        w_enc=array(d, f, scale=d**-0.5),
        b_enc=array(f, scale=0.3),
        w_dec=array(f, d),
        b_dec=array(d),
        site=Site(3, "resid_post"),
        model_name="tiny",
    )
    threshold = np.abs(array(f))
    return {
        "relu": relu,
        "relu_b_dec": replace(relu, b_in=relu.b_dec),
        "relu_other_bias": replace(relu, b_in=array(d)),
        "layer_norm": replace(relu, normalize="layer_norm", b_in=relu.b_dec),
        "constant_norm": replace(relu, normalize="constant_norm"),
        "jumprelu": replace(relu, activation="jumprelu", threshold=threshold),
        "jumprelu_scaled": replace(
            relu, activation="jumprelu", threshold=threshold, act_scale=np.abs(array(f)) + 0.1
        ),
        "gated": replace(
            relu,
            activation="gated",
            gate_scale=np.exp(array(f)),
            gate_bias=array(f),
            b_in=array(d),
        ),
        "topk": replace(relu, activation="topk", k=8, b_in=relu.b_dec),
        "abstopk": replace(relu, activation="abstopk", k=8),
        "transcoder": replace(
            relu, transcoder=True, site=Site(3, "mlp_in"), w_dec=array(f, d + 4), b_dec=array(d + 4)
        ),
    }


def make_venv(folder: Path) -> Path:
    """The venv's python, with the packages installed once."""
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        for package in PACKAGES:
            subprocess.run([python, "-m", "pip", "install", "-q", package], check=True)
    return python


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=Path(".venv-saelens"))
    python = make_venv(parser.parse_args().venv)
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        x = np.random.default_rng(1).standard_normal((64, 24)).astype(np.float32)
        for label, sae in saes().items():
            for dtype in ("float32", "float16", "bfloat16"):
                folder = work / f"{label}-{dtype}"
                write_saelens(sae, folder, dtype)
                np.save(folder / "inputs.npy", x)
        subprocess.run([python, "-W", "ignore", "-c", PEER, work], check=True)
        for folder in sorted(work.iterdir()):
            sae = load_sae(folder)
            acts, peer = encode(sae, x), np.load(folder / "peer_acts.npy")
            recon, peer_recon = decode(sae, acts, x), np.load(folder / "peer_recon.npy")
            errors = [
                float(np.abs(a - b).max() / np.abs(b).max())
                for a, b in ((acts, peer), (recon, peer_recon))
            ]
            same = int(((acts != 0) != (peer != 0)).sum())
            exact = ""
            if folder.name.endswith("-float32"):
                truth = encode(saes()[folder.name.removesuffix("-float32")], x)
                errors.append(float(np.abs(truth - peer).max() / np.abs(peer).max()))
                exact = f", against the original {errors[-1]:.1e}"
            print(
                f"{folder.name}: acts {errors[0]:.1e}, recon {errors[1]:.1e}, {same} flips{exact}"
            )
            worst = max(worst, *errors)
    print(f"worst relative difference {worst:.1e} (allowed {TOLERANCE:.0e})")
    return 0 if worst <= TOLERANCE else 1


if __name__ == "__main__":
    sys.exit(main())
