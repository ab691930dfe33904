#!/usr/bin/env bash
# Runs N processes of one program on this machine, as a cluster would.
#
#   launch/local.sh 2 avd train --config configs/worlds_tiny.py --workdir runs/x
#
# Process 0 owns the terminal; lines of the others are marked [1], [2], ...
# Ctrl-C (or SIGTERM) is handed to each process once, so that all of them save;
# a second one kills them. If a process fails, the others are stopped, and this
# script exits with its exit code.
set -euo pipefail

if [[ $# -lt 2 || ! $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N COMMAND [ARGUMENT ...]" >&2
  exit 2
fi
count=$1
shift
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

AVD_COORDINATOR=${AVD_COORDINATOR:-127.0.0.1:$(free_port)}
AVD_NUM_PROCESSES=$count
export AVD_COORDINATOR AVD_NUM_PROCESSES

# A process group each: the terminal's Ctrl-C then reaches this script alone,
# and no process a second time.
set -m
alive=() readers=()
for ((index = 0; index < count; index++)); do
  export AVD_PROCESS_ID=$index
  if ((index == 0)); then
    "$@" </dev/null &
  else
    exec {out}> >(mark "$index")
    readers+=($!)
    "$@" </dev/null >&"$out" 2>&1 {out}>&- &
  fi
  alive+=($!)
  if ((index)); then exec {out}>&-; fi
done
set +m

end() { # SIGNAL
  local pid
  for pid in "${alive[@]}"; do
    # Past saving, whatever a process started goes with it.
    if [[ $1 == KILL ]]; then pid=-$pid; fi
    kill "-$1" -- "$pid" 2>/dev/null || true
  done
}

asked='' # a signal to hand on
trap 'asked=INT' INT
trap 'asked=TERM' TERM

told=0 status=0 deadline=
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
        asked=TERM
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
if ((${#readers[@]})); then wait "${readers[@]}" || true; fi
exit "$status"
