#!/usr/bin/env bash
# Trains on every host of a Cloud TPU VM slice, and starts again whenever the run asks for it (exit status 75).
#
#   scripts/tpu_pod.sh TPU_NAME ZONE --config configs/rattn_3b.py --workdir gs://bucket/rattn_3b
#
# The repository must be at ~/rattn on every host, with `make .venv/installed` done there. Needs gcloud and a slice.
set -euo pipefail
[ $# -ge 4 ] || { echo "usage: $0 TPU_NAME ZONE --config RECIPE [--workdir FOLDER] [--config.key=value …]" >&2; exit 1; }
name=$1 zone=$2
shift 2
arguments=$(printf ' %q' "$@")
exec gcloud compute tpus tpu-vm ssh "$name" --zone "$zone" --worker=all --command "
cd ~/rattn || exit 1
while true; do
  .venv/bin/python -m rattn.train --distributed$arguments
  status=\$?
  [ \$status -eq 75 ] || exit \$status
  echo 'Told to stop and saved; starting again.'
done"
