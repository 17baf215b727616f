"""The collectives in a compiled program, read from its HLO text, each as often as the loops around it run."""

import collections
import dataclasses
import math
import re

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "ragged-all-to-all", "collective-permute", "send")
ITEM_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "token": 0, "s4": 4, "u4": 4, "s2": 2, "u2": 2} | {
    f"{sign}{bits}": bits for sign in "su" for bits in (8, 16, 32, 64)
}
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%([\w.\-]+) = (.+?) ([a-z][a-z0-9\-]*)\((.*)$")
_CALLED = re.compile(r"(?:calls|to_apply|called_computation|true_computation|false_computation)=%([\w.\-]+)")
_BRANCHES = re.compile(r"(?:branch_computations|called_computations)=\{([^}]*)\}")
_LOOP = re.compile(r"condition=%([\w.\-]+), body=%([\w.\-]+)")
_ARRAY = re.compile(r"([a-z]\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective operation of a program.

    Attributes:
      kind: one of `KINDS`; "send" leaves the slice (over DCN), all others stay within it.
      shape: HLO text of what it gives, such as "bf16[2048,6656]".
      group: devices that take part in one; 2 for what goes from one device to another.
      count: how often a step runs it.
      bytes_each: bytes that a device receives in one run, by a ring: (n−1)/n of the whole, twice that for all-reduce.
      op_name: where the model asked for it.
    """

    kind: str
    shape: str
    group: int
    count: int
    bytes_each: float
    op_name: str

    @property
    def bytes(self) -> float:
        """Bytes that a device receives in a step."""
        return self.count * self.bytes_each


@dataclasses.dataclass
class _Computation:
    instructions: dict[str, tuple[str, str, str]]  # name -> (type, opcode, the rest of the line)
    root: str = ""


def find_collectives(hlo: str) -> list[Collective]:
    """Lists the collectives of a compiled module's text.

    A loop's trip count is what its condition compares the counter with; a loop that hides it counts once.
    """
    computations, entry = _parse(hlo)
    times = _times(computations, entry)
    result = []
    for name, computation in computations.items():
        if not times[name]:
            continue
        for kind, rest in (
            (opcode, (result_type, rest)) for result_type, opcode, rest in computation.instructions.values()
        ):
            started, kind = kind.endswith("-start"), kind.removesuffix("-start")
            if kind not in KINDS:
                continue
            # What starts one of these gives its operands, too, before its results; on GPUs, what starts any does.
            operands_too = started and (kind in ("all-gather", "reduce-scatter") or rest[0].startswith("(("))
            found = _collective(kind, *rest, operands_too, scattered=name.startswith("all-reduce-scatter"))
            if found.bytes_each:
                result.append(dataclasses.replace(found, count=times[name]))
    return result


def by_kind(found: list[Collective]) -> dict[str, dict[str, float]]:
    """Sums {"operations", "runs", "bytes"} of a step for every kind."""
    table: dict[str, dict[str, float]] = {}
    for one in found:
        entry = table.setdefault(one.kind, {"operations": 0, "runs": 0, "bytes": 0.0})
        entry["operations"] += 1
        entry["runs"] += one.count
        entry["bytes"] += one.bytes
    return dict(sorted(table.items(), key=lambda item: -item[1]["bytes"]))


def _parse(hlo: str) -> tuple[dict[str, _Computation], str]:
    computations, entry, current = {}, "", None
    for line in hlo.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = _Computation({})
            entry = header[2] if header[1] else entry
        elif current is not None and (found := _INSTRUCTION.match(line)):
            name, result_type, opcode, rest = found.groups()
            current.instructions[name] = (result_type, opcode, rest)
            if "ROOT %" in line[: line.index("=")]:
                current.root = name
    return computations, entry


def _times(computations: dict[str, _Computation], entry: str) -> collections.Counter:
    """How often each computation runs in a step; HLO text names callees before their callers."""
    times = collections.Counter({entry: 1})
    for name in reversed(computations):
        for _, opcode, rest in computations[name].instructions.values():
            if opcode == "while":
                condition, body = _LOOP.search(rest).groups()
                times[body] += times[name] * _trips(computations[name], computations[condition], rest)
                continue
            called = _CALLED.findall(rest)
            for branches in _BRANCHES.findall(rest):
                called += re.findall(r"%([\w.\-]+)", branches)
            for callee in called:
                times[callee] += times[name]
    return times


def _trips(caller: _Computation, condition: _Computation, loop: str) -> int:
    """Trip count of a loop whose counter runs up by one, 1 where it cannot be read.

    The condition compares an element of the loop's tuple with the limit; the counter starts where the tuple that the
    loop is given has it, which is not 0 if the compiler has peeled the first turns off.
    """
    if known := re.search(r'known_trip_count":\{"n":"(\d+)', loop):
        return int(known[1])
    compared = re.match(r"%([\w.\-]+), %([\w.\-]+)\)", condition.instructions[condition.root][2])
    if not compared:
        return 1
    limit = _constant(condition, compared[2])
    element = re.search(r"index=(\d+)", condition.instructions[compared[1]][2])
    given = caller.instructions.get(loop.partition(")")[0].lstrip("%"))
    if limit is None or not element or not given or given[1] != "tuple":
        return limit or 1
    start = _constant(caller, re.findall(r"%([\w.\-]+)", given[2].partition(")")[0])[int(element[1])])
    return limit - (start or 0)


def _constant(computation: _Computation, name: str) -> int | None:
    """Value of an integer constant, perhaps copied, or None."""
    _, opcode, rest = computation.instructions.get(name, ("", "", ""))
    if opcode in ("copy", "bitcast"):
        return _constant(computation, rest.partition(")")[0].partition(",")[0].lstrip("%"))
    found = re.match(r"(\d+)\)", rest) if opcode == "constant" else None
    return int(found[1]) if found else None


def _collective(kind: str, result_type: str, rest: str, operands_too: bool, scattered: bool) -> Collective:
    arrays = [(dtype, dims) for dtype, dims in _ARRAY.findall(result_type) if dtype in ITEM_BITS]
    if operands_too:
        arrays = arrays[len(arrays) // 2 :]
    sizes = [math.prod(int(d) for d in dims.split(",") if d) * ITEM_BITS[dtype] / 8 for dtype, dims in arrays]
    group = 2 if kind in ("collective-permute", "send") else _group_size(rest)
    share = (group - 1) / group
    if kind in ("collective-permute", "send"):
        received = sizes[0]
    elif kind == "all-reduce":
        kind = "reduce-scatter" if scattered else kind
        received = sum(sizes) * share * (1 if scattered else 2)
    elif kind == "reduce-scatter":
        received = sum(sizes) * group * share
    else:
        received = sum(sizes) * share
    op_name = re.search(r'op_name="([^"]*)"', rest)
    shape = ", ".join(f"{dtype}[{dims}]" for dtype, dims in arrays)
    return Collective(kind, shape, group, 1, received, op_name[1] if op_name else "")


def _group_size(rest: str) -> int:
    """Devices of one group, from any of the three ways in which HLO writes replica groups."""
    if found := re.search(r"replica_groups=\{\{([\d,]*)\}", rest):
        return found[1].count(",") + 1
    if found := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
        return int(found[1])
    found = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", rest)
    if not found:
        return 1
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", found[1])}
    # An axis may stand there in part: 'fsdp':(first)size.
    parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", found[2])
    return math.prod(int(part) if part else sizes[name] for name, part in parts)
