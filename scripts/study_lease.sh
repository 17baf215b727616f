#!/bin/sh
# Runs as many points of a study as fit a lease of a GPU machine, on all of its GPUs or those that GPUS lists, and leaves
# their results in one small archive, which is written anew whenever a point is done. SWEEP names the study, a file of
# configs/sweeps/ (window), and STREAM its text (python_source-8192).
#
#   scripts/study_lease.sh OUT SECONDS [flags of rattn.sweep]
#
# OUT gets SWEEP.tar.xz (all results so far), SWEEP-logs.tar.xz (metrics.jsonl and train.log of every point) and, where
# points failed, failures.txt. Needs neither TensorFlow nor seqio.
#
# Before a lease, build/study/ holds STREAM.tar.xz (python -m scripts.pack_stream). Points whose results
# docs/window_study/SWEEP.tar.xz has are not run again. A point that would not fit SECONDS is not started, for a machine
# that is given back keeps no checkpoint; where another call follows on the same machine, --cut_points fills this one to
# its end, and the next goes on in the middle of a point. What to do with the results: docs/window_study.md.
#
# PROCESSES sweeps share each GPU and its memory (a point takes 16 GiB: give 3 on 80 GB). One of them trains at a time, so
# that step times are true, while the others compile and evaluate.
set -u
if [ $# -lt 2 ]; then
  echo "study_lease.sh: give OUT (a folder) and SECONDS, then flags of rattn.sweep." >&2
  exit 1
fi
out=$1 seconds=$2 processes=${PROCESSES:-4} study=${SWEEP:-window} stream=${STREAM:-python_source-8192}
shift 2
started=$(date +%s)
python=${PYTHON:-python3}
# A second seed, and the second budget's evaluation, compile nothing again.
export JAX_COMPILATION_CACHE_DIR="${JAX_COMPILATION_CACHE_DIR:-$PWD/build/jax_cache}"
export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0
export PYTHONUNBUFFERED=1
XLA_PYTHON_CLIENT_MEM_FRACTION=$(awk "BEGIN { print 0.92 / $processes }")
export XLA_PYTHON_CLIENT_MEM_FRACTION
"$python" -m scripts.pack_stream unpack "build/study/$stream.tar.xz" data || exit 1
known=docs/window_study/$study.tar.xz
if [ -f "$known" ]; then
  "$python" -m rattn.sweep --workdir "runs/$study" --merge "$known" --noreport || exit 1
fi
count=$(ls -d /dev/nvidia[0-9]* 2> /dev/null | wc -l)
gpus=${GPUS:-$(seq 0 $((count > 0 ? count - 1 : 0)))}
mkdir -p "$out"
sweeps=
for _ in $(seq "$processes"); do
  for gpu in $gpus; do
    CUDA_VISIBLE_DEVICES=$gpu "$python" -m rattn.sweep --config configs/small.py --sweep "configs/sweeps/$study.py" \
      --workdir "runs/$study" --budget_seconds "$((seconds - $(date +%s) + started))" --train_alone --delete_checkpoints \
      --noreport --archive "$out/$study.tar.xz" "$@" &
    sweeps="$sweeps $!"
  done
done
status=0
for sweep in $sweeps; do
  wait "$sweep"
  # 75: points are left, which a lease that is over is expected to say.
  case $? in 0 | 75) ;; *) status=1 ;; esac
done
mkdir -p "runs/$study/points"
find "runs/$study/points" \( -name metrics.jsonl -o -name train.log \) -printf '%P\n' |
  tar -cJf "$out/$study-logs.tar.xz" -C "runs/$study/points" -T -
for failure in "runs/$study"/failures/*.json; do
  [ -f "$failure" ] || continue
  cat "$failure"
  tail -n 40 "runs/$study/points/$(basename "$failure" | sed 's/\.[0-9a-f]*\.json$//')/"*.log
done > "$out/failures.txt"
[ -s "$out/failures.txt" ] || rm "$out/failures.txt"
exit $status
