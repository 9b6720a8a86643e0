"""Which module may import what. A new module must be given its line here."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "fpo_mlx"
MLX = {"mlx", "mlx_lm"}
VOCABULARY = {"errors", "intervals", "records", "storage"}  # layer 0: import nothing above it
RUN = {"config", "core", "machine", "model"}  # what one step of training or scoring is made of

# Longest matching name wins: "reference.mlx_backend" before "reference". A line allows whole
# rooms, or one module of a room by its dotted name.
OURS = {
    "": {"api", "machine"},  # what it gives away is loaded when asked for
    "api": VOCABULARY | {"cache", "config", "judge", "pipeline", "sae", "train"},
    "errors": set(),
    "intervals": set(),
    "records": set(),
    "storage": {"errors"},
    "machine": {"errors", "storage"},
    "core": {"machine"},
    "config": {"errors"},
    "data": VOCABULARY,
    "data.tokenizer": VOCABULARY | {"machine"},
    "sae": VOCABULARY,
    "cache": VOCABULARY | {"machine"},
    "model": VOCABULARY | {"core", "machine"},
    "model.tapping": VOCABULARY | {"core", "machine", "sae"},
    "saetrain": VOCABULARY | {"core", "machine", "sae"},
    "saetrain.activations": VOCABULARY | {"machine", "model"},
    "saetrain.sizes": VOCABULARY | {"config"},
    "saetrain.state": VOCABULARY | {"core", "machine", "model"},
    "saetrain.texts": VOCABULARY | {"data"},
    "train": VOCABULARY | RUN | {"data"},
    "train.events": set(),
    "reference": VOCABULARY | {"config", "machine"},
    "reference.mlx_backend": VOCABULARY | {"core", "machine", "model"},
    "judge": VOCABULARY | RUN | {"sae", "train"},
    "pairs": VOCABULARY | {"data"},
    "pairs.settings": VOCABULARY | {"config"},
    "report": VOCABULARY | {"config"},
    "demo": VOCABULARY | {"machine"},
    "demo.run": VOCABULARY | {"config", "pipeline"},  # a caller of the pipeline, as the cli is
    "pipeline": {"*"},
    "cli": VOCABULARY
    | {"config", "data", "demo", "judge", "machine", "pairs", "pipeline", "saetrain"}
    | {"train.events"},
    "__main__": {"cli"},
}
OTHERS = {
    "": set(),
    "api": set(),
    "errors": set(),
    "intervals": set(),
    "records": {"numpy"},
    "storage": set(),
    "storage.certificates": {"certifi"},
    "storage.headers": {"huggingface_hub"},
    "storage.hub": {"huggingface_hub"},
    "storage.publish": {"huggingface_hub"},
    "machine": set(),
    "machine.device": {"mlx"},
    "machine.lanes": {"mlx"},
    "machine.parallel": {"numpy", "mlx"},
    "machine.upstream": {"packaging"},
    "core": {"mlx"},
    "config": {"yaml"},
    "data": {"numpy", "datasets"},
    "data.containers": {"pyarrow"},
    "data.feature_files": {"yaml"},
    "data.tables": {"pyarrow"},
    "data.tokenizer": {"transformers"},
    "sae": {"numpy", "safetensors", "huggingface_hub", "yaml"},
    "saetrain": {"numpy", "mlx"},
    "saetrain.sizes": set(),
    "saetrain.texts": {"numpy"},
    "saetrain.rows": {"numpy"},
    "cache": {"numpy", "safetensors"},
    "model": {"numpy", "huggingface_hub", "safetensors", *MLX},
    "model.gguf_file": {"numpy", "mlx", "gguf"},
    "model.gguf_vocab": set(),
    "train": {"numpy", *MLX},
    "train.events": set(),
    "reference": {"numpy"},
    "reference.mlx_backend": {"numpy", *MLX},
    "reference.torch_backend": {"numpy", "torch", "transformers", "safetensors"},
    "judge": {"numpy", *MLX},
    "judge.cover": {"numpy"},
    "judge.feature_report": {"numpy"},
    "judge.lessons": {"numpy"},
    "judge.logistic": {"numpy"},
    "pairs": {"numpy"},
    "pairs.doubles": {"datasketch"},
    "pairs.web": {"starlette", "uvicorn", "jinja2"},
    "report": {"matplotlib", "jinja2"},
    "demo": {"numpy", "safetensors", "mlx", "mlx_lm"},
    "pipeline": {"numpy", *MLX},
    "pipeline.doctor": {"numpy", "mlx", "huggingface_hub"},
    "cli": {"click", "rich_click", "tqdm", "yaml"},
    "cli.trackers": {"wandb", "tensorboardX"},
    "__main__": set(),
}

FILES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def rule(rules: dict[str, set[str]], name: str) -> set[str]:
    """The line of the longest prefix of a module's dotted name."""
    if name == "__init__":
        return rules[""]
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        if ".".join(parts[:end]) in rules:
            return rules[".".join(parts[:end])]
    raise AssertionError(f"fpo_mlx/{name} has no line in tests/test_layering.py")


def imported(source: str) -> set[str]:
    """Dotted names of all imports, those inside functions too; a relative one starts with a dot."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            inner = base == "fpo_mlx"  # `from fpo_mlx import cache` names the module last
            names |= {f"{base}.{alias.name}" for alias in node.names} if inner else {base}
    return names - {"fpo_mlx.__version__"}


def faults(name: str, source: str) -> list[str]:
    """What module `name` imports and may not."""
    ours, others = rule(OURS, name), rule(OTHERS, name)
    own = name.split(".")[0]
    found = []
    for target in sorted(imported(source)):
        root, _, rest = target.partition(".")
        if target.startswith("."):
            found.append(f"relative import {target}")
        elif root == "fpo_mlx":
            layer = rest.split(".")[0]
            if layer != own and not {layer, rest, "*"} & ours:
                found.append(f"fpo_mlx.{rest}")
        elif root not in sys.stdlib_module_names and root not in others:
            found.append(target)
    return found


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_only_what_its_layer_may(name):
    assert faults(name, FILES[name].read_text(encoding="utf-8")) == []


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("cache.store", "import torch", "torch"),
        ("data.read", "def f():\n    from mlx import core", "mlx"),
        ("data.rows", "from fpo_mlx import pipeline", "fpo_mlx.pipeline"),
        ("reference.torch_backend", "import mlx.core as mx", "mlx.core"),
        ("sae.common", "from .arrays import x", "relative import .arrays"),
        ("cli", "import fpo_mlx.train.trainer", "fpo_mlx.train.trainer"),
    ],
)
def test_a_forbidden_import_is_found(name, line, fault):
    assert faults(name, line) == [fault]


def ours(source: str) -> set[str]:
    """The modules that a source imports, by the names of FILES, without the faces of packages."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.removeprefix("fpo_mlx.") for name in found} & set(FILES)


def circles(imports: dict[str, set[str]]) -> list[str]:
    """Names that import each other in a ring, and those that lead to one."""
    left = dict(imports)
    while ready := [name for name, of in left.items() if not of & set(left)]:
        for name in ready:
            del left[name]
    return sorted(left)


def test_no_module_imports_itself_by_way_of_others():
    sources = {name: path.read_text(encoding="utf-8") for name, path in FILES.items()}
    assert circles({name: ours(source) for name, source in sources.items()}) == []


def test_a_circle_of_imports_is_found():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": set()}) == ["a", "b", "c"]
    inside = "def f():\n    from fpo_mlx.pipeline import job\n    from fpo_mlx import core, errors"
    assert ours(inside) == {"pipeline.job", "errors"}


LIGHT = [
    name
    for name in ("cli", "config", "tokenizer", "data", "cache", "sae", "reference", "pipeline")
    if name in FILES or f"{name}.__init__" in FILES
]


@pytest.mark.parametrize("module", ["fpo_mlx", *(f"fpo_mlx.{name}" for name in LIGHT)])
def test_importing_it_loads_neither_mlx_nor_torch(module):
    probe = (
        f"import sys, {module}\n"
        "heavy = {'mlx', 'mlx_lm', 'torch', 'transformers', 'datasets', 'huggingface_hub'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
