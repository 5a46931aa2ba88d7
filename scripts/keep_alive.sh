#!/usr/bin/env bash
# Keep a run going over preemptions, until it is finished.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/keep_alive.sh CONFIG [section.key=value ...] [options] [-- FLAGS]

Makes the slice ready (scripts/setup_tpu.sh), starts the run (scripts/launch_experiment.sh) and
watches it:

  - If the slice is preempted or gone, it requests the slice again, and the run resumes from its
    last checkpoint. It waits for the end of a maintenance.
  - If the run failed, it starts the run again after a wait: one --poll, then 2, 4, 8, at most ten.
    The wait is short again once a run was up for ten looks.
  - If the run ended by a mistake of its user (status 2) or by `launch_experiment.sh stop`, it does
    not start the run again.
  - If waiting does not help (quota, permission, login), it ends at once and leaves the run alone.
  - If Google calls the slice healthy and its hosts do not answer ten looks in a row, it ends and
    does not delete the slice.

Code and configuration are those of the commit that HEAD names now, also if HEAD changes later.
This script may be stopped (Ctrl-C) and started again at any time: the run does not notice. Best run
in tmux, or on a small VM.

  --run_name NAME     folder under logging.output_dir (default: the configuration's name)
  --spot, --queued, --autocheckpoint, --internal_ips, --replace_silent
                      as for scripts/setup_tpu.sh
  --delete_when_done  delete the slice once the run is finished (default: print the command)
  --max_hours H       give up after H hours (default 720)
  --max_attempts N    start the run at most N times (default 100). Waiting for capacity does not
                      count; a queued resource that FAILED does
  --poll SECONDS      between two looks (default 60)
  --log_dir FOLDER    every attempt is written to FOLDER/RUN.log (default: runs/keep_alive)
  --dry_run           print the commands of one attempt, execute none
  -- FLAGS            more flags for train_tpu.py

exit status: 0 the run is finished; 2 what waiting does not mend: a mistake, a refusal by Google, a
healthy slice that does not answer; 1 hours or attempts are used up; 143 the run was stopped by its
user

settings: tpu.project, tpu.zone, tpu.name, tpu.bucket in the configuration, or the environment
variables TPU_PROJECT, TPU_ZONE, TPU_NAME, TPU_BUCKET; others as for scripts/setup_tpu.sh
TEXT
}

# shellcheck source=scripts/arguments.sh
. "$(dirname "${BASH_SOURCE[0]}")/arguments.sh"
CONFIG='' RUN_NAME='' DRY_RUN='' delete_when_done='' max_hours=720 max_attempts=100 poll=60 log_dir='' slice_flags=() OVERRIDES=() flags=()
while [ $# -gt 0 ]; do
    case "$1" in
        --run_name) need_value "$@"; RUN_NAME=$2; shift ;;
        --spot|--queued|--autocheckpoint|--internal_ips|--replace_silent) slice_flags+=("$1") ;;
        --delete_when_done) delete_when_done=yes ;;
        --max_hours) need_number "$@"; max_hours=$2; shift ;;
        --max_attempts) need_number "$@"; max_attempts=$2; shift ;;
        --poll) need_number "$@"; poll=$2; shift ;;
        --log_dir) need_value "$@"; log_dir=$(realpath --canonicalize-missing "$2"); shift ;;
        --dry_run) DRY_RUN=--dry_run ;;
        --help|-h) usage; exit 0 ;;
        --) flags=("$@"); break ;;
        -*) mistake "unknown argument $1; see --help" ;;
        *=*) OVERRIDES+=("$1") ;;
        *) one_config "$1" ;;
    esac
    shift
done
if [ -z "$CONFIG" ]; then mistake "which configuration? see --help"; fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/tpu.sh
CONFIG=$(in_repository "$CONFIG")
: "${RUN_NAME:=$(basename "${CONFIG%.*}")}" "${log_dir:=runs/keep_alive}"
choose_code
case "$COMMIT" in *-dirty) refuse_uncommitted "commit them, a run of days must have its code's name" ;; esac
read_settings "$CONFIG" --need project,name --run_name "$RUN_NAME" --to_launch "${OVERRIDES[@]}"
need_gcloud

setup() { part setup_tpu.sh "$CONFIG" "${OVERRIDES[@]}" "${slice_flags[@]}" --commit "$COMMIT" --max_hours "$1" --poll "$poll" $DRY_RUN; }
launch() { part launch_experiment.sh "$CONFIG" "${OVERRIDES[@]}" --run_name "$RUN_NAME" --commit "$COMMIT" --detach $DRY_RUN "${flags[@]}"; }
# part SCRIPT ARGUMENTS...: run another script, which ends when this one does. What it prints is
# shown, and kept in $SCRATCH/attempt
part() {
    local status=0 shown
    rm -f "$SCRATCH/part"
    mkfifo "$SCRATCH/part"
    tee "$SCRATCH/attempt" <"$SCRATCH/part" & shown=$!
    apart 0 env TRM_KEPT_ALIVE=yes bash scripts/"$1" "${@:2}" >"$SCRATCH/part" 2>&1 || status=$?
    wait "$shown" || true
    return "$status"
}
note() { echo "$(date -u '+%Y-%m-%d %H:%M:%S UTC') $RUN_NAME: $*" | tee -a "$log"; }

if [ -n "$DRY_RUN" ]; then
    setup "$max_hours"
    launch
    exit
fi
mkdir -p "$log_dir"
log=$log_dir/$RUN_NAME.log
end=$(awk -v now="$(date +%s)" -v hours="$max_hours" 'BEGIN {printf "%d", now + 3600 * hours}')
# attempts: so far. silent: looks in a row at which the hosts did not answer. before: the state at
# the last look. seen: not empty once the run was up while this script ran; until then a "failed" or
# "stopped" is from an earlier time, and does not count
attempts=0 silent=0 before='' seen=''
# failures: in a row. up: looks at which this attempt's run was running. waited: the number of the
# attempt after whose failure back_off has waited already
failures=0 up=0 waited=''

fail() { local status=$1; shift; note "$*" >/dev/null; echo "error: $*" >&2; exit "$status"; }     # in the log, too

# ended STATUS WHY: end this script, and say what it leaves behind: the run may go on, and the slice
# exist
ended() {
    note "$2"
    MAY_EXIST=''
    case "$1" in 1|2) echo "error: $2" >&2 ;; esac
    if [ -n "$delete_when_done" ] && [ "$1" = 0 ]; then
        # shellcheck disable=SC2086     # several words
        if part delete_tpu.sh $SLICE --yes --if_idle; then note "$TPU_NAME is deleted"; else note "$(tail -n 1 "$SCRATCH/attempt" | sed 's/^error: //')"; fi
    else
        note "the slice $TPU_NAME, where it is there, uses up its quota until it is deleted: bash scripts/delete_tpu.sh $SLICE"
    fi
    exit "$1"
}

# back_off: wait before the next attempt, each time twice as long, so that a run that crashes at
# once is not started again and again. After a run that was up for 10 looks the wait is short again
back_off() {
    local wait
    if [ "$up" -ge 10 ]; then failures=0; fi
    wait=$(awk -v poll="$poll" -v before="$failures" 'BEGIN {wait = poll * 2 ^ before; print (wait < 10 * poll ? wait : 10 * poll)}')
    failures=$((failures + 1)) up=0 waited=$attempts
    note "failure $failures in a row: the next attempt is in $wait s"
    sleep "$wait"
}

# worth_an_attempt: the hosts are silent. Whether setup_tpu.sh should wait for them or replace the
# slice. Ends this script if only a person can tell what is wrong
worth_an_attempt() {
    case "$SILENT" in
        ''|UNHEALTHY_MAINTENANCE) return 1 ;;           # gcloud itself does not answer; the slice comes back by itself
        TIMEOUT) [ "$silent" -ge 3 ]; return ;;         # setup_tpu.sh waits, and deletes it if it stays silent
    esac
    if [ "$silent" -lt 10 ]; then return 1; fi
    case " ${slice_flags[*]} " in *" --replace_silent "*) return 0 ;; esac
    note "look by: $(how_to_look)"
    ended 2 "Google Cloud: $TPU_NAME is READY and $SILENT, and its hosts have not answered ten times: nothing is deleted, and the run may be well. --replace_silent deletes such a slice and asks for another"
}

note "commit $COMMIT, slice $TPU_NAME, at most $max_attempts attempts and $max_hours hours"
while :; do
    look_at_run
    check_type
    if [ "$RUN_STATE $RUN_WHY" != "$before" ]; then note "$RUN_STATE ($RUN_WHY)"; fi
    before="$RUN_STATE $RUN_WHY"
    if [ -n "$SILENT" ] && [ "$RUN_STATE" = unknown ]; then silent=$((silent + 1)); else silent=0; fi
    case "$RUN_STATE $RUN_WHY" in
        finished*) ended 0 "finished" ;;
        running*) seen=yes up=$((up + 1)) ;;
        "failed "*"status 2"*)
            if [ -n "$seen" ]; then ended 2 "a mistake that another attempt would not mend: see bash scripts/launch_experiment.sh logs $RUN_NAME"; fi ;;
        stopped*) if [ -n "$seen" ]; then ended 143 "stopped by its user: not started again"; fi ;;
    esac
    if [ "$(date +%s)" -ge "$end" ]; then ended 1 "the $max_hours hours are spent; run and slice are left as they are"; fi
    if [ "$RUN_STATE" = running ]; then sleep "$poll"; continue; fi
    if [ "$RUN_STATE" = unknown ] && ! worth_an_attempt; then sleep "$poll"; continue; fi
    if [ "$attempts" -ge "$max_attempts" ]; then ended 1 "the $max_attempts attempts are spent; the slice is left as it is"; fi
    # A run that SIGTERM ends soon after its start counts as a crash here: the host is about to go
    case "$RUN_STATE $NODE" in failed*|"preempted READY")
        if [ -n "$seen" ] && [ "$waited" != "$attempts" ] && { [ "$RUN_STATE" = failed ] || [ "$up" -lt 10 ]; }; then back_off; continue; fi ;;
    esac
    attempts=$((attempts + 1)) status=0 silent=0
    left=$(awk -v now="$(date +%s)" -v end="$end" 'BEGIN {printf "%.4f", (end - now) / 3600}')
    note "attempt $attempts"
    MAY_EXIST=yes       # setup_tpu.sh says nothing of it under this script
    setup "$left" || status=$?
    if [ "$status" = 0 ]; then launch || status=$?; fi
    why=$(grep '^error: ' "$SCRATCH/attempt" | tail -n 1 | cut -c8-) || true
    case "$status" in
        0) note "attempt $attempts: started"; seen=yes ;;
        2) look_at_run      # it may have been started from elsewhere meanwhile
           if [ "$RUN_STATE" != running ]; then note "attempt $attempts: not tried again"; ended 2 "$why"; fi ;;
        3) note "attempt $attempts: no room for the slice; it is asked for again ($why)"; attempts=$((attempts - 1)); sleep "$poll" ;;
        *) note "attempt $attempts: did not start (status $status: $why)"; back_off ;;
    esac
done
