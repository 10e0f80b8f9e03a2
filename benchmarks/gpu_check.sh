#!/usr/bin/env bash
# All tests and benchmarks of our kernels on this machine's GPU, with the results in one folder.
#
#   benchmarks/gpu_check.sh RESULTS              # all of it
#   benchmarks/gpu_check.sh RESULTS build tests  # some parts
#
# Parts: build tests sanitize static both half tf32 one_direction negatives rules. Each writes
# RESULTS/PART.log. A benchmark also writes its CSV and plots to RESULTS/PART, rules to a folder for
# each rule. The exit status is 1 where a part failed. The test extra's packages must be installed.
# pip install '.[peers]' installs the peers. Those that are not installed are left out.
#   PYTHON   the interpreter (python3)
#   SECONDS_EACH   timing of each measurement (0.3)
set -uo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 1 ] || { sed -n '2,12s/^# \{0,1\}//p' "$0"; exit 2; }
results=$1
shift
python=${PYTHON:-python3}
[ $# -ge 1 ] || set -- \
  build tests sanitize static both half tf32 one_direction negatives rules
mkdir -p "$results"
failed=()

bench() { # PART, arguments of the benchmark
  local part=$1
  shift
  "$python" benchmarks/loss_bench.py --device cuda --data random --out "$results/$part" \
    --seconds "${SECONDS_EACH:-0.3}" "$@"
}

run() {
  case $1 in
    build) LLAVE_CUDA=1 "$python" -m pip install --no-deps --no-build-isolation --editable . ;;
    tests) "$python" -m pytest tests ;;
    sanitize) PYTHON=$python bash tests/gpu/sanitize.sh ;;
    static) "$python" benchmarks/static.py --out "$results/static" ;;
    both)
      bench both --dtype bfloat16 --dims 384 896 1536 3584 \
        --sizes 256 1024 4096 8192 16384 32768 65536
      ;;
    half) bench half --dtype float16 --dims 1536 --sizes 4096 16384 ;;
    tf32) bench tf32 --dtype tf32 --dims 1536 --sizes 4096 16384 ;;
    one_direction)
      bench one_direction --dtype bfloat16 --one-direction --alpha 0 --dims 1536 4096 \
        --sizes 1024 4096 16384 32768
      ;;
    negatives) bench negatives --dtype bfloat16 --negatives 3 --dims 1536 --sizes 1024 4096 16384 ;;
    rules)
      for rule in owners ids margin all; do
        bench "rules_$rule" --dtype bfloat16 --rule "$rule" --dims 384 1536 \
          --sizes 1024 4096 16384 || return 1
      done
      ;;
    *) echo "no part $1" && return 2 ;;
  esac
}

for part in "$@"; do
  echo "$part ..."
  if ! run "$part" >"$results/$part.log" 2>&1; then
    failed+=("$part")
  fi
done

echo
nvidia-smi --query-gpu=name,driver_version --format=csv,noheader
tail -n 1 "$results/tests.log" 2>/dev/null
csvs=("$results"/*/loss_bench.csv)
if [ -e "${csvs[0]}" ]; then "$python" benchmarks/report.py "${csvs[@]}"; fi
grep -h "left out" "$results"/*.log 2>/dev/null | sort -u
for part in ${failed[*]-}; do
  echo "FAILED: $part, see $results/$part.log:"
  tail -n 3 "$results/$part.log"
done
[ ${#failed[@]} -eq 0 ]
