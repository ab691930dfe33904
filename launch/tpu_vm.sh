#!/usr/bin/env bash
# One training run on a TPU slice of one's own: queued resources, then a
# container on every host.
#
#   launch/tpu_vm.sh create --name RUN --project P --zone Z \
#     --type v5litepod-16 --version v2-alpha-tpuv5-lite [--spot]
#   launch/tpu_vm.sh run    --name RUN --project P --zone Z \
#     --image IMAGE --bucket B -- COMMAND [ARGUMENT ...]
#   launch/tpu_vm.sh attach --name RUN --project P --zone Z
#   launch/tpu_vm.sh stop   --name RUN --project P --zone Z
#   launch/tpu_vm.sh delete --name RUN --project P --zone Z
#
#   create  asks for the slice; it may be long in coming
#   run     waits for it, starts the command on all hosts, attaches; the command
#           goes on without you
#   attach  shows what host 0 prints, from now on; ends with its exit code
#   stop    has the run save and end; delete gives the slice back
#
# The bucket is mounted at /runs (give --workdir /runs/...). It must have a
# hierarchical namespace: a checkpoint is finished by renaming its directory.
# --image is built from Dockerfile.tpu. --project, --zone, --image and --bucket
# may be the variables PROJECT, ZONE, IMAGE and BUCKET instead. --dry-run prints
# the commands, and runs none.
set -euo pipefail

fail() {
  echo "error: $*" >&2
  echo "usage: launch/tpu_vm.sh create|run|attach|stop|delete" \
    "[--OPTION VALUE ...] [--dry-run] [-- COMMAND ...]; options: head of this" \
    "file" >&2
  exit 2
}

job=${1-}
case $job in
  create) needed=(project zone type version) ;;
  run) needed=(project zone image bucket) ;;
  attach | stop | delete) needed=(project zone) ;;
  *) fail "say create, run, attach, stop or delete first" ;;
esac
shift

name='' type='' version='' spot='' dry=
project=${PROJECT-} zone=${ZONE-} image=${IMAGE-} bucket=${BUCKET-}
while [[ ${1-} == --?* ]]; do
  case $1 in
    --dry-run | --spot)
      if [[ $1 == --spot ]]; then spot=1; else dry=1; fi
      shift
      continue
      ;;
  esac
  [[ -n ${2-} && $2 != --* ]] || fail "$1 needs a value"
  case $1 in
    --name) name=$2 ;;
    --project) project=$2 ;;
    --zone) zone=$2 ;;
    --type) type=$2 ;;
    --version) version=$2 ;;
    --image) image=$2 ;;
    --bucket) bucket=${2#gs://} ;;
    *) fail "unknown option $1" ;;
  esac
  shift 2
done
if [[ ${1-} == -- ]]; then shift; fi
[[ -n $name ]] || fail "--name is missing"
for option in "${needed[@]}"; do
  case $option in
    type | version) variable='' ;;
    *) variable=" (or the variable ${option^^})" ;;
  esac
  [[ -n ${!option} ]] || fail "--$option$variable is missing"
done
if [[ $job == run ]]; then
  (($#)) || fail "no command; such as: -- avd train --config FILE --workdir DIR"
elif (($#)); then
  fail "$job takes no command"
fi

place=("--project=$project" "--zone=$zone")
queued=(gcloud compute tpus queued-resources)

run() {
  if [[ -n $dry ]]; then
    printf '%q ' "$@" && echo
  else
    "$@"
  fi
}

quoted="'\\''" # a quote among quotes
on() { # WORKER COMMAND
  local ssh=(gcloud compute tpus tpu-vm ssh "$name" "${place[@]}" "--worker=$1")
  if [[ -n $dry ]]; then
    # Lines stay lines, which %q would not leave them.
    printf '%q ' "${ssh[@]}"
    printf "%s'%s'\n" --command= "${2//\'/"$quoted"}"
  else
    "${ssh[@]}" "--command=$2"
  fi
}

wait_for_slice() {
  local state
  local describe=("${queued[@]}" describe "$name" "${place[@]}")
  describe+=("--format=value(state.state)")
  if [[ -n $dry ]]; then
    run "${describe[@]}"
    return
  fi
  while true; do
    state=$("${describe[@]}")
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED)
        echo "error: $name is $state (a spot slice that was taken back is" \
          "SUSPENDED): delete it, create and run it again; the run goes on" \
          "from its last checkpoint" >&2
        exit 1
        ;;
    esac
    echo "$name is $state" >&2
    sleep 30
  done
}

# gcsfuse comes from Google's package repository, once; then the mount, which
# containers of any user may use.
mount_bucket() {
  local keys=https://packages.cloud.google.com/apt
  on all "set -e
    mountpoint -q /runs && exit 0
    if ! command -v gcsfuse >/dev/null; then
      curl -fsS $keys/doc/apt-key.gpg \
        | sudo tee /usr/share/keyrings/cloud.google.asc >/dev/null
      echo \"deb [signed-by=/usr/share/keyrings/cloud.google.asc] $keys\" \
        \"gcsfuse-\$(lsb_release -cs) main\" \
        | sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
      sudo apt-get update -q && sudo apt-get install -qy gcsfuse
    fi
    sudo mkdir -p /runs
    sudo gcsfuse --implicit-dirs -o allow_other $(printf %q "$bucket") /runs"
}

# Docker starts again what fails, but not for ever.
start() { # COMMAND [ARGUMENT ...]
  local words registry=${image%%/*} login=true
  printf -v words '%q ' "${@:2}"
  case $registry in # Google's take the host's own credentials
    gcr.io | *.gcr.io | *.pkg.dev)
      login="sudo gcloud auth configure-docker --quiet $registry"
      ;;
  esac
  on all "set -e
    if [ -n \"\$(sudo docker ps --quiet --filter 'name=^avd$')\" ]; then
      echo 'error: a run is going on here: attach to it, or stop it' >&2
      exit 2
    fi
    $login
    sudo docker rm avd >/dev/null 2>&1 || true
    sudo docker run --detach --name avd --restart on-failure:10 \
      --privileged --net host --shm-size 16g --volume /runs:/runs \
      --env AVD_COORDINATOR=auto --entrypoint $(printf %q "$1") \
      $(printf %q "$image") $words"
}

attach() {
  on 0 "sudo docker logs --follow --tail 20 avd
    exit \$(sudo docker inspect --format '{{.State.ExitCode}}' avd)"
}

case $job in
  create)
    run "${queued[@]}" create "$name" "--node-id=$name" "${place[@]}" \
      "--accelerator-type=$type" "--runtime-version=$version" \
      ${spot:+--spot}
    ;;
  run)
    wait_for_slice
    mount_bucket
    start "$@"
    attach
    ;;
  attach) attach ;;
  stop) on all "sudo docker stop --time 120 avd" ;;
  delete) run "${queued[@]}" delete "$name" "${place[@]}" --force --quiet ;;
esac
