#!/bin/bash
# Every benchmark that has its data, in one or more modes, then one table.
#
#   MODEL=liuhaotian/llava-v1.5-7b PRUNERS=outputs/llava-v1.5-7b-prune bash scripts/eval/all.sh MODE=origin,hard
#   bash scripts/eval/all.sh MODE=origin,hard PRUNERS=... BENCHMARKS=pope,gqa,textvqa
#
# A benchmark without data is passed over, and what it needs stands under the table; one that fails leaves its log.
# Exits with 1 if one failed.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

BENCHMARKS=${BENCHMARKS:-vqav2 gqa vizwiz sqa textvqa pope mme mmbench mmbench_cn seed llavabench mmvet mosaic}
IFS=',' read -ra MODES <<< "$MODE"
read -ra NAMES <<< "${BENCHMARKS//,/ }"
for NAME in "${NAMES[@]}"; do
    [[ -f $ROOT/scripts/eval/$NAME.sh && $NAME != all && $NAME != common ]] || {
        echo "$0: there is no benchmark '$NAME'; write BENCHMARKS=pope,gqa" >&2; exit 2; }
done

FAILED=0
FOLDERS=()
for MODE in "${MODES[@]}"; do
    check_mode "$MODE"
done
for MODE in "${MODES[@]}"; do
    RESULTS=$EVAL/results/$(run_name "$MODE")
    FOLDERS+=("$MODE=$RESULTS")
    mkdir -p "$RESULTS"
    for NAME in "${NAMES[@]}"; do
        echo "== $NAME, $MODE"
        STATUS=0
        rm -f "$RESULTS/$NAME.json" "$RESULTS/$NAME.missing"
        MODE=$MODE RESULTS=$RESULTS bash "$ROOT/scripts/eval/$NAME.sh" 2>&1 | tee "$RESULTS/$NAME.log" || STATUS=${PIPESTATUS[0]}
        [[ $STATUS = 0 || $STATUS = 3 ]] || FAILED=1
    done
done

python -m llava_prune.evaluation.table --benchmarks "${NAMES[@]}" --results "${FOLDERS[@]}"
exit $FAILED
