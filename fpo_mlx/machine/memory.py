"""Peak memory and time of `train` and `precompute`, predicted term by term from shapes alone.

Pure arithmetic: no model is built and no weight is read. What is counted is what the code of
`model.policy`, `core` and `trainer` keeps alive; the few constants below were fitted to measured
peaks with `scripts/bench/plan.py`, which prints predicted and measured side by side.
Freed buffers that MLX keeps are in no peak: it gives them back where memory is short.
Bytes throughout; FLOPs count a multiplication and an addition as two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from fpo_mlx.machine.device import Device

FLOAT = 4  # bytes: adapters, optimizer state, log-probs and SAE arithmetic are float32
# Fitted to measured peaks (scripts/bench/plan.py):
# arrays of each width that a block keeps for its backward pass: hidden, query, keys, MLP
KEPT = {"hidden": 4.8, "query": 0.4, "keys": 3.0, "inner": 4.7}
STATES = 2.3  # float32 states of a gated delta rule a token: mlx-lm trains it token by token
SCORES = 1.2  # the same for attention weights, where attention has no fused kernel
FORWARD = {"hidden": 4.0, "inner": 4.0}  # the same in work without gradient
FORWARD_SCORES = 1.5
WHOLE_ARRAYS = 3.0  # logits of whole rows, their slopes, and what is in work
TILE_ARRAYS = 2.6  # arrays of a tile's size, where there are fewer tiles than that
FEATURE_VECTORS = 20  # of length F, for each response
KL_TILES = 2.0  # times the tiles of logits, where the reference's are there too
# of the heaviest block's kept arrays: temporaries of the pass in work, without and with
# gradient checkpointing, where several blocks are made again at once
WORK, WORK_AGAIN = 1.15, 3.0
# of a pair and of each of its two rows in the cache's index, beside its tokens: Python's objects.
# Estimated from their fields; scripts/bench/data_side.py measures what all pairs hold
PAIR_BYTES, ROW_BYTES = 800.0, 350.0
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
    window: int | None = None  # positions beyond it need a mask array, which no kernel fuses
    half_head: bool = False  # logits come from a plain matrix of fewer than 32 bits
    states: tuple[int, ...] = ()  # of each block, values of its gated delta rule's state, or 0

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
    """What the loss and the pooling hold at once, of a `machine.device.Device`."""

    vocab_columns: int
    vocab_rows: int
    pool_elements: int
    ahead: int = 10  # alive at once: the device allocates for operations that still wait
    row_elements: int | None = None  # logits of whole rows at once; None: tiles are folded
    wide_elements: int = 0  # of a half-precision head that is widened at once
    together: bool = False  # the pairs of a micro batch in one pass

    @staticmethod
    def of(here: Device) -> Tiles:
        whole = None if here.fold else here.row_elements
        return Tiles(
            here.vocab_columns, here.vocab_rows, here.pool_elements, here.ahead, whole,
            here.wide_elements, here.together,
        )  # fmt: skip


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

    @property
    def longest(self) -> int:
        """The longer of the two sequences."""
        return self.prompt + max(self.chosen, self.rejected)


@dataclass(frozen=True)
class Adapted:
    """What the adapted layers keep beside their blocks' arrays; sums over all of them."""

    inputs: int = 0  # widths: in half precision, each has a float32 copy of its own for x A
    outputs: int = 0  # widths of DoRA's, kept before the magnitude multiplies them
    unpacked: int = 0  # values of packed matrices, which DoRA unpacks in every pass

    def part(self, of: float) -> Adapted:
        return Adapted(round(self.inputs * of), round(self.outputs * of), round(self.unpacked * of))


@dataclass(frozen=True)
class Setup:
    """The settings that memory and time depend on."""

    first_adapted: int  # block
    last_adapted: int
    adapter_parameters: int
    optimizer: str = "adam"
    micro_batch_size: int = 1
    batch_size: int = 4  # pairs per update, of all processes
    grad_checkpoint: bool = False
    kl: bool = False
    stop_gradient: bool = True
    top_k: int = 50
    forward: bool = False  # the gradient comes from two passes without one
    adapted: Adapted = Adapted()
    processes: int = 1

    @property
    def most_at_once(self) -> int:
        """Pairs of an update that one process has."""
        return -(-self.batch_size // self.processes)

    @property
    def adapted_blocks(self) -> int:
        return self.last_adapted - self.first_adapted + 1


@dataclass(frozen=True)
class Term:
    name: str
    bytes: float


def data_term(lengths: Sequence[Lengths]) -> Term:
    """What all pairs hold in the process's own memory; features of the reference stay on disk."""
    tokens = sum(one.tokens for one in lengths)
    return Term("pairs and cache index", 4 * tokens + len(lengths) * (PAIR_BYTES + 2 * ROW_BYTES))


@dataclass(frozen=True)
class Pass:
    """One call of the backbone: `n` sequences of `new` tokens that look at `seen` positions."""

    n: int
    new: int
    seen: int
    masked: bool = False  # by an array of each sequence's own, which may write the scores out

    @property
    def tokens(self) -> int:
        return self.n * self.new


def passes(lengths: Lengths, *, share_prompt: bool) -> list[Pass]:
    """The calls of the backbone for one pair, as `model.policy.Policy` makes them."""
    p, sides = lengths.prompt - 1, (lengths.chosen, lengths.rejected)
    if not share_prompt:
        longest = p + max(sides)
        return [Pass(2, longest, longest)]
    first, second = sides
    return [Pass(1, p + first, p + first), Pass(1, second, p + second)]


def _calls(model: ModelShape, setup: Setup, tiles: Tiles, lengths: Lengths) -> list[Pass]:
    """Those of a micro batch: pairs one after the other, or all of them in the passes of one.

    Whole sequences are in one pass on every device.
    """
    calls, n = passes(lengths, share_prompt=model.shares_prompt), setup.micro_batch_size
    if n == 1 or (model.shares_prompt and not tiles.together):
        return calls * n
    return [Pass(n * one.n, one.new, one.seen, one.new < one.seen) for one in calls]


def train_terms(
    model: ModelShape, saes: Sequence[SaeShape], setup: Setup, tiles: Tiles, lengths: Lengths
) -> list[Term]:
    """Peak memory of one update whose pairs have these lengths, largest first."""
    calls = _calls(model, setup, tiles, lengths)
    rows = lengths.rows * setup.micro_batch_size
    state = FLOAT * setup.adapter_parameters
    gradients = 2 if setup.batch_size > setup.micro_batch_size else 1
    kept, work = _work_without(model, calls) if setup.forward else _work(model, setup, calls)
    if setup.forward:
        gradients = 4  # the direction, both sides, and the gradient made of them
    loss = _head(model, tiles, rows, grad=not setup.forward, kl=setup.kl)
    pooling = sum(_pool(sae, tiles, rows, 2 * setup.micro_batch_size) for sae in saes)
    terms = [
        Term("model weights", model.weights),
        Term("SAE weights", sum(sae.weights for sae in saes)),
        # the adapters as they are, before the last update and at the start
        Term("adapters and optimizer", state * (3 + MOMENTS[setup.optimizer])),
        Term("gradients", state * gradients),
        Term("kept for the backward pass", kept),
        Term("block in work, loss or pooling", max(work, loss, pooling)),
        Term("other", BASE + _columns(saes, setup)),
    ]
    return sorted(terms, key=lambda term: -term.bytes)


def _work(model: ModelShape, setup: Setup, calls: Sequence[Pass]) -> tuple[float, float]:
    """(kept for the backward pass, the block in work)."""
    heaviest = max(calls, key=lambda call: _block(model, call))
    block = _block(model, heaviest) + _states(model, setup, heaviest, max)
    if setup.grad_checkpoint:  # else all that adapted layers keep is counted among what is kept
        block += _adapted(model, setup.adapted, heaviest) / setup.adapted_blocks
    work = (WORK_AGAIN if setup.grad_checkpoint else WORK) * block
    return sum(_kept(model, setup, call) for call in calls), work


def _work_without(model: ModelShape, calls: Sequence[Pass]) -> tuple[float, float]:
    """The same without a backward pass: keys and values of the first response's pass."""
    prefix = model.keys * calls[0].tokens * model.blocks if model.shares_prompt else 0
    return prefix * model.value_bytes, max(_forward(model, call) for call in calls)


def precompute_terms(
    model: ModelShape, saes: Sequence[SaeShape], tiles: Tiles, lengths: Lengths
) -> list[Term]:
    """Peak memory of scoring one pair with the reference, largest first."""
    calls = passes(lengths, share_prompt=model.shares_prompt)
    prefix, work = _work_without(model, calls)
    loss = _head(model, tiles, lengths.rows, grad=False, kl=False)
    pooling = sum(_pool(sae, tiles, lengths.rows, 2) for sae in saes)
    terms = [
        Term("model weights", model.weights),
        Term("SAE weights", sum(sae.weights for sae in saes)),
        Term("keys and values of the first response's pass", prefix),
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


def _forward(model: ModelShape, call: Pass) -> float:
    """Bytes of one block in work without gradient."""
    width = FORWARD["hidden"] * model.hidden + FORWARD["inner"] * model.inner
    return model.value_bytes * width * call.tokens + FORWARD_SCORES * _scores(model, call)


def _scores(model: ModelShape, call: Pass) -> float:
    windowed = bool(model.window) and call.seen > model.window
    if model.fused_attention and not windowed and not call.masked:
        return 0.0
    return model.value_bytes * model.heads * call.n * call.new * call.seen


def _kept(model: ModelShape, setup: Setup, call: Pass) -> float:
    """Bytes of one pass that live until the backward pass: blocks from the first adapted one on."""
    blocks = model.blocks - setup.first_adapted
    if setup.grad_checkpoint:
        edge = model.hidden * call.tokens + model.keys * call.tokens
        return blocks * model.value_bytes * edge
    states = _states(model, setup, call, sum)
    return blocks * _block(model, call) + _adapted(model, setup.adapted, call) + states


def _states(
    model: ModelShape, setup: Setup, call: Pass, of: Callable[[Sequence[int]], int]
) -> float:
    """Bytes of the states that the blocks with a gradient, or the largest of them, keep."""
    return STATES * FLOAT * call.tokens * of(model.states[setup.first_adapted :] or (0,))


def _adapted(model: ModelShape, adapted: Adapted, call: Pass) -> float:
    """Bytes that all adapted layers keep of one pass, beside what `_block` counts."""
    copies = FLOAT * adapted.inputs if model.value_bytes < FLOAT else 0
    dora = model.value_bytes * (adapted.outputs * call.tokens + adapted.unpacked)
    return copies * call.tokens + dora


def _head(model: ModelShape, tiles: Tiles, rows: int, *, grad: bool, kl: bool) -> float:
    """The loss: a few tiles of logits, and the rows' gradients."""
    slopes = rows * model.hidden * FLOAT * (3 if grad else 0)
    sides = KL_TILES if kl else 1.0
    if tiles.row_elements is not None and model.half_head:
        return _wide_head(model, tiles, min(rows, tiles.vocab_rows), sides, grad) + sides * slopes
    if tiles.row_elements is not None:
        tile, arrays = min(rows * model.vocab, tiles.row_elements), WHOLE_ARRAYS
    else:
        tile = min(rows, tiles.vocab_rows) * tiles.vocab_columns
        arrays = min(tiles.ahead, TILE_ARRAYS * model.vocab / tiles.vocab_columns)
    return sides * (FLOAT * arrays * tile + slopes)


def _wide_head(model: ModelShape, tiles: Tiles, rows: int, sides: float, grad: bool) -> float:
    """Of `core.wide_tiles`: one tile of the matrix in float32, its logits, every tile's pull."""
    count = -(-model.vocab * model.hidden // tiles.wide_elements)
    columns = -(-model.vocab // count)
    pulls = count * rows * model.hidden if grad else 0
    return FLOAT * (columns * model.hidden + sides * (WHOLE_ARRAYS * rows * columns + pulls))


def _pool(sae: SaeShape, tiles: Tiles, rows: int, responses: int) -> float:
    """Pooling: tiles of activations, and vectors of length F per response."""
    everything = rows * sae.features
    tile = min(tiles.pool_elements, everything)
    arrays = min(tiles.ahead, TILE_ARRAYS * everything / tile)
    return FLOAT * (arrays * tile + FEATURE_VECTORS * responses * sae.features)


def _columns(saes: Sequence[SaeShape], setup: Setup) -> float:
    """The selected encoder columns, again with gradient."""
    sides = setup.micro_batch_size * (1 if setup.stop_gradient else 2)
    return sum(FLOAT * 2 * sides * 2 * setup.top_k * sae.width for sae in saes)


# Time ---------------------------------------------------------------------------------------------


def train_flops(
    model: ModelShape, saes: Sequence[SaeShape], setup: Setup, lengths: Lengths
) -> float:
    """Of one pair: forward everywhere, backward from the first adapted block on."""
    behind = (model.blocks - setup.first_adapted) / model.blocks  # share of the blocks
    rounds = 1 + behind * (2 if setup.grad_checkpoint else 1) + setup.kl
    if setup.forward:
        rounds = 2.0 * (1 + setup.kl)
    body = sum(_body(model, call) for call in passes(lengths, share_prompt=model.shares_prompt))
    head = 2.0 * lengths.rows * model.hidden * model.vocab * (4 if setup.kl else 2)
    return body * rounds + head + sum(_encode(sae, lengths) for sae in saes)


def precompute_flops(model: ModelShape, saes: Sequence[SaeShape], lengths: Lengths) -> float:
    """Of one pair: one forward, the head once, the pooling."""
    body = sum(_body(model, call) for call in passes(lengths, share_prompt=model.shares_prompt))
    head = 2.0 * lengths.rows * model.hidden * model.vocab
    return body + head + sum(_encode(sae, lengths) for sae in saes)


def _body(model: ModelShape, call: Pass) -> float:
    attention = 4.0 * model.query * call.n * call.new * call.seen
    return model.blocks * (2.0 * model.block_parameters * call.tokens + attention)


def _encode(sae: SaeShape, lengths: Lengths) -> float:
    return 2.0 * lengths.rows * sae.width * sae.features


def seconds(flops: float, gflops: float) -> float:
    """gflops: measured speed of a large product."""
    return flops / (gflops * 1e9 * EFFICIENCY)
