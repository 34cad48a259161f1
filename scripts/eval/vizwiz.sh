#!/bin/bash
# VizWiz: a file for the server, https://eval.ai/web/challenges/challenge-page/1911
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

begin vizwiz
need "$EVAL/vizwiz/llava_test.jsonl" "$EVAL_ZIP"
need "$EVAL/vizwiz/test" "https://vizwiz.cs.colorado.edu/VizWiz_final/images/test.zip"
have_all

answer llava.eval.model_vqa_loader \
    --question-file "$EVAL/vizwiz/llava_test.jsonl" \
    --image-folder "$EVAL/vizwiz/test" \
    --answers-file "$EVAL/vizwiz/answers/$CKPT.jsonl" \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

python -m llava_prune.evaluation.convert vizwiz \
    --annotation-file "$EVAL/vizwiz/llava_test.jsonl" \
    --result-file "$EVAL/vizwiz/answers/$CKPT.jsonl" \
    --result-upload-file "$EVAL/vizwiz/answers_upload/$CKPT.json"

score submission \
    --metric accuracy \
    --question-file "$EVAL/vizwiz/llava_test.jsonl" \
    --result-file "$EVAL/vizwiz/answers/$CKPT.jsonl" \
    --file "$EVAL/vizwiz/answers_upload/$CKPT.json"
