"""What the code leans on inside mlx, mlx-lm and transformers: one contract each.

Every function whose name is in CONTRACTS fails if that part of the other package is no longer as
the code needs it. docs/upstream.md says what happens to a user then.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

CONTRACTS: dict[str, Callable[[], None]] = {}


def contract(function: Callable[[], None]) -> Callable[[], None]:
    CONTRACTS[function.__name__] = function
    return function


def takes(function: Callable, *names: str) -> None:
    """It has arguments of these names (it may have others)."""
    absent = set(names) - set(inspect.signature(function).parameters)
    assert not absent, f"{function.__module__}.{function.__qualname__} takes no {absent}"


def small_llama():
    """mlx-lm's llama with two blocks, no weights read."""
    from mlx_lm.models import llama

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 40}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "rms_norm_eps": 1e-6}
    return llama.Model(llama.ModelArgs(model_type="llama", **sizes, **heads))


def torch_llama():
    """transformers' llama with two blocks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 24, "vocab_size": 40}
    return LlamaForCausalLM(
        LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    ).eval()


class Spy:
    """A cache that notes what an attention module asks of it, with fpo-mlx's own behind it."""

    def __init__(self) -> None:
        from fpo_mlx.model.taps import PrefixCache

        self.asked, self._real = set(), PrefixCache()

    def __getattr__(self, name: str):
        self.asked.add(name)
        return getattr(self._real, name)


# mlx


@contract
def mlx_random_state_is_one_key_of_two_numbers() -> None:
    import mlx.core as mx

    mx.random.seed(5)
    assert [len(mx.random.state), mx.random.state[0].tolist()] == [1, [0, 5]]


@contract
def mlx_dropout_keeps_the_probability_to_stay() -> None:
    import mlx.nn as nn

    assert nn.Dropout(0.25)._p_1 == 0.75


@contract
def mlx_modules_keep_their_class_in_the_instance() -> None:
    """An object may be given a subclass of its class, and stays the module that it was."""
    import mlx.core as mx
    import mlx.nn as nn

    from fpo_mlx.model.taps import swap_call

    layer, seen = nn.Linear(2, 2), []
    swap_call(layer, lambda original, x: seen.append(1) or original(x))
    layer(mx.zeros((1, 2)))
    assert seen == [1]
    assert isinstance(layer, nn.Linear)
    assert set(layer.parameters()) == {"weight", "bias"}


# mlx-lm


@contract
def mlx_lm_loads_and_saves_models_under_these_arguments() -> None:
    from mlx_lm import utils

    takes(utils.load_model, "lazy", "trust_remote_code")
    takes(utils.load_tokenizer, "eos_token_ids")
    takes(utils.save, "donate_model")
    takes(utils.save_model, "donate_model")
    takes(utils.quantize_model, "group_size", "bits")
    takes(utils.save_config, "config_path")


@contract
def mlx_lm_converts_under_these_arguments() -> None:
    from mlx_lm.convert import convert

    takes(convert, "quantize", "q_group_size", "q_bits", "dtype", "trust_remote_code")


@contract
def mlx_lm_trains_on_sequences_so() -> None:
    from mlx_lm.tuner.trainer import default_loss, iterate_batches

    takes(iterate_batches, "dataset", "batch_size", "max_seq_length")
    takes(default_loss, "model", "batch", "lengths")
    tokens, lengths = next(iterate_batches([([1, 2, 3, 4], 2)], 1, 8))
    assert tokens[0, :4].tolist() == [1, 2, 3, 4]
    assert tuple(lengths.shape) == (1, 2)
    loss, count = default_loss(small_llama(), tokens, lengths)
    assert loss.shape == ()
    assert 1 <= count.item() <= 3


@contract
def mlx_lms_models_keep_their_arguments() -> None:
    from mlx_lm.models import gemma2, gemma3_text, llama, qwen2

    assert {"attn_logit_softcapping"} <= set(gemma2.ModelArgs.__dataclass_fields__)
    for module in (llama, qwen2, gemma3_text):
        fields = module.ModelArgs.__dataclass_fields__
        assert {"rope_theta", "rope_scaling", "rms_norm_eps", "num_key_value_heads"} <= set(fields)
        assert "self.args = args" in inspect.getsource(module.Model.__init__)


@contract
def mlx_lm_answers_as_any_user_calls_it() -> None:
    from mlx_lm import generate, load

    takes(generate, "prompt")
    takes(load, "path_or_hf_repo")


@contract
def mlx_lm_has_these_key_value_caches() -> None:
    from mlx_lm.models.cache import KVCache, RotatingKVCache, make_prompt_cache

    caches = make_prompt_cache(small_llama())
    assert [type(cache) for cache in caches] == [KVCache, KVCache]
    assert hasattr(RotatingKVCache, "merge")


@contract
def mlx_lm_asks_a_cache_for_no_more_than_ours_has() -> None:
    import mlx.core as mx

    model, spies = small_llama(), [Spy(), Spy()]
    model(mx.array([[1, 2, 3]]), cache=spies)
    asked = set().union(*(spy.asked for spy in spies))
    assert "update_and_fetch" in asked
    # asked with hasattr or getattr and a default: of quantised and of batched caches
    assert asked - {"bits", "lengths", "left_padding"} <= {
        "update_and_fetch", "offset", "make_mask"
    }  # fmt: skip


@contract
def mlx_lm_makes_a_causal_mask_of_these_arguments() -> None:
    from mlx_lm.models.base import create_causal_mask

    assert create_causal_mask(2, 1, window_size=2).tolist() == [
        [True, True, False],
        [False, True, True],
    ]


@contract
def mlx_lm_names_the_parts_of_a_model_so() -> None:
    model = small_llama()
    block = model.layers[0]
    assert model.model.layers[0] is block
    assert {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} <= set(block)
    assert {"q_proj", "k_proj", "v_proj", "o_proj"} <= set(block.self_attn)
    takes(type(model.model).__call__, "cache")


@contract
def mlx_lm_puts_adapters_on_the_layers_that_are_named() -> None:
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.tuner.utils import linear_to_lora_layers

    model = small_llama()
    model.freeze()
    key = "model.layers.1.self_attn.q_proj"
    config = {"rank": 2, "scale": 3.0, "dropout": 0.0, "keys": {key}}
    linear_to_lora_layers(model, 1, config, use_dora=False)
    layer = model.layers[1].self_attn.q_proj
    assert type(layer) is LoRALinear
    assert (layer.lora_a.shape, layer.lora_b.shape, layer.scale) == ((16, 2), (2, 16), 3.0)
    assert layer.linear.weight.shape == (16, 16)
    takes(layer.fuse, "dequantize")


@contract
def mlx_lm_has_these_layers_of_experts() -> None:
    from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
    from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

    layer = SwitchLinear(64, 8, 2, bias=False)
    assert layer.weight.shape == (2, 8, 64)
    assert type(layer.to_quantized(group_size=64, bits=4)) is QuantizedSwitchLinear
    assert type(MultiLinear(64, 8, 2).to_quantized(64, 4)) is QuantizedMultiLinear


@contract
def mlx_lm_builds_schedules_of_its_own_settings() -> None:
    from mlx_lm.tuner.utils import build_schedule

    rate = build_schedule({"name": "cosine_decay", "arguments": [1.0, 10]})
    assert float(rate(0)) == 1.0


@contract
def mlx_lm_answers_one_prompt_step_by_step() -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step

    pick = lambda logprobs: mx.argmax(logprobs, axis=-1)  # noqa: E731
    steps = generate_step(mx.array([1, 2]), small_llama(), max_tokens=1, sampler=pick)
    token, logprobs = next(steps)
    assert logprobs.shape == (40,)
    assert 0 <= int(token) < 40


@contract
def mlx_lm_caches_are_cut_back_and_gone_on_with() -> None:
    import mlx.core as mx
    from mlx_lm.generate import generate_step
    from mlx_lm.models import cache

    pick, model = (lambda logprobs: mx.argmax(logprobs, axis=-1)), small_llama()
    caches = cache.make_prompt_cache(model)
    list(generate_step(mx.array([1, 2]), model, max_tokens=3, sampler=pick, prompt_cache=caches))
    assert [one.offset for one in caches] == [5, 5]  # every token that came has been run
    assert cache.can_trim_prompt_cache(caches)
    assert cache.trim_prompt_cache(caches, 2) == 2
    assert caches[0].offset == 3
    full = cache.RotatingKVCache(max_size=2)
    full.update_and_fetch(mx.zeros((1, 1, 3, 4)), mx.zeros((1, 1, 3, 4)))
    assert not cache.can_trim_prompt_cache([full])


# transformers


@contract
def transformers_backbone_takes_a_cache_under_a_known_name() -> None:
    from transformers import GPT2Model, GPTNeoXModel, LlamaModel

    from fpo_mlx.reference.torch_backend.passes import CACHE

    for backbone in (LlamaModel, GPT2Model, GPTNeoXModel):
        parameters = set(inspect.signature(backbone.forward).parameters)
        assert parameters & set(CACHE), backbone
        assert {"position_ids", "attention_mask", "use_cache"} <= parameters, backbone


@contract
def transformers_dynamic_cache_is_made_of_layers_of_keys_and_values() -> None:
    from transformers import LlamaConfig
    from transformers.cache_utils import DynamicCache, DynamicLayer

    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=2))
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * 2
    assert callable(cache.batch_repeat_interleave)


@contract
def transformers_names_the_parts_of_a_model_so() -> None:
    model = torch_llama()
    block = model.get_decoder().layers[0]
    assert model.base_model.layers[0] is block
    assert {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"} <= set(
        dict(block.named_children())
    )
    assert block.self_attn.o_proj.weight.shape == (16, 16)
    assert model.config.get_text_config().vocab_size == 40
    assert hasattr(block.post_attention_layernorm, "variance_epsilon")


@contract
def transformers_head_runs_on_what_its_backbone_answers() -> None:
    """The backbone's `forward` may be replaced; the model's own map to logits follows."""
    import torch

    model = torch_llama()
    out = model.base_model(input_ids=torch.tensor([[1, 2]]), use_cache=False)
    rows = torch.ones(1, 3, 16)
    model.base_model.forward = lambda *args, **kwargs: type(out)(last_hidden_state=rows)
    logits = model(input_ids=torch.zeros((1, 3), dtype=torch.int64), use_cache=False).logits
    assert torch.equal(logits, model.lm_head(rows))


@contract
def transformers_makes_a_model_of_a_config_and_weights() -> None:
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig
    from transformers.utils import logging

    source = torch_llama()
    config = AutoConfig.for_model(**source.config.to_dict())
    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        model, info = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)].from_pretrained(
            None, config=config, state_dict=source.state_dict(), output_loading_info=True
        )
    finally:
        if shown:
            logging.enable_progress_bar()
    assert type(model) is type(source)
    assert {"missing_keys", "unexpected_keys", "mismatched_keys"} <= set(info)
    assert not info["missing_keys"]


@contract
def transformers_tokenizer_gives_a_text_of_a_chat_template() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"<unk>": 0, "hi": 1}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    raw = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    found = raw.apply_chat_template(
        [{"role": "user", "content": "hi"}],
        tools=None,
        chat_template="{{ messages[0]['content'] }}{% if add_generation_prompt %} hi{% endif %}",
        add_generation_prompt=True,
        tokenize=False,
    )
    assert found == "hi hi"
    assert raw("hi", add_special_tokens=False, verbose=False)["input_ids"] == [1]
    assert [token.content for token in raw.added_tokens_decoder.values()] == ["<unk>"]
    assert raw.all_special_tokens == ["<unk>"]
    assert raw.get_vocab() == {"<unk>": 0, "hi": 1}
    assert raw.chat_template is None
    assert raw.decode([1], skip_special_tokens=True, clean_up_tokenization_spaces=False) == "hi"
