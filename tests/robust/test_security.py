"""The claims of SECURITY.md, each tried: no code, no network, no tokens in files."""

from __future__ import annotations

import fnmatch
import json
import re
import socket
from pathlib import Path

import pytest
import tiny_models
from click.testing import CliRunner, Result
from command_line import ROWS, lines, random_sae
from tiny_tokenizer import build_tiny_tokenizer

from fpo_mlx.cli import main
from fpo_mlx.config import load_config
from fpo_mlx.data.tokenizer import load_tokenizer
from fpo_mlx.errors import ConfigError, DataError, FpoError
from fpo_mlx.sae.convert import write_saelens
from fpo_mlx.storage import hub

pytest.importorskip("mlx.core")

ROOT = Path(__file__).resolve().parents[2]
SECRET = "hf_" + "Sk3" * 11


def run(*words: object) -> Result:
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("FPO_MLX_CACHE", str(tmp_path / "user-cache"))
    tiny_models.tiny_llama(tmp_path / "model", tokenizer=True, num_hidden_layers=2)
    write_saelens(random_sae(tiny_models.HIDDEN), tmp_path / "sae")
    lines(tmp_path / "data" / "train.jsonl", *ROWS)
    lines(tmp_path / "data" / "valid.jsonl", ROWS[0])
    return tmp_path


def train(place: Path, *words: object) -> Result:
    usual = ["--model", place / "model", "--sae", place / "sae", "--data", place / "data"]
    flags = ["--top-k", 5, "--iters", 2, "--batch-size", 1, "--num-layers", 1]
    return run("train", *usual, *flags, "--adapter-path", place / "out", *words)


def test_training_opens_no_connection(place, monkeypatch):
    """Precompute, training, validation and saving with every way to the network shut."""
    tried: list[str] = []

    def shut(name: str):
        def refuse(*args, **kwargs):
            tried.append(f"{name} {args[1:]}")
            raise OSError("no network here")

        return refuse

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, shut(name))
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, shut(name))
    with pytest.raises(OSError, match="no network"):  # the block itself works
        socket.create_connection(("127.0.0.1", 9))
    tried.clear()
    done = train(place)
    assert done.exit_code == 0, done.stderr
    assert tried == []


def test_tokens_of_the_environment_are_in_no_file_and_no_line(place, monkeypatch):
    names = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "WANDB_API_KEY", "OPENAI_API_KEY")
    for name in names:
        monkeypatch.setenv(name, SECRET)
    done = train(place)
    assert done.exit_code == 0, done.stderr
    broken = train(place, "--model", place / "nowhere", "--adapter-path", place / "other")
    assert broken.exit_code == 1, broken.stderr
    assert SECRET not in done.output + broken.output
    written = [p for folder in ("out", "user-cache") for p in (place / folder).rglob("*")]
    held = [path.name for path in written if path.is_file() and SECRET in path.read_text("latin-1")]
    assert held == []
    assert (place / "out" / "run.json") in written


ESCAPES = {
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.mkdir('PLACE') }}",
    "builtins": "{{ self.__init__.__globals__.__builtins__.open('PLACE', 'w') }}",
    "attr": "{{ ''|attr('__class__')|attr('mro')() }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}{{ raise_exception('stopped') }}",
}


@pytest.mark.parametrize("name", ESCAPES)
def test_a_chat_template_cannot_leave_its_sandbox(tmp_path, name):
    template = ESCAPES[name].replace("PLACE", str(tmp_path / "ran"))
    tokenizer = load_tokenizer(build_tiny_tokenizer(tmp_path / "tok", template=template))
    with pytest.raises(DataError, match="the chat template of"):
        tokenizer.prompt_tokens([{"role": "user", "content": "Q"}])
    assert not (tmp_path / "ran").exists()


def evil(folder: Path, ran: Path) -> None:
    """Python code in a model folder, asked for by every file that can ask."""
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(ran)!r})\nclass Evil: ...\n")
    for name, keys in (
        ("config.json", {"model_file": "evil.py", "auto_map": {"AutoConfig": "evil.Evil"}}),
        ("tokenizer_config.json",
         {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}),
    ):  # fmt: skip
        path = folder / name
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_code_in_a_model_folder_is_not_run(place, tmp_path):
    assert train(place).exit_code == 0
    evil(place / "model", tmp_path / "ran")
    model, out = place / "model", tmp_path / "made"
    for words in (
        ["precompute", "--model", model, "--sae", place / "sae", "--data", place / "data",
         "--output", out],
        ["fuse", "--model", model, "--adapter-path", place / "out", "--save-path", out],
        ["convert", "--hf-path", model, "--mlx-path", out],
        ["check", "--model", model, "--data", place / "data"],
    ):  # fmt: skip
        done = run(*words)
        assert not (tmp_path / "ran").exists(), words
        assert done.exit_code == 1, (words, done.output)
        assert isinstance(done.exception, SystemExit), (words, repr(done.exception))


def test_no_code_is_downloaded_with_a_model(monkeypatch, tmp_path):
    asked: dict = {}
    (tmp_path / "config.json").write_text("{}")

    def download(repo: str, **settings) -> str:
        asked.update(settings, repo=repo)
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    hub.resolve_model("owner/model")
    assert (asked["repo"], asked["revision"]) == ("owner/model", None)
    hub.resolve_model("owner/model@v2")
    assert (asked["repo"], asked["revision"]) == ("owner/model", "v2")
    hub.resolve_model("owner/model@refs/pr/3")
    assert (asked["repo"], asked["revision"]) == ("owner/model", "refs/pr/3")

    def taken(name: str) -> bool:
        allowed = any(fnmatch.fnmatch(name, p) for p in asked["allow_patterns"])
        return allowed and not any(fnmatch.fnmatch(name, p) for p in asked["ignore_patterns"])

    assert taken("model.safetensors")
    assert taken("tokenizer.json")
    names = ("modeling.py", "tokenizer_x.py", "tokenizer.so", "a/tokenizer.py", "model.bin")
    others = ("consolidated.safetensors", "original/model.safetensors", "adapter_model.safetensors")
    for name in (*names, *others):
        assert not taken(name), name
    hub.resolve_model("owner/model", weights=False)
    assert taken("tokenizer.json")
    for name in (*names, "model.safetensors", "model-00001-of-00002.safetensors"):
        assert not taken(name), name


def test_trust_is_off_and_nothing_implies_it():
    assert load_config({}).reference.trust_remote_code is False
    assert load_config({"allow_pickle": True}).reference.trust_remote_code is False
    source = {p: p.read_text() for p in (ROOT / "fpo_mlx").rglob("*.py")}
    said = re.compile(r"(trust_remote_code|allow_pickle)\"?\s*[=:]\s*True")
    assert [str(path) for path, text in source.items() if said.search(text)] == []


@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir", "name:os.mkdir"])
def test_yaml_cannot_name_python_objects(tmp_path, tag):
    (tmp_path / "c.yaml").write_text(f"model: !!python/{tag} ['{tmp_path}/ran']\n")
    with pytest.raises(ConfigError, match="cannot be read as YAML"):
        load_config({}, tmp_path / "c.yaml")
    assert not (tmp_path / "ran").exists()


def test_no_reader_of_the_package_unpickles_or_evaluates():
    calls = re.compile(
        r"(?<![\w.])(?:eval|exec)\(|pickle\.loads?\(|yaml\.(?:unsafe_|full_)?load\(|torch\.load\("
        r"|os\.system\(|shell=True|mktemp\("
    )
    found = [
        f"{path.relative_to(ROOT / 'fpo_mlx')}: {match[0]}"
        for path in (ROOT / "fpo_mlx").rglob("*.py")
        for match in calls.finditer(path.read_text())
    ]
    readers = ("config/engine.py", "data/feature_files.py")  # with a SafeLoader: the test above
    assert sorted(found) == [f"{name}: yaml.load(" for name in readers]
    for name in readers:
        source = (ROOT / "fpo_mlx" / name).read_text()
        assert "class Loader(yaml.SafeLoader)" in source
        assert re.findall(
            r"yaml\.load\([^)]*, Loader\)", source.replace('read_text(encoding="utf-8")', "x")
        )


@pytest.mark.parametrize(
    "spec",
    ["../x", "a/../b", "/etc", "~/x/y", "a\\..\\b", "a/b/c", "..", "./x", "a/b/c@v1"],
)
def test_a_model_id_that_is_a_path_is_refused_before_the_hub_is_asked(spec, monkeypatch):
    import huggingface_hub

    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **_: asked.append(a))
    with pytest.raises(FpoError, match="found no config.json there"):
        hub.resolve_model(spec)
    assert asked == []


def test_a_model_id_that_looks_like_one_cannot_be_a_path_out_of_the_cache():
    """The hub's own code refuses it, before it asks anybody."""
    with pytest.raises(FpoError, match="owner/.*: neither a local folder nor a model .*HFValid"):
        hub.resolve_model("owner/..")


def test_a_hub_that_fails_without_a_word_is_a_plain_error(monkeypatch):
    import huggingface_hub

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FpoError, match="ConnectionError: no reason given"):
        hub.resolve_model("owner/model")


def test_every_test_that_the_page_names_exists():
    page = (ROOT / "SECURITY.md").read_text()
    named = re.findall(r"`((?:tests|scripts)/[\w/]+\.py)`", page)
    assert len(named) >= 5
    assert [name for name in named if not (ROOT / name).is_file()] == []
