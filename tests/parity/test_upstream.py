"""What is leaned on inside other packages: it is as it was, and a rename of it is not silent."""

import ast
import importlib
import re
import sys
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("mlx.core")

import tiny_models  # noqa: E402
from click.testing import CliRunner  # noqa: E402
from contracts import CONTRACTS, small_llama  # noqa: E402

from fpo_mlx.cli import main  # noqa: E402
from fpo_mlx.data.tokenizer import load_tokenizer  # noqa: E402
from fpo_mlx.errors import ModelError, pip_install  # noqa: E402
from fpo_mlx.machine import upstream  # noqa: E402
from fpo_mlx.model import adapters  # noqa: E402
from fpo_mlx.model.policy import Policy  # noqa: E402
from fpo_mlx.pipeline import doctor  # noqa: E402
from fpo_mlx.records import TokenPair  # noqa: E402
from fpo_mlx.reference.torch_backend import TorchBackend  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
CONFIG = {"vocab_size": 40, "rms_norm_eps": 1e-6}


@pytest.mark.parametrize("name", CONTRACTS)
def test_the_contract_holds(name):
    CONTRACTS[name]()


def test_every_name_that_is_imported_from_them_is_in_a_contract():
    text = (ROOT / "tests" / "support" / "contracts.py").read_text(encoding="utf-8")
    names = set()
    for path in (ROOT / "fpo_mlx").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and re.match(
                r"mlx_lm|transformers", node.module or ""
            ):
                names |= {alias.name for alias in node.names}
    assert len(names) > 15
    assert {name for name in names if not re.search(rf"\b{name}\b", text)} <= {"AutoTokenizer"} | {
        "AutoModelForCausalLM"  # public, and loaded in most tests
    }


def test_the_page_lists_each_contract_once():
    page = (ROOT / "docs" / "upstream.md").read_text(encoding="utf-8")
    assert sorted(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == sorted(CONTRACTS)


# Renames


def without(monkeypatch, module: str, name: str) -> None:
    """Whoever imports from this module from now on does not find this name."""
    real = importlib.import_module(module)
    copy = types.ModuleType(module)
    copy.__dict__.update({k: v for k, v in vars(real).items() if k != name})
    monkeypatch.setitem(sys.modules, module, copy)


def rename_the_backbones_cache(monkeypatch) -> None:
    from transformers import LlamaModel

    real = LlamaModel.forward

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, memory=None,
                inputs_embeds=None, use_cache=None, **rest):  # fmt: skip
        return real(self, input_ids=input_ids, attention_mask=attention_mask,
                    position_ids=position_ids, inputs_embeds=inputs_embeds,
                    use_cache=use_cache, **rest)  # fmt: skip

    monkeypatch.setattr(LlamaModel, "forward", forward)


def rename_what_attention_asks_of_a_cache(monkeypatch) -> None:
    from mlx_lm.models import cache as caches
    from mlx_lm.models import llama

    class Asked:
        def __init__(self, cache):
            self.__dict__["_cache"] = cache

        def __getattr__(self, name):
            return getattr(self._cache, "append" if name == "update_and_fetch" else name)

    for cls in (caches.KVCache, caches.RotatingKVCache, caches.BatchKVCache):
        monkeypatch.setattr(cls, "append", cls.update_and_fetch, raising=False)
    real = llama.Attention.__call__

    def call(self, x, mask=None, cache=None):
        return real(self, x, mask, None if cache is None else Asked(cache))

    monkeypatch.setattr(llama.Attention, "__call__", call)


def ignore_tokenize(monkeypatch) -> None:
    from transformers import PreTrainedTokenizerBase

    real = PreTrainedTokenizerBase.apply_chat_template

    def apply(self, *args, tokenize=True, **kwargs):
        return real(self, *args, **kwargs)

    monkeypatch.setattr(PreTrainedTokenizerBase, "apply_chat_template", apply)


RENAMES: dict[str, Callable] = {
    "transformers_backbone_takes_a_cache_under_a_known_name": rename_the_backbones_cache,
    "transformers_dynamic_cache_is_made_of_layers_of_keys_and_values": lambda monkeypatch: without(
        monkeypatch, "transformers.cache_utils", "DynamicLayer"
    ),
    "transformers_tokenizer_gives_a_text_of_a_chat_template": ignore_tokenize,
    "mlx_lm_has_these_key_value_caches": lambda monkeypatch: without(
        monkeypatch, "mlx_lm.models.cache", "KVCache"
    ),
    "mlx_lm_asks_a_cache_for_no_more_than_ours_has": rename_what_attention_asks_of_a_cache,
    "mlx_lm_puts_adapters_on_the_layers_that_are_named": lambda monkeypatch: without(
        monkeypatch, "mlx_lm.tuner.utils", "linear_to_lora_layers"
    ),
}


def broken() -> set[str]:
    found = set()
    for name, check in CONTRACTS.items():
        try:
            check()
        except Exception:
            found.add(name)
    return found


@pytest.mark.parametrize("name", RENAMES)
def test_a_rename_breaks_its_own_contract_and_no_other(name, monkeypatch):
    assert broken() == set()
    RENAMES[name](monkeypatch)
    assert broken() == {name}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("upstream")
    tiny_models.tiny_llama(root, tokenizer=True)
    return root


def pairs() -> list[TokenPair]:
    rng = np.random.default_rng(0)
    return [
        TokenPair(*(rng.integers(3, 39, n).astype(np.int32) for n in (30, 4, 6)), index=i)
        for i in range(2)
    ]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("transformers_backbone_takes_a_cache_under_a_known_name", "LlamaModel takes no cache"),
        (
            "transformers_dynamic_cache_is_made_of_layers_of_keys_and_values",
            "this version of transformers has other caches",
        ),
    ],
)
def test_a_cache_that_transformers_renamed_costs_time_says_so_and_changes_no_score(
    name, reason, folder, monkeypatch
):
    want = TorchBackend(folder, device="cpu")
    assert want.shares_prompt
    scores = want.score(pairs())
    RENAMES[name](monkeypatch)
    backend = TorchBackend(folder, device="cpu")
    assert not backend.shares_prompt
    assert len(backend.notes) == 1
    assert backend.notes[0].startswith(reason)
    assert backend.notes[0].endswith("prompts run twice per pair")
    for a, b in zip(np.ravel(backend.score(pairs())), np.ravel(scores), strict=True):
        assert a.logps == pytest.approx(b.logps, rel=1e-5)


def attach() -> None:
    paths = ("model.layers.1.self_attn.q_proj",)
    adapters.attach(small_llama(), adapters.AdapterSpec("lora", 1, 2, 1.0, 0.0, paths))


def score() -> None:
    Policy(small_llama(), CONFIG).rows(pairs())


@pytest.mark.parametrize(
    ("name", "use", "part"),
    [
        ("mlx_lm_puts_adapters_on_the_layers_that_are_named", attach, "linear_to_lora_layers"),
        ("mlx_lm_has_these_key_value_caches", score, "classes of key-value caches"),
        ("mlx_lm_asks_a_cache_for_no_more_than_ours_has", score, "what it asks of a cache"),
    ],
)
def test_a_rename_in_mlx_lm_is_one_plain_message(name, use, part, monkeypatch):
    RENAMES[name](monkeypatch)
    with pytest.raises(ModelError) as caught:
        use()
    message = str(caught.value)
    assert message.startswith("mlx-lm ")
    assert "has changed what fpo-mlx uses of it" in message
    assert part in message


def test_a_chat_template_that_gives_something_else_is_one_plain_message(folder, monkeypatch):
    ignore_tokenize(monkeypatch)
    with pytest.raises(ModelError, match=r"^transformers .*apply_chat_template.*BatchEncoding"):
        load_tokenizer(folder).prompt_tokens([{"role": "user", "content": "hi"}])


def test_a_name_that_is_gone_is_a_plain_message_of_the_command_line(folder, tmp_path, monkeypatch):
    without(monkeypatch, "mlx_lm.convert", "convert")
    words = ["convert", "--hf-path", str(folder), "--mlx-path", str(tmp_path / "new")]
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 1
    assert done.stderr.startswith("fpo-mlx: mlx-lm ")
    assert "the module mlx_lm.convert" in done.stderr
    assert "Traceback" not in done.output


# Versions


@pytest.fixture
def versions(monkeypatch) -> dict[str, str]:
    """What is installed, to be changed; the ranges are of a metadata made up."""
    lines = ["mlx-lm<0.33,>=0.32.2", "numpy>=1.26", "mlx<0.33; platform_system == 'None'"]
    monkeypatch.setattr(
        upstream, "_requirements", lambda: [upstream.Requirement(line) for line in lines]
    )
    installed = {"mlx-lm": "0.32.2", "numpy": "2.4.0", "mlx": "9.0"}
    monkeypatch.setattr(upstream, "version", installed.get)
    return installed


def test_the_ranges_are_those_of_pyproject():
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for one in upstream._requirements():
        texts = [*project["dependencies"], *sum(project["optional-dependencies"].values(), [])]
        assert any(text.startswith(one.name) for text in texts), one


def test_a_name_that_is_gone_from_mlx_is_no_mlx_that_does_not_load():
    with pytest.raises(ImportError) as caught:
        exec("from mlx.core import a_name_that_is_gone")
    assert upstream.unloadable(caught.value) is None
    assert "has changed what fpo-mlx uses" in str(upstream.plain(caught.value))


def test_what_only_builds_or_tests_it_is_no_users_concern():
    """A new environment's old setuptools was noted by the doctor, though nothing runs with it."""
    names = {one.name for one in upstream._requirements()}
    assert {"mlx-lm", "numpy", "torch"} <= names
    assert not names & {"setuptools", "pytest", "ruff", "mkdocs-material"}


@pytest.mark.parametrize(
    ("version", "inside"),
    [("0.32.2", True), ("0.32.9", True), ("0.33.0", False), ("0.32.1", False)],
)
def test_a_version_is_inside_or_outside_of_what_was_tried(version, inside, versions):
    versions["mlx-lm"] = version
    assert [one.package for one in upstream.outside() if one.package == "mlx-lm"] == (
        [] if inside else ["mlx-lm"]
    )


def test_the_doctor_notes_a_version_that_nobody_tried(versions):
    versions["mlx-lm"] = "0.40.0"
    found = {finding.topic: finding for finding in doctor.versions()}["mlx-lm"]
    assert found.level == "note"
    assert "0.40.0" in found.text
    assert found.advice == f"If something fails: {pip_install('mlx-lm>=0.32.2,<0.33')}"


def test_a_rename_in_a_version_that_nobody_tried_names_one_that_was(versions, monkeypatch):
    versions["mlx-lm"] = "0.40.0"
    RENAMES["mlx_lm_puts_adapters_on_the_layers_that_are_named"](monkeypatch)
    with pytest.raises(ModelError, match=r"mlx-lm 0.40.0 .* pip install 'mlx-lm>=0.32.2,<0.33'"):
        attach()


def test_a_defect_beside_a_version_that_nobody_tried_keeps_its_traceback_and_names_it(
    versions, monkeypatch
):
    versions["mlx-lm"] = "0.40.0"

    def fail(hub_seconds: float = 0):
        raise AttributeError("gone")

    monkeypatch.setattr(doctor, "examine", fail)
    done = CliRunner().invoke(main, ["doctor"])
    assert isinstance(done.exception, AttributeError)
    assert "mlx-lm 0.40.0 is outside the versions that were tried (>=0.32.2,<0.33)" in done.stderr
