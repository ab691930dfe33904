"""Launchers for clusters, without one: what they would run and apply."""

import configparser
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import programs
import pytest
import yaml
from launchers import COMMAND, GPU, LAUNCH, TPU, dry_run, run

SCRIPTS = ("local.sh", "slurm.sbatch", "gke.sh", "xpk.sh", "tpu_vm.sh")
# Beside this Python, whether or not its environment is active.
SHELLCHECK = shutil.which(
  "shellcheck", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}"
)
PLACE = {"PROJECT": "p", "ZONE": "z", "CLUSTER": "c", "IMAGE": "i"}
XPK = ("--name", "run-1", "--type", "v6e-16")
KUBERNETES = {"IMAGE": "i", "CLAIM": "c"}


@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_are_clean(script):
  done = subprocess.run(
    [SHELLCHECK, LAUNCH / script], capture_output=True, text=True
  )
  assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_parse_and_can_be_run(script):
  subprocess.run(["bash", "-n", LAUNCH / script], check=True)
  assert os.access(LAUNCH / script, os.X_OK) == (script != "slurm.sbatch")


def test_every_script_is_checked():
  there = {p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch")}
  assert there == set(SCRIPTS)


@pytest.mark.parametrize(
  ("script", "arguments", "variables", "message"),
  [
    ("local.sh", ["2", "--"], {}, "usage:"),
    ("slurm.sbatch", [], {}, "error: no command"),
    ("slurm.sbatch", ["--restarts", "--", "avd"], {}, "--restarts needs a"),
    ("slurm.sbatch", ["--node", "2"], {}, "unknown option --node"),
    ("slurm.sbatch", ["--", "avd"], {}, "submit it with sbatch"),
    ("gke.sh", ["cpu"], {}, "say tpu or gpu first"),
    ("gke.sh", ["tpu"], {}, "--name is missing"),
    ("gke.sh", ["tpu", "--name", "A_b"], {}, "--name A_b: lower case"),
    ("gke.sh", TPU, {}, "--image (or the variable IMAGE) is missing"),
    ("gke.sh", TPU, {"IMAGE": "i"}, "--claim (or the variable CLAIM) is"),
    ("gke.sh", GPU[:-2], KUBERNETES, "--hosts is missing"),
    ("gke.sh", TPU[:-2], KUBERNETES, "--topology is missing"),
    (
      "gke.sh", [*TPU, "--chips", "3"], {"IMAGE": "i", "CLAIM": "c"},
      "4x4 is not made of machines of --chips 3",
    ),
    ("gke.sh", GPU, KUBERNETES, "no command"),
    ("gke.sh", [*GPU, "--topology", "4"], {}, "--topology for gpu"),
    ("xpk.sh", XPK, {}, "--project (or the variable PROJECT) is missing"),
    ("xpk.sh", XPK, {"PROJECT": "p"}, "--zone (or the variable ZONE) is"),
    ("xpk.sh", XPK[2:], PLACE, "--name is missing"),
    ("xpk.sh", XPK, PLACE, "no command"),
    ("tpu_vm.sh", ["begin"], {}, "say create, run, attach, stop or delete"),
    ("tpu_vm.sh", ["attach"], {}, "--name is missing"),
    ("tpu_vm.sh", ["create", "--name", "r"], PLACE, "--type is missing"),
    ("tpu_vm.sh", ["run", "--name", "r"], PLACE, "variable BUCKET) is missing"),
    ("tpu_vm.sh", ["stop", "--name", "r", "avd"], PLACE, "takes no command"),
  ],
)  # fmt: skip
def test_what_is_missing_is_named(script, arguments, variables, message):
  done = run(script, *arguments, **variables)
  assert done.returncode == 2
  assert message in done.stderr
  assert "usage: " in done.stderr
  assert not done.stdout


COUNT, MAYBE = ": give 1, 2, ...", ": give 0, 1, 2, ..."
NUMBERS = [
  ("local.sh", ["2", "true"], "--restarts", MAYBE),
  ("slurm.sbatch", [], "--restarts", MAYBE),
  ("xpk.sh", XPK, "--restarts", MAYBE),
  ("xpk.sh", XPK, "--slices", COUNT),
  ("gke.sh", TPU, "--restarts", MAYBE),
  ("gke.sh", TPU, "--slices", COUNT),
  ("gke.sh", TPU, "--chips", COUNT),
  ("gke.sh", GPU, "--chips", COUNT),
  ("gke.sh", GPU, "--hosts", COUNT),
]


@pytest.mark.parametrize("value", ["08", "x", "-1", "1.5", "0", "9" * 20])
@pytest.mark.parametrize(("script", "first", "option", "message"), NUMBERS)
def test_numbers_are_numbers(script, first, option, message, value):
  """Bash takes 08 for a bad octal number, in a condition for just false."""
  # Of local.sh, options stand first; of gke.sh, the kind.
  given = [option, value, "--dry-run", *first]
  if script == "gke.sh":
    given = [*first, option, value, "--dry-run"]
  done = run(script, *given, "--", "true", **PLACE, CLAIM="c")
  if value == "0" and message == MAYBE:
    assert done.returncode == 0, done.stderr
    return
  assert done.returncode == 2
  assert done.stderr.splitlines()[0] == f"error: {option} {value}{message}"
  assert not done.stdout


@pytest.mark.parametrize(
  ("option", "value"),
  [
    ("--topology", "0x4"), ("--topology", "08x08"), ("--topology", "4"),
    ("--name", "a" * 41), ("--name", "a-"), ("--name", "1a"),
    ("--image", "i\x1bj"),
  ],
)  # fmt: skip
def test_what_kubernetes_would_refuse_is_refused(option, value):
  done = run("gke.sh", *TPU, option, value, "--", "avd", **KUBERNETES)
  assert done.returncode == 2
  assert done.stderr.startswith("error: ")
  assert not done.stdout


def test_local_says_who_would_be_who():
  done = run("local.sh", "--dry-run", "2", "--", sys.executable, "a b")
  first, second = done.stdout.splitlines()
  assert shlex.split(first) == [
    "AVD_COORDINATOR=127.0.0.1:PORT", "AVD_NUM_PROCESSES=2",
    "AVD_PROCESS_ID=0", sys.executable, "a b",
  ]  # fmt: skip
  assert shlex.split(second)[2] == "AVD_PROCESS_ID=1"


SRUN = ["srun", "--kill-on-bad-exit=1", "--cpu-bind=none", "--label"]


def test_slurm_runs_a_step_in_a_container_or_not():
  assert shlex.split(dry_run("slurm.sbatch")) == SRUN + COMMAND
  apptainer = dry_run("slurm.sbatch", "--container", "a.sif")
  assert shlex.split(apptainer) == [
    *SRUN, "apptainer", "exec", "--nv", "a.sif", *COMMAND,
  ]  # fmt: skip
  pyxis = shlex.split(dry_run("slurm.sbatch", "--container", "registry#img:1"))
  assert pyxis[4] == "--container-image=registry#img:1"
  assert pyxis[-len(COMMAND) :] == COMMAND


def test_slurm_is_asked_for_a_warning_and_a_second_chance():
  text = (LAUNCH / "slurm.sbatch").read_text()
  asked = re.findall(r"^#SBATCH (.+)$", text, re.MULTILINE)
  assert {"--requeue", "--signal=B:USR1@300", "--ntasks-per-node=1"} <= {*asked}
  # Options end where commands begin.
  assert text.rindex("#SBATCH") < text.index("set -euo pipefail")


# What the tasks do, told by the number of this attempt; then what the job does.
@pytest.mark.parametrize(
  ("task", "restarted", "code", "queued"),
  [
    ("exit 0", 0, 0, False),
    ("exit 2", 0, 2, False),
    ("exit 137", 0, 137, True),
    ("exit 137", 3, 137, False),
    # The time limit nears: tasks are told, save, and the job is queued again.
    ('kill -USR1 $PPID; until [ -e "$TOLD" ]; do sleep .1; done; exit 130', 9,
     130, True),
    # scancel, which tells the tasks itself.
    ("kill -TERM $PPID; sleep .3; exit 130", 0, 130, False),
  ],
)  # fmt: skip
def test_slurm_queues_what_can_go_on(tmp_path, task, restarted, code, queued):
  fakes = {
    "srun": task,
    "scancel": 'echo "$*" > "$TOLD"',
    "scontrol": 'echo "$*" > "$QUEUED"',
    "sleep": "[ $1 = 60 ] || exec /bin/sleep $1",  # no wait for the end
  }
  for name, body in fakes.items():
    (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
    (tmp_path / name).chmod(0o755)
  done = subprocess.run(
    ["bash", str(LAUNCH / "slurm.sbatch"), "--", "avd"],
    env={
      "PATH": f"{tmp_path}:{os.environ['PATH']}",
      "SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restarted),
      "TOLD": str(tmp_path / "told"), "QUEUED": str(tmp_path / "queued"),
    },
    capture_output=True, text=True, timeout=30,
  )  # fmt: skip
  assert done.returncode == code, done.stderr
  assert (tmp_path / "queued").exists() == queued
  if queued:
    assert (tmp_path / "queued").read_text() == "requeue 7\n"
    assert "queued again" in done.stderr
  if "USR1" in task:
    assert (tmp_path / "told").read_text() == "--signal=TERM 7\n"


@pytest.mark.skipif(
  not shutil.which("sbatch"), reason="no SLURM here: sbatch is not on PATH"
)
def test_a_real_slurm_takes_it():
  done = programs.run(
    "sbatch", "--test-only", "--nodes=1", str(LAUNCH / "slurm.sbatch"), "--",
    "true",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  assert re.search(r"Job \d+ to start at", done.stderr)


def test_xpk_is_given_the_run():
  given = shlex.split(dry_run("xpk.sh", *XPK, "--slices", "2", **PLACE))
  assert given[:3] == ["xpk", "workload", "create"]
  options = dict(word.split("=", 1) for word in given[3:] if "env=" not in word)
  assert shlex.split(options.pop("--command")) == ["exec", *COMMAND]
  assert options == {
    "--workload": "run-1", "--project": "p", "--zone": "z", "--cluster": "c",
    "--docker-image": "i", "--tpu-type": "v6e-16", "--num-slices": "2",
    "--max-restarts": "20", "--restart-on-exit-codes": "1",
    "--termination-grace-period-seconds": "120",
  }  # fmt: skip
  assert "--env=AVD_COORDINATOR=auto" in given
  # A flag is stronger than a variable.
  other = dry_run("xpk.sh", *XPK, "--project", "other", **PLACE)
  assert "--project=other" in shlex.split(other)


NAMED = ("--name", "run-1", "--project", "p", "--zone", "z")
QUEUED = "gcloud compute tpus queued-resources"
SSH = "gcloud compute tpus tpu-vm ssh run-1 --project=p --zone=z"


@pytest.mark.parametrize(
  ("arguments", "line"),
  [
    (
      ["create", "--type", "t", "--version", "v", "--spot"],
      f"{QUEUED} create run-1 --node-id=run-1 --project=p --zone=z"
      " --accelerator-type=t --runtime-version=v --spot",
    ),
    (
      ["create", "--type", "t", "--version", "v"],
      f"{QUEUED} create run-1 --node-id=run-1 --project=p --zone=z"
      " --accelerator-type=t --runtime-version=v",
    ),
    (["stop"], f"{SSH} --worker=all --command='sudo docker stop --time 120"),
    (
      ["delete"],
      f"{QUEUED} delete run-1 --project=p --zone=z --force --quiet",
    ),
    (["attach"], f"{SSH} --worker=0 --command='sudo docker logs --follow"),
  ],
)
def test_a_tpu_slice_comes_and_goes(arguments, line):
  out = dry_run("tpu_vm.sh", *arguments, *NAMED, command=None)
  assert out.startswith(line)
  assert out.count("gcloud") == 1


# gcloud, as far as `run` needs it; a host is this machine, its programs print.
GCLOUD = """
echo "$*" | head -n 1 >> "$CALLS"
case $* in
  *describe*) echo "$STATE" ;;
  *--command=*) while [[ $1 != --command=* ]]; do shift; done
    mountpoint() { return 1; }
    curl() { :; }
    sudo() { if [[ $1 == docker ]]; then printf '%s\n' "$@" >> "$CALLS"; fi; }
    lsb_release() { echo jammy; }
    export -f mountpoint curl sudo lsb_release
    bash -c "${1#--command=}" ;;
esac
"""


@pytest.mark.parametrize("state", ["ACTIVE", "SUSPENDED"])
def test_a_tpu_slice_runs_the_command_on_all_hosts(tmp_path, state):
  (tmp_path / "gcloud").write_text("#!/usr/bin/env bash" + GCLOUD)
  (tmp_path / "gcloud").chmod(0o755)
  calls = tmp_path / "calls"
  done = run(
    "tpu_vm.sh", "run", *NAMED, "--image", "host/img", "--bucket", "gs://b",
    "--", *COMMAND, PATH=f"{tmp_path}:{os.environ['PATH']}", STATE=state,
    CALLS=str(calls),
  )  # fmt: skip
  called = calls.read_text()
  if state == "SUSPENDED":
    assert done.returncode == 1
    assert "run-1 is SUSPENDED" in done.stderr
    assert "--worker" not in called
    return
  assert done.returncode == 0, done.stderr
  assert called.count("--worker=all") == 2
  assert called.index("--worker=0") > called.rindex("--worker=all")
  # The command comes through both shells as it was.
  start = called[called.index("\nrun\n--detach") :]
  assert "--env\nAVD_COORDINATOR=auto\n" in start
  assert (
    "--entrypoint\n" + "\n".join(["avd", "host/img", *COMMAND[1:]]) in start
  )


@pytest.mark.parametrize("job", ["run", "attach", "stop"])
def test_a_dry_run_of_a_tpu_slice_can_be_pasted(tmp_path, job):
  (tmp_path / "gcloud").write_text(
    "#!/usr/bin/env bash\n"
    """printf '%s\\0' "$@" end >> "$CALLS"; echo ACTIVE\n"""
  )
  (tmp_path / "gcloud").chmod(0o755)
  given = [job, *NAMED[2:], "--name", "a b'c"]
  if job == "run":
    words = ["bash", "-c", "echo 'a'\n\techo \"b\" \\ $x"]
    given += ["--image", "host/img", "--bucket", "b", "--", *words]
  printed = run("tpu_vm.sh", job, "--dry-run", *given[1:])
  assert printed.returncode == 0, printed.stderr
  calls = []
  for script in ([LAUNCH / "tpu_vm.sh", *given], ["-c", printed.stdout]):
    told = tmp_path / f"calls_{len(calls)}"
    subprocess.run(
      ["bash", *script], check=True, stdout=subprocess.DEVNULL,
      env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "CALLS": str(told)},
    )  # fmt: skip
    calls.append(told.read_text())
  assert calls[0].count("--command=") == {"run": 3}.get(job, 1)
  assert calls[0] == calls[1]


def test_the_mount_names_the_bucket():
  out = dry_run("tpu_vm.sh", "run", *NAMED, "--bucket", "gs://b", IMAGE="h/i")
  assert "sudo gcsfuse --implicit-dirs -o allow_other b /runs" in out


def test_sky_restarts_on_spot_and_hands_over_who_is_who():
  task = yaml.safe_load((LAUNCH / "sky.yaml").read_text())
  # Without a value sky asks for one.
  assert task["envs"] == {"COMMAND": None, "RUNS": None}
  resources = task["resources"]
  assert resources["use_spot"] is True
  assert resources["job_recovery"]["max_restarts_on_errors"] > 0
  assert task["file_mounts"]["/runs"]["source"] == "${RUNS}"
  assert ".[cuda13]" in task["setup"]
  done = subprocess.run(
    ["bash", "-euc", task["run"].replace(". ~/avd/bin/activate", "")],
    env={
      "PATH": os.environ["PATH"], "SKYPILOT_NODE_IPS": "1.2.3.4\n1.2.3.5",
      "SKYPILOT_NUM_NODES": "2", "SKYPILOT_NODE_RANK": "1",
      "COMMAND": "bash -c 'echo $AVD_COORDINATOR $AVD_NUM_PROCESSES"
      " $AVD_PROCESS_ID'",
    },
    capture_output=True, text=True,
  )  # fmt: skip
  assert done.stdout == "1.2.3.4:8476 2 1\n", done.stderr


@pytest.mark.parametrize(
  ("name", "user", "extra"),
  [("Dockerfile.tpu", "root", "tpu"), ("Dockerfile.gpu", "avd", "cuda13")],
)
def test_images_are_pinned_and_install_what_exists(name, user, extra):
  text = (LAUNCH / name).read_text()
  lines = [
    line.split(" ", 1) for line in text.splitlines() if line[:1].isupper()
  ]
  said = {word: value for word, value in lines}
  assert re.fullmatch(r"python:3\.\d+\.\d+-slim-\w+", said["FROM"])
  assert said["USER"] == user
  assert said["ENTRYPOINT"] == '["avd"]'
  assert f"'.[{extra}]'" in text
  setup = configparser.ConfigParser()
  setup.read(programs.ROOT / "setup.cfg")
  needs = setup["options.extras_require"][extra].split()
  assert needs == [f"jax[{extra}]"]
  for word, value in lines:
    if word == "COPY":
      *sources, _ = value.split()
      assert all((programs.ROOT / source).exists() for source in sources)
