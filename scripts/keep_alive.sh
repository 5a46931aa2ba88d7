#!/usr/bin/env bash
# Keep a run going over preemptions, until it is finished.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/keep_alive.sh CONFIG [section.key=value ...] [options] [-- FLAGS]

Makes the slice ready (scripts/setup_tpu.sh), starts the run (scripts/launch_experiment.sh) and watches it. Where the slice has been
preempted, is gone, or is READY and its hosts do not answer three times in a row, it is deleted and asked for again, and the run
goes on from its last checkpoint; a run that failed is started again, after a wait that doubles with each failure, from one
--poll to ten, and is short again once a run was up for ten looks. Not started again: one that ended by its user's mistake
(status 2), or by `launch_experiment.sh stop`. The code is the commit that HEAD names now, whatever happens to it later. May be
stopped (Ctrl-C) and started again at any time: the run does not notice. Best run in tmux, or on a small VM.

  --run_name NAME     folder under logging.output_dir (default: the configuration's name)
  --spot, --queued    as for scripts/setup_tpu.sh
  --max_hours H       give up after so long (default 720)
  --max_attempts N    start it so many times (default 100); waiting for room does not count
  --poll SECONDS      between two looks (default 60)
  --log_dir FOLDER    every attempt is written to FOLDER/RUN.log (default: runs/keep_alive)
  --dry_run           print the commands of one attempt, execute none
  -- FLAGS            more flags for train_tpu.py

exit status: 0 the run is finished; 2 a mistake of the user; 1 hours or attempts are spent; 143 the run was stopped by its user

settings: tpu.project, tpu.zone, tpu.name, tpu.bucket in the configuration, or the environment variables TPU_PROJECT, TPU_ZONE,
TPU_NAME, TPU_BUCKET
TEXT
}

CONFIG='' RUN_NAME='' DRY_RUN='' max_hours=720 max_attempts=100 poll=60 log_dir='' slice_flags=() OVERRIDES=() flags=()
while [ $# -gt 0 ]; do
    case "$1" in
        --run_name) RUN_NAME=${2:?--run_name needs a name}; shift ;;
        --spot|--queued) slice_flags+=("$1") ;;
        --max_hours) max_hours=${2:?--max_hours needs a number}; shift ;;
        --max_attempts) max_attempts=${2:?--max_attempts needs a number}; shift ;;
        --poll) poll=${2:?--poll needs seconds}; shift ;;
        --log_dir) log_dir=$(realpath --canonicalize-missing "${2:?--log_dir needs a folder}"); shift ;;
        --dry_run) DRY_RUN=--dry_run ;;
        --help|-h) usage; exit 0 ;;
        --) flags=("$@"); break ;;
        -*) echo "error: unknown argument $1; see --help" >&2; exit 2 ;;
        *=*) OVERRIDES+=("$1") ;;
        *) if [ -n "$CONFIG" ]; then echo "error: $1: one configuration at a time, after $CONFIG" >&2; exit 2; fi
           CONFIG=$1 ;;
    esac
    shift
done
if [ -z "$CONFIG" ]; then echo "error: which configuration? see --help" >&2; exit 2; fi
CONFIG=$(realpath "$CONFIG")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh
CONFIG=$(in_repository "$CONFIG")
: "${RUN_NAME:=$(basename "${CONFIG%.*}")}" "${log_dir:=runs/keep_alive}"
choose_code
case "$COMMIT" in *-dirty) fail 2 "there are uncommitted changes (git status): commit them, a run of days must have its code's name" ;; esac
read_settings "$CONFIG" --need project,name --run_name "$RUN_NAME" --to_launch "${OVERRIDES[@]}"
need_gcloud

setup() { bash scripts/setup_tpu.sh "$CONFIG" "${OVERRIDES[@]}" "${slice_flags[@]}" --commit "$COMMIT" --max_hours "$1" --poll "$poll" $DRY_RUN; }
launch() { bash scripts/launch_experiment.sh "$CONFIG" "${OVERRIDES[@]}" --run_name "$RUN_NAME" --commit "$COMMIT" --detach $DRY_RUN "${flags[@]}"; }
note() { echo "$(date -u '+%Y-%m-%d %H:%M:%S UTC') $RUN_NAME: $*" | tee -a "$log"; }

if [ -n "$DRY_RUN" ]; then
    setup "$max_hours"
    launch
    exit
fi
mkdir -p "$log_dir"
log=$log_dir/$RUN_NAME.log
end=$(awk -v now="$(date +%s)" -v hours="$max_hours" 'BEGIN {printf "%d", now + 3600 * hours}')
attempts=0 silent=0 before='' seen=''       # seen: it was up since this began: how it ended earlier is no answer
failures=0 up=0 waited=''                   # failures: in a row; up: looks at which the present attempt ran; waited: after this attempt's failure

# a run that crashes at once is not to be started again and again without a pause; one that was up for a while is no such run
back_off() {
    local wait
    if [ "$up" -ge 10 ]; then failures=0; fi
    wait=$(awk -v poll="$poll" -v before="$failures" 'BEGIN {wait = poll * 2 ^ before; print (wait < 10 * poll ? wait : 10 * poll)}')
    failures=$((failures + 1)) up=0 waited=$attempts
    note "failure $failures in a row: the next attempt is in $wait s"
    sleep "$wait"
}

note "commit $COMMIT, slice $TPU_NAME, at most $max_attempts attempts and $max_hours hours"
while :; do
    look_at_run
    if [ "$RUN_STATE $RUN_WHY" != "$before" ]; then note "$RUN_STATE ($RUN_WHY)"; fi
    before="$RUN_STATE $RUN_WHY"
    case "$RUN_STATE $RUN_WHY" in *"do not answer"*) silent=$((silent + 1)) ;; *) silent=0 ;; esac
    case "$RUN_STATE $RUN_WHY" in
        finished*) exit 0 ;;
        running*) seen=yes up=$((up + 1)) ;;
        "failed "*"status 2"*) if [ -n "$seen" ]; then note "a mistake that another attempt would not mend: see bash scripts/launch_experiment.sh logs $RUN_NAME"; exit 2; fi ;;
        *"hosts: "*stopped*) if [ -n "$seen" ]; then note "stopped by its user: not started again"; exit 143; fi ;;
    esac
    if [ "$(date +%s)" -ge "$end" ]; then note "the $max_hours hours are spent; run and slice are left as they are"; exit 1; fi
    if [ "$RUN_STATE" = running ] || [ "$RUN_STATE" = unknown ] || { [ "$silent" -gt 0 ] && [ "$silent" -lt 3 ]; }; then
        sleep "$poll"
        continue
    fi
    if [ "$attempts" -ge "$max_attempts" ]; then note "the $max_attempts attempts are spent; the slice is left as it is"; exit 1; fi
    if [ "$RUN_STATE" = failed ] && [ -n "$seen" ] && [ "$waited" != "$attempts" ]; then back_off; continue; fi
    attempts=$((attempts + 1)) status=0
    left=$(awk -v now="$(date +%s)" -v end="$end" 'BEGIN {printf "%.4f", (end - now) / 3600}')
    note "attempt $attempts"
    setup "$left" || status=$?
    if [ "$status" = 0 ]; then launch || status=$?; fi
    case "$status" in
        0) note "attempt $attempts: started"; seen=yes ;;
        2) look_at_run      # it may have been started from elsewhere meanwhile
           if [ "$RUN_STATE" != running ]; then note "attempt $attempts: a mistake, not tried again"; exit 2; fi ;;
        3) note "attempt $attempts: no room for the slice; it is asked for again"; attempts=$((attempts - 1)); sleep "$poll" ;;
        *) note "attempt $attempts: did not start (status $status)"; back_off ;;
    esac
done
