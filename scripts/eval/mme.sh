#!/bin/bash
# MME: scored here by MME's own calculation.py, if it is in MME/eval_tool
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MME_FROM="https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation"

begin mme
need "$EVAL/MME/llava_mme.jsonl" "$EVAL_ZIP"
need "$EVAL/MME/MME_Benchmark_release_version" "$MME_FROM"
have_all

answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/MME/llava_mme.jsonl" \
    --image-folder "$EVAL/MME/MME_Benchmark_release_version" \
    --answers-file "$EVAL/MME/answers/$CKPT.jsonl" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

score mme \
    --data-dir "$EVAL/MME" \
    --question-file "$EVAL/MME/llava_mme.jsonl" \
    --result-file "$EVAL/MME/answers/$CKPT.jsonl"
