#!/bin/bash
# The testbed: questions about mosaics of easy-VQA pictures, made here; scored here. Without MODEL, for its tiny LLaVA.
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

MODEL=${MODEL:-$EVAL/mosaic/llava-mosaic-tiny}

begin mosaic
python -m llava_prune.testbed.prepare --out "$EVAL/mosaic" --train 1 --test "${TEST_QUESTIONS:-600}"

answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/mosaic/test.jsonl" \
    --image-folder "$EVAL/mosaic" \
    --answers-file "$EVAL/mosaic/answers/$CKPT.jsonl" \
    --temperature 0 \
    --max_new_tokens 16 \
    --conv-mode "$CONV_MODE"

score mosaic \
    --annotation-file "$EVAL/mosaic/test_answers.jsonl" \
    --question-file "$EVAL/mosaic/test.jsonl" \
    --result-file "$EVAL/mosaic/answers/$CKPT.jsonl"
