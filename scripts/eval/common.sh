# What the scripts of this folder share. Each is one of LLaVA's scripts/v1_5/eval/*.sh, answered through llava_prune.
#
# Settings, in the environment or as arguments: bash scripts/eval/pope.sh MODE=origin
#   MODEL, MODEL_BASE     checkpoint; and its base model, if it is a LoRA
#   MODE                  hard, masked, or origin, which needs neither of the next two
#   PRUNERS               output directory of a pruner training; with AVERAGE_TOKENS=N at exactly that budget
#   BASELINE              a training-free method instead, at AVERAGE_TOKENS=N
#   EVAL                  LLaVA's folder of benchmark data
#   RESULTS               folder of its BENCHMARK.json, which all.sh makes its table of
#   CUDA_VISIBLE_DEVICES  one process a GPU, each with a chunk of the questions
#
# A run's files are named after the last part of MODEL and PRUNERS; EVAL/results/NAME/settings.txt says of which they
# are, and another run of that name is refused.
set -euo pipefail

SETTINGS="MODEL MODEL_BASE MODE PRUNERS BASELINE AVERAGE_TOKENS EVAL RESULTS CONV_MODE CHUNKS CUDA_VISIBLE_DEVICES BENCHMARKS TEST_QUESTIONS"
for SETTING in "$@"; do
    [[ " $SETTINGS " == *" ${SETTING%%=*} "* && $SETTING == *=* ]] || { echo "$0: '$SETTING' is no setting; write NAME=value, as MODE=origin, with one of $SETTINGS" >&2; exit 2; }
    export "${SETTING?}"
done

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
EVAL=${EVAL:-./playground/data/eval}
MODE=${MODE:-hard}
MODEL=${MODEL:-}
MODEL_BASE=${MODEL_BASE:-}
DEFAULT_MODEL=liuhaotian/llava-v1.5-7b
PRUNERS=${PRUNERS:-}
BASELINE=${BASELINE:-}
AVERAGE_TOKENS=${AVERAGE_TOKENS:-}
CONV_MODE=${CONV_MODE:-vicuna_v1}
EVAL_ZIP="from LLaVA's eval.zip, https://drive.google.com/file/d/1atZSBBrAX54yYpxtVVW33zFvcnaHeFPy"

gpu_list="${CUDA_VISIBLE_DEVICES:-0}"
IFS=',' read -ra GPULIST <<< "$gpu_list"
CHUNKS=${CHUNKS:-${#GPULIST[@]}}

# the environment that is active, if it has LLaVA; else .venv
# in LLaVA's checkout its folder would pass for an installed package, so torch is asked for as well
if ! python -c 'import importlib.util as u, sys; sys.exit(None in map(u.find_spec, ("torch", "llava")))' 2> /dev/null; then
    bash "$ROOT/scripts/setup.sh"
    export PATH=$ROOT/.venv/bin:$PATH
fi
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} TOKENIZERS_PARALLELISM=false

# what is pruned, in a name: "", a folder's name, or a baseline's, with the budget if one is set
method_name() {
    [ "$1" = origin ] || echo "$(basename "${BASELINE:-$PRUNERS}")${AVERAGE_TOKENS:+-$AVERAGE_TOKENS}"
}

# MODE -> the name of a run's files, in place of LLaVA's "llava-v1.5-13b"
run_name() {
    local method
    method=$(method_name "$1")
    echo "$(basename "${MODEL:-$DEFAULT_MODEL}")-$1${method:+-$method}"
}

# a folder by its absolute path, also if it is still to be made, as mosaic's; a name on the hub, ORG/NAME, as it is
absolute() {
    if [[ -d $1 || $1 = */*/* ]]; then realpath -m -- "$1"; else echo "$1"; fi
}

# MODE -> what determines the answers of a run
settings() {
    echo "MODEL=$(absolute "${MODEL:-$DEFAULT_MODEL}")"
    echo "MODEL_BASE=$(absolute "$MODEL_BASE")"
    echo "CONV_MODE=$CONV_MODE"
    echo "MODE=$1"
    if [ "$1" != origin ]; then
        echo "PRUNERS=${PRUNERS:+$(realpath -m -- "$PRUNERS")}"
        echo "BASELINE=$BASELINE"
        echo "AVERAGE_TOKENS=$AVERAGE_TOKENS"
    fi
}

# check_mode MODE: stop here, before anything is overwritten, if MODE lacks what it needs or another run has its name
check_mode() {
    [[ $1 = origin || -n $PRUNERS$BASELINE ]] || {
        echo "$0: MODE=$1 needs PRUNERS=DIR, or BASELINE=NAME AVERAGE_TOKENS=N; MODE=origin needs none" >&2; exit 2; }
    local folder asked there
    folder=$EVAL/results/$(run_name "$1")
    asked=$(settings "$1")
    [ -e "$folder/settings.txt" ] || return 0
    there=$(< "$folder/settings.txt")
    [ "$asked" = "$there" ] || {
        printf '%s\n' "$0: $folder is of another run, and this one would overwrite its answers. There:" "$there" \
            "Asked for:" "$asked" "Set another EVAL, or remove $folder" >&2; exit 2; }
}

# begin BENCHMARK: settle what runs, and forget what an earlier run of the same name found
begin() {
    check_mode "$MODE"
    BENCHMARK=$1
    MISSING=()
    MODEL=${MODEL:-$DEFAULT_MODEL}
    CKPT=$(run_name "$MODE")
    RESULTS=${RESULTS:-$EVAL/results/$CKPT}
    METHOD=(--mode "$MODE")
    if [ "$MODE" != origin ]; then
        [ -z "$PRUNERS" ] || METHOD+=(--pruners "$PRUNERS")
        [ -z "$BASELINE" ] || METHOD+=(--baseline "$BASELINE")
        [ -z "$AVERAGE_TOKENS" ] || METHOD+=(--average_tokens "$AVERAGE_TOKENS")
    fi
    mkdir -p "$RESULTS" "$EVAL/results/$CKPT"
    # renamed, as another benchmark of this run may be reading it
    settings "$MODE" > "$EVAL/results/$CKPT/settings.txt.$$"
    mv "$EVAL/results/$CKPT/settings.txt.$$" "$EVAL/results/$CKPT/settings.txt"
    rm -f "$RESULTS/$BENCHMARK.json" "$RESULTS/$BENCHMARK.missing"
}

# need PATH WHERE_FROM
need() {
    [ -e "$1" ] || MISSING+=("$1: $2")
}

# need_packages NAME...: Python packages that LLaVA's own requirements do not bring
need_packages() {
    python -c "import $(IFS=,; echo "$*")" || { echo "$BENCHMARK needs: pip install $*" >&2; exit 1; }
}

# stop here, with status 3, if anything that was needed is not there
have_all() {
    [ ${#MISSING[@]} = 0 ] && return
    printf '%s\n' "${MISSING[@]}" > "$RESULTS/$BENCHMARK.missing"
    printf "$BENCHMARK needs %s\n" "${MISSING[@]}" >&2
    exit 3
}

# answer MODULE ARGUMENTS: LLaVA's program and arguments, except --model-path and the chunks, which are added here.
# The chunks go where LLaVA puts them: beside merge.jsonl, or into a folder named after the answers file.
answer() {
    local program=$1 questions= answers= folder IDX PID arguments=() pids=() chunks=()
    shift
    while (($#)); do
        case $1 in
            --question-file) questions=$2 ;;
            --answers-file) answers=$2; shift 2; continue ;;
        esac
        arguments+=("$1")
        shift
    done
    folder=${answers%.jsonl}
    [ "$(basename "$answers")" != merge.jsonl ] || folder=$(dirname "$answers")
    rm -f "$answers" "${answers%.jsonl}.report.jsonl"
    # LLaVA makes fewer chunks than asked of few questions
    [ "$CHUNKS" = 1 ] || CHUNKS=$(python -m llava_prune.evaluation.questions "$questions" --chunks "$CHUNKS")

    for IDX in $(seq 0 $((CHUNKS-1))); do
        chunks+=("$folder/${CHUNKS}_${IDX}.jsonl")
        CUDA_VISIBLE_DEVICES=${GPULIST[$((IDX % ${#GPULIST[@]}))]} python -m llava_prune run \
            "${METHOD[@]}" \
            --report "$folder/${CHUNKS}_${IDX}.report.jsonl" \
            -m "$program" \
            --model-path "$MODEL" \
            ${MODEL_BASE:+--model-base "$MODEL_BASE"} \
            "${arguments[@]}" \
            --answers-file "${chunks[$IDX]}" \
            --num-chunks "$CHUNKS" \
            --chunk-idx "$IDX" &
        pids+=($!)
    done
    # background processes of a script do not get the terminal's Ctrl-C
    trap 'kill "${pids[@]}" 2> /dev/null' INT TERM
    for PID in "${pids[@]}"; do
        wait "$PID" || { echo "$BENCHMARK: a chunk failed, see above" >&2; kill "${pids[@]}" 2> /dev/null; exit 1; }
    done
    trap - INT TERM

    python -m llava_prune.evaluation.merge --question-file "$questions" --answers-file "$answers" "${chunks[@]}"
}

# score SCORER ARGUMENTS: checks the answers, runs the benchmark's own scorer, writes BENCHMARK.json
score() {
    python -m llava_prune.evaluation.score "$@" \
        --model "$MODEL" \
        --mode "$MODE" \
        --method "$(method_name "$MODE")" \
        --out "$RESULTS/$BENCHMARK.json"
}
