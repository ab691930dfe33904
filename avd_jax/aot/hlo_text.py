"""Optimized HLO, as text, taken apart: computations, instructions, loops."""

import dataclasses
import math
import re
from collections.abc import Iterator

_BYTES = {
  "pred": 1, "c64": 8, "c128": 16, "token": 0, "opaque": 0, "s4": 0.5,
  "u4": 0.5,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](\{[^}]*\})?")
NAME = re.compile(r"%([\w.\-]+)")
_SAME = ("bitcast", "convert", "copy", "reshape")


@dataclasses.dataclass(frozen=True)
class Instruction:
  """A line of HLO.

  Attributes:
    name: its own.
    shape: of what it makes, as text.
    op: what it does.
    operands: names of what it reads.
    rest: operands and attributes, as text.
    root: whether it is what its computation gives.
  """

  name: str
  shape: str
  op: str
  operands: tuple[str, ...]
  rest: str
  root: bool

  def called(self, attribute: str) -> str | None:
    """The computation that an attribute names."""
    found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
    return found[1] if found else None


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Module:
  """A program: computations by name, and which is the first."""

  computations: dict[str, Computation]
  entry: str


def parse(text: str) -> Module:
  """HLO, as `compiled.as_text()` prints it.

  Raises:
    ValueError: text without an entry computation.
  """
  computations, entry, inside, open_line = {}, None, None, ""
  for line in [*text.splitlines(), "}"]:
    if inside is not None and not _starts(line):
      open_line += line  # attributes may go on, on lines of their own
      continue
    if inside is not None and open_line:
      instruction = _instruction(open_line)
      inside[instruction.name] = instruction
    open_line = ""
    if line.startswith("  "):
      open_line = line
    elif line.endswith("{") and " -> " in line:
      name = line.removeprefix("ENTRY ").split(" ", 1)[0].removeprefix("%")
      inside = computations[name] = {}
      entry = name if line.startswith("ENTRY ") else entry
    else:
      inside = None
  if entry is None:
    raise ValueError("no HLO: there is no ENTRY computation")
  return Module(computations, entry)


def _starts(line: str) -> bool:
  """Whether a line of a computation is an instruction, or ends it."""
  end = line == "}" or line.startswith("}, execution_thread")
  return end or re.match(r"  +(ROOT )?%?[\w.\-]+ = ", line) is not None


def _closing(text: str, start: int) -> int:
  """Where the parenthesis that opens at `start` closes."""
  depth = 0
  for at in range(start, len(text)):
    depth += (text[at] == "(") - (text[at] == ")")
    if not depth:
      return at
  raise ValueError(f"unbalanced parentheses: {text[:80]}")


def _instruction(line: str) -> Instruction:
  name, _, right = line.strip().partition(" = ")
  end = _closing(right, 0) + 1 if right[0] == "(" else right.index(" ")
  shape, right = right[:end], right[end:].lstrip()
  opening = right.index("(")
  closing = _closing(right, opening)
  return Instruction(
    name.removeprefix("ROOT ").removeprefix("%"),
    shape,
    right[:opening],
    tuple(NAME.findall(right[opening:closing])),
    right[opening:],
    name.startswith("ROOT "),
  )


def integers(text: str) -> list[int]:
  """Numbers between commas."""
  return [int(n.lstrip("<=")) for n in text.split(",") if n]


def sizes(shape: str, spaces: bool = False) -> list[int]:
  """Bytes of each array of a shape.

  Args:
    shape: as HLO has it, one array or a tuple.
    spaces: leave out arrays that a layout puts elsewhere than in memory space
      0, such as a TPU's on-chip memory.
  """
  found = []
  for kind, dims, layout in _ARRAY.findall(shape):
    bits = re.search(r"\d+", kind)
    each = _BYTES.get(kind, int(bits[0]) / 8 if bits else 0)
    elsewhere = spaces and re.search(r"S\([1-9]\d*\)", layout)
    found.append(0 if elsewhere else int(each * math.prod(integers(dims))))
  return found


def dims_of(shape: str) -> list[int]:
  """Sizes of the first array of a shape."""
  found = _ARRAY.search(shape)
  return integers(found[2]) if found else []


def _follow(computation: Computation, name: str) -> Instruction | None:
  """What a value is, past copies."""
  made = computation.get(name)
  while made and made.op in _SAME and made.operands:
    made = computation.get(made.operands[0])
  return made


def _constant(made: Instruction | None) -> int | None:
  found = made and made.op == "constant" and re.match(r"\((-?\d+)\)", made.rest)
  return int(found[1]) if found else None


def _root(computation: Computation) -> Instruction:
  return next(i for i in computation.values() if i.root)


def _index(made: Instruction | None) -> int | None:
  found = (
    made
    and made.op == "get-tuple-element"
    and re.search(r"\bindex=(\d+)", made.rest)
  )
  return int(found[1]) if found else None


def trips(module: Module, inside: Computation, loop: Instruction) -> int | None:
  """How often a while loop runs its body; None where that does not show."""
  known = re.search(r"known_trip_count\W+n\W+(\d+)", loop.rest)
  if known:
    return int(known[1])
  condition = module.computations[loop.called("condition")]
  test = _root(condition)
  if test.op != "compare" or "direction=LT" not in test.rest:
    return None
  counter, end = (_follow(condition, name) for name in test.operands)
  place, stop = _index(counter), _constant(end)
  if place is None or stop is None:
    return None
  begin = _begin(inside, loop, place)
  step = _stride(module, module.computations[loop.called("body")], place)
  if begin is None or step is None or step < 1:
    return None
  return max(0, -(-(stop - begin) // step))


def _begin(inside: Computation, loop: Instruction, place: int) -> int | None:
  start = _follow(inside, loop.operands[0])
  if start is None or start.op != "tuple":
    return None
  return _constant(_follow(inside, start.operands[place]))


def _stride(module: Module, body: Computation, place: int) -> int | None:
  made = _follow(body, _root(body).operands[place])
  if made and made.op == "fusion":
    body = module.computations[made.called("calls")]
    made = _root(body)
  if made is None or made.op != "add":
    return None
  steps = [_constant(_follow(body, name)) for name in made.operands]
  return next((step for step in steps if step is not None), None)


def walk(
  module: Module, name: str, times: int, unknown: list[str]
) -> Iterator[tuple[Computation, Instruction, int]]:
  """(computation, instruction, how often it runs), fusions as a whole.

  Every branch of a conditional counts.
  """
  inside = module.computations[name]
  for made in inside.values():
    yield inside, made, times
    if made.op == "while":
      count = trips(module, inside, made)
      if count is None:
        origin = re.search(r'op_name="([^"]*)"', made.rest)
        unknown.append(origin[1] if origin else made.name)
      body = made.called("body")
      yield from walk(module, body, times * (count or 1), unknown)
    elif made.op == "call":
      yield from walk(module, made.called("to_apply"), times, unknown)
    elif made.op == "async-start":
      yield from walk(module, made.called("calls"), times, unknown)
    elif made.op == "conditional":
      for branch in _branches(made):
        yield from walk(module, branch, times, unknown)


def within(
  module: Module, inside: Computation, made: Instruction
) -> Iterator[tuple[Computation, Instruction]]:
  """An instruction and, of a fusion, all that is fused in it."""
  yield inside, made
  if made.op == "fusion":
    calls = module.computations[made.called("calls")]
    for part in calls.values():
      yield from within(module, calls, part)


def _branches(made: Instruction) -> list[str]:
  listed = re.search(r"branch_computations=\{([^}]*)\}", made.rest)
  if listed:
    return NAME.findall(listed[1])
  both = made.called("true_computation"), made.called("false_computation")
  return [name for name in both if name]
