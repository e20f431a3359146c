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

from shardadam.kernels import cubins

THREADS, REGISTERS, MAX_BLOCKS = 128, 65_536, 16  # of a multiprocessor, the least of sm_80 … sm_121
FLOAT32, BF16 = 0, 2  # codes of csrc/formats.h
SPLIT, MASTER = 2, 3
# Param and gradient formats, elements that a thread takes at a time, bytes moved per param.
KERNELS = {
    "fp32": (FLOAT32, FLOAT32, 8, 28),
    "bf16 + remainder": (SPLIT, BF16, 8, 26),
    "bf16 + fp32 master": (MASTER, BF16, 8, 30),
}


@dataclass(frozen=True, slots=True)
class Parts:
    """What a cubin is made of; instructions are counted in the text, not in a run."""

    registers: int
    local_bytes: int
    instructions: collections.Counter[str]

    def count(self, pattern: str) -> int:
        """How many instructions match."""
        return sum(n for name, n in self.instructions.items() if re.fullmatch(pattern, name))

    @property
    def threads(self) -> int:
        """How many threads a multiprocessor holds at once."""
        per_thread = self.registers + -self.registers % 8
        return THREADS * min(MAX_BLOCKS, REGISTERS // (THREADS * per_thread))

    @property
    def bytes_under_way(self) -> int:
        """What these threads load at once, in accesses of 16 bytes."""
        return self.threads * 16 * self.count(r"LDG.*\.128.*")


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
    """Print the table."""
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
            print(
                f"| {name} | {arch} | {size} | {parts.registers} | {parts.threads} | "
                f"{parts.bytes_under_way / 1e3:.0f} | {doubles:.0f} | {conversions:.0f} |"
            )


if __name__ == "__main__":
    main()
