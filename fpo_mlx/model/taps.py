"""Looking into a model that mlx-lm built, without changing it.

One object is given a subclass of its own class whose `__call__` also notes what passed. Parameter
paths and isinstance stay as they were, so adapters keep mlx-lm's names.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map

from fpo_mlx.errors import ModelError
from fpo_mlx.model import randomness
from fpo_mlx.model.trees import leaves_of
from fpo_mlx.records import (
    AFTER_ATTENTION,
    BEFORE_MLP,
    Norms,
    Site,
    SiteKind,
    residual_factor,
    unknown_addition,
)

ATTENTION = ("self_attn", "attn", "attention", "linear_attn", "temporal_block", "mixer")
MLP = ("mlp", "feed_forward", "block_sparse_moe", "ffn")
OUT_PROJ = ("o_proj", "out_proj", "dense", "c_proj", "wo")
BESIDE_MLP = ("shared_mlp",)  # of blocks whose experts have another name
BEHIND_ALL = ("per_layer_input_gate", "per_layer_projection")  # Gemma 3n and 4: behind the MLP


def swap_call(module: nn.Module, call) -> None:
    """Give this one object a `__call__` of (own class's call, *args, **kwargs)."""
    cls = type(module)
    original = cls.__call__

    def __call__(self, *args, **kwargs):
        return call(lambda *a, **k: original(self, *a, **k), *args, **kwargs)

    module.__class__ = type(cls.__name__, (cls,), {"__call__": __call__, "__module__": __name__})


Change = Callable[[mx.array], mx.array]  # [B, L, D] -> the same shape


class Tap:
    """Collects the input or output of one module while `recording()`.

    Within `intervening(change)` the model goes on with what `change` makes of it, and that is what
    is recorded. `lasting` changes come after that one, in every pass.
    """

    def __init__(self, module: nn.Module, port: str) -> None:
        self._seen: list[mx.array] | None = None
        self._change: Change | None = None
        self.lasting: list[Change] = []

        def call(original, *args, **kwargs):
            if port == "input":
                return original(self._passed(args[0]), *args[1:], **kwargs)
            return self._passed(original(*args, **kwargs))

        swap_call(module, call)

    def _passed(self, value):
        """An array, or a tuple that begins with it, as it goes on."""
        array = value[0] if isinstance(value, tuple) else value
        changes = [*((self._change,) if self._change else ()), *self.lasting]
        for change in changes:
            array = change(array).astype(array.dtype)
        if changes:
            value = (array, *value[1:]) if isinstance(value, tuple) else array
        if self._seen is not None:
            self._seen.append(array)
        return value

    @contextmanager
    def intervening(self, change: Change) -> Iterator[None]:
        """Put `change` between this place and what follows it."""
        self._change = change
        try:
            yield
        finally:
            self._change = None

    @contextmanager
    def recording(self) -> Iterator[list[mx.array]]:
        """A list that fills with one array [B, L, D] per call of the module."""
        self._seen = seen = []
        try:
            yield seen
        finally:
            self._seen = None


def without(basis: mx.array) -> Change:
    """Takes the span of orthonormal columns out of a site. basis: [D, r], float32.

    After concept ablation fine-tuning (Casademunt et al. 2025, arXiv 2507.16795): what comes after
    the site cannot read these directions, and no gradient reaches what comes before it by them.
    """

    def change(array: mx.array) -> mx.array:
        rows = array.astype(mx.float32)
        return rows - (rows @ basis) @ basis.T

    return change


def tap_point(block: nn.Module, site: Site) -> tuple[nn.Module, str]:
    """The module and port ("input" | "output") that carry the site's tensor in this block.

    Raises: ModelError for a site that this block does not have, or where it is not known.
    """
    kind = site.kind
    if kind == "resid_post":
        return block, "output"
    if kind == "resid_pre":
        return block, "input"
    if kind in ("attn_raw", "attn_z"):
        attention = _child(block, ATTENTION, site)
        raw = kind == "attn_raw"
        return (attention, "output") if raw else (_child(attention, OUT_PROJ, site), "input")
    if kind in ("mlp_in", "mlp_raw"):
        return _child(block, MLP, site), "input" if kind == "mlp_in" else "output"
    if name := unknown_addition(block, kind):
        raise ModelError(
            f"the {site} cannot be tapped: how a {type(block).__name__} with {name} adds to "
            "its stream is not known here. Use resid_post, or an SAE of another site."
        )
    norms = Norms.of([name for name, child in block.items() if isinstance(child, nn.Module)])
    if kind in ("attn_out", "mlp_out"):
        attends = kind == "attn_out"
        part = _child(block, ATTENTION if attends else MLP, site)
        behind = norms.behind_attention if attends else norms.behind_mlp
        return block[behind] if behind else part, "output"
    return _before_mlp(block, site, norms), "input"


def _before_mlp(block: nn.Module, site: Site, norms: Norms) -> nn.Module:
    """What reads the stream between attention and MLP: for resid_mid and mlp_in_unscaled."""
    if site.kind == "resid_mid" and getattr(block, "use_parallel_residual", False):  # GPT-NeoX
        raise ModelError(
            f"the {site} cannot be tapped: attention and MLP of a {type(block).__name__} read the "
            "same input, so there is no stream between them. Use resid_post, or another site."
        )
    if norms.before_mlp is None and norms.behind_attention:
        reader = _child(block, MLP, site)  # OLMo 2 has no norm before its MLP
    else:
        reader = _child(block, (*BEFORE_MLP, AFTER_ATTENTION), site)
    if site.kind == "mlp_in_unscaled" and not type(reader).__name__.endswith("RMSNorm"):
        raise ModelError(
            f"the {site} cannot be tapped: a {type(reader).__name__} of the {type(block).__name__} "
            "reads the stream there, and no RMS norm. Use resid_post, or an SAE of another site."
        )
    return reader


def _child(module: nn.Module, names: tuple[str, ...], site: Site) -> nn.Module:
    for name in names:
        if isinstance(module.get(name), nn.Module):  # LongCat has lists of them
            return module[name]
    raise ModelError(
        f"the {site} cannot be tapped: {type(module).__name__} has none of {', '.join(names)} "
        f"(it has {', '.join(sorted(module.children()))}). Use resid_post, or an SAE of that site."
    )


def behind(block: nn.Module, kind: SiteKind) -> tuple[str, ...]:
    """Names within the block of what surely comes after a site of this kind, with all in it."""
    if kind in ("resid_pre", "resid_post"):  # between blocks
        return ()
    after = BEHIND_ALL if kind in ("mlp_raw", "mlp_out") else (*MLP, *BESIDE_MLP, *BEHIND_ALL)
    found = [name for name in after if name in block]
    if kind == "attn_z":
        attention = next((name for name in ATTENTION if name in block), None)
        inner = block[attention] if attention else {}
        found += [f"{attention}.{name}" for name in OUT_PROJ if name in inner][:1]
    return tuple(found)


def refuse_streams(array: mx.array, tokens: mx.array, site: Site) -> None:
    """Raise ModelError where what was tapped is not [B, L, D] for tokens [B, L]."""
    if array.ndim != 3 or array.shape[:2] != tokens.shape:
        raise ModelError(
            f"the {site} of this model is an array of shape {array.shape} for {tokens.shape} "
            "tokens, not one vector per token. Choose another site."
        )


def norm_and_residual(config: Mapping[str, Any]) -> tuple[float, float]:
    """What `finish` wants of config.json: the norms' epsilon, and the factor on the stream."""
    text = config.get("text_config") or config  # a wrapper keeps the language model's own there
    return float(text.get("rms_norm_eps") or 1e-6), residual_factor(text)


def finish(rows: mx.array, site: Site, eps: float, residual: float = 1.0) -> mx.array:
    """What is left to do to the tapped tensor.

    Gain-free RMSNorm for `mlp_in_unscaled`; `residual_factor` on what is added to the stream.
    """
    if site.kind in ("attn_out", "mlp_out"):
        return rows * residual if residual != 1.0 else rows
    if site.kind != "mlp_in_unscaled":
        return rows
    rows = rows.astype(mx.float32)
    return rows * mx.rsqrt((rows * rows).mean(axis=-1, keepdims=True) + eps)


def refuse_splice(site: Site) -> None:
    """Raise ModelError where the tapped tensor is not all that the model reads of the site."""
    if site.kind in ("resid_mid", "mlp_in_unscaled"):
        raise ModelError(
            f"nothing can be put in the place of the {site}: the model reads it in more than one "
            "way, and the tap sees only what goes into the norm before the MLP."
        )


def unfinish(rows: mx.array, site: Site, residual: float = 1.0) -> mx.array:
    """The tapped tensor that `finish` would turn into `rows`, where `refuse_splice` lets pass."""
    return rows / residual if site.kind in ("attn_out", "mlp_out") and residual != 1.0 else rows


def checkpoint_block(block: nn.Module) -> None:
    """Recompute this block's activations in the backward pass (gradient checkpointing).

    Keys and values that a `PrefixCache` collects inside the call leave it as outputs, since an
    array noted on the side would tie the whole block to the outer graph; arrays that come within
    tuples (keys and values of an earlier block, in Gemma 4) enter it as inputs for the same reason.
    Where the block has dropout, the second pass draws the numbers of the first, and leaves no trace
    in the generator.
    """
    owner = weakref.ref(block)  # its class holds `call`: a cycle would keep the weights

    def call(original, *args, **kwargs):
        block = cast(nn.Module, owner())
        given = leaves_of((args, kwargs))
        cache = next((leaf for leaf in given if isinstance(leaf, PrefixCache)), None)
        arrays = [leaf for leaf in given if isinstance(leaf, mx.array)]
        start = randomness.position() if randomness.drops(block) else None
        passes = []

        def inner(parameters, held, *rest):
            if start is None:
                return run(parameters, held, *rest)
            now = randomness.position()
            randomness.go_to(start)
            out = run(parameters, held, *rest)
            if passes:
                randomness.go_to(now)
            passes.append(now)
            return out

        def run(parameters, held, *rest):
            block.update(parameters)
            fresh, rest = cache.like(held[0]) if cache else PrefixCache(), iter(rest)
            fresh.own = held[1]

            def put(leaf):
                if isinstance(leaf, mx.array):
                    return next(rest)
                return fresh if leaf is cache and cache else leaf

            a, k = tree_map(put, (args, kwargs))
            out = original(*a, **k)
            # the same array twice among the outputs would lose one of its two gradients
            twice = any(leaf is own for leaf in leaves_of(out) for own in fresh.own)
            return out, tuple(map(mx.contiguous, fresh.own)) if twice else fresh.own

        held = (cache.prefix, cache.own) if cache else ((), ())
        trainable = block.trainable_parameters()
        out, own = mx.checkpoint(inner)(trainable, held, *arrays)
        block.update(trainable)  # undo the tracer that `inner` left behind
        if cache:
            cache.own = own
        return out

    swap_call(block, call)


class PrefixCache:
    """A functional key-value cache: what came before goes in, what this call adds comes out.

    Nothing is written in place, so gradients flow through both. mlx-lm's attention modules call
    `update_and_fetch`, `offset` and `make_mask`, the part of its cache protocol kept here.

    Rows whose prefixes differ in length have them flush with what follows: `padding` [B] counts the
    columns before each, which no token looks at, and `axes` are those that the model's masks have.
    """

    def __init__(
        self,
        prefix: tuple[mx.array, ...] = (),
        padding: mx.array | None = None,
        axes: int = 4,
    ) -> None:
        self.prefix = prefix  # () or keys and values, [1 or B, heads, P, d]
        self.own: tuple[mx.array, ...] = ()  # of this call, [B, heads, L, d]
        self.padding, self.axes = padding, axes
        self.width = prefix[0].shape[2] if prefix else 0
        # position of the next token; of each row's
        self.offset: Any = self.width if padding is None else self.width - padding

    def like(self, prefix: tuple[mx.array, ...]) -> PrefixCache:
        """Another one behind the same rows, with these arrays."""
        return PrefixCache(prefix, self.padding, self.axes)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, ...]:
        self.own = (keys, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, ...]:
        """All of them; blocks without their own ask an earlier block's cache (Gemma 3n)."""
        if not self.prefix:
            return self.own
        return tuple(
            mx.concatenate([mx.broadcast_to(old, (new.shape[0], *old.shape[1:])), new], axis=2)
            for old, new in zip(self.prefix, self.own, strict=True)
        )

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None):
        """None, "causal", or a boolean [n, P + n] where a window or the caller asks for one.

        Of rows with padding a boolean [B, 1, n, P + n], or with one axis more.
        """
        from mlx_lm.models.base import create_causal_mask

        if self.padding is not None:
            mask = create_causal_mask(n, self.width, window_size=window_size)
            first = self.padding.reshape(-1, *[1] * (self.axes - 1))
            return mask & (mx.arange(self.width + n) >= first)
        if window_size is not None and self.offset + n > window_size:
            return create_causal_mask(n, self.offset, window_size=window_size)
        if return_array:
            return create_causal_mask(n, self.offset)
        return None if n == 1 else "causal"
