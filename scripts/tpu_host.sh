#!/usr/bin/env bash
# What each host of a slice does for the other scripts, which call this one over ssh. All its files
# are in ~/trm.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/tpu_host.sh COMMAND, on a host of a TPU slice

  setup                         install the pinned environment into ~/trm/venv (or where TRM_VENV says), with a Python of its own
  checked                       status 0 if the devices have been checked since this host started
  check --config FILE ...       scripts/check_devices.py; to be run on all hosts at once
  diagnose --config FILE ...    scripts/diagnose.py; to be run on all hosts at once
  start RUN ID FLAGS ...        train_tpu.py FLAGS, detached; a repeated start has the same ID
  status RUN                    one line: up, status N (how it ended), stopped N (after stop), lost (killed) or nothing
  list                          a line for each run that was started here, as status gives it
  follow RUN [all]              the log of the run since it was last started (all: since the first time), until it ends
  stop RUN [ID]                 SIGTERM to the run (if it was started with this ID); returns once it has ended
TEXT
}

cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
trm=$HOME/trm
export TRM_VENV=${TRM_VENV:-$trm/venv}
# Who has locked this file has the chips; its content is the name of that run. The processes that a
# run starts inherit the lock, and it is free when the last of them has ended
lock=$trm/lock
checked=$trm/checked-$(cat /proc/sys/kernel/random/boot_id)

free() { flock --shared --nonblock "$lock" true; }
up() { [ "$(cat "$lock" 2>/dev/null)" = "$run" ] && ! free; }

setup() {
    local files=(requirements.txt requirements-tpu.txt)
    if ! free && ! environment_is_complete "${files[@]}"; then
        echo "error: $(hostname): the run $(cat "$lock") is up in the environment that this would replace: wait for it, or stop it" >&2
        return 2
    fi
    INSTALL_WITH=uv set_up_environment "${files[@]}"
}

# take_chips WHAT: lock the chips for this process and those that it starts, or return 2. A check or
# a diagnosis (a WHAT in brackets) is waited for: it may be this command's own first attempt, before
# the connection of ssh broke
take_chips() {
    exec 9>>"$lock"
    flock --timeout 2 9 || { [[ $(cat "$lock") = "("* ]] && waited=yes && flock --timeout 1500 9; } || { echo "error: $(hostname): the run $(cat "$lock") has the chips: stop it first" >&2; return 2; }
    echo "$1" > "$lock"
}

check() {
    local waited=''
    take_chips "(a check of the devices)"
    if [ -n "$waited" ] && [ -e "$checked" ]; then return; fi
    "$TRM_VENV/bin/python" scripts/check_devices.py "$@"
    touch "$checked"
}

# by the host's own Python: the environment may be what is wrong
diagnose() {
    take_chips "(a diagnosis)"
    python3 scripts/diagnose.py "$@"
}

start() {
    local id=$1
    shift
    mkdir -p "$folder"
    exec 9>>"$lock"
    # 2 s, because `free` of another command also locks it for a moment. A check or a diagnosis ends
    # by itself
    if ! flock --timeout 2 9 && ! { [[ $(cat "$lock") = "("* ]] && flock --timeout 1500 9; }; then
        if up && [ "$(cat "$folder/id")" = "$id" ]; then return; fi
        echo "error: $(hostname): the run $(cat "$lock") is up already, and one at a time has the chips: wait for it, or stop it" >&2
        return 2
    fi
    rm -f "$folder"/{status,stopped,pid}
    echo "$run" > "$lock"
    touch "$folder/log"
    echo "$(($(stat --format=%s "$folder/log") + 1))" > "$folder/began"      # where the log of this start begins, in bytes from 1
    echo "$id" > "$folder/id"
    # Not in tmux: at a preemption every process gets SIGTERM. tmux then sends SIGHUP to what it
    # runs, and the training would end without its checkpoint
    setsid nohup bash scripts/tpu_host.sh supervise "$run" "$@" < /dev/null >> "$folder/log" 2>&1 &
}

supervise() {
    trap : TERM         # the training answers it; this process lives on to write down how it ended
    local status=0
    ( echo "$BASHPID" > "$folder/pid"; exec "$TRM_VENV/bin/python" train_tpu.py "$@" ) || status=$?
    echo "$status" > "$folder/.status"
    mv "$folder/.status" "$folder/status"
}

status() {
    if up; then echo "trm: up"
    elif [ -e "$folder/stopped" ] && [ "$(cat "$folder/status")" = 143 ]; then echo "trm: stopped 143"
    elif [ -e "$folder/status" ]; then echo "trm: status $(cat "$folder/status")"
    elif [ -e "$folder/id" ]; then echo "trm: lost"
    else echo "trm: nothing"
    fi
}

wait_for_pid() { until [ -e "$folder/pid" ] || ! up; do sleep 0.1; done; }

list() {
    for folder in "$trm"/runs/*/; do
        if [ ! -d "$folder" ]; then continue; fi
        run=$(basename "$folder")
        folder=${folder%/}
        status | sed "s|^trm:|trm: $run:|"
    done
}

follow() {
    local from=1
    if [ "${1:-}" != all ] && [ -e "$folder/began" ]; then from=$(cat "$folder/began"); fi
    if up && wait_for_pid && [ -e "$folder/pid" ]; then
        tail "--bytes=+$from" --follow --sleep-interval=0.5 "--pid=$(cat "$folder/pid")" "$folder/log"
        flock --shared --timeout 10 "$lock" true || true        # until it is written down how it ended
    elif [ -e "$folder/log" ]; then
        tail "--bytes=+$from" "$folder/log"
    fi
}

stop() {
    if ! up || [ "${1:-$(cat "$folder/id")}" != "$(cat "$folder/id")" ]; then return; fi
    wait_for_pid
    touch "$folder/stopped"
    kill -TERM "$(cat "$folder/pid")" || true
    flock --timeout 90 "$lock" true || { echo "error: $(hostname): $run has not ended within 90 s of SIGTERM" >&2; return 1; }
}

command=${1:---help}
shift || true
mkdir -p "$trm"
case "$command" in
    setup) setup ;;
    checked) [ -e "$checked" ] ;;
    list) list ;;
    check) check "$@" ;;
    diagnose) diagnose "$@" ;;
    start|supervise|status|follow|stop)
        run=${1:?the name of a run}
        folder=$trm/runs/$run
        "$command" "${@:2}" ;;
    --help|-h) usage ;;
    *) echo "error: unknown command $command" >&2; usage >&2; exit 2 ;;
esac
