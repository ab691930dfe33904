"""JobSets, as launch/gke.sh fills them in."""

import copy
import re

import pytest
import yaml
from launchers import COMMAND, GPU, TPU, dry_run

KINDS = pytest.mark.parametrize("kind", [TPU, GPU], ids=["tpu", "gpu"])


def jobset(*arguments, command=COMMAND):
  """The filled-in JobSet, its only job, that job's pod and container."""
  filled = yaml.safe_load(
    dry_run(
      "gke.sh", *arguments, command=command, IMAGE="host/img:1", CLAIM="runs"
    )
  )
  (replicated,) = filled["spec"]["replicatedJobs"]
  job = replicated["template"]["spec"]
  pod = job["template"]["spec"]
  (container,) = pod["containers"]
  return filled, replicated, job, pod, container


def run_by_kubernetes(words):
  """A container's command, with the pod's variables in it."""
  variable = re.compile(r"\$(\$|\((\w+)\))")
  return [
    variable.sub(lambda found: "$" if found[1] == "$" else "VALUE", word)
    for word in words
  ]


@KINDS
def test_a_jobset_restarts_all_but_mistakes(kind):
  filled, _, job, pod, container = jobset(*kind, "--restarts", "5")
  assert filled["apiVersion"] == "jobset.x-k8s.io/v1alpha2"
  assert filled["kind"] == "JobSet"
  assert filled["metadata"]["name"] == "run-1"
  policy = filled["spec"]["failurePolicy"]
  assert policy["maxRestarts"] == 5
  (rule,) = policy["rules"]
  assert rule["action"] == "FailJobSet"
  assert rule["onJobFailureReasons"] == ["PodFailurePolicy"]
  (fatal,) = job["podFailurePolicy"]["rules"]
  assert fatal["action"] == "FailJob"
  assert fatal["onExitCodes"] == {
    "containerName": container["name"], "operator": "In", "values": [2],
  }  # fmt: skip
  # Both are conditions of a podFailurePolicy, and of restarting as a whole.
  assert pod["restartPolicy"] == "Never"
  assert job["backoffLimit"] == 0


@KINDS
def test_a_pod_runs_the_command_beside_the_volume(kind):
  _, _, _, pod, container = jobset(*kind)
  assert run_by_kubernetes(container["command"]) == COMMAND
  assert container["image"] == "host/img:1"
  volumes = {v["name"]: v for v in pod["volumes"]}
  mounts = {m["mountPath"]: m["name"] for m in container["volumeMounts"]}
  claim = volumes[mounts["/runs"]]["persistentVolumeClaim"]
  assert claim == {"claimName": "runs"}
  assert volumes[mounts["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}


@KINDS
def test_a_command_comes_through_as_it_was(kind):
  words = [
    "bash", "-c", 'echo "a"\n\techo \'b\' \\n \\\\ $$ $(id) ${NAME} &\r\n', "",
    "null", "- é: {x} #",
  ]  # fmt: skip
  container = jobset(*kind, command=words)[-1]
  assert run_by_kubernetes(container["command"]) == words


@KINDS
@pytest.mark.parametrize("word", ["on", "true", "null", "a" * 40])
def test_words_that_yaml_knows_stay_strings(kind, word):
  given = (*kind, "--name", word, "--image", "1.5", "--claim", word)
  filled, _, _, pod, container = jobset(*given, "--accelerator", "0x1: #")
  assert filled["metadata"]["name"] == word
  assert container["image"] == "1.5"
  assert pod["volumes"][0]["persistentVolumeClaim"] == {"claimName": word}
  assert "0x1: #" in pod["nodeSelector"].values()


def refusal(filled):
  """What the schema has against a JobSet; None if nothing."""
  models = pytest.importorskip("kubeflow_trainer_api.models")
  try:
    # Fields that it does not know, it drops.
    known = models.JobsetV1alpha2JobSet.from_dict(copy.deepcopy(filled))
    return None if known.to_dict() == filled else "unknown or empty fields"
  except ValueError as error:
    return str(error)


@KINDS
def test_the_schema_takes_it(kind):
  """JobSet's own schema, and Kubernetes' of the pods in it.

  It knows fields and their types. It does not know which words a field takes
  (those above are compared), what depends on what, the rules of the webhooks
  by which a cluster's JobSet and GKE refuse more, or older versions of both.
  """
  filled, _, job, pod, container = jobset(*kind)
  assert refusal(filled) is None
  for part, name, value in (
    (filled["metadata"], "name", True),
    (filled["spec"], "suspended", True),
    (filled["spec"]["failurePolicy"], "maxRestarts", "20"),
    (job, "parallelism", 1.5),
    (job, "parallel", 2),
    (pod, "restartPolicy", None),
    (pod, "nodeSelector", {"a": 4}),
    (pod, "terminationGracePeriod", 120),
    (container, "command", "avd train"),
    (container["env"][0], "value", 1),
    (container["volumeMounts"][0], "path", "/runs"),
    (pod["volumes"][0]["persistentVolumeClaim"], "claim", "runs"),
  ):
    before = dict(part)
    part[name] = value
    assert refusal(filled), (name, value)
    part.clear()
    part.update(before)
  assert refusal(filled) is None


def test_tpu_pods_stand_on_their_slices():
  _, replicated, job, pod, container = jobset(*TPU, "--slices", "2")
  assert replicated["replicas"] == 2
  assert job["parallelism"] == job["completions"] == 4
  assert pod["nodeSelector"] == {
    "cloud.google.com/gke-tpu-accelerator": "tpu-v6e-slice",
    "cloud.google.com/gke-tpu-topology": "4x4",
  }
  assert container["resources"]["limits"] == {"google.com/tpu": 4}
  assert {"name": "AVD_COORDINATOR", "value": "auto"} in container["env"]


def test_gpu_pods_find_the_first_through_the_service():
  filled, replicated, job, pod, container = jobset(*GPU, "--chips", "4")
  assert job["parallelism"] == job["completions"] == 2
  assert job["completionMode"] == "Indexed"
  assert container["resources"]["limits"] == {"nvidia.com/gpu": 4}
  selected = pod["nodeSelector"]["cloud.google.com/gke-accelerator"]
  assert selected == "nvidia-h100-80gb"
  network = filled["spec"]["network"]
  assert network["enableDNSHostnames"]
  told = {variable["name"]: variable for variable in container["env"]}
  # JobSet's name of pod 0 of job 0, in its headless service.
  first = f"run-1-{replicated['name']}-0-0.{network['subdomain']}"
  assert told["AVD_COORDINATOR"]["value"] == f"{first}:8476"
  assert told["AVD_NUM_PROCESSES"]["value"] == "2"
  field = told["AVD_PROCESS_ID"]["valueFrom"]["fieldRef"]["fieldPath"]
  assert field.endswith("['batch.kubernetes.io/job-completion-index']")
