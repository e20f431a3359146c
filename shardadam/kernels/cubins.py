"""Compiles csrc/*.cu at run time, and keeps what was compiled.

NVRTC compiles to a cubin without a driver or a GPU. The cache is a folder of the user's own; an
entry is named by everything that its content depends on, carries its checksum, and is written under
another name first. Whatever is wrong with it, compiling again (0.1 s) is the answer.
"""

import hashlib
import io
import os
import stat
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent.parent / "csrc"
# Of Tegra chips, whose cubins run nowhere else.
_EMBEDDED = (72, 87, 101)
_MAGIC = b"shardadam cubin 1\n"
# What makes results equal to the CPU's bit by bit: every operation correctly rounded, no two fused.
_OPTIONS = {"std": "c++17", "fma": False, "ftz": False, "prec_div": True, "prec_sqrt": True}


class CompilerMissing(RuntimeError):
    """There is no NVRTC to compile with; the message says what to install."""


def nvrtc() -> tuple[str, list[int]]:
    """NVRTC's version, and the architectures that it compiles for (90 for sm_90).

    Raises:
        CompilerMissing: cuda-core or NVRTC is not installed.
    """
    extra = "cuda12" if (torch.version.cuda or "").startswith("12") else "cuda"
    try:
        from cuda.bindings import nvrtc as bindings
        from cuda.core import Program  # noqa: F401  (is it there?)
    except Exception as error:  # versions that don't fit together fail in their own ways
        raise CompilerMissing(
            f'cuda-core can\'t be used ({error}): pip install "shardadam[{extra}]"'
        ) from None
    try:
        _, major, minor = bindings.nvrtcVersion()
        _, architectures = bindings.nvrtcGetSupportedArchs()
    except Exception as error:  # what it raises has changed with its versions
        package = "nvidia-cuda-nvrtc-cu12" if extra == "cuda12" else "nvidia-cuda-nvrtc"
        raise CompilerMissing(
            f"NVRTC could not be loaded ({str(error).splitlines()[0]}): pip install {package}"
        ) from None
    return f"{major}.{minor}", sorted(architectures)


def architecture(capability: tuple[int, int], supported: list[int]) -> str | None:
    """What to compile for: the GPU's own, or an older of the same major, on which cubins run."""
    major, minor = capability
    fitting = [
        arch
        for arch in supported
        if arch // 10 == major and arch % 10 <= minor and arch not in _EMBEDDED
    ]
    if 10 * major + minor in supported:
        return f"sm_{10 * major + minor}"
    return f"sm_{max(fitting)}" if fitting else None


def compiled(source: str, arch: str, defines: Mapping[str, int]) -> bytes:
    """The cubin of ``csrc/<source>`` for ``arch`` with ``defines``, kept or compiled now."""
    path = _path(source, arch, defines)
    cubin = _read(path)
    if cubin is None:
        cubin, _ = compile_now(source, arch, defines)
        _write(path, cubin)
    return cubin


def compile_now(source: str, arch: str, defines: Mapping[str, int]) -> tuple[bytes, str]:
    """Compile without the cache: the cubin and what the compiler had to say."""
    from cuda.core import Program, ProgramOptions

    macros = [(name, str(value)) for name, value in defines.items()]
    options = ProgramOptions(
        arch=arch, include_path=str(_SOURCES), define_macro=macros or None, **_OPTIONS
    )
    log = io.StringIO()
    text = (_SOURCES / source).read_text(encoding="ascii")
    code = Program(text, "c++", options).compile("cubin", logs=log).code
    return bytes(code), log.getvalue()


def cache_folder() -> Path:
    """Where cubins are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path("~/.cache").expanduser()) / "shardadam"


def _path(source: str, arch: str, defines: Mapping[str, int]) -> Path:
    key = hashlib.sha256(_MAGIC)
    version, _ = nvrtc()
    for part in (source, arch, version, sorted(defines.items()), sorted(_OPTIONS.items())):
        key.update(f"{part}\n".encode())
    for file in sorted(_SOURCES.iterdir()):
        if file.suffix in (".h", ".cu"):
            key.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return cache_folder() / f"{Path(source).stem}-{arch}-{key.hexdigest()[:40]}.cubin"


def _read(path: Path) -> bytes | None:
    """A cached cubin; None if it is not there, not whole, or not ours alone to write."""
    try:
        if not _is_ours(path.parent.lstat(), stat.S_ISDIR):
            return None
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0)), "rb") as file:
            if not _is_ours(os.fstat(file.fileno()), stat.S_ISREG):
                return None
            content = file.read()
    except OSError:
        return None
    head, cubin = content[: len(_MAGIC) + 32], content[len(_MAGIC) + 32 :]
    return cubin if head == _MAGIC + hashlib.sha256(cubin).digest() else None


def _write(path: Path, cubin: bytes) -> None:
    """Keep a cubin if that can be done: a home that can't be written is no reason to fail."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not _is_ours(path.parent.lstat(), stat.S_ISDIR):
            return
        handle, name = tempfile.mkstemp(prefix=".", dir=path.parent)
        try:
            with open(handle, "wb") as file:
                file.write(_MAGIC + hashlib.sha256(cubin).digest() + cubin)
            os.replace(name, path)
        except OSError:
            os.unlink(name)
    except OSError:
        pass


def _is_ours(status: os.stat_result, kind: Callable[[int], bool]) -> bool:
    owned = not hasattr(os, "geteuid") or status.st_uid == os.geteuid()
    return kind(status.st_mode) and owned and not status.st_mode & 0o022
