"""Compiling for what is not there: the judgement, the readers, one compile."""

import importlib.util
import json
import os
import struct

import jax
import jax.numpy as jnp
import programs
import pytest
from jax._src.cudnn import fused_attention_stablehlo as cudnn

from avd_jax.aot import compile_check, cubin, topologies
from avd_jax.aot.compile_check import Check, Result
from avd_jax.aot.cubin import Kernel
from avd_jax.errors import UserError

MIB = 2**20
ONE_OF = {"gpu": "h100", "tpu": "v5e"}
PROGRAMS = [
  pytest.param(ONE_OF[platform], check, id=f"{ONE_OF[platform]} {check.what}")
  for check in compile_check.CHECKS
  for platform in check.platforms
]


def elf(kernels):
  """A cubin, as far as it is read: no code, but what is noted about it."""
  names = [kernel.name for kernel in kernels]
  strings, at = b"\0", []
  for name in names:
    at.append(len(strings))
    strings += name.encode() + b"\0"
  symbols = b"\0" * 24
  symbols += b"".join(struct.pack("<IBBHQQ", a, 0, 0, 0, 0, 0) for a in at)
  info = struct.pack("<BBH", 0x03, 0x1B, 0xFF)  # a note of another form
  for i, kernel in enumerate(kernels, 1):
    info += struct.pack("<BBHII", 4, 0x2F, 8, i, kernel.registers)
    info += struct.pack("<BBHII", 4, 0x11, 8, i, kernel.stack)
  sections = [
    (".strtab", strings, len(strings)),
    (".symtab", symbols, len(symbols)),
    (".nv.info", info, len(info)),
    *((f".nv.info.{name}", b"", 0) for name in names),
    *((f".nv.shared.{k.name}", b"", k.shared) for k in kernels),
  ]
  titles = b"\0.shstrtab\0"
  body, rows = b"", [bytes(64)]
  for title, content, size in sections:
    start = len(titles)
    titles += title.encode() + b"\0"
    rows.append(
      struct.pack("<IIQQQQIIQQ", start, 1, 0, 0, 64 + len(body), size, *[0] * 4)
    )
    body += content
  rows.append(
    struct.pack(
      "<IIQQQQIIQQ", 1, 3, 0, 0, 64 + len(body), len(titles), *[0] * 4
    )
  )
  body += titles
  head = b"\x7fELF\x02\x01\x01".ljust(0x28, b"\0")
  head += struct.pack("<Q", 64 + len(body))
  head = head.ljust(0x3A, b"\0") + struct.pack(
    "<3H", 64, len(rows), len(rows) - 1
  )
  return head + body + b"".join(rows)


def varint(value):
  groups = []
  while True:
    groups.append(value & 0x7F)
    value >>= 7
    if not value:
      return bytes([g | 0x80 for g in groups[:-1]] + groups[-1:])


def message(*fields):
  """A protobuf message of integers and bytes."""
  out = b""
  for number, value in fields:
    if isinstance(value, int):
      out += varint(number << 3) + varint(value)
    else:
      out += varint(number << 3 | 2) + varint(len(value)) + value
  return out


SPILLING = Kernel("routed_dkv", 255, 688, 1024)
CLEAN = Kernel("ranges_dq", 195, 0, 0)


def test_registers_stack_and_shared_memory_are_read_from_a_binary():
  assert cubin.inspect(elf([SPILLING, CLEAN])) == [SPILLING, CLEAN]


def test_dynamic_shared_memory_is_added_and_other_fields_are_passed_over():
  entry = lambda kernel, *more: (
    1,
    message(
      (1, kernel.name.encode()),
      (2, message((1, b"print" * 50), *more, (5, elf([kernel])))),
    ),
  )
  data = message(entry(SPILLING, (2, b"\x08\x01"), (4, 131072)), entry(CLEAN))
  data += message((3, 7))
  assert cubin.read(data) == [CLEAN, SPILLING._replace(shared=132096)]


@pytest.mark.parametrize("data", [b"", b"MZ\x90", b"\x7fELF\x01" + bytes(64)])
def test_what_is_no_binary_is_refused(data):
  with pytest.raises(ValueError, match="ELF"):
    cubin.inspect(data)


@pytest.mark.parametrize(
  ("temp", "kernels", "wrong"),
  [
    (100, [CLEAN], None),
    (110, [CLEAN], None),
    (111, [CLEAN], "needs 111 MiB of temporary memory, more than 110 MiB"),
    (1, [CLEAN, SPILLING], "kernel routed_dkv spills: 688 bytes a thread"),
  ],
)
def test_spills_and_memory_beyond_the_bound_fail(
  monkeypatch, temp, kernels, wrong
):
  monkeypatch.setitem(compile_check.BOUNDS, "layer", {"h100": 100})
  bound = compile_check.bound("h100", "layer")
  result = Result("h100", "layer", 1.0, temp * MIB, bound, kernels)
  failures = compile_check.judge(result)
  assert len(failures) == (wrong is not None)
  assert wrong is None or wrong in failures[0]


def test_a_program_without_a_bound_fails_and_says_what_it_needs():
  assert compile_check.bound("h100", "nothing") is None
  (failure,) = compile_check.judge(Result("h100", "nothing", 1.0, 5 * MIB))
  assert "no bound on record" in failure
  assert "5 MiB" in failure


def test_every_program_has_bounds_and_every_bound_a_program():
  wanted = {
    (check.what, name)
    for check in compile_check.CHECKS
    for name, target in topologies.TARGETS.items()
    if target.platform in check.platforms
  }
  recorded = {
    (what, name)
    for what, bounds in compile_check.BOUNDS.items()
    for name in bounds
  }
  assert recorded == wanted


@pytest.mark.parametrize(
  ("target", "package", "extra"),
  [
    ("h100", "jax's CUDA plugin", "avd_jax[compile-check-gpu]"),
    ("v5p", "libtpu", "avd_jax[compile-check-tpu]"),
  ],
)
def test_a_missing_compiler_is_named_with_its_extra(
  monkeypatch, target, package, extra
):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(UserError) as error:
    compile_check.select([target])
  assert f"target {target}: {package} is not installed" in str(error.value)
  assert extra in str(error.value)


def test_a_missing_compiler_harms_no_other_target(monkeypatch):
  only_tpu = lambda name: name if name == "libtpu" else None
  monkeypatch.setattr(importlib.util, "find_spec", only_tpu)
  chosen = compile_check.select(["v5e", "v6e"])
  assert {target for target, _ in chosen} == {"v5e", "v6e"}
  with pytest.raises(UserError, match="compile-check-gpu"):
    compile_check.select(compile_check.DEFAULT)


def test_unknown_targets_and_empty_selections_say_what_there_is(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  with pytest.raises(UserError, match="'v9' is not one of h100, h200, v5e"):
    compile_check.select(["v9"])
  with pytest.raises(UserError, match=r"has 'warp' in its name.*layer, 7"):
    compile_check.select(["h100"], "warp")


def test_only_narrows_by_name(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
  chosen = compile_check.select(["h100", "v5e"], "decoding")
  assert chosen
  assert all("decoding" in check.what for _, check in chosen)


def test_the_report_goes_on_after_a_failure_and_keeps_the_figures(
  monkeypatch, tmp_path, capsys
):
  def run(target, check):
    if check.what == "bad":
      raise ValueError("no registers\nleft")
    return Result(target, check.what, 2.5, 7 * MIB, 8 * MIB, [CLEAN])

  monkeypatch.setattr(compile_check, "run", run)
  monkeypatch.setattr(compile_check, "apart", lambda call, *args: call(*args))
  checks = [
    ("h100", Check(what, ("gpu",), lambda: None)) for what in ("bad", "good")
  ]
  file = tmp_path / "check.json"
  assert not compile_check.report(checks, str(file))
  shown = capsys.readouterr().out.splitlines()
  assert shown[0] == compile_check.HEADER
  assert "FAILED: ValueError: no registers" in shown[2]
  assert shown[3].split() == ["h100", "good", "2.5", "7", "8"]
  assert "ranges_dq" in shown[4]
  assert "195 registers, 0 B spilled, 0 KiB shared" in shown[4]
  assert shown[5] == "1 good, 1 failed"
  assert max(map(len, shown)) <= 80

  written = json.loads(file.read_text())
  assert written["versions"]["jax"] == jax.__version__
  assert [row["what"] for row in written["results"]] == ["bad", "good"]
  assert written["results"][1]["kernels"] == [CLEAN._asdict()]
  assert compile_check.report(checks[1:])


def test_a_compiler_that_dies_takes_nothing_with_it():
  assert compile_check.apart(os.getpid) != os.getpid()
  with pytest.raises(ValueError, match="invalid literal"):
    compile_check.apart(int, "many")
  with pytest.raises(RuntimeError, match="the compiler died"):
    compile_check.apart(os.abort)


def test_lowering_for_a_gpu_asks_no_driver_and_puts_all_back():
  before = cudnn.check_compute_capability
  shape = jax.ShapeDtypeStruct((1, 128, 2, 64), jnp.bfloat16)
  call = lambda q: jax.nn.dot_product_attention(q, q, q, implementation="cudnn")
  traced = lambda: jax.jit(call).trace(shape)
  with topologies.lowering("h100"):
    text = traced().lower(lowering_platforms=("cuda",)).as_text()
  assert "__cudnn$fmhaSoftmax" in text
  assert cudnn.check_compute_capability is before
  jax.clear_caches()
  with pytest.raises(RuntimeError):
    traced()


@pytest.mark.parametrize("name", topologies.TARGETS)
def test_lowering_shows_kernels_the_target(name):
  target = topologies.find(name)
  with topologies.lowering(name):
    device = jax.sharding.get_abstract_mesh().abstract_device
  assert device.device_kind == target.kind
  assert device.platform == {"gpu": "cuda", "tpu": "tpu"}[target.platform]
  assert jax.sharding.get_abstract_mesh().empty


@pytest.mark.parametrize(("target", "check"), PROGRAMS)
def test_every_program_lowers_at_full_size_with_its_kernels(target, check):
  text = compile_check.lower(target, check).as_text()
  written = compile_check.kernel_names(text)
  own = "triton" in check.what or "routed" in check.what
  assert bool(written) == (target == "h100" and own)
  assert ("tpu_custom_call" in text) == (target == "v5e")


def compiled(target, only, tmp_path):
  """The one row of figures that the program writes."""
  file = tmp_path / "check.json"
  done = programs.run(
    *programs.AVD, "compile-check", "--target", target, "--only", only,
    "--json", str(file),
  )  # fmt: skip
  assert done.returncode == 0, done.stdout + done.stderr
  (row,) = json.loads(file.read_text())["results"]
  return row


needs = lambda platform: pytest.mark.skipif(
  not topologies.installed(platform),
  reason=f"no compiler: pip install 'avd_jax[compile-check-{platform}]'",
)


@needs("tpu")
def test_a_kernel_compiles_for_a_tpu_that_is_not_there(tmp_path):
  row = compiled("v5e", "splash", tmp_path)
  assert 0 < row["temp"] <= row["bound"]


@needs("gpu")
def test_kernels_compile_for_a_gpu_that_is_not_there(tmp_path):
  row = compiled("h100", "triton, 7", tmp_path)
  kernels = [Kernel(**kernel) for kernel in row["kernels"]]
  assert len(kernels) == 3
  assert all(16 < kernel.registers < 256 for kernel in kernels)
  # Tiles of queries and keys, which the binary alone does not show.
  assert all(kernel.shared > 2**16 for kernel in kernels)


@pytest.mark.parametrize("name", ["v9", "h100", "v5e"])
def test_the_program_says_what_is_missing_in_one_line(name):
  target = topologies.TARGETS.get(name)
  if target and topologies.installed(target.platform):
    pytest.skip(f"the compiler for {name} is here")
  done = programs.run(*programs.AVD, "compile-check", "--target", name)
  assert done.returncode == 2
  assert done.stderr.startswith(f"error: target {name!r} is not one of") or (
    target and f"avd_jax[{target.extra}]" in done.stderr
  )
  assert done.stderr.count("\n") == 1
