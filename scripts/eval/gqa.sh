#!/bin/bash
# GQA: scored here by GQA's own eval.py, if it is in gqa/data/eval
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT="llava_gqa_testdev_balanced"
GQADIR="$EVAL/gqa/data"

begin gqa
need "$EVAL/gqa/$SPLIT.jsonl" "$EVAL_ZIP"
need "$GQADIR/images" "https://cs.stanford.edu/people/dorarad/gqa/download.html"
have_all

output_file=$EVAL/gqa/answers/$SPLIT/$CKPT/merge.jsonl
answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/gqa/$SPLIT.jsonl" \
    --image-folder "$GQADIR/images" \
    --answers-file "$output_file" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score gqa \
    --data-dir "$GQADIR" \
    --question-file "$EVAL/gqa/$SPLIT.jsonl" \
    --result-file "$output_file"
