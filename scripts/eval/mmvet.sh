#!/bin/bash
# MM-Vet: a file for its grader, https://huggingface.co/spaces/whyu/MM-Vet_Evaluator
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin mmvet
need "$EVAL/mm-vet/llava-mm-vet.jsonl" "$EVAL_ZIP"
need "$EVAL/mm-vet/images" "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
have_all

answer llava.eval.model_vqa \
    --question-file "$EVAL/mm-vet/llava-mm-vet.jsonl" \
    --image-folder "$EVAL/mm-vet/images" \
    --answers-file "$EVAL/mm-vet/answers/$CKPT.jsonl" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

python -m llava_prune.evaluation.convert mmvet \
    --src "$EVAL/mm-vet/answers/$CKPT.jsonl" \
    --dst "$EVAL/mm-vet/results/$CKPT.json"

score submission \
    --metric "GPT-4 grade" \
    --question-file "$EVAL/mm-vet/llava-mm-vet.jsonl" \
    --result-file "$EVAL/mm-vet/answers/$CKPT.jsonl" \
    --file "$EVAL/mm-vet/results/$CKPT.json"
