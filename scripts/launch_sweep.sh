#!/usr/bin/env bash
# The cells of a study, configuration x seed, trained one after another or several at once; see scripts/sweep.py.
set -euo pipefail

usage() {
    cat <<'TEXT'
usage: bash scripts/launch_sweep.sh CONFIG... [section.key=value ...] --local [options]
       bash scripts/launch_sweep.sh CONFIG... [section.key=value ...] --slices SLICE... [options] [-- FLAGS]

Trains every configuration (files, or a quoted glob pattern) with every seed. The same command goes on where it was stopped or
killed, on the same host or, with the ledger in a bucket, on another; finished cells are skipped, failed ones are tried again.
All configurations are checked before anything starts, each for every slice.

  --local             on this host
  --jobs N            N cells at once (default 1); they share the host's cores
  --max_steps N       stop every cell after step N, as a first look; the same command without it goes on from there
  --slices SLICE...   on these TPU slices, one cell at a time on each, by scripts/keep_alive.sh, which makes them, and makes
                      them again
  --delete_when_done  delete a slice, with its queued resource, as soon as no cell is left that could run on it. A slice that
                      another launcher uses or on which something runs is left alone; after Ctrl-C nothing is deleted
  --seeds K...        seeds (training.seed); a run is then named CONFIG_seedK (default: the configuration's own seed, CONFIG)
  --max_attempts N    failures of a cell before it is given up (default 3); one that ends by its user's mistake (status 2) is given up at once
  --retry_failed      try the cells again that were given up
  --ledger URL        folder of the ledger, local or gs:// (default: logging.output_dir/sweep, for slices in the bucket)
  --dry_run           print the cells, how they stand and their commands; nothing is started
  --status            print the ledger as a table, in place of --local or --slices ... (or with them, where there are two);
                      without CONFIG all of its cells
  -- FLAGS            more flags for scripts/keep_alive.sh, the same for all slices, as -- --max_hours 100

A SLICE is NAME, or NAME and what is its own, in any order, each after a colon: its type, its zone, spot, queued. What it does
not say is as the configuration and FLAGS have it; a slice is on demand where neither says spot:

  --slices trm-a:v4-64 trm-b:v4-64:spot trm-c:v6e-16:europe-west4-a:spot trm-d:v5litepod-16:us-central1-a:spot:queued

A cell stays with the slice that it was begun on while that is one of --slices; otherwise another goes on with it, whatever
its type. Hours on different types do not compare. The bucket is in one region: checkpoints and data to and from a slice in
another one cost money and time.

Ctrl-C and SIGTERM go to the cells, which save and end (a run on a slice goes on there): exit status 130 and 143. Otherwise 0
where every cell is finished (or at step --max_steps), 1 where one is not, 2 after a mistake in the command. At its end a
sweep on slices prints for each slice that is left the command that deletes it. What a cell prints is in
<ledger>/<cell>/output.log, or, with the ledger in a bucket, in the file that the launcher names.

environment variables: TRM_VENV, TRM_PYTHON (see scripts/environment.sh), TRM_CACHE; for slices TPU_PROJECT, TPU_ZONE, TPU_BUCKET
TEXT
}

for argument in "$@"; do
    case "$argument" in --help|-h) usage; exit 0 ;; esac
done
cd "$(dirname "${BASH_SOURCE[0]}")/.."
. scripts/environment.sh
set_up_environment >&2
exec "$PYTHON" scripts/sweep.py "$@"
