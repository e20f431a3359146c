"""What a checkpoint's manifest.json says, written and read with every number checked.

[Note: the format]

    step-00001234/
        manifest.json                        {"digest": …, "manifest": {…}}
        rank-00000-of-00002.safetensors      what rank 0 wrote
        rank-00001-of-00002.safetensors

*Entries* are the tensors that were saved: kind "param" (params and buffers, by name), "extra" (the
user's), "rng". A *shard* is elements ``[offset, offset + numel)`` of one *part* of an entry
("values", "exp_avg", …), counted in the order of memory that ``dims`` describes (outermost first),
a complex number being two; of a part that ends in "_scale", blocks of 128 elements are counted. The
shards of a part cover its entry exactly once.

A shard is one 1-D tensor of its rank's file, and tensors lie there in the manifest's order. So file
names, header and positions all follow from the manifest: they are compared, never parsed. Digests
are XXH3-128, of each shard's bytes and of the manifest's own text between the outer braces. They
find accidents; who can write the files can forge them, so all that is read is checked as well.
"""

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from shardadam.checkpoint.errors import CheckpointError, OtherVersion
from shardadam.checkpoint.parts import PARTS, dtype_of, may_have, parts_of, saved_format
from shardadam.kernels.state_formats import FORMATS, part_of

VERSION = 1
FILE = "manifest.json"
MAX_BYTES = 64 * 2**20
"""Of a manifest: room for half a million shards."""

_PREFIX = b'{"digest":"'
_MIDDLE = b'","manifest":'
_SUFFIX = b"}\n"
_DIGEST = re.compile("[0-9a-f]{32}")
_ATTEMPT = re.compile("[0-9a-f]{16}")
_LIMIT = 2**62

DTYPES = {
    "float64": ("F64", torch.float64),
    "float32": ("F32", torch.float32),
    "bfloat16": ("BF16", torch.bfloat16),
    "float16": ("F16", torch.float16),
    "float8_e4m3fn": ("F8_E4M3", torch.float8_e4m3fn),
    "float8_e5m2": ("F8_E5M2", torch.float8_e5m2),
    "int64": ("I64", torch.int64),
    "int32": ("I32", torch.int32),
    "int16": ("I16", torch.int16),
    "int8": ("I8", torch.int8),
    "uint8": ("U8", torch.uint8),
    "bool": ("BOOL", torch.bool),
    "complex64": ("F32", torch.float32),
    "complex128": ("F64", torch.float64),
}
"""By the name of a dtype: safetensors' name and torch's dtype of its elements in a file."""

_PARTS = {"param": PARTS, "extra": ("extra",), "rng": ("rng",)}


@dataclass(frozen=True, slots=True)
class Entry:
    """One saved tensor. ``scalars`` ("step", …) are None where the optimizer has no state."""

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    dims: tuple[int, ...]
    scalars: dict[str, float] | None = None

    @property
    def numel(self) -> int:
        """Elements in a file: a complex number is two."""
        return math.prod(self.shape) * (2 if self.dtype.startswith("complex") else 1)

    def file_dtype(self, part: str) -> tuple[str, torch.dtype]:
        """Of the elements of ``part``: safetensors' name and torch's."""
        dtype = dtype_of(part, DTYPES[self.dtype][1])
        return DTYPES[str(dtype).removeprefix("torch.")]

    def part_numel(self, part: str) -> int:
        """Elements of ``part`` in a file."""
        return int(part_of(part, 0, self.numel).stop)


@dataclass(frozen=True, slots=True)
class Shard:
    """Elements ``[offset, offset + numel)`` of a part of ``entries[entry]``."""

    entry: int
    part: str
    offset: int
    numel: int
    digest: str = ""


@dataclass(frozen=True, slots=True)
class Manifest:
    """All of it; ``files`` has the shards of every rank's file, in their order there.

    ``documents``: by name, JSON that this module does not look into.
    """

    attempt: str
    step: int
    entries: list[Entry]
    files: list[list[Shard]]
    documents: dict[str, Any]

    def find(self, kind: str) -> dict[str, int]:
        """The numbers of the entries of a kind, by name."""
        return {entry.name: i for i, entry in enumerate(self.entries) if entry.kind == kind}

    def layout(self, rank: int) -> tuple[bytes, list[int]]:
        """The first bytes of a rank's file, and where each shard starts; the last is the end."""
        return file_layout(self.attempt, rank, len(self.files), self.entries, self.files[rank])


def file_name(rank: int, world_size: int) -> str:
    """Of a rank's file."""
    return f"rank-{rank:05d}-of-{world_size:05d}.safetensors"


def file_layout(
    attempt: str, rank: int, world_size: int, entries: list[Entry], shards: Iterable[Shard]
) -> tuple[bytes, list[int]]:
    """As `Manifest.layout`."""
    header: dict[str, Any] = {
        "__metadata__": {"attempt": attempt, "rank": str(rank), "world_size": str(world_size)}
    }
    position, starts = 0, []
    for shard in shards:
        entry = entries[shard.entry]
        code, dtype = entry.file_dtype(shard.part)
        end = position + shard.numel * dtype.itemsize
        header[f"{shard.part}/{entry.name}"] = {
            "dtype": code,
            "shape": [shard.numel],
            "data_offsets": [position, end],
        }
        starts.append(position)
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 64)  # data starts at a cache line, as safetensors asks of 8
    head = (len(text)).to_bytes(8, "little") + text
    return head, [len(head) + start for start in [*starts, position]]


def write(manifest: Manifest) -> bytes:
    """The text of manifest.json."""
    body = json.dumps(
        {
            "format": "shardadam checkpoint",
            "version": VERSION,
            "attempt": manifest.attempt,
            "step": manifest.step,
            "world_size": len(manifest.files),
            "entries": [
                [e.kind, e.name, list(e.shape), e.dtype, list(e.dims), e.scalars]
                for e in manifest.entries
            ],
            "files": [
                [[s.entry, s.part, s.offset, s.numel, s.digest] for s in shards]
                for shards in manifest.files
            ],
            "documents": manifest.documents,
        },
        separators=(",", ":"),
        allow_nan=False,
    ).encode()
    text = seal(body)
    if len(text) > MAX_BYTES:
        raise CheckpointError(
            f"the manifest would have {len(text)} bytes, the limit is {MAX_BYTES}"
        )
    return text


def seal(body: bytes) -> bytes:
    """The manifest's file: ``body`` and its digest."""
    return _PREFIX + xxhash.xxh3_128_hexdigest(body).encode() + _MIDDLE + body + _SUFFIX


def read(text: bytes, where: str) -> Manifest:
    """Read manifest.json; ``where`` is what errors call it.

    Raises:
        OtherVersion: of the format.
        CheckpointError: it is damaged, or contradicts itself.
    """
    start = len(_PREFIX) + 32
    body = text[start + len(_MIDDLE) : -len(_SUFFIX)]
    if text != seal(body):
        stated = text[len(_PREFIX) : start].decode("ascii", "replace")
        found = xxhash.xxh3_128_hexdigest(body)
        raise CheckpointError(f"{where}: expected digest {stated!r}, found {found}: it is damaged")
    try:
        value = json.loads(body, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{where}: expected JSON, found {error or 'too deep a nest'}"
        ) from error
    try:
        return _manifest(value)
    except _Wrong as error:
        kind = OtherVersion if isinstance(error, _WrongVersion) else CheckpointError
        raise kind(f"{where}: {error}") from error


class _Wrong(Exception):
    """Found in a manifest; `read` adds where."""


class _WrongVersion(_Wrong):
    pass


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name that stands twice in one object")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text}, which is no JSON")


def _expect(
    good: bool, what: str, expected: str, found: object, kind: type[_Wrong] = _Wrong
) -> None:
    if not good:
        text = repr(found)
        text = text if len(text) < 100 else text[:100] + "…"
        raise kind(f"{what}: expected {expected}, found {text}")


def _is_int(value: object, high: int = _LIMIT) -> bool:
    return type(value) is int and 0 <= value <= high


def _manifest(value: Any) -> Manifest:
    _expect(isinstance(value, dict), "manifest", "an object", value)
    stated = value.get("format")
    _expect(stated == "shardadam checkpoint", "format", '"shardadam checkpoint"', stated)
    version = value.get("version")
    _expect(
        type(version) is int and version == VERSION,
        "format version",
        f"{VERSION} (a newer shardadam may read it)",
        version,
        _WrongVersion,
    )
    names = {"format", "version", "attempt", "step", "world_size", "entries", "files", "documents"}
    _expect(set(value) == names, "names", str(sorted(names)), sorted(value))
    attempt, step, world_size = value["attempt"], value["step"], value["world_size"]
    _expect(
        isinstance(attempt, str) and bool(_ATTEMPT.fullmatch(attempt)),
        "attempt",
        "16 hexadecimal digits",
        attempt,
    )
    _expect(_is_int(step), "step", "an int from 0", step)
    _expect(_is_int(world_size, 99_999) and world_size > 0, "world_size", "1 to 99999", world_size)
    _expect(isinstance(value["entries"], list), "entries", "a list", value["entries"])
    entries = [_entry(item, f"entry {i}") for i, item in enumerate(value["entries"])]
    seen = {(entry.kind, entry.name) for entry in entries}
    _expect(len(seen) == len(entries), "entries", "every name once", f"{len(entries)} entries")
    files = value["files"]
    _expect(
        isinstance(files, list) and len(files) == world_size,
        "files",
        f"a list of {world_size}",
        files,
    )
    shards = [_shards(items, entries, f"file {rank}") for rank, items in enumerate(files)]
    _check_cover(entries, shards)
    documents = value["documents"]
    _expect(isinstance(documents, dict), "documents", "an object", documents)
    return Manifest(attempt, step, entries, shards, documents)


def _entry(item: Any, what: str) -> Entry:
    _expect(isinstance(item, list) and len(item) == 6, what, "a list of 6", item)
    kind, name, shape, dtype, dims, scalars = item
    _expect(isinstance(kind, str) and kind in _PARTS, what, f"one of {sorted(_PARTS)}", kind)
    _expect(isinstance(name, str) and len(name) < 4096, what, "a name", name)
    what = f"{kind} {name[:200]!r}"
    _expect(isinstance(dtype, str) and dtype in DTYPES, what, "a known dtype", dtype)
    good = isinstance(shape, list) and len(shape) <= 64 and all(map(_is_int, shape))
    _expect(good, what, "a shape", shape)
    _expect(math.prod(max(size, 1) for size in shape) < _LIMIT // 16, what, "fewer elements", shape)
    good = isinstance(dims, list) and all(map(_is_int, dims))
    _expect(good and sorted(dims) == list(range(len(shape))), what, "dims of the shape", dims)
    if scalars is not None:
        good = isinstance(scalars, dict) and all(
            type(number) is float and abs(number) <= 2.0**53 for number in scalars.values()
        )
        _expect(good and "step" in scalars, what, "scalars with a step", scalars)
        _expect(kind == "param", what, "no scalars", scalars)
    return Entry(kind, name, tuple(shape), dtype, tuple(dims), scalars)


def _shards(items: Any, entries: list[Entry], what: str) -> list[Shard]:
    _expect(isinstance(items, list), what, "a list", items)
    shards = []
    for item in items:
        _expect(isinstance(item, list) and len(item) == 5, what, "a list of 5", item)
        index, part, offset, numel, digest = item
        _expect(_is_int(index, len(entries) - 1), what, f"one of {len(entries)} entries", index)
        entry = entries[index]
        _expect(part in _PARTS[entry.kind], what, f"one of {_PARTS[entry.kind]}", part)
        _expect(may_have(part, entry.dtype), what, f"no {part} of {entry.dtype} params", part)
        limit = entry.part_numel(part)
        good = _is_int(offset) and _is_int(numel) and 0 < numel <= limit - offset
        _expect(good, f"{what}, {entry.name!r}", f"a range of {limit}", (offset, numel))
        good = isinstance(digest, str) and bool(_DIGEST.fullmatch(digest))
        _expect(good, f"{what}, {entry.name!r}", "a digest of 32 hexadecimal digits", digest)
        shards.append(Shard(index, part, offset, numel, digest))
    keys = {(shard.entry, shard.part) for shard in shards}
    _expect(len(keys) == len(shards), what, "each part of an entry once", f"{len(shards)} shards")
    return shards


def _check_cover(entries: list[Entry], files: list[list[Shard]]) -> None:
    """Every part that there is has all elements of its entry, each once."""
    ranges: dict[tuple[int, str], list[tuple[int, int]]] = defaultdict(list)
    for shard in (shard for shards in files for shard in shards):
        ranges[shard.entry, shard.part].append((shard.offset, shard.numel))
    for index, entry in enumerate(entries):
        parts = {part for part in _PARTS[entry.kind] if (index, part) in ranges}
        parts |= {_PARTS[entry.kind][0]}
        if entry.scalars is not None:
            form = saved_format(parts) or FORMATS["fp32"]
            latest, all_of = (set(parts_of(form, maximum).values()) for maximum in (False, True))
            parts |= all_of if parts & (all_of - latest) else latest
        for part in sorted(parts):
            position = 0
            for offset, numel in sorted(ranges[index, part]):
                _expect(
                    offset == position,
                    f"{part} of {entry.name[:200]!r}",
                    f"a shard from element {position}",
                    f"one from {offset}",
                )
                position += numel
            _expect(
                position == entry.part_numel(part),
                f"{part} of {entry.name[:200]!r}",
                f"{entry.part_numel(part)} elements",
                position,
            )
