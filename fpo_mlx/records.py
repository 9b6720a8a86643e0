"""The vocabulary: frozen numpy records that cross the seams between modules.

Alphabet of shapes, used everywhere: B pairs, L tokens, D hidden size, V vocabulary, F SAE features,
k top-k, R rows (response positions of several responses, one after the other, no padding).
`logps` is a sum over a response in nats, `token_logps` has one value per token.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

SiteKind = Literal[
    "resid_pre",  # input of the block
    "resid_mid",  # after the attention's addition
    "resid_post",  # output of the block
    "attn_z",  # input of o_proj, heads concatenated
    "attn_raw",  # output of the attention module
    "attn_out",  # what attention adds to the stream (Gemma, GLM 4: after its post-norm)
    "mlp_in_unscaled",  # RMS-normalised input of the MLP, without the norm's gain
    "mlp_in",  # input of the MLP module
    "mlp_raw",  # output of the MLP module
    "mlp_out",  # what the MLP adds to the stream (Gemma, GLM 4: after its post-norm)
]
SITE_KINDS: tuple[str, ...] = SiteKind.__args__  # type: ignore[attr-defined]
Activation = Literal["relu", "jumprelu", "gated", "topk", "abstopk", "groupmax", "identity"]
Normalization = Literal["none", "layer_norm", "constant_norm"]
RESULT_VERSION = 1
HASHED_ROWS = 256  # of an array, at once
PAIRS_FILE, ROUND_FILE = "pairs.json", "round.json"  # figures of pairs that were built, of a round
BASE = "base"  # what results call the model without adapters
# validation pairs that a landing takes: D scatters so much that fewer say less than the controller
FEWEST = 16
COLLAPSE = 1.0  # nats a token that the chosen answers lost: text is no longer what it was


def shown_name(adapter_path: str) -> str:
    """What results call an adapter: its path as given, but never as the base is called."""
    return f"./{adapter_path}" if adapter_path == BASE else adapter_path


def result_file(kind: str, value: Mapping[str, Any]) -> dict[str, Any]:
    """What a command writes with --json: `kind` is the command, `version` that of its form."""
    return {"kind": kind, "version": RESULT_VERSION, **value}


@dataclass(frozen=True)
class Site:
    """A place in the network: `kind` within block `layer` (0-based)."""

    layer: int
    kind: SiteKind = "resid_post"

    def __str__(self) -> str:
        return f"{self.kind} of block {self.layer}"


# names of a block's norms, in mlx-lm and in transformers
BEHIND_ATTENTION = ("post_self_attn_layernorm", "post_mixer_norm")
BEFORE_MLP = ("pre_feedforward_layernorm", "pre_mlp_layernorm", "pre_mlp_norm", "ln_2", "ffn_norm")
BEHIND_MLP = ("post_feedforward_layernorm", "post_mlp_layernorm", "post_mlp_norm")
AFTER_ATTENTION = "post_attention_layernorm"  # mostly before the MLP; in Gemma 2 behind attention
WITHIN_MLP = ("post_feedforward_layernorm_1", "post_feedforward_layernorm_2")  # Gemma 4: two parts
BEHIND_BOTH = ("post_per_layer_input_norm",)  # Gemma 4: of a third thing that is added
# of blocks that do not just add what attention and MLP give: Muse Spark, DeepSeek 4.1, Talkie,
# Kimi K3, LongCat, Gemma 3n
MIXED = ("add_attn_alpha", "attn_hc", "attn_gain", "mlp_res_norm", "mlps", "altup")
EXPERTS_AND_SHARED = ("block_sparse_moe", "shared_mlp")  # Granite 4 adds what both give


@dataclass(frozen=True)
class Norms:
    """Which of a block's norms stand between its parts and the stream, by name; None: no norm.

    behind_*: what attention or MLP gives goes through it before it is added to the stream.
    """

    behind_attention: str | None
    before_mlp: str | None
    behind_mlp: str | None

    @staticmethod
    def of(names: Collection[str]) -> Norms:
        """names: of all that the block has."""
        attention, before, mlp = (
            next((name for name in known if name in names), None)
            for known in (BEHIND_ATTENTION, BEFORE_MLP, BEHIND_MLP)
        )
        if AFTER_ATTENTION in names:
            if mlp and not attention:  # a block norms what both give, or neither
                attention = AFTER_ATTENTION
            else:
                before = before or AFTER_ATTENTION
        return Norms(attention, before, mlp)


def unknown_addition(names: Collection[str], kind: SiteKind) -> str | None:
    """The part of a block for which a site of this kind is not known here, by name.

    names: of all that the block has. None: what it adds there is known.
    """
    if kind not in ("attn_out", "mlp_out", "resid_mid", "mlp_in_unscaled"):
        return None
    if mixed := [name for name in MIXED if name in names]:
        return mixed[0]
    if kind == "mlp_out" and set(EXPERTS_AND_SHARED) <= set(names):
        return EXPERTS_AND_SHARED[1]
    if kind not in ("attn_out", "mlp_out"):
        return None
    known = (*BEHIND_ATTENTION, *BEHIND_MLP, AFTER_ATTENTION, *WITHIN_MLP, *BEHIND_BOTH)
    behind = [name for name in names if re.fullmatch(r"post_\w*norm\w*|\w*residual_gate\w*", name)]
    return min(set(behind) - set(known), default=None)


def residual_factor(config: Mapping[str, Any]) -> float:
    """On what attention and MLP add to the stream: Granite's and MiniCPM's, of others 1.

    config: of the language model.
    """
    if config.get("scale_depth"):
        return float(config["scale_depth"]) / int(config["num_hidden_layers"]) ** 0.5
    return float(config.get("residual_multiplier") or 1.0)


@dataclass(frozen=True, slots=True)
class PairFacts:
    """What a row says of its pair beside the texts."""

    agreement: float = 1.0  # how sure it is that chosen is the better one, 0 to 1
    weight: float = 1.0  # of the pair's loss, 0 or more
    score_gap: float = 0.0  # score_chosen - score_rejected


NO_FACTS = PairFacts()


@dataclass(frozen=True, slots=True)
class TokenPair:
    """One preference pair as token ids. A response is scored on all of its tokens."""

    prompt: np.ndarray  # int32 [P], P >= 1
    chosen: np.ndarray  # int32 [|y_w|] >= 1
    rejected: np.ndarray  # int32 [|y_l|] >= 1
    index: int  # row number within its split, from 0
    where: str = ""  # "train.jsonl:12"
    facts: PairFacts = NO_FACTS
    _keys: tuple[bytes, bytes] | None = field(default=None, init=False, repr=False, compare=False)

    @property
    def responses(self) -> tuple[np.ndarray, np.ndarray]:
        return self.chosen, self.rejected

    @property
    def tokens(self) -> int:
        """Distinct tokens: the prompt counts once."""
        return len(self.prompt) + len(self.chosen) + len(self.rejected)

    @property
    def keys(self) -> tuple[bytes, bytes]:
        """The names of both rows in a reference cache; hashed once."""
        if self._keys is None:
            both = row_key(self.prompt, self.chosen), row_key(self.prompt, self.rejected)
            object.__setattr__(self, "_keys", both)
            return both
        return self._keys


@dataclass(frozen=True)
class Projection:
    """Directions of one site that the model goes on without: h - (h @ basis) @ basis.T."""

    site: Site
    basis: np.ndarray  # float32 [D, r], orthonormal columns

    @staticmethod
    def of(site: Site, directions: np.ndarray) -> Projection:
        """directions: [n, D], of any lengths; those that depend on others add nothing."""
        left, sizes, _ = np.linalg.svd(directions.T.astype(np.float64), full_matrices=False)
        kept = left[:, sizes > 1e-6 * sizes.max(initial=0.0)]
        return Projection(site, np.ascontiguousarray(kept, dtype=np.float32))


@dataclass(frozen=True)
class Passage:
    """Tokens of which those behind the prompt are looked at: an answer, or the rest of a text."""

    prompt: np.ndarray  # int32 [P], P >= 1
    response: np.ndarray  # int32 [|y|] >= 1
    where: str = ""  # "chats.jsonl:12"


def row_key(prompt: np.ndarray, response: np.ndarray) -> bytes:
    """The 16-byte name of (prompt tokens, response tokens) in a reference cache."""
    digest = hashlib.sha256(np.int64(len(prompt)).tobytes())
    digest.update(np.ascontiguousarray(prompt, dtype="<i4").tobytes())
    digest.update(np.ascontiguousarray(response, dtype="<i4").tobytes())
    return digest.digest()[:16]


@dataclass(frozen=True)
class SparseFeatures:
    """A pooled feature vector (mean over response positions) without its zeros."""

    indices: np.ndarray  # int32 [nnz], ascending
    values: np.ndarray  # float32 [nnz]

    @staticmethod
    def from_dense(dense: np.ndarray) -> SparseFeatures:
        """Every non-zero of dense [F]."""
        indices = np.flatnonzero(dense)
        return SparseFeatures(indices.astype(np.int32), dense[indices].astype(np.float32))

    def to_dense(self, n_features: int) -> np.ndarray:
        dense = np.zeros(n_features, dtype=np.float32)  # [F]
        dense[self.indices] = self.values
        return dense


@dataclass(frozen=True)
class ResponseScore:
    """What the reference model says of one response: the unit of the reference cache."""

    logps: float  # nats, summed over the response
    tokens: int  # |y|
    features: tuple[SparseFeatures, ...] = ()  # one per SAE; empty if scored without one


PairScore = tuple[ResponseScore, ResponseScore]  # chosen, rejected


@dataclass(frozen=True)
class SaeWeights:
    """The one form that every public SAE format is turned into. All arrays float32.

    raw  = (N(x) - b_in) @ w_enc                              [.., F]
    acts = A(raw + b_enc) * act_scale
    recon = N^-1(acts @ w_dec + b_dec)                        [.., D_out], + mean(x) if centred

    A: relu     max(pre, 0)
       jumprelu max(pre, 0) where pre > threshold (strict)
       gated    max(raw * gate_scale + b_enc, 0) where raw + gate_bias > 0
       topk     the k largest pre of a token, then max(., 0)
       abstopk  the k largest |pre| of a token, sign kept
       groupmax max(pre, 0), then the largest of each of k equal contiguous groups
       identity pre (no SAE: the constraint `activations` compares the site itself)
    N: none; layer_norm (x - mean) / (std + 1e-5), std with n - 1; constant_norm x * sqrt(D) / |x|
    """

    activation: Activation
    w_enc: np.ndarray  # [D_in, F]
    b_enc: np.ndarray  # [F]
    b_in: np.ndarray | None = None  # [D_in], subtracted from the input
    threshold: np.ndarray | None = None  # [F], jumprelu
    gate_scale: np.ndarray | None = None  # [F], gated: exp(r_mag)
    gate_bias: np.ndarray | None = None  # [F], gated
    act_scale: np.ndarray | None = None  # [F]
    k: int | None = None  # topk, abstopk, groupmax
    normalize: Normalization = "none"
    w_dec: np.ndarray | None = None  # [F, D_out]
    b_dec: np.ndarray | None = None  # [D_out]
    site: Site | None = None  # from the metadata, when it has one
    model_name: str | None = None  # as the metadata spells it
    format: str = "unknown"  # family it was read from
    source: str = ""  # path or hub id, for messages
    neuronpedia: str | None = None  # "gemma-2-2b/25-gemmascope-res-16k"
    centred: bool = False  # reads and gives x - mean(x) over D; w_enc takes the mean out itself
    transcoder: bool = False  # the decoder predicts another place than the input's
    notes: tuple[str, ...] = field(default=())  # what a user should know, one sentence each

    @property
    def d_in(self) -> int:
        return self.w_enc.shape[0]

    @property
    def n_features(self) -> int:
        return self.w_enc.shape[1]

    @property
    def group(self) -> int:
        """Neighbouring features of which one alone fires: groupmax; 1 elsewhere."""
        return self.n_features // self.k if self.k and self.activation == "groupmax" else 1

    @property
    def writes_back(self) -> bool:
        """Whether its decoder is there, and writes at the place that the SAE reads."""
        return self.w_dec is not None and not self.transcoder and self.w_dec.shape[1] == self.d_in

    def fingerprint(self) -> str:
        """sha256 over everything that changes `encode` (not the decoder, not the metadata)."""
        digest = hashlib.sha256(f"{self.activation}|{self.k}|{self.normalize}".encode())
        for name in ("w_enc", "b_enc", "b_in", "threshold", "gate_scale", "gate_bias", "act_scale"):
            array = getattr(self, name)
            if array is not None:
                digest.update(name.encode())
                for at in range(0, len(array), HASHED_ROWS):  # a view is not copied as a whole
                    rows = array[at : at + HASHED_ROWS]
                    digest.update(np.ascontiguousarray(rows, dtype="<f4").data)
        return digest.hexdigest()


KEPT_BITS = 8  # of layers with adapters where the base has fewer: 4 lose most of a small change


@dataclass(frozen=True)
class FusedForm:
    """How a fused folder holds the weights of base + adapter.

    keep_bits: at least so many for layers that have adapters; "base": as the base has them; None:
    KEPT_BITS, where that can be had.
    """

    dequantize: bool = False
    keep_bits: int | Literal["base"] | None = None
    dtype: str | None = None  # of float weights; None: the base's own
    gguf_path: str | None = None  # bare name of a GGUF that is written as well
    scale: float = 1.0  # part of the adapter's change that is taken

    @property
    def least_bits(self) -> int | None:
        """Of quantised layers that have adapters; None: the base's."""
        if self.dequantize or self.keep_bits == "base":
            return None
        return self.keep_bits or KEPT_BITS


DEFAULT_FORM = FusedForm()
