#!/usr/bin/env bash
# Runs N processes of one program on this machine, as a cluster would.
#
#   launch/local.sh [--restarts R] [--dry-run] N [--] COMMAND [ARGUMENT ...]
#   launch/local.sh 2 avd train --config configs/worlds_tiny.py --workdir runs/x
#
# Process 0 owns the terminal; lines of the others are marked [1], [2], ...
# Ctrl-C (or SIGTERM) is handed to each process once, so that all of them save;
# a second one kills them. If a process fails, the others are stopped, and this
# script exits with its exit code; or, up to R times, starts all of them again,
# which go on from the last checkpoint. A mistake in the command (exit code 2)
# and a stop that was asked for are final.
set -euo pipefail

usage() {
  echo "usage: launch/local.sh [--restarts R] [--dry-run] N [--] COMMAND" \
    "[ARGUMENT ...]" >&2
  exit 2
}

restarts=0 dry=
while [[ ${1-} == --* ]]; do
  case $1 in
    --restarts)
      if [[ ! ${2-} =~ ^(0|[1-9][0-9]{0,8})$ ]]; then
        echo "error: --restarts ${2-}: give 0, 1, 2, ..." >&2
        exit 2
      fi
      restarts=$2
      shift 2
      ;;
    --dry-run) dry=1 && shift ;;
    *) usage ;;
  esac
done
if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then usage; fi
count=$1
shift
if [[ $1 == -- ]]; then shift; fi
if (($# == 0)); then usage; fi
if ! command -v "$1" >/dev/null; then
  echo "error: $1 is not a program; is the environment active?" >&2
  exit 2
fi

# Below the range that systems hand out for outgoing connections.
free_port() {
  local port
  while true; do
    port=$((20000 + RANDOM % 12000))
    if ! (: <>"/dev/tcp/127.0.0.1/$port") 2>/dev/null; then
      echo "$port"
      return
    fi
  done
}

mark() {
  local line
  trap '' INT TERM # it ends when the process it reads from does
  while IFS= read -r line || [[ -n $line ]]; do
    printf '[%s] %s\n' "$1" "$line"
  done
}

end() { # SIGNAL
  local pid
  for pid in "${alive[@]}"; do
    # Past saving, whatever a process started goes with it.
    if [[ $1 == KILL ]]; then pid=-$pid; fi
    kill "-$1" -- "$pid" 2>/dev/null || true
  done
}

# Starts the processes: `alive` (at first all of `started`); `readers` mark their
# lines.
launch() { # COMMAND [ARGUMENT ...]
  local index out
  started=() readers=()
  # A process group each: the terminal's Ctrl-C then reaches this script alone,
  # and no process a second time.
  set -m
  for ((index = 0; index < count; index++)); do
    export AVD_PROCESS_ID=$index
    if ((index == 0)); then
      "$@" </dev/null &
    else
      exec {out}> >(mark "$index")
      readers+=($!)
      "$@" </dev/null >&"$out" 2>&1 {out}>&- &
    fi
    started+=($!)
    if ((index)); then exec {out}>&-; fi
  done
  set +m
  alive=("${started[@]}")
}

# Waits for all of them: `status` is the exit code of the first that failed.
watch_over() {
  local pid code told=0 deadline='' remaining
  status=0
  while ((${#alive[@]})); do
    sleep 0.2 || true
    remaining=()
    for pid in "${alive[@]}"; do
      if kill -0 "$pid" 2>/dev/null; then
        remaining+=("$pid")
        continue
      fi
      code=0
      wait "$pid" 2>/dev/null || code=$?
      if ((code && !status)); then
        status=$code
        # Without it the others can neither go on nor save; those told to stop
        # have saved together, and are about to end.
        deadline=$((SECONDS + (told ? 30 : 5)))
        if ((!told)); then
          echo "a process exited with $code; stopping the others" >&2
          end TERM
          told=1
        fi
      fi
    done
    alive=("${remaining[@]}")
    if [[ -n $asked ]]; then
      if ((told)); then asked=KILL; fi
      end "$asked"
      told=1 asked=''
    fi
    if [[ -n $deadline ]] && ((SECONDS >= deadline)); then end KILL; fi
  done
}

last_lines() {
  if ((${#readers[@]})); then wait "${readers[@]}" || true; fi
}

address=${AVD_COORDINATOR:-}
export AVD_NUM_PROCESSES=$count
if [[ -n $dry ]]; then
  for ((index = 0; index < count; index++)); do
    echo "AVD_COORDINATOR=${address:-127.0.0.1:PORT}" \
      "AVD_NUM_PROCESSES=$count AVD_PROCESS_ID=$index $(printf '%q ' "$@")"
  done
  exit 0
fi

asked='' final='' # a signal to hand on; that there was one
trap 'asked=INT final=1' INT
trap 'asked=TERM final=1' TERM

for ((attempt = 0; ; attempt++)); do
  # A port of its own: the last one's may linger.
  export AVD_COORDINATOR=${address:-127.0.0.1:$(free_port)}
  launch "$@"
  watch_over
  if ((status == 0 || status == 2 || attempt == restarts)) || [[ -n $final ]]
  then
    last_lines
    exit "$status"
  fi
  # What the dead have started would be in the way of their successors.
  alive=("${started[@]}")
  end KILL
  last_lines
  echo "restart $((attempt + 1)) of $restarts" >&2
done
