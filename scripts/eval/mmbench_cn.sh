#!/bin/bash
# MMBench in Chinese: a file for the server, https://mmbench.opencompass.org.cn
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

SPLIT="mmbench_dev_cn_20231003"

begin mmbench_cn
need "$EVAL/mmbench_cn/$SPLIT.tsv" "https://download.openmmlab.com/mmclassification/datasets/mmbench/$SPLIT.tsv"
have_all
need_packages pandas openpyxl

answer llava.eval.model_vqa_mmbench \
    --question-file "$EVAL/mmbench_cn/$SPLIT.tsv" \
    --answers-file "$EVAL/mmbench_cn/answers/$SPLIT/$CKPT.jsonl" \
    --lang cn \
    --single-pred-prompt \
    --temperature 0 \
    --conv-mode "$CONV_MODE"

python -m llava_prune.evaluation.convert mmbench \
    --annotation-file "$EVAL/mmbench_cn/$SPLIT.tsv" \
    --result-dir "$EVAL/mmbench_cn/answers/$SPLIT" \
    --upload-dir "$EVAL/mmbench_cn/answers_upload/$SPLIT" \
    --experiment "$CKPT"

score submission \
    --metric accuracy \
    --question-file "$EVAL/mmbench_cn/$SPLIT.tsv" \
    --result-file "$EVAL/mmbench_cn/answers/$SPLIT/$CKPT.jsonl" \
    --file "$EVAL/mmbench_cn/answers_upload/$SPLIT/$CKPT.xlsx"
