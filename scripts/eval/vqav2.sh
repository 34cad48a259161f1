#!/bin/bash
# VQAv2: a file for the server, https://eval.ai/web/challenges/challenge-page/830
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT="llava_vqav2_mscoco_test-dev2015"

begin vqav2
need "$EVAL/vqav2/$SPLIT.jsonl" "$EVAL_ZIP"
need "$EVAL/vqav2/llava_vqav2_mscoco_test2015.jsonl" "$EVAL_ZIP"
need "$EVAL/vqav2/test2015" "http://images.cocodataset.org/zips/test2015.zip"
have_all

output_file=$EVAL/vqav2/answers/$SPLIT/$CKPT/merge.jsonl
answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/vqav2/$SPLIT.jsonl" \
    --image-folder "$EVAL/vqav2/test2015" \
    --answers-file "$output_file" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

python -m llava_prune.evaluation.convert vqav2 --dir "$EVAL/vqav2" --split "$SPLIT" --ckpt "$CKPT"

score submission \
    --metric accuracy \
    --question-file "$EVAL/vqav2/$SPLIT.jsonl" \
    --result-file "$output_file" \
    --file "$EVAL/vqav2/answers_upload/$SPLIT/$CKPT.json"
