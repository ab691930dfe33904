#!/usr/bin/env bash
# Starts one training run on TPU slices of a cluster that xpk made.
#
#   launch/xpk.sh --name RUN --project P --zone Z --cluster C --image IMAGE \
#     --type v6e-16 [--slices 1] [--restarts 20] [--dry-run] \
#     -- COMMAND [ARGUMENT ...]
#
#   --image    built from Dockerfile.tpu
#   --dry-run  prints xpk's command, and runs nothing
#
# --project, --zone, --cluster and --image may be the variables PROJECT, ZONE,
# CLUSTER and IMAGE instead. Attach a volume that all pods may write to once:
# `xpk storage attach ... --mount-point /runs --auto-mount true`; the run's
# --workdir is a directory in it.
# Follow: xpk workload list ...; stop: xpk workload delete ...
set -euo pipefail

fail() {
  echo "error: $*" >&2
  echo "usage: launch/xpk.sh [--OPTION VALUE ...] [--dry-run]" \
    "-- COMMAND [ARGUMENT ...]; options: head of this file" >&2
  exit 2
}

name='' type='' slices=1 restarts=20 dry=
project=${PROJECT-} zone=${ZONE-} cluster=${CLUSTER-} image=${IMAGE-}
while [[ ${1-} == --?* ]]; do
  if [[ $1 == --dry-run ]]; then
    dry=1 && shift
    continue
  fi
  [[ -n ${2-} && $2 != --* ]] || fail "$1 needs a value"
  case $1 in
    --name) name=$2 ;;
    --project) project=$2 ;;
    --zone) zone=$2 ;;
    --cluster) cluster=$2 ;;
    --image) image=$2 ;;
    --type) type=$2 ;;
    --slices) slices=$2 ;;
    --restarts) restarts=$2 ;;
    *) fail "unknown option $1" ;;
  esac
  shift 2
done
if [[ ${1-} == -- ]]; then shift; fi
[[ -n $name ]] || fail "--name is missing"
[[ -n $type ]] || fail "--type is missing"
for place in project zone cluster image; do
  [[ -n ${!place} ]] || fail "--$place (or the variable ${place^^}) is missing"
done
[[ $slices =~ ^[1-9][0-9]{0,8}$ ]] || fail "--slices $slices: give 1, 2, ..."
[[ $restarts =~ ^(0|[1-9][0-9]{0,8})$ ]] \
  || fail "--restarts $restarts: give 0, 1, 2, ..."
(($#)) || fail "no command; such as: -- avd train --config FILE --workdir DIR"

# xpk hands the command to a shell, and SIGTERM to that shell's child: hence
# exec. By itself xpk starts again after signals, not after the 1 of a Python
# error; the 2 of a mistake in the command stays final.
command=(
  xpk workload create
  "--workload=$name" "--project=$project" "--zone=$zone"
  "--cluster=$cluster" "--tpu-type=$type" "--num-slices=$slices"
  "--docker-image=$image" "--env=AVD_COORDINATOR=auto"
  # Machines come one by one where the cluster has to grow.
  "--env=AVD_TIMEOUT=3600"
  "--max-restarts=$restarts" "--restart-on-exit-codes=1"
  "--termination-grace-period-seconds=120"
  "--command=exec $(printf '%q ' "$@")"
)
if [[ -n $dry ]]; then
  printf '%q ' "${command[@]}" && echo
else
  "${command[@]}"
fi
