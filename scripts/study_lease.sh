#!/bin/sh
# Runs as many points of a study as fit a lease of a GPU machine, and leaves their results in one small archive.
#
#   scripts/study_lease.sh STUDY OUT SECONDS [flags of rattn.sweep]
#
# STUDY is window or recall. OUT gets STUDY.tar.xz (all results so far) and, where points failed, failures.txt. Before a
# lease, build/study/ holds python_source-8192.tar.xz (python -m scripts.pack_stream) and, from the lease before,
# STUDY.tar.xz, whose points are not run again. Within a lease the same call goes on where the last one stopped, in the
# middle of a point too; in a lease's last call --nocut_points starts nothing that would not fit. Needs neither
# TensorFlow nor seqio. Afterwards, elsewhere:
#
#   python -m rattn.sweep --merge OUT/window.tar.xz --workdir runs/window --report_only
set -u
study=$1 out=$2 seconds=$3
shift 3
python=${PYTHON:-python3}
case $study in
  window) config=configs/small.py ;;
  recall) config=configs/recall.py ;;
  *) echo "study_lease.sh: there is no study '$study'; name window or recall." >&2; exit 1 ;;
esac
started=$(date +%s)
# A second seed of the same shapes compiles nothing again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/build/jax_cache}"
export PYTHONUNBUFFERED=1
if [ "$study" = window ]; then
  "$python" -m scripts.pack_stream unpack build/study/python_source-8192.tar.xz data || exit 1
fi
[ -f "build/study/$study.tar.xz" ] && set -- --merge "build/study/$study.tar.xz" "$@"
mkdir -p "$out"
"$python" -m rattn.sweep --config "$config" --sweep "configs/sweeps/$study.py" --workdir "runs/$study" \
  --budget_seconds "$((seconds - $(date +%s) + started))" --cut_points --delete_checkpoints --noreport \
  --archive "$out/$study.tar.xz" "$@"
status=$?
for failure in "runs/$study/failures/"*.json; do
  [ -f "$failure" ] || continue
  cat "$failure"
  tail -n 40 "runs/$study/points/$(basename "$failure" | sed 's/\.[0-9a-f]*\.json$//')/"*.log
done > "$out/failures.txt"
[ -s "$out/failures.txt" ] || rm "$out/failures.txt"
# 75: points are left, which a lease that is over is expected to say.
[ $status -eq 75 ] && exit 0
exit $status
