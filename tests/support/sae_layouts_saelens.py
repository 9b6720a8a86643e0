"""Tiny SAEs in SAELens' layout, and the formula of each in float64."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from sae_files import LAYER, D, F, K, Made, canonical, jump, relu, save, top, write
from safetensors.numpy import load_file


# --- SAELens ---------------------------------------------------------------------------------
def saelens(architecture: str, *, flat: bool = False, **settings: Any):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = canonical(rng)
        base = architecture.replace("skip_", "").replace("_transcoder", "")
        gated, transcoder = architecture == "gated", "transcoder" in architecture
        if gated:
            del w["b_enc"]
            for name in ("b_gate", "b_mag", "r_mag"):
                w.add(name, F)
        if base == "jumprelu":
            w.add("threshold", F, positive=True)
        if "skip" in architecture:
            w.add("W_skip", D, D)
        if architecture.endswith("batchtopk"):
            w["topk_threshold"] = np.array(0.5, dtype=np.float64)
        config: dict[str, Any] = {"d_in": D, "d_sae": F, "dtype": "float32", **settings}
        names = {"model_name": "tiny", "hook_name": f"blocks.{LAYER}.hook_resid_post"}
        if flat:
            config |= {"model_name": "tiny", "hook_point": f"blocks.{LAYER}.hook_resid_post"}
            if architecture != "standard":  # which older files do not say
                config["architecture"] = architecture
        else:
            config |= {"architecture": architecture, "metadata": names}
        write(folder, "cfg.json", config)
        save(folder, "sae_weights.safetensors", w)
        subtract = settings.get("apply_b_dec_to_input", not transcoder)

        def encode(x: np.ndarray) -> np.ndarray:
            mode = settings.get("normalize_activations", "none")
            if mode == "layer_norm":
                x = x - x.mean(1, keepdims=True)
                x = x / (np.sqrt((x**2).sum(1, keepdims=True) / (D - 1)) + 1e-5)
            if mode == "constant_norm_rescale":
                x = x * np.sqrt(D) / np.sqrt((x**2).sum(1, keepdims=True))
            raw = (x - (w.wide("b_dec") if subtract else 0)) @ w.wide("W_enc")
            norm = np.sqrt((w.wide("W_dec") ** 2).sum(1))
            if gated:
                value = relu(raw * np.exp(w.wide("r_mag")) + w.wide("b_mag"))
                return value * (raw + w.wide("b_gate") > 0)
            pre = raw + w.wide("b_enc")
            if settings.get("rescale_acts_by_decoder_norm"):
                pre = pre * norm
            if base == "jumprelu":
                return jump(pre, w.wide("threshold"))
            if architecture.endswith("batchtopk"):
                return jump(pre, 0.5)
            if base == "abstopk":
                return top(pre, K, np.abs(pre))
            if base == "topk" or settings.get("activation_fn_str") == "topk":
                return relu(top(pre, K))
            return relu(pre)

        return Made(folder, encode)

    return make


def average_factor(folder: Path, rng: np.random.Generator) -> Made:
    made = saelens("standard", normalize_activations="expected_average_only_in")(folder, rng)
    w = {k: v.astype(np.float64) for k, v in load_file(folder / "sae_weights.safetensors").items()}
    # the scale goes into W_enc and out of b_dec: (x - b / f) (W f) + c
    encode = lambda x: relu((x - w["b_dec"] / 2.5) @ (w["W_enc"] * 2.5) + w["b_enc"])  # noqa: E731
    return Made(made.path, encode, {"norm_scaling_factor": 2.5})


def bfloat16(folder: Path, rng: np.random.Generator) -> Made:
    """Every tensor cut to its upper 16 bits, written as BF16 by hand."""
    w = canonical(rng)
    header, blob = {}, b""
    for name in list(w):
        bits = (w[name].view(np.uint32) >> 16).astype("<u2")
        header[name] = {
            "dtype": "BF16",
            "shape": list(bits.shape),
            "data_offsets": [len(blob), len(blob) + bits.nbytes],
        }
        blob += bits.tobytes()
        w[name] = (w[name].view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
    text = json.dumps(header).encode()
    write(folder, "cfg.json", {"d_in": D, "d_sae": F, "architecture": "standard"})
    raw = len(text).to_bytes(8, "little") + text + blob
    (folder / "sae_weights.safetensors").write_bytes(raw)
    encode = lambda x: relu((x - w.wide("b_dec")) @ w.wide("W_enc") + w.wide("b_enc"))  # noqa: E731
    return Made(folder, encode)


def centred(folder: Path, rng: np.random.Generator) -> Made:
    keys = {"model_from_pretrained_kwargs": {"center_writing_weights": True}}
    made = saelens("gated", **keys)(folder, rng)
    return Made(made.path, lambda x: made.encode(x - x.mean(1, keepdims=True)))


SAELENS: dict[str, tuple[str, dict[str, Any]]] = {
    "standard": ("standard", {}),
    "no_b_dec": ("standard", {"apply_b_dec_to_input": False}),
    "layer_norm": ("standard", {"normalize_activations": "layer_norm"}),
    "constant_norm": ("standard", {"normalize_activations": "constant_norm_rescale"}),
    "gated": ("gated", {}),
    "jumprelu": ("jumprelu", {"apply_b_dec_to_input": False}),
    "topk": ("topk", {"k": K}),
    "topk_rescaled": ("topk", {"k": K, "rescale_acts_by_decoder_norm": True}),
    "abstopk": ("abstopk", {"k": K}),
    "batchtopk": ("batchtopk", {"k": 5.0, "rescale_acts_by_decoder_norm": True}),
    "matryoshka": ("matryoshka_batchtopk", {"k": 5.0, "rescale_acts_by_decoder_norm": True}),
    "transcoder": ("transcoder", {"d_out": D}),
    "skip_transcoder": ("jumprelu_skip_transcoder", {"d_out": D}),
    "pre6": ("standard", {"flat": True, "normalize_activations": False}),
    "of_5_topk": (
        "topk",
        {"flat": True, "activation_fn": "topk", "activation_fn_kwargs": {"k": K}},
    ),
    "of_5_abstopk": ("abstopk", {"flat": True, "activation_fn_kwargs": {"k": K}}),
    "pre6_topk": (
        "standard",
        {"flat": True, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": K}},
    ),
}
