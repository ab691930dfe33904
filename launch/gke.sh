#!/usr/bin/env bash
# Starts one training run on a GKE cluster, from gke/jobset-{tpu,gpu}.yaml.
#
#   launch/gke.sh tpu --name RUN --image IMAGE --claim CLAIM \
#     --accelerator tpu-v6e-slice --topology 4x4 [--chips 4] [--slices 1] \
#     [--restarts 20] [--dry-run] -- COMMAND [ARGUMENT ...]
#   launch/gke.sh gpu --name RUN --image IMAGE --claim CLAIM \
#     --accelerator nvidia-h100-80gb --hosts 2 [--chips 8] ...
#
#   --name         of the run: lower case, digits and dashes, at most 40
#   --image        built from Dockerfile.tpu or .gpu (or the variable IMAGE)
#   --claim        a PersistentVolumeClaim that many pods may write to, mounted
#                  at /runs: give --workdir /runs/... (or the variable CLAIM)
#   --accelerator  the node pool's label gke-tpu-accelerator or gke-accelerator
#   --chips        TPU chips or GPUs a machine
#   --dry-run      prints the JobSet, and changes nothing
#
# kubectl's current context is where it runs. Spot or not is the node pool's.
# Follow: kubectl logs -f -l jobset.sigs.k8s.io/jobset-name=RUN --prefix
# Stop:   kubectl delete jobset RUN   (each process saves first)
set -euo pipefail

fail() {
  echo "error: $*" >&2
  echo "usage: launch/gke.sh tpu|gpu [--OPTION VALUE ...] [--dry-run]" \
    "-- COMMAND [ARGUMENT ...]; options: head of this file" >&2
  exit 2
}

kind=${1-}
[[ $kind == tpu || $kind == gpu ]] || fail "say tpu or gpu first"
shift

NAME='' ACCELERATOR='' TOPOLOGY='' HOSTS='' SLICES=1 RESTARTS=20 dry=
IMAGE=${IMAGE-} CLAIM=${CLAIM-}
if [[ $kind == tpu ]]; then CHIPS=4; else CHIPS=8; fi
while [[ ${1-} == --?* ]]; do
  if [[ $1 == --dry-run ]]; then
    dry=1 && shift
    continue
  fi
  [[ -n ${2-} && $2 != --* ]] || fail "$1 needs a value"
  case $kind$1 in
    *--name) NAME=$2 ;;
    *--image) IMAGE=$2 ;;
    *--claim) CLAIM=$2 ;;
    *--accelerator) ACCELERATOR=$2 ;;
    *--chips) CHIPS=$2 ;;
    *--restarts) RESTARTS=$2 ;;
    tpu--topology) TOPOLOGY=$2 ;;
    tpu--slices) SLICES=$2 ;;
    gpu--hosts) HOSTS=$2 ;;
    *) fail "unknown option $1 for $kind" ;;
  esac
  shift 2
done
if [[ ${1-} == -- ]]; then shift; fi

[[ -n $NAME ]] || fail "--name is missing"
# What JobSet appends for a pod's name makes it longer, and 63 is the end.
[[ $NAME =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] \
  || fail "--name $NAME: lower case, digits and dashes, at most 40, a letter" \
    "first and no dash last"
[[ -n $IMAGE ]] || fail "--image (or the variable IMAGE) is missing"
[[ -n $CLAIM ]] || fail "--claim (or the variable CLAIM) is missing"
[[ -n $ACCELERATOR ]] || fail "--accelerator is missing"
if [[ $kind == tpu ]]; then
  [[ $TOPOLOGY =~ ^[1-9][0-9]{0,3}(x[1-9][0-9]{0,3}){1,2}$ ]] \
    || fail "--topology is missing, or not as 4x4 or 2x2x4"
else
  [[ -n $HOSTS ]] || fail "--hosts is missing"
fi
for option in "chips $CHIPS" "slices $SLICES" "hosts ${HOSTS:-1}"; do
  [[ ${option#* } =~ ^[1-9][0-9]{0,8}$ ]] || fail "--$option: give 1, 2, ..."
done
[[ $RESTARTS =~ ^(0|[1-9][0-9]{0,8})$ ]] \
  || fail "--restarts $RESTARTS: give 0, 1, 2, ..."
if [[ $kind == tpu ]]; then
  chips=$((${TOPOLOGY//x/*}))
  ((chips % CHIPS == 0)) \
    || fail "--topology $TOPOLOGY is not made of machines of --chips $CHIPS"
  HOSTS=$((chips / CHIPS))
fi
(($#)) || fail "no command; such as: -- avd train --config FILE --workdir DIR"

# What stands for a string between double quotes in YAML.
escaped() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\r'/\\r}
  text=${text//$'\t'/\\t}
  [[ $text != *[[:cntrl:]]* ]] || fail "$(printf %q "$1"): a control character"
  printf %s "$text"
}

IMAGE=$(escaped "$IMAGE")
CLAIM=$(escaped "$CLAIM")
ACCELERATOR=$(escaped "$ACCELERATOR")
COMMAND=''
for word in "$@"; do
  # Kubernetes has variables of its own, $(NAME), and takes $$ for $.
  word=$(escaped "${word//\$/\$\$}")
  COMMAND+="${COMMAND:+, }\"$word\""
done
COMMAND="[$COMMAND]"

filled=$(<"${BASH_SOURCE[0]%/*}/gke/jobset-$kind.yaml")
for name in NAME ACCELERATOR TOPOLOGY HOSTS SLICES RESTARTS IMAGE CLAIM CHIPS \
  COMMAND; do
  filled=${filled//"\${$name}"/"${!name}"}
done
if [[ -n $dry ]]; then
  echo "$filled"
  exit 0
fi
kubectl apply -f - <<<"$filled"
