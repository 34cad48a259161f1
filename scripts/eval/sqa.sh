#!/bin/bash
# ScienceQA: scored here
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin sqa
need "$EVAL/scienceqa/llava_test_CQM-A.json" "$EVAL_ZIP"
need "$EVAL/scienceqa/images/test" "data/scienceqa of https://github.com/lupantech/ScienceQA"
need "$EVAL/scienceqa/pid_splits.json" "data/scienceqa of https://github.com/lupantech/ScienceQA"
need "$EVAL/scienceqa/problems.json" "data/scienceqa of https://github.com/lupantech/ScienceQA"
have_all

answer llava.eval.model_vqa_science \
    --question-file "$EVAL/scienceqa/llava_test_CQM-A.json" \
    --image-folder "$EVAL/scienceqa/images/test" \
    --answers-file "$EVAL/scienceqa/answers/$CKPT.jsonl" \
    --single-pred-prompt \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score sqa \
    --base-dir "$EVAL/scienceqa" \
    --question-file "$EVAL/scienceqa/llava_test_CQM-A.json" \
    --result-file "$EVAL/scienceqa/answers/$CKPT.jsonl"
