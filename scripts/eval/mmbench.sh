#!/bin/bash
# MMBench: a file for the server, https://mmbench.opencompass.org.cn
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT="mmbench_dev_20230712"

begin mmbench
need "$EVAL/mmbench/$SPLIT.tsv" "https://download.openmmlab.com/mmclassification/datasets/mmbench/$SPLIT.tsv"
have_all
need_packages pandas openpyxl

answer llava.eval.model_vqa_mmbench \
    --question-file "$EVAL/mmbench/$SPLIT.tsv" \
    --answers-file "$EVAL/mmbench/answers/$SPLIT/$CKPT.jsonl" \
    --single-pred-prompt \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

python -m llava_prune.evaluation.convert mmbench \
    --annotation-file "$EVAL/mmbench/$SPLIT.tsv" \
    --result-dir "$EVAL/mmbench/answers/$SPLIT" \
    --upload-dir "$EVAL/mmbench/answers_upload/$SPLIT" \
    --experiment "$CKPT"

score submission \
    --metric accuracy \
    --question-file "$EVAL/mmbench/$SPLIT.tsv" \
    --result-file "$EVAL/mmbench/answers/$SPLIT/$CKPT.jsonl" \
    --file "$EVAL/mmbench/answers_upload/$SPLIT/$CKPT.xlsx"
