#!/bin/bash
# SEED-Bench: scored here
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SEED_FROM="https://github.com/AILab-CVC/SEED-Bench/blob/main/DATASET.md"

begin seed
need "$EVAL/seed_bench/llava-seed-bench.jsonl" "$EVAL_ZIP"
need "$EVAL/seed_bench/SEED-Bench.json" "$SEED_FROM"
need "$EVAL/seed_bench/SEED-Bench-image" "$SEED_FROM"
need "$EVAL/seed_bench/SEED-Bench-video-image" "the middle frame of each video, $SEED_FROM"
have_all

output_file=$EVAL/seed_bench/answers/$CKPT/merge.jsonl
answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/seed_bench/llava-seed-bench.jsonl" \
    --image-folder "$EVAL/seed_bench" \
    --answers-file "$output_file" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score seed \
    --annotation-file "$EVAL/seed_bench/SEED-Bench.json" \
    --question-file "$EVAL/seed_bench/llava-seed-bench.jsonl" \
    --result-file "$output_file" \
    --result-upload-file "$EVAL/seed_bench/answers_upload/$CKPT.jsonl"
