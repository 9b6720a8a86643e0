"""Tiny SAEs in the other families' layouts, and the formula of each in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from sae_files import (
    LAYER,
    D,
    F,
    K,
    Made,
    Weights,
    canonical,
    jump,
    linear,
    relu,
    save,
    save_torch,
    top,
    write,
)


# --- the other families ----------------------------------------------------------------------
def gemma_scope(repo: str):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = canonical(rng)
        w.add("threshold", F, positive=True)
        place = folder / repo / f"layer_{LAYER}" / "width_16k" / "average_l0_55"
        place.mkdir(parents=True)
        np.savez(place / "params.npz", **w)
        return Made(
            place, lambda x: jump(x @ w.wide("W_enc") + w.wide("b_enc"), w.wide("threshold"))
        )

    return make


def gemma_scope2(part: str, hook: str | None, **more: int):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = canonical(rng, lower=True)
        w.add("threshold", F, positive=True)
        if part == "clt":
            w.add("w_dec", F, 3, D)
        if "affine" in more:
            w.add("affine_skip_connection", D, D)
        place = folder / "gemma-scope-2-1b-pt" / part / f"layer_{LAYER}_width_16k_l0_small"
        save(place, "params.safetensors", w)
        if hook:
            settings = {"architecture": "jump_relu", "model_name": "gemma-v3-1b-pt"}
            write(place, "config.json", {**settings, "hf_hook_point_in": hook})
        return Made(
            place, lambda x: jump(x @ w.wide("w_enc") + w.wide("b_enc"), w.wide("threshold"))
        )

    return make


def sparsify(hook: str, **settings: Any):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = Weights(rng)
        w.add("encoder.weight", F, D)
        w.add("encoder.bias", F)
        w.add("W_dec", F, D)
        w.add("b_dec", D)
        write(folder / hook, "cfg.json", {"d_in": D, "num_latents": 0, "k": K, **settings})
        save(folder / hook, "sae.safetensors", w)

        def encode(x: np.ndarray) -> np.ndarray:
            shift = 0 if settings.get("transcode") else w.wide("b_dec")
            pre = (x - shift) @ w.wide("encoder.weight").T + w.wide("encoder.bias")
            if settings.get("signed"):
                return top(pre, K, np.abs(pre))
            if settings.get("activation") != "groupmax":
                return top(relu(pre), K)
            groups = relu(pre).reshape(len(pre), K, F // K)
            best = groups == groups.max(2, keepdims=True)
            return (groups * best).reshape(pre.shape)

        return Made(folder / hook, encode)

    return make


def dictionary(name: str, *, backup: bool = False):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        shared = name in ("JumpReluAutoEncoder", "MatryoshkaBatchTopKSAE")
        w = canonical(rng) if shared else linear(rng)
        bias = {"AutoEncoder": "bias", "AutoEncoderNew": "decoder.bias"}.get(name, "b_dec")
        bias = "decoder_bias" if name == "GatedAutoEncoder" else bias
        if not shared:
            w[bias] = w.pop("decoder.bias")
        if name == "GatedAutoEncoder":
            del w["encoder.bias"]
            for extra in ("r_mag", "gate_bias", "mag_bias"):
                w.add(extra, F)
        if name == "JumpReluAutoEncoder":
            w.add("threshold", F, positive=True)
        if "TopK" in name:
            w["k"] = np.array(K, dtype=np.int32)
            w["threshold"] = np.array(0.4, dtype=np.float32)
        place = folder / f"resid_post_layer_{LAYER}" / "trainer_0"
        tree: dict[str, Any] = {"step": 7, "ae": dict(w), "norm_factor": 2} if backup else dict(w)
        save_torch(place / "ae.pt", tree)
        trainer = {"dict_class": name, "activation_dim": D, "dict_size": F, "k": K}
        trainer |= {"lm_name": "EleutherAI/pythia-70m", "submodule_name": place.parent.name}
        write(place, "config.json", {"trainer": trainer})
        scale = 2 if backup else 1

        def encode(x: np.ndarray) -> np.ndarray:
            x = x / scale  # a backup works on scaled inputs, and its features scale back
            shift = 0 if name in ("AutoEncoderNew", "JumpReluAutoEncoder") else w.wide(bias)
            matrix = w.wide("W_enc") if shared else w.wide("encoder.weight").T
            raw = (x - shift) @ matrix
            if name == "GatedAutoEncoder":
                value = relu(raw * np.exp(w.wide("r_mag")) + w.wide("mag_bias"))
                return scale * value * (raw + w.wide("gate_bias") > 0)
            pre = raw + w.wide("b_enc" if shared else "encoder.bias")
            if name == "AutoEncoderTopK":
                return scale * relu(top(pre, K))
            if "threshold" in w:
                return scale * jump(pre, w.wide("threshold"))
            return scale * relu(pre)

        return Made(place, encode)

    return make


def llama_scope(gate: str):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = linear(rng)
        hook = f"blocks.{LAYER}.hook_mlp_out"
        place = folder / f"Llama3_1-8B-Base-L{LAYER}M-8x"
        save(place / "checkpoints", "final.safetensors", w)
        settings = {"hook_point_in": hook, "hook_point_out": hook, "act_fn": "jumprelu"}
        settings |= {"jump_relu_threshold": 0.3, "norm_activation": "dataset-wise"}
        settings |= {"dataset_average_activation_norm": {"in": 2.0, "out": 2.0}}
        write(place, "hyperparams.json", {**settings, "sparsity_include_decoder_norm": True})
        f = np.sqrt(D) / 2.0

        def encode(x: np.ndarray) -> np.ndarray:
            product, bias = x @ w.wide("encoder.weight").T, w.wide("encoder.bias")
            if gate == "saelens":
                return jump(f * product + bias, 0.3 * f)
            n = np.sqrt((w.wide("decoder.weight") ** 2).sum(0))
            return jump(n * (product + bias / f), 0.3)

        return Made(place, encode, {"llama_scope_gate": gate})

    return make


def r1(folder: Path, rng: np.random.Generator) -> Made:
    w = linear(rng)
    w.add("log_jumprelu_threshold", F)
    hook = f"blocks.{LAYER}.hook_resid_post"
    w[f"dataset_average_activation_norm.{hook}"] = np.array(2.0, dtype=np.float32)
    place = folder / "400M" / f"L{LAYER}R"
    save(place, "sae_weights.safetensors", w)
    write(place, "config.json", {"hook_point_in": hook, "norm_activation": "dataset-wise"})
    f = np.sqrt(D) / 2.0
    threshold = np.exp(w.wide("log_jumprelu_threshold"))

    def encode(x: np.ndarray) -> np.ndarray:
        return jump(f * x @ w.wide("encoder.weight").T + w.wide("encoder.bias"), threshold)

    return Made(place, encode)


def llamascopium(activation: str):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = Weights(rng)
        w.add("W_E", D, F)
        w.add("b_E", F)
        w.add("W_D", F, D)
        w.add("b_D", D)
        hook = f"blocks.{LAYER}.hook_resid_post"
        w[f"dataset_average_activation_norm.{hook}"] = np.array(2.0, dtype=np.float32)
        if activation == "jumprelu":
            w.add("activation_function.log_jumprelu_threshold", F)
        save(folder, "sae_weights.safetensors", w)
        settings = {"act_fn": activation, "top_k": K, "norm_activation": "dataset-wise"}
        write(folder, "config.json", {**settings, "hook_point_in": hook, "d_model": D})
        n = np.sqrt((w.wide("W_D") ** 2).sum(1))

        def encode(x: np.ndarray) -> np.ndarray:
            pre = (x * np.sqrt(D) / 2.0) @ w.wide("W_E") + w.wide("b_E")
            if activation == "topk":
                return relu(top(pre * n, K)) / n
            return jump(pre * n, np.exp(w.wide("activation_function.log_jumprelu_threshold"))) / n

        return Made(folder, encode)

    return make


def qwen(folder: Path, rng: np.random.Generator) -> Made:
    w = Weights(rng)
    w.add("W_enc", F, D)
    w.add("W_dec", D, F)
    w.add("b_enc", F)
    w.add("b_dec", D)
    place = folder / f"SAE-Res-Qwen3-1.7B-Base-W32K-L0_{K}" / f"layer{LAYER}.sae.pt"
    save_torch(place, dict(w))
    return Made(place, lambda x: relu(top(x @ w.wide("W_enc").T + w.wide("b_enc"), K)))


def plain(encoder: str, decoder: str, file: str):
    def make(folder: Path, rng: np.random.Generator) -> Made:
        w = linear(rng, encoder, decoder)
        path = save_torch(folder / file, dict(w))
        return Made(
            path, lambda x: relu(x @ w.wide(f"{encoder}.weight").T + w.wide(f"{encoder}.bias"))
        )

    return make


def openai(folder: Path, rng: np.random.Generator) -> Made:
    w = Weights(rng)
    w.add("encoder.weight", F, D)
    w.add("latent_bias", F)
    w.add("pre_bias", D)
    w.add("decoder.weight", D, F)
    state = {"activation": "TopK", "activation_state_dict": {"k": K, "postact_fn": "ReLU"}}
    path = save_torch(folder / "resid_post_mlp" / f"{LAYER}.pt", {**w, **state})

    def encode(x: np.ndarray) -> np.ndarray:
        x = x - x.mean(1, keepdims=True)
        x = x / (np.sqrt((x**2).sum(1, keepdims=True) / (D - 1)) + 1e-5)
        pre = (x - w.wide("pre_bias")) @ w.wide("encoder.weight").T + w.wide("latent_bias")
        return relu(top(pre, K))

    return Made(path, encode)


def connor(folder: Path, rng: np.random.Generator) -> Made:
    w = canonical(rng)
    path = save_torch(folder / "gpt2-small_L3_v9.pt", dict(w))
    settings = {"act_size": D, "dict_size": F, "act_name": f"blocks.{LAYER}.attn.hook_z"}
    write(folder, "gpt2-small_L3_v9_cfg.json", settings)
    encode = lambda x: relu((x - w.wide("b_dec")) @ w.wide("W_enc") + w.wide("b_enc"))  # noqa: E731
    return Made(path, encode)


def mwhanna(folder: Path, rng: np.random.Generator) -> Made:
    w = canonical(rng)
    w["W_enc"] = np.ascontiguousarray(w["W_enc"].T)
    path = save(folder, f"layer_{LAYER}.safetensors", w)
    write(folder, "wanb-config.yaml", f"d_feature:\n  value: {F}\nd_model:\n  value: {D}\n")
    write(folder, "config.yaml", "model_name: Qwen/Qwen3-0.6B\n")
    return Made(path, lambda x: relu(x @ w.wide("W_enc").T + w.wide("b_enc")))


def mntss(folder: Path, rng: np.random.Generator) -> Made:
    w = Weights(rng)
    w.add(f"W_enc_{LAYER}", F, D)
    w.add(f"b_enc_{LAYER}", F)
    w.add(f"b_dec_{LAYER}", D)
    save(folder, f"W_enc_{LAYER}.safetensors", w)
    save(folder, f"W_dec_{LAYER}.safetensors", {"W_dec": np.zeros((F, 2, D), np.float32)})
    write(folder, "config.yaml", 'feature_input_hook: "hook_resid_mid"\n')
    return Made(folder, lambda x: relu(x @ w.wide(f"W_enc_{LAYER}").T + w.wide(f"b_enc_{LAYER}")))
