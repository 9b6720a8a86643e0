"""Make fpo_mlx/sae/table.json from SAELens' pretrained_saes.yaml (version 6.54.12) and a few more.

Usage: make_sae_table.py pretrained_saes.yaml
Keeps facts only: where an SAE lies, what it was trained on, its Neuronpedia id, its input scale.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import yaml

FAMILIES = {
    None: "saelens",
    "gemma_2": "gemma_scope",
    "gemma_2_transcoder": "gemma_scope",
    "gemma_3": "gemma_scope_2",
    "dictionary_learning_1": "dictionary_learning",
    "llama_scope": "llama_scope",
    "llama_scope_r1_distill": "llama_scope_r1_distill",
    "qwen_scope": "qwen_scope",
    "goodfire": "goodfire",
    "deepseek_r1": "qresearch",
    "connor_rob_hook_z": "connor_rob",
    "mwhanna_transcoder": "mwhanna_transcoder",
    "mntss_clt_layer_transcoder": "mntss_clt",
    "sparsify": "sparsify",
}
MODELS = {  # SAELens' short names -> hub ids
    "gemma-2b": "google/gemma-2b",
    "gemma-2b-it": "google/gemma-2b-it",
    "gemma-2-2b": "google/gemma-2-2b",
    "gemma-2-9b": "google/gemma-2-9b",
    "gemma-2-9b-it": "google/gemma-2-9b-it",
    "gemma-2-27b": "google/gemma-2-27b",
    "gpt2-small": "openai-community/gpt2",
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "pythia-70m-deduped": "EleutherAI/pythia-70m-deduped",
    "qwen3-0.6b": "Qwen/Qwen3-0.6B",
    "qwen3-1.7b": "Qwen/Qwen3-1.7B",
    "qwen3-4b": "Qwen/Qwen3-4B",
    "qwen3-8b": "Qwen/Qwen3-8B",
    "qwen3-14b": "Qwen/Qwen3-14B",
}
SITES = (  # in a release's or an SAE's name
    ("b-pt-transcoders layer", "mlp_in_unscaled"),  # Gemma Scope 1
    ("clt", "resid_mid"),
    ("transcoder", "mlp_in"),
    ("resid_pre", "resid_pre"),
    ("resid_mid", "resid_mid"),
    ("resid-mid", "resid_mid"),
    ("hook_z", "attn_z"),
    ("hook-z", "attn_z"),
    ("attn_out", "attn_out"),
    ("attn-out", "attn_out"),
    ("mlp", "mlp_out"),
    ("lxm", "mlp_out"),
    ("lxa", "attn_out"),
    ("-att", "attn_z"),
)
WIDTHS = {  # by the beginning of a release's name, where no name says it
    "deepseek-r1-distill-llama-8b-qresearch": "65k",
    "gemma-2b": "16k",
    "goodfire-llama-3.1-8b": "65k",
    "gpt2-small-hook-z-kk": "24k",
    "gpt2-small-mlp-tm": "24k",
    "gpt2-small-res-jb-feature": "",
    "gpt2-small-res-jb": "24k",
    "llama-3.1-8b-instruct-andyrdt": "131k",
    "llama_scope_r1_distill": "32k",
    "mistral-7b-res-wg": "65k",
    "pythia-70m-deduped": "32k",
    "qwen2.5-7b-instruct-andyrdt": "131k",
    "saebench_gemma-2-2b_width-2pow12": "4k",
    "saebench_gemma-2-2b_width-2pow14": "16k",
    "saebench_gemma-2-2b_width-2pow16": "65k",
}
FURTHER = {  # without a page at Neuronpedia: the one that these pages use, of the last block
    "gemma-scope-2b-pt-res": [("layer_{L}/width_16k/average_l0_{n}", [[25, 55]])]
}
LEFT_OUT = ("sae_bench_", "crosscoder", "temporal")  # hundreds of training steps; not supported
SPARSIFY = "EleutherAI/"
EXTRA = [  # not in SAELens' list
    ("sae-SmolLM2-135M-64x", "HuggingFaceTB/SmolLM2-135M", "mlp_raw", "0-29", ["36k"]),
    (
        "skip-transcoder-SmolLM2-135M-128x",
        "HuggingFaceTB/SmolLM2-135M",
        "mlp_in",
        "0-29",
        ["73k"],
    ),
    ("sae-Llama-3.2-1B-131k", "meta-llama/Llama-3.2-1B", "mlp_raw", "0-15", ["131k"]),
    (
        "skip-transcoder-Llama-3.2-1B-131k",
        "meta-llama/Llama-3.2-1B",
        "mlp_in",
        "0-15",
        ["131k"],
    ),
    ("sae-llama-3.1-8b-32x", "meta-llama/Llama-3.1-8B", "mlp_raw", "23", ["131k"]),
    ("sae-llama-3.1-8b-64x", "meta-llama/Llama-3.1-8B", "mlp_raw", "23", ["262k"]),
    ("sae-llama-3-8b-32x-v2", "meta-llama/Meta-Llama-3-8B", "resid_post", "", ["131k"]),
    (
        "sae-DeepSeek-R1-Distill-Qwen-1.5B-65k",
        "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        "mlp_raw",
        "0-27",
        ["65k"],
    ),
    ("sae-pythia-70m-32k", "EleutherAI/pythia-70m", "mlp_raw", "0-5", ["32k"]),
    ("sae-pythia-160m-32k", "EleutherAI/pythia-160m", "mlp_raw", "0-11", ["32k"]),
    ("sae-pythia-410m-65k", "EleutherAI/pythia-410m", "mlp_raw", "0-23", ["65k"]),
]


def templated(text: str | None, layer: str, level: str) -> str | None:
    """The text with its block number as {L} and its average L0 as {n}."""
    if text is None:
        return None
    places = rf"(layer_?|blocks\.|^l|-L|_L|/L|/|^)({layer})(?![\d])"
    text = re.sub(places, r"\g<1>{L}", text, count=1)
    return re.sub(rf"(average_l0_|__l0-){level}$", r"\g<1>{n}", text) if level else text


def rules(entries: list[dict], prefix: str | None) -> list[list]:
    """[id, path, neuronpedia, [[L, n, factor], …]] for what the prefix alone does not say."""
    groups: dict[tuple, list] = {}
    for entry in entries:
        name, path, page = entry["id"], str(entry["path"]), entry.get("neuronpedia")
        factor = entry.get("norm_scaling_factor")
        if prefix is not None and page is None and factor is None:
            continue
        number = re.search(r"\d+", name)
        layer = number[0] if number else "none"
        found = re.search(r"average_l0_(\d+)$", path)
        level = found[1] if found else ""
        page = None if page and "/e-" in page else page
        key = tuple(templated(text, layer, level) for text in (name, path, page))
        groups.setdefault(key, []).append([int(layer) if number else 0, level, factor])
    return [[*key, [place(*one) for one in at]] for key, at in groups.items()]


def place(layer: int, level: str, factor: float | None) -> int | list:
    """A block number, with its average L0 and input scale where there are any."""
    if factor:
        return [layer, int(level or 0), float(f"{factor:.9g}")]
    return [layer, int(level)] if level else layer


def summary(release: str, repo: str, entries: list[dict]) -> dict:
    text = release + " " + entries[0]["id"] + " " + str(entries[0]["path"])
    site = next((kind for part, kind in SITES if part in text.lower()), "resid_post")
    if "gemma-scope-2-" in release and "-att" in release:
        site = "attn_z"
    numbers = {
        int(m[1]) for e in entries if (m := re.search(r"(?:layer_?|blocks\.|^l)(\d+)", e["id"]))
    }
    widths = {m[1] for e in entries for m in [re.search(r"width_(\w+?)(?:[_/]|$)", e["id"])] if m}
    name = f"{release} {repo}"
    if not widths and (m := re.search(r"-(?:w-?)?(\d+k)\b", name, re.I)):
        widths = {m[1].lower()}
    if m := re.search(r"_(8|32)x$", release):
        widths = {"32k" if m[1] == "8" else "131k"}
    if not widths:
        known = next((w for start, w in WIDTHS.items() if release.startswith(start)), "")
        widths = {known} - {""}
    order = sorted(widths, key=lambda w: float(w[:-1]) * (1000 if w[-1] == "m" else 1))
    return {"site": site, "layers": spans(sorted(numbers)), "widths": order}


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0-2,5"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and parts[-1][-1] == number - 1:
            parts[-1][-1:] = [number] if len(parts[-1]) > 1 else [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)


def row(release: str, value: dict) -> dict | None:
    family = FAMILIES.get(value.get("conversion_func"))
    entries = value["saes"]
    if family is None or any(part in release for part in LEFT_OUT):
        return None
    prefixes = {
        str(e["path"])[: -len(e["id"])] for e in entries if str(e["path"]).endswith(e["id"])
    }
    whole = all(str(e["path"]).endswith(e["id"]) for e in entries)
    prefix = prefixes.pop() if whole and len(prefixes) == 1 else None
    found: dict = {
        "release": release,
        "repo": value["repo_id"],
        "family": family,
        "model": model_of(release, value["model"]),
        **summary(release, value["repo_id"], entries),
    }
    if prefix is not None:
        found["prefix"] = prefix
    further = [[name, name, None, at] for name, at in FURTHER.get(release, ())]
    if made := rules(entries, prefix) + further:
        found["rules"] = made
    return found


def model_of(release: str, name: str) -> str:
    """The hub id. SAELens names the base model for one release of an instruct model."""
    found = MODELS.get(name, name)
    return "google/gemma-2-9b-it" if release.startswith("gemma-scope-9b-it") else found


def main() -> None:
    releases = yaml.safe_load(Path(sys.argv[1]).read_text())
    rows = [made for name, value in releases.items() if (made := row(name, value))]
    for repo, model, site, layers, widths in EXTRA:
        rows.append(
            {
                "release": repo,
                "repo": SPARSIFY + repo,
                "family": "sparsify",
                "model": model,
                "site": site,
                "layers": layers,
                "widths": widths,
                "prefix": "",
            }
        )
    rows.append(
        {
            "release": "Llama-3.2-1B-Instruct-SAE-l9",
            "repo": "qresearch/Llama-3.2-1B-Instruct-SAE-l9",
            "family": "qresearch",
            "model": "meta-llama/Llama-3.2-1B-Instruct",
            "site": "resid_post",
            "layers": "9",
            "widths": ["32k"],
            "prefix": "",
        }
    )
    rows.sort(key=lambda made: made["release"])
    lines = ",\n".join(json.dumps(made, separators=(",", ":")) for made in rows)
    target = Path(__file__).resolve().parents[2] / "fpo_mlx" / "sae" / "table.json"
    target.write_text(f'{{"source":"SAELens 6.54.12 and model cards","rows":[\n{lines}\n]}}\n')
    print(f"{len(rows)} releases, {target.stat().st_size} bytes")


if __name__ == "__main__":
    main()
