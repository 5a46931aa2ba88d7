#!/usr/bin/env bash
# Make a TPU slice ready to train on, or say that it is.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/setup_tpu.sh [CONFIG] [section.key=value ...] [options]

Asks for the slice of the configuration (default: configs/base_sudoku_tpu.yaml), waits until it is there, installs the pinned
environment on all of its hosts (5 minutes the first time), and checks that every host sees its chips and that an all-reduce over
all of them is right. Does only what is missing. A slice that is dead (preempted, terminated, failed, or READY without an answer
from its hosts) is deleted first, as it cannot be asked for again before.

  --spot            a spot slice: may be preempted at any time
  --queued          ask by a queued resource: waits in Google's queue until there is room
  --max_hours H     wait so long for the slice (default 24)
  --poll SECONDS    between two looks at it (default 30)
  --commit SHA      use the code of this commit (default: the working tree)
  --dry_run         print the commands, as for a slice that is not there yet; execute none

exit status: 0 the slice is ready; 2 a mistake in the settings; 3 no room for the slice now; 1 anything else

settings: tpu.project, tpu.zone, tpu.name in the configuration, or the environment variables TPU_PROJECT, TPU_ZONE, TPU_NAME.
PIP_INDEX_URL and PIP_EXTRA_INDEX_URL are handed to pip on the hosts: with PyTorch's own index of CPU wheels they install torch
without 4 GB of CUDA libraries, which the wheel of the default index cannot be imported without.
TRM_ANSWER_SECONDS: wait so long for a host (120).
TEXT
}

CONFIG='' DRY_RUN='' queued='' commit='' max_hours=24 poll=30 spot=() OVERRIDES=()
while [ $# -gt 0 ]; do
    case "$1" in
        --spot) spot=(--spot) ;;
        --queued) queued=yes ;;
        --max_hours) max_hours=${2:?--max_hours needs a number}; shift ;;
        --poll) poll=${2:?--poll needs seconds}; shift ;;
        --commit) commit=${2:?--commit needs a commit}; shift ;;
        --dry_run) DRY_RUN=yes ;;
        --help|-h) usage; exit 0 ;;
        -*) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
        *=*) OVERRIDES+=("$1") ;;
        *) if [ -n "$CONFIG" ]; then echo "error: $1: one configuration at a time, after $CONFIG" >&2; exit 2; fi
           CONFIG=$1 ;;
    esac
    shift
done
[ -z "$CONFIG" ] || CONFIG=$(realpath "$CONFIG")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh
CONFIG=$(in_repository "${CONFIG:-configs/base_sudoku_tpu.yaml}")
read_settings "$CONFIG" --need project,name "${OVERRIDES[@]}"
need_gcloud
choose_code "$commit"
deadline=$(awk -v now="$(date +%s)" -v hours="$max_hours" 'BEGIN {printf "%d", now + 3600 * hours}')

ask_for_slice() {
    local status=0 ticks
    say "asking for $TPU_NAME: $TPU_ACCELERATOR in $TPU_ZONE${spot[*]:+, spot}${queued:+, queued}"
    if [ -n "$queued" ]; then
        execute gcloud compute tpus queued-resources create "$TPU_NAME" "--node-id=$TPU_NAME" "${LOCATION[@]}" \
            "--accelerator-type=$TPU_ACCELERATOR" "--runtime-version=$TPU_RUNTIME" "${spot[@]}" 2>&1 | tee "$SCRATCH/create" || status=1
    else
        while sleep "$poll" >/dev/null 2>&1 3>&-; do say "$TPU_NAME: being made"; done & ticks=$!
        execute gcloud compute tpus tpu-vm create "$TPU_NAME" "${LOCATION[@]}" \
            "--accelerator-type=$TPU_ACCELERATOR" "--version=$TPU_RUNTIME" "${spot[@]}" 2>&1 | tee "$SCRATCH/create" || status=1
        kill "$ticks"
        wait "$ticks" 2>/dev/null || true
    fi
    if [ "$status" = 0 ]; then return; fi
    if grep -qiE 'no more capacity|not enough resources|RESOURCE_EXHAUSTED|stockout' "$SCRATCH/create"; then
        fail 3 "there is no room for $TPU_NAME now: try again later, or wait in the queue by --queued"
    fi
    fail 1 "$TPU_NAME could not be made: gcloud's message is above"
}

hosts_answer() {
    local try
    for try in 1 2 3; do
        if add_ssh_key && ask_hosts all true; then return; fi
        say "$TPU_NAME: not all hosts answer (try $try of 3)"
        sleep "$poll"
    done
    return 1
}

# ----- the slice -----
asked=
while :; do
    if [ -n "$DRY_RUN" ]; then
        state_of queued-resources >/dev/null
        state_of tpu-vm >/dev/null
        ask_for_slice
        break
    fi
    states="$(state_of queued-resources) $(state_of tpu-vm)"
    dead=
    case "$states" in
        *NO_ANSWER*) say "gcloud gives no answer about $TPU_NAME" ;;
        "GONE GONE") if [ -n "$asked" ]; then fail 1 "$TPU_NAME went away while it was waited for"; fi
                     ask_for_slice; asked=yes; continue ;;
        *" READY") if hosts_answer; then break; fi
                   if [ -n "$asked" ]; then fail 1 "$TPU_NAME is READY, and its hosts do not answer ssh: gcloud compute tpus tpu-vm ssh $TPU_NAME ${LOCATION[*]}"; fi
                   dead="READY, but its hosts do not answer" ;;
        FAILED*|SUSPENDED*|"ACTIVE GONE"|*" PREEMPTED"|*" TERMINATED"|*" STOPPED"|*" HIDDEN"|*" UNKNOWN") dead=$states ;;
        *) say "$TPU_NAME: $states, waiting" ;;
    esac
    if [ -n "$dead" ]; then
        if [ -n "$asked" ]; then fail 3 "$TPU_NAME is $dead before it could be used"; fi
        say "$TPU_NAME is dead ($dead): deleting it"
        delete_slice
        continue
    fi
    [ "$(date +%s)" -lt "$deadline" ] || fail 3 "$TPU_NAME is not there after $max_hours hours ($states): it stays asked for; bash scripts/delete_tpu.sh takes that back"
    sleep "$poll"
done
say "$TPU_NAME is READY, $TPU_HOSTS host(s)"

# ----- its hosts -----
if [ -n "$DRY_RUN" ]; then add_ssh_key; fi
pip_settings=()
for name in PIP_INDEX_URL PIP_EXTRA_INDEX_URL; do
    if [ -n "${!name:-}" ]; then pip_settings+=("$(printf '%s=%q' "$name" "${!name}")"); fi
done
send_code
on_hosts all "$(unpack_code) && ${pip_settings[*]:+${pip_settings[*]} }$(host_command setup)" ||
    fail 1 "the environment of $TPU_NAME could not be installed: the host's message is above; the same command again goes on"
if [ -n "$DRY_RUN" ] || ! ask_hosts all "$(host_command checked)" 2>/dev/null; then
    on_hosts all "$(host_command check --config "$CONFIG" "${OVERRIDES[@]}")" ||
        fail 1 "the check of $TPU_NAME failed: the message is above; bash scripts/delete_tpu.sh, then ask for another slice"
fi
say "$TPU_NAME is ready: bash scripts/launch_experiment.sh CONFIG"
