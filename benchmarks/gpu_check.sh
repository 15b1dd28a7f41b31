#!/usr/bin/env bash
set -euo pipefail

usage() {
  cat <<'END'
Build, test and measure slowfast_ext on a machine with a GPU, torch with CUDA (2.11 or newer) and no network.

    benchmarks/gpu_check.sh OUT_DIR [STAGE...]
    WHEELS=wheels benchmarks/gpu_check.sh out build test '*check'
    benchmarks/gpu_check.sh out 'latency_r50_4x16_bfloat16_*'
    benchmarks/gpu_check.sh --list

Stages are named or given as shell patterns, and run in the order of --list; without any, all run:

    build                     install the module with its kernels, for the `python` of the PATH
    test                      every test that needs a GPU
    memcheck, racecheck, initcheck, synccheck
                              compute-sanitizer over check_operators.py
    latency_MODEL_DTYPE_BATCH whole networks: plain PyTorch, torch.compile, accelerate and the engine
    autotune_MODEL_BATCH      the same in bfloat16, against torch.compile with max-autotune
    layers_MODEL_DTYPE_BATCH  every layer and fused block, beside its floor
    training_MODEL_DTYPE_BATCH
                              training steps: plain PyTorch and accelerate
    graphs_MODEL_DTYPE_BATCH  the same compiled into CUDA graphs, which takes minutes
    curves_DTYPE              the loss of 200 steps, plain and fused

OUT_DIR gets STAGE.log, STAGE.json of the benchmarks, test.xml, environment.log and summary.txt, each below 16 MB. What
stages of an earlier run left there stays, unless they run again.

    WHEELS         folder with wheels of the requirements that are not installed
    COMMIT         that the tree is of, if it was copied without its repository (git describe --always --dirty)
    STAGE_SECONDS  after which a stage is ended (default 520: below nine minutes)

Exit status: 0 if all stages passed; 1 if one failed; 2 for bad arguments; 3 if none failed, but one could not run.
END
}

: "${STAGE_SECONDS:=520}"
readonly unavailable=69 # of a stage whose tool is missing; EX_UNAVAILABLE of sysexits.h
readonly log_bytes=14000000
declare -A zoo=(
  [r50_4x16]=slowfast_r50_4x16x1_256e_kinetics400_rgb
  [r50_8x8]=slowfast_r50_8x8x1_256e_kinetics400_rgb
  [r101_8x8]=slowfast_r101_8x8x1_256e_kinetics400_rgb
)

list_stages() {
  local model
  printf '%s\n' build test memcheck racecheck initcheck synccheck
  for model in r50_4x16 r50_8x8 r101_8x8; do
    printf '%s\n' "latency_${model}_"{bfloat16,float16,float32}_{batch1,batch30}
  done
  for model in r50_4x16 r50_8x8 r101_8x8; do
    printf '%s\n' "autotune_${model}_"{batch1,batch30}
  done
  for model in r50_4x16 r50_8x8 r101_8x8; do
    printf '%s\n' "layers_${model}_"{bfloat16,float16,float32}_{batch1,batch30}
  done
  for model in r50_4x16 r50_8x8 r101_8x8; do
    printf '%s\n' "training_${model}_"{bfloat16,float16,float32}_batch8
  done
  for model in r50_4x16 r50_8x8 r101_8x8; do
    printf '%s\n' "graphs_${model}_bfloat16_batch8"
  done
  printf '%s\n' curves_{bfloat16,float16,float32}
}

refuse() {
  printf 'gpu_check: %s\n' "$1" >&2
  exit 2
}

# What is left of the stage's time, for one of its commands.
limited() {
  local left=$((deadline - SECONDS))
  ((left > 0)) || return 124
  timeout --kill-after=10 "$left" "$@"
}

find_sanitizer() {
  local home packages
  command -v compute-sanitizer && return
  for home in "${CUDA_HOME:-}" "${CUDA_PATH:-}" /usr/local/cuda; do
    if [[ -n $home && -x $home/bin/compute-sanitizer ]]; then
      printf '%s\n' "$home/bin/compute-sanitizer"
      return
    fi
  done
  # The toolkit of pip's nvidia packages.
  packages=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/nvidia
  [[ ! -d $packages ]] || find "$packages" -name compute-sanitizer -type f -perm -u+x -print -quit
}

describe_environment() {
  printf 'date      %s\n' "$(date -u +%Y-%m-%dT%H:%M:%SZ)"
  printf 'commit    %s\n' "$(git describe --always --dirty --abbrev=40 2>/dev/null || printf '%s' "${COMMIT:-unknown}")"
  printf 'system    %s, %s cores\n' "$(uname -srm)" "$(nproc)"
  printf 'sanitizer %s\n' "${sanitizer:-not available}"
  python - <<'END' || true
import platform, sys

print(f"python    {platform.python_version()}, {sys.executable}")
import torch

print(f"torch     {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
END
  timeout 60 nvidia-smi || printf 'nvidia-smi does not run\n'
}

build() {
  local install=(limited python -m pip --disable-pip-version-check install --no-index)
  [[ -z ${WHEELS:-} ]] || install+=(--find-links "$WHEELS")
  # Without isolation pip looks for no build requirement; the second line has the tests' own imports.
  "${install[@]}" 'setuptools>=77' ninja &&
    "${install[@]}" pytest 'av>=12' &&
    SLOWFAST_EXT_CUDA=1 "${install[@]}" -v --no-build-isolation .
}

sanitize() {
  local tool=$1 options=()
  if [[ -z $sanitizer ]]; then
    printf 'compute-sanitizer is not on the PATH, in the CUDA toolkit or in pip packages\n'
    return "$unavailable"
  fi
  # Without torch's cache each tensor is an allocation of its own, whose ends and first writes the tools see. Torch makes
  # API calls that may fail and does not mind; the kernels' own launches are checked by the module.
  [[ $tool != memcheck ]] || options=(--padding 256 --report-api-errors no)
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 limited "$sanitizer" --tool "$tool" --error-exitcode 1 "${options[@]}" \
    python benchmarks/check_operators.py --device cuda
}

# Runs a benchmark on what the second argument, NAME_MODEL_DTYPE_BATCH, says.
benchmark() {
  local script=$1 name=$2
  [[ $name =~ ^[a-z]+_(r[0-9]+_[0-9]+x[0-9]+)_([a-z0-9]+)_batch([0-9]+)$ ]] || return 2
  limited python "benchmarks/$script" --device cuda --model "${zoo[${BASH_REMATCH[1]}]}" --dtype "${BASH_REMATCH[2]}" \
    --batch "${BASH_REMATCH[3]}" --json "$out/$stage.json" "${@:3}"
}

run_stage() {
  local stage=$1
  case $stage in
    build) build ;;
    test) FAIL_WITHOUT_CUDA=1 limited python -m pytest -m cuda --durations=10 --junit-xml="$out/test.xml" ;;
    *check) sanitize "$stage" ;;
    latency_*) benchmark latency.py "$stage" --seconds 30 ;;
    autotune_*)
      benchmark latency.py "${stage/_batch/_bfloat16_batch}" --seconds 20 \
        --variants eager_channels_last,compile_max_autotune,accelerate,engine
      ;;
    layers_*) benchmark layers.py "$stage" --seconds 90 ;;
    training_*) benchmark training.py "$stage" --seconds 60 --variants eager,eager_channels_last,accelerate ;;
    graphs_*)
      benchmark training.py "$stage" --seconds 30 --variants eager_channels_last,graphs,accelerate,accelerate_graphs
      ;;
    curves_*) limited python benchmarks/training_curves.py --device cuda --dtype "${stage#curves_}" \
      --json "$out/$stage.json" ;;
  esac
}

# The beginning and the end of a log that is too long to be carried away.
shorten() {
  local log=$1
  (($(wc -c <"$log") > log_bytes)) || return 0
  {
    head -c $((log_bytes / 2)) "$log"
    printf '\n[gpu_check: the middle was left out]\n'
    tail -c $((log_bytes / 2)) "$log"
  } >"$log.short"
  mv "$log.short" "$log"
}

# Puts what matches the patterns into stages.
choose_stages() {
  local pattern stage found
  local -A wanted=()
  for pattern in "$@"; do
    found=
    for stage in "${all_stages[@]}"; do
      # shellcheck disable=SC2053  # a pattern is meant
      if [[ $stage == $pattern ]]; then
        wanted[$stage]=1
        found=1
      fi
    done
    [[ -n $found ]] || refuse "STAGE must be a name or pattern of those of --list, got '$pattern'"
  done
  for stage in "${all_stages[@]}"; do
    [[ -z ${wanted[$stage]:-} ]] || stages+=("$stage")
  done
}

check_arguments() {
  [[ -n $out && $out != -* ]] || refuse "OUT_DIR must be a folder (see --help), got '$out'"
  [[ $STAGE_SECONDS =~ ^[1-9][0-9]*$ ]] || refuse "STAGE_SECONDS must be a positive integer, got '$STAGE_SECONDS'"
  [[ -z ${WHEELS:-} || -d $WHEELS ]] || refuse "WHEELS must be a folder, got '$WHEELS'"
  command -v python >/dev/null || refuse "python must be on the PATH, got '$PATH'"
  mkdir -p -- "$out" 2>/dev/null || refuse "OUT_DIR must be a folder that can be made, got '$out'"
  [[ -w $out && -x $out ]] || refuse "OUT_DIR must be a writable folder, got '$out'"
}

outcome_of() {
  local status=$1
  if ((status == unavailable)); then
    printf 'not available'
  elif ((SECONDS >= deadline && (status == 124 || status == 137))); then
    printf '%s, timed out' "$status"
  else
    printf '%s' "$status"
  fi
}

main() {
  case ${1:-} in
    -h | --help) usage && exit ;;
    --list) list_stages && exit ;;
  esac
  mapfile -t all_stages < <(list_stages)
  out=${1:-}
  stages=()
  if (($# > 1)); then choose_stages "${@:2}"; else stages=("${all_stages[@]}"); fi
  check_arguments
  out=$(realpath -- "$out")
  [[ -z ${WHEELS:-} ]] || WHEELS=$(realpath -- "$WHEELS")
  cd "$(dirname -- "${BASH_SOURCE[0]}")/.."

  local stage status began worst=0 row='%-34s %-14s %8s  %s\n'
  sanitizer=$(find_sanitizer) || sanitizer=
  describe_environment 2>&1 | tee "$out/environment.log"
  # shellcheck disable=SC2059  # one format for the header and the rows
  printf "$row" stage 'exit status' seconds 'log file' >"$out/summary.txt"
  for stage in "${stages[@]}"; do
    printf '\n== %s\n' "$stage"
    rm -f -- "$out/$stage".{log,json,xml}
    began=$SECONDS
    deadline=$((SECONDS + STAGE_SECONDS))
    status=0
    run_stage "$stage" >"$out/$stage.log" 2>&1 || status=$?
    # shellcheck disable=SC2059
    printf "$row" "$stage" "$(outcome_of "$status")" $((SECONDS - began)) "$stage.log" >>"$out/summary.txt"
    shorten "$out/$stage.log"
    tail -n 15 "$out/$stage.log"
    case $status in
      0) ;;
      "$unavailable") ((worst != 0)) || worst=3 ;;
      *) worst=1 ;;
    esac
  done
  printf '\n'
  cat "$out/summary.txt"
  exit "$worst"
}

main "$@"
