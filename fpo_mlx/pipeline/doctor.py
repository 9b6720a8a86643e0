"""What this machine is, and what will stand in the way, found by trying it."""

from __future__ import annotations

import http.client
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fpo_mlx import __version__
from fpo_mlx.errors import pip_install
from fpo_mlx.machine import blas, upstream
from fpo_mlx.machine import device as machine
from fpo_mlx.storage.certificates import trusted
from fpo_mlx.storage.paths import cache_root

if TYPE_CHECKING:
    import mlx.core as mx


Level = Literal["ok", "note", "problem"]
GB = 1e9
MIB, GIB = 2**20, 2**30  # installed memory is counted in these, and so is sysctl's limit
MACOS_SHARE, MACOS_MB = 0.25, 5 * 1024  # of the memory, and at least: what stays with macOS
PACKAGES = ("fpo-mlx", "mlx", "mlx-lm", "numpy", "transformers", "safetensors", "datasets")
OPTIONAL = ("torch", "matplotlib", "wandb", "tensorboardX")
HUB = "https://huggingface.co"
SQUARE, LARGE_SQUARE = 1024, 4096  # of a product; a GPU does the small one in the time of a launch
SLOW_GFLOPS = 20.0  # one core with OpenBLAS reaches 100 or more, the reference BLAS 2 to 5
LITTLE_DISK = 5 * GB  # a 4-bit model of 7 billion parameters takes 4


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report. `advice` is the next step, empty where all is well."""

    topic: str
    text: str
    level: Level = "ok"
    advice: str = ""


def examine(hub_seconds: float = 3.0) -> list[Finding]:
    """Everything there is to know, in the order of a report. Takes about a second, never raises.

    hub_seconds: how long to wait for the model hub; 0 leaves the network alone.
    """
    findings = [*versions(), *platform_of(), blas_library(), *device()]
    if hub_seconds > 0:
        findings.append(hub(hub_seconds))
    return [*findings, compiler(), disk(), *caches(), reference_caches()]


def versions() -> list[Finding]:
    """Python's and the packages' versions; a missing one of ours is a problem.

    One outside the versions that were tried is a note.
    """
    untried = {
        one.package: Finding(
            one.package,
            f"{one.installed}, which nobody tried with this version of fpo-mlx ({one.range})",
            "note",
            f"If something fails: {pip_install(f'{one.package}{one.range}')}",
        )
        for one in upstream.outside()
    }
    found = [Finding("python", f"{platform.python_version()} on {platform.platform()}")]
    for name in PACKAGES:
        version = __version__ if name == "fpo-mlx" else upstream.version(name)  # of this code
        if version:
            found.append(untried.get(name) or Finding(name, version))
        else:
            found.append(Finding(name, "not installed", "problem", pip_install(name)))
    found += [finding for name, finding in untried.items() if name not in PACKAGES]
    present = [f"{name} {version}" for name in OPTIONAL if (version := upstream.version(name))]
    absent = [name for name in OPTIONAL if not upstream.version(name)]
    text = ", ".join(present) or "none"
    if absent:
        text += f" (not installed, only some commands use them: {', '.join(absent)})"
    return [*found, Finding("optional", text)]


def blas_library() -> Finding:
    """Which BLAS MLX's CPU build uses."""
    found = blas.preload()
    slow = found.library is None and sys.platform.startswith("linux")
    advice = "Training on this CPU would take about 50 times longer." if slow else ""
    return Finding("blas", found.why, "problem" if slow else "ok", advice)


def device() -> list[Finding]:
    """Device, memory, wired limit and measured speed; one problem if MLX cannot be used."""
    blas.preload()
    try:
        import mlx.core as mx
    except ImportError as e:
        text = f"MLX cannot be imported: {e}"
        return [Finding("device", text, "problem", upstream.how_to_get_mlx())]
    try:
        return _device(mx)
    except RuntimeError as e:  # MLX is built for a GPU that this session does not have
        absent = upstream.trouble(e) == "absent"
        advice = upstream.NO_SESSION if absent else upstream.how_to_get_mlx()
        return [Finding("device", f"MLX cannot use it: {e}", "problem", advice)]


def _device(mx: Any) -> list[Finding]:
    if machine.backend() == "cuda":
        return _cuda_card()
    if not mx.metal.is_available():
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
        text = f"CPU ({platform.machine()}, {cores} cores): no Metal here"
        advice = "Right, but slow: Apple silicon is what this is made for."
        if shutil.which("nvidia-smi"):
            advice = (
                "Right, but slow. For the NVIDIA card: a new environment, and "
                "`pip install '.[cuda13]'` in the clone of fpo-mlx."
            )
        return [Finding("device", text, "note", advice), _cpu_memory(), _cpu_speed()]
    info = mx.device_info()
    limit = float(info.get("max_recommended_working_set_size", 0))
    total = float(info.get("memory_size", 0))
    return [
        Finding("device", f"{info.get('device_name', 'GPU')} through Metal"),
        Finding("memory", f"{total / GIB:.0f} GB unified"),
        _wired_limit(limit, total),
    ]


def _cuda_card() -> list[Finding]:
    info = machine.info()
    name, kind = info.get("device_name", "GPU"), info.get("architecture", "")
    return [
        Finding("device", f"{name} through CUDA ({kind})"),
        Finding("memory", f"{machine.memory() / GB:.1f} GB on the card"),
    ]


def platform_of() -> list[Finding]:
    """What MLX cannot run on: Intel, Rosetta, an old macOS; and two of its backends at once."""
    found = []
    if sys.platform == "darwin" and platform.machine() != "arm64":
        rosetta = _translated()
        text = (
            "this Python runs under Rosetta, as on an Intel Mac; MLX has no build for that"
            if rosetta
            else "an Intel Mac; MLX runs on Apple silicon only"
        )
        advice = "Train on a Mac with Apple silicon, or on Linux."
        if rosetta:
            advice = (
                "Start it with `arch -arm64`, or untick Open using Rosetta in the terminal's Get "
                "Info. If it is for Intel alone, install a Python for arm64 (python.org, uv, "
                "Homebrew in /opt/homebrew)."
            )
        found.append(Finding("platform", text, "problem", advice))
    elif sys.platform == "darwin" and int(platform.mac_ver()[0].partition(".")[0] or 14) < 14:
        text = f"macOS {platform.mac_ver()[0]}; MLX needs 14 or newer"
        found.append(Finding("platform", text, "problem", "Update macOS."))
    backends = [name for name in upstream.BACKENDS if upstream.version(name)]
    if len(backends) > 1:
        text = f"{' and '.join(backends)} are both installed and overwrite each other's library"
        advice = "Make a new environment with one of the extras cpu, cuda12 and cuda13."
        found.append(Finding("platform", text, "problem", advice))
    return found


def _translated() -> bool:
    """Whether this process runs under Rosetta."""
    command = ["sysctl", "-n", "sysctl.proc_translated"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.SubprocessError):
        return False
    return done.stdout.strip() == "1"


def gflops(repeats: int = 3) -> float:
    """Measured speed of a float32 product on MLX's default device."""
    import mlx.core as mx

    size = LARGE_SQUARE if machine.here().gpu else SQUARE
    return product_rate(size, repeats, mx.float32) / 1e9


def product_rate(n: int, repeats: int, dtype: mx.Dtype) -> float:
    """FLOP/s of the best of some [n, n] products."""
    import mlx.core as mx

    a = mx.random.normal((n, n)).astype(dtype)
    mx.eval(a @ a)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        mx.eval(a @ a)
        best = min(best, time.perf_counter() - started)
    return 2 * n**3 / best


def hub(seconds: float) -> Finding:
    """Whether the model hub answers. Without it, local folders still work."""
    from huggingface_hub import constants

    host = os.environ.get("HF_ENDPOINT", HUB).rstrip("/")
    if constants.HF_HUB_OFFLINE:
        text = "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set: only local files and the hub's cache"
        return Finding("hub", text, "note")
    advice = "Use local folders for --model, --sae and --data, or set HF_ENDPOINT to a mirror."
    request = urllib.request.Request(f"{host}/api/models?limit=1", method="HEAD")
    try:
        with urllib.request.urlopen(request, timeout=seconds, context=trusted()) as answer:
            return Finding("hub", f"{host} answers ({answer.status})")
    except urllib.error.HTTPError as e:  # it spoke, so it is there
        level: Level = "ok" if e.code < 500 and e.code not in (403, 407) else "note"
        return Finding("hub", f"{host} answers ({e.code})", level, "" if level == "ok" else advice)
    except (OSError, ValueError, http.client.HTTPException) as e:
        reason = getattr(e, "reason", e)
        return Finding("hub", f"{host} cannot be reached: {reason}", "note", advice)


def compiler() -> Finding:
    """MLX's CPU build compiles kernels at run time, by this name, if it is there; not Metal's."""
    if found := shutil.which("g++"):
        return Finding("compiler", found)
    if sys.platform == "darwin":
        return Finding("compiler", "none, and none is needed with Metal")
    advice = "Install it (Debian, Ubuntu: apt-get install g++)."
    text = "no g++, which MLX calls by this name: what it would fuse on the CPU runs step by step"
    return Finding("compiler", text, "note", advice)


def disk() -> Finding:
    """Free space where models and caches go, the least where these are two disks."""
    places = [place for _, place in cache_places()]
    folders = [next(p for p in (place, *place.parents) if p.exists()) for place in places]
    spaces = {folder: shutil.disk_usage(folder).free for folder in folders}
    folder, free = min(spaces.items(), key=lambda one: one[1])
    text = f"{free / GB:.1f} GB free at {folder}"
    if free < LITTLE_DISK:
        advice = "Free some space, or set FPO_MLX_CACHE and HF_HOME to another disk."
        return Finding("disk", text, "problem", advice)
    return Finding("disk", text)


def cache_places() -> list[tuple[str, Path]]:
    """Ours, and that of the hub's client."""
    from huggingface_hub import constants

    return [("cache", cache_root()), ("hub cache", Path(constants.HF_HUB_CACHE))]


def caches() -> list[Finding]:
    """What is kept, where, and how large it is."""
    found = []
    for topic, folder in cache_places():
        size = folder_size(folder)
        text = f"{folder}: {size / GB:.2f} GB" if folder.exists() else f"{folder}: empty"
        found.append(Finding(topic, text))
    return found


def reference_caches() -> Finding:
    """How many there are, and what they take."""
    from fpo_mlx.cache import list_caches

    folder = cache_root() / "reference"
    entries = list_caches(folder)
    if not entries:
        return Finding("references", f"{folder}: no reference caches")
    size = sum(entry.bytes for entry in entries) / GB
    oldest = f"the oldest {entries[0].days:.0f} days old (`fpo-mlx cache list`, `cache prune`)"
    return Finding("references", f"{len(entries)}, {size:.2f} GB, {oldest}")


def folder_size(folder: Path) -> int:
    """Bytes of all files below a folder, links not followed; 0 if it does not exist."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(parent, name)).st_size
            except OSError:  # removed while we look
                continue
    return total


def _wired_limit(limit: float, total: float) -> Finding:
    text = f"{limit / GB:.1f} GB of it may be wired for the GPU"
    installed = total / MIB
    megabytes = int(installed - max(MACOS_SHARE * installed, MACOS_MB))
    if megabytes * MIB > limit:
        advice = f"For more, until the next start: sudo sysctl iogpu.wired_limit_mb={megabytes}"
        return Finding("wired limit", text, "note", advice)
    return Finding("wired limit", text)


def _cpu_memory() -> Finding:
    try:
        total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return Finding("memory", "unknown", "note")
    return Finding("memory", f"{total / GB:.1f} GB, {free / GB:.1f} GB of it unused")


def _cpu_speed() -> Finding:
    speed = gflops()
    text = f"{speed:.0f} GFLOP/s measured (float32, {SQUARE} x {SQUARE})"
    if speed < SLOW_GFLOPS:
        return Finding("speed", text, "problem", "See the line `blas` above.")
    return Finding("speed", text)
