"""Peak memory and time of `train` and `precompute`, predicted term by term from shapes alone.

Pure arithmetic: no model is built and no weight is read. What is counted is what the code of
`model.policy`, `core` and `trainer` keeps alive; the few constants below were fitted to measured
peaks with `scripts/check_plan.py`, which prints predicted and measured side by side.
Bytes throughout; FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

FLOAT = 4  # bytes: adapters, optimizer state, log-probs and SAE arithmetic are float32
# Fitted to measured peaks (scripts/check_plan.py):
# arrays of each width that a block keeps for its backward pass: hidden, query, keys, MLP
KEPT = {"hidden": 4.8, "query": 0.4, "keys": 3.0, "inner": 4.7}
SCORES = 1.2  # the same for attention weights, where attention has no fused kernel
WORK = 1.15  # of the heaviest block's kept arrays: temporaries of the pass in work
BASE = 2e6  # bytes: small arrays, index tables, the random state
# Fitted to measured times: share of a large product's speed that a step reaches
EFFICIENCY = 0.6

# Adam, AdamW: two moments; Muon and plain momentum: one; Adafactor: rows and columns only
MOMENTS = {"adam": 2.0, "adamw": 2.0, "muon": 1.0, "sgd": 1.0, "adafactor": 0.1}


@dataclass(frozen=True)
class ModelShape:
    """What memory and time depend on."""

    blocks: int
    hidden: int  # D
    heads: int
    kv_heads: int
    head_dim: int
    inner: int  # width of the MLP that a token runs through
    vocab: int  # V
    weights: int  # bytes in memory, in the form they take here
    block_parameters: int  # that a token is multiplied with, in one block
    value_bytes: int  # of an activation
    shares_prompt: bool = True
    fused_attention: bool = False  # a kernel that never writes the scores

    @property
    def query(self) -> int:
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Keys and values together."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True)
class SaeShape:
    features: int  # F
    width: int  # D_in
    per_feature: int = 2  # vectors of length F beside the encoder's matrix
    top_k: bool = False

    @property
    def weights(self) -> int:
        return FLOAT * self.features * (self.width + self.per_feature)


@dataclass(frozen=True)
class Tiles:
    """What the loss and the pooling hold at once; the constants of `core`."""

    vocab_columns: int
    vocab_rows: int
    chunk_elements: int  # of logits, where the KL needs whole rows
    pool_elements: int


@dataclass(frozen=True)
class Lengths:
    """One pair, in tokens."""

    prompt: int
    chosen: int
    rejected: int

    @property
    def rows(self) -> int:
        """Response positions."""
        return self.chosen + self.rejected

    @property
    def tokens(self) -> int:
        return self.prompt + self.rows


@dataclass(frozen=True)
class Setup:
    """The settings that memory and time depend on."""

    first_adapted: int  # block
    last_adapted: int
    adapter_parameters: int
    optimizer: str = "adam"
    micro_batch_size: int = 1
    batch_size: int = 4  # pairs an update
    grad_checkpoint: bool = False
    kl: bool = False
    stop_gradient: bool = True
    top_k: int = 50


@dataclass(frozen=True)
class Term:
    name: str
    bytes: float


@dataclass(frozen=True)
class Pass:
    """One call of the backbone: `n` sequences of `new` tokens that look at `seen` positions."""

    n: int
    new: int
    seen: int
    prompt: bool = False

    @property
    def tokens(self) -> int:
        return self.n * self.new


def passes(lengths: Lengths, *, share_prompt: bool) -> list[Pass]:
    """The calls of the backbone for one pair, as `model.policy.Policy` makes them."""
    p, sides = lengths.prompt - 1, (lengths.chosen, lengths.rejected)
    if not share_prompt:
        longest = p + max(sides)
        return [Pass(2, longest, longest)]
    shared = [Pass(1, p, p, prompt=True)] if p else []
    if abs(sides[0] - sides[1]) * 8 > sum(sides):
        return [*shared, *(Pass(1, n, p + n) for n in sides)]
    return [*shared, Pass(2, max(sides), p + max(sides))]


def train_terms(
    model: ModelShape, saes: Sequence[SaeShape], setup: Setup, tiles: Tiles, lengths: Lengths
) -> list[Term]:
    """Peak memory of one update whose pairs have these lengths, largest first."""
    calls = passes(lengths, share_prompt=model.shares_prompt) * setup.micro_batch_size
    rows = lengths.rows * setup.micro_batch_size
    state = FLOAT * setup.adapter_parameters
    gradients = 2 if setup.batch_size > setup.micro_batch_size else 1
    kept = sum(_kept(model, setup, call) for call in calls)
    heaviest = max(calls, key=lambda call: _block(model, call))
    # a pass in work: its temporaries, and with checkpointing one block's activations made again
    work = (WORK + setup.grad_checkpoint) * _block(model, heaviest)
    loss = _head(model, tiles, rows, grad=True, kl=setup.kl)
    pooling = sum(_pool(sae, tiles, rows, 2 * setup.micro_batch_size) for sae in saes)
    terms = [
        Term("model weights", model.weights),
        Term("SAE weights", sum(sae.weights for sae in saes)),
        Term("adapters and optimizer", state * (2 + MOMENTS[setup.optimizer])),
        Term("gradients", state * gradients),
        Term("kept for the backward pass", kept),
        Term("block in work, loss or pooling", max(work, loss, pooling)),
        Term("other", BASE + _columns(saes, setup)),
    ]
    return sorted(terms, key=lambda term: -term.bytes)


def precompute_terms(
    model: ModelShape, saes: Sequence[SaeShape], tiles: Tiles, lengths: Lengths
) -> list[Term]:
    """Peak memory of scoring one pair with the reference, largest first."""
    calls = passes(lengths, share_prompt=model.shares_prompt)
    work = max(WORK * _block(model, call) for call in calls)
    loss = _head(model, tiles, lengths.rows, grad=False, kl=False)
    pooling = sum(_pool(sae, tiles, lengths.rows, 2) for sae in saes)
    prefix = sum(model.keys * call.tokens for call in calls if call.prompt) * model.blocks
    terms = [
        Term("model weights", model.weights),
        Term("SAE weights", sum(sae.weights for sae in saes)),
        Term("keys and values of the prompt", prefix * model.value_bytes),
        Term("block in work, loss or pooling", max(work, loss, pooling)),
        Term("other", BASE),
    ]
    return sorted(terms, key=lambda term: -term.bytes)


def total(terms: Sequence[Term]) -> float:
    return sum(term.bytes for term in terms)


def _block(model: ModelShape, call: Pass) -> float:
    """Bytes that one block keeps of one pass."""
    width = (
        KEPT["hidden"] * model.hidden
        + KEPT["query"] * model.query
        + KEPT["keys"] * model.keys
        + KEPT["inner"] * model.inner
    )
    return model.value_bytes * width * call.tokens + SCORES * _scores(model, call)


def _scores(model: ModelShape, call: Pass) -> float:
    if model.fused_attention:
        return 0.0
    return model.value_bytes * model.heads * call.n * call.new * call.seen


def _kept(model: ModelShape, setup: Setup, call: Pass) -> float:
    """Bytes of one pass that live until the backward pass: blocks from the first adapted one on."""
    blocks = model.blocks - setup.first_adapted - call.prompt  # the last one makes keys only
    if setup.grad_checkpoint:
        edge = model.hidden * call.tokens + model.keys * call.tokens
        return blocks * model.value_bytes * edge
    return blocks * _block(model, call)


def _head(model: ModelShape, tiles: Tiles, rows: int, *, grad: bool, kl: bool) -> float:
    """The loss: a few tiles of logits, and the rows' gradients."""
    slopes = rows * model.hidden * FLOAT * (3 if grad else 0)
    if kl:  # whole rows of logits of policy and reference, forward and backward
        return FLOAT * 5 * min(tiles.chunk_elements, rows * model.vocab) + 2 * slopes
    return FLOAT * 4 * min(rows, tiles.vocab_rows) * tiles.vocab_columns + slopes


def _pool(sae: SaeShape, tiles: Tiles, rows: int, responses: int) -> float:
    """Pooling: a tile of activations in three forms, and vectors of length F a response."""
    tile = min(tiles.pool_elements, rows * sae.features)
    return FLOAT * (3 * tile + 5 * responses * sae.features)


def _columns(saes: Sequence[SaeShape], setup: Setup) -> float:
    """The selected encoder columns, again with gradient."""
    sides = setup.micro_batch_size * (1 if setup.stop_gradient else 2)
    return sum(FLOAT * 2 * sides * 2 * setup.top_k * sae.width for sae in saes)
