#!/bin/bash
# POPE: scored here
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin pope
need "$EVAL/pope/llava_pope_test.jsonl" "$EVAL_ZIP"
need "$EVAL/pope/coco" "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"
need "$EVAL/pope/val2014" "http://images.cocodataset.org/zips/val2014.zip"
have_all

answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/pope/llava_pope_test.jsonl" \
    --image-folder "$EVAL/pope/val2014" \
    --answers-file "$EVAL/pope/answers/$CKPT.jsonl" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score pope \
    --annotation-dir "$EVAL/pope/coco" \
    --question-file "$EVAL/pope/llava_pope_test.jsonl" \
    --result-file "$EVAL/pope/answers/$CKPT.jsonl"
