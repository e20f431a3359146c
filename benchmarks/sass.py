"""What the CUDA kernels are made of, found without a GPU: they are compiled and taken apart.

python benchmarks/sass.py [--arch sm_80 sm_90 sm_100]

Needs the compiler and NVIDIA's cuobjdump and nvdisasm: pip install "shardadam[dev]".
"""

import argparse
import collections
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from sass_path import instructions_of_a_turn

from shardadam.kernels import cubins

THREADS, REGISTERS, MAX_BLOCKS = 128, 65_536, 16  # of a multiprocessor, the least of sm_80 … sm_121
FLOAT32, BF16 = 0, 2  # codes of csrc/formats.h
SPLIT, MASTER, SPLIT8, ONLY = 2, 3, 5, 6
STATE_FULL, STATE_BF16, Q16, Q8 = 0, 1, 2, 3
# Param and gradient formats, elements that a thread takes at a time, bytes moved per param.
KERNELS = {
    "fp32": (FLOAT32, FLOAT32, 8, 28),
    "bf16 + remainder": (SPLIT, BF16, 8, 26),
    "bf16 + fp32 master": (MASTER, BF16, 8, 30),
}
# By blocks: formats of param and moments, with bf16 gradients; bytes moved per param.
CODED = {
    "bf16 + 16-bit remainder, bf16 moments": (SPLIT, STATE_BF16, 18),
    "bf16 + 16-bit remainder, q16": (SPLIT, Q16, 16.06),
    "bf16 + 8-bit remainder, q8": (SPLIT8, Q8, 12.06),
    "bf16 alone, q8": (ONLY, Q8, 10.06),
    "bf16 + 8-bit remainder, fp32 moments": (SPLIT8, STATE_FULL, 24),
}
ELEMENTS_OF_LANE = 8  # kOwn of csrc/moments_cuda.h


@dataclass(frozen=True, slots=True)
class Parts:
    """What a cubin is made of; instructions are counted in the text, not in a run."""

    registers: int
    local_bytes: int
    instructions: collections.Counter[str]
    sass: str

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    @property
    def threads(self) -> int:
        """How many threads a multiprocessor holds at once."""
        per_thread = self.registers + -self.registers % 8
        return THREADS * min(MAX_BLOCKS, REGISTERS // (THREADS * per_thread))

    def streamed(self, operation: str) -> int:
        """Bytes of a thread's streaming loads (``LDG``) or stores (``STG``): those with a hint."""
        return sum(bits // 8 * self.count(rf"{operation}\.E\.EF\.{bits}.*") for bits in (64, 128))

    @property
    def bytes_under_way(self) -> int:
        """What these threads load at once."""
        return self.threads * self.streamed("LDG")


def take_apart(cubin: bytes) -> Parts:
    """Registers, local memory and instructions; the kernel with the most registers counts."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run(
                [_tool(name), *options, file.name], capture_output=True, text=True, check=True
            ).stdout
            for name, *options in (("cuobjdump", "-res-usage"), ("nvdisasm", "-c"))
        )
    resources = re.findall(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    instructions = re.findall(r"\*/\s+(?:@!?U?P\w+ +)?([A-Z][A-Z0-9_.]+)", sass)
    return Parts(
        registers=max(int(registers) for registers, *_ in resources),
        local_bytes=sum(int(stack) + int(local) for _, stack, local in resources),
        instructions=collections.Counter(instructions),
        sass=sass,
    )


def _tool(name: str) -> str:
    """One of NVIDIA's binaries, from its wheel or the PATH."""
    spec = importlib.util.find_spec("nvidia")
    roots = () if spec is None else spec.submodule_search_locations
    paths = [path for root in roots for path in Path(root).glob(f"*/bin/{name}")]
    found = str(paths[0]) if paths else shutil.which(name)
    if found is None:
        raise FileNotFoundError(f'{name} is missing: pip install "shardadam[dev]"')
    return found


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=["sm_80", "sm_90", "sm_100"])
    args = parser.parse_args()
    version, _ = cubins.nvrtc()
    print(f"AdamW, NVRTC {version}; fp64 instructions and conversions per element\n")
    print("| | arch | B/param | registers | threads | KB under way | fp64 | conversions |")
    print("|---|---|---|---|---|---|---|---|")
    for name, (param, grad, elements, size) in KERNELS.items():
        for arch in args.arch:
            codes = {"SHARDADAM_PARAM": param, "SHARDADAM_GRAD": grad, "SHARDADAM_FLAGS": 0}
            parts = take_apart(cubins.compile_now("adam_cuda.cu", arch, codes)[0])
            # The text has the loop over whole vectors and the one over single elements.
            doubles = parts.count(r"D(ADD|MUL|FMA).*") / (elements + 1)
            conversions = parts.count(r"F2F.*64.*") / (elements + 1)
            print(f"{_row(name, arch, size, parts)} {doubles:.0f} | {conversions:.0f} |")
    print("\nBy blocks, gradients in bf16; instructions per element on the usual way\n")
    print("| | arch | B/param | registers | threads | KB under way | instructions |")
    print("|---|---|---|---|---|---|---|")
    for name, (param, state, size) in CODED.items():
        for arch in args.arch:
            codes = {"SHARDADAM_PARAM": param, "SHARDADAM_GRAD": BF16, "SHARDADAM_FLAGS": 0}
            codes["SHARDADAM_STATE"] = state
            parts = take_apart(cubins.compile_now("coded_cuda.cu", arch, codes)[0])
            issued = instructions_of_a_turn(parts.sass) / ELEMENTS_OF_LANE
            print(f"{_row(name, arch, size, parts)} {issued:.0f} |")


def _row(name: str, arch: str, size: float, parts: Parts) -> str:
    under_way = parts.bytes_under_way / 1e3
    return f"| {name} | {arch} | {size} | {parts.registers} | {parts.threads} | {under_way:.0f} |"


if __name__ == "__main__":
    main()
