#!/usr/bin/env bash
# All benchmarks that need GPUs, inside 10 minutes: benchmarks/run_all.sh [--ranks 2|4|8] [--out FOLDER]
#
# One process a GPU, as many as --ranks says (default: one for each GPU). FOLDER (default: results) gets results.json,
# a picture and the printed table of each benchmark. A benchmark that fails or takes too long does not keep the others
# from running; the exit code tells. With more ranks than GPUs times mean nothing, and the work is cut down: the results
# say so.
set -euo pipefail
cd "$(dirname "$0")/.."
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

gpus=$(python3 -c 'import torch; print(torch.cuda.device_count())')
ranks=$gpus out=results
while (($#)); do
  case "$1" in
    --ranks) ranks=${2:?--ranks needs a number}; shift 2 ;;
    --out) out=${2:?--out needs a folder}; shift 2 ;;
    *) echo "usage: $0 [--ranks N] [--out FOLDER]" >&2; exit 2 ;;
  esac
done
if ((gpus == 0)); then
  echo "no GPU here: nothing to measure" >&2
  exit 1
fi
mkdir -p "$out"
rm -f "$out"/results.json
python3 csrc/build.py # the kernels measured are those of this checkout

# run SECONDS NAME [arguments]: benchmarks/NAME.py with a limit; its table goes to NAME.txt too.
failed=0
run() {
  local seconds=$1 name=$2 began=$SECONDS
  shift 2
  rm -f "$out/$name.json" "$out/$name.png"
  echo "== $name $*"
  timeout --kill-after=5 "$seconds" python3 "benchmarks/$name.py" --out "$out" "$@" 2>&1 | tee "$out/$name.txt" ||
    { echo "== $name failed" >&2; failed=1; }
  echo "== $name took $((SECONDS - began)) s"
}

# The limits add up to nine minutes and twenty seconds. Megatron-Core's layer is left out, because torch.compile makes its
# kernels first: benchmarks/layer.py without --peers measures it too.
if ((ranks > gpus)); then
  run 120 normal --ranks "$ranks" --tokens 128 --sms 8
  run 120 low_latency --ranks "$ranks" --tokens 1 32 --max-tokens 32 --communicators low_latency normal
  run 120 layer --ranks "$ranks" --tokens 128 --shapes qwen3_235b_ep8
else
  run 150 normal --ranks "$ranks"
  run 130 low_latency --ranks "$ranks"
  run 150 layer --ranks "$ranks" --peers all_to_all all_gather
fi
run 130 experts --ranks 1 # no communication: one GPU shows it all
python3 benchmarks/merge.py "$out" normal low_latency layer experts || failed=1
exit "$failed"
