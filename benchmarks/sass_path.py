"""How many instructions a thread of a CUDA kernel issues for each turn of its main loop."""

import heapq
import re

_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+((?:@!?U?P\w+ +)?)([A-Z][A-Z0-9_.]+)(.*?);")
_STREAMED = re.compile(r"(LDG|STG)\.E\.EF\..*")  # with the hint of csrc/memory_cuda.h
_NEVER = re.compile(r"CALL|RET|EXIT")


def instructions_of_a_turn(sass: str) -> int:
    """The fewest instructions from one streaming access around the loop to the same one again.

    That is the usual way of numbers: every whole access is on it, and no subroutine, as divisions
    and roots call for subnormal or infinite operands. ``sass`` is what ``nvdisasm -c`` prints.
    """
    code: list[tuple[bool, str, str]] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L_x_\d+):", line):
            labels[label[1]] = len(code)
        elif found := _INSTRUCTION.search(line):
            code.append((bool(found[1]), found[2], found[3]))
    streamed = [bool(_STREAMED.fullmatch(name)) for _, name, _ in code]
    first = streamed.index(True)
    needed = sum(streamed)
    queue, seen = [(0, first, 0)], set()
    while queue:
        steps, at, passed = heapq.heappop(queue)
        if at == first and passed == needed:
            return steps
        if (at, passed) in seen or at >= len(code):
            continue
        seen.add((at, passed))
        predicated, name, operands = code[at]
        if _NEVER.match(name) and not predicated:
            continue
        after = passed + streamed[at]
        if name.startswith("BRA"):
            target = re.search(r"`\((\.L_x_\d+)\)", operands)
            if target:
                heapq.heappush(queue, (steps + 1, labels[target[1]], after))
            # A branch may have its condition among its operands, or be for diverged lanes.
            if not predicated and not re.match(r"\s*[~!]?U?[PR]", operands):
                continue
        heapq.heappush(queue, (steps + 1, at + 1, after))
    raise ValueError("no loop over streaming accesses")
