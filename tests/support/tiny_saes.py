"""Tiny SAEs in every public layout, written to disk, each with its formula in float64.

`CASES` is the table: a case writes its native files into a folder and returns where they lie, with
a function from inputs to the activations that those very files mean. No code of the package is
used, so that it can be held against this.
"""

from __future__ import annotations

from sae_files import LAYER, Case
from sae_layouts import (
    connor,
    dictionary,
    gemma_scope,
    gemma_scope2,
    llama_scope,
    llamascopium,
    mntss,
    mwhanna,
    openai,
    plain,
    qwen,
    r1,
    sparsify,
)
from sae_layouts_saelens import SAELENS, average_factor, bfloat16, centred, saelens

_RESID = f"resid_post of block {LAYER}"
_DICTIONARIES = (
    "AutoEncoder",
    "AutoEncoderNew",
    "GatedAutoEncoder",
    "AutoEncoderTopK",
    "BatchTopKSAE",
    "MatryoshkaBatchTopKSAE",
    "JumpReluAutoEncoder",
)
CASES: tuple[Case, ...] = (
    *(Case(f"saelens_{n}", "saelens", _RESID, saelens(a, **s)) for n, (a, s) in SAELENS.items()),
    Case("saelens_average", "saelens", _RESID, average_factor),
    Case("saelens_bfloat16", "saelens", None, bfloat16),
    Case("saelens_centred", "saelens", _RESID, centred),
    Case("gemma_scope_res", "gemma_scope", _RESID, gemma_scope("gemma-scope-2b-pt-res")),
    Case(
        "gemma_scope_att", "gemma_scope", "attn_z of block 3", gemma_scope("gemma-scope-9b-pt-att")
    ),
    Case(
        "gemma_scope_2",
        "gemma_scope_2",
        _RESID,
        gemma_scope2("resid_post", f"model.layers.{LAYER}.output"),
    ),
    Case(
        "gemma_scope_2_bare",
        "gemma_scope_2",
        "attn_z of block 3",
        gemma_scope2("attn_out_all", None),
    ),
    Case("gemma_scope_2_clt", "gemma_scope_2", "mlp_in of block 3", gemma_scope2("clt", None)),
    Case(
        "gemma_scope_2_affine",
        "gemma_scope_2",
        "mlp_in of block 3",
        gemma_scope2(
            "transcoder", f"model.layers.{LAYER}.pre_feedforward_layernorm.output", affine=1
        ),
    ),
    Case("sparsify_topk", "sparsify", _RESID, sparsify(f"layers.{LAYER}")),
    Case(
        "sparsify_group",
        "sparsify",
        "mlp_raw of block 3",
        sparsify("layers.3.mlp", activation="groupmax"),
    ),
    Case("sparsify_signed", "sparsify", "attn_raw of block 3", sparsify("h.3.attn", signed=True)),
    Case(
        "sparsify_transcode",
        "sparsify",
        "mlp_in of block 3",
        sparsify("layers.3.mlp", transcode=True),
    ),
    *(
        Case(f"dictionary_{n}", "dictionary_learning", _RESID, dictionary(n), pickled=True)
        for n in _DICTIONARIES
    ),
    Case(
        "dictionary_backup",
        "dictionary_learning",
        _RESID,
        dictionary("BatchTopKSAE", backup=True),
        pickled=True,
    ),
    Case("llama_scope", "llama_scope", "mlp_out of block 3", llama_scope("authors")),
    Case("llama_scope_saelens", "llama_scope", "mlp_out of block 3", llama_scope("saelens")),
    Case("llama_scope_r1", "llama_scope_r1_distill", _RESID, r1),
    Case("llamascopium_jumprelu", "llamascopium", _RESID, llamascopium("jumprelu")),
    Case("llamascopium_topk", "llamascopium", _RESID, llamascopium("topk")),
    Case("qwen_scope", "qwen_scope", _RESID, qwen, pickled=True),
    Case(
        "goodfire",
        "goodfire",
        _RESID,
        plain("encoder_linear", "decoder_linear", "Llama-3.1-8B-Instruct-SAE-l3.pth"),
        pickled=True,
    ),
    Case(
        "qresearch",
        "qresearch",
        _RESID,
        plain("encoder", "decoder", "Llama-SAE-l3.pt"),
        pickled=True,
    ),
    Case("openai", "openai", _RESID, openai, pickled=True),
    Case("connor_rob", "connor_rob", "attn_z of block 3", connor, pickled=True),
    Case("mwhanna", "mwhanna_transcoder", "mlp_in of block 3", mwhanna),
    Case("mntss", "mntss_clt", "resid_mid of block 3", mntss),
)
